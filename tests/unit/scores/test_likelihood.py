"""Multiple choice by log-likelihood, held against whole evaluations and against sums done by hand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from os.path import commonprefix

import numpy as np
import pandas as pd
import pytest
from moe_models import write_model
from other_models import with_vocabulary
from report_builder import append_damaged
from scipy.special import log_softmax
from scipy.stats import binomtest

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.paths import data_dir
from dfqs_nb.llama.model import ReuseCheck, open_model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.scores import Answerer, ItemSet, Options, figures, score_set
from dfqs_nb.scores import run as run_module
from dfqs_nb.scores.grading import Results
from dfqs_nb.scores.run import encode
from dfqs_nb.stats import wilson

QUIET = Options(progress=False)

HEAD = {"set": "own", "kind": "choice"}
SHOTS = "The sky is blue.\n\n"
ITEMS = [
    {"id": "1", "prompt": f"{SHOTS}The grass is", "choices": ["green.", "blue.", "a river"], "gold": 0},
    {"id": "2", "prompt": f"{SHOTS}Rain fell softly on the ", "choices": ["roof.", "sun"], "gold": 0},
    {"id": "3", "prompt": f"{SHOTS}The sun", "choices": [" is yellow.", " x"], "gold": 1, "family": "odd"},
]


@pytest.fixture(scope="module")
def model():
    with open_model(
        data_dir() / "reference" / "DFQS-Nano-F16.gguf", OpenSettings(n_ctx=256, n_threads=1)
    ) as opened:
        yield opened


@pytest.fixture
def evaluated(model, monkeypatch):
    """How many tokens each call of llama.cpp evaluates."""
    counts, batches = list[int](), type(model)._batches

    def counted(self, tokens, **options):
        for n in batches(self, tokens, **options):
            counts.append(n)
            yield n

    monkeypatch.setattr(type(model), "_batches", counted)
    return counts


@pytest.fixture
def own(tmp_path):
    def write(head=HEAD, items=ITEMS):
        path = tmp_path / "own.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in [head, *items]), encoding="utf-8")
        return path

    return write


def requests(model, questions):
    answerer = Answerer.of(model, questions)
    return [answerer.request(questions, item) for item in questions.items]


def answers_of(folder):
    """The rows that a run left, by id."""
    rows = map(json.loads, next(folder.glob("answers-*.jsonl")).read_text().splitlines())
    return {row["id"]: row for row in rows}


def whole(model, context, tokens):
    """The log-likelihood of tokens behind a context, evaluated in one piece, and whether each is the likeliest."""
    model.clear()
    rows = np.concatenate([rows.copy() for rows in model.logits([*context, *tokens])]).astype(float)
    rows = log_softmax(rows, axis=1)[len(context) - 1 : -1]
    return rows[np.arange(len(tokens)), tokens].sum(), bool((rows.argmax(axis=1) == tokens).all())


def test_restored_states_give_what_whole_evaluations_give(model, own, tmp_path, evaluated):
    questions = ItemSet.load(own())
    run = score_set(model, questions, tmp_path, QUIET)
    n_evaluated, n_whole, rows = sum(evaluated), 0, answers_of(tmp_path)
    graded = run.items.set_index("id")["grade"]
    for item, request in zip(questions.items, requests(model, questions), strict=True):
        context, choices = encode(model, request)
        expected, row = [whole(model, context, tokens) for tokens in choices], rows[item.id]
        n_whole += sum(len(context) + len(tokens) for tokens in choices)
        assert row["log_likelihoods"] == pytest.approx([value for value, _ in expected], abs=0.02)
        assert row["greedy"] == [best for _, best in expected]
        assert (graded[item.id] == "correct") == (np.argmax(row["log_likelihoods"]) == item.gold)
    assert n_evaluated < n_whole / 2  # what is shared was evaluated once


def test_where_a_restored_state_is_wrong_every_choice_is_evaluated_afresh(model, own, tmp_path, monkeypatch):
    questions = ItemSet.load(own())
    score_set(model, questions, tmp_path / "restored", QUIET)
    monkeypatch.setattr(ReuseCheck, "allowed", False)
    restored, restore = [], type(model).restore
    monkeypatch.setattr(
        type(model), "restore", lambda self, it: restored.append(it) if it.data else restore(self, it)
    )
    check = run_module.check_reuse
    monkeypatch.setattr(run_module, "check_reuse", lambda *asked: restored.clear() or check(*asked))
    score_set(model, questions, tmp_path / "afresh", QUIET)
    assert len(restored) == 1, "by the check alone"
    first, second = answers_of(tmp_path / "restored"), answers_of(tmp_path / "afresh")
    for item in questions.items:
        wanted = pytest.approx(first[item.id]["log_likelihoods"], abs=0.02)
        assert second[item.id]["log_likelihoods"] == wanted


def test_four_choices_cost_little_more_than_one(model, own, tmp_path, evaluated):
    """Counted in tokens: what all begin with once, a query once, and of each choice all but the last token."""
    query = "There was a garden behind the house, and in the garden there was"
    choices = ["a tree", "the sun", "a cat.", "no"]
    items = [
        {"id": str(n), "prompt": f"{query} {thing} and", "choices": choices, "gold": 0}
        for n, thing in enumerate(["a bench", "some grass", "a wall"])
    ]
    questions = ItemSet.load(own(HEAD, items))
    encoded = [encode(model, request) for request in requests(model, questions)]
    shared = len(commonprefix([context for context, _ in encoded]))
    contexts = sum(len(context) - shared for context, _ in encoded)
    endings = [[len(tokens) - 1 for tokens in choices] for _, choices in encoded]
    score_set(model, questions, tmp_path, QUIET)
    n_evaluated = sum(evaluated)
    check = len(encoded[0][0]) + 2 * max(map(len, encoded[0][1]))
    n_evaluated -= check  # once a set
    assert shared >= len(query.split()) and n_evaluated == shared + contexts + sum(map(sum, endings))
    of_one = shared + contexts + sum(lengths[0] for lengths in endings)
    assert n_evaluated < 1.5 * of_one, "three more choices cost as much as the question"


def test_random_weights_score_at_chance(tmp_path):
    path = write_model("llama", tmp_path)
    path.write_bytes(with_vocabulary(path).bytes())
    with open_model(path, OpenSettings(n_ctx=512, n_threads=1)) as random:
        run = score_set(random, ItemSet.load("nano-reasoning-choices"), tmp_path, QUIET)
    low, high = binomtest(int(run.items["correct"].sum()), len(run.items)).proportion_ci(0.999, "exact")
    assert low < run.score.guess_rate < high and run.score.n > 100


def test_context_and_choices_are_tokenized_together(model, own):
    context, choices = encode(model, requests(model, ItemSet.load(own()))[1])
    text = b"".join(map(model.token_bytes, [*context, *choices[0]])).decode()
    assert text == "The sky is blue.\n\nRain fell softly on the  roof."
    assert model.token_bytes(context[-1]).decode()[-1] == "e", "blanks belong to the choice"


@pytest.mark.parametrize("per_character", [False, True])
def test_a_set_says_whether_the_length_of_a_choice_counts(model, own, tmp_path, per_character):
    run = score_set(model, ItemSet.load(own({**HEAD, "per_character": per_character})), tmp_path, QUIET)
    rows, graded = answers_of(tmp_path), run.items.set_index("id")
    for item in ITEMS:
        sizes = [len(choice) if per_character else 1 for choice in item["choices"]]
        chosen = int(np.argmax(np.array(rows[item["id"]]["log_likelihoods"]) / sizes))
        assert graded.loc[item["id"], "completion"] == item["choices"][chosen]
        assert graded.loc[item["id"], "correct"] == (chosen == item["gold"])


def test_a_score_of_choices_is_their_share_with_interval_and_guess_rate(model, own, tmp_path):
    run = score_set(model, ItemSet.load(own()), tmp_path, QUIET)
    right = run.items["correct"].sum()
    assert run.score.name == "choice_score" and (run.score.n, run.score.value) == (3, right / 3)
    assert (run.score.low, run.score.high) == tuple(map(float, wilson(right, 3)))
    assert run.score.guess_rate == pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3)
    table = Results([run]).families().set_index("family")
    assert table["n"].to_dict() == {"all": 2, "odd": 1} and table.loc["odd", "guess_rate"] == 1 / 2
    title = figures.score_families(table.reset_index()).get_title(loc="left")
    assert title.startswith(f"{run.name}: ") and title.endswith(" of 2 families beat guessing")
    twice = pd.concat([table.assign(set=name) for name in ("x", "x-choices", "y")]).reset_index()
    twice.loc[twice["set"] == "y", "guess_rate"] = 0.0
    title = figures.score_families(twice).get_title(loc="left")
    assert title.count(" of 2 families beat") == 2 and "y: " not in title, "nobody can guess in y"
    assert (run.items["reason"].str.startswith("chose") == ~run.items["correct"]).all()


def test_a_base_model_gets_a_blank_between_its_answer_mark_and_a_choice(model, monkeypatch):
    questions = ItemSet.load("nano-reasoning-choices")
    asked = requests(model, questions)[0]
    for has_template, ending in ((True, ""), (False, "Answer: ")):
        monkeypatch.setattr(model, "has_template", has_template)
        context, choices = encode(model, asked)
        text = b"".join(map(model.token_bytes, [*context, *choices[0]])).decode()
        assert text.endswith(ending + questions.items[0].choices[0]) and ("Answer:" in text) != has_template


def test_a_second_run_evaluates_nothing(model, own, tmp_path, evaluated):
    questions = ItemSet.load(own())
    first, n_evaluated = score_set(model, questions, tmp_path, QUIET), sum(evaluated)
    append_damaged(next(tmp_path.glob("answers-own-*.jsonl")))
    second = score_set(model, questions, tmp_path, QUIET)
    assert first.items.equals(second.items) and sum(evaluated) == n_evaluated > 0


def words_in(text: str) -> set[str]:
    """The words and numbers of a text, without case and marks."""
    return set(re.findall(r"-?\w+(?:[.,]\w+)*", text.casefold()))


def test_a_multiple_choice_set_is_made_of_its_reasoning_set_the_same_way_each_time():
    script = data_dir() / "prompts" / "choices.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    questions, written = ItemSet.load("nano-reasoning-choices"), ItemSet.load("nano-reasoning")
    assert questions.kind == "choice" and questions.licence == written.licence != "not stated"
    answers = {item.id: item.answer for item in written.items}
    for item in questions.items:
        assert item.choices[item.gold] == answers[item.id] and 2 <= len(set(item.choices)) <= 4
        assert len(set(item.choices)) == len(item.choices)
    places = np.bincount([item.gold for item in questions.items if len(item.choices) == 4], minlength=4)
    assert places.min() > 0.1 * places.sum(), "the right choice stands at every place"
    assert questions.identity() != written.identity(), "answers to other choices are not taken for these"


def by_elimination(item, kept) -> float:
    """The chance of a reader who picks among the choices that he keeps, or among all if he keeps none."""
    left = [at for at, choice in enumerate(item.choices) if kept(choice)] or range(len(item.choices))
    return (item.gold in left) / len(left)


@pytest.mark.parametrize("name", ["nano-reasoning-hard", "nano-reasoning", "standard-reasoning", "gsm8k-100"])
def test_looking_which_choices_stand_in_the_prompt_is_no_better_than_guessing(name):
    """A player who keeps the choices whose words the prompt has, and one who keeps the others."""
    for item in ItemSet.load(f"{name}-choices").items:
        offered, guess = words_in(item.prompt), 1 / len(item.choices)
        assert by_elimination(item, lambda choice, offered=offered: words_in(choice) <= offered) == guess
        assert by_elimination(item, lambda choice, offered=offered: not words_in(choice) <= offered) == guess


def test_choices_of_a_question_differ_in_what_it_asks_for():
    families = defaultdict(list)
    for item in ItemSet.load("nano-reasoning-hard-choices").items:
        families[item.family].append(item)
    assert len(families) == 12 and {len(items) for items in families.values()} == {16}, "no question is lost"
    for item in families["place of eight"]:
        who = item.prompt.rsplit(" ", 1)[1].rstrip("?")
        assert all(choice.startswith(f"{who} is in the ") for choice in item.choices)
    for item in families["place of the tallest"]:  # which nobody can tell from the question alone
        assert all(choice in item.prompt for choice in item.choices)
    for item in families["larger of three"]:
        assert sorted(choice.rstrip(".") for choice in item.choices) == sorted(
            re.findall(r"\d+", item.prompt)
        )


@pytest.mark.parametrize(
    ("head", "items", "message"),
    [
        (HEAD, [], "line 2: there are no items"),
        (HEAD, [ITEMS[0], ITEMS[0]], "line 3: the id '1' is taken"),
        (HEAD, [{**ITEMS[0], "gold": 3}], "line 2: gold names no choice"),
        (HEAD, [{**ITEMS[0], "gold": "0"}], "line 2: gold"),
        (HEAD, [{**ITEMS[0], "choices": ["one"]}], "line 2: choices"),
        ({**HEAD, "mode": "dream"}, ITEMS, "line 1: mode"),
        ({**HEAD, "set": "../../esc"}, ITEMS, "line 1: set"),
    ],
)
def test_a_broken_set_names_line_and_field(own, head, items, message):
    with pytest.raises(DfqsError, match=message):
        ItemSet.load(own(head, items))


def test_what_cannot_be_asked_is_refused(model, own, tmp_path):
    close = r"no question set 'nano-code-choices'; did you mean nano-reasoning-choices\?"
    with pytest.raises(DfqsError, match=close):
        ItemSet.load("nano-code-choices")
    with pytest.raises(DfqsError, match="cannot be read"):
        ItemSet.load(tmp_path / "missing.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DfqsError, match="not a regular file"):
        ItemSet.load(tmp_path / "pipe.jsonl")
    long = ItemSet.load(own(HEAD, [{**ITEMS[0], "prompt": "The sky is blue. " * 300}]))
    with pytest.raises(DfqsError, match="needs .* tokens of context"):
        score_set(model, long, tmp_path, QUIET)
