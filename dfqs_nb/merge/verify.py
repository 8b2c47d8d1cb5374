"""Prove that a model's bytes are what a hash, a manifest or its shards say, and name the tensor where not.

A manifest is a file beside the model, ``<model>.manifest.json``: the SHA-256 of the whole, and the XXH64 of
each tensor as ``llama-gguf-hash --xxh64`` prints it. ``merge`` and ``repair`` leave one; ``write_manifest``
makes one for any other model.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import IntegrityError
from dfqs_nb.core.files import CHUNK_BYTES, write_json
from dfqs_nb.gguf.header import GGUFHeader, check_layout, read_header
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.merge.copy import N_BUFFERS, hash_range, identities
from dfqs_nb.merge.kind import Diagnosis, Kind, diagnose, raw_concatenation

if TYPE_CHECKING:
    import pandas as pd

NAMED_AT_MOST = 8  # damaged tensors in one message
AGAIN = "get it from its source again, or merge its shards again"


@dataclass(frozen=True)
class Verification:
    """A file whose bytes passed every comparison that could be made.

    Attributes:
        sha256: of the whole file, in lower-case hex.
        tensors: XXH64 of each tensor's bytes, by name.
        compared: what the bytes were found equal to, in words; empty when there was nothing to compare with.
        published: name of the registered model that this file is, by its published hash; or empty.
        diagnosis: what the file is; ``diagnosis.sound`` says whether a runtime may take it.
    """

    path: Path
    nbytes: int
    sha256: str
    tensors: dict[str, str]
    compared: tuple[str, ...]
    published: str
    diagnosis: Diagnosis
    seconds: float

    @property
    def meaning(self) -> tuple[str, ...]:
        """What this proves and what it does not, in sentences."""
        first = (
            f"its bytes are equal to {', '.join(self.compared)}"
            if self.compared
            else (
                "its bytes were compared with nothing: no hash was given or is published, and it has no manifest"
            )
        )
        authentic = f"it is authentic: byte for byte what was published as {self.published}"
        loads = "its header is sound and its tensors lie where it says; that it runs was not tried"
        if not self.diagnosis.sound:
            loads = f"{'yet ' if self.compared else ''}it does not load: {self.diagnosis.finding}"
        return (first, *([authentic] if self.published else []), loads)


def verify(
    path: str | Path,
    *,
    sha256: str | None = None,
    against: str | Path | Sequence[str | Path] | None = None,
    progress: bool = True,
) -> Verification:
    """Read a model once, and compare it with all there is to compare it with.

    That is: the hash given; the hash published for a file of its name and size (``data/models.toml``); its
    manifest; the tensors of the shards (or the raw concatenation) it was made from.

    Raises:
        IntegrityError: bytes differ; names the damaged tensors where a manifest or shards tell them.
        HeaderError, LayoutError, ShardError: a file is too broken to compare, or not a model.
    """
    path, began = Path(path), time.perf_counter()
    diagnosis, kept = diagnose(path), read_manifest(path)
    with ThreadPoolExecutor(1) as beside:
        theirs = beside.submit(_hashes_of, against, progress) if against else None
        found, ours = hash_once(path, _headers(path, diagnosis), progress=progress)
        expected = {
            "its manifest": kept["tensors"] if kept else None,
            "the tensors of its shards": theirs.result() if theirs else None,
        }
    published = _published(path, found)
    for what, hashes in expected.items():
        if hashes is not None:
            _compare_hashes(path, ours, hashes, what)
    wholes = {
        "the SHA-256 that was given": sha256,
        "the SHA-256 in its manifest": kept and kept["sha256"],
        "its published SHA-256": published and published[1],
    }
    for what, digest in wholes.items():
        if digest and digest.lower() != found:
            raise _differs(path, found, digest, what, bool(kept))
    compared = [what for what, value in (*expected.items(), *wholes.items()) if value]
    return Verification(
        path,
        path.stat().st_size,
        found,
        ours,
        tuple(compared),
        published[0] if published else "",
        diagnosis,
        time.perf_counter() - began,
    )


def _headers(path: Path, diagnosis: Diagnosis) -> Sequence[GGUFHeader]:
    if diagnosis.kind is Kind.RAW_CONCATENATION:
        return raw_concatenation(path)
    header = read_header(path)
    check_layout(header)
    return [header]


def _hashes_of(files: str | Path | Sequence[str | Path], progress: bool) -> dict[str, str]:
    if isinstance(files, (str, Path)) and diagnose(files).kind is Kind.RAW_CONCATENATION:
        return tensor_hashes(raw_concatenation(files), progress=progress)
    return tensor_hashes(open_shards(files).headers, progress=progress)


def _published(path: Path, sha256: str) -> tuple[str, str] | None:
    """Title and SHA-256 of the registered file that has this hash, or that has this name and size."""
    from dfqs_nb.gguf.models import registered

    files = [(model, file) for model in registered().values() for file in model.files]
    this = path.name, path.stat().st_size
    known = [(model, file) for model, file in files if file.sha256 == sha256] or [
        (model, file) for model, file in files if (file.name, file.size_bytes) == this
    ]
    return (f"{known[0][1].name} of {known[0][0].name}", known[0][1].sha256) if known else None


def _compare_hashes(path: Path, ours: dict[str, str], expected: dict[str, str], what: str) -> None:
    damaged = [name for name in expected if name in ours and ours[name] != expected[name]]
    if damaged:
        names = ", ".join(damaged[:NAMED_AT_MOST]) + (", ..." if len(damaged) > NAMED_AT_MOST else "")
        raise IntegrityError(
            f"{len(damaged)} of {len(expected):,} tensors differ from {what}: {names}", where=path, hint=AGAIN
        )
    odd = sorted(ours.keys() ^ expected.keys())
    if odd:
        raise IntegrityError(
            f"has not the same tensors as {what}: {', '.join(odd[:NAMED_AT_MOST])}",
            where=path,
            hint="these are of different models",
        )


def _differs(path: Path, found: str, expected: str, what: str, tensors_equal: bool) -> IntegrityError:
    so = "; its tensors are those of its manifest, so header or padding was changed" if tensors_equal else ""
    return IntegrityError(
        f"SHA-256 is {found}, {what} is {expected.lower()}{so}",
        where=path,
        hint="the file was changed or damaged: get it from its source again",
    )


# ---- the manifest ----


def manifest_path(output: Path) -> Path:
    """Where the hashes of ``output`` are kept: beside it."""
    return output.with_name(output.name + ".manifest.json")


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a model, or ``None`` when it has none.

    Raises:
        IntegrityError: it cannot be read, or is of a file of another size.
    """
    place = manifest_path(path)
    try:
        kept = json.loads(place.read_text(encoding="utf-8"))
        known, nbytes = (kept["sha256"], kept["tensors"]), kept["nbytes"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"cannot be read ({error})",
            where=place,
            hint="remove it, if you trust the model file, and write it anew",
        ) from error
    if nbytes != path.stat().st_size or not all(known):
        raise IntegrityError(
            f"has {path.stat().st_size:,} bytes, its manifest says {nbytes:,}", where=path, hint=AGAIN
        )
    return kept


def write_manifest(path: str | Path, *, progress: bool = True) -> Path:
    """Hash a model as it is now, and keep the hashes beside it, for a later ``verify``.

    Raises:
        IntegrityError: the file changed while it was read.
        HeaderError, LayoutError: it is not a sound model.
    """
    path, began = Path(path), time.perf_counter()
    before = identities([path])
    sha256, tensors = hash_once(path, _headers(path, diagnose(path)), progress=progress)
    if identities([path]) != before:
        raise IntegrityError("changed while it was read", where=path, hint="try again when it is at rest")
    return save_manifest(path, sha256, tensors, (), time.perf_counter() - began)


def save_manifest(
    path: Path, sha256: str, tensors: dict[str, str], sources: Sequence[dict[str, Any]], seconds: float
) -> Path:
    """Write the manifest of ``path``, whole or not at all."""
    stat = path.stat()
    return write_json(
        manifest_path(path),
        {
            "file": path.name,
            "nbytes": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "sha256": sha256,
            "seconds": seconds,
            "sources": list(sources),
            "tensors": tensors,
        },
    )


# ---- hashes ----


def hash_once(
    path: Path,
    headers: Sequence[GGUFHeader],
    *,
    progress: bool = True,
) -> tuple[str, dict[str, str]]:
    """SHA-256 of a file and XXH64 of its tensors, in one reading: the first on a core of its own.

    Raises:
        IntegrityError: the file cannot be read to its end.
    """
    ranges = sorted((h.data_offset + t.offset, t.nbytes, t.name) for h in headers for t in h.tensors)
    sha256, digests, first = hashlib.sha256(), {name: xxhash.xxh64() for _, _, name in ranges}, 0
    with ThreadPoolExecutor(1) as pool:
        for start, view, busy in _chunks(path, progress):
            busy.append(pool.submit(sha256.update, view))
            end = start + len(view)
            for low, nbytes, name in ranges[first:]:
                if low >= end:
                    break
                digests[name].update(view[max(low - start, 0) : max(low + nbytes - start, 0)])
            while first < len(ranges) and sum(ranges[first][:2]) <= end:
                first += 1
    return sha256.hexdigest(), {name: digest.hexdigest() for name, digest in digests.items()}


def _chunks(path: Path, progress: bool) -> Iterator[tuple[int, memoryview, list[Future]]]:
    """Offset and bytes of each piece of a file, with a list for the work that still needs these bytes."""
    buffers: list[tuple[bytearray, list[Future]]] = [(bytearray(CHUNK_BYTES), []) for _ in range(N_BUFFERS)]
    size, position, turn = path.stat().st_size, 0, 0
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="verify", disable=not progress)
    with bar, path.open("rb", buffering=0) as file:
        while position < size:
            buffer, busy = buffers[turn]
            while busy:
                busy.pop().result()
            n = _read_into(file, buffer)
            if n == 0:
                raise IntegrityError(
                    "ended while it was read", where=path, hint="try again when it is at rest"
                )
            yield position, memoryview(buffer)[:n], busy
            bar.update(n)
            position, turn = position + n, (turn + 1) % N_BUFFERS


def _read_into(file: Any, buffer: bytearray) -> int:
    try:
        return file.readinto(buffer)
    except OSError as error:
        raise IntegrityError(
            f"cannot be read ({error.strerror})",
            where=file.name,
            hint="the disk may be failing: copy or download the file again",
        ) from error


def tensor_hashes(headers: GGUFHeader | Sequence[GGUFHeader], *, progress: bool = True) -> dict[str, str]:
    """XXH64 of every tensor's bytes, by name: what ``llama-gguf-hash --xxh64`` prints for them.

    Tensors are hashed on all cores, each in pieces of 4 MiB. Several headers (shards) give one dict.

    Raises:
        LayoutError: the data is not where a header says.
    """
    headers = [headers] if isinstance(headers, GGUFHeader) else list(headers)
    for header in headers:
        check_layout(header)
    jobs = [(header, tensor) for header in headers for tensor in header.tensors]
    total = sum(tensor.nbytes for _, tensor in jobs)
    handles = {header.path: os.open(header.path, os.O_RDONLY) for header in headers}
    try:
        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            tqdm(total=total, unit="B", unit_scale=True, desc="hash", disable=not progress) as bar,
        ):

            def work(job):
                header, tensor = job
                found = hash_range(handles[header.path], header.data_offset + tensor.offset, tensor.nbytes)
                bar.update(tensor.nbytes)
                return tensor.name, found

            return dict(pool.map(work, jobs))
    finally:
        for handle in handles.values():
            os.close(handle)


def compare_tensors(
    model: str | Path, shards: str | Path | Sequence[str | Path], *, progress: bool = True
) -> pd.DataFrame:
    """Hash every tensor of ``model`` and of ``shards`` anew, and set them side by side.

    One row a tensor: index ``tensor``; columns ``shard``, ``bytes``, ``in_shard``, ``in_file`` (XXH64) and
    ``equal``. A tensor that one side lacks has an empty hash there.

    Raises:
        HeaderError, LayoutError, ShardError: a file is not sound.
    """
    import pandas as pd

    shard_set, header = open_shards(shards), read_header(model)
    ours = tensor_hashes(header, progress=progress)
    rows = {}
    for number, shard in enumerate(shard_set.headers, 1):
        theirs = tensor_hashes(shard, progress=progress)
        for tensor in shard.tensors:
            rows[tensor.name] = (number, tensor.nbytes, theirs[tensor.name], ours.get(tensor.name, ""))
    for tensor in header.tensors:
        rows.setdefault(tensor.name, (0, tensor.nbytes, "", ours[tensor.name]))
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["shard", "bytes", "in_shard", "in_file"])
    table["equal"] = table["in_shard"] == table["in_file"]
    return table.rename_axis("tensor")
