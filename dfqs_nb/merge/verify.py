"""Prove that a model's bytes are what a hash, a manifest or its shards say, and name the tensor where not.

A manifest, ``<model>.manifest.json`` beside the model, has the SHA-256 of the whole, and the XXH64 of each
tensor as ``llama-gguf-hash --xxh64`` prints it. A merge leaves one; `verify_model` writes one for any file.
"""

from __future__ import annotations

import ctypes
import glob
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from dfqs_nb.core.display import quoted, tqdm
from dfqs_nb.core.errors import IntegrityError
from dfqs_nb.core.files import CHUNK_BYTES, read_json, sha256_of_file, write_json
from dfqs_nb.gguf import models
from dfqs_nb.gguf.header import GGUFHeader, Tensor, check_layout, read_header
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.gguf.types import TENSOR_TYPES
from dfqs_nb.merge.kind import Diagnosis, Kind, diagnose
from dfqs_nb.merge.plan import Copy, Plan, identities

if TYPE_CHECKING:
    import pandas as pd

NAMED_AT_MOST = 8  # damaged tensors in one message
Sources = Sequence[dict[str, Any]]
AGAIN = "get it from its source again, or merge its shards again"
ZEROS_BYTES = 4096  # the disk's block: a lost write leaves whole ones
FEWEST_ZEROS = 16  # such blocks in a row; rows of unused tokens can be zeros, too


@dataclass(frozen=True)
class Verification:
    """A file whose bytes passed every comparison that could be made.

    ``tensors`` has XXH64 by name; ``compared`` what the bytes are equal to, in words; ``published`` the name
    of the registered model that has this hash, or "". ``diagnosis.sound``: a runtime may take it.
    """

    path: Path
    nbytes: int
    sha256: str
    tensors: dict[str, str]
    compared: tuple[str, ...]
    published: str
    diagnosis: Diagnosis

    @property
    def meaning(self) -> tuple[str, ...]:
        """What this proves and what it does not, in sentences."""
        first = "its bytes were compared with nothing: there is no hash, given or published, and no manifest"
        if self.compared:
            first = f"its bytes are equal to {', '.join(self.compared)}"
        authentic = f"it is authentic: byte for byte what was published as {self.published}"
        loads = "its header is sound and its tensors lie where it says; that it runs was not tried"
        if not self.diagnosis.sound:
            loads = f"{'yet ' if self.compared else ''}it does not load: {self.diagnosis.finding}"
        return (first, *([authentic] if self.published else []), loads)


def verify_model(
    path: str | Path,
    *,
    sha256: str | None = None,
    against: str | Path | Sequence[str | Path] | None = None,
    data: bool = False,
    write_manifest: bool = False,
    progress: bool = True,
) -> Verification:
    """Read a model once, and compare it with all there is to compare it with.

    That is: the hash given; the hash published for a file of its name and size (``data/models.toml``); its
    manifest; the tensors of the shards (or the raw concatenation) it was made from. ``data``: read the
    tensors once more, and look for runs of zeros and for scales that are not numbers.

    Raises:
        IntegrityError: bytes differ (the message names the damaged tensors, where a manifest or shards tell
            them), or the file changed meanwhile.
        HeaderError, LayoutError, ShardError: a file is too broken to compare, or not a model.
    """
    path, began = Path(path), time.perf_counter()
    diagnosis, before, manifest = diagnose(path), identities([path]), read_manifest(path)
    headers = diagnosis.headers
    if diagnosis.kind is not Kind.RAW_CONCATENATION:
        headers = (read_header(path),)
        check_layout(headers[0])
    digest, tensors = hash_file(path, headers, progress=progress)
    expected: dict[str, dict[str, str]] = {"its manifest": manifest.tensors} if manifest else {}
    if against:
        glued = diagnose(against) if isinstance(against, (str, Path)) else None
        is_glued = glued is not None and glued.kind is Kind.RAW_CONCATENATION
        theirs = glued.headers if glued and is_glued else open_shards(against).headers
        expected["the tensors of its shards"] = tensor_hashes(theirs, progress=progress)
    for what, hashes in expected.items():
        _compare(path, tensors, hashes, what)
    published, known = _published(path, digest)
    kept = manifest.sha256 if manifest else ""
    wholes = {"the SHA-256 that was given": sha256, "the SHA-256 in its manifest": kept}
    wholes["its published SHA-256"] = known
    for what, other in wholes.items():
        if other and other.lower() != digest:
            equal = "; its tensors are those of its manifest, so header or padding was changed"
            message = f"SHA-256 is {digest}, {what} is {other.lower()}{equal if manifest else ''}"
            raise IntegrityError(message, where=path, hint=f"the file was changed or damaged: {AGAIN}")
    if data:
        check_data(headers, progress=progress)
    if identities([path]) != before:
        raise IntegrityError("changed while it was read", where=path, hint="try again when it is at rest")
    if write_manifest and diagnosis.kind is Kind.UNFINISHED:
        raise IntegrityError(f"gets no manifest: {diagnosis.finding}", where=path, hint=diagnosis.next_step)
    if write_manifest:
        save_manifest(path, path, digest, tensors, (), time.perf_counter() - began)
    compared = (*expected, *(what for what, other in wholes.items() if other))
    return Verification(path, path.stat().st_size, digest, tensors, compared, published, diagnosis)


def _published(path: Path, sha256: str) -> tuple[str, str]:
    """Title and SHA-256 of the registered file that has this hash, or that has this name and size; or ""."""
    files = [(model, file) for model in models.registered().values() for file in model.files]
    this = path.name, path.stat().st_size
    known = [(model, file) for model, file in files if file.sha256 == sha256]
    known += [(model, file) for model, file in files if (file.name, file.size_bytes) == this]
    return (f"{known[0][1].name} of {known[0][0].name}", known[0][1].sha256) if known else ("", "")


def _compare(path: Path, ours: dict[str, str], expected: dict[str, str], what: str) -> None:
    damaged = [name for name in expected if name in ours and ours[name] != expected[name]]
    if damaged:
        message = f"{len(damaged)} of {len(expected):,} tensors differ from {what}: {_named(damaged)}"
        raise IntegrityError(message, where=path, hint=AGAIN)
    if odd := sorted(ours.keys() ^ expected.keys()):
        message = f"has not the same tensors as {what}: {_named(odd)}"
        raise IntegrityError(message, where=path, hint="these are of different models")


def _named(names: Iterable[str]) -> str:
    first = list(names)
    return ", ".join(first[:NAMED_AT_MOST]) + ", ..." * (len(first) > NAMED_AT_MOST)


# ---- the manifest ----


@dataclass(frozen=True)
class Manifest:
    """What a manifest holds; ``tensors`` has XXH64 by name."""

    nbytes: int
    mtime_ns: int
    sha256: str
    seconds: float
    sources: list[dict[str, Any]]
    tensors: dict[str, str]
    inode: int = 0


def manifest_path(output: Path) -> Path:
    """Where the hashes of ``output`` are kept: beside it."""
    return output.with_name(output.name + ".manifest.json")


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of a model, or None; `IntegrityError`: it cannot be read, or is of another size."""
    place = manifest_path(path)
    if not place.exists():
        return None
    from pydantic import TypeAdapter, ValidationError  # here: it is slow to import

    try:
        manifest = TypeAdapter(Manifest).validate_python(read_json(place))
    except (OSError, ValueError) as error:
        problem = str(error)
        if isinstance(error, ValidationError):
            problem = f"{'.'.join(map(str, error.errors()[0]['loc'])) or 'it'} is not what it should be"
        hint = f"remove it; if you trust the model: `dfqs-nb verify {quoted(path)} --write-manifest`"
        raise IntegrityError(f"cannot be read ({problem})", where=place, hint=hint) from error
    size = path.stat().st_size
    if manifest.nbytes != size:
        message = f"has {size:,} bytes, its manifest says {manifest.nbytes:,}"
        raise IntegrityError(message, where=path, hint=AGAIN)
    return manifest


def save_manifest(
    output: Path, file: Path, sha256: str, tensors: dict[str, str], sources: Sources, seconds: float
) -> None:
    """Write the manifest of ``output``, whole or not at all; ``file`` is where its bytes are now."""
    stat, place = file.stat(), manifest_path(output)
    stem = glob.escape(os.fsdecode(os.fsencode(place.name)[:80]))  # as `whole_file` names its temporary file
    for stale in place.parent.glob(f".{stem}.*.part"):
        stale.unlink()  # of a run that was killed here
    facts = {"nbytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino, "sha256": sha256}
    facts |= {"seconds": seconds, "sources": list(sources), "tensors": tensors}
    write_json(place, {"file": output.name, **facts})


# ---- hashes ----


def hash_file(
    path: Path, headers: Sequence[GGUFHeader], *, progress: bool = True
) -> tuple[str, dict[str, str]]:
    """SHA-256 of a file and XXH64 of the tensors of the headers in it, in one reading."""
    size, position = path.stat().st_size, 0
    placed = [Copy(t.name, 0, 0, h.data_offset + t.offset, t.nbytes) for h in headers for t in h.tensors]
    runs = tuple(sorted(placed, key=lambda run: run.target_offset))
    plan, digests = Plan((path,), b"", runs, size, (), runs), {run.name: xxhash.xxh64() for run in runs}

    def update(chunk: bytes) -> None:
        nonlocal position
        for run, low, high in plan.within(runs, position, len(chunk)):
            at = run.target_offset - position
            digests[run.name].update(memoryview(chunk)[at + low : at + high])
        position += len(chunk)
        bar.update(len(chunk))

    with tqdm(total=size, unit="B", unit_scale=True, desc="hash", disable=not progress) as bar:
        try:
            sha256 = sha256_of_file(path, update)
        except OSError as error:
            hint = "the disk may be failing: copy or download the file again"
            raise IntegrityError(f"cannot be read ({error.strerror})", where=path, hint=hint) from error
    if position != size:
        raise IntegrityError("ended while it was read", where=path, hint="try again when it is at rest")
    return sha256, {name: digest.hexdigest() for name, digest in digests.items()}


def tensor_hashes(headers: Sequence[GGUFHeader], *, progress: bool = True) -> dict[str, str]:
    """XXH64 of every tensor of these headers, by name, as ``llama-gguf-hash --xxh64`` has it.

    `LayoutError`: the data is not where a header says.
    """
    hashes: dict[str, str] = {}
    for header in headers:
        check_layout(header)
    for path in dict.fromkeys(header.path for header in headers):
        inside = [header for header in headers if header.path == path]
        hashes |= hash_file(path, inside, progress=progress)[1]
    return {tensor.name: hashes[tensor.name] for header in headers for tensor in header.tensors}


def check_data(headers: Sequence[GGUFHeader], *, progress: bool = True) -> None:
    """Look at the tensors' own bytes for what a lost write or a broken conversion leaves.

    `IntegrityError` names the tensors that have a long run of zeros, or values or scales that are not finite
    numbers, by llama.cpp's own check (``ggml_validate_row_data``).
    """
    from dfqs_nb.llama.graph import ggml_function

    arguments = ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t
    validate = ggml_function("ggml_validate_row_data", ctypes.c_bool, *arguments)
    zeros: dict[str, int] = {}
    broken: dict[str, None] = {}
    total = sum(tensor.nbytes for header in headers for tensor in header.tensors)
    with tqdm(total=total, unit="B", unit_scale=True, desc="data", disable=not progress) as bar:
        for tensor, piece in _tensor_data(headers):
            if not validate(tensor.type_code, piece, len(piece)):
                broken[tensor.name] = None
            if run := _run_of_zeros(piece):
                zeros[tensor.name] = zeros.get(tensor.name, 0) + run
            bar.update(len(piece))
    if broken:
        message = f"{len(broken)} tensors hold values that are not finite numbers: {_named(broken)}"
        raise IntegrityError(message, where=headers[0].path, hint=AGAIN)
    if zeros:
        rows = _named(f"{name} ({nbytes:,} bytes)" for name, nbytes in zeros.items())
        message = f"{len(zeros)} tensors have long runs of zeros, as lost writes leave: {rows}"
        hint = "compare its SHA-256 with a published one, or download it again"
        raise IntegrityError(message, where=headers[0].path, hint=hint)


def _tensor_data(headers: Sequence[GGUFHeader]) -> Iterator[tuple[Tensor, bytes]]:
    """Each tensor's bytes, in pieces of whole quantization blocks."""
    for header in headers:
        with header.path.open("rb", buffering=0) as file:
            for tensor in header.tensors:
                block = TENSOR_TYPES[tensor.type_code][2]
                most = CHUNK_BYTES // block * block
                file.seek(header.data_offset + tensor.offset)
                for start in range(0, tensor.nbytes, most):
                    yield tensor, file.read(min(most, tensor.nbytes - start))


def _run_of_zeros(piece: bytes) -> int:
    """Bytes of the longest run of zero blocks, where it is too long for rows of unused tokens; else 0."""
    import numpy as np

    n_blocks = len(piece) // ZEROS_BYTES
    blocks = np.frombuffer(piece, np.uint8)[: n_blocks * ZEROS_BYTES].reshape(-1, ZEROS_BYTES)
    edges = np.concatenate(([-1], np.flatnonzero(blocks.any(axis=1)), [n_blocks]))
    longest = int(np.diff(edges).max()) - 1
    return longest * ZEROS_BYTES if longest >= FEWEST_ZEROS else 0


def compare_tensors(model: str | Path, shards: str | Path | Sequence[str | Path]) -> pd.DataFrame:
    """Hash every tensor of ``model`` and of ``shards`` anew, and set them side by side.

    One row a tensor: index ``tensor``; columns ``shard``, ``bytes``, ``in_shard``, ``in_file`` (XXH64) and
    ``equal``. A tensor that one side lacks has an empty hash there.
    """
    import pandas as pd

    header = read_header(model)
    ours = tensor_hashes([header])
    rows = {tensor.name: (0, tensor.nbytes, "", ours[tensor.name]) for tensor in header.tensors}
    for number, shard in enumerate(open_shards(shards).headers, 1):
        theirs = tensor_hashes([shard])
        for t in shard.tensors:
            rows[t.name] = (number, t.nbytes, theirs[t.name], ours.get(t.name, ""))
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["shard", "bytes", "in_shard", "in_file"])
    return table.assign(equal=table["in_shard"] == table["in_file"]).rename_axis("tensor")
