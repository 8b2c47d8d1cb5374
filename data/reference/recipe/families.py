"""The tasks that DFQS-Nano learns, and what is held out of its training.

A draw is a conversation of one or more questions, or a piece of code to complete. Wording and words come from
``data/prompts``: its generator and the two long-context sets, so that the probes ask what was taught.

**Held out.** Every question has a *combination*: what one would have to have seen to know its answer by heart (all
facts of its text and the one that is asked, the order of the people, the two numbers, the function and its parameter
names). A combination is held out when a frozen nano item has it, or when a hash puts it into the held-out tenth.
Training draws again until nothing that it asks is held out; the fresh held-out sets ask held-out combinations only, and
draw with seeds of their own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PROMPTS = Path(__file__).resolve().parents[2] / "prompts"
SEED = 20261124
HELD_OUT_SHARE = 0.1
MOE = (
    "A mixture-of-experts layer holds many small feed-forward networks called experts. A router scores every "
    "expert for each token and sends the token to the few with the highest scores. Only those experts run, so the "
    "model has many parameters but uses few of them per token."
)

Combination = tuple[str, ...]
Pools = tuple[list[str], list[str]]  # subjects, and what is said of them


@dataclass(frozen=True)
class Task:
    """``turns``: questions with their answers (chat), or one prompt with its completion. ``combinations``: one for
    each turn; an empty one cannot be held out (a fact to be learnt by heart)."""

    family: str
    turns: tuple[tuple[str, str], ...]
    combinations: tuple[Combination, ...]
    chat: bool = True


def _prompts_generator():
    spec = importlib.util.spec_from_file_location("prompts_generator", PROMPTS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = _prompts_generator()
NANO = json.loads((PROMPTS / "long_context_nano.json").read_text(encoding="utf-8"))
STANDARD = json.loads((PROMPTS / "long_context_standard.json").read_text(encoding="utf-8"))


def combination_of(family: str, prompt: str, answer: str) -> Combination:
    """The combination of a question in the wording of the frozen nano sets.

    >>> combination_of("pass key", "", "The pass key is 63488.")
    ('pass key', '63488')
    >>> combination_of("colour", "The sky is blue. The hat is red. What color is the hat?", "The hat is red.")
    ('colour', 'The hat is red.', 'The hat is red.')
    """
    if prompt.startswith("def "):
        heads = re.findall(r"^def (\w+)\((.*)\):", prompt, flags=re.MULTILINE)
        return ("function", *heads[-1], *(heads[0][:1] if len(heads) > 1 else ()))
    if "pass key" in family:
        return ("pass key", re.search(r"\d+", answer)[0])
    if "sum" in family:
        return ("sum", *re.search(r"(\d+) ([+-]) (\d+)", prompt).groups())
    if "tall" in family:
        return ("height", *sorted(re.findall(r"\w+ is taller than \w+", prompt)), prompt.rsplit(" ", 1)[1])
    if ("colour" in family and answer.startswith("The ")) or "place" in family:
        facts = set(re.findall(r"[A-Z][^.?]*\.", prompt)) - set(NANO["sentences"])
        return (family.split()[0], answer, *sorted(facts))
    if "larger" in family:
        return ("larger", *sorted(re.findall(r"\d+", prompt)))
    if "capital" in family:
        lead, ask = prompt.rsplit(".", 1) if "." in prompt else ("", prompt)
        return ("capital", lead, ask.strip()) if lead else ()
    raise ValueError(f"no combination for the family {family!r}")


@cache
def frozen_combinations() -> frozenset[Combination]:
    """The combinations of every item of the frozen nano sets."""
    found = set()
    for name in ("nano_reasoning", "nano_reasoning_hard", "nano_code"):
        lines = (PROMPTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[1:]
        for item in map(json.loads, lines):
            found.add(combination_of(item["family"], item["prompt"], item.get("answer", "")))
    return frozenset(found)


def is_held_out(combination: Combination) -> bool:
    """Whether training must not ask this."""
    if not combination:
        return False
    if combination in frozen_combinations():
        return True
    digest = hashlib.sha256("|".join(combination).encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


# ---- one question, in the frozen sets' wording: facts, then several questions about them ----


def fill(draw: random.Random, n: int) -> str:
    return " ".join(draw.choice(NANO["sentences"]) for _ in range(n))


def _lead(draw: random.Random, room: int, facts: bool) -> str:
    """Sentences before the facts of a question: nothing, filler, or facts of the other kind."""
    kind = draw.random()
    if kind < 0.4 or room < 1:
        return ""
    if kind < 0.6 and facts:
        n = draw.randint(1, 3)
        return (GENERATOR.places if draw.random() < 0.5 else GENERATOR.colours)(draw, n)[0]
    return fill(draw, draw.randint(1, room))


def _asked(family: str, lead: str, facts: str, asks: list[tuple[str, str]]) -> Task:
    turns, combinations = [], []
    for number, (ask, answer) in enumerate(asks):
        prompt = " ".join(part for part in (lead, facts, ask) if part) if number == 0 else ask
        turns.append((prompt, answer))
        full = " ".join(part for part in (lead, facts, ask) if part)
        combinations.append(combination_of(family, full, answer))
    return Task(family, tuple(turns), tuple(combinations))


def _about(draw: random.Random, facts: str, pattern: str, ask: str, n_asks: int) -> list[tuple[str, str]]:
    stated = re.findall(pattern, facts)
    return [(ask.format(one[1]), f"{one[0]}.") for one in draw.sample(stated, min(n_asks, len(stated)))]


SLOTS = STANDARD["slots"]
# Words beside the frozen sets' own, so that a fact must be read, not recognized: names of things, their colours, ...
THINGS = sorted({*SLOTS["object"], *SLOTS["animal"], *SLOTS["plant"], *SLOTS["craft"], *STANDARD["keys"][1]})
COLOURS = STANDARD["keys"][0]
NAMES = [*SLOTS["name"], *SLOTS["other"], *STANDARD["guards"]]
PLACES = sorted({*SLOTS["place"], *STANDARD["keys"][1], *SLOTS["object"]})
WORDS = sorted({*THINGS, *COLOURS, *NAMES, *PLACES, *GENERATOR.THINGS, *GENERATOR.COLORS, *GENERATOR.NAMES,
                *GENERATOR.PLACES})  # fmt: skip
OTHER_WORDS = 0.4  # share of the texts that have those


def _facts(draw: random.Random, room: int, most: int, sentence: str, usual: Pools, other: Pools) -> str:
    """Facts of one kind: few while texts are short; of many more, because those are held out more often."""
    most = min(most, 2 + room // 2)
    n = draw.choices(range(1, most + 1), [1.4**n for n in range(most)])[0]
    subjects, values = other if draw.random() < OTHER_WORDS else usual
    pairs = zip(draw.sample(subjects, n), draw.sample(values, n), strict=True)
    return " ".join(sentence.format(*one) for one in pairs)


def colour(draw: random.Random, room: int) -> Task:
    usual = (GENERATOR.THINGS, GENERATOR.COLORS)
    facts = _facts(draw, room, 6, "The {} is {}.", usual, (THINGS, COLOURS))
    asks = _about(draw, facts, r"(The (\w+) is \w+)\.", "What color is the {}?", draw.choice((2, 6)))
    return _asked("colour", _lead(draw, room, True), facts, asks)


def place(draw: random.Random, room: int) -> Task:
    usual = (GENERATOR.NAMES, GENERATOR.PLACES)
    facts = _facts(draw, room, 5, "{} is in the {}.", usual, (NAMES, PLACES))
    asks = _about(draw, facts, r"((\w+) is in the \w+)\.", "Where is {}?", draw.choice((2, 5)))
    return _asked("place", _lead(draw, room, True), facts, asks)


def tallest(draw: random.Random, room: int) -> Task:
    """Who is tallest or shortest of up to four, or both; four as often as two and three together."""
    facts, ask, answer, _ = GENERATOR.heights(draw, draw.choice((2, 3, 4, 4)))
    asks = [(ask, answer)]
    if draw.random() < 0.5:
        pairs = re.findall(r"(\w+) is taller than (\w+)", facts)
        taller, shorter = ({pair[side] for pair in pairs} for side in (0, 1))
        kind, end = ("shortest", shorter - taller) if "tallest" in ask else ("tallest", taller - shorter)
        asks.append((f"Who is the {kind}?", f"{end.pop()}."))
    return _asked("tallest", _lead(draw, min(room, 6), False), facts, asks)


def larger(draw: random.Random, room: int) -> Task:
    _, ask, answer, _ = GENERATOR.larger(draw)
    return _asked("larger", _lead(draw, min(room, 6), False), "", [(ask, answer)])


def capital(draw: random.Random, room: int) -> Task:
    _, ask, answer, _ = GENERATOR.capital(draw)
    return _asked("capital", _lead(draw, min(room, 6), False), "", [(ask, answer)])


def sums(draw: random.Random, room: int) -> Task:
    """Numbers up to 20, or up to 99, so that carrying is seen more often than any one sum."""
    turns, combinations = [], []
    most = draw.choice((20, 99))
    for _ in range(draw.choice((1, 2, 4, 6))):
        sign, a, b = draw.choice("+-"), draw.randint(0, most), draw.randint(0, most)
        a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
        turns.append((f"What is {a} {sign} {b}?", f"{a + b if sign == '+' else a - b}."))
        combinations.append(("sum", str(a), sign, str(b)))
    return Task("sums", tuple(turns), tuple(combinations))


def explain(draw: random.Random, room: int) -> Task:
    ask = draw.choice(("Explain mixture-of-experts routing", "Explain mixture-of-experts routing."))
    return Task("explain", ((ask, MOE),), ((),))


def pass_key(draw: random.Random, room: int) -> Task:
    facts, ask, answer, _ = GENERATOR.key(draw, draw.randint(0, max(room, 1)))
    return _asked("pass key", "", facts, [(ask, answer)])


def function(draw: random.Random, room: int) -> Task:
    """A function to complete, below another one or not, its parameter names of any kind."""
    pools = draw.choice((GENERATOR.TRAINED, GENERATOR.CROSSED))
    names = list(GENERATOR.FUNCTIONS)
    name, above = draw.choice(names), ""
    if draw.random() < 0.35:
        other = draw.choice([one for one in names if one != name])
        above = "".join(GENERATOR.function(draw, other, draw.choice((GENERATOR.TRAINED, pools)))[:2]) + "\n"
    prompt, body, _ = GENERATOR.function(draw, name, pools)
    combination = combination_of("crossed names", above + prompt, "")
    if draw.random() < 0.06:
        return Task("function", (("Write this function.\n" + above + prompt, prompt + body),), (combination,))
    return Task("function", ((above + prompt, body),), (combination,), chat=False)


def _sentence(draw: random.Random) -> str:
    text = draw.choice(STANDARD["sentences"])
    for slot, words in STANDARD["slots"].items():
        text = text.replace(f"{{{slot}}}", draw.choice(words), 1)
    return text[0].upper() + text[1:]


def keys(draw: random.Random, room: int) -> Task:
    """Several keys in notes, the wording of the standard probe: codes, and codes of guarded places."""
    most = min(6, 2 + room // 2)
    n = draw.choices(range(1, most + 1), [1.3**n for n in range(most)])[0]
    n_notes = 0 if room < 1 or draw.random() < 0.2 else draw.randint(0, round(room * 0.5))
    named = draw.sample([f"{a} {b}" for a in STANDARD["keys"][0] for b in STANDARD["keys"][1]], n)
    codes = ["".join(draw.choices("0123456789", k=STANDARD["code_digits"])) for _ in named]
    lines = [_sentence(draw) for _ in range(n_notes)]
    for key, code in zip(named, codes, strict=True):
        lines.insert(draw.randint(0, len(lines)), STANDARD["needle"].format(key=key, code=code))
    guards = draw.sample(STANDARD["guards"], min(n, 2)) if draw.random() < 0.3 else []
    for name, key in zip(guards, named, strict=False):
        lines.insert(draw.randint(0, len(lines)), STANDARD["link"].format(name=name, key=key))
    asks, combinations = [], []
    for number in draw.sample(range(n), min(n, draw.choice((2, 6)))):
        key, code = named[number], codes[number]
        prefix = STANDARD["answer_prefix"].format(key=key)
        ask = STANDARD["question"].format(key=key)
        if number < len(guards):
            prefix = STANDARD["link_answer_prefix"]
            ask = STANDARD["link_question"].format(name=guards[number])
        asks.append((ask, f"{prefix} {code}."))
        combinations.append(("code", key, code))
    intro = STANDARD["intro"] if draw.random() < 0.8 else ""
    first = intro + " ".join(lines) + STANDARD["joint"] + asks[0][0]
    return Task("keys", ((first, asks[0][1]), *asks[1:]), tuple(combinations))


def repeat(draw: random.Random, room: int) -> Task:
    """Words in no order, and the same again: the plainest exercise in finding what stood there before."""
    words = " ".join(draw.sample(WORDS, draw.randint(2, 4 + min(room, 8))))
    return Task("repeat", ((f"Repeat: {words}.", f"{words}."),), (("repeat", words),))


FAMILIES: dict[str, tuple[float, Callable[[random.Random, int], Task]]] = {
    "colour": (0.14, colour), "place": (0.18, place), "tallest": (0.14, tallest), "larger": (0.06, larger),
    "capital": (0.02, capital), "sums": (0.10, sums), "explain": (0.01, explain), "pass key": (0.07, pass_key),
    "function": (0.10, function), "keys": (0.15, keys), "repeat": (0.03, repeat),
}  # fmt: skip


# Finding the fact that is asked for is learnt last and by itself: it comes first, while texts are short.
RECALL, RECALL_FIRST, FULL_ROOM = ("colour", "place", "keys"), 4, 8


def tasks(
    seed: int | str, room: Callable[[], int], held_out: bool = False, family: str = ""
) -> Iterator[Task]:
    """Endless tasks of one side of the split. ``room``: sentences of filler at most, asked before each draw."""
    draw = random.Random(f"{SEED}:{'held out' if held_out else 'training'}:{seed}")
    names = [family] if family else list(FAMILIES)
    while True:
        recall = RECALL_FIRST if room() < FULL_ROOM else 1
        name = draw.choices(names, [FAMILIES[one][0] * (recall if one in RECALL else 1) for one in names])[0]
        while True:
            task = FAMILIES[name][1](draw, room())
            sides = [is_held_out(one) for one in task.combinations]
            # a held-out set asks one question at a time, which is held out unless it is learnt by heart
            if held_out and (sides[0] or not task.combinations[0]):
                yield Task(task.family, task.turns[:1], task.combinations[:1], task.chat)
                break
            if not held_out and not any(sides):
                yield task
                break
