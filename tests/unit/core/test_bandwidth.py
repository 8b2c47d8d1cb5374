"""How fast memory and disk are read: plausible numbers, and none where nothing can be measured."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import pytest

from dfqs_nb.core import machine
from dfqs_nb.core.machine import DISK_SECONDS, Disk, block_folder, disk_bandwidth, memory_bandwidth

PIECE_BYTES = 2 << 20


def test_memory_bandwidth_is_that_of_memory():
    assert 1e9 < memory_bandwidth(1) < 500e9


def pieces_on_disk(path):
    """Write 64 pieces to the disk; the folder of that disk, or None."""
    with path.open("wb") as file:
        file.write(os.urandom(PIECE_BYTES) * 64)
        os.fsync(file.fileno())
        return block_folder(file.fileno())


def test_disk_bandwidth_is_measured_where_there_is_a_disk(tmp_path):
    disk = pieces_on_disk(path := tmp_path / "m")
    bandwidth, why = disk_bandwidth(path, PIECE_BYTES)
    if disk is not None:
        assert bandwidth is not None, "the file's pages stayed in the cache"
    assert bool(why) == (bandwidth is None)
    assert bandwidth is None or 1e6 < bandwidth < 100e9


def test_a_small_file_tells_no_bandwidth(tmp_path):
    (tmp_path / "m").write_bytes(bytes(PIECE_BYTES))
    assert disk_bandwidth(tmp_path / "m", PIECE_BYTES) == (None, "the file has fewer than 64 such pieces")


@pytest.mark.skipif(sys.platform != "linux", reason="the advice is for Linux")
def test_the_disk_under_a_file_is_measured(tmp_path, monkeypatch):
    path = tmp_path / "m"
    path.write_bytes(os.urandom(1 << 20) * 32)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    asked, advise = set(), os.posix_fadvise
    monkeypatch.setattr(
        os, "posix_fadvise", lambda f, at, n, how: asked.add((at, how)) or advise(f, at, n, how)
    )
    disk, _ = Disk.under(path), disk_bandwidth(path, 64 << 10)
    wanted = {at for at, how in asked if how == os.POSIX_FADV_WILLNEED}
    assert len(wanted) >= 60, "pieces from many places"
    assert not disk.device or Path("/sys/class/block", disk.device).exists() and disk.read_ahead_bytes >= 0
    assert disk_bandwidth(path, 1 << 20)[0] is None, "too small a file"


@pytest.mark.skipif(sys.platform != "linux", reason="pages are locked as on Linux")
def test_the_disk_is_measured_while_a_part_of_the_file_is_mapped(tmp_path):
    """As the dense weights of an open model, 12 % of the published shape."""
    disk = pieces_on_disk(path := tmp_path / "m")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[at] for at in range(0, 20 * PIECE_BYTES, mmap.PAGESIZE)) > 0
        assert disk is None or 1e6 < (disk_bandwidth(path, PIECE_BYTES)[0] or 0) < 100e9
        assert sum(mapped[at] for at in range(0, 64 * PIECE_BYTES, mmap.PAGESIZE)) > 0
        assert "stays in the cache" in disk_bandwidth(path, PIECE_BYTES)[1], "all of it"


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the advice is for Linux")
@pytest.mark.parametrize("counted", [1.0, 0.6, 0.4])
def test_a_speed_is_of_what_the_kernel_counts_as_read_and_none_below_half(tmp_path, monkeypatch, counted):
    (tmp_path / "m").write_bytes(bytes(4 << 20))
    read, pread = [0], os.pread

    def counting(handle, n_bytes, at):
        read[0] += n_bytes
        return pread(handle, n_bytes, at)

    monkeypatch.setattr(os, "pread", counting)
    monkeypatch.setattr(machine, "read_bytes", lambda: counted * read[0])
    speed, _ = disk_bandwidth(tmp_path / "m", 64 << 10)
    assert speed == (pytest.approx(counted * read[0] / DISK_SECONDS, rel=0.3) if counted > 0.5 else None)
