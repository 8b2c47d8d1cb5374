"""One sound GGUF file out of what there is: shards, byte parts, or shards that were glued together.

The result is the file that llama.cpp's ``llama-gguf-split --merge`` writes, byte for byte: shard 1's metadata
with ``split.count`` set to 0, the tensor tables of all shards, then every tensor's bytes, each padded to the
model's own alignment (the tool pads to 32 bytes always; where that is wrong, llama.cpp refuses its output).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dfqs_nb.core.display import quoted
from dfqs_nb.core.errors import HeaderError, IntegrityError, OutputError, RegistryError, ShardError
from dfqs_nb.core.files import sha256_of
from dfqs_nb.core.paths import outputs_dir
from dfqs_nb.gguf import facts
from dfqs_nb.gguf.header import check_layout, padded, read_header
from dfqs_nb.gguf.models import resolve
from dfqs_nb.gguf.shards import ShardSet, check_set, open_shards, shard_path
from dfqs_nb.merge import disk
from dfqs_nb.merge.byte_parts import byte_parts
from dfqs_nb.merge.checks import CONSUME_EXTRA_BYTES, check_output
from dfqs_nb.merge.copy import Copied, copy, read_journal
from dfqs_nb.merge.kind import Kind, diagnose, shard_number
from dfqs_nb.merge.plan import Copy, Plan, identities, plan_join, plan_merge
from dfqs_nb.merge.verify import hash_file, manifest_path, read_manifest, save_manifest, tensor_hashes

if TYPE_CHECKING:
    import pandas as pd

Given = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class MergeResult:
    """A merged model that passed every check.

    ``tensors`` has XXH64 of each tensor's bytes, as ``llama-gguf-hash`` prints it. ``reused``: nothing was
    written; an earlier merge of the same shards was used, or the file itself.
    """

    path: Path
    nbytes: int
    sha256: str
    tensors: dict[str, str]
    sources: tuple[disk.Identity, ...]
    seconds: float
    reused: bool = False


@dataclass(frozen=True)
class Source:
    """A model as it lies on the disk, opened once: its shards or byte parts in order, or the one file.

    ``set_of_shards`` has the headers in them, checked as one set; it is None for byte parts.
    """

    files: tuple[Path, ...]
    kind: Kind
    plan: Plan
    set_of_shards: ShardSet | None = None

    @property
    def shards(self) -> ShardSet:
        """The headers; of byte parts those in the first, which raises if it does not have all of them."""
        return self.set_of_shards or ShardSet((read_header(self.files[0]),))

    def dry_run(self, output: str | Path, *, overwrite: bool = False, consume: bool = False) -> Plan:
        """Check all that `merge_model` checks before the first byte; write nothing, and return its plan."""
        check_output(Path(output), self.plan, overwrite=overwrite, consume=consume)
        return self.plan

    def split(
        self, folder: str | Path | None = None, *, overwrite: bool = False, progress: bool = True
    ) -> tuple[MergeResult, ...]:
        """Cut a raw concatenation back into the shards that it was made from, byte for byte.

        They go into ``folder``, by default beside the file, named ``NAME-0000k-of-0000N.gguf``. Errors as
        `merge_model`.
        """
        path = self.files[0]
        _require_glued(path)
        headers = sorted(self.shards.headers, key=lambda header: header.start)
        ends, plans = [*(header.start for header in headers[1:]), path.stat().st_size], {}
        for header, end in zip(headers, ends, strict=True):
            target = shard_path(Path(folder or path.parent) / path.stem, *shard_number(header))
            cut = Copy(path.name, 0, header.start, 0, end - header.start)
            plans[target] = Plan((path,), b"", (cut,), cut.nbytes, identities([path]), ())
            check_output(target, plans[target], overwrite=overwrite)
        return tuple(_carry_out(plan, to, overwrite, progress=progress) for to, plan in plans.items())


def open_source(model: Given, *, merged_to: Path | None = None) -> Source:
    """Find all files of a model, by what their bytes say, and check that they belong together.

    ``model`` is a registered name, an ``hf://`` address, or a path: the file, or any one of its shards or
    byte parts. Or all of these, in any order (byte parts in theirs). What is missing here is downloaded.
    ``merged_to``: a folder where an earlier merge may have put the model, before it deleted these files.

    Raises:
        HeaderError, LayoutError, ShardError, RegistryError: the files are missing, not sound, or not one set.
    """
    files: list[Path] = []
    try:
        for given in _each(model):
            files += [Path(given)] if Path(given).is_file() else resolve(given)
    except RegistryError as error:
        raise (merged_to and _merged_before(model, merged_to)) or error from error
    first, alone = diagnose(files[0], allow_holes=True), len(files) == 1
    if first.kind is Kind.BYTE_PART:
        parts = byte_parts(files[0]) if alone else tuple(files)
        return Source(parts, first.kind, plan_join(parts))
    if alone and not (first.sound or first.headers):
        raise ShardError(f"is no model: {first.finding}", where=files[0], hint=first.next_step)
    if first.kind is Kind.RAW_CONCATENATION and alone:
        shards = check_set(first.headers, glued=True)
    else:
        shards = open_shards(files[0] if alone else files)
    return Source(tuple(dict.fromkeys(shards.paths)), first.kind, plan_merge(shards), shards)


def _each(model: Given) -> list[str | Path]:
    return [model] if isinstance(model, (str, Path)) else list(model)


def merge_model(
    model: Given, output: str | Path, *, overwrite: bool = False, consume: bool = False, progress: bool = True
) -> MergeResult:
    """Make the single file ``output`` of a model's shards, byte parts, or glued shards (see `open_source`).

    Memory stays under 100 MB whatever the largest tensor. The output gets its name only after this package's
    reader and llama.cpp's own parser accepted its header, and its bytes, read back from the disk, have the
    hash that they have in the shards. ``<output>.manifest.json`` keeps the hashes. The same call resumes a
    killed merge. ``overwrite`` replaces an existing output, once the new one is proven. ``consume`` deletes
    the shards: it gives their bytes back to the disk once their copy is proven, so it needs no second copy of
    the model.

    Raises:
        HeaderError, LayoutError, ShardError: the shards are not sound, or not one set.
        OutputError: the output, or the deletion of the shards, is not possible as asked.
        SpaceError: the disk has too little room, found before or on the way.
        IntegrityError: a shard changed or ended while it was read, or the disk gave back other bytes.
    """
    output = Path(output)
    if consume and (finished := _finish_consumed(model, output)):
        return finished
    plan = open_source(model, merged_to=output.parent).plan
    return _carry_out(plan, output, overwrite, consume, progress=progress)


def merge_once(
    model: Source, output: str | Path, *, fresh: bool = False, consume: bool = False, progress: bool = True
) -> MergeResult:
    """`merge_model`, unless it is done already: what was made before from the same files is used again.

    A sound single file is used where it lies. The same files have the same names, sizes and times. Errors as
    `merge_model`; an existing output that no manifest shows to be ours is not replaced.
    """
    output, plan, began = Path(output), model.plan, time.perf_counter()
    facts.require_model(model.shards.as_one)
    if len(model.files) == 1 and model.kind is not Kind.RAW_CONCATENATION:
        path, diagnosis = model.files[0], diagnose(model.files[0])
        if diagnosis.kind is not Kind.SINGLE_FILE:
            raise ShardError(diagnosis.finding, where=path, hint=diagnosis.next_step)
        header, sources = diagnosis.headers[0], identities([path])
        validate(path, Plan((path,), b"", (), header.file_size, sources, ()))
        if not fresh and (earlier := earlier_result(path)):
            return replace(earlier, reused=True)
        hashes = hash_file(path, [header], progress=progress)
        return MergeResult(path, header.file_size, *hashes, sources, time.perf_counter() - began, True)
    earlier = earlier_result(output)
    if earlier and not fresh and earlier.sources == plan.identities:
        return replace(earlier, reused=True)
    ours = manifest_path(output).exists() or output.resolve().is_relative_to(outputs_dir().resolve())
    return _carry_out(plan, output, ours, consume, progress=progress)


def repair(
    path: Path | str,
    output: Path | str | None = None,
    *,
    in_place: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> MergeResult:
    """Make the sound model that the raw concatenation ``path`` should have been.

    Shards that were glued together byte for byte have everything in them, but the second shard's header
    stands in the middle of the data. The result is the file that merging the original shards gives. It goes
    to ``output``, and ``path`` is only read; or, ``in_place``, it takes the place of ``path``, which is
    thereby deleted. That needs at most 64 MiB and the header in extra disk. Until it ends ``path`` is partly
    empty and ``.<name>.part`` grows beside it; the same call resumes a killed repair.

    Raises:
        DfqsError: neither, or both, of ``output`` and ``in_place``; ``path`` is not a raw concatenation; or
            as `merge_model`.
    """
    path = Path(path)
    if in_place == (output is not None):
        hint = "name an output, or ask for in_place=True"
        raise OutputError("say where the repaired model goes", where=path, hint=hint)
    target = path if output is None else Path(output)
    if in_place and (finished := _finish_consumed(path, target)):
        return finished
    _require_glued(path)
    return _carry_out(open_source(path).plan, target, overwrite, in_place, in_place, progress=progress)


def _require_glued(path: Path) -> None:
    """Raise `ShardError` unless the file is a raw concatenation of all shards of one model."""
    diagnosis = diagnose(path, allow_holes=True)
    if diagnosis.kind is not Kind.RAW_CONCATENATION:
        message = f"is not a raw concatenation of shards: {diagnosis.finding}"
        raise ShardError(message, where=path, hint=diagnosis.next_step)


def _carry_out(
    plan: Plan,
    output: Path,
    overwrite: bool,
    consume: bool = False,
    in_place: bool = False,
    *,
    progress: bool,
) -> MergeResult:
    """Check, copy, check again, keep the hashes, and only then give the file its name."""
    check_output(output, plan, overwrite=overwrite, consume=consume, in_place=in_place)
    began, results = time.perf_counter(), list[MergeResult]()

    def record(part: Path, copied: Copied) -> None:
        sha256, hashes, sources = copied
        if not plan.tensors:  # the header went on in the second byte part, or the file is a shard
            hashes = tensor_hashes([read_header(part)], progress=progress)
        seconds = time.perf_counter() - began
        save_manifest(output, part, sha256, hashes, sources, seconds)
        results.append(MergeResult(output, plan.nbytes, sha256, hashes, sources, seconds))

    options = {"consume": consume, "replace": overwrite or in_place, "progress": progress}
    try:
        copy(plan, output, lambda part: validate(part, plan), record, **options)
    except BaseException:
        if results and earlier_result(output) is None:
            manifest_path(output).unlink(missing_ok=True)  # another file has the name
        raise
    return results[0]


def validate(path: Path, plan: Plan) -> None:
    """Check a file's header: by this package's reader, by llama.cpp's parser, and against the plan.

    `IntegrityError`: the parser refuses it, or it is not the planned one.
    """
    from dfqs_nb.llama.check import parse  # here: it is slow to import

    header = read_header(path)
    check_layout(header)
    verdict = parse(path)
    if not verdict.accepted:
        hint = f"`dfqs-nb inspect {' '.join(map(quoted, plan.sources))}` says what the sources are"
        raise IntegrityError(f"llama.cpp refuses the result: {verdict.reason}", where=path, hint=hint)
    planned = [(tensor.name, tensor.target_offset, tensor.nbytes) for tensor in plan.tensors]
    written = [(t.name, header.data_offset + t.offset, t.nbytes) for t in header.tensors]
    if header.file_size != plan.nbytes or (planned and written != planned):
        hint = "the disk may be failing: use another"
        raise IntegrityError("the written header is not the planned one", where=path, hint=hint)


def earlier_result(output: Path) -> MergeResult | None:
    """The result in the manifest of ``output``, if it is the file of that size, time and inode."""
    try:
        kept, stat = read_manifest(output), output.stat()
        if kept is None or (kept.mtime_ns, kept.inode) != (stat.st_mtime_ns, stat.st_ino):
            return None
    except (OSError, IntegrityError):
        return None
    return MergeResult(output, kept.nbytes, kept.sha256, kept.tensors, tuple(kept.sources), kept.seconds)


def _finish_consumed(model: Given, output: Path) -> MergeResult | None:
    """Finish a consuming merge that was killed after its file had its name: delete the emptied sources.

    Nothing is deleted on a journal's word: the output must have the hash of its manifest, and a source must
    lie in the folder that was named, and have nothing left in it but its header.
    """
    journal = read_journal(output)
    earlier = earlier_result(output) if journal and not disk.part_path(output).exists() else None
    if earlier is None or journal[0].get("sources") != list(earlier.sources):
        return None
    if sha256_of(output) != earlier.sha256:
        hint = "keep what is left of its sources"
        raise IntegrityError("differs from its manifest", where=output, hint=hint)
    with disk.readable_errors(output, 0, "run the same command again"), disk.only_writer(output):
        folders = {path if path.is_dir() else path.parent for path in map(Path, _each(model))}
        for path in (folder / str(source["name"]) for folder in folders for source in earlier.sources):
            if path.is_file() and not path.is_symlink() and not path.samefile(output) and _emptied(path):
                path.unlink()
        disk.journal_path(output).unlink(missing_ok=True)
    return earlier


def _emptied(path: Path) -> bool:
    """Whether a consuming copy gave back every whole block behind a file's header."""
    try:
        start = read_header(path).data_offset
    except HeaderError:
        start = 0  # a later byte part
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        first, last = padded(start, status.st_blksize), status.st_size - 2 * status.st_blksize
        return first < last <= disk.next_data(file.fileno(), first)


def _merged_before(model: Given, folder: Path) -> ShardError | None:
    """An error that says where a model is whose shards an earlier merge deleted."""
    names = {Path(given).name for given in _each(model) if not Path(given).exists()}
    for manifest in sorted(folder.glob("*.manifest.json")):
        output = manifest.with_name(manifest.name.removesuffix(".manifest.json"))
        earlier = earlier_result(output)
        if earlier and names & {str(source["name"]) for source in earlier.sources}:
            hint = f"go on with the merged model: dfqs-nb run --model {quoted(output)}"
            return ShardError("was merged and then deleted (consume)", where=sorted(names)[0], hint=hint)
    return None


def methods_table(nbytes: int, header_nbytes: int, reported: dict[str, str]) -> pd.DataFrame:
    """Ways to one file, for its size and its header's in bytes: extra disk, and what stays unchecked.

    ``reported`` has seconds, by method. What the reference tool does is read from llama.cpp's source.
    """
    import pandas as pd

    consuming = min(CONSUME_EXTRA_BYTES, nbytes) + header_nbytes
    rows = {
        "raw concatenation (cat)": (nbytes, "no", "no", "no", "stays half written"),
        "llama-gguf-split --merge": (nbytes, "yes", "no", "no", "stays half written"),
        "merge, repair": (nbytes, "yes", "yes", "yes", "resumes"),
        "merge --consume, repair --in-place": (consuming, "yes", "yes", "yes", "resumes"),
    }
    columns = ["extra disk (bytes)", "loads", "hashed", "read back", "after a kill"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("method")
    table["seconds here"] = [reported.get(method, "not measured") for method in rows]
    return table
