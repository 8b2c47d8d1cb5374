"""Frozen sets of questions as JSONL, known by the file's hash; `data/prompts/README.md` shows the format."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, MinLen
from pydantic import Field, SkipValidation, TypeAdapter

from dfqs_nb.core import files, paths
from dfqs_nb.core.display import did_you_mean
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.scores.grading import code_in, names_in, normalised, parsed
from dfqs_nb.scores.sandbox import Candidate

TIERS = {"nano": ["nano-reasoning-hard", "nano-code"]}
TIERS |= {"standard": ["standard-reasoning", "standard-code", "gsm8k-100"]}
NEEDED = {"reasoning": ("answer",), "code": ("tests", "entry_point"), "choice": ("choices",)}  # of an item
Text = Annotated[str, MinLen(1)]


@dataclass(frozen=True)
class Item:
    """One question."""

    id: Text
    prompt: Text
    family: Text = "all"
    length: str = "short"
    guess: Annotated[float, Ge(0), Le(1)] = 0.0  # the chance of being right without reasoning
    answer: str = ""  # of a reasoning item
    tests: str = ""  # this and the next two: of a code item
    entry_point: str = ""
    reference: str = ""  # a right solution
    choices: tuple[Text, ...] = ()  # of a multiple-choice item
    gold: Annotated[int, Ge(0)] = 0  # the index of the right choice

    def asked(self, instruction: str) -> str:
        """The message to the model in a chat: the instruction behind the prompt, or around ``{prompt}``."""
        around = instruction if "{prompt}" in instruction else "{prompt}" + instruction
        return around.replace("{prompt}", self.prompt)

    def candidate(self, answer: str, mode: str) -> Candidate | None:
        """The code in an answer with this item's tests; None where a chat's answer has none."""
        sources: tuple[str, ...] = (self.prompt + answer,)
        if mode == "chat":
            if (code := code_in(answer, self.entry_point)) is None:
                return None
            task = f"{self.prompt}    pass\n"  # if it is no prose, the code may rely on its imports
            sources = (task, code) if parsed(task)[0] else (code,)
        helpers = self.prompt + (self.reference or "    pass\n")
        return Candidate(sources, self.tests, self.entry_point, helpers)


@dataclass(frozen=True)
class ItemSet:
    """A set: what its first line states (other fields in it have no effect), and its questions."""

    name: Annotated[Text, Field(alias="set")]
    kind: Literal["reasoning", "code", "choice"]  # answers are compared, run, or chosen by likelihood
    # Through the chat template, or plain continuation; also how code is asked of a model without a template.
    mode: Literal["chat", "complete", ""] = ""
    extract: Literal["answer tag", "last line"] = "last line"
    tier: str = "own"  # or ``nano`` or ``standard``; scores of different tiers are never compared
    instruction: str = ""  # of a chat: behind the prompt, or around it where it has a ``{prompt}``
    stop: tuple[Text, ...] = ()  # for plain continuation only where the set is code
    max_tokens: Annotated[int, Ge(1)] = 256
    delimiter: str = " "  # between a prompt and a choice
    per_character: bool = False  # a choice's log-likelihood by its length, as lm-eval's ``acc_norm``
    licence: str = "not stated"
    source: str = "not stated"
    guess_rule: str = "not stated"
    # of the whole file: what the first line has under these names has no effect
    sha256: SkipValidation[str] = ""
    items: SkipValidation[tuple[Item, ...]] = field(default=(), repr=False)
    n_whole: SkipValidation[int] = 0  # items of the whole set

    @classmethod
    def load(cls, name: str | Path) -> ItemSet:
        """A set by its file's path, or a shipped one by its name; or a `DfqsError`."""
        if Path(name).suffix == ".jsonl":
            return _read(Path(name))
        known = {path.stem.replace("_", "-"): path for path in (paths.data_dir() / "prompts").glob("*.jsonl")}
        if str(name) not in known:
            hint = f"{did_you_mean(str(name), known)}there are: {', '.join(sorted(known))}, or a .jsonl file"
            raise DfqsError(f"no question set {str(name)!r}", hint=hint)
        return _read(known[str(name)])

    @classmethod
    def load_all(cls, names: Iterable[str | Path]) -> list[ItemSet]:
        """Several sets. Tables tell them by their names, so two of one name are a `DfqsError`."""
        sets = [cls.load(name) for name in names]
        name, times = Counter(each.name for each in sets).most_common(1)[0]
        if times > 1:
            raise DfqsError(f"two sets have the name {name!r}", hint="change it in the first line of one")
        return sets

    @classmethod
    def of_tier(cls, tier: str, folder: str | Path | None = None, *, choices: bool = False) -> list[ItemSet]:
        """The sets of a tier, then the user's own from ``folder``; a `DfqsError` as `load_all`.

        ``choices``: before them the first one as multiple choice, which takes the least time.
        """
        if tier not in TIERS:
            raise DfqsError(f"no tier is called {tier!r}", hint=f"there are: {', '.join(TIERS)}")
        own = sorted(Path(folder).expanduser().glob("*.jsonl")) if folder else []
        if folder and not own:
            raise DfqsError("no folder with question sets (*.jsonl)", where=paths.tilde(folder))
        return cls.load_all([*[f"{TIERS[tier][0]}-choices"] * choices, *TIERS[tier], *own])

    def identity(self) -> dict[str, Any]:
        """What a score depends on, for the conditions of a run."""
        facts = {"prompt_set": self.name, "prompt_set_sha256": self.sha256, "tier": self.tier}
        return facts | {"max_tokens": self.max_tokens}

    def by_turns(self) -> list[Item]:
        """The questions in an order of which every beginning is spread evenly over the families."""
        families = defaultdict[str, list[Item]](list)
        for item in self.items:
            families[item.family].append(item)
        return [item for turn in zip_longest(*families.values()) for item in turn if item]

    def part(self, n: int) -> ItemSet:
        """``n`` questions (0: all), spread evenly over the families. A larger part holds a smaller one."""
        chosen = {item.id for item in self.by_turns()[: n or None]}
        return replace(self, items=tuple(item for item in self.items if item.id in chosen))

    def row(self) -> dict[str, Any]:
        """The set in one row of a table."""
        sizes = {"items": len(self.items), "families": len({item.family for item in self.items})}
        facts = {"guess rule": self.guess_rule, "licence": self.licence, "sha256": self.sha256[:12]}
        return {"set": self.name, "kind": self.kind, **sizes, **facts}


HEAD, ITEM = TypeAdapter(ItemSet), TypeAdapter(Item)


def _read(path: Path) -> ItemSet:
    """A set from its file; a `DfqsError` names the line and its fault."""
    if files.there_is(path) and not path.is_file():
        raise DfqsError("not a regular file", where=paths.tilde(path), hint="give the path of a JSONL file")
    try:
        raw = path.read_bytes()
    except OSError as error:
        hint = "give the path of a JSONL file, or the name of a set"
        raise DfqsError(f"cannot be read ({error.strerror})", where=paths.tilde(path), hint=hint) from error
    (first, *lines), number, items = raw.split(b"\n"), 1, dict[str, Item]()
    try:
        if not raw.strip():
            raise ValueError("the file is empty")
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ValueError("this is UTF-16; save the file as UTF-8")
        head = HEAD.validate_json(first.removeprefix(b"\xef\xbb\xbf"), strict=True)
        if not re.fullmatch(r"(?=.*\S)[\w. -]{1,50}", head.name):
            rule = "use up to 50 letters, digits, '-', '_' and '.'"
            raise ValueError(f"set: {head.name!r:.60} names files: {rule}")
        _check_spelling(first, ItemSet)
        number = 2
        for number, line in enumerate(lines, start=2):  # noqa: B007 (the message names it)
            if line.strip():
                item = ITEM.validate_json(line, strict=True)
                _check_spelling(line, Item)
                if what := f"the id {item.id!r:.60} is taken" if item.id in items else _fault(head, item):
                    raise ValueError(what)
                items[item.id] = item
        if not items:
            raise ValueError("there are no items")
    except ValueError as error:
        hint = "data/prompts/README.md shows the format"
        raise DfqsError(f"line {number}: {_reason(error)}", where=paths.tilde(path), hint=hint) from None
    mode = head.mode or ("chat" if head.kind == "reasoning" else "complete")
    facts: dict[str, Any] = {"sha256": hashlib.sha256(raw).hexdigest(), "items": tuple(items.values())}
    return replace(head, mode=mode, n_whole=len(items), **facts)


def _check_spelling(line: bytes, kind: Any) -> None:
    """Refuse a field that is most likely a known one, misspelt: a `ValueError`. Others have no effect."""
    known = {"set", *(it.name for it in fields(kind))}
    for name in files.parse_json(line.removeprefix(b"\xef\xbb\xbf")).keys() - known:
        if meant := did_you_mean(name, known, 0.8):
            raise ValueError(f"there is no field {name!r:.60}: {meant.strip()}")


def _fault(head: ItemSet, item: Item) -> str:
    """What an item lacks for its kind of set; empty if nothing."""
    if lacking := [name for name in NEEDED[head.kind] if not getattr(item, name)]:
        return f"no {lacking[0]}"
    if head.kind == "reasoning" and not normalised(item.answer):
        return f"answer: nothing of {item.answer!r:.60} is compared"
    if head.kind == "choice" and len(item.choices) <= max(1, item.gold):
        return "gold names no choice" if item.gold else "choices: there is only one"
    if len(set(item.choices)) < len(item.choices):
        return "choices: two are the same"
    if head.kind == "code" and not item.entry_point.isidentifier():
        return f"entry_point: {item.entry_point!r:.60} is no name of a function"
    try:
        compile(item.tests, "tests", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"tests: not Python ({str(error) or 'too deep'})"
    is_unchecked = head.kind == "code" and "check" not in names_in(item.tests)
    return "tests: they define no check" if is_unchecked else ""


def _reason(error: Any) -> str:
    """What is wrong with a line; of pydantic's faults, the first with its field and value."""
    if not hasattr(error, "errors"):
        return str(error)
    fault = error.errors()[0]
    name = ".".join(str(part) for part in fault["loc"])
    shown = "" if fault["type"] in ("missing", "json_invalid") else f" ({fault['input']!r:.60})"
    return f"{name + ': ' if name else ''}{fault['msg']}{shown}"
