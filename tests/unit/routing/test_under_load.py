"""Several sequences in one batch: whose row is whose, what a load is compared with, and what its verdict says."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import moe_models
import numpy as np
import pandas as pd
import pytest
from gguf_fixtures import linked
from moe_models import ARCHITECTURES, PlainReader, write_model
from test_routing_verdict import only

from dfqs_nb.core.errors import DfqsError, ModelError
from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama.build import default_params
from dfqs_nb.llama.model import open_model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.routing import experiment as routing_experiment
from dfqs_nb.routing import record_child
from dfqs_nb.routing.experiment import run_experiment
from dfqs_nb.routing.plan import Condition, conditions, fit, loads, read_texts, seconds
from dfqs_nb.routing.recorder import RecordedModel, Recorder, Together, cut, open_recorded, record
from dfqs_nb.routing.trace import compare, joined
from dfqs_nb.routing.verdict import Verdict, compared, judge_loads, load_table

NANO = data_dir() / "reference" / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf"
N_SEQUENCES, N, N_PREFILL = 4, 18, 12
SETTINGS = OpenSettings(n_ctx=256 * N_SEQUENCES, n_threads=1)


def unlike_texts(n_vocab: int, seed: int = 0) -> list[list[int]]:
    """Texts without a common token, and without a repeated one: a token says whose it is, and where."""
    ids = np.random.default_rng(seed).permutation(np.arange(5, n_vocab))
    return [ids[N * i : N * (i + 1)].tolist() for i in range(N_SEQUENCES)]


def plain_rows(path, texts, arrivals, unified, n_ubatch) -> PlainReader:
    """The same batches, read by the second recorder, without our account of their order."""
    reader, settings = PlainReader(), replace(SETTINGS, n_ubatch=n_ubatch)
    more = {"n_seq_max": N_SEQUENCES, "kv_unified": unified, "cb_eval": reader.callback}
    with default_params(**more):
        model = open_model(path, settings, trial=False)
    with model, open_recorded(path, settings, trial=False) as ours:
        ours.reopen(settings, n_sequences=N_SEQUENCES, unified=unified)
        together = Together(ours)
        batches, decode = [], together.decode
        together.decode = lambda *batch: batches.append(batch) or decode(*batch)
        trace = together.record(texts, arrivals, N_PREFILL, 2)
        silent = Together.__new__(Together)
        silent.recorder = Recorder()  # which llama.cpp does not call: only the plain reader listens
        silent.recorded = RecordedModel(model, silent.recorder)
        for batch in batches:
            silent.decode(*batch)
    return trace, reader


@pytest.mark.parametrize("n_ubatch", [512, 7])
@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("arch", [*ARCHITECTURES, "deepseek4"])
def test_every_row_belongs_to_the_sequence_whose_token_it_is(tmp_path, arch, unified, n_ubatch):
    path = NANO if arch == "deepseek4" else write_model(arch, tmp_path)
    texts = unlike_texts(700 if arch == "deepseek4" else moe_models.VOCAB)
    trace, plain = plain_rows(path, texts, [0, 3, 0, 1], unified, n_ubatch)
    tokens = np.array(plain.tokens)
    for column, layer in enumerate(trace.layers):
        rows = plain.rows("topk", layer)
        assert len(rows) == len(tokens)
        # a greedy answer may repeat a token of another text: those rows come later, and are left out
        first = [np.flatnonzero(tokens == token)[0] for text in texts for token in text]
        np.testing.assert_array_equal(trace.experts[:, column], rows[first])


@pytest.mark.parametrize("unified", [True, False])
def test_deepseek4_beside_others_chooses_as_alone_and_answers_alike(unified):
    rng = np.random.default_rng(5)
    texts = [rng.integers(5, 700, 40).tolist() for _ in range(N_SEQUENCES)]
    with open_recorded(NANO, OpenSettings(n_ctx=256, n_threads=1), trial=False) as model:
        single = record(model, texts[2], n_output=4)
        model.reopen(SETTINGS, n_sequences=N_SEQUENCES, unified=unified)
        together = Together(model)
        assert together.rule == "sequential"  # deepseek4 keeps a cache a sequence in any case
        alone = together.record([texts[2]], [0], 40, 4)
        beside = together.record(texts, [0] * 4, 40, 4)
    np.testing.assert_array_equal(alone.output[0][: len(single.output)], single.output)
    np.testing.assert_array_equal(np.sort(alone.experts, axis=2), np.sort(single.experts, axis=2))
    theirs = beside.part(2)
    differ = (np.sort(theirs.experts, axis=2) != np.sort(alone.experts, axis=2)).any(axis=2)
    assert np.abs(theirs.margin - alone.margin)[:, 1:].max() < 0.1
    assert differ.mean() < 0.02 and alone.margin[differ].max(initial=0) < 0.01, "no near-tie decided it"


def test_batches_are_cut_as_llama_cpps_source_says():
    slots = [0] * 3 + [1] * 5 + [2]
    assert cut(slots, 512, "sequential") == [0, 3, 8, 1, 2, 4, 5, 6, 7]
    assert cut([0, 0, 2, 2], 512, "sequential") == [0, 1, 2, 3]
    assert cut([0, 0, 2, 2], 512, "equal") == [0, 1, 2, 3]
    assert cut([0] * 4 + [1] * 4, 4, "sequential") == [0, 1, 4, 5, 2, 3, 6, 7]
    for rule in ("simple", "sequential", "equal"):
        assert sorted(cut(slots, 4, rule)) == list(range(9))


def test_a_new_context_on_loaded_weights_computes_what_a_new_load_does():
    tokens = np.random.default_rng(3).integers(0, 700, 60).tolist()
    other = OpenSettings(
        n_ctx=512, n_threads=1, n_batch=64, n_ubatch=7, flash_attn=True, type_k="q8_0", type_v="q8_0"
    )
    with open_recorded(NANO, other, trial=False) as model:
        fresh = record(model, tokens)
    with open_recorded(NANO, SETTINGS, trial=False) as model:
        record(model, tokens)
        model.reopen(other)
        again = record(model, tokens)
        with pytest.raises(ModelError, match="llama.cpp refuses it"):
            model.reopen(replace(other, flash_attn=False))
        model.reopen(other)
        np.testing.assert_array_equal(record(model, tokens).digest, fresh.digest)
    np.testing.assert_array_equal(again.digest, fresh.digest)
    np.testing.assert_array_equal(again.experts, fresh.experts)


# ---- texts, plan and budget ----


def test_the_texts_are_enough_and_of_enough_domains(tmp_path):
    texts = read_texts()
    assert len(texts) >= 12 and len({text.domain for text in texts}) >= 4
    for domain in ("law", "poems"):
        (tmp_path / domain).mkdir()
        (tmp_path / domain / "one.txt").write_text(f"a text about {domain}", encoding="utf-8")
    assert [(text.domain, text.name) for text in read_texts(tmp_path)] == [
        ("law", "law/one.txt"),
        ("poems", "poems/one.txt"),
    ]
    with pytest.raises(DfqsError, match="1 different text, and 2 are needed"):
        read_texts(tmp_path / "law")
    (tmp_path / "law" / "same.txt").write_text("a text about law\n", encoding="utf-8")
    assert len(read_texts(tmp_path)) == 2
    with pytest.raises(DfqsError, match="there is no such folder"):
        read_texts(tmp_path / "nowhere")


@pytest.mark.parametrize("n_texts", [2, 3, 5, 12])
def test_a_batch_is_never_smaller_than_it_says(n_texts):
    plan = [each for each in loads(OpenSettings(n_ctx=512, n_threads=1), n_texts) if each.arrivals]
    assert plan and all(len(each.texts) == len(each.arrivals) for each in plan)


def test_every_text_meets_every_load_and_seeds_repeat():
    settings = OpenSettings(n_ctx=512, n_threads=1)
    plan = list(loads(settings, 16))
    assert plan == list(loads(settings, 16)) and plan != list(loads(settings, 16, seed=1))
    for n_others in (1, 3, 7):
        for kind in ("together", "mixed"):
            members = [each.texts for each in plan if re.match(f"{n_others} others?, {kind}", each.name)]
            assert {text for each in members for text in each} == set(range(16))
    mixed = [each for each in plan if "mixed" in each.name]
    assert any(arrival > 0 for each in mixed for arrival in each.arrivals)
    assert all(each.settings.n_ctx >= 88 * max(1, len(each.arrivals)) for each in plan)
    assert mixed[0].name == "7 others, mixed, a cache each, batch 1"


def planned_for(n_texts=16):
    return conditions(OpenSettings(n_ctx=512, n_threads=1), 384, 2, n_texts)


@pytest.mark.parametrize(("start", "prefill"), [(0, 0.01), (1.5, 0.01), (0, 0.5)])
def test_what_starts_with_the_first_batch_is_no_cost_of_a_token(monkeypatch, start, prefill):
    """A card takes a second and more to start its kernels; a slow machine is not asked for 64 tokens."""
    clock, fed = [0.0], list[int]()

    def feed(tokens):
        clock[0] += len(tokens) * prefill + (0 if fed else start)
        fed.append(len(tokens))

    monkeypatch.setattr(record_child, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    recording = object.__new__(record_child.Recording)
    vars(recording).update(recorded=SimpleNamespace(feed=feed), text=[1] * 384, lines=[], load_seconds=1.0)
    recording.job = {"n_output": 16}
    costs = recording.costs()
    assert [costs["prefill"], costs["decode"]] == pytest.approx([prefill, prefill])
    assert fed == [8, 1, 1] + [64] * (prefill < 0.1)


def costing(load, prefill, decode):
    lengths = {"text": 384, "answer": 16, "profile": 16 * 300}
    return {"load": load, "prefill": prefill, "decode": decode, **lengths}


def test_a_budget_leaves_out_from_the_end_and_then_shortens():
    planned, costs = planned_for(), costing(10, 0.01, 0.1)
    whole = seconds(planned, costs)
    assert fit(planned, costs, whole) == (1.0, [each.name for each in planned])
    budget = 0.6 * whole
    scale, kept = fit(planned, costs, budget)
    assert scale == 1.0 and "7 others, mixed, a cache each, batch 1" in kept and "all by decode" not in kept
    assert seconds([each for each in planned if each.name in kept], costs) <= budget
    assert fit(planned, costs, 1) == (0.125, ["prefill"])
    assert fit(planned, costs, budget / 4)[0] < 1


def test_a_small_budget_repeats_before_it_runs_texts_that_nothing_is_compared_with():
    """What the full size had on two cores: a token takes a second, and 16 texts alone would take it all."""
    planned, costs = planned_for(), costing(10, 0.7, 1.2)
    kept = fit(planned, costs, 444)[1]
    assert {"prefill, fresh process", "prefill, same process again"} <= set(kept) and "alone" not in kept
    needs = {each.name: each.against for each in planned}
    assert all(needs[name] in {"", *kept} for name in kept), "a run without what it is compared with"


def test_a_scaled_run_is_shorter_in_all_its_parts():
    load = next(each for each in planned_for() if each.name.startswith("7 others, mixed"))
    half = load.scaled(0.5)
    assert half.n_prefill == 32 and 0 < max(half.arrivals) <= 8
    decode = next(each for each in planned_for() if each.name == "decode")
    assert decode.scaled(0.5).n_prefill == 96


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(ModelError, match="10 tokens do not hold the question .* use n_tokens="):
        run_experiment(NANO, tmp_path, n_tokens=10)
    with pytest.raises(DfqsError, match="0 different texts"):
        run_experiment(NANO, tmp_path / "untouched", texts=tmp_path)
    assert not (tmp_path / "untouched").exists()


CHOSEN = ["prefill, fresh process", "alone, fresh process", "n_batch 7"]


def test_shards_behind_links_are_recorded_as_the_files_are(tmp_path):
    links = linked(open_shards(NANO).paths, tmp_path)
    options = {"n_tokens": 60, "n_output": 2, "budget_minutes": 1e-4}
    a, b = (run_experiment(path, tmp_path / name, **options) for name, path in (("a", NANO), ("b", links[0])))
    assert compare(a.reference, b.reference)["logits_equal"] == 1


def test_a_budget_shrinks_the_experiment_and_says_how(tmp_path, capsys, monkeypatch):
    only(monkeypatch, *CHOSEN)
    options = {"n_tokens": 60, "n_output": 2}
    experiment = run_experiment(NANO, tmp_path, **options, budget_minutes=1e-4)
    assert "Budget 0.0001 min: 1 of 5 runs, at 0.125 of each length." in capsys.readouterr().out
    assert set(experiment.traces) == {"prefill"} and experiment.reference.n_tokens == 8
    status = experiment.rows.set_index("condition")["status"]
    assert status.str.startswith("left out").all()
    assert set(experiment.left_out) == {*CHOSEN, "alone"} and "Left out" in " ".join(experiment.conclusions())
    assert run_experiment(NANO, tmp_path, **options, budget_minutes=1e-4).n_made == 0
    whole = run_experiment(NANO, tmp_path, **options)
    assert whole.n_made == 5 and not whole.left_out and whole.passed
    enough = run_experiment(NANO, tmp_path, **options, budget_minutes=2e-4)
    assert (enough.n_made, len(enough.traces)) == (0, 5)  # all is there: nothing has to be left out


def test_a_run_that_gets_a_budget_does_not_mix_lengths(tmp_path, monkeypatch):
    """An earlier run without a bound left whole traces of some conditions: they are used, at that length."""
    only(monkeypatch, *CHOSEN[:1])
    whole = run_experiment(NANO, tmp_path, n_tokens=60, n_output=2)
    monkeypatch.undo()
    only(monkeypatch, *CHOSEN)
    experiment = run_experiment(NANO, tmp_path, n_tokens=60, n_output=2, budget_minutes=1e-4)
    assert {trace.conditions["scale"] for trace in experiment.traces.values()} == {1.0}
    assert set(whole.traces) <= set(experiment.traces)


def test_a_budget_takes_no_recorded_run_away(tmp_path, monkeypatch):
    """Whatever it is, the speed is measured once, and what a budget does not hold is used where it lies."""
    only(monkeypatch, *CHOSEN, "repacked weights (extra buffers)")
    monkeypatch.setattr(routing_experiment, "has_amx", lambda: True)
    probes, child = list[str](), routing_experiment._Runs._child

    def counted(self, worker, each, file):
        probes.extend([] if file else [each.name])
        return child(self, worker, each, file)

    monkeypatch.setattr(routing_experiment._Runs, "_child", counted)
    options = {"n_tokens": 60, "n_output": 2}
    whole = run_experiment(NANO, tmp_path, **options)
    small = run_experiment(NANO, tmp_path, **options, budget_minutes=1e-4)
    assert (small.n_made, set(small.traces), small.left_out) == (0, set(whole.traces), [])
    status = small.rows.set_index("condition")["status"]
    assert status["repacked weights (extra buffers)"].startswith("not tried: extra buffers crash")
    (lost,) = tmp_path.glob("n_batch-7.*.npz")
    lost.unlink()
    for minutes in (1e-4, 1.1e-4, 3e-4):
        small = run_experiment(NANO, tmp_path, **options, budget_minutes=minutes)
        assert (small.n_made, small.left_out) == (0, ["n_batch 7"])
    assert probes == ["prefill"]
    again = run_experiment(NANO, tmp_path, **options, budget_minutes=10)
    assert (again.n_made, again.left_out, set(again.traces)) == (1, [], set(whole.traces))


# ---- the verdict ----


def rows_of(n_differ: dict[str, int], n_texts: int = 16) -> pd.DataFrame:
    """Rows of `compared` for loads of 7 others in which one choice each of some texts differs."""
    return pd.DataFrame(
        [
            {
                "load": load,
                "kind": "load",
                "status": "done",
                "n_others": 7,
                "n_threads": 1,
                "condition": f"{load} {text // 8}",
                "text": f"text {text}",
                "domain": f"domain {text % 4}",
                "n_choices": 100,
                "n_differ": int(text < n),
                "margin_differ": 0.1,
                "logits_equal": 0.5,
                "logit_drift": 0.2,
                "same_output": True,
            }
            for load, n in n_differ.items()
            for text in range(n_texts)
        ]
    )


def again(passed: bool = True, n_runs_differ: int = 0) -> Verdict:
    return Verdict(passed, "", {"n_runs_differ": n_runs_differ})


def test_nothing_changed_bounds_texts_and_counts_batches():
    verdict = judge_loads(rows_of({"a": 0, "b": 0}), again())
    assert verdict.passed
    bound = f"(95 % upper bound: {100 * (1 - 0.05 ** (1 / 16)):.0f} %)"
    assert f"in 0 of 16 texts {bound} and 0 of 4 batches. Logits" in verdict.text
    assert verdict.text.count("bound") == 1
    assert verdict.text.startswith("Deterministic under load: with 16 texts of 4 domains beside 7 others")
    assert "in one batch (n_threads 1), 0 of 3,200 choices" in verdict.text
    assert judge_loads(rows_of({"a": 0}), again(False, 1)).text.startswith(
        "Not deterministic, not even alone"
    )
    unknown = judge_loads(rows_of({"a": 0}), again(False))
    assert not unknown.passed and unknown.text.startswith("Not shown, as repetitions alone did not run")
    broken = rows_of({"a": 0, "b": 0})
    broken.loc[broken["load"] == "b", "status"] = "failed: llama.cpp died"
    assert not judge_loads(broken, again()).passed
    assert "2 loads did not run (b 0: failed" in judge_loads(broken, again()).text
    broken.loc[broken["load"] == "b", "status"] = "not comparable: 'alone' did not run"
    assert not judge_loads(broken, again()).passed
    broken.loc[broken["load"] == "b", "status"] = "left out: 'alone' did not run"
    assert judge_loads(broken, again()).passed


def test_a_changed_choice_names_its_loads_with_an_interval_over_texts():
    verdict = judge_loads(rows_of({"a": 0, "b": 3}), again())
    assert verdict.passed is False and verdict.text.startswith("Deterministic alone only")
    low, high = re.search(
        r"3 of 3,200 choices .*0.09 %, .* texts ([\d.]+) % to ([\d.]+) %", verdict.text
    ).groups()
    assert 0 <= float(low) < 0.09 < float(high) and "changes a choice: b." in verdict.text


def test_no_load_is_no_verdict():
    nothing = compared([], {}, {}, [])
    assert judge_loads(nothing, again()).passed is None
    dense = judge_loads(rows_of({"a": 0}).assign(n_choices=0), again())
    assert dense.passed is None and "no routed experts" in dense.text
    assert "logits move by up to " in dense.text and "greedy answers change" in dense.text
    json.dumps([asdict(judge_loads(rows, again())) for rows in (nothing, rows_of({"a": 0}))])


def test_each_sequence_is_compared_with_itself_alone(tmp_path):
    texts = read_texts()[:2]
    rng = np.random.default_rng(1)
    lines = [rng.integers(5, 700, 30).tolist() for _ in texts]
    settings = OpenSettings(n_ctx=512, n_threads=1)
    single = Condition("alone", "alone", "", settings, 20, texts=(0, 1))
    beside_one = replace(single, name="1 other", kind="load", against="alone", texts=(1, 0), arrivals=(0, 0))
    with open_recorded(NANO, settings, trial=False) as model:
        model.reopen(settings, n_sequences=2)
        together = Together(model)
        alone = joined([together.record([line], [0], 20, 2) for line in lines], lengths=[30, 30])
        beside = together.record(lines[::-1], [0, 0], 20, 2)
    made, status = {"alone": alone, "1 other": beside}, dict.fromkeys(["alone", "1 other"], "done")
    rows = compared([single, beside_one], made, status, texts)
    assert rows["text"].tolist() == [texts[1].name, texts[0].name] and (rows["n_choices"] == 90).all()
    assert load_table(rows).loc[0, "n_runs"] == 1
    alone.save(tmp_path / "alone.npz")
