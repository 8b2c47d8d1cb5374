"""Frozen sets of questions with their answers or tests: JSONL, described by its first line, known by its
hash.

A set of your own is a file like those in ``data/prompts/``, in a folder of your choice::

    {"set": "my-questions", "kind": "reasoning", "extract": "last line", "max_tokens": 64}
    {"id": "1", "family": "capitals", "prompt": "What is the capital of Peru?", "answer": "Lima"}
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dfqs_nb.context.prompts import PromptError
from dfqs_nb.core.paths import data_dir, tilde

TIERS = {
    "nano": ("nano-reasoning", "nano-code"),
    "standard": ("standard-reasoning", "standard-code", "gsm8k-100"),
}
KINDS = ("reasoning", "code")
MODES = ("chat", "complete")
EXTRACTS = ("answer tag", "last line")


@dataclass(frozen=True)
class Item:
    """One question. ``answer`` is a reasoning item's; ``tests``, ``entry_point`` and ``reference`` (a right
    solution) are a code item's. ``guess`` is the chance of being right without reasoning."""

    id: str
    family: str
    prompt: str
    length: str = "short"
    guess: float = 0.0
    answer: str = ""
    tests: str = ""
    entry_point: str = ""
    reference: str = ""

    def asked(self, instruction: str) -> str:
        """The message to the model in a chat.

        >>> Item("1", "f", "p").asked(" Why?"), Item("1", "f", "p").asked("Read {prompt}.")
        ('p Why?', 'Read p.')
        """
        if "{prompt}" in instruction:
            return instruction.replace("{prompt}", self.prompt)
        return self.prompt + instruction

    def completed(self, answer: str) -> str | None:
        """What to put behind a code item's prompt, from a chat's answer: the first code block that defines
        the function, below a body that it replaces. None where there is no such block.
        """
        for block in re.findall(r"^```[^\n]*\n(.*?)^```", answer + "\n", flags=re.DOTALL | re.MULTILINE):
            if re.search(rf"^(async )?def {re.escape(self.entry_point)}\b", block, flags=re.MULTILINE):
                return f"    pass\n\n{block}"
        return None

    def program(self, completion: str) -> str:
        """A code item's candidate with its tests; it ends well when they pass.

        >>> print(Item("1", "f", "def one():\\n", tests="def check(c): assert c() == 1",
        ...            entry_point="one").program("    return 1"))
        def one():
            return 1
        def check(c): assert c() == 1
        check(one)
        """
        return f"{self.prompt}{completion}\n{self.tests}\ncheck({self.entry_point})"


@dataclass(frozen=True)
class ItemSet:
    """One set. ``sha256`` is that of the file, so any change is another set.

    Attributes:
        tier: ``nano``, ``standard``, or ``own``; scores of different tiers are never put side by side.
        kind: ``reasoning`` (the answer is compared) or ``code`` (the candidate is run).
        mode: ``chat`` (through the chat template, with ``instruction`` behind the prompt, or around it
            where it has a ``{prompt}``; of code the answer's code block counts) or ``complete`` (plain
            continuation, which is also what a code set falls back to where a model has no chat template).
        extract: where a reasoning answer is found: ``answer tag`` or ``last line``.
        stop, max_tokens: where generation ends; the stop texts of a code set are for plain continuation.
        header: the set's first line, whole.
    """

    name: str
    tier: str
    kind: str
    mode: str
    extract: str
    instruction: str
    stop: tuple[str, ...]
    max_tokens: int
    licence: str
    source: str
    sha256: str
    items: tuple[Item, ...] = field(repr=False)
    header: dict[str, Any] = field(repr=False, hash=False, compare=False)

    def identity(self) -> dict[str, Any]:
        """What a score depends on, for the conditions of a run."""
        return {
            "prompt_set": self.name,
            "prompt_set_sha256": self.sha256,
            "tier": self.tier,
            "max_tokens": self.max_tokens,
        }

    def families(self) -> list[str]:
        """The families, in the order of their first item."""
        return list(dict.fromkeys(item.family for item in self.items))


def find_item_sets(folder: str | Path | None = None) -> dict[str, Path]:
    """Every ``*.jsonl`` of a folder (by default the shipped ones) by the name its first line gives."""
    folder = Path(folder) if folder else data_dir() / "prompts"
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        with path.open(encoding="utf-8", errors="replace") as file:
            found[_header(file.readline(), path)["set"]] = path
    return found


def load_item_set(name: str | Path, folder: str | Path | None = None) -> ItemSet:
    """A set by its name, or by the path of its file.

    Args:
        folder: looked through before the shipped sets.

    Raises:
        PromptError: there is no such set, or a line of it is wrong; the message names the line.

    >>> load_item_set("nano-code").licence
    'MIT'
    """
    if str(name).endswith(".jsonl"):
        return _read(Path(name))
    known = find_item_sets() | (find_item_sets(folder) if folder else {})
    if name not in known:
        raise PromptError(
            f"no set of questions is called {str(name)!r}", hint=f"there are: {', '.join(known) or 'none'}"
        )
    return _read(known[str(name)])


def sets_of_tier(tier: str, folder: str | Path | None = None) -> list[ItemSet]:
    """The shipped sets of a tier, then those of the user's folder."""
    if tier not in TIERS:
        raise PromptError(f"no tier is called {tier!r}", hint=f"there are: {', '.join(TIERS)}")
    own = [load_item_set(path) for path in find_item_sets(folder).values()] if folder else []
    return [load_item_set(name) for name in TIERS[tier]] + own


def _read(path: Path) -> ItemSet:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PromptError(
            f"cannot be read ({error.strerror})", where=tilde(path), hint="give the path of a JSONL file"
        ) from error
    lines = raw.decode("utf-8", "replace").splitlines()
    header = _header(lines[0] if lines else "", path)
    items = tuple(_items(lines[1:], header["kind"], path))
    texts = {
        key: header.get(key, default)
        for key, default in (
            ("tier", "own"),
            ("instruction", ""),
            ("licence", "not stated"),
            ("source", "not stated"),
        )
    }
    code = header["kind"] == "code"
    return ItemSet(
        name=header["set"],
        kind=header["kind"],
        mode=header.get("mode", "complete" if code else "chat"),
        extract=header.get("extract", "last line"),
        stop=tuple(header.get("stop", ())),
        max_tokens=header.get("max_tokens", 256),
        sha256=hashlib.sha256(raw).hexdigest(),
        items=items,
        header=header,
        **texts,
    )


def _header(line: str, path: Path) -> dict[str, Any]:
    header = _parsed(line, 1, path)
    allowed = {"kind": KINDS, "mode": MODES, "extract": EXTRACTS}
    for key, values in allowed.items():
        if key in header and header[key] not in values:
            raise _broken(path, 1, f"{key} is {header[key]!r}, not {' or '.join(values)}")
    if not isinstance(header.get("set"), str) or "kind" not in header:
        raise _broken(path, 1, 'the first line needs "set" (a name) and "kind"')
    return header


def _items(lines: Iterable[str], kind: str, path: Path) -> Iterable[Item]:
    needed = ("id", "prompt", "answer") if kind == "reasoning" else ("id", "prompt", "tests", "entry_point")
    seen: set[str] = set()
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        row = {"family": "all", **_parsed(line, number, path)}
        missing = [key for key in needed if not row.get(key)]
        if missing or row["id"] in seen:
            fault = f"no {', '.join(missing)}" if missing else f"the id {row['id']!r} is taken"
            raise _broken(path, number, fault)
        seen.add(row["id"])
        yield Item(**{key: value for key, value in row.items() if key in Item.__dataclass_fields__})
    if not seen:
        raise _broken(path, 2, "there are no items")


def _parsed(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise _broken(path, number, f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise _broken(path, number, "not a JSON object")
    return row


def _broken(path: Path, number: int, what: str) -> PromptError:
    return PromptError(f"line {number}: {what}", where=tilde(path), hint="see data/prompts/ for the format")
