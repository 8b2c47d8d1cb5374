"""Checks before the first byte: the output's name, whole sources that may go, and room on the disk."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from dfqs_nb.core.display import quoted
from dfqs_nb.core.errors import IntegrityError, OutputError, SpaceError
from dfqs_nb.core.paths import REPOSITORY, data_dir
from dfqs_nb.merge import disk
from dfqs_nb.merge.copy import in_the_way, read_journal, windows
from dfqs_nb.merge.kind import download_mark
from dfqs_nb.merge.plan import Plan
from dfqs_nb.merge.verify import manifest_path

CONSUME_EXTRA_BYTES = 64 << 20  # what a consuming merge may need beyond its sources, plus the header


def check_output(
    output: Path, plan: Plan, *, overwrite: bool = False, consume: bool = False, in_place: bool = False
) -> None:
    """Check that ``output`` may be written and that the disk holds it; errors as `merge_model`."""
    with disk.readable_errors(output, plan.nbytes, "nothing was written"):
        _check_name(output)
        if os.path.lexists(output) and not in_place:
            if output.exists() and any(output.samefile(path) for path in plan.sources):
                what, hint = "is one of the files that it would be made from", "choose another name"
                raise OutputError(what, where=output, hint=hint)
            if not overwrite:
                hint = "choose another name, or pass --overwrite (overwrite=True)"
                raise OutputError("exists already", where=output, hint=hint)
        going_on = bool(windows(read_journal(output)))
        if going_on and not consume:
            raise in_the_way(disk.journal_path(output))
        for path in plan.sources:
            _check_whole(path, going_on)
        if consume:
            _check_consumable(plan, output)
        _check_space(output, plan, consume)


def _check_name(output: Path) -> None:
    """Check that the output, and the working files beside it, can have their names."""
    folder = output.parent
    if not folder.is_dir():
        raise OutputError("the folder does not exist", where=folder, hint="make it first")
    if os.path.lexists(output) and not (output.is_symlink() or stat.S_ISREG(output.lstat().st_mode)):
        raise OutputError("is no regular file", where=output, hint="name a file, like model.gguf")
    try:
        output.name.encode()
    except UnicodeEncodeError:
        what = "its name is not valid UTF-8"
        raise OutputError(what, where=output, hint="choose another name") from None
    longest = max(len(path.name.encode()) for path in (manifest_path(output), disk.journal_path(output)))
    if (excess := longest - os.pathconf(folder, "PC_NAME_MAX")) > 0:
        hint = f"choose a name that is {excess} bytes shorter"
        raise OutputError("its name is too long for the working files beside it", where=output, hint=hint)


def _check_whole(path: Path, going_on: bool) -> None:
    """Check that a source is no unfinished download; of a consuming merge that resumes it has holes."""
    mark, (missing, first) = download_mark(path), (0, 0) if going_on else disk.missing_bytes(path)
    if missing:
        mark = f"has a hole at byte {first:,}: {missing:,} bytes were never stored and read as zeros"
    if mark:
        filled = quoted(path.with_name(f"whole-{path.name}"))
        hint = "finish the download, or the stopped merge; if its holes are meant, fill them: "
        raise IntegrityError(mark, where=path, hint=f"{hint}`cp --sparse=never {quoted(path)} {filled}`")


def _check_consumable(plan: Plan, output: Path) -> None:
    """Check that the sources may be deleted: they belong to nobody else, and can give their bytes back."""
    if not plan.header:
        what = "the header goes on in the second part, so a killed merge could not be resumed"
        raise OutputError(what, where=output, hint="merge without --consume")
    hint = "merge without --consume, into a new file; it needs room for a second copy"
    for path in plan.sources:
        if reason := _shared(path):
            raise OutputError(f"must not be deleted: {reason}", where=path, hint=hint)
    for folder in {path.parent for path in plan.sources}:
        if not disk.can_punch(folder):
            what = "this file system cannot give back parts of a file (punch holes)"
            raise OutputError(what, where=folder, hint=hint)


def _shared(path: Path) -> str:
    """Why a file is not one model's alone to delete; empty when it is."""
    real = path.resolve()
    if any(real.is_relative_to(folder.resolve()) for folder in (data_dir(), REPOSITORY / "data")):
        return "it is part of the workbook's own data"
    if path.is_symlink():
        return f"it is a link to {real}"
    if path.stat().st_nlink > 1:
        return "it has a second name (a hard link)"
    cache = ("blobs", "snapshots")
    stores = [folder.parent for folder in real.parents if folder.name in cache]
    if any(all((store / name).is_dir() for name in cache) for store in stores):
        return "it belongs to a cache of the Hugging Face hub"
    if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
        return "it, or its folder, may not be written"
    return ""


def _check_space(output: Path, plan: Plan, consume: bool) -> None:
    part, needed = disk.part_path(output), plan.nbytes
    needed -= _stored_bytes(part) if part.exists() else 0
    if consume:
        device = output.parent.stat().st_dev
        needed -= sum(_stored_bytes(path) for path in plan.sources if path.stat().st_dev == device)
        needed = max(needed, 0) + CONSUME_EXTRA_BYTES + len(plan.header)
    free = shutil.disk_usage(output.parent).free
    if free < needed:
        also = "" if consume else ", or pass --consume, which deletes the shards and needs no second copy"
        message, hint = f"needs {needed:,} bytes and {free:,} are free", f"free {needed - free:,} bytes{also}"
        raise SpaceError(message, where=output.parent, hint=hint)


def _stored_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512
