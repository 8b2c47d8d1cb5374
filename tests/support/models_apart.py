"""A model taken apart, to be put together again with a change."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import gguf_fixtures as fixtures
from gguf_fixtures import Spec, field

from dfqs_nb.gguf.header import read_header


@dataclass(frozen=True)
class Apart:
    """Metadata records and tensors of a model."""

    fields: dict[str, bytes]
    specs: tuple[Spec, ...]

    @classmethod
    def of(cls, path: Path) -> Apart:
        """Take the model in a single file apart; fields that say how it was made are left out."""
        header, blob = read_header(path), path.read_bytes()
        fields = {
            name: header.raw[slice(*entry.record)]
            for name, entry in header.fields.items()
            if not name.startswith(("split.", "quantize."))
        }
        specs = (
            Spec(t.name, t.type_code, t.shape, data=blob[header.data_offset + t.offset :][: t.nbytes])
            for t in header.tensors
        )
        return cls(fields, tuple(specs))

    def bytes(self) -> bytes:
        """The file."""
        return fixtures.gguf_bytes(list(self.fields.values()), self.specs)

    def without_field(self, name: str) -> Apart:
        """The model without a metadata field."""
        return replace(self, fields={key: record for key, record in self.fields.items() if key != name})

    def with_field(self, name: str, kind: str, value: object) -> Apart:
        """The model with another value of a metadata field."""
        return replace(self, fields={**self.fields, name: field(name, kind, value)})

    def change(self, target: str, /, **changes: object) -> Apart:
        """The model with a tensor changed; its data is zeros where the size changes."""
        return replace(
            self, specs=tuple(_changed(spec, changes) if spec.name == target else spec for spec in self.specs)
        )

    def without(self, name: str) -> Apart:
        """The model without a tensor."""
        return replace(self, specs=tuple(spec for spec in self.specs if spec.name != name))

    def with_tensor(self, spec: Spec) -> Apart:
        """The model with one tensor more."""
        return replace(self, specs=(*self.without(spec.name).specs, spec))


def _changed(spec: Spec, changes: dict[str, object]) -> Spec:
    new = replace(spec, **changes)
    return new if new.nbytes == len(spec.bytes()) else replace(new, data=bytes(new.nbytes))
