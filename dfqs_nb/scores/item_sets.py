"""Frozen sets of questions with their answers or tests, as JSONL.

The first line describes the set, and its hash identifies it.

A set of your own is a file like those in ``data/prompts/``, in a folder of your choice::

    {"set": "my-questions", "kind": "reasoning", "extract": "last line", "max_tokens": 64}
    {"id": "1", "family": "capitals", "prompt": "What is the capital of Peru?", "answer": "Lima"}
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MinLen

from dfqs_nb.core.errors import PromptError
from dfqs_nb.core.files import there_is
from dfqs_nb.core.paths import data_dir, tilde
from dfqs_nb.scores.answers import code_in
from dfqs_nb.scores.sandbox import Candidate

TIERS = {
    "nano": ("nano-reasoning", "nano-code"),
    "standard": ("standard-reasoning", "standard-code", "gsm8k-100"),
}
LONGEST_NAME = 120  # bytes, of a set: its files' names begin and end with more
Text = Annotated[str, MinLen(1)]
Share = Annotated[float, Ge(0), Le(1)]


@dataclass(frozen=True)
class Item:
    """One question.

    ``answer`` is a reasoning item's; ``tests``, ``entry_point`` and ``reference`` (a right solution) are a
    code item's. ``guess`` is the chance of being right without reasoning.
    """

    id: Text
    prompt: Text
    family: Text = "all"
    length: str = "short"
    guess: Share = 0.0
    answer: str = ""
    tests: str = ""
    entry_point: str = ""
    reference: str = ""

    def asked(self, instruction: str) -> str:
        """The message to the model in a chat.

        >>> Item("1", "p").asked(" Why?"), Item("1", "p").asked("Read {prompt}.")
        ('p Why?', 'Read p.')
        """
        around = instruction if "{prompt}" in instruction else "{prompt}" + instruction
        return around.replace("{prompt}", self.prompt)

    def candidate(self, answer: str, mode: str) -> Candidate | None:
        """The code in an answer with this item's tests; None where a chat's answer has none.

        In a chat, the answer's code runs after the prompt with an empty body, whose imports it may rely on.
        """
        sources: tuple[str, ...] = (self.prompt + answer,)
        if mode == "chat":
            code = code_in(answer, self.entry_point, self.prompt)
            if code is None:
                return None
            sources = (f"{self.prompt}    pass\n", code)
        helpers = self.prompt + (self.reference or "    pass\n")
        return Candidate(sources, self.tests, self.entry_point, helpers)


@dataclass(frozen=True)
class Head:
    """The first line of a set; fields that are not here are kept, and mean nothing to the workbook.

    Attributes:
        kind: ``reasoning`` (the answer is compared) or ``code`` (the candidate is run).
        mode: ``chat`` (through the chat template, with ``instruction`` behind the prompt, or around it
            where it has a ``{prompt}``; of code the answer's code counts) or ``complete`` (plain
            continuation, which is also what a code set falls back to where a model has no chat template).
        tier: ``nano``, ``standard``, or ``own``; scores of different tiers are never put side by side.
        stop, max_tokens: where generation ends; the stop texts of a code set are for plain continuation.
    """

    set: Text
    kind: Literal["reasoning", "code"]
    mode: Literal["chat", "complete", ""] = ""
    extract: Literal["answer tag", "last line"] = "last line"
    tier: str = "own"
    instruction: str = ""
    stop: tuple[Text, ...] = ()
    max_tokens: Annotated[int, Ge(1)] = 256
    licence: str = "not stated"
    source: str = "not stated"
    guess_rule: str = "not stated"


@dataclass(frozen=True, kw_only=True)
class ItemSet(Head):
    """A set; ``sha256`` is that of its file, so any change is another set."""

    sha256: str
    items: tuple[Item, ...] = field(repr=False)
    divisor: int = 1  # of a part: 1 of so many questions of each family
    n_families: int = 0  # of a part: only the first ones; 0: all

    @property
    def name(self) -> str:
        """The name of the set."""
        return self.set

    @classmethod
    def load(cls, name: str | Path, folder: str | Path | None = None) -> ItemSet:
        """A set by its name, from ``folder`` or the shipped ones, or by the path of its file.

        Raises:
            PromptError: there is no such set, or its file is broken; the message names line and field.
        """
        if Path(name).suffix == ".jsonl":
            return _read(Path(name))
        paths = {**item_set_paths(), **(item_set_paths(folder) if folder else {})}
        if str(name) not in paths:
            raise PromptError(f"no question set {str(name)!r}", hint=f"there are: {', '.join(sorted(paths))}")
        return _read(paths[str(name)])

    @classmethod
    def of_tier(cls, tier: str, folder: str | Path | None = None) -> list[ItemSet]:
        """The sets of a tier, and the user's own from ``folder``, in a fixed order.

        Raises:
            PromptError: there is no such tier, or a file is broken.
        """
        if tier not in TIERS:
            raise PromptError(f"no tier is called {tier!r}", hint=f"there are: {', '.join(TIERS)}")
        own = item_set_paths(folder).values() if folder else ()
        return [cls.load(name) for name in (*TIERS[tier], *own)]

    def identity(self) -> dict[str, Any]:
        """What a score depends on, for the conditions of a run."""
        facts = {"prompt_set": self.name, "prompt_set_sha256": self.sha256, "tier": self.tier}
        return facts | {"max_tokens": self.max_tokens} | ({"part": self.share} if self.share else {})

    @property
    def share(self) -> str:
        """What a part holds; empty for a whole set."""
        some = f"{self.n_families} families" if self.n_families else "all families"
        return f"1 of {self.divisor} questions of {some}" if self.divisor > 1 or self.n_families else ""

    def part(self, divisor: int, n_families: int = 0) -> ItemSet:
        """The first of each family's questions, 1 of ``divisor`` and at least one; larger parts hold it.

        ``n_families``: only the first families; 0: all. It keeps the name: its ``identity`` says that it is a
        part.
        """
        chosen = self.families()[: n_families or None]
        sizes = Counter(item.family for item in self.items if item.family in chosen)
        taken, items = Counter[str](), []
        for item in self.items:
            taken[item.family] += 1
            items += [item] if taken[item.family] <= -(-sizes[item.family] // divisor) else []
        if len(items) == len(self.items):
            divisor, n_families = 1, 0
        return replace(self, items=tuple(items), divisor=divisor, n_families=n_families)

    def row(self) -> dict[str, Any]:
        """The set in one row of a table."""
        sizes = {"items": len(self.items), "families": len(self.families())}
        facts = {"guess rule": self.guess_rule, "licence": self.licence, "sha256": self.sha256[:12]}
        return {"set": self.name, "kind": self.kind, **sizes, **facts}

    def families(self) -> list[str]:
        """The families, in the order of their first item."""
        return list(dict.fromkeys(item.family for item in self.items))


def item_set_paths(folder: str | Path | None = None) -> dict[str, Path]:
    """Every ``*.jsonl`` of a folder (by default the shipped ones) by the name its first line gives."""
    paths = {}
    for path in sorted((Path(folder) if folder else data_dir() / "prompts").glob("*.jsonl")):
        with path.open("rb") as file:
            paths[_head(file.readline(), path).set] = path
    return paths


def _read(path: Path) -> ItemSet:
    head, items, sha256 = read_set(path, Head, Item, _fault)
    mode = head.mode or ("complete" if head.kind == "code" else "chat")
    return ItemSet(**asdict(head) | {"mode": mode, "sha256": sha256}, items=items)


def _fault(head: Head, item: Item | None) -> str:
    """What an item lacks for its kind of set; empty if nothing."""
    if item is None:
        return ""
    for name in ("answer",) if head.kind == "reasoning" else ("tests", "entry_point"):
        if not getattr(item, name):
            return f"no {name}"
    if head.kind == "code" and not item.entry_point.isidentifier():
        return f"entry_point: {item.entry_point!r:.60} is no name of a function"
    try:
        compile(item.tests, "tests", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"tests: not Python ({str(error) or 'too deep'})"
    return ""


def read_set(
    path: Path, head_kind: Any, item_kind: Any, fault: Callable[[Any, Any], str]
) -> tuple[Any, tuple[Any, ...], str]:
    """The head and the items of a JSONL file, each line typed and checked, and the file's SHA-256.

    ``fault`` says what is wrong with an item, or with the head where it gets None.
    """
    if there_is(path) and not path.is_file():
        raise PromptError("not a regular file", where=tilde(path), hint="give the path of a JSONL file")
    try:
        raw = path.read_bytes()
    except OSError as error:
        hint = "give the path of a JSONL file, or the name of a set"
        raise PromptError(f"cannot be read ({error.strerror})", where=tilde(path), hint=hint) from error
    first, *lines = raw.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    head, items = _head(first, path, head_kind), dict[str, Any]()
    if what := fault(head, None):
        raise _broken(path, 1, what)
    for number, line in enumerate(lines, start=2):
        if line.strip():
            item = _typed(item_kind, line, number, path)
            what = f"the id {item.id!r:.60} is taken" if item.id in items else fault(head, item)
            if what:
                raise _broken(path, number, what)
            items[item.id] = item
    if not items:
        raise _broken(path, 2, "there are no items")
    return head, tuple(items.values()), hashlib.sha256(raw).hexdigest()


def _head(line: bytes, path: Path, kind: Any = Head) -> Any:
    """The first line, if its set's name can name files."""
    head = _typed(kind, line, 1, path)
    fits = head.set.strip() and len(head.set.encode()) <= LONGEST_NAME
    if not fits or not all(character.isalnum() or character in "-_. " for character in head.set):
        rule = "use up to 120 letters, digits, '-', '_' and '.'"
        raise _broken(path, 1, f"set: {head.set!r:.60} names files: {rule}")
    return head


@cache
def _reader(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _typed(kind: Any, line: bytes, number: int, path: Path) -> Any:
    """A line as that dataclass, each value of exactly the type that the field states."""
    from pydantic import ValidationError

    try:
        return _reader(kind).validate_json(line, strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(str(part) for part in fault["loc"])
        shown = "" if fault["type"] in ("missing", "json_invalid") else f" ({fault['input']!r:.60})"
        raise _broken(path, number, f"{name + ': ' if name else ''}{fault['msg']}{shown}") from None


def _broken(path: Path, number: int, what: str) -> PromptError:
    return PromptError(f"line {number}: {what}", where=tilde(path), hint="see data/prompts/ for the format")
