"""Kill, starve and mislead merge, consuming merge and in-place repair: no byte is lost, and the end is the same.

Reduced here; in full (100 points each) with ``make test-slow PYTEST=tests/test_fault_injection.py``.
"""

import errno
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
from gguf_fixtures import Spec, field, gguf_bytes, split_fields
from killable import ACTIONS, SMALL_WINDOW_BYTES

from dfqs_nb.core.errors import DfqsError, IntegrityError, OutputError, SpaceError
from dfqs_nb.core.paths import REPOSITORY, data_dir
from dfqs_nb.gguf.shards import open_shards, shard_path
from dfqs_nb.merge import copy, diagnose, disk, merge_model, open_source
from dfqs_nb.merge import merge as merging
from dfqs_nb.merge.copy import Plan, plan_merge, read_journal
from dfqs_nb.merge.disk import journal_path, part_path
from dfqs_nb.merge.verify import manifest_path

pytestmark = pytest.mark.usefixtures("parser_is_asked_once_a_header")

NAME = "DFQS-Nano-IQ1_S-XL"
SHARDS = [shard_path(data_dir() / "reference" / NAME, n, 2) for n in (1, 2)]
RECORDED = json.loads((Path(__file__).resolve().parents[2] / "data/merge_hashes.json").read_text())["models"][
    "IQ1_S-XL"
]
CONSUMING = ["consume", "repair"]

needs_holes = pytest.mark.skipif(
    not disk.can_punch(tempfile.gettempdir()), reason="no holes on this file system"
)
consuming_actions = pytest.mark.parametrize("action", [pytest.param(a, marks=needs_holes) for a in CONSUMING])
all_actions = pytest.mark.parametrize("action", ["merge", *consuming_actions.args[1]])


@dataclass(frozen=True)
class Case:
    """An action on fresh files, and what it must end in."""

    action: str
    sources: tuple[Path, ...]
    output: Path
    plan: Plan

    def run(self) -> str:
        return ACTIONS[self.action](self.sources[0], self.output).sha256

    @property
    def done(self) -> bool:
        return manifest_path(self.output).exists() and not (
            part_path(self.output).exists() or journal_path(self.output).exists()
        )

    def start(self, at: int = 0, number: int = signal.SIGKILL) -> subprocess.Popen:
        """The action in a process that sends itself the signal ``number`` at tick ``at``."""
        job = {
            "action": self.action,
            "model": str(self.sources[0]),
            "output": str(self.output),
            "at": at,
            "signal": int(number),
        }
        child = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).resolve().parents[2] / "support" / "killable.py"),
                json.dumps(job),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TQDM_DISABLE": "1"},
        )
        assert child.stdout.readline() == "ready\n"
        return child

    def check_nothing_lost(self, whole: bytes) -> None:
        """Each byte of the model is in the proven part of the part file, or still in its source."""
        if not part_path(self.output).exists() and self.output.exists() and self.output.read_bytes() == whole:
            return
        windows = [line["end"] for line in read_journal(self.output) if "end" in line]
        done = max(windows, default=0)
        assert not done or part_path(self.output).read_bytes()[:done] == whole[:done], "the part lost bytes"
        files = [path.read_bytes() for path in self.sources]
        for run in self.plan.copies:
            skip = min(max(done - run.target_offset, 0), run.nbytes)
            here = files[run.source][run.source_offset + skip : run.source_offset + run.nbytes]
            assert here == whole[run.target_offset + skip : run.target_offset + run.nbytes], (
                f"{run.name} is neither in its source nor in the part"
            )

    def check_end(self, sha256: str) -> None:
        assert sha256 == RECORDED["merged"] == hashlib.sha256(self.output.read_bytes()).hexdigest()
        kept = {self.output, manifest_path(self.output)} | (
            set(self.sources) if self.action == "merge" else set()
        )
        assert set(self.output.parent.iterdir()) == kept, "something was left, or is missing"
        if self.action == "merge":
            assert [path.read_bytes() for path in self.sources] == [path.read_bytes() for path in SHARDS]


def new_case(action: str, folder: Path, name: str = "out.gguf") -> Case:
    folder.mkdir(exist_ok=True)
    output = folder / name
    if action == "repair":
        output.write_bytes(b"".join(path.read_bytes() for path in SHARDS))
        return Case(action, (output,), output, open_source(output).plan)
    sources = tuple(Path(shutil.copy(path, folder)) for path in SHARDS)
    return Case(action, sources, output, plan_merge(open_shards(sources[0])))


@pytest.fixture
def small(monkeypatch):
    """The reference model in 44 windows."""
    monkeypatch.setattr(copy, "WINDOW_BYTES", SMALL_WINDOW_BYTES)


@pytest.fixture(scope="session")
def whole(merged_reference) -> bytes:
    return merged_reference.read_bytes()


@cache
def measure(action: str) -> tuple[int, float]:
    """Ticks and seconds of an action when nothing happens to it."""
    with tempfile.TemporaryDirectory() as folder:
        child = new_case(action, Path(folder) / "f").start()
        began = time.perf_counter()
        return int(child.communicate()[0]), time.perf_counter() - began


def kill_and_resume(action: str, seed: int, folder: Path, whole: bytes) -> None:
    """Kill once or twice, at a random call or a random time, look for lost bytes, go on, and compare."""
    ticks, seconds = measure(action)
    draw = random.Random(f"{action} {seed}")
    case = new_case(action, folder / "f")
    for _ in range(draw.choice([1, 1, 2])):
        by_call = draw.random() < 0.7
        child = case.start(at=draw.randint(1, ticks) if by_call else 0)
        try:
            child.communicate(timeout=None if by_call else draw.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
        case.check_nothing_lost(whole)
        assert child.returncode in (0, -signal.SIGKILL), "the child failed by itself"
        if case.done:
            break
    case.check_end(RECORDED["merged"] if case.done else case.run())
    shutil.rmtree(folder / "f")


@all_actions
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_a_random_point(action, seed, tmp_path, whole):
    kill_and_resume(action, seed, tmp_path, whole)


@pytest.mark.slow
@all_actions
def test_killed_at_100_random_points(action, tmp_path, whole):
    for seed in range(1000, 1100):
        kill_and_resume(action, seed, tmp_path, whole)


@all_actions
def test_killed_within_the_last_calls(action, tmp_path, whole):
    """Where the part takes its name, its hashes are kept, and sources and journal go."""
    for back in (1, 5, 9, 13):
        case = new_case(action, tmp_path / str(back))
        case.start(at=measure(action)[0] - back).communicate()
        case.check_nothing_lost(whole)
        case.check_end(RECORDED["merged"] if case.done else case.run())


def name_with_a_dot_behind(place: int) -> str:
    """Of 70 to 95 bytes: a pattern for temporary files that cuts long names could match a part file."""
    return f"{'ä' * (place // 2)}{'M' * (place % 2)}.gguf" if place % 3 else f"{'M' * place}.gguf"


def quick_near_80(place: int, most: int = 2):
    """A place where long names were once cut, or one near it; the others are slow tests."""
    return pytest.param(place, marks=[pytest.mark.slow] if abs(place - 80) > most else [])


@all_actions
@pytest.mark.parametrize("place", [quick_near_80(place) for place in range(65, 91)])
def test_a_long_name_costs_no_byte(action, place, tmp_path, whole):
    case = new_case(action, tmp_path / "f", name_with_a_dot_behind(place))
    assert len(os.fsencode(case.output.name)) == place + 5
    case.check_end(case.run())


@all_actions
@pytest.mark.parametrize("place", [quick_near_80(place, 0) for place in (66, 79, 80, 81)])
def test_a_killed_run_with_a_long_name_goes_on(action, place, tmp_path, whole):
    ticks = measure(action)[0]
    for number, at in enumerate((ticks // 3, ticks - 17, ticks - 11, ticks - 7, ticks - 3)):
        case = new_case(action, tmp_path / str(number), name_with_a_dot_behind(place))
        case.start(at=at).communicate()
        case.check_nothing_lost(whole)
        case.check_end(RECORDED["merged"] if case.done else case.run())


@all_actions
@pytest.mark.parametrize("seed", range(4))
def test_disk_full_at_a_random_call(action, seed, tmp_path, monkeypatch, small, whole):
    case, calls = new_case(action, tmp_path / "f"), []
    nth = random.Random(seed).randint(1, 44)
    real = os.pwrite

    def pwrite(*arguments):
        calls.append(1)
        if len(calls) >= nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(SpaceError, match="filled up"):
            case.run()
    case.check_nothing_lost(whole)
    if action == "merge":
        assert set(case.output.parent.iterdir()) == set(case.sources), "the partial output was left"
    case.check_end(case.run())


@consuming_actions
@pytest.mark.parametrize("nth", [1, 2, 3, 30])
def test_disk_too_full_for_a_whole_line_of_the_journal(action, nth, tmp_path, monkeypatch, small, whole):
    """A short write is no written line: nothing may be released on its word."""
    case, calls, real = new_case(action, tmp_path / "f"), [], disk.open_own

    class Nearly:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            calls.append(1)
            if len(calls) > nth:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data[:5] if len(calls) == nth else data)

    @contextmanager
    def opened(path, **options):
        with real(path, **options) as file:
            yield Nearly(file) if path.suffix == ".journal" else file

    with monkeypatch.context() as patch:
        patch.setattr(disk, "open_own", opened)
        with pytest.raises(SpaceError):
            case.run()
    case.check_nothing_lost(whole)
    case.check_end(case.run())


@needs_holes
def test_consume_on_a_real_full_disk(tmp_path, monkeypatch, small, whole):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    if subprocess.run([*mount, "size=6200k", "none", str(disk)], check=False, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        case = new_case("consume", disk / "f")
        with pytest.raises(SpaceError, match="needs 67,"):
            case.run()
        monkeypatch.setattr(merging, "CONSUME_EXTRA_BYTES", 0)
        monkeypatch.setattr(copy, "WINDOW_BYTES", 1 << 20)
        with pytest.raises(SpaceError, match="run the same command again"):
            case.run()
        case.check_nothing_lost(whole)
        subprocess.run([*mount[:-1], "-o", "remount,size=20m", "none", str(disk)], check=True)
        case.check_end(case.run())
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# A source, or the call, is another one the second time.


def half_done(action: str, folder: Path) -> Case:
    """A case whose process was killed half-way."""
    case = new_case(action, folder)
    case.start(at=measure(action)[0] // 2).communicate()
    if action == "merge":
        assert part_path(case.output).exists(), "killed too early to show anything"
    else:
        assert any("end" in line for line in read_journal(case.output)), "killed too early to show anything"
    return case


@all_actions
def test_changed_source_is_refused(action, tmp_path, whole):
    case = half_done(action, tmp_path / "f")
    path, before = case.sources[-1], case.sources[-1].stat()
    os.utime(path, (1, 10_000_000_000))
    if action == "merge":  # the part is compared with the sources as they are now
        case.check_end(case.run())
        return
    with pytest.raises(IntegrityError, match="changed since its merge began"):
        case.run()
    case.check_nothing_lost(whole)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with path.open("ab") as file:
        file.write(b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DfqsError):
        case.run()
    os.truncate(path, before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    case.check_nothing_lost(whole)
    case.check_end(case.run())


@needs_holes
def test_unfinished_consuming_merge_is_safe_from_other_calls(tmp_path, whole):
    """The part file is then the only place of some bytes: no other call on that output may touch it."""
    case = half_done("consume", tmp_path / "f")
    other = merge_model(SHARDS[0], tmp_path / "other.gguf").path
    for call in (
        lambda: merge_model(case.sources[0], case.output),
        lambda: merge_model(other, case.output),
        lambda: merge_model(other, case.output, consume=True),
    ):
        with pytest.raises(IntegrityError, match="is in the way"):
            call()
        case.check_nothing_lost(whole)
    with pytest.raises(IntegrityError, match="a merge that was stopped moved "):
        merge_model(case.sources[0], tmp_path / "f" / "second.gguf")
    assert other.exists()
    case.check_end(case.run())


@needs_holes
def test_a_source_of_a_stopped_merge_is_told_with_the_command_that_goes_on(tmp_path):
    case = half_done("consume", tmp_path / "f")
    found = diagnose(case.sources[0])
    assert found.kind == "stopped merge" and re.fullmatch(
        r"a merge that was stopped moved [\d,]+ of its 3,849,728 bytes to \.out\.gguf\.part", found.finding
    )
    words = shlex.split(found.next_step.partition(": ")[2])
    assert words[-4:] == [str(case.sources[0]), "-o", str(case.output), "--consume"]
    journal_path(case.output).write_text("{}\n")  # which says nothing of a source
    assert diagnose(case.sources[0]).kind == "unfinished download"


@consuming_actions
def test_resume_while_a_source_is_read_loses_nothing(action, tmp_path, whole):
    """The call fails before it reads the journal: the part file is the only place of some bytes."""
    case = half_done(action, tmp_path / "f")
    with disk.open_locked(case.sources[-1], alone=False):
        with pytest.raises(OutputError, match="another process is merging this file"):
            case.run()
        case.check_nothing_lost(whole)
    case.check_end(case.run())


def test_unfinished_plain_merge_gives_way(tmp_path, small):
    case = half_done("merge", tmp_path / "f")
    shards = [shard_path(data_dir() / "reference/DFQS-Nano-Q8_0", n, 2) for n in (1, 2)]
    result = merge_model(shards[0], case.output)
    assert result.sha256 == hashlib.sha256(case.output.read_bytes()).hexdigest() != RECORDED["merged"]


def test_complete_part_of_other_shards_is_not_passed_off(tmp_path, monkeypatch):
    """Stopped just before it took its name, then asked for something else."""
    case = new_case("merge", tmp_path / "f")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(disk, "rename_new", stop)
        case.run()
    assert part_path(case.output).exists() and not case.output.exists()
    shard = shard_path(data_dir() / "reference/DFQS-Nano-Q8_0", 1, 2)
    result = merge_model(shard, case.output, overwrite=True)
    assert result.sha256 == hashlib.sha256(case.output.read_bytes()).hexdigest() != RECORDED["merged"]


@all_actions
def test_lost_part_file_is_said_so(action, tmp_path):
    case = half_done(action, tmp_path / "f")
    os.truncate(part_path(case.output), 1000)
    if action == "merge":
        case.check_end(case.run())
        return
    with pytest.raises(IntegrityError, match="have holes where bytes .* was changed or lost"):
        case.run()
    assert journal_path(case.output).exists()


@all_actions
def test_longer_part_file_is_cut(action, tmp_path):
    case = half_done(action, tmp_path / "f")
    with part_path(case.output).open("ab") as file:
        file.write(bytes(10_000_000))
    case.check_end(case.run())


@consuming_actions
def test_torn_journal_counts_as_unwritten(action, tmp_path, whole):
    case = half_done(action, tmp_path / "f")
    with journal_path(case.output).open("ab") as file:
        file.write(b'\0\0\0\n{"end":5752960,"xx')
    case.check_nothing_lost(whole)
    case.check_end(case.run())


# Two at once.


def stopped(case: Case, at: int) -> subprocess.Popen:
    child = case.start(at=at, number=signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    return child


@all_actions
def test_second_process_is_refused(action, tmp_path):
    case = new_case(action, tmp_path / "f")
    child = stopped(case, measure(action)[0] // 2)
    try:
        before = {path: path.read_bytes() for path in case.output.parent.iterdir()}
        with pytest.raises(OutputError, match="another process is writing it"):
            case.run()
        if action == "consume":
            with pytest.raises((OutputError, IntegrityError)):
                replace(case, output=case.output.with_name("second.gguf")).run()
        assert {path: path.read_bytes() for path in case.output.parent.iterdir()} == before
    finally:
        child.send_signal(signal.SIGCONT)
    child.communicate()
    assert child.returncode == 0
    case.check_end(RECORDED["merged"])


@needs_holes
def test_shards_being_read_are_not_consumed(tmp_path):
    case = new_case("merge", tmp_path / "f")
    child = stopped(case, measure("merge")[0] // 2)
    try:
        with pytest.raises(OutputError, match="another process is merging this file"):
            merge_model(case.sources[0], tmp_path / "second.gguf", consume=True)
    finally:
        child.send_signal(signal.SIGCONT)
    child.communicate()
    case.check_end(RECORDED["merged"])


# What must not be consumed.


@consuming_actions
def test_flipped_bit_releases_nothing(action, tmp_path, monkeypatch, small, whole):
    case, real, calls = new_case(action, tmp_path / "f"), os.pwrite, []

    def pwrite(handle, view, offset):
        data = bytearray(view)
        calls.append(offset)
        if len(calls) == 40:
            data[len(data) // 2] ^= 1
        return real(handle, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(
            IntegrityError, match="came back from the disk changed; nothing more was released"
        ):
            case.run()
    done = max(line["end"] for line in read_journal(case.output) if "end" in line)
    assert done <= calls[39], "the damaged window counts as done"
    case.check_nothing_lost(whole)
    case.check_end(case.run())


def test_source_with_a_hole_is_refused(tmp_path):
    case = new_case("consume", tmp_path / "f")
    with case.sources[1].open("r+b") as file:
        if not disk.punch(file.fileno(), 1 << 20, 1 << 21):
            pytest.skip("no holes here")
    with pytest.raises(IntegrityError, match="854,784 of its 1,903,360 bytes were never stored"):
        case.run()
    assert set(case.output.parent.iterdir()) == set(case.sources)


@pytest.mark.parametrize("action", CONSUMING)
def test_no_holes_is_said_before_the_start(action, tmp_path, monkeypatch):
    case = new_case(action, tmp_path / "f")
    monkeypatch.setattr(disk, "can_punch", lambda _: False)
    before = set(case.output.parent.iterdir())
    with pytest.raises(
        OutputError, match="cannot give back parts of a file.*without --consume or --in-place"
    ):
        case.run()
    assert set(case.output.parent.iterdir()) == before


@needs_holes
def test_hard_links_are_not_emptied(tmp_path):
    case = new_case("consume", tmp_path / "f")
    os.link(case.sources[1], tmp_path / "second-name.gguf")
    with pytest.raises(OutputError, match="second name"):
        case.run()
    assert (tmp_path / "second-name.gguf").read_bytes() == SHARDS[1].read_bytes()


@needs_holes
def test_output_under_another_spelling_is_not_removed(tmp_path):
    """A killed in-place repair, finished by a call that names the file otherwise."""
    case = new_case("repair", tmp_path / "f")
    (tmp_path / "g").mkdir()
    odd = replace(case, sources=(tmp_path / "g/../f/glued.gguf",))
    odd.start(at=measure("repair")[0] - 9).communicate()
    case.check_end(case.run())


# How much disk it takes.


@needs_holes
@pytest.mark.parametrize("action", CONSUMING)
def test_peak_extra_disk(action, tmp_path, monkeypatch):
    """By blocks: at most 64 MiB and the header beyond what the sources held."""
    paths, n_bytes = random_shards(tmp_path, tensors=(13, 6), tensor_bytes=9_000_000)
    plan = plan_merge(open_shards(paths[0]))
    expected = merge_model(paths[0], tmp_path / "expected.gguf").sha256
    output = tmp_path / "out.gguf"
    if action == "repair":
        output.write_bytes(b"".join(path.read_bytes() for path in paths))
        for path in paths:
            path.unlink()
        paths = [output]
    before, peak = blocks(paths), []

    def sampled(real):
        def call(*arguments):
            result = real(*arguments)
            peak.append(blocks([*paths, part_path(output)]))
            return result

        return call

    for owner, name in ((os, "pwrite"), (disk, "punch"), (os, "fdatasync")):
        monkeypatch.setattr(owner, name, sampled(getattr(owner, name)))
    assert ACTIONS[action](paths[0], output).sha256 == expected
    extra = max(peak) - before
    assert extra <= (64 << 20) + len(plan.header), f"{extra:,} bytes of {n_bytes:,}"


def blocks(paths: list[Path]) -> int:
    """Bytes on the disk."""
    return sum(path.stat().st_blocks * 512 for path in paths if path.exists())


def random_shards(folder: Path, tensors: tuple[int, int], tensor_bytes: int) -> tuple[list[Path], int]:
    """Two shards of random data in large tensors, not whole blocks long."""
    draw, paths, total = random.Random(0), [], 0
    for number, count in enumerate(tensors):
        specs = [
            Spec(
                f"blk.{number}.{i}.weight",
                "F32",
                (tensor_bytes // 4 + i,),
                data=draw.randbytes(tensor_bytes // 4 * 4 + 4 * i),
            )
            for i in range(count)
        ]
        fields = [field("general.architecture", "STRING", "x")] if number == 0 else []
        paths.append(shard_path(folder / "m", number + 1, 2))
        paths[-1].write_bytes(gguf_bytes([*fields, *split_fields(number, 2, sum(tensors))], specs))
        total += paths[-1].stat().st_size
    return paths, total
