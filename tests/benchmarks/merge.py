"""Merging 4 GB in two shards: ours, llama.cpp's tool, and plain copying, in one run on one disk.

``python tests/benchmarks/merge.py [--gb 4] [--runs 5] [--cold] [--folder /big/disk] [--without-reference]``

Each merge is one process, timed from start to end, so ours includes Python's start. Before each one we remove the
output of the one before, flush the disk, and read the shards once (``--cold``: drop them from the page cache
instead). ``cp`` is ``cat`` of both shards into one file. It returns before its bytes are on the disk, as the
reference tool does. "+ sync" waits for them. "The disk alone" writes as many bytes past the page cache while
another process reads as many past it. Nothing that writes a model and reads it back from the disk can be much
faster, whatever it computes. ``--without-reference`` leaves llama.cpp's tool out, which has to be built first.

``python tests/benchmarks/merge.py --real-size``: what planning, checks and diagnosis cost on sparse shards of
the real artifact's shape (50 and 11 GB, 1,328 tensors, 129,280 tokens). Target: under 1 s.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

MAKE = """
import os, sys
sys.path.insert(0, "tests/support")
from gguf_fixtures import Spec, field, header_bytes, split_fields
prefix, total = sys.argv[1], int(sys.argv[2])
large, small = 573 << 20, 32 << 20
for number, share in enumerate((0.8, 0.2)):
    sizes = [large] if number == 0 else []
    sizes += [small] * max(int((total * share - sum(sizes)) / small), 1)
    specs = [Spec(f"blk.{number}.{i}.weight", "F32", (size // 4 + i,)) for i, size in enumerate(sizes)]
    fields = [field("general.architecture", "STRING", "x")] if number == 0 else []
    counts = (int((total * 0.8 - large) / small) + 1, int(total * 0.2 / small))
    with open(f"{prefix}-{number + 1:05}-of-00002.gguf", "wb") as file:
        file.write(header_bytes([*fields, *split_fields(number, 2, sum(counts))], specs))
        for spec in specs:
            left = spec.nbytes + -spec.nbytes % 32
            while left:
                left -= file.write(os.urandom(min(left, 4 << 20)))
"""
OURS = "import sys; from dfqs_nb.merge import copy, merge_model\n%smerge_model(sys.argv[1], sys.argv[2])"
ONLY_WRITE = "copy.Run._write = lambda self, view, start: self.part.write(view, start)\n"
DISK = """
for shard in {shards}; do dd if="$shard" of=/dev/null bs=8M iflag=direct status=none; done &
dd if=/dev/zero of="{output}" bs=8M count={nbytes} iflag=count_bytes oflag=direct status=none
wait; sync "{output}"
"""
PLAN = {
    "find and check the shards": "from dfqs_nb.gguf.shards import open_shards; call = lambda: open_shards(sys.argv[1])",
    "the same, and plan the merge": "from dfqs_nb.gguf.shards import open_shards\nfrom dfqs_nb.merge.copy import plan_merge\n"
    "call = lambda: plan_merge(open_shards(sys.argv[1]))",
    "the same, and every check before the first byte": "from pathlib import Path\nfrom dfqs_nb.gguf.shards import open_shards\n"
    "from dfqs_nb.merge import merge as checks\nfrom dfqs_nb.merge.copy import plan_merge\nimport shutil\n"
    "shutil.disk_usage = lambda p: shutil._ntuple_diskusage(0, 0, 1 << 60)\n"
    "checks.unfinished = lambda path: ''  # the shards are sparse\n"
    "call = lambda: checks.check_output(Path(sys.argv[1] + '.out'), plan_merge(open_shards(sys.argv[1])))",
    "diagnose a raw concatenation of them": "from dfqs_nb.merge import diagnose; call = lambda: diagnose(sys.argv[2])",
    "plan its repair": "from dfqs_nb.merge import open_source\ncall = lambda: open_source(sys.argv[2]).plan",
}
TIMED = "\nimport time; began = time.perf_counter(); call(); print(time.perf_counter() - began)"


def reference(shards: list[str], output: str) -> dict[str, list[str]]:
    from llama_cpp_tools import tool

    command = f'"{tool("llama-gguf-split")}" --merge "{shards[0]}" "{output}" > /dev/null 2>&1'
    return {
        "llama-gguf-split --merge": ["sh", "-c", command],
        "llama-gguf-split --merge, sha256sum": ["sh", "-c", f'{command} && sha256sum "{output}" > /dev/null'],
    }


def commands(shards: list[str], output: str) -> dict[str, list[str]]:
    copy = f'cat "{shards[0]}" "{shards[1]}" > "{output}"'
    return {
        "cp": ["sh", "-c", copy],
        "cp + sync": ["sh", "-c", f'{copy}; sync "{output}"'],
        "the disk alone": [
            "sh",
            "-c",
            DISK.format(
                output=output,
                shards=" ".join(f'"{shard}"' for shard in shards),
                nbytes=sum(Path(shard).stat().st_size for shard in shards),
            ),
        ],
        "the workbook, with SHA-256": [sys.executable, "-c", OURS % ONLY_WRITE, shards[0], output],
        "the workbook, with SHA-256 and full read-back": [
            sys.executable,
            "-c",
            OURS % "",
            shards[0],
            output,
        ],
    }


def measure(command: list[str]) -> tuple[float, float]:
    """Wall seconds of a process, and the peak memory in MB of it and of the children it waited for."""
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "TQDM_DISABLE": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    unit = 1e6 if sys.platform == "darwin" else 1e6 / 1024
    return time.perf_counter() - began, usage.ru_maxrss / unit


def prepare(folder: Path, shards: list[str], cold: bool) -> None:
    for path in folder.iterdir():
        if str(path) not in shards:
            path.unlink()
    os.sync()
    for shard in shards:
        if cold:
            handle = os.open(shard, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)
        else:
            subprocess.run(["cat", shard], stdout=subprocess.DEVNULL, check=True)
    time.sleep(1)


def benchmark(
    folder: Path, nbytes: int, runs: int, cold: bool, with_reference: bool
) -> dict[str, list[tuple[float, float]]]:
    subprocess.run([sys.executable, "-c", MAKE, str(folder / "m"), str(nbytes)], check=True, cwd=ROOT)
    shards = [str(folder / f"m-0000{n}-of-00002.gguf") for n in (1, 2)]
    output = str(folder / "out.gguf")
    todo = commands(shards, output) | (reference(shards, output) if with_reference else {})
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in todo}
    for turn in range(runs):  # in turn, so that a busy minute is shared by all, and each comes after another
        for name in random.Random(turn).sample(list(todo), len(todo)):
            prepare(folder, shards, cold)
            results[name].append(measure(todo[name]))
            print(f"{name}: {results[name][-1][0]:.2f} s", file=sys.stderr, flush=True)
    return results


def table(results: dict[str, list[tuple[float, float]]]) -> str:
    """Medians, and the fastest of each: on a busy machine the latter says more of the method."""
    seconds = {name: sorted(wall for wall, _ in rows) for name, rows in results.items()}
    lines = [
        "| method | median (s) | x cp | x cp + sync | fastest (s) | x cp | x cp + sync | peak memory (MB) |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, rows in results.items():
        cells = []
        for pick in (statistics.median, min):
            mine, copy, flushed = (pick(seconds[key]) for key in (name, "cp", "cp + sync"))
            cells.append(f"{mine:.2f} | {mine / copy:.2f} | {mine / flushed:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} | {max(peak for _, peak in rows):.0f} |")
    return "\n".join(lines)


def real_size(folder: Path, runs: int) -> str:
    make = (
        "import sys; sys.path.insert(0, 'tests/support'); import gguf_fixtures as g\n"
        "g.real_size_shards(sys.argv[1]); g.glue(sys.argv[1], sys.argv[2])"
    )
    glued, first = folder / "glued.gguf", folder / "m-00001-of-00002.gguf"
    subprocess.run(
        [
            sys.executable,
            "-c",
            make.replace("g.glue(sys.argv[1], sys.argv[2])", GLUE),
            str(folder / "m"),
            str(glued),
        ],
        check=True,
        cwd=ROOT,
    )
    lines = [
        "| on sparse shards of the real shape | call (s) | process (s) | peak memory (MB) |",
        "|---|--:|--:|--:|",
    ]
    for name, code in PLAN.items():
        rows = []
        for _ in range(runs):
            with tempfile.TemporaryFile("w+") as out:
                saved, stdout = os.dup(1), 1
                os.dup2(out.fileno(), stdout)
                try:
                    rows.append(
                        measure([sys.executable, "-c", f"import sys\n{code}{TIMED}", str(first), str(glued)])
                    )
                finally:
                    os.dup2(saved, stdout)
                    os.close(saved)
                out.seek(0)
                rows[-1] += (float(out.read()),)
        wall, peak, call = (statistics.median(row[i] for row in rows) for i in range(3))
        lines.append(f"| {name} | {call:.2f} | {wall:.2f} | {peak:.0f} |")
    return "\n".join(lines)


# Sparse shards end to end in one sparse file: only the headers' bytes are written.
GLUE = """
from dfqs_nb.gguf.header import read_header
end = 0
with open(sys.argv[2], "wb") as glued:
    for n in (1, 2):
        header = read_header(f"{sys.argv[1]}-{n:05}-of-00002.gguf")
        glued.seek(end)
        glued.write(header.raw)
        end += header.file_size
    glued.truncate(end)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--real-size", action="store_true")
    parser.add_argument("--without-reference", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        print(f"{options.runs} runs each, {os.cpu_count()} cores, Python {sys.version.split()[0]}\n")
        if options.real_size:
            print(real_size(Path(name), options.runs))
        else:
            nbytes, with_reference = int(options.gb * 1e9), not options.without_reference
            print(table(benchmark(Path(name), nbytes, options.runs, options.cold, with_reference)))


if __name__ == "__main__":
    main()
