"""The real size, once: 61 GB of shards consume-merged, and glued and repaired in place, on a disk too small for two.

``python tests/benchmarks/rehearsal.py FOLDER [--tensors 1328] [--free-gb 20] [--leave-gb 8]``

The shards have the artifact's shape (gguf_fixtures) and all their blocks on the disk, allocated but not written:
they read as zeros without being read, so the times hold writing, reading back and hashing, not reading sources.
The free space is sampled four times a second. A filler file takes what free space there is beyond ``--free-gb``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from gguf_fixtures import REAL_SHARD_BYTES, REAL_TENSORS  # noqa: E402

RUN = {
    "consume-merge": "from dfqs_nb.merge import merge_model\n"
    "r = merge_model(sys.argv[1], sys.argv[2], consume=True, allow_holes=True, progress=False)",
    "repair in place": "from dfqs_nb.merge import repair\n"
    "r = repair(sys.argv[1], in_place=True, allow_holes=True, progress=False)",
}
REPORT = "\nprint(r.sha256, r.nbytes)"
GLUE = """
from dfqs_nb.gguf.header import read_header
end = 0
with open(sys.argv[3], "wb") as glued:
    for path in sys.argv[1:3]:
        header = read_header(path)
        glued.seek(end)
        glued.write(header.raw)
        end += header.file_size
    glued.truncate(end)
"""
MAKE = """
sys.path.insert(0, "tests/support")
from gguf_fixtures import real_size_shards
real_size_shards(sys.argv[1], n_tensors=int(sys.argv[2]), first_shard_bytes=int(sys.argv[3]))
"""


def python(code: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-c", "import sys\n" + code, *map(str, arguments)]


def allocate(path: Path) -> None:
    """Blocks for all of a sparse file."""
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


class Sampler(threading.Thread):
    """The least free space seen, and the most blocks that the files of a folder held."""

    def __init__(self, folder: Path, least: int, process: subprocess.Popen) -> None:
        super().__init__(daemon=True)
        self.folder, self.least, self.process = folder, least, process
        self.free, self.blocks = shutil.disk_usage(folder).free, 0

    def run(self) -> None:
        while self.process.poll() is None:
            self.free = min(self.free, shutil.disk_usage(self.folder).free)
            self.blocks = max(self.blocks, blocks(self.folder))
            if self.free < self.least:
                self.process.kill()  # others need the disk too
            time.sleep(0.25)


def blocks(folder: Path) -> int:
    total = 0
    for entry in os.scandir(folder):
        try:
            total += entry.stat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


def rehearse(name: str, folder: Path, n_tensors: int, free_bytes: int, least: int) -> dict[str, Any]:
    first = int(REAL_SHARD_BYTES * n_tensors / REAL_TENSORS)
    subprocess.run(python(MAKE, folder / "m", n_tensors, first), check=True, cwd=ROOT)
    shards = sorted(folder.glob("m-*.gguf"))
    model = shards[0]
    if name == "repair in place":
        model = folder / "glued.gguf"
        subprocess.run(python(GLUE, *shards, model), check=True, cwd=ROOT)
        for shard in shards:
            shard.unlink()
        shards = [model]
    for shard in shards:
        allocate(shard)
    before, free = blocks(folder), shutil.disk_usage(folder).free
    filler = folder.parent / "rehearsal.filler"
    if free > free_bytes:
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free - free_bytes)
        free = shutil.disk_usage(folder).free
    began = time.perf_counter()
    process = subprocess.Popen(
        python(RUN[name] + REPORT, model, folder / "out.gguf"), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    sampler = Sampler(folder, least, process)
    sampler.start()
    out = process.stdout.read().split()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    filler.unlink(missing_ok=True)
    return {
        "name": name,
        "status": process.returncode,
        "seconds": round(seconds),
        "sha256": out[0] if out else "",
        "bytes": int(out[1]) if out else 0,
        "sources_blocks": before,
        "free_before": free,
        "least_free": sampler.free,
        "extra_peak_bytes": sampler.blocks - before,
        "peak_memory_mb": round(usage.ru_maxrss / 1024),
        "left": sorted(p.name for p in folder.iterdir()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--tensors", type=int, default=REAL_TENSORS, help="fewer, where the disk is too small"
    )
    parser.add_argument("--free-gb", type=float, default=20.0, help="free space beside the sources")
    parser.add_argument("--leave-gb", type=float, default=8.0, help="stop when less is free than this")
    options = parser.parse_args()
    for name in RUN:
        folder = options.folder / "rehearsal"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            print(
                json.dumps(
                    rehearse(
                        name, folder, options.tensors, int(options.free_gb * 1e9), int(options.leave_gb * 1e9)
                    ),
                    indent=1,
                ),
                flush=True,
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
