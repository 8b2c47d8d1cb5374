"""Frozen prompt sets: wording, licence and source in a file under ``data/prompts/``, known by its hash."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from dfqs_nb.core.errors import PromptError
from dfqs_nb.core.paths import data_dir, tilde

# The long-context probe of each tier.
PROBES = {"nano": "long-context-nano-keys", "standard": "long-context-standard"}


@dataclass(frozen=True)
class PromptSet:
    """One frozen set. ``sha256`` is that of the file, so any change of wording is another set.

    A set may be ``of`` another: its wording in another tier. Then the other's hash is hashed with the file.
    """

    name: str
    tier: str
    licence: str
    source: str
    sha256: str
    content: dict[str, Any] = field(repr=False, hash=False)

    def __getitem__(self, key: str) -> Any:
        try:
            return self.content[key]
        except KeyError:
            raise PromptError(
                f"the prompt set {self.name} has no {key!r}", hint="restore it with git"
            ) from None

    def get(self, key: str, default: Any = None) -> Any:
        """A field that only some sets have."""
        return self.content.get(key, default)

    def identity(self) -> dict[str, str]:
        """Name and hash, for the conditions of a report."""
        return {"prompt_set": self.name, "prompt_set_sha256": self.sha256}


def load_prompts(name: str) -> PromptSet:
    """A prompt set by its name, like ``"long-context-nano"``.

    Raises:
        PromptError: there is no such set, or its file is not one.

    >>> load_prompts("long-context-nano").licence
    'MIT'
    """
    folder = data_dir() / "prompts"
    path = folder / f"{name.replace('-', '_')}.json"
    try:
        raw = path.read_bytes()
        content = json.loads(raw)
        if "of" in content:
            whole = load_prompts(content["of"])
            raw, content = raw + whole.sha256.encode(), whole.content | content
        fields = {key: content[key] for key in ("name", "tier", "licence", "source")}
    except FileNotFoundError:
        known = ", ".join(sorted(one.stem.replace("_", "-") for one in folder.glob("*.json")))
        raise PromptError(f"no prompt set is called {name!r}", hint=f"there are: {known or 'none'}") from None
    except (ValueError, KeyError) as error:
        raise PromptError(
            f"not a prompt set ({error})", where=tilde(path), hint="restore it with git"
        ) from error
    return PromptSet(**fields, sha256=hashlib.sha256(raw).hexdigest(), content=content)
