"""One sound GGUF file out of what there is: shards, or shards that were glued together.

The result is the file that llama.cpp's ``llama-gguf-split --merge`` writes, byte for byte: shard 1's metadata
with ``split.count`` set to 0, the tensor tables of all shards, then every tensor's bytes, each padded to the
model's own alignment (the tool pads to 32 bytes always; where that is wrong, llama.cpp refuses its output).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from dfqs_nb.core import files
from dfqs_nb.core.display import quoted
from dfqs_nb.core.errors import IntegrityError, OutputError, RegistryError, ShardError, SpaceError
from dfqs_nb.core.paths import REPOSITORY, data_dir
from dfqs_nb.gguf import facts
from dfqs_nb.gguf.header import check_layout, padded, read_header
from dfqs_nb.gguf.models import resolve
from dfqs_nb.gguf.shards import ShardSet, open_shards
from dfqs_nb.merge import disk
from dfqs_nb.merge.copy import NameTaken, Plan, Run, in_the_way, plan_merge, read_journal, windows
from dfqs_nb.merge.kind import Kind, diagnose, unfinished
from dfqs_nb.merge.verify import MergeResult, hash_file, manifest_path, read_manifest, save_manifest

CONSUME_EXTRA_BYTES = 64 << 20  # what a consuming merge may need beyond its sources, plus the header
Given = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Source:
    """A model as it lies on the disk: its headers, checked as one set, and how its merge copies it."""

    shards: ShardSet
    kind: Kind
    plan: Plan

    @property
    def files(self) -> tuple[Path, ...]:
        """Its shards in order, or the one file."""
        return self.plan.sources


def open_source(model: Given, *, merged_to: Path | None = None) -> Source:
    """Find all files of a model, by what their bytes say, and check that they belong together.

    ``model`` is a registered name, an ``hf://`` address, or a path: the file, or any one of its shards. Or
    all of these, in any order. What is missing here is downloaded.
    ``merged_to``: a folder where an earlier merge may have put the model, before it deleted these files.
    `HeaderError`, `LayoutError`, `ShardError`, `RegistryError`: files are missing, not sound, or not one set.
    """
    try:
        found = [[Path(given)] if files.is_file(given) else resolve(given) for given in _each(model)]
    except RegistryError as error:
        raise (merged_to and _merged_before(model, merged_to)) or error from error
    paths = [path for each in found for path in each]
    first, alone = diagnose(paths[0], allow_holes=True), len(paths) == 1
    if alone and (first.kind is Kind.UNFINISHED or not first.headers):
        raise ShardError(f"is no model: {first.finding}", where=paths[0], hint=first.next_step)
    shards = first.shards() if alone else open_shards(paths)
    return Source(shards, first.kind, plan_merge(shards))


def _each(model: Given) -> list[str | Path]:
    return [model] if isinstance(model, (str, Path)) else list(model)


def merge_model(
    model: Given, output: str | Path, *, overwrite: bool = False, consume: bool = False
) -> MergeResult:
    """Make the single file ``output`` of a model's shards, or of glued shards (see `open_source`).

    The output gets its name only after this package's reader and llama.cpp's own parser accepted its header,
    and its bytes, read back from the disk, have the hash that they have in the shards. The hashes are kept in
    ``<output>.manifest.json``. The same call resumes a killed merge. ``overwrite`` replaces an existing
    output, once the new one is proven. ``consume`` deletes the shards: it gives their bytes back to the disk
    once their copy is proven, so it needs no second copy of the model.

    Errors as `open_source`. `OutputError`, `SpaceError`: the output, or the deletion of the shards, is not
    possible as asked. `IntegrityError`: a shard changed while it was read, or the disk gave back other bytes.
    """
    output = Path(output)
    if consume and (finished := _finish_consumed(model, output)):
        return finished
    plan = open_source(model, merged_to=output.parent).plan
    return _carry_out(plan, output, overwrite, consume)


def merge_once(
    model: Source, output: str | Path, *, fresh: bool = False, consume: bool = False
) -> MergeResult:
    """`merge_model`, unless it is done already: what was made before from the same files is used again.

    A sound single file is used where it lies. The same files have the same names, sizes and times. Errors as
    `merge_model`; an existing output that no manifest shows to be ours is not replaced.
    """
    output, plan, began = Path(output), model.plan, time.perf_counter()
    facts.require_model(model.shards.as_one)
    if len(model.files) == 1 and model.kind is not Kind.RAW_CONCATENATION:
        path, header = model.files[0], model.shards.headers[0]
        if found := unfinished(path):
            raise IntegrityError(found[1], where=path, hint=found[2])
        check_parsed(path, [path])
        if not fresh and (earlier := earlier_result(path)):
            return earlier
        hashes = hash_file(path, [header])[:2]
        return MergeResult(path, header.file_size, *hashes, plan.identities, time.perf_counter() - began)
    earlier = earlier_result(output)
    if earlier and not fresh and earlier.sources == plan.identities:
        return earlier
    ours = False
    with suppress(OSError, IntegrityError):
        ours = read_manifest(output) is not None
    return _carry_out(plan, output, ours, consume)


def repair(
    path: Path | str, output: Path | str | None = None, *, in_place: bool = False, overwrite: bool = False
) -> MergeResult:
    """Make the sound model that the raw concatenation ``path`` should have been.

    The result is the file that merging the original shards gives. It goes to ``output``, and ``path`` is only
    read; or, ``in_place``, it takes the place of ``path``. That needs at most 64 MiB and the header in extra
    disk. Until it ends ``path`` is partly empty and ``.<name>.part`` grows beside it; the same call resumes a
    killed repair. Errors as `merge_model`.
    """
    path = Path(path)
    if in_place == (output is not None):
        hint = "name an output, or ask for in_place=True"
        raise OutputError("say where the repaired model goes", where=path, hint=hint)
    target = path if output is None else Path(output)
    if in_place and (finished := _finish_consumed(path, target)):
        return finished
    diagnosis = diagnose(path, allow_holes=True)
    if diagnosis.kind is not Kind.RAW_CONCATENATION:
        message = f"is not a raw concatenation of shards: {diagnosis.finding}"
        raise ShardError(message, where=path, hint=diagnosis.next_step)
    return _carry_out(plan_merge(diagnosis.shards()), target, overwrite, in_place, in_place)


def _carry_out(
    plan: Plan, output: Path, replace: bool, consume: bool = False, in_place: bool = False
) -> MergeResult:
    """Check, copy, check again, keep the hashes, and only then give the file its name; or resume that."""
    check_output(output, plan, overwrite=replace, consume=consume, in_place=in_place)
    files.remove_stale(manifest_path(output))
    began, run, saved = time.perf_counter(), Run(plan, output, consume), False
    left = "run the same command again to resume" if consume else "the partial output was removed"
    with disk.readable_errors(output, plan.nbytes, left), ThreadPoolExecutor(1) as beside:
        # The order is the guarantee: a kill between two steps leaves what the same command goes on from.
        try:
            with ExitStack() as stack:
                run.open(stack)
                header = beside.submit(check_header, plan)
                if consume:  # nothing is released for a header that is refused
                    header.result()
                sha256, hashes, sources = run.copy()  # 1. every byte is on the disk, and read back equal
                header.result()  # 2. llama.cpp takes the header
                run.check_sources()  # 3. no source changed while it was read
                seconds = time.perf_counter() - began
                result = MergeResult(output, plan.nbytes, sha256, hashes, sources, seconds)
                save_manifest(result, disk.part_path(output))  # 4. by it a later call knows the output
                saved = True
                run.give_name(replace or in_place)  # 5.
                for source in run.sources if consume else ():  # 6. killed here: see `_finish_consumed`
                    if disk.is_at(source.handle, source.path):  # that very file, and not the output
                        source.path.unlink()
        except BaseException as error:
            if saved and earlier_result(output) is None:
                manifest_path(output).unlink(missing_ok=True)  # another file has the name
            _after_failure(error, output, run.own_files)
            raise
        if consume:
            disk.journal_path(output).unlink(missing_ok=True)
    return result


def _after_failure(error: BaseException, output: Path, own_files: set[Path]) -> None:
    """Remove the working files of this call, unless they are needed.

    A consuming copy keeps its part file, which holds bytes that the sources no longer have. Any other keeps
    it where a person stopped it, or where it is complete and its name is taken.
    """
    if isinstance(error, (KeyboardInterrupt, SystemExit, NameTaken)):
        return
    part_is_needed = disk.journal_path(output) in own_files and bool(windows(read_journal(output)))
    if not part_is_needed:
        for path in own_files:
            path.unlink(missing_ok=True)
    elif isinstance(error, IntegrityError):
        part = disk.part_path(output).name
        hint = f"nothing more was released; keep {part}: it has what the sources lack now. {error.hint}"
        raise IntegrityError(error.what, where=error.where, hint=hint) from error


def check_output(
    output: Path, plan: Plan, *, overwrite: bool = False, consume: bool = False, in_place: bool = False
) -> None:
    """Check that ``output`` may be written and that the disk holds it; errors as `merge_model`."""
    with disk.readable_errors(output, plan.nbytes, "nothing was written"):
        files.check_output(output, () if in_place else plan.sources, overwrite or in_place)
        longest = len(os.fsencode(manifest_path(output).name))
        if (excess := longest - os.pathconf(output.parent, "PC_NAME_MAX")) > 0:
            hint = f"choose a name that is {excess} bytes shorter"
            raise OutputError("its name is too long for the working files beside it", where=output, hint=hint)
        for place in (manifest_path(output), disk.part_path(output), disk.journal_path(output)):
            if place.exists() and any(map(place.samefile, plan.sources)):
                raise OutputError(f"is a working file of {output.name}", where=place, hint="rename it first")
        if not (in_place or overwrite):
            with suppress(FileNotFoundError):  # the output, which has no name yet
                read_manifest(output)  # a file of somebody else with that name is no manifest
        going_on = bool(windows(read_journal(output)))
        if going_on and not consume:
            raise in_the_way(disk.journal_path(output))
        for path in () if going_on else plan.sources:  # a merge that goes on made their holes
            if found := unfinished(path):
                raise IntegrityError(found[1], where=path, hint=found[2])
        if consume:
            _check_consumable(plan)
        if not os.access(output.parent, os.W_OK):
            raise OutputError("the folder may not be written", where=output.parent, hint="choose another one")
        _check_space(output, plan, consume)


def _check_consumable(plan: Plan) -> None:
    """Check that the sources may be deleted: they belong to nobody else, and can give their bytes back."""
    hint = "write a new file, without --consume or --in-place; it needs room for a second copy"
    for path in plan.sources:
        if reason := _shared(path):
            raise OutputError(f"must not be deleted: {reason}", where=path, hint=hint)
    for folder in {path.parent for path in plan.sources}:
        if not disk.can_punch(folder):
            what = "this file system cannot give back parts of a file (punch holes)"
            raise OutputError(what, where=folder, hint=hint)


def _shared(path: Path) -> str:
    """Why a file is not one model's alone to delete; empty when it is."""
    real, cache = path.resolve(), ("blobs", "snapshots")
    if any(real.is_relative_to(folder.resolve()) for folder in (data_dir(), REPOSITORY / "data")):
        return "it is part of the workbook's own data"
    if path.is_symlink():
        return f"it is a link to {real}"
    if path.stat().st_nlink > 1:
        return "it has a second name (a hard link)"
    stores = [folder.parent for folder in real.parents if folder.name in cache]
    if any(all((store / name).is_dir() for name in cache) for store in stores):
        return "it belongs to a cache of the Hugging Face hub"
    if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
        return "it, or its folder, may not be written"
    return ""


def _check_space(output: Path, plan: Plan, consume: bool) -> None:
    part, device = disk.part_path(output), output.parent.stat().st_dev
    whole = plan.nbytes - (part.stat().st_blocks * 512 if part.exists() else 0)
    sources = [path.stat() for path in plan.sources]
    given_back = sum(status.st_blocks * 512 for status in sources if status.st_dev == device)
    consuming = max(whole - given_back, 0) + CONSUME_EXTRA_BYTES + len(plan.header)
    needed, free = consuming if consume else whole, shutil.disk_usage(output.parent).free
    if free < needed:
        message, hint = f"needs {needed:,} bytes and {free:,} are free", f"free {needed - free:,} bytes"
        if consuming <= free:
            hint += ", or pass --consume (repair: --in-place), which DELETES the shards on the way"
        raise SpaceError(message, where=output.parent, hint=hint)


def check_header(plan: Plan) -> None:
    """Check the planned header with this package's reader and llama.cpp's parser, in a file without data.

    `IntegrityError`, `LayoutError`: it is refused, or read otherwise than planned.
    """
    with tempfile.NamedTemporaryFile() as file:
        file.write(plan.header)
        file.truncate(plan.nbytes)
        header = read_header(file.name)
        check_layout(header)
        check_parsed(Path(file.name), plan.sources)
    planned = [(copy.name, copy.target_offset, copy.nbytes) for copy in plan.copies]
    if planned != [(t.name, header.data_offset + t.offset, t.nbytes) for t in header.tensors]:
        raise IntegrityError("its header would not be read as it is planned", where=plan.sources[0])


def check_parsed(path: Path, sources: Sequence[Path]) -> None:
    """Raise `IntegrityError` if llama.cpp's parser refuses a file that was made of these sources."""
    from dfqs_nb.llama.check import parse  # here: it is slow to import

    verdict = parse(path)
    if not verdict.accepted:
        hint = f"`dfqs-nb inspect {' '.join(map(quoted, sources))}` says what the sources are"
        raise IntegrityError(f"llama.cpp refuses the result: {verdict.reason}", where=sources[0], hint=hint)


def earlier_result(output: Path) -> MergeResult | None:
    """The result in the manifest of ``output``, if it is the file of that size, time and inode."""
    try:
        kept, now = read_manifest(output), output.stat()
    except (OSError, IntegrityError):
        return None
    return kept if kept and (kept.mtime_ns, kept.inode) == (now.st_mtime_ns, now.st_ino) else None


def _finish_consumed(model: Given, output: Path) -> MergeResult | None:
    """Finish a consuming merge that was killed after its file had its name: delete the emptied sources.

    Nothing is deleted on a journal's word: a source must lie in the folder that was named, and have nothing
    left in it but its header.
    """
    with disk.readable_errors(output, 0, "run the same command again"):
        journal = read_journal(output)
        earlier = earlier_result(output) if journal and not disk.part_path(output).exists() else None
        if earlier is None or journal[0].get("sources") != list(earlier.sources):
            return None
        folders = {path.parent for path in map(Path, _each(model))}
        names = [str(source.get("name", "")) for source in earlier.sources]
        for path in (folder / name for folder in folders for name in names):
            if path.is_file() and not path.is_symlink() and not path.samefile(output) and _emptied(path):
                path.unlink()
        disk.journal_path(output).unlink(missing_ok=True)
    return earlier


def _emptied(path: Path) -> bool:
    """Whether a consuming copy gave back every whole block behind a shard's header."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        first = padded(read_header(path).data_offset, status.st_blksize)
        last = status.st_size - 2 * status.st_blksize
        return first < last <= disk.next_data(file.fileno(), first)


def _merged_before(model: Given, folder: Path) -> ShardError | None:
    """An error that says where a model is whose shards an earlier merge deleted."""
    names = {Path(given).name for given in _each(model) if not files.there_is(given)}
    for manifest in sorted(folder.glob("*.manifest.json")):
        output = manifest.with_name(manifest.name.removesuffix(".manifest.json"))
        earlier = earlier_result(output)
        if earlier and names & {str(source.get("name")) for source in earlier.sources}:
            hint = f"go on with the merged model: dfqs-nb run --model {quoted(output)}"
            return ShardError("was merged and then deleted (consume)", where=sorted(names)[0], hint=hint)
    return None
