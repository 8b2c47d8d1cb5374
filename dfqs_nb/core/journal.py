"""Records of finished work, so that a killed run resumes where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dfqs_nb.core.files import canonical_sha256, parse_json, write_json

# They change how long work takes but no number; free memory decides them anew at every start.
TIME_ONLY = {"paging"}
ROW_HASH = "row_sha256"  # of all else in a row, shortened


def conditions_hash(conditions: Mapping[str, Any]) -> str:
    """A short hash of conditions without `TIME_ONLY`; the order of keys does not matter."""
    return canonical_sha256({name: conditions[name] for name in conditions if name not in TIME_ONLY})[:16]


def differing_fields(
    a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """The fields in which two nested conditions differ, without `TIME_ONLY`, with both values."""
    differing: dict[str, tuple[Any, Any]] = {}
    for key in sorted({*a, *b} - TIME_ONLY):
        mine, theirs = a.get(key, "absent"), b.get(key, "absent")
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            differing |= differing_fields(mine, theirs, f"{prefix}{key}.")
        elif mine != theirs:
            differing[f"{prefix}{key}"] = (mine, theirs)
    return differing


def holds(row: Mapping[str, Any], fields: Mapping[str, type]) -> bool:
    """Whether a row has these fields with these types."""
    return all(isinstance(row.get(name), kind) for name, kind in fields.items())


def _hash_of(row: Mapping[str, Any]) -> str:
    return canonical_sha256(row)[:16]


class Journal(dict[str, dict[str, Any]]):
    """Rows of a JSONL file that were made under the same conditions, by their id, in the order of writing.

    `add` returns after its row, with its hash, is on the disk. A last line that a kill cut short is removed.
    Rows of other conditions, and rows that are not as they were written, are ignored: their items are
    measured again. ``fields``: what each row must have (see `holds`); ``whole``: whether a row is more.
    """

    def __init__(
        self,
        path: str | Path,
        conditions: Mapping[str, Any],
        *,
        fresh: bool = False,
        fields: Mapping[str, type] = MappingProxyType({}),
        whole: Callable[[dict[str, Any]], bool] = lambda row: True,
    ) -> None:
        self.path, self.key = Path(path), conditions_hash(conditions)
        if fresh:
            self.path.unlink(missing_ok=True)
        raw = self.path.read_bytes() if self.path.exists() else b""
        if (end := raw.rfind(b"\n") + 1) < len(raw):
            os.truncate(self.path, end)
        for line in raw[:end].split(b"\n"):
            with suppress(ValueError, RecursionError):  # a damaged line: its item is measured again
                row = parse_json(line)
                is_as_written = isinstance(row, dict) and row.pop(ROW_HASH, None) == _hash_of(row)
                if is_as_written and row.pop("conditions", None) == self.key:
                    item = row.pop("id", None)
                    if isinstance(item, str) and holds(row, fields) and whole(row):
                        self[item] = row

    def rows(self) -> list[dict[str, Any]]:
        """All rows, each with its id."""
        return [{"id": item, **row} for item, row in self.items()]

    def add(self, item: str, **row: Any) -> dict[str, Any]:
        """Append a row and return it as it will be read."""
        row = json.loads(json.dumps(row))
        whole = {"conditions": self.key, "id": item, **row}
        line = json.dumps(whole | {ROW_HASH: _hash_of(whole)})  # ASCII: no text can break the file
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self[item] = row
        return row


def remembered(
    note: str | Path,
    conditions: Mapping[str, Any],
    make: Callable[[], Mapping[str, Any]],
    *,
    fresh: bool = False,
) -> dict[str, Any]:
    """The facts in the JSON file ``note`` if it was written under these conditions; else make and write them.

    ``fresh``: make them in any case. The file holds the hash of the conditions as ``key``.
    """
    note, key = Path(note), conditions_hash(conditions)
    if not fresh and note.exists():
        with suppress(ValueError, RecursionError):  # a damaged note: the work is done again
            facts = json.loads(note.read_text(encoding="utf-8"))
            if isinstance(facts, dict) and facts.pop("key", None) == key:
                return facts
    note.unlink(missing_ok=True)  # `make` may replace files that the old note describes
    facts = dict(make())
    write_json(note, {"key": key, **facts})
    return facts
