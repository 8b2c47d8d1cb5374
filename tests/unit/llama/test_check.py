"""llama.cpp's parser in a child process: its answers, and that nothing it does reaches us."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
from pathlib import Path

import child_jobs
import libggml
import pytest
from gguf_fixtures import Spec, gguf_bytes, header_bytes, small_gguf

from dfqs_nb.core.errors import ModelError
from dfqs_nb.gguf.broken import too_many_experts
from dfqs_nb.gguf.header import TENSOR_TYPES
from dfqs_nb.gguf.memory import MemoryEstimate
from dfqs_nb.gguf.models import resolve
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama import check
from dfqs_nb.llama.graph import ggml_function
from dfqs_nb.llama.settings import OpenSettings


def test_a_valid_file_is_accepted_with_its_numbers(tmp_path):
    path = tmp_path / "räksmörgås.gguf"
    path.write_bytes(small_gguf())
    assert check.parse(path) == check.Verdict(True)
    table = libggml.table(path)
    assert (table.version, table.n_kv, table.n_tensors, table.alignment) == (3, 48, 5, 32)
    assert table.tensors[1] == libggml.Row("b.weight", "Q8_0", 64, 136)


def test_a_refusal_carries_llama_cpps_words(tmp_path):
    path = tmp_path / "not.gguf"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    parsed = check.parse(path)
    assert not parsed.accepted and not parsed.death
    assert "invalid magic characters: 'vers'" in parsed.reason


def test_the_reason_is_the_first_error_that_says_one():
    log = ["llama_model_load: error loading model: llama_model_loader: failed to load model from m.gguf"]
    log += ["gguf_init_from_file_ptr: failed to read magic", "x: error loading model: y"]
    assert check.reason_of(log) == "failed to read magic"
    assert check.reason_of(["x: error loading model hyperparameters: key not found"]) == "key not found"
    assert check.reason_of([*log, "/tmp/a.cpp:12: GGML_ASSERT(n > 0) failed"]).startswith(
        "a.cpp:12: GGML_ASSERT"
    )


def test_many_files_each_with_its_own_message(tmp_path):
    paths = [tmp_path / name for name in ("a", "b", "c", "absent")]
    for path, raw in zip(paths, (small_gguf(), b"GGUF\1\0\0\0", small_gguf()), strict=False):
        path.write_bytes(raw)
    answers = check.verdicts(paths, "parse")
    assert [answer.accepted for answer in answers] == [True, False, True, False]
    assert "GGUFv1" in answers[1].reason and answers[2].reason == ""
    assert "No such file" in answers[3].reason


def test_a_header_that_asks_for_the_machine_meets_a_ceiling(tmp_path):
    """2^30 strings of 32 bytes: libggml allocates them before it reads them."""
    path = tmp_path / "greedy.gguf"
    key = b"\1\0\0\0\0\0\0\0k" + b"\x09\0\0\0" + b"\x08\0\0\0" + (1 << 30).to_bytes(8, "little")
    with path.open("wb") as file:
        file.write(header_bytes([key]))
        file.truncate(10 << 30)
    parsed = check.parse(path)
    assert not parsed.accepted
    if sys.platform == "linux":
        assert "bad_alloc" in parsed.reason


def test_a_parser_that_aborts_is_a_refusal_and_the_next_files_are_still_asked(tmp_path):
    """This header passes libggml's checks and fails an assertion in the call after them."""
    paths = [tmp_path / name for name in ("a", "bad", "c")]
    for path, shape in zip(paths, ((3,), (3, 0, 1 << 62), (3,)), strict=True):
        path.write_bytes(gguf_bytes([], [Spec("t", "F32", shape)]))
    answers = check.verdicts(paths, "parse")
    assert [answer.accepted for answer in answers] == [True, False, True]
    assert answers[1].death == "SIGABRT"
    assert answers[1].reason.startswith("ggml.c:") and "GGML_ASSERT" in answers[1].reason


def test_a_parser_that_hangs_is_stopped(tmp_path, monkeypatch):
    (tmp_path / "slow").write_bytes(small_gguf())
    monkeypatch.setattr(check, "MODULE", "child_jobs")
    monkeypatch.setenv("PYTHONPATH", str(Path(child_jobs.__file__).parent))  # which waits for a minute
    monkeypatch.setattr(check, "TIMEOUT_SECONDS", 5.0)
    parsed = check.parse(tmp_path / "slow")
    assert not parsed.accepted and parsed.death == "timeout"


def test_a_library_that_does_not_load_is_no_verdict_on_the_file(tmp_path, monkeypatch):
    (tmp_path / "libllama.so").write_bytes(b"not a library")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    with pytest.raises(ModelError, match="cannot run llama.cpp.*make run"):
        check.parse(tmp_path / "any.gguf")


def test_our_table_of_tensor_types_is_libggmls():
    """Names, block and byte sizes; that libggml knows no later type is the next test."""
    kinds = {"type_name": ctypes.c_char_p, "blck_size": ctypes.c_int64, "type_size": ctypes.c_size_t}
    name, block, size = (ggml_function(f"ggml_{key}", kind, ctypes.c_int) for key, kind in kinds.items())
    codes = (code for code in range(max(TENSOR_TYPES) + 1) if block(code))
    theirs = {code: (name(code).decode().upper(), block(code), size(code)) for code in codes}
    ours = {code: (name.upper(), *sizes) for code, (name, *sizes) in TENSOR_TYPES.items()}
    assert ours == theirs


def test_libggml_knows_no_type_after_our_last(tmp_path):
    path = tmp_path / "new_type.gguf"
    spec = Spec("t", max(TENSOR_TYPES) + 1, (256,), offset=0)
    path.write_bytes(header_bytes([], [spec]))
    parsed = check.parse(path)
    assert not parsed.accepted and "invalid ggml type" in parsed.reason


def test_the_table_of_a_whole_small_file(tmp_path):
    specs = [Spec(f"t{i}", kind, (256, 2)) for i, kind in enumerate(("F32", "IQ1_S", "Q2_K", "Q8_0", "I32"))]
    path = tmp_path / "t.gguf"
    path.write_bytes(gguf_bytes([], specs))
    table = libggml.table(path).tensors
    assert [(row.name, row.type, row.nbytes) for row in table] == [(s.name, s.type, s.nbytes) for s in specs]


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The questions that children are asked."""
    questions, run = [], check.child.Worker.run

    def noted(self, job, **options):
        questions.append(job["question"])
        return run(self, job, **options)

    monkeypatch.setattr(check.child.Worker, "run", noted)
    return questions


@pytest.fixture
def copied(merged_reference, tmp_path, monkeypatch) -> Path:
    """A model that nothing is known of yet."""
    monkeypatch.setenv("DFQS_OUTPUTS", str(tmp_path / "outputs"))
    return Path(shutil.copy(merged_reference, tmp_path / "m.gguf"))


def test_a_file_that_was_tried_is_not_loaded_again(copied, asked, monkeypatch):
    needed = list[MemoryEstimate]()
    monkeypatch.setattr(check, "check_fits", lambda needs, where: needed.append(needs) or "it is slow")

    def tried(n_ctx: int) -> MemoryEstimate:
        assert check.trial(open_shards(copied), OpenSettings(n_ctx=n_ctx, n_threads=1))[0] == "it is slow"
        return needed.pop()

    first = tried(512)
    assert tried(512) == first and asked == ["plan", "trial"]
    assert tried(1024).compute_bytes > first.compute_bytes
    assert asked[2:] == ["plan"], "its memory is planned anew, and nothing is loaded"
    os.utime(copied)
    tried(512)
    assert asked[3:] == ["plan", "trial"], "another time of change is another file"


def test_the_loaders_verdict_is_kept_while_file_and_llama_cpp_are_the_same(copied, asked, monkeypatch):
    def kept() -> check.Verdict:
        return check.kept_verdict([copied], lambda: check.loader_verdict(copied))

    assert kept() == kept() == check.Verdict(True) and asked == ["load"]
    monkeypatch.setattr(check, "_build", lambda: ["another"])
    kept()
    os.utime(copied)
    kept()
    assert len(asked) == 3


@pytest.mark.parametrize("death", ["", "timeout"])
def test_a_refusal_is_asked_again_as_the_machine_may_have_had_no_memory(copied, death):
    refused, asked = check.Verdict(False, "unable to allocate CPU buffer", death), []
    for n in (1, 2):
        assert check.kept_verdict([copied], lambda: asked.append(1) or refused) == refused and len(asked) == n


def test_a_file_changed_in_place_with_its_time_set_back_is_another_file(copied, asked):
    def kept() -> check.Verdict:
        return check.kept_verdict([copied], lambda: check.loader_verdict(copied))

    kept()
    then = copied.stat()
    with copied.open("r+b") as file:
        file.write(b"nope")
    os.utime(copied, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert not kept().accepted and len(asked) == 2


@pytest.mark.parametrize("forged", [{}, {"accepted": "yes"}, {"accepted": True, "reason": 1, "death": ""}])
def test_a_note_that_is_not_whole_is_no_answer(copied, forged):
    good, note = check.Verdict(True), copied.parent / "outputs" / ".llama_cpp"
    check.kept_verdict([copied], lambda: good)
    (path,) = note.iterdir()
    path.write_text(json.dumps({"key": json.loads(path.read_text())["key"], **forged}))
    assert check.kept_verdict([copied], lambda: good) == good
    path.write_text(json.dumps({**json.loads(path.read_text()), **vars(good), "more": 1}))
    assert check.kept_verdict([copied], lambda: good) == good


def test_a_folder_that_takes_no_note_costs_no_second_load(copied, monkeypatch):
    good, asked = check.Verdict(True), []
    ask = lambda: asked.append(1) or good  # noqa: E731
    monkeypatch.setenv("DFQS_OUTPUTS", os.devnull)
    assert check.kept_verdict([copied], ask) == good and len(asked) == 1
    monkeypatch.setenv("DFQS_OUTPUTS", str(copied.parent / "outputs"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dfqs_nb.core.journal.write_json", full)
    assert check.kept_verdict([copied], ask) == good and len(asked) == 2


def test_memory_is_planned_in_a_child_that_a_header_may_kill(tmp_path, asked):
    plans = check.plan_memory(resolve("dfqs-nano-iq1_s-xl")[0], [OpenSettings(n_ctx=n) for n in (256, 4096)])
    assert plans[0]["kv_bytes"] < plans[1]["kv_bytes"]
    with pytest.raises(ModelError, match="died while planning its memory"):
        check.plan_memory(too_many_experts(tmp_path), [OpenSettings(n_ctx=256)])
