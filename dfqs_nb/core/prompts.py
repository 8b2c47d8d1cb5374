"""Frozen prompt sets: wording, licence and source in a file of ``data/prompts/``, identified by its hash."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from dfqs_nb.core.display import one_line
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.paths import data_dir, tilde

AnySet = TypeVar("AnySet", bound="PromptSet")


class PromptSet(BaseModel):
    """A frozen set. ``sha256`` is that of its file, so a change of wording makes another set.

    A set may be ``of`` another: its wording in another tier. Then the file is hashed with the other's hash.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str
    tier: Literal["nano", "standard"]
    licence: str
    source: str
    sha256: str

    def identity(self) -> dict[str, str]:
        """Name and hash, for the conditions of a report."""
        return {"prompt_set": self.name, "prompt_set_sha256": self.sha256}


def load_prompts(name: str, kind: type[AnySet]) -> AnySet:
    """A frozen set by its name; ``kind``: `PromptSet`, or a class derived from it that names the fields."""
    folder = data_dir() / "prompts"

    def read(name: str) -> bytes:
        return (folder / f"{name.replace('-', '_')}.json").read_bytes()

    try:
        content: dict[str, Any] = json.loads(raw := read(name))
        if "of" in content:
            whole = read(content["of"])
            raw, content = raw + hashlib.sha256(whole).hexdigest().encode(), json.loads(whole) | content
        return kind(**content, sha256=hashlib.sha256(raw).hexdigest())
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem.replace("_", "-") for file in folder.glob("*.json")))
        raise DfqsError(f"no prompt set is called {name!r}", hint=f"there are: {known or 'none'}") from None
    except (ValueError, TypeError) as error:  # pydantic's errors are ValueErrors
        what = f"{name} is of another kind, or damaged ({one_line(error):.100})"
        hint = "name another prompt set, or restore it with git"
        raise DfqsError(what, where=tilde(folder), hint=hint) from error
