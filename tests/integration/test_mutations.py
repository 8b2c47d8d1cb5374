"""Small files of every kind that the workbook reads back, changed at random: each is read, or refused in our words.

No other exception, no hang, no gigabyte. Headers have such a test of their own (`unit/gguf`).
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import report_builder
import sealed_run
from killable import SMALL_WINDOW_BYTES

from dfqs_nb import merge, report
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.files import canonical_sha256
from dfqs_nb.core.journal import Journal
from dfqs_nb.core.paths import data_dir
from dfqs_nb.core.stage import read_stage
from dfqs_nb.gguf import broken
from dfqs_nb.llama.generate import Completion
from dfqs_nb.merge import copy as merge_copy
from dfqs_nb.merge import disk
from dfqs_nb.merge.disk import journal_path, part_path
from dfqs_nb.merge.verify import manifest_path
from dfqs_nb.report.reading import DRAWN_ON, read_run
from dfqs_nb.scores import Answerer, ItemSet, Options

pytestmark = pytest.mark.slow
SECONDS, GIBIBYTE = 30, 1 << 30
COUNTS = {"set": 6_000, "manifest": 4_000, "answers": 3_000, "merge": 1_000, "report": 3_000, "stage": 3_000}
# together 20,000
DEEP = b"[" * 4_000
SCRAPS = (
    DEEP,
    b'{"a":' * 4_000,
    b'"\\ud83d"',
    b"\xff\xfe",
    b"\0",
    b"NaN",
    b"-1e999",
    b"9" * 5_000,
    b"null",
    b"{}",
    b'"',
    b"\n",
    b"\xe2\x80\xa8",
    b"\xef\xbb\xbf",
)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**63, 10**30, 0.5, 1e308, float("nan"), float("-inf")),
    *("", "\ud83d", "a\0b", "../../x", "=1+1", "<b>", "7" * 100_000, [], {}, [[]], [None], {"a": {}}),
)


class Draw(random.Random):
    """Changes of bytes and of JSON, one after another from one seed."""

    def bytes_changed(self, raw: bytes) -> bytes:
        """Some bytes replaced, moved, repeated, cut out or cut off."""
        changed = bytearray(raw)
        for _ in range(self.choice((1, 1, 2, 6))):
            start = self.randrange(len(changed) + 1)
            end = min(len(changed), start + self.choice((0, 1, 4, 40)))
            other = self.randrange(len(raw))
            changed[start:end] = self.choice((b"", self.choice(SCRAPS), raw[other : other + 30]))
        return bytes(changed[: self.randrange(len(changed) + 1)] if self.random() < 0.1 else changed)

    def json_changed(self, value: Any) -> Any:
        """One or a few values of a JSON tree replaced, renamed, repeated or left out."""
        tree = json.loads(json.dumps(value))
        for _ in range(self.choice((1, 1, 1, 3))):
            holder, key = self.choice([*places(tree), (None, None)])
            if holder is None:
                return self.choice(VALUES)
            change = self.randrange(5)
            if change == 0:
                del holder[key]
            elif change == 1 and isinstance(holder, dict):
                holder[self.choice(("", "x", "\ud83d", str(key) * 2))] = holder.pop(key)
            elif change == 1:
                holder.insert(key, holder[key])
            else:
                holder[key] = copy.deepcopy(self.choice(VALUES))  # a later change may reach into it
        return tree

    def file_changed(self, raw: bytes, *, lines: bool = False) -> bytes:
        """A JSON file, or one of JSON lines, changed in its bytes or in its structure."""
        if self.random() < 0.3:
            return self.bytes_changed(raw)
        if not lines:
            return json.dumps(self.json_changed(json.loads(raw))).encode()
        rows = raw.splitlines()
        at = self.choice((0, self.randrange(len(rows))))
        rows[at] = json.dumps(self.json_changed(json.loads(rows[at]))).encode()
        return b"\n".join(rows) + b"\n"


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every value of a JSON tree, as what holds it and its key or index."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from places(value)


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """A gigabyte more than now, at most, and an end to what hangs."""

    def too_long(*_: Any) -> None:
        raise AssertionError(f"no end after {SECONDS} s")

    earlier = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + GIBIBYTE, earlier[1]))
    handler = signal.signal(signal.SIGALRM, too_long)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, earlier)


def survive(kind: str, seed: int, change: Callable[[Draw], object], read: Callable[[], object]) -> int:
    """Change and read as often as `COUNTS` says; how often the changed file was refused."""
    refused = 0
    with limits():
        for number in range(COUNTS[kind]):
            change(Draw(seed * 1_000_000 + number))
            signal.alarm(SECONDS)
            try:
                read()
            except DfqsError as error:
                assert "\n" not in error.what[:200] and len(str(error)) < 10_000, (kind, number, str(error))
                refused += 1
            except BaseException as error:
                raise AssertionError(
                    f"{kind} {number}: {type(error).__name__}: {str(error)[:300]}"
                ) from error
            signal.alarm(0)
    return refused


def test_question_sets(tmp_path: Path) -> None:
    sources = [data_dir() / f"prompts/nano_{kind}.jsonl" for kind in ("reasoning", "code")]
    raws = [b"\n".join(path.read_bytes().splitlines()[:5]) + b"\n" for path in sources]
    path = tmp_path / "set.jsonl"

    def change(draw: Draw) -> None:
        path.write_bytes(draw.file_changed(draw.choice(raws), lines=True))

    def read() -> None:
        item_set = ItemSet.load(path)
        item_set.row(), item_set.identity()
        for item in item_set.items:
            item.asked(item_set.instruction)

    assert survive("set", 1, change, read) > COUNTS["set"] // 4


def test_manifests(tmp_path: Path, merged_reference: Path) -> None:
    model = Path(shutil.copy(merged_reference, tmp_path / "model.gguf"))
    raw = manifest_path(merged_reference).read_bytes()
    refused = survive(
        "manifest",
        2,
        lambda draw: manifest_path(model).write_bytes(draw.file_changed(raw)),
        lambda: merge.verify_model(model),
    )
    assert refused > COUNTS["manifest"] // 2


def test_answers_of_a_scoring_run(tmp_path: Path) -> None:
    """Whatever its journal has become, a run goes on and ends with the same score."""
    item_set = ItemSet.load("nano-reasoning")
    answers = {item.asked(item_set.instruction): item.answer for item in item_set.items}

    def run() -> float | None:
        answerer = Answerer(
            lambda request: Completion(answers[request.text], (1,), "eos", 3),
            "chat",
            {"n_ctx": 512},
            "m",
        )
        return answerer.score(item_set, tmp_path, Options(limit=12, progress=False)).score.value

    first = run()
    path = next(tmp_path.glob("answers-*.jsonl"))
    raw = path.read_bytes()

    def read() -> None:
        assert run() == first

    def change(draw: Draw) -> None:
        path.write_bytes(draw.file_changed(raw, lines=True))

    assert survive("answers", 3, change, read) == 0


def test_the_journal_of_a_consuming_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merge ends with the right bytes, or refuses and keeps the sources as they are."""
    monkeypatch.setattr(merge_copy, "WINDOW_BYTES", SMALL_WINDOW_BYTES)
    folder = tmp_path / "cut"
    folder.mkdir()
    pair = [Path(shutil.copy(path, folder)) for path in broken.reference_shards().paths]
    wanted = merge.merge_model(pair[0], tmp_path / "whole.gguf").sha256
    real, calls = disk.punch, []

    def punch(*arguments: Any) -> int:
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(disk, "punch", punch)
        merge.merge_model(pair[0], folder / "out.gguf", consume=True)
    raw = journal_path(folder / "out.gguf").read_bytes()
    names = [path.name for path in (*pair, part_path(folder / "out.gguf"))]
    work = tmp_path / "work"

    def change(draw: Draw) -> None:
        shutil.rmtree(work, ignore_errors=True)
        subprocess.run(["cp", "-a", "--sparse=always", folder, work], check=True)  # holes stay holes
        journal_path(work / "out.gguf").write_bytes(draw.file_changed(raw, lines=True))

    def read() -> None:
        before = {name: (work / name).read_bytes() for name in names}
        try:
            done = merge.merge_model(work / pair[0].name, work / "out.gguf", consume=True)
            assert done.sha256 == wanted
        except DfqsError:
            assert {name: (work / name).read_bytes() for name in names} == before
            raise

    survive("merge", 4, change, read)


def test_reports(tmp_path: Path) -> None:
    """Half of them with hashes that are right again, so that what stands behind the hashes is read."""
    good = report_builder.make_run(tmp_path / "good", "Good")
    bad = report_builder.make_run(tmp_path / "board/bad", "Bad", seed=2)
    turn = itertools.count()
    path, items = bad / "report.json", bad / "long_context_items.csv"
    raw, answers = path.read_bytes(), items.read_bytes()
    few = b"\n".join(answers.splitlines()[:4]) + b"\n"

    def change(draw: Draw) -> None:
        items.write_bytes(answers)
        path.write_bytes(raw)
        if draw.random() < 0.2:
            items.write_bytes(draw.file_changed(few, lines=True))
            report_builder.reseal(bad, rehash=True)
            return
        path.write_bytes(draw.file_changed(raw))
        if draw.random() < 0.7:
            with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
                report_builder.reseal(bad)

    def read() -> None:
        board = report.leaderboard(tmp_path / "board")
        assert str(board) and len(board.table) == 1
        report.read_report(bad)
        if next(turn) % 10 == 0:  # the dearer readers
            board.write()
            report.compare_reports([good, bad])

    assert survive("report", 5, change, read) > COUNTS["report"] // 2


def test_stages(tmp_path: Path, merged_reference: Path) -> None:
    folder = sealed_run.make_run(tmp_path / "run", merged_reference)
    raws = {name: (folder / f"{name}.json").read_bytes() for name in DRAWN_ON}
    last = DRAWN_ON[0]

    def change(draw: Draw) -> None:
        nonlocal last
        (folder / f"{last}.json").write_bytes(raws[last])
        last = draw.choice(DRAWN_ON)
        changed = draw.file_changed(raws[last])
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(changed)
            if isinstance(content, dict) and content.pop("seal", None) and draw.random() < 0.8:
                changed = json.dumps({**content, "seal": canonical_sha256(content)}).encode()
        (folder / f"{last}.json").write_bytes(changed)

    def read() -> None:
        read_stage(folder, last)
        read_run(folder)
        report.build_report(folder, ask_llama_cpp=False)

    assert survive("stage", 6, change, read) > COUNTS["stage"] // 4


def test_a_journal_keeps_what_is_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl", {"n": 1})
    for name in "abc":
        journal.add(name, value=name)
    with journal.path.open("ab") as file:
        file.write(DEEP + b'\n{"conditions": "torn')
    assert [row["id"] for row in Journal(journal.path, {"n": 1}).rows()] == ["a", "b", "c"]
