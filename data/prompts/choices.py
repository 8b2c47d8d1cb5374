"""Make the multiple-choice sets beside this file: `python data/prompts/choices.py` (--check to compare only).

Each is made of the reasoning set of the same name: its questions, with wrong choices of which looking for their
words in the prompt excludes none. A hash of the question decides which choices it has, and in what order.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import generate as words
import numpy as np

HERE = words.HERE
SETS = ("nano-reasoning-hard", "nano-reasoning", "standard-reasoning", "gsm8k-100")
N_CHOICES = 4  # at most
RULE = "one of the choices: the prompt offers all of them, or none"
KEPT = ("tier", "licence", "source")  # of the first line

Item = dict[str, Any]


def words_in(text: str) -> set[str]:
    """The words and numbers of a text, without case and marks."""
    return set(re.findall(r"-?\w+(?:[.,]\w+)*", text.casefold()))


def _shape(answers: Sequence[str]) -> tuple[str, ...]:
    """The words that answers have in common, with "" for one or two that differ; else ("",), the whole."""
    rows = [answer.split() for answer in answers]
    columns = zip(*rows, strict=True) if len({*map(len, rows)}) == 1 else [answers]
    shape = tuple(column[0] if len({*column}) == 1 else "" for column in columns)
    return shape if shape.count("") <= 2 else ("",)


def _words(answer: str, shape: Sequence[str]) -> list[str]:
    return answer.split() if len(shape) > 1 else [answer]


def _wrong_choices(item: Item, family: Sequence[list[str]], gaps: Mapping[int, set[str]]) -> list[str]:
    """Wrong answers to an item, of which looking for their words in the prompt excludes none.

    If the prompt offers the right answer, they are made of what else it offers: its numbers, and words that
    fill the same gap in answers of this shape. If the right one is a statement of the prompt, they are, too,
    where there are such. Else they are answers of the family that the prompt offers as little. What the
    question names stays in all of them. ``gaps``: by place, the words of answers of this shape that differ.
    """
    offered, own = words_in(item["prompt"]), _words(item["answer"], family[0])
    named = words_in(re.split(r"(?<=[.?!])\s", item["prompt"])[-1])
    free = {at: gaps[at] for at in gaps if not words_in(own[at]) <= named} or gaps
    if all(words_in(own[at]) <= offered for at in free):
        numbers = [word for word in offered if word.isdigit()]
        options = [{word} for word in own]
        for at, words in free.items():
            options[at] |= {word for word in words if words_in(word) <= offered}
            if (value := own[at].rstrip(".")).isdigit():
                options[at] |= {own[at].replace(value, number) for number in numbers}
        made = {" ".join(words) for words in product(*options)}
        stated = {choice for choice in made if choice in item["prompt"]}
        made = stated if item["answer"] in stated and len(stated) > 1 else made
    else:
        others = (other for other in family if not all(words_in(other[at]) <= offered for at in free))
        made = {" ".join(other[at] if at in free else own[at] for at in range(len(own))) for other in others}
    return sorted(made - {item["answer"]})


def choices_of(items: Sequence[Item]) -> list[Item]:
    """The questions with their choices; without those that have no wrong one, such as pass keys."""
    families, fillers, made = defaultdict[str, list[str]](list), defaultdict[Any, set[str]](set), []
    for item in items:
        families[item["family"]].append(item["answer"])
    shapes = {family: _shape(answers) for family, answers in families.items()}
    for family, shape in shapes.items():
        for answer in families[family]:
            for at, word in enumerate(_words(answer, shape)):
                fillers[shape, at].add(word)
    for item in items:
        shape, answers = shapes[item["family"]], families[item["family"]]
        gaps = {at: fillers[shape, at] for at, word in enumerate(shape) if not word}
        if others := _wrong_choices(item, [_words(answer, shape) for answer in answers], gaps):
            draw = np.random.default_rng(list(hashlib.sha256(item["prompt"].encode()).digest()))
            chosen = [others[at] for at in draw.permutation(len(others))[: N_CHOICES - 1]]
            gold = int(draw.integers(len(chosen) + 1))
            chosen.insert(gold, item["answer"])
            kept = {name: item[name] for name in ("id", "family", "length", "prompt") if name in item}
            made.append({**kept, "choices": chosen, "gold": gold})
    return made


def text(name: str) -> str:
    """The lines of a set's file."""
    first, *rows = (
        (HERE / f"{name.removesuffix('-choices').replace('-', '_')}.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    head = {key: value for key, value in json.loads(first).items() if key in KEPT}
    asked = {"kind": "choice", "mode": "chat", "delimiter": "", **head, "guess_rule": RULE}
    header = {"set": name, **asked, "generator": "data/prompts/choices.py"}
    lines = [header, *choices_of([json.loads(row) for row in rows])]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


if __name__ == "__main__":
    sys.exit(words.main([f"{name}-choices" for name in SETS], text))
