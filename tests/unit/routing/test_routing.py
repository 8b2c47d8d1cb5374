"""The recorder against a plain reading of every router node and against the published formulas; traces on disk."""

from __future__ import annotations

import shutil
import subprocess
import tracemalloc
from types import SimpleNamespace

import moe_models
import numpy as np
import pytest
from gguf import GGUFReader
from llama_cpp_tools import Unavailable, tool
from moe_models import ARCHITECTURES, VOCAB, PlainReader, choose, write_model
from test_memory import smollm2

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.paths import data_dir
from dfqs_nb.llama.build import default_params
from dfqs_nb.llama.graph import Router
from dfqs_nb.llama.model import ContextFullError, open_model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.routing.recorder import Recorder, _Layer, calls, open_recorded, record
from dfqs_nb.routing.trace import load_trace

NANO = data_dir() / "reference" / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf"
# batches that do not divide the text, micro-batches that do not divide a batch, then decode
SETTINGS = OpenSettings(n_ctx=256, n_threads=1, n_batch=32, n_ubatch=7)
MIXED = 45  # tokens of prefill
TOKENS = np.random.default_rng(1).integers(0, VOCAB, 60).tolist()


def recorded(path, tokens=TOKENS, n_prefill=MIXED, settings=SETTINGS):
    with open_recorded(path, settings, trial=False) as model:
        return record(model, tokens, n_prefill)


def read_plainly(path, tokens=TOKENS, n_prefill=MIXED) -> PlainReader:
    reader = PlainReader()
    with default_params(cb_eval=reader.callback):
        model = open_model(path, SETTINGS, trial=False)
    with model:
        for call in calls(len(tokens), n_prefill, SETTINGS.n_batch):
            next(model.logits(tokens[call.start : call.stop]))
    return reader


@pytest.fixture(scope="module", params=ARCHITECTURES)
def tiny(request, tmp_path_factory):
    path = write_model(request.param, tmp_path_factory.mktemp("moe"))
    return request.param, path, recorded(path), read_plainly(path)


def test_every_architecture_is_read_as_the_plain_reader_reads_it(tiny):
    arch, _, trace, plain = tiny
    assert trace.layers.tolist() == list(range(moe_models.LEAD.get(arch, 0), moe_models.LAYERS.get(arch, 2)))
    assert trace.n_experts == moe_models.EXPERTS and not trace.hashed.any()
    for column, layer in enumerate(trace.layers):
        np.testing.assert_array_equal(trace.experts[:, column], plain.rows("topk", layer))


def test_every_architecture_chooses_as_its_formula_says(tiny):
    arch, path, trace, plain = tiny
    biases = {t.name: t.data for t in GGUFReader(path).tensors if "exp_probs_b" in t.name}
    for column, layer in enumerate(trace.layers):
        logits = plain.rows("probs" if arch == "gpt-oss" else "logits", layer)
        experts, _, margin = choose(arch, logits, biases.get(f"blk.{layer}.exp_probs_b.bias", 0.0))
        np.testing.assert_array_equal(trace.experts[:, column], experts)
        np.testing.assert_allclose(trace.margin[:, column], margin, atol=2e-6)


@pytest.fixture(scope="module")
def nano():
    tokens = np.random.default_rng(2).integers(0, 700, 60).tolist()
    return tokens, recorded(NANO, tokens), read_plainly(NANO, tokens)


def test_deepseek4_hash_layers_follow_the_table_and_have_no_margin(nano, merged_reference):
    tokens, trace, _ = nano
    table = next(t.data for t in GGUFReader(merged_reference).tensors if "tid2eid" in t.name)
    assert trace.hashed.tolist() == [True, False, False, False]
    np.testing.assert_array_equal(trace.experts[:, 0], np.asarray(table).reshape(-1, 2)[tokens])
    assert np.isnan(trace.margin[:, 0]).all() and (trace.margin[:, 1:] >= 0).all()


def test_deepseek4_scores_are_sqrt_softplus_with_a_bias(nano, merged_reference):
    _, trace, plain = nano
    biases = {t.name: t.data for t in GGUFReader(merged_reference).tensors if "exp_probs_b" in t.name}
    for layer in (1, 2, 3):
        scores = np.sqrt(np.log1p(np.exp(plain.rows("logits", layer).astype(float))))
        biased = scores + biases[f"blk.{layer}.exp_probs_b.bias"]
        order = np.argsort(-biased, axis=1)[:, :3]
        ranked = np.take_along_axis(biased, order, axis=1)
        np.testing.assert_allclose(trace.margin[:, layer], ranked[:, 1] - ranked[:, 2], atol=1e-5)
        np.testing.assert_array_equal(trace.experts[:, layer], order[:, :2])
        np.testing.assert_array_equal(trace.experts[:, layer], plain.rows("topk", layer))


def test_decode_through_known_addresses_equals_decode_by_name():
    """Long enough that compressed caches fill and the graph changes on the way; prefill comes in between."""
    tokens = np.random.default_rng(3).integers(0, 700, 200).tolist()
    with open_recorded(NANO, SETTINGS, trial=False) as model:
        first = record(model, tokens, 0)
        record(model, tokens)
        again = record(model, tokens, 0)
    reader = read_plainly(NANO, tokens, 0)
    for layer in range(4):
        np.testing.assert_array_equal(first.experts[:, layer], reader.rows("topk", layer))
    np.testing.assert_array_equal(first.margin, again.margin)
    np.testing.assert_array_equal(first.digest, again.digest)


def test_logits_and_output_are_those_of_the_model_alone():
    tokens = np.random.default_rng(4).integers(0, 700, 40).tolist()
    with open_recorded(NANO, SETTINGS, trial=False) as model:
        trace = record(model, tokens, n_output=6)
    with open_model(NANO, SETTINGS, trial=False) as model:
        logits, answer = model.evaluate(tokens), []
        while len(answer) < 6 and not model.ends(int(logits.argmax())):
            answer.append(int(logits.argmax()))
            logits = model.evaluate(answer[-1:])
    assert trace.output.tolist() == answer


def test_a_context_that_is_too_small_is_an_error():
    with open_recorded(NANO, SETTINGS, trial=False) as model, pytest.raises(ContextFullError):
        record(model, [5] * 300)


def test_a_trace_survives_the_disk(tmp_path, nano):
    _, trace, _ = nano
    loaded = load_trace(trace.save(tmp_path / "trace.npz"))
    for name in ("tokens", "layers", "hashed", "experts", "margin", "output"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(trace, name))
    np.testing.assert_array_equal(loaded.digest, trace.digest)
    assert loaded.conditions == trace.conditions and loaded.n_experts == 16
    assert loaded.conditions["n_ubatch"] == 7 and loaded.conditions["model"] == "DFQS-Nano"


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04", b"x" * 99])
def test_a_file_that_is_no_trace_is_an_error(tmp_path, content):
    path = tmp_path / "trace.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DfqsError, match="not a routing trace"):
        load_trace(path)


def test_a_damaged_trace_is_an_error(tmp_path, nano):
    path = nano[1].save(tmp_path / "trace.npz")
    whole, n_refused = path.read_bytes(), 0
    for at in range(len(whole) - 600, len(whole)):  # the zip's directory: methods, versions, encryption
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            load_trace(path)  # a few of these bytes mean nothing
        except DfqsError as error:
            n_refused += "not a routing trace" in str(error)
    assert n_refused > 200


def test_a_dense_model_has_no_routed_experts_but_logits():
    trace = recorded(smollm2(), n_prefill=50, settings=OpenSettings(n_ctx=256, n_threads=1))
    assert trace.experts.shape == (60, 0, 0) and len(trace.digest) == 60 and not trace.routed


def stage(recorder: Recorder, layer: int, order: np.ndarray, scores: np.ndarray) -> None:
    """Hand the recorder what llama.cpp would: all experts in order, and their scores."""
    known = recorder._layers.setdefault(layer, _Layer(False, order.shape[1]))
    known.ids.append(order.astype(np.int32).tobytes())
    known.scores.append(scores.astype(np.float32).tobytes())
    recorder._raw_bytes += 8 * order.size
    known.n_tokens += len(order)


def fill(recorder: Recorder, n_tokens: int, n_layers: int, k: int, n_experts: int, step: int = 256) -> None:
    """A long run in which the first k experts lead."""
    recorder.reset()
    recorder._k = k
    order = np.tile(np.arange(n_experts), (step, 1))
    scores = np.tile(np.linspace(1, 0, n_experts), (step, 1))
    for _ in range(0, n_tokens, step):
        recorder.begin(step)
        for layer in range(n_layers):
            stage(recorder, layer, order, scores)
        recorder.end()


def test_copies_of_scores_are_reduced_on_the_way():
    recorder, n_tokens = Recorder(), 4096
    tracemalloc.start()
    fill(recorder, n_tokens, 43, 6, 256)
    arrays = recorder.arrays()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(arrays[name].nbytes for name in ("experts", "margin")) == n_tokens * 43 * 16
    assert peak < 120e6, f"{peak / 1e6:.0f} MB, and all scores are {n_tokens * 43 * 256 * 8 / 1e6:.0f} MB"
    assert arrays["n_experts"] == 256 and (arrays["margin"] > 0).all()


def test_layers_that_choose_unlike_others_are_an_error():
    recorder, router = Recorder(), object.__new__(Router)
    recorder._listening, recorder._k = True, 2
    router.layer, router.ids, router.reads = 5, SimpleNamespace(ne=(4, 1)), [SimpleNamespace(ne=(8, 1))]
    with pytest.raises(DfqsError, match="layer 5 chooses 4 experts, and others 2"):
        recorder._chosen(router)


def test_scores_that_contradict_the_choice_are_an_error():
    recorder = Recorder()
    recorder.begin(1)
    recorder._k = 1
    stage(recorder, 0, np.array([[1, 0]]), np.array([[0.9, 0.1]]))
    with pytest.raises(DfqsError, match="do not score highest"):
        recorder.arrays()


def test_a_layer_that_was_not_heard_is_an_error():
    recorder = Recorder()
    recorder.begin(2)
    stage(recorder, 3, np.array([[1, 0]]), np.array([[0.9, 0.1]]))
    with pytest.raises(DfqsError, match="layer 3 routed 1 of 2 tokens"):
        recorder.end()


@pytest.mark.slow
def test_llama_cpps_own_random_models_are_read_as_the_plain_reader_reads_them(tmp_path):
    """2 experts of 2: nothing to choose, but other tensor layouts, such as merged gate and up weights."""
    try:
        program = tool("test-llama-archs")
    except Unavailable as error:
        pytest.skip(str(error))
    wanted = (
        "qwen3moe|olmoe|granitemoe|deepseek2|deepseek32|deepseek4|gpt-oss|glm4moe|bailingmoe2|llama|llama4"
    )
    wanted += "|grovemoe"
    subprocess.run([program, "-a", f"^({wanted})$", "-s", "7", "-o", str(tmp_path)], check=True, timeout=600)
    paths = sorted(tmp_path.glob("*-moe.gguf"))
    assert len(paths) == 12
    for path in paths:
        if path.name.startswith("grovemoe"):  # asks a second router a layer
            with pytest.raises(DfqsError, match="of 32 tokens"):
                recorded(path)
            continue
        trace, plain = recorded(path), read_plainly(path)
        for column, layer in enumerate(trace.layers):
            np.testing.assert_array_equal(trace.experts[:, column], plain.rows("topk", layer))
    shutil.rmtree(tmp_path)
