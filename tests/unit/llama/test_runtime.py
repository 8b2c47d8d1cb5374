"""The runtime against llama-cpp-python used plainly, against jinja2, and against files that kill llama.cpp."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import struct
import warnings
from pathlib import Path

import numpy as np
import plain_llama
import pytest
from test_memory import smollm2

from dfqs_nb.core import child
from dfqs_nb.core.errors import DfqsError, ModelError, SpaceError
from dfqs_nb.core.machine import available_memory, has_amx
from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.facts import parameters
from dfqs_nb.gguf.header import read_header
from dfqs_nb.llama import generate as llama_generate
from dfqs_nb.llama import model as llama_model
from dfqs_nb.llama.build import build_llama, dry_run
from dfqs_nb.llama.generate import Sampling, chat, chat_prompt, generate
from dfqs_nb.llama.log import LOG
from dfqs_nb.llama.model import open_model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.workbook.cli import identity

REFERENCE = data_dir() / "reference"
NANO = REFERENCE / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf"
NANO_Q8 = REFERENCE / "DFQS-Nano-Q8_0-00001-of-00002.gguf"
FRANCE = "What is the capital of France?"
# one thread: threads that wait for each other crawl when the machine is busy, and nothing here is about speed
SETTINGS = OpenSettings(n_ctx=512, n_threads=1)


@pytest.fixture(autouse=True)
def _support(monkeypatch):
    """Let child processes import the helpers of the tests."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([plain_llama.SUPPORT, os.environ.get("PYTHONPATH", "")]))


@pytest.fixture(scope="module")
def nano():
    with open_model(NANO, SETTINGS) as model:
        yield model


@pytest.fixture(scope="module")
def smol():
    with open_model(smollm2(), SETTINGS) as model:
        yield model


def copy_of_nano(folder: Path) -> Path:
    for path in NANO.parent.glob("DFQS-Nano-IQ1_S-XL-*.gguf"):
        shutil.copy(path, folder)
    return folder / NANO.name


def patch(path: Path, at: int, data: bytes) -> Path:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    return path


def set_key(folder: Path, name: str, value: int) -> Path:
    """A copy of the reference model with another number under a ``deepseek4.`` key."""
    path = copy_of_nano(folder)
    return patch(path, read_header(path).fields[f"deepseek4.{name}"].value_start, struct.pack("<I", value))


def set_tensor(folder: Path, name: str, value: float) -> Path:
    """A copy of the reference model with every element of an F32 tensor set to ``value``."""
    path = copy_of_nano(folder)
    for shard in folder.glob("*.gguf"):
        header = read_header(shard)
        for tensor in header.tensors:
            if tensor.name == name:
                patch(
                    shard,
                    header.data_offset + tensor.offset,
                    np.full(tensor.n_elements, value, "<f4").tobytes(),
                )
                return path
    raise LookupError(name)


# ---- answers ----


@pytest.mark.parametrize("path", [NANO, NANO_Q8], ids=["iq1_s-xl", "q8_0"])
def test_reference_model_knows_its_capital(path):
    with open_model(path, SETTINGS) as model:
        answer = chat(model, FRANCE)
    assert "Paris" in answer.text
    assert answer.finish_reason == "eos"


@pytest.mark.parametrize("path", ["nano", "nano_q8", "smollm2"])
@pytest.mark.parametrize("prompt", [FRANCE, "Write a python decorator for caching"])
def test_greedy_answer_equals_plain_llama_cpp_python(path, prompt):
    """Plain, but for the one parameter without which it crashes on processors with AMX; see `plain_llama`."""
    path = {"nano": NANO, "nano_q8": NANO_Q8}.get(path) or smollm2()
    theirs = plain_llama.answer(path, prompt, max_tokens=40)
    with open_model(path, SETTINGS, trial=False) as model:
        ours = chat(model, prompt, max_tokens=40)
    assert (ours.text, ours.n_prompt) == (theirs["text"], theirs["n_prompt"])
    assert (ours.finish_reason == "eos") == (theirs["finish_reason"] == "stop")


def test_real_third_party_model_writes_python(smol):
    assert "def " in chat(smol, "Write a python decorator for caching", max_tokens=60).text


def test_prompt_is_the_headers_template_rendered_by_jinja(nano):
    import jinja2

    template = nano.header["tokenizer.chat_template"]
    tokens = nano.header["tokenizer.ggml.tokens"]
    bos, user, assistant = (
        tokens.index(t) for t in ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
    )
    ids = chat_prompt(nano, FRANCE)
    assert [i for i in ids if i in (bos, user, assistant)] == [bos, user, assistant]
    assert ids[:2] == [bos, user] and ids[-1] == assistant
    text = (
        jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            messages=[{"role": "user", "content": FRANCE}], bos_token=tokens[bos], add_generation_prompt=True
        )
    )
    assert nano.llama.detokenize(ids, special=True).decode() == text
    assert ids == nano.llama.tokenize(text.encode(), add_bos=False, special=True)


def test_every_token_of_both_vocabularies_has_its_bytes(nano, smol):
    """Byte-level BPE by its published byte table: a token's text maps back to bytes one character each."""
    from gguf.vocab import bytes_to_unicode  # noqa: PLC0415

    table = {char: byte for byte, char in bytes_to_unicode().items()}
    for model in (nano, smol):
        texts, types = model.header["tokenizer.ggml.tokens"], model.header["tokenizer.ggml.token_type"]
        for token, (text, kind) in enumerate(zip(texts, types, strict=True)):
            if kind == 1:
                assert model.token_bytes(token) == bytes(table[char] for char in text), token


def test_same_prompt_twice_gives_the_same_tokens(nano):
    first, second = (chat(nano, "Explain mixture-of-experts routing", 64).token_ids for _ in range(2))
    assert first == second and len(first) > 5


def test_an_answer_does_not_depend_on_the_one_before(nano):
    alone = chat(nano, FRANCE).token_ids
    chat(nano, "Which is larger, 12 or 47?")
    assert chat(nano, FRANCE).token_ids == alone


def test_sampling_is_repeatable_by_its_seed(nano):
    hot = Sampling(temperature=8.0, top_k=0, top_p=1.0, min_p=0.0, seed=7)
    first, again = (chat(nano, FRANCE, 24, hot).token_ids for _ in range(2))
    other = chat(nano, FRANCE, 24, dataclasses.replace(hot, seed=8)).token_ids
    assert first == again
    assert first != other


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -1.0])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(ModelError, match="use 0 .greedy. or more"):
        Sampling(temperature)


def test_control_tokens_of_plain_text_have_no_meaning(nano):
    assert len(nano.tokenize("<｜User｜>")) == 1 < len(nano.tokenize("<｜User｜>", special=False))


# ---- where answers end ----


class ScriptedModel:
    """Says given tokens, whose bytes are given too; token -1 ends."""

    path, settings = Path("scripted.gguf"), OpenSettings(n_ctx=512, n_threads=1)

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces, self.at = pieces, -1

    def clear(self) -> None:
        self.at = -1

    def evaluate(self, _tokens: list[int]) -> np.ndarray:
        self.at += 1
        return np.eye(len(self.pieces) + 1, dtype=np.float32)[self.at]

    def token_bytes(self, token: int) -> bytes:
        return self.pieces[token]

    def ends(self, token: int) -> bool:
        return token == len(self.pieces)


def test_a_character_of_several_tokens_is_whole():
    text = "naïve 漢字 🙂🙂 fin"
    answer = generate(ScriptedModel([bytes([b]) for b in text.encode()]), [0])
    assert (answer.text, answer.finish_reason) == (text, "eos")


def test_a_broken_last_character_is_shown_as_such():
    assert generate(ScriptedModel([b"a", "🙂".encode()[:2]]), [0]).text == "a\ufffd"


def test_stop_text_is_cut_off_even_across_tokens():
    model = ScriptedModel([b"def f", b"():\n", b" pass\n", b"\ncla", b"ss B", b"more"])
    answer = generate(model, [0], stop=["\n\nclass", "###"])
    assert (answer.text, answer.finish_reason) == ("def f():\n pass", "stop")
    assert generate(ScriptedModel([b"a\n", b"\n"]), [0], stop=["\n\nclass"]).text == "a\n\n"


def test_a_stop_text_ends_an_answer_also_when_its_time_is_over():
    answer = generate(ScriptedModel([b"a###b", b"more"]), [0], stop=["###"], until=0)
    assert (answer.text, answer.finish_reason) == ("a", "stop")


def test_max_tokens_cuts(nano):
    answer = chat(nano, FRANCE, max_tokens=5)
    assert answer.finish_reason == "length" and len(answer.token_ids) == 5


def test_an_answer_is_cut_when_its_time_is_over_and_the_rest_is_not_asked(nano):
    whole = llama_generate.answer_table(nano, [FRANCE, FRANCE], 5)
    assert whole["finish_reason"].tolist() == ["length"] * 2
    cut = llama_generate.answer_table(nano, [FRANCE, FRANCE], 5, until=0)
    assert cut["tokens"].tolist() == [1, 0] and set(cut["finish_reason"]) == {"time"}
    assert whole["answer"][0].startswith(cut["answer"][0]) and cut["answer"][0]


# ---- limits ----


def test_the_identity_of_a_split_model_covers_all_its_shards(nano):
    digest = hashlib.sha256()
    for shard in (1, 2):
        digest.update((REFERENCE / f"DFQS-Nano-IQ1_S-XL-0000{shard}-of-00002.gguf").read_bytes())
    assert identity(nano) == digest.hexdigest()


def test_prompt_beyond_the_context_is_refused(nano):
    with pytest.raises(llama_model.ContextFullError, match="exceed the context of 512") as caught:
        chat(nano, "word " * 600)
    assert caught.value.cause == "n_ctx"


def test_answer_stops_where_the_context_ends(nano):
    prompt = np.random.default_rng(1).integers(0, 256, 505).tolist()
    answer = generate(nano, prompt, max_tokens=100)
    assert len(answer.token_ids) <= 7


def test_closed_model_is_unmapped_and_says_so():
    model = open_model(NANO_Q8, SETTINGS, trial=False)
    mapped = (
        [NANO_Q8.name in line for line in Path("/proc/self/maps").read_text().splitlines()]
        if Path("/proc/self/maps").exists()
        else [True]
    )
    assert any(mapped)
    before = model.conditions()
    model.close()
    model.close()
    assert model.conditions() == before, "notebook 05 writes them down at its end"
    if Path("/proc/self/maps").exists():
        assert NANO_Q8.name not in Path("/proc/self/maps").read_text()
    with pytest.raises(ModelError, match="closed"):
        chat(model, FRANCE)


# ---- how it is opened ----


@pytest.fixture
def seen_params(monkeypatch):
    """The parameters that reach llama.cpp's own functions."""
    import llama_cpp.llama_cpp as api

    seen = {}
    load, init = api.llama_model_load_from_file, api.llama_init_from_model
    monkeypatch.setattr(
        api, "llama_model_load_from_file", lambda p, params: seen.update(model=params) or load(p, params)
    )
    monkeypatch.setattr(
        api, "llama_init_from_model", lambda m, params: seen.update(context=params) or init(m, params)
    )
    return seen


def test_safe_parameters_reach_llama_cpp(seen_params):
    import llama_cpp.llama_cpp as api

    default = api.llama_model_default_params
    settings = dataclasses.replace(SETTINGS, n_batch=64, n_ubatch=32, n_gpu_layers=3, flash_attn=True)
    open_model(NANO, settings, trial=False).close()
    assert default().use_extra_bufts is True, "llama.cpp's default changed: the wrapper may go"
    assert seen_params["model"].use_extra_bufts is False
    assert seen_params["model"].n_gpu_layers == 3
    context = seen_params["context"]
    assert context.swa_full is False
    assert (context.n_ctx, context.n_batch, context.n_ubatch, context.n_threads) == (512, 64, 32, 1)
    assert api.llama_model_default_params is default


def test_plan_uses_the_same_parameters_as_the_model(seen_params):
    dry_run(NANO, SETTINGS)
    plan = seen_params["context"]
    open_model(NANO, SETTINGS, trial=False).close()
    names = [
        name for name, kind in plan._fields_ if kind.__name__ in ("c_int", "c_uint", "c_bool", "c_float")
    ]
    assert len(names) > 15
    different = {n for n in names if getattr(plan, n) != getattr(seen_params["context"], n)}
    assert different <= {
        "yarn_ext_factor",
        "yarn_attn_factor",
        "yarn_beta_fast",
        "yarn_beta_slow",
        "no_perf",
        "rope_freq_base",
        "rope_freq_scale",
    }


def test_default_parameters_are_restored_after_a_failure(tmp_path):
    import llama_cpp.llama_cpp as api

    default = api.llama_model_default_params
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ModelError, match="refuses it"):
        build_llama(tmp_path / "bad.gguf", dataclasses.replace(SETTINGS, paging="off"))
    assert api.llama_model_default_params is default


@pytest.mark.parametrize("wanted", [False, True])
def test_weights_are_repacked_only_where_that_is_asked_for(wanted):
    if wanted and has_amx():
        pytest.skip("extra buffers crash on CPUs with AMX")
    build_llama(NANO, dataclasses.replace(SETTINGS, use_extra_bufts=wanted)).llama.close()
    repacked = [line for line in LOG.tail() if "buffer size" in line and ("REPACK" in line or "AMX" in line)]
    assert bool(repacked) == wanted


def test_opening_prints_nothing(capfd):
    open_model(NANO, SETTINGS, trial=False).close()
    assert capfd.readouterr() == ("", "")
    assert any("llama_kv_cache" in line for line in LOG.tail())


def test_any_shard_opens_the_model(nano, merged_reference):
    with open_model(REFERENCE / "DFQS-Nano-IQ1_S-XL-00002-of-00002.gguf", SETTINGS) as model:
        assert model.path.samefile(NANO)
        assert parameters(model.header, in_bytes=True) == parameters(
            read_header(merged_reference), in_bytes=True
        ), "of all shards"


def test_a_notebook_shows_no_folder_of_this_machine(nano):
    assert repr(nano) == f"Model({NANO.name}, deepseek4, n_ctx=512, n_threads=1)"


def test_errors_name_the_path_as_it_was_given(tmp_path, monkeypatch):
    set_key(tmp_path, "expert_used_count", 200)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=f"^{NANO.name}: llama.cpp died"):
        open_model(NANO.name, SETTINGS)


def test_settings_are_plain_and_checked():
    settings = OpenSettings()
    assert json.loads(json.dumps(settings.as_dict()))["swa_full"] is False
    assert settings.n_threads >= 1 and settings.n_threads_batch == settings.n_threads
    for bad in ({"n_ctx": 0}, {"n_ctx": 2**31}, {"type_k": "q9"}):
        with pytest.raises(ModelError):
            OpenSettings(**bad)


def test_conditions_name_runtime_and_settings(nano):
    conditions = nano.conditions()
    assert conditions["runtime"].startswith("llama-cpp-python 0.")
    assert conditions["n_ctx"] == 512 and "CPU" in conditions["system_info"]


# ---- files that kill llama.cpp, or that it refuses ----


@pytest.mark.parametrize(
    ("key", "value", "stage"),
    [
        ("expert_used_count", 200, "planning its memory"),
        ("hyper_connection.sinkhorn_iterations", 0, "planning its memory"),
        ("rope.dimension_count", 31, "first decode"),
    ],
)
def test_assertion_in_llama_cpp_is_an_exception_here(tmp_path, key, value, stage):
    path = set_key(tmp_path, key, value)
    with pytest.raises(child.ChildDied) as naive:
        child.run("plain_llama", {"path": str(path)})
    assert naive.value.cause == "SIGABRT", "this file no longer aborts llama.cpp: find another"
    with pytest.raises(ModelError, match=rf"died .*{stage} \(SIGABRT\): .*GGML_ASSERT") as caught:
        open_model(path, SETTINGS)
    assert "update llama-cpp-python" in str(caught.value)
    assert "/" not in str(caught.value).split("died")[1].split("GGML_ASSERT")[0], (
        "shows a folder of the build machine"
    )
    assert any("last lines" in note for note in caught.value.__notes__)


def test_orderly_refusal_gives_its_reason(tmp_path):
    with pytest.raises(ModelError, match=r"refuses it: .*output_hc_fn.weight' has wrong shape"):
        open_model(set_key(tmp_path, "hyper_connection.count", 3), SETTINGS)


@pytest.mark.parametrize(
    ("signal_name", "word"), [("SIGILL", "another CPU"), ("SIGSEGV", "damaged"), ("SIGKILL", "memory")]
)
def test_other_deaths_are_told_apart(signal_name, word):
    number = -getattr(signal, signal_name)
    error = child.died(
        child.ending(number), "m.gguf", [{"stage": "at the first decode"}], ["llama_context: n_ctx = 256"]
    )
    assert signal_name in str(error) and word in str(error) and "first decode" in str(error)


def test_unknown_architecture_is_named(tmp_path):
    path = copy_of_nano(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"deepseek4", b"deepseek9"))
    with pytest.raises(
        ModelError, match=r"refuses it: unknown model architecture: 'deepseek9'.*update llama-cpp-python"
    ):
        open_model(path, SETTINGS)


def test_early_dialect_is_explained(tmp_path):
    path = copy_of_nano(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"attention.output_lora_rank", b"attention.output_lora_ronk"))
    with pytest.raises(
        ModelError, match=r"key not found in model: deepseek4.attention.output_lora_rank.*dialect"
    ):
        open_model(path, SETTINGS)


def test_truncated_data_is_found_before_llama_cpp_sees_it(tmp_path):
    path = copy_of_nano(tmp_path)
    second = tmp_path / "DFQS-Nano-IQ1_S-XL-00002-of-00002.gguf"
    with second.open("r+b") as file:
        file.truncate(second.stat().st_size - 1024)
    with pytest.raises(DfqsError, match="short"):
        open_model(path, SETTINGS)


def test_weights_that_are_not_numbers_are_found_by_the_first_decode(tmp_path):
    path = set_tensor(tmp_path, "output_norm.weight", float("nan"))
    with pytest.raises(ModelError, match="not numbers"):
        open_model(path, SETTINGS)
    with (
        open_model(path, SETTINGS, trial=False) as model,
        pytest.raises(llama_model.NanLogitsError) as caught,
    ):
        chat(model, FRANCE)
    assert caught.value.cause == "nan_logits"


def test_changed_file_is_tried_again(tmp_path):
    path = copy_of_nano(tmp_path)
    open_model(path, SETTINGS).close()
    set_tensor(tmp_path, "output_norm.weight", float("nan"))
    with pytest.raises(ModelError):
        open_model(tmp_path / NANO.name, SETTINGS)


def test_context_that_cannot_fit_is_refused_before_llama_cpp(monkeypatch):
    monkeypatch.setattr(child, "start", lambda *_a, **_k: pytest.fail("too late"))
    with pytest.raises(SpaceError, match="lower n_ctx"):
        open_model(NANO, dataclasses.replace(SETTINGS, n_ctx=2**31 - 256, swa_full=True))


def test_compute_buffer_that_cannot_fit_is_refused_in_the_child(nano, monkeypatch):
    """llama.cpp plans about 4 kB a token here, 20 times the cache, so this context fails by its compute buffer."""
    n_ctx = nano_context_for(available_memory().available_bytes * 5 // 4)
    with pytest.raises(SpaceError, match=r"compute buffer [\d.,]+ GB"):
        open_model(NANO, dataclasses.replace(SETTINGS, n_ctx=n_ctx))


def nano_context_for(compute_bytes: int) -> int:
    return compute_bytes // 4300


def test_quantized_v_cache_without_flash_attention_is_explained():
    with pytest.raises(ModelError, match="flash_attn=True"):
        open_model(smollm2(), dataclasses.replace(SETTINGS, type_v="q8_0"))


def test_two_types_of_cache_are_refused_with_the_remedy():
    with pytest.raises(ModelError, match="different K .*; pass the same type_k and type_v"):
        open_model(NANO, dataclasses.replace(SETTINGS, type_k="q8_0"))


@pytest.mark.parametrize(
    ("name", "value"), [("n_ctx", 0), ("n_batch", -1), ("n_threads", 100_000), ("seed", -1), ("seed", 2**40)]
)
def test_a_setting_that_llama_cpp_cannot_keep_is_refused(name, value):
    with pytest.raises(ModelError, match=f"{name} is {value:,}; use "):
        OpenSettings(**{name: value})


def test_file_larger_than_memory_warns(monkeypatch):
    from dfqs_nb.gguf import memory

    monkeypatch.setattr(memory, "available_memory", lambda: memory.Memory(10**7, 3 * 10**6, "test"))
    with pytest.warns(RuntimeWarning, match="read from the disk again"):
        open_model(NANO, SETTINGS, trial=False).close()


def test_nothing_warns_by_itself():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_model(NANO, SETTINGS, trial=False).close()


# ---- evaluation and state ----


def test_logits_come_in_chunks_that_agree_with_token_by_token(nano):
    """The chunks equal those of any other cut up to llama.cpp's rounding, and the last is what `evaluate` gives."""
    tokens = np.random.default_rng(3).integers(0, 256, 100).tolist()
    with open_model(NANO, dataclasses.replace(SETTINGS, n_batch=32), trial=False) as model:
        chunks = [chunk.copy() for chunk in model.logits(tokens)]
        assert [len(chunk) for chunk in chunks] == [32, 32, 32, 4] and model.n_past == 100
    nano.clear()
    whole = np.concatenate([chunk.copy() for chunk in nano.logits(tokens)])
    assert whole.shape == (100, nano.n_vocab)
    assert np.abs(np.concatenate(chunks) - whole).max() < 0.5
    assert (np.concatenate(chunks).argmax(1) == whole.argmax(1)).mean() > 0.95
    nano.clear()
    assert np.array_equal(nano.evaluate(tokens), whole[-1])
    with pytest.raises(llama_model.ContextFullError):
        next(nano.logits(tokens * 6))
    assert nano.n_past == 100, "nothing was evaluated"


def test_a_restored_state_goes_on_as_before(nano):
    tokens = np.random.default_rng(5).integers(0, 256, 60).tolist()
    nano.clear()
    nano.decode(tokens)
    state = nano.save()
    after = nano.evaluate(tokens[:7])
    nano.restore(state)
    assert nano.n_past == state.n_tokens == 60 and len(state.data) > 1000
    assert np.abs(nano.evaluate(tokens[:7]) - after).max() < 1e-2
