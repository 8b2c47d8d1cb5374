"""Runs that stop and continue, errors that are not scores, and the comparison of two runs."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from dfqs_nb.core.errors import DfqsError, ModelError
from dfqs_nb.llama import generate as llama_generate
from dfqs_nb.llama.generate import Completion, generate
from dfqs_nb.llama.model import ChatTemplate, DecodeError, open_model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.scores import Answerer, ItemSet, Options, compare_runs, sandbox, score_set
from dfqs_nb.scores import run as scores
from dfqs_nb.scores.grading import Results
from dfqs_nb.scores.run import Request
from dfqs_nb.stats import holm, mcnemar, paired_bootstrap

FOUND = sandbox.find_sandbox()
needs_sandbox = pytest.mark.skipif(not FOUND.safe, reason=f"no sandbox here: {FOUND.note}")
QUESTIONS = ItemSet.load("nano-reasoning")
N = len(QUESTIONS.items)
CODE = dataclasses.replace(ItemSet.load("nano-code"), items=ItemSet.load("nano-code").items[:6])
CONDITIONS = {"n_ctx": 1024}


def said(text: str, finish: str = "eos") -> Completion:
    return Completion(text, (1, 2), finish, 3)


class Oracle:
    """Answers right but for every third item; may be killed or fail on the way."""

    def __init__(self, killed_at: int | None = None, failing: bool = False, shift: int = 0) -> None:
        self.calls, self.killed_at, self.failing, self.shift = 0, killed_at, failing, shift

    def __call__(self, item, request: Request) -> Completion:
        self.calls += 1
        if self.calls == self.killed_at:
            raise KeyboardInterrupt
        if self.failing:
            raise DecodeError("llama_decode failed")
        wrong = (sum(item.id.encode()) + self.shift) % 3 == 0
        return said("no" if wrong else item.answer or item.reference)


def collect(
    oracle,
    folder,
    item_set=QUESTIONS,
    conditions=CONDITIONS,
    *,
    mode="chat",
    model="m",
    opens=False,
    **options,
):
    """A run whose answers come from ``oracle(item, request)``."""
    items = {
        text: item for item in item_set.items for text in (item.prompt, item.asked(item_set.instruction))
    }
    answerer = Answerer(
        lambda request: oracle(items[request.text], request), mode, conditions, model, opens_thinking=opens
    )
    return answerer.score(item_set, folder, Options(progress=False, **options))


def test_a_killed_run_continues_and_ends_with_the_same_score(tmp_path):
    whole = collect(Oracle(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        collect(Oracle(killed_at=50), tmp_path / "cut")
    path = next(tmp_path.glob("cut/answers-*.jsonl"))
    path.write_bytes(path.read_bytes()[:-9])  # the kill tore the last line
    second = Oracle()
    run = collect(second, tmp_path / "cut")
    assert run.n_resumed == 48 and second.calls == N - 48
    assert run.score == whole.score and run.items.drop(columns="seconds").equals(
        whole.items.drop(columns="seconds")
    )


def test_a_finished_run_asks_nothing_and_other_conditions_ask_all(tmp_path):
    collect(Oracle(), tmp_path)
    for conditions, options, calls in (
        (CONDITIONS, {}, 0),
        ({"n_ctx": 512}, {}, N),
        (CONDITIONS, {"thinking": "off"}, N),
        (CONDITIONS, {"thinking_tokens": 64}, N),
        (CONDITIONS, {"top_p": 0.5}, N),
        (CONDITIONS, {"model": "another"}, N),
        (CONDITIONS, {"fresh": True}, N),
    ):
        oracle = Oracle()
        collect(oracle, tmp_path, conditions=conditions, **options)
        assert oracle.calls == calls, (conditions, options)


def test_an_error_of_the_runtime_is_never_a_wrong_answer(tmp_path):
    with pytest.raises(DecodeError):
        collect(Oracle(failing=True), tmp_path)
    assert not list(tmp_path.glob("answers-*.jsonl"))


def test_a_part_of_a_set_is_scored_and_says_so(tmp_path):
    run = collect(Oracle(), tmp_path, limit=10)
    assert run.score.n == len(run.items) == 10 and run.score.n_missing == 0
    assert run.conditions["part"] == f"10 of {N} questions"
    assert "part" not in collect(Oracle(), tmp_path).conditions


def test_two_sets_of_one_name_do_not_share_answers(tmp_path):
    """A user's second file may have the name and the ids of the first."""
    other = dataclasses.replace(QUESTIONS, sha256="0" * 64)
    first, second = Oracle(), Oracle()
    collect(first, tmp_path)
    run = collect(second, tmp_path, other, fresh=True)
    assert second.calls == N and run.n_resumed == 0
    assert collect(third := Oracle(), tmp_path).n_resumed == N and third.calls == 0
    assert len(list(tmp_path.glob("answers-nano-reasoning-*.jsonl"))) == 2


def test_grades_reasons_and_failures_to_read(tmp_path):
    def mixed(item, request):
        return {0: said(item.answer), 1: said("x", "length"), 2: said("")}.get(
            len(item.prompt) % 4, said("Tom.")
        )

    results = Results([collect(mixed, tmp_path)])
    items = results.items
    assert set(items["grade"]) == {"correct", "truncated", "no_answer", "wrong"}
    assert (items["reason"].str.len() > 0).equals(~items["correct"])
    read = results.failures(5)
    assert len(read) == 5 == read["family"].nunique()
    again = dataclasses.replace(results.runs[0], items=items.assign(set="again", correct=False))
    read = Results([*results.runs, again]).failures(3)
    new = read.loc[read["set"] == "again", "prompt"]
    assert len(new) == 3 and new.isin(items.loc[items["correct"], "prompt"]).all(), "other questions"
    table = results.families()
    assert table["n"].sum() == N and (table["low"] <= table["accuracy"]).all()


# ---- thinking ----

UNFINISHED = [
    ("<think>The final line must look like <answer>15</answer>. Now, 5 times", "length"),
    ("<think>so maybe <answer>15", "stop"),
    ("Well. <think>15", "eos"),
    ("[THINK]15", "length"),
]


@pytest.mark.parametrize(("text", "finish"), UNFINISHED)
def test_a_thinking_that_does_not_end_is_truncated_and_no_answer(tmp_path, text, finish):
    run = collect(lambda *_: said(text, finish), tmp_path, limit=1)
    assert run.items["grade"].tolist() == ["truncated"] and run.items["truncated"].all()
    assert not run.items["correct"].any()


def test_a_template_that_begins_the_thinking_needs_its_end(tmp_path):
    def answer(item, request):
        return said(item.answer)

    assert set(collect(answer, tmp_path / "a", opens=True).items["grade"]) == {"truncated"}
    closed = collect(lambda item, _: said(f"Hm.</think>{item.answer}"), tmp_path / "b", opens=True)
    assert closed.score.value == 1.0


@pytest.mark.parametrize(("opened", "text"), [(False, "<think>"), (True, "")])
def test_a_stop_text_counts_only_behind_the_thinking(model, monkeypatch, opened, text):
    said = text + "It must end in </answer>.</think><answer>12</answer> and so on"
    monkeypatch.setattr(llama_generate, "next_tokens", lambda *_: iter(model.tokenize(said, special=False)))
    prompt = model.tokenize("Q?<think>\n" if opened else "Q?", special=False)
    made = generate(model, prompt, 99, stop=["</answer>"])
    assert made.text == text + "It must end in </answer>.</think><answer>12" and made.finish_reason == "stop"


def test_a_setting_that_means_nothing_is_refused():
    """A limit of -1 would leave out the last question without a word."""
    for wrong in ({"thinking": "yes"}, {"limit": -1}, {"thinking_tokens": -1}):
        with pytest.raises(DfqsError):
            Options(**wrong)


@needs_sandbox
def test_code_in_a_thinking_that_does_not_end_is_not_run(tmp_path):
    def thinking(item, request):
        end = "</think>" if CODE.items.index(item) % 2 else ""
        return said(f"<think>Let me see.{end}\n```python\n{item.prompt}{item.reference}```\n")

    assert collect(thinking, tmp_path, CODE).items["grade"].tolist() == ["truncated", "passed"] * 3


def test_the_thinking_has_a_budget_and_a_switch_of_its_own(tmp_path):
    asked = []

    def watch(item, request):
        asked.append(request)
        return said(item.answer)

    collect(watch, tmp_path, limit=1)
    collect(watch, tmp_path, limit=1, thinking="on", thinking_tokens=1000)
    collect(watch, tmp_path, limit=1, thinking="off")
    limit = QUESTIONS.max_tokens
    assert [request.max_tokens for request in asked] == [limit, limit + 1000, limit]
    assert [request.options.thinking for request in asked] == ["template", "on", "off"]


# ---- text that is no text ----


@needs_sandbox
def test_no_answer_stops_a_run(tmp_path):
    """Half of a surrogate pair, control characters, and code that says or does odd things."""
    texts = ["\ud83d", "\x00\x1b[31m", "\u2028" * 3, "x" * 100_000]
    assert collect(lambda item, _: said(texts[len(item.prompt) % 4]), tmp_path).score.value == 0
    odd = [
        "raise ValueError('\\ud83d')",
        "import os; os.closerange(3, 256)",
        "'\ud83d'",
        "\x00",
        "import os; os.lseek(3, 0, 0)",
        ")(",
    ]
    for turn in range(2):  # also on what the first run wrote
        run = collect(
            lambda item, _: said(f"    {odd[CODE.items.index(item)]}\n"), tmp_path, CODE, mode="complete"
        )
        assert not run.items["correct"].any() and run.n_resumed == 6 * turn
    Results([run]).items.to_csv(tmp_path / "items.csv")


@needs_sandbox
def test_code_is_run_once_and_its_verdicts_are_kept(tmp_path, monkeypatch):
    run = collect(Oracle(), tmp_path, CODE, mode="complete")
    assert run.score.n == 6 and run.conditions["sandbox"] == FOUND.level
    assert run.items["correct"].sum() == sum(sum(i.id.encode()) % 3 != 0 for i in CODE.items)
    monkeypatch.setattr(sandbox, "run", lambda *_: pytest.fail("judged again"))
    assert collect(Oracle(), tmp_path, CODE, mode="complete").score == run.score


@needs_sandbox
def test_the_code_of_a_chat_is_its_code_block(tmp_path):
    answers = {
        0: "Here:\n```python\n{}\n```\nIt works.",
        1: "I cannot.",
        2: "```\nprint(1)\n```\n```py\n{}\n```",
    }

    def chatting(item, request):
        return said(answers[CODE.items.index(item) % 3].format(item.prompt + item.reference))

    run = collect(chatting, tmp_path, CODE)
    assert run.items["grade"].tolist() == ["passed", "no_answer", "passed"] * 2
    assert run.score.value == pytest.approx(4 / 6)


@pytest.fixture(scope="module")
def model(merged_reference):
    with open_model(merged_reference, OpenSettings(n_ctx=512, n_threads=1)) as opened:
        yield opened


def with_template(model, monkeypatch, template: str) -> None:
    """The model as if its file had this chat template."""
    monkeypatch.setattr(model, "template", ChatTemplate(template, "", "", model.path))


def test_without_a_sandbox_code_is_not_even_asked(model, tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "find_sandbox", lambda: sandbox.Sandbox("none", note="it is a test"))
    with pytest.raises(sandbox.SandboxError, match="it is a test.*allow_unsandboxed = True"):
        score_set(model, CODE, tmp_path, Options(progress=False))
    assert list(tmp_path.iterdir()) == []


def test_a_set_that_does_not_fit_is_refused(model, tmp_path):
    with pytest.raises(DfqsError, match=r"needs .* tokens of context; --n-ctx \d+ or more"):
        score_set(model, dataclasses.replace(QUESTIONS, max_tokens=400), tmp_path, Options(progress=False))


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{{ messages[0]['content'][0]['text'] }}",
        "{{ bos_token }}Hello",
        "{{ messages[0]['content'][:9] }}",
    ],
)
def test_a_template_that_drops_the_question_is_refused(model, tmp_path, monkeypatch, template):
    with_template(model, monkeypatch, template)
    with pytest.raises(ModelError, match="chat template leaves out the question|chat template fails"):
        score_set(model, QUESTIONS, tmp_path, Options(progress=False))
    assert list(tmp_path.iterdir()) == []


def test_a_template_that_writes_the_time_gives_the_same_prompt_in_every_run(model, monkeypatch):
    template = "Today is {{ strftime_now('%H:%M:%S.%f') }}. {{ messages[0]['content'] }}A:"
    with_template(model, monkeypatch, template)
    request = Answerer.of(model, QUESTIONS).request(QUESTIONS, QUESTIONS.items[0])
    assert request.rendered(model) == request.rendered(model) and "12:00:00" in request.rendered(model)


def test_thinking_is_told_to_the_template_and_found_where_it_begins_it(model, monkeypatch):
    template = "{{ messages[0]['content'] }}A:{% if enable_thinking %}<think>\n{% endif %}"
    with_template(model, monkeypatch, template)
    assert not Answerer.of(model, QUESTIONS).opens_thinking
    assert Answerer.of(model, QUESTIONS, Options(thinking="on")).opens_thinking
    assert not Answerer.of(model, QUESTIONS, Options(thinking="off")).opens_thinking


def test_a_template_without_a_switch_cannot_be_told_to_think(model, monkeypatch):
    with_template(model, monkeypatch, "{{ messages[0]['content'] }}A:")
    with pytest.raises(DfqsError, match="has no switch for it; leave thinking at 'template'"):
        Answerer.of(model, QUESTIONS, Options(thinking="on"))
    Answerer.of(model, QUESTIONS, Options(thinking="off"))


def test_an_answer_ends_with_the_token_at_which_its_time_ends(model):
    cut = generate(model, model.tokenize("Once", special=False), 50, until=0.0)
    assert (cut.finish_reason, cut.n_tokens) == ("time", 1)


@needs_sandbox
def test_the_reference_model_scores_the_same_twice(model, tmp_path):
    small = dataclasses.replace(QUESTIONS, items=QUESTIONS.items[64:72])
    runs = [
        score_set(model, item_set, tmp_path / str(turn), Options(progress=False))
        for turn in range(2)
        for item_set in (small, CODE)
    ]
    for first, second in ((runs[0], runs[2]), (runs[1], runs[3])):
        assert first.score == second.score and first.items["completion"].equals(second.items["completion"])
    assert runs[0].conditions["prompt_set_sha256"] == QUESTIONS.sha256 and len(runs[0].conditions) > 15


# ---- comparison ----


def test_mcnemar_is_the_binomial_test():
    for a in range(8):
        for b in range(8):
            n = a + b
            tail = [math.comb(n, k) / 2**n for k in range(n + 1)]
            exact = sum(p for p in tail if p <= tail[a] * (1 + 1e-9))
            assert mcnemar(a, b) == pytest.approx(exact)


def test_holm_rejects_in_steps():
    assert holm([]) == []
    assert holm([0.02]) == [0.02]
    assert holm([0.04, 0.01, 0.03, 0.005]) == pytest.approx([0.06, 0.03, 0.06, 0.02])


def test_two_runs_are_compared_item_by_item(tmp_path):
    a, b = collect(Oracle(), tmp_path / "a"), collect(Oracle(shift=1), tmp_path / "b")
    one = compare_runs(a, b)
    both = a.items.merge(b.items, on="id")
    assert one.only_a == (both["correct_x"] & ~both["correct_y"]).sum()
    assert one.difference == pytest.approx(b.score.value - a.score.value)
    assert one.low <= one.difference <= one.high and one.p == mcnemar(one.only_a, one.only_b)
    same = compare_runs(a, a)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert one.n == same.n == N


def test_other_conditions_are_refused_by_name(tmp_path):
    a = collect(Oracle(), tmp_path / "a")
    b = collect(Oracle(), tmp_path / "b", conditions={"n_ctx": 2048, "n_batch": 64})
    with pytest.raises(DfqsError, match=r"differ in n_batch \(absent and 64\), n_ctx \(1024 and 2048\)"):
        compare_runs(a, b)
    with pytest.raises(DfqsError, match="part"):
        compare_runs(a, collect(Oracle(), tmp_path / "c", limit=5))


def test_the_bootstrap_covers_the_true_difference():
    draw, covered = np.random.default_rng(3), 0
    for turn in range(200):
        rows = [
            (family, draw.random() < low, draw.random() < low + 0.15)
            for family, low in (("a", 0.2), ("b", 0.7))
            for _ in range(60)
        ]
        family, a, b = zip(*rows, strict=True)
        low, high = paired_bootstrap(np.array(b, float) - np.array(a, float), family, 400, turn)
        covered += low <= 0.15 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_what_a_run_writes_is_plain_json(tmp_path):
    run = collect(Oracle(), tmp_path)
    assert json.loads(json.dumps(vars(run.score)))["n"] == N
