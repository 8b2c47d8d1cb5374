"""Grades, scores and sets of questions, held to closed forms, simulations and second implementations."""

from __future__ import annotations

import ast
import json
import math
import random
import re
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from no_hang import no_hang

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.paths import data_dir
from dfqs_nb.llama.generate import MARKS, answer_start, opens_thinking
from dfqs_nb.scores import ItemSet, item_sets
from dfqs_nb.scores import grading as scoring
from dfqs_nb.scores.grading import code_in, normalised

PROMPTS = data_dir() / "prompts"
SHIPPED = ["nano-reasoning", *(name for names in item_sets.TIERS.values() for name in names)]


# ---- grades ----


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        ("12", "12"),
        ("12.0", "12"),
        ("12.50", "12.5"),
        ("1,234", "1234"),
        ("1,234,567.0", "1234567"),
        ("+3", "3"),
        ("−4", "-4"),
        ("$18", "18"),
        ("The Box is red", "the box is red."),
        ("`abc`", "abc"),
        ("**abc**.", "ABC"),
        ("  a   b ", "a b"),
        ("１２", "12"),
        ("0.10", ".1"),
        ("1e3", "1000"),
        ("2 × 3", "2 × 3"),
    ],
)
def test_what_counts_as_the_same_answer(given_text, expected):
    assert normalised(given_text) == normalised(expected)


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        ("12", "13"),
        ("12 apples", "12"),
        ("1,23", "123"),
        ("abc", "abcd"),
        ("2 × 3", "3 × 2"),
        ("-4", "4"),
        ("", "0"),
        ("nan", "0"),
        ("x = 12", "12"),
        ("1/2", "0.5"),
        ("ab", "a b"),
    ],
)
def test_what_does_not(given_text, expected):
    assert normalised(given_text) != normalised(expected)


@given(st.text(max_size=40))
def test_normalising_twice_changes_nothing_more(text):
    once = normalised(text)
    assert normalised(once) == once


@pytest.mark.parametrize(
    ("text", "finish", "how", "grade"),
    [
        ("so <answer>12</answer>", "eos", "answer tag", "correct"),
        ("<answer>1</answer> no: <answer>12</answer>", "eos", "answer tag", "correct"),
        ("so <answer>12", "stop", "answer tag", "correct"),  # the closing tag was the stop text
        ("so <answer>12", "eos", "answer tag", "no_answer"),
        ("so <answer>12", "length", "answer tag", "truncated"),
        ("<answer>13</answer> and on", "length", "answer tag", "wrong"),
        ("the answer is 12", "eos", "answer tag", "no_answer"),
        ("<answer></answer>", "eos", "answer tag", "no_answer"),
        ("first\n12\n", "eos", "last line", "correct"),
        ("12\nsomething else", "eos", "last line", "wrong"),
        ("12", "length", "last line", "truncated"),
        (" \n", "eos", "last line", "no_answer"),
        ("<think>is it <answer>13</answer>?</think><answer>12</answer>", "eos", "answer tag", "correct"),
        (
            "<answer>12</answer>, or not?</think>I do not know.",
            "eos",
            "answer tag",
            "no_answer",
        ),  # the template opened it
        ("<think>12</think>\n", "eos", "last line", "no_answer"),
        ("<think>12</think> 12", "eos", "last line", "correct"),
    ],
)
def test_grades(text, finish, how, grade):
    assert scoring.grade(text, finish, "12", how)[0] == grade


def test_the_part_behind_the_thinking_is_the_answer():
    assert answer_start("x </think> y") == 10 and answer_start("x", opened=True) is None
    assert answer_start("<think>a</think><think>b") is None
    for opening, end in MARKS:
        assert answer_start(f"{opening}a{end}b") == len(opening + end) + 1
        assert answer_start(f"{opening}a") is None and opens_thinking(f"A: {opening}\n")


# ---- code in a chat's answer ----

SIGN = "def has_close(numbers: list[float], threshold: float) -> bool:\n"
BODY = "    return any(i != j and abs(a - b) < threshold\n"
BODY += "        for i, a in enumerate(numbers) for j, b in enumerate(numbers))\n"
WHOLE = f"```python\n{SIGN}{BODY}```\n"
INDENTED = "".join(f"   {line}\n" for line in WHOLE.splitlines())
RIGHT = {
    "plain": WHOLE,
    "no language": WHOLE.replace("python", ""),
    "words after the language": WHOLE.replace("python", 'python title="a.py"'),
    "windows line ends": WHOLE.replace("\n", "\r\n"),
    "not closed": WHOLE.removesuffix("```\n"),
    "in a list": f"1. Solution:\n\n{INDENTED}",
    "glued behind words": f"Here it is: {WHOLE}",
    "closed behind the last line": WHOLE.replace("\n```\n", "```\n"),
    "tildes": WHOLE.replace("```", "~~~"),
    "four marks": WHOLE.replace("```", "````"),
    "no fence": SIGN + BODY,
    "no fence, between words": f"Sure. This is it:\n\n{SIGN}{BODY}\nIt compares all pairs.",
    "future import": WHOLE.replace("python\n", "python\nfrom __future__ import annotations\n\n"),
    "the task repeated first": f"You gave\n```python\n{SIGN}    pass\n```\nand here it is:\n{WHOLE}",
    "corrected": f"```python\n{SIGN}    return True\n```\nThat is wrong. Right is:\n{WHOLE}",
    "used in a later block": f"{WHOLE}Use it so:\n```python\nprint(has_close([1.0], 2.0))\n```\n",
    "a lambda": "```python\nhas_close = lambda xs, t: any(i != j and abs(a - b) < t for i, a in enumerate(xs) for j, b in enumerate(xs))\n```",
    "with helpers and imports": WHOLE.replace(
        "python\n", "python\nimport math\n\n\ndef helper(x):\n    return math.fabs(x)\n\n\n"
    ),
    "decorated": WHOLE.replace(SIGN, f"import functools\n\n\n@functools.wraps(any)\n{SIGN}"),
    "under a condition": f"```python\nimport sys\nif sys.version_info > (3,):\n    {SIGN}    {BODY.replace(chr(10), chr(10) + '    ')}\n```",
    "where a library is missing": f"```python\ntry:\n    import no_such_library\nexcept ImportError:\n    {SIGN}    {BODY.replace(chr(10), chr(10) + '    ')}\n```",
    "one of several names": f"```python\n{SIGN.replace('has_close', 'near')}{BODY}\nhas_close, other = near, None\n```",
    "other line ends": WHOLE.replace("\n", "\u2028"),
    "old line ends": WHOLE.replace("\n", "\r"),
    "behind a thinking of code": f"<think>{WHOLE.replace('<', '>')}</think>{WHOLE}",
}
TASK = item_sets.Item(
    "1",
    f'{SIGN}    """Say whether two numbers are closer than the threshold."""\n',
    tests="def check(candidate):\n    assert candidate([1.0, 2.0, 2.2], 0.3) and not candidate([1.0, 2.0], 0.3)\n",
    entry_point="has_close",
)


@pytest.mark.parametrize("way", RIGHT)
def test_right_code_is_found_however_it_is_written(way):
    text = RIGHT[way]
    candidate = TASK.candidate(text[answer_start(text) :], "chat")
    namespace: dict = {}
    for source in candidate.sources:
        exec(compile(source, "x", "exec", dont_inherit=True), namespace)
    exec(TASK.tests, namespace)
    namespace["check"](namespace["has_close"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot.",
        "```python\nprint(1)\n```",
        "```\ndef other(): return 1\n```",
        "has_close is easy",
        "(" * 4000,
        "def " * 3000,
        "```python\nif a: pass\n" + "elif a: pass\n" * 900 + "```",
    ],
)
def test_an_answer_without_the_function_has_no_code(text):
    assert code_in(text, "has_close") is None


def test_code_with_a_fault_is_run_so_that_the_fault_is_seen():
    assert "return any(" in code_in("```python\ndef has_close(x):\n    return any(\n```", "has_close")


def test_an_answer_of_fences_alone_takes_no_quadratic_time():
    with no_hang():
        assert code_in("`" * 1_000_000, "f") is None
        assert normalised("`" * 100_000) == "`" * 100_000


def test_code_that_is_thought_about_is_not_the_program():
    thought = "<think>```python\ndef one():\n    return 1\n```</think>None."
    assert code_in(thought[answer_start(thought) :], "one") is None


# ---- scores ----


def frame(shares: dict[str, tuple[int, int]]) -> pd.DataFrame:
    rows = [
        {"id": f"{family}{i}", "family": family, "guess": 0.1, "grade": "correct" if i < right else "wrong"}
        for family, (right, n) in shares.items()
        for i in range(n)
    ]
    return pd.DataFrame(rows)


def test_the_macro_mean_weighs_families_alike():
    score = scoring.score_of("reasoning", frame({"a": (10, 10), "b": (0, 90)}), "s", 100)
    assert score.value == 0.5 and score.n == 100 and score.guess_rate == pytest.approx(0.1)


def test_the_interval_covers_the_truth_of_a_simulation():
    draw, truth, covered = np.random.default_rng(0), {"a": 0.2, "b": 0.9, "c": 0.5}, 0
    for _ in range(800):
        counts = {family: (int(draw.binomial(40, share)), 40) for family, share in truth.items()}
        score = scoring.score_of("reasoning", frame(counts), "s", 120)
        covered += score.low <= np.mean(list(truth.values())) <= score.high
    assert covered / 800 > 0.94, "Wilson's interval ignores the strata, so it is at least as wide as it says"


def test_equal_families_give_wilsons_interval_of_the_pooled_count():
    from dfqs_nb.stats import wilson

    score = scoring.score_of("reasoning", frame({"a": (10, 20), "b": (4, 20)}), "s", 40)
    low, high = wilson(14, 40)
    assert (score.low, score.high) == pytest.approx((float(low), float(high)))


def test_a_part_of_a_set_has_no_score():
    score = scoring.score_of("reasoning", frame({"a": (5, 10)}), "s", 11)
    assert score.value is None and score.n_missing == 1 and "withheld" in score.sentence
    samples = pd.DataFrame({"id": ["1"], "family": "all", "guess": 0.0, "grade": ["passed"]})
    assert scoring.score_of("code", samples, "s", 2).value is None
    empty = scoring.score_of(
        "reasoning", frame({}).reindex(columns=["id", "family", "guess", "grade"]), "s", 3
    )
    assert empty.value is None and (empty.low, empty.high) == (0.0, 1.0)


def test_code_scores_by_task():
    samples = pd.DataFrame({"id": list("1234"), "grade": ["passed", "wrong", "timeout", "wrong"]})
    samples = samples.assign(family=["a", "a", "b", "b"], guess=0.0)
    assert scoring.score_of("code", samples, "s", 4).value == 0.25
    assert scoring.score_of("code", samples, "s", 4).counts == {"wrong": 2, "passed": 1, "timeout": 1}


# ---- the frozen sets ----


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sets_are_whole(name):
    found = ItemSet.load(name)
    assert found.licence in ("MIT", "Apache-2.0") and len(found.source) > 40
    path = PROMPTS / f"{name.replace('-', '_')}.jsonl"
    head = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert head["generator"] == "data/prompts/generate.py" and head["seed"]
    assert len({item.prompt for item in found.items}) == len(found.items)
    expected = {
        "nano-code": 96,
        "nano-reasoning": 192,
        "nano-reasoning-hard": 192,
        "standard-code": 164,
        "standard-reasoning": 120,
        "gsm8k-100": 100,
    }
    assert len(found.items) == expected[name]


def test_the_reasoning_sets_have_short_and_medium_items_and_guessing_scores_little():
    for name, highest in (
        ("nano-reasoning", 0.5),
        ("nano-reasoning-hard", 0.34),
        ("standard-reasoning", 0.03),
    ):
        items = ItemSet.load(name).items
        assert {item.length for item in items} == {"short", "medium"}
        assert all(item.guess <= highest for item in items)
    standard = ItemSet.load("standard-reasoning").items
    assert sum(item.length == "medium" for item in standard) == 40
    for item in standard:
        assert (len(item.prompt) > 3000) == (item.length == "medium")


def solve(family: str, question: str) -> str | None:
    """A second implementation of the families that have a short one."""
    numbers = [int(word) for word in re.findall(r"\d+", question)]
    if family == "basic arithmetic":
        return str(
            eval(re.search(r"(?<![\w-])[-(\d][-+*/()\d\s]*(?<=[\d)])", question)[0].replace("/", "//"))
        )
    if family == "lcm":
        return str(math.lcm(*numbers))
    if family == "count primes":
        return str(
            sum(
                n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))
                for n in range(numbers[0], numbers[1] + 1)
            )
        )
    if family == "spell backward":
        return question.split()[-1][::-1]
    if family == "prime factorization":
        n, factors = numbers[0], []
        while n > 1:
            factors.append(next(d for d in range(2, n + 1) if n % d == 0))
            n //= factors[-1]
        return " × ".join(map(str, factors))
    if family == "simple equations":
        letter, left, right = re.search(r"(?:of|for) ([a-z])\b.*?: (.*) = (.*)$", question, re.M).groups()
        at = [eval(f"({left}) - ({right})", {letter: Fraction(x)}) for x in (0, 1)]
        return str(at[0] / (at[0] - at[1]))
    if family == "base conversion":
        named = question.replace("hexadecimal", "base-16").replace("binary", "base-2")
        found = re.search(r"base-(\d+) number (\w+) to base-(\d+)", named)
        n, out, base = int(found[2], int(found[1])), "", int(found[3])
        while n:
            n, digit = divmod(n, base)
            out = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + out
        return out or "0"
    return None


def test_answers_of_the_standard_set_agree_with_a_second_implementation():
    checked = 0
    for item in ItemSet.load("standard-reasoning").items:
        found = solve(item.family, item.prompt.split("this question:\n\n")[-1])
        if found is not None:
            assert normalised(found) == normalised(item.answer), item
            checked += 1
    assert checked == 84


def test_nano_answers_follow_from_their_prompts():
    sets = (ItemSet.load(name) for name in ("nano-reasoning", "nano-reasoning-hard"))
    for item in (item for each in sets for item in each.items):
        facts = dict(re.findall(r"(?:The )?(\w+) is (?:in the )?(\w+)\.", item.prompt))
        if item.answer.startswith("The capital") or "pass key" in item.family:
            continue
        if item.family.startswith("sum"):
            a, sign, b = re.search(r"(\d+) ([+-]) (\d+)", item.prompt).groups()
            assert item.answer == f"{int(a) + int(f'{sign}{b}')}."
        elif "tall" in item.family:
            pairs = re.findall(r"(\w+) is taller than (\w+)\.", item.prompt)
            low, high = {b for _, b in pairs}, {a for a, _ in pairs}
            (person,) = high - low if "tallest" in item.prompt else low - high
            where = item.family == "place of the tallest"
            assert item.answer == (f"{person} is in the {facts[person]}." if where else f"{person}.")
        elif ("colour" in item.family and item.answer.startswith("The ")) or "place" in item.family:
            asked = re.search(r"(?:What color is the|Where is) (\w+)\?", item.prompt)[1]
            assert item.answer.endswith(f" {facts[asked]}.")
        elif "larger" in item.family:
            numbers = list(map(int, re.findall(r"\d+", item.prompt)))
            assert item.answer == f"{(max if 'larger' in item.prompt else min)(numbers)}."


def test_nano_prompts_cannot_come_from_the_training_generator():
    """Its rules, as the sets state them: one kind of facts, filler for pass keys only, three people at most, one
    function a text, names by the kind of argument."""
    for item in ItemSet.load("nano-reasoning").items:
        kinds = {
            word
            for word in ("is in the", "taller than", "pass key", "Which is")
            if word in item.prompt.split(" What ")[0]
        }
        colours = re.search(
            r"The (?!grass|sky|sun)\w+ is (red|blue|green|black|white|pink|gray|gold)\.", item.prompt
        )
        filler = any(
            word in item.prompt
            for word in (
                "grass",
                "river",
                "kettle",
                "window",
                "again",
                "clock",
                "birds",
                "train",
                "Rain",
                "road",
                "market",
                "wind",
                "dog",
                "sun",
                "sky",
                "Here we go",
            )
        )
        people = len(set(re.findall(r"(\w+) is taller|taller than (\w+)", item.prompt)))
        joined = len(kinds) + bool(colours) > 1
        more = people > 2 or item.prompt.count(" is in the ") > 5
        assert joined or (filler and "pass key" not in kinds) or more or len(item.prompt) > 900, item
    training = {
        "xs": "list",
        "items": "list",
        "values": "list",
        "nums": "list",
        "data": "list",
        "s": "string",
        "text": "string",
        "word": "string",
        "line": "string",
    }
    numeric = "add subtract multiply maximum minimum is_even is_odd square negate absolute".split()
    strings = "reverse_string upper lower is_palindrome count_char".split()
    code = ItemSet.load("nano-code").items
    trained = {i.id.rsplit("/", 1)[1] for i in code if i.family == "name says nothing"}
    assert len(trained) == 32
    for item in code:
        tree = ast.parse(item.prompt + "    pass\n")
        if item.family == "second function":
            assert len(tree.body) == 2
            continue
        if item.family == "name says nothing":
            assert tree.body[0].name == item.entry_point == "f"
            continue
        if item.family == "new function":
            assert item.entry_point not in trained
            continue
        names = [training.get(one.arg, "letter") for one in tree.body[0].args.args]
        usual = (
            "letter" if item.entry_point in numeric else "string" if item.entry_point in strings else "list"
        )
        assert names[0] != usual, item.prompt


HEAD = {"set": "mine", "kind": "reasoning"}
ITEM = {"id": "1", "prompt": "p", "answer": "a"}
CODE = {"set": "x", "kind": "code"}
CHOICE = {"set": "x", "kind": "choice"}
TESTED = {"id": "1", "prompt": "def f():\n", "tests": "def check(c): pass", "entry_point": "f"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["not json"], "line 1: Invalid JSON"),
        ([" "], "line 1: the file is empty"),
        ([[]], "line 1: Input should be an object"),
        ([{"set": "x"}], "line 1: kind: Field required"),
        (
            [{"set": "x", "kind": "maths"}],
            "line 1: kind: Input should be 'reasoning', 'code' or 'choice' ('maths')",
        ),
        ([{"set": "x", "kind": "code"}], "line 2: there are no"),
        ([HEAD, {"id": "1", "prompt": "p"}], "line 2: no answer"),
        ([HEAD, ITEM, ITEM], "line 3: the id '1'"),
        ([{**HEAD, "stop": "The end"}, ITEM], "line 1: stop: Input should be"),
        ([{**HEAD, "stop": None}, ITEM], "line 1: stop: Input should be"),
        ([{**HEAD, "stop": ["a", ""]}, ITEM], "line 1: stop.1: "),
        ([{**HEAD, "max_tokens": "64"}, ITEM], "line 1: max_tokens: Input should be a valid integer ('64')"),
        ([{**HEAD, "max_tokens": 0}, ITEM], "line 1: max_tokens: "),
        ([{**HEAD, "max_tokens": True}, ITEM], "line 1: max_tokens: "),
        ([{**HEAD, "set": "org/mine"}, ITEM], "line 1: set: 'org/mine' names files"),
        ([{**HEAD, "set": 3}, ITEM], "line 1: set: "),
        ([{**HEAD, "set": "x" * 300}, ITEM], "line 1: set: "),
        ([{**HEAD, "set": " "}, ITEM], "line 1: set: "),
        ([CODE, {**TESTED, "tests": "def check(c:"}], "line 2: tests: not Python"),
        ([CODE, {**TESTED, "tests": "\0"}], "line 2: tests: not Python"),
        ([CODE, {**TESTED, "entry_point": "f; import os"}], "line 2: entry_point: 'f; import os' is no name"),
        ([{**HEAD, "extract": "first"}, ITEM], "line 1: extract: "),
        ([HEAD, {**ITEM, "answer": 12}], "line 2: answer: Input should be a valid string (12)"),
        ([HEAD, {**ITEM, "answer": 0}], "line 2: answer: "),
        ([HEAD, ITEM, {**ITEM, "id": "2", "guess": "0.25"}], "line 3: guess: Input should be a valid number"),
        ([HEAD, {**ITEM, "guess": 1.5}], "line 2: guess: "),
        ([HEAD, {**ITEM, "family": None}], "line 2: family: "),
        ([HEAD, {**ITEM, "gess": 0.5}], "line 2: there is no field 'gess': did you mean guess?"),
        ([HEAD | {"license": "MIT"}, ITEM], "line 1: there is no field 'license': did you mean licence?"),
        ([HEAD, '{"id": "1", "prompt": "x\\ud83dy", "answer": "a"}'], "line 2: Invalid JSON"),
        ([HEAD, "[" * 4000], "line 2: Invalid JSON"),
        ([HEAD, b'{"id": "\xff"}'], "line 2: Invalid JSON"),
        ([json.dumps(HEAD).encode("utf-16")], "line 1: this is UTF-16; save the file as UTF-8"),
        ([HEAD, {**ITEM, "answer": " ."}], "line 2: answer: nothing of ' .' is compared"),
        ([CODE, {**TESTED, "tests": "assert f() == 1"}], "line 2: tests: they define no check"),
        (
            [CHOICE, {"id": "1", "prompt": "p", "choices": ["a", "b", "a"]}],
            "line 2: choices: two are the same",
        ),
    ],
)
def test_a_broken_set_is_refused_with_its_line_and_field(tmp_path, lines, message):
    raw = [
        line
        if isinstance(line, bytes)
        else line.encode()
        if isinstance(line, str)
        else json.dumps(line).encode()
        for line in lines
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(raw))
    with pytest.raises(DfqsError, match=re.escape(message)):
        ItemSet.load(tmp_path / "x.jsonl")


def test_a_set_may_hold_any_text_and_fields_of_its_own(tmp_path):
    text = "a\u2028b\x85c\U0001f600"
    own = {"note": 1, "items": 1, "sha256": None, "n_whole": "one"}
    rows = [{**HEAD, "stop": ["x"], **own}, {**ITEM, "prompt": text, "guess": 1, "note": [2]}]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\n\n")
    loaded = ItemSet.load(tmp_path / "x.jsonl")
    assert loaded.items[0].prompt == text and loaded.stop == ("x",)
    assert len(loaded.items) == loaded.n_whole == 1 and len(loaded.sha256) == 64


def test_a_set_of_ones_own_is_found_in_its_folder(tmp_path):
    rows = [{"set": "mine", "kind": "reasoning"}, {"id": "1", "prompt": "p", "answer": "a"}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sets = ItemSet.of_tier("nano", tmp_path)
    assert [each.name for each in sets] == ["nano-reasoning-hard", "nano-code", "mine"]
    assert sets[-1].tier == "own"
    with pytest.raises(DfqsError, match="there are: .*nano-code"):
        ItemSet.load("theirs")
    for folder in (tmp_path / "missing", tmp_path / "mine.jsonl"):
        with pytest.raises(DfqsError, match=f"{folder.name}: no folder with question sets"):
            ItemSet.of_tier("nano", folder)


def test_two_sets_of_one_name_are_never_asked_together(tmp_path):
    for name, answer in (("a", "x"), ("b", "y")):
        rows = [{"set": "mine", "kind": "reasoning"}, {"id": "1", "prompt": "p", "answer": answer}]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for load in (
        lambda: ItemSet.of_tier("nano", tmp_path),
        lambda: ItemSet.load_all(sorted(tmp_path.glob("*"))),
    ):
        with pytest.raises(DfqsError, match="two sets have the name 'mine'"):
            load()


def test_the_generator_makes_the_shipped_nano_sets_again():
    """The nano sets need no package; the others are compared where the generator's packages are installed."""
    code = (
        "import runpy; made = runpy.run_path('generate.py')\n"
        "from pathlib import Path\n"
        "for name in ('nano-code', 'nano-reasoning', 'nano-reasoning-hard'):\n"
        "    assert made['text'](name) == Path(name.replace('-', '_') + '.jsonl').read_text(encoding='utf-8')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROMPTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_generator_makes_every_shipped_set_again():
    pytest.importorskip("reasoning_gym")
    done = subprocess.run(
        [sys.executable, "generate.py", "--check"], cwd=PROMPTS, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_random_guesses_score_the_guess_rate_on_the_nano_set():
    draw, items = random.Random(1), ItemSet.load("nano-reasoning").items
    heights = [item for item in items if item.family == "tallest of four"]
    right = total = 0
    for _ in range(200):
        for item in heights:
            people = sorted(set(re.findall(r"[A-Z][a-z]{2}(?= is| is|\.)", item.prompt)) - {"Who"})
            right += f"{draw.choice(people)}." == item.answer
            total += 1
    assert right / total == pytest.approx(heights[0].guess, abs=0.03)


def test_shipped_sets_have_the_names_of_their_files():
    names = {path.stem.replace("_", "-") for path in PROMPTS.glob("*.jsonl")}
    choices = {f"{name}-choices" for name in SHIPPED if ItemSet.load(name).kind == "reasoning"}
    assert names - choices == set(SHIPPED) and choices < names
    assert set(SHIPPED) == {ItemSet.load(name).name for name in SHIPPED}


def test_every_shipped_file_is_in_the_list_and_what_others_wrote_has_its_licence():
    listed = (PROMPTS / "README.md").read_text(encoding="utf-8")
    for path in PROMPTS.iterdir():
        assert path.suffix in (".py", ".md") or path.is_dir() or f"`{path.name}`" in listed, path.name
    for name, title in {
        "HumanEval": "The MIT License",
        "GSM8K": "MIT License",
        "reasoning-gym": "Apache License",
    }.items():
        text = (PROMPTS / "licences" / f"{name}.txt").read_text(encoding="utf-8")
        assert title in text[:200] and f"licences/{name}.txt" in listed
        assert "Copyright (c)" in text or "TERMS AND CONDITIONS" in text


def test_numbers_of_any_size_are_graded_exactly():
    """`decimal` rounds to 28 digits, and overflows; an answer may do neither."""
    assert scoring.grade("1e9999999", "eos", "1", "last line")[0] == "wrong"
    assert scoring.grade("1" * 30 + "2", "eos", "1" * 30 + "3", "last line")[0] == "wrong"
    assert scoring.grade("12.50", "eos", "12.5", "last line")[0] == "correct"
    assert scoring.grade("-0.0", "eos", "0", "last line")[0] == "correct"
