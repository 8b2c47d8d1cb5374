"""Multiple choice by log-likelihood, held against whole evaluations and against sums done by hand."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from os.path import commonprefix

import jsonschema
import numpy as np
import pytest
from moe_models import write_model
from other_models import with_vocabulary
from report_builder import append_damaged
from scipy.special import log_softmax

from dfqs_nb.core.errors import PromptError
from dfqs_nb.core.files import read_json
from dfqs_nb.core.paths import REPOSITORY, data_dir
from dfqs_nb.llama.model import ContextFullError, open_model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.scores import ItemSet, figures, likelihood
from dfqs_nb.scores.likelihood import choices_of
from dfqs_nb.stats import clopper_pearson, wilson

HEAD = {
    "set": "own",
    "kind": "choice",
    "examples": [{"id": "e", "prompt": "The sky is", "choices": ["blue.", "green."], "gold": 0}],
}
ITEMS = [
    {"id": "1", "prompt": "The grass is", "choices": ["green.", "blue.", "a river"], "gold": 0},
    {"id": "2", "prompt": "Rain fell softly on the ", "choices": ["roof.", "sun"], "gold": 0},
    {"id": "3", "prompt": "The sun", "choices": [" is yellow.", " x"], "gold": 1, "family": "odd"},
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
    counts, decode = list[int](), type(model)._decode_batch

    def counted(self, tokens, **options):
        counts.append(len(tokens))
        decode(self, tokens, **options)

    monkeypatch.setattr(type(model), "_decode_batch", counted)
    return counts


@pytest.fixture
def own(tmp_path):
    def write(head=HEAD, items=ITEMS):
        path = tmp_path / "own.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in [head, *items]), encoding="utf-8")
        return path

    return write


def whole(model, context, tokens):
    """The log-likelihood of tokens behind a context, evaluated in one piece, and whether each is the likeliest."""
    model.clear()
    rows = np.concatenate([rows.copy() for rows in model.logits([*context, *tokens])]).astype(float)
    rows = log_softmax(rows, axis=1)[len(context) - 1 : -1]
    return rows[np.arange(len(tokens)), tokens].sum(), bool((rows.argmax(axis=1) == tokens).all())


def test_restored_states_give_what_whole_evaluations_give(model, own, tmp_path, evaluated):
    questions = ItemSet.load(own())
    answers = likelihood.answer(model, questions, tmp_path)
    n_evaluated = sum(evaluated)
    n_whole = 0
    for item, row in zip(questions.items, answers.items.itertuples(), strict=True):
        context, choices = likelihood.encode(model, questions, item)
        expected = [whole(model, context, tokens) for tokens in choices]
        n_whole += sum(len(context) + len(tokens) for tokens in choices)
        assert row.log_likelihoods == pytest.approx([value for value, _ in expected], abs=0.02)
        assert row.greedy == [best for _, best in expected]
        assert row.acc == int(np.argmax(row.log_likelihoods) == item.gold)
    assert n_evaluated < n_whole / 2  # what is shared was evaluated once


def test_four_choices_cost_little_more_than_one(model, own, tmp_path, evaluated):
    """Counted in tokens: examples once, a query once, and of each choice all but the last token."""
    query = "There was a garden behind the house, and in the garden there was"
    items = [
        {
            "id": str(n),
            "prompt": f"{query} {thing} and",
            "choices": ["a tree", "the sun", "a cat.", "no"],
            "gold": 0,
        }
        for n, thing in enumerate(["a bench", "some grass", "a wall"])
    ]
    questions = ItemSet.load(own(HEAD, items))
    encoded = [likelihood.encode(model, questions, item) for item in questions.items]
    shared = len(commonprefix([context for context, _ in encoded]))
    contexts = sum(len(context) - shared for context, _ in encoded)
    endings = [[len(tokens) - 1 for tokens in choices] for _, choices in encoded]
    likelihood.answer(model, questions, tmp_path)
    n_evaluated = sum(evaluated)
    assert shared > len(query.split()) and n_evaluated == shared + contexts + sum(map(sum, endings))
    of_one = shared + contexts + sum(lengths[0] for lengths in endings)
    assert n_evaluated < 1.5 * of_one, "three more choices cost as much as the question"


def test_random_weights_score_at_chance(tmp_path):
    path = write_model("llama", tmp_path)
    path.write_bytes(with_vocabulary(path).bytes())
    questions = choices_of(ItemSet.load("nano-reasoning"))
    with open_model(path, OpenSettings(n_ctx=512, n_threads=1)) as random:
        items = likelihood.answer(random, questions, tmp_path).items
    for metric in ("acc", "acc_norm"):
        low, high = clopper_pearson(int(items[metric].sum()), len(items), 0.999)
        assert low < 1 / 4 < high, metric
    assert items["guess"].eq(1 / 4).all() and len(items) > 100


def test_context_and_choices_are_tokenized_together(model, own):
    questions = ItemSet.load(own())
    context, choices = likelihood.encode(model, questions, questions.items[1])
    text = b"".join(map(model.token_bytes, [*context, *choices[0]])).decode()
    assert text == "The sky is blue.\n\nRain fell softly on the  roof."
    assert model.token_bytes(context[-1]).decode()[-1] == "e", "blanks belong to the choice"


def test_acc_norm_divides_by_the_length_of_a_choice(model, own, tmp_path):
    answers = likelihood.answer(model, ItemSet.load(own()), tmp_path)
    for item, row in zip(ITEMS, answers.items.itertuples(), strict=True):
        per_letter = [
            value / len(choice) for value, choice in zip(row.log_likelihoods, item["choices"], strict=True)
        ]
        assert row.acc_norm == int(np.argmax(per_letter) == item["gold"])
    table = answers.families().set_index("family")
    assert table["n"].to_dict() == {"all": 2, "odd": 1} and (table["low"] <= table["accuracy"]).all()
    assert table.loc["odd", "guess_rate"] == 1 / 2 and table["correct"].sum() == answers.items["acc"].sum()
    title = figures.score_families(answers.families()).get_title(loc="left")
    assert title.endswith("of 2 families are answered better than by guessing")


def test_the_stage_file_gets_both_accuracies_with_intervals_and_the_guess_rate(model, own, tmp_path):
    answers = likelihood.answer(model, ItemSet.load(own()), tmp_path)
    score = answers.score
    assert {
        "set": "own",
        "n": 3,
        "guess_rate": pytest.approx((1 / 3 + 1 / 2 + 1 / 2) / 3),
    }.items() <= score.items()
    for metric in ("acc", "acc_norm"):
        low, high = wilson(answers.items[metric].sum(), 3)
        ends = score[f"{metric}_low"], score[f"{metric}_high"]
        assert ends == (float(low), float(high)) and score[metric] == answers.items[metric].mean()
    assert "guess rate 0.444" in score["sentence"]
    schema = read_json(data_dir() / "spec" / "stages.schema.json")["$defs"]["scores"]["properties"]["choices"]
    jsonschema.validate(score, schema)
    notebook = (REPOSITORY / "notebooks" / "06_score_reasoning_and_code.ipynb").read_text(encoding="utf-8")
    assert "choices=choices.score" in notebook


def test_a_base_model_gets_a_blank_between_its_answer_mark_and_a_choice(model, monkeypatch):
    questions = choices_of(ItemSet.load("nano-reasoning"))
    for has_template, ending in ((True, ""), (False, "Answer: ")):
        monkeypatch.setattr(model, "has_template", has_template)
        context, choices = likelihood.encode(model, questions, questions.items[0])
        text = b"".join(map(model.token_bytes, [*context, *choices[0]])).decode()
        assert text.endswith(ending + questions.items[0].choices[0]) and ("Answer:" in text) != has_template


def test_the_file_has_the_layout_of_lm_eval(model, own, tmp_path):
    answers = likelihood.answer(model, ItemSet.load(own()), tmp_path)
    result = json.loads(json.dumps(answers.as_lm_eval()))
    scores, samples = result["results"]["own"], result["samples"]["own"]
    right = [sample["acc"] for sample in samples]
    assert scores["acc,none"] == pytest.approx(np.mean(right))
    assert scores["acc_stderr,none"] == pytest.approx(np.std(right, ddof=1) / np.sqrt(3))
    assert result["n-shot"]["own"] == 1 and result["n-samples"]["own"] == {"original": 3, "effective": 3}
    assert len(samples[0]["resps"]) == 3 and samples[0]["target"] == 0


def test_a_second_run_evaluates_nothing(model, own, tmp_path, evaluated):
    questions = ItemSet.load(own())
    first, n_evaluated = likelihood.answer(model, questions, tmp_path), sum(evaluated)
    append_damaged(tmp_path / "own.likelihood.jsonl")
    second = likelihood.answer(model, questions, tmp_path)
    assert first.items.equals(second.items) and sum(evaluated) == n_evaluated > 0


def test_a_shipped_set_becomes_multiple_choice_the_same_way_each_time(model, tmp_path):
    questions = choices_of(ItemSet.load("nano-reasoning"))
    assert questions == choices_of(ItemSet.load("nano-reasoning")) == choices_of(questions)
    assert questions.licence == ItemSet.load("nano-reasoning").licence != "not stated"
    answers = {item.id: item.answer for item in ItemSet.load("nano-reasoning").items}
    for item in questions.items:
        assert item.choices[item.gold] == answers[item.id] and len(set(item.choices)) == 4
    places = np.bincount([item.gold for item in questions.items], minlength=4) / len(questions.items)
    assert places.min() > 0.1, "the right choice stands at every place"
    result = likelihood.answer(model, replace(questions, items=questions.items[:8]), tmp_path)
    assert len(result.items) == result.score["n"] == 8
    sizes = {"original": len(questions.items), "effective": 8}
    assert result.as_lm_eval()["n-samples"] == {"nano-reasoning-choices": sizes}


@pytest.mark.parametrize(
    ("head", "items", "message"),
    [
        (HEAD, [], "line 2: there are no items"),
        (HEAD, [ITEMS[0], ITEMS[0]], "line 3: the id '1' is taken"),
        (HEAD, [{**ITEMS[0], "gold": 3}], "line 2: gold names no choice"),
        (HEAD, [{**ITEMS[0], "gold": "0"}], "line 2: gold"),
        (HEAD, [{**ITEMS[0], "choices": ["one"]}], "line 2: choices"),
        ({**HEAD, "mode": "dream"}, ITEMS, "line 1: mode"),
    ],
)
def test_a_broken_set_names_line_and_field(own, head, items, message):
    with pytest.raises(PromptError, match=message):
        ItemSet.load(own(head, items))


def test_what_cannot_be_asked_is_refused(model, own, tmp_path):
    with pytest.raises(PromptError, match="has no 4 answers a family"):
        choices_of(ItemSet.load("nano-code"))
    with pytest.raises(PromptError, match="cannot be read"):
        ItemSet.load(tmp_path / "missing.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(PromptError, match="not a regular file"):
        ItemSet.load(tmp_path / "pipe.jsonl")
    long = ItemSet.load(own(HEAD, [{**ITEMS[0], "prompt": "The sky is blue. " * 300}]))
    with pytest.raises(ContextFullError):
        likelihood.answer(model, long, tmp_path)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({**HEAD, "set": "../../esc"}, "line 1: set"),
        ({**HEAD, "examples": [{**HEAD["examples"][0], "gold": 9}]}, "examples: gold names no choice"),
        ({**HEAD, "mode": "chat"}, "only a choice set in the mode complete"),
    ],
)
def test_a_head_that_means_nothing_is_refused(own, head, message):
    with pytest.raises(PromptError, match=message):
        ItemSet.load(own(head))
