"""Decode and prefill of a model that exceeds memory, with the paging help and without: ratios in one run.

``python tests/benchmarks/paging.py FOLDER [--model FILE] [--memory 2000,2600] [--read-ahead 8192,128] [--skew]``

It writes a specimen (6 layers of the published widths, 64 experts, 3 GB) into FOLDER unless a model is given,
takes memory away, and times each way of opening it in a process of its own. Memory is taken by a control group
of its own for that process, or, where none can be made, by a locked balloon in this one. ``--read-ahead`` (kB)
sets that of the disk, as root, and puts it back. ``--skew`` makes few experts popular, in the routers' biases
and in the tables of the hash layers.

Every row of one read-ahead decodes the same tokens, and their logits must be the same to the bit.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import specimen

from dfqs_nb.core.machine import available_memory, block_folder, disk_bandwidth
from dfqs_nb.gguf import memory
from dfqs_nb.gguf.header import read_header
from dfqs_nb.llama import graph
from dfqs_nb.llama.model import open_model
from dfqs_nb.llama.settings import OpenSettings

SHAPE = specimen.Shape(n_layers=6, n_experts=64, n_tokens=4096)
GROUPS = Path("/sys/fs/cgroup")
LIBC = ctypes.CDLL(None)
WAYS = {  # the parts of the help; "off" is llama.cpp alone
    "off": "",
    "lock": "lock",
    "read": "read",
    "all": "lock read hash",
}
MORE = {  # and what was tried
    "lock + read": "lock read",
    "all + no windows": "lock read hash random",
    "all copied by 8 threads": "lock read hash copy",
}


# ---- less memory, another read-ahead, skewed routing ----


@contextlib.contextmanager
def group_of(limit_bytes: int) -> Iterator[Path | None]:
    """A control group (version 1) below this process's own; None where none can be made."""
    rows = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = next((path for _, name, path in rows if name == "memory"), None)
    group = GROUPS / "memory" / (own or "").lstrip("/") / f"paging-{os.getpid()}"
    try:
        if own is None:
            raise OSError
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        for _ in range(50):  # its pages leave it a moment after the process
            with contextlib.suppress(OSError):
                group.rmdir()
            if not group.exists():
                break
            time.sleep(0.1)


@contextlib.contextmanager
def balloon(left_bytes: int) -> Iterator[None]:
    """Lock memory until this much is available."""
    n_bytes = available_memory().available_bytes - left_bytes
    with mmap.mmap(-1, max(n_bytes, mmap.PAGESIZE)) as held:
        address = np.frombuffer(held, np.uint8).ctypes.data
        if n_bytes > 0 and LIBC.mlock(ctypes.c_void_p(address), ctypes.c_size_t(n_bytes)):
            raise SystemExit("memory cannot be locked: run as root, or raise `ulimit -l`")
        yield


@contextlib.contextmanager
def read_ahead(model: Path, kib: int) -> Iterator[None]:
    """The disk's read-ahead, for a while."""
    with model.open("rb") as file:
        folder = block_folder(file.fileno())
    assert folder is not None, "there is no block device under the model"
    place = folder / "queue/read_ahead_kb"
    before = place.read_text()
    place.write_text(str(kib))
    try:
        yield
    finally:
        place.write_text(before)


def skewed(path: Path, strength: float = 0.35) -> None:
    """Make few experts popular: rank r of a layer gets a bias of -strength log r, and tables follow."""
    header, draw = read_header(path), np.random.default_rng(7)
    with path.open("r+b") as file:
        for tensor in header.tensors:
            file.seek(header.data_offset + tensor.offset)
            if "exp_probs_b" in tensor.name:
                order = draw.permutation(tensor.n_elements)
                file.write((-strength * np.log1p(order)).astype("<f4").tobytes())
            elif memory.HASH_TABLE in tensor.name:
                used, n_tokens = tensor.shape
                weights = 1.0 / (1 + np.arange(SHAPE.n_experts)) ** 1.6
                keys = draw.exponential(size=(n_tokens, SHAPE.n_experts)) / weights
                file.write(np.argsort(keys, axis=1)[:, :used].astype("<i4").tobytes())


# ---- one way, in a process of its own ----


def leave_out(parts: list[str]) -> None:
    """Switch parts of the help off, and the alternative on that was tried."""
    if "lock" not in parts:
        graph.may_lock = lambda: 0
    if "hash" not in parts:
        graph.Paging.before = lambda self, tokens: None  # type: ignore[method-assign]
    if "read" not in parts:
        graph.Paging.callback = lambda self, current: {}  # type: ignore[method-assign]
    if "copy" in parts:
        from concurrent.futures import ThreadPoolExecutor

        pool = ThreadPoolExecutor(8)

        def read(self: Any, runs: Any, layer: int | None = None) -> None:
            list(pool.map(lambda run: os.pread(self._files[run[0]], run[2] - run[1], run[1]), runs))

        graph.Paging._read = read  # type: ignore[method-assign]


def timed(job: dict[str, Any]) -> dict[str, Any]:
    """Open, prefill, decode; seconds and bytes of each."""
    if job["group"]:
        Path(job["group"], "cgroup.procs").write_text(str(os.getpid()))
    leave_out(job["parts"].split())
    n_prompt, n_tokens = job["prompt"], job["tokens"]
    how = OpenSettings(n_ctx=n_prompt + n_tokens + 6, paging="on" if job["parts"] else "off")
    counters, clock = psutil.Process().io_counters, [(time.perf_counter(), 0)]
    begin = counters().read_bytes

    def stop() -> tuple[float, int]:
        clock.append((time.perf_counter(), counters().read_bytes - begin))
        return clock[-1][0] - clock[-2][0], clock[-1][1] - clock[-2][1]

    disk, digest = (
        disk_bandwidth(job["model"], 2 << 20),
        hashlib.sha256(),
    )  # before weights are locked in memory
    stop()
    with open_model(job["model"], how, trial=False) as model:
        if "random" in job["parts"]:
            no_windows(model.paging)
        opened = stop()
        tokens = np.random.default_rng(3).integers(0, model.n_vocab, n_prompt + n_tokens).tolist()
        digest.update(model.evaluate(tokens[:n_prompt]).tobytes())
        prefill, steps = stop(), []
        before = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        for token in tokens[n_prompt:]:
            digest.update(model.evaluate([token]).tobytes())
            steps.append(stop())
        first = steps[0]
        steps = steps[len(steps) // 3 :]
        faults = (resource.getrusage(resource.RUSAGE_SELF).ru_majflt - before) / n_tokens
        again = []  # a token whose experts are in memory: computing alone
        for _ in range(6):
            model.evaluate(tokens[-1:])
            again.append(stop())
        return {
            "open": opened,
            "prefill": prefill,
            "first": first,
            "decode": [statistics.median(values) for values in zip(*steps, strict=True)],
            "computing": statistics.median(seconds for seconds, _ in again[1:]),
            "disk": disk,
            "faults": faults,
            "locked": model.paging.pinned_bytes if model.paging else 0,
            "digest": digest.hexdigest(),
        }


def no_windows(help_: graph.Paging) -> None:
    """``MADV_RANDOM`` where llama.cpp has mapped routed experts: each missing page is read alone."""
    parts = [part for layer in help_.layout.experts.values() for part in layer]
    for file, handle in enumerate(help_._files):
        inode = str(os.fstat(handle).st_ino)
        rows = [line.split(None, 5) for line in Path("/proc/self/maps").read_text().splitlines()]
        for span, _, offset, _, number, *_ in rows:
            first, (low, high) = int(offset, 16), (int(word, 16) for word in span.split("-"))
            for part in parts if number == inode else ():
                begin, end = (
                    max(low, low + part.start - first),
                    min(high, low + part.start + part.slice_bytes * part.n - first),
                )
                begin, end = -(-begin // 4096) * 4096, end // 4096 * 4096
                if part.file == file and begin < end:
                    LIBC.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), 1)


def drop(path: Path) -> None:
    """Let go of the file's pages."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(job: dict[str, Any], memory: int) -> dict[str, Any]:
    """`timed` in a process with this much memory (0: all)."""
    drop(Path(job["model"]))
    with group_of(memory) if memory else contextlib.nullcontext() as group:
        held = balloon(memory) if memory and group is None else contextlib.nullcontext()
        with held:
            words = [sys.executable, __file__, "--child", json.dumps({**job, "group": str(group or "")})]
            done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    drop(Path(job["model"]))
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# ---- the table and the figure ----


def table(options: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """A row for each read-ahead, memory and way."""
    ways, rows = WAYS | (MORE if options.parts else {}), list[dict[str, Any]]()
    print("| read-ahead, kB | memory, MB | help | open, s | prefill, s | decode, s | first, s | read a token, MB | major faults |"
          " computing alone, s | disk alone, s | prefill, x | decode, x |\n|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")  # fmt: skip
    for kib in options.read_ahead:
        with read_ahead(model, kib) if kib else contextlib.nullcontext():
            for memory in options.memory:
                stock: dict[str, Any] = {}
                for way in options.ways or ways:
                    job = {
                        "model": str(model),
                        "parts": ways[way],
                        "prompt": options.prompt,
                        "tokens": options.tokens,
                    }
                    got = measure(job, memory * 10**6)
                    stock = stock or got
                    assert got["digest"] == stock["digest"], f"{way}: the logits differ"
                    gains = [stock[name][0] / got[name][0] for name in ("prefill", "decode")]
                    rows.append({"read_ahead": kib, "memory": memory, "way": way, **got})
                    print(f"| {kib or 'as it is'} | {memory or 'all'} | {way} | {got['open'][0]:.1f} | {got['prefill'][0]:.1f} | "
                          f"{got['decode'][0]:.3f} | {got['first'][0]:.2f} | {got['decode'][1] / 1e6:,.0f} | {got['faults']:,.0f} | "
                          f"{got['computing']:.3f} | {got['decode'][1] / (got['disk'] or float('nan')):.3f} | {gains[0]:.2f} | {gains[1]:.2f} |",
                          flush=True)  # fmt: skip
    return rows


def figure(rows: list[dict[str, Any]], place: Path, file_bytes: int) -> None:
    """Tokens a second against memory, a line for each way and read-ahead."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(7, 3.8), layout="constrained")
    ax = drawn.subplots()
    ways = list(dict.fromkeys(row["way"] for row in rows))
    lines = dict.fromkeys((row["way"], row["read_ahead"]) for row in rows)
    for (way, kib), marker in zip(lines, "os^v<>DP*", strict=False):
        own = [row for row in rows if (row["way"], row["read_ahead"]) == (way, kib)]
        name = {"off": "llama.cpp alone", "all": "with help"}.get(way, way)
        style = {"color": f"C{ways.index(way)}", "linestyle": "--" if way == "off" else "-", "marker": marker}
        speeds = [1 / row["decode"][0] for row in own]
        ax.plot([row["memory"] / 1e3 for row in own], speeds, label=f"{name}, read-ahead {kib:,} kB", **style)
    ax.axvline(file_bytes / 1e9, color="0.6", linewidth=1)
    ax.annotate(
        "size of the file",
        (file_bytes / 1e9, 0),
        (-4, 6),
        textcoords="offset points",
        ha="right",
        color="0.4",
    )
    ax.set(xlabel="memory (GB)", ylabel="decode (tokens a second)", ylim=(0, None))
    ax.legend(fontsize=8)
    drawn.savefig(place, dpi=130)


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="receives the specimen, and loses it at the end")
    parser.add_argument("--model", type=Path, help="a model that is there")
    parser.add_argument("--memory", type=numbers, default=[2000], help="in MB, several by comma; 0: all")
    parser.add_argument("--read-ahead", type=numbers, default=[0], help="in kB; 0: as it is")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--ways", type=lambda text: text.split(","), help="only these rows")
    parser.add_argument("--parts", action="store_true", help="also every part alone, and what did not pay")
    parser.add_argument("--skew", action="store_true")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(timed(json.loads(options.child))))
        return
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that the read-ahead is put back
        signal.signal(number, lambda *_: sys.exit(1))
    if options.model is None and options.folder is None:
        parser.error("give a folder for the specimen, or --model")
    model = options.model or options.folder / "paging.gguf"
    try:
        if options.model is None:
            specimen.write_specimen(model, SHAPE, progress=False)
            if options.skew:
                skewed(model)
        rows = table(options, model)
        if options.figure:
            figure(rows, options.figure, model.stat().st_size)
    finally:
        if options.model is None:
            model.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
