"""Prove that a model's bytes are what a hash, a manifest or its shards say, and name the tensor where not.

A manifest, ``<model>.manifest.json`` beside the model, has the SHA-256 of the whole, and the XXH64 of each
tensor as ``llama-gguf-hash --xxh64`` prints it. A merge leaves one; `verify_model` writes one for any file.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from dfqs_nb.core.display import quoted, tqdm
from dfqs_nb.core.errors import DfqsError, IntegrityError, OutputError
from dfqs_nb.core.files import read_json, remove_stale, sha256_of_file, write_json
from dfqs_nb.gguf import models
from dfqs_nb.gguf.header import GGUFHeader, check_layout, read_header
from dfqs_nb.gguf.shards import Files, open_shards
from dfqs_nb.merge.copy import Copy, identities, overlaps
from dfqs_nb.merge.disk import Identity
from dfqs_nb.merge.kind import Diagnosis, Kind, diagnose

NAMED_AT_MOST = 8  # damaged tensors in one message
AGAIN = "get it from its source again, or merge its shards again"


@dataclass(frozen=True)
class Hashes:
    """A model's file; ``tensors``: the XXH64 of each tensor's bytes, as ``llama-gguf-hash`` prints it."""

    path: Path
    nbytes: int
    sha256: str
    tensors: dict[str, str]


@dataclass(frozen=True)
class Verification(Hashes):
    """A file whose bytes passed every comparison that could be made.

    ``compared``: what the bytes are equal to, in words. ``published``: the name of the registered model that
    has this hash, or "". ``diagnosis.sound``: a runtime may take it.
    """

    compared: tuple[str, ...]
    published: str
    diagnosis: Diagnosis
    zeros: tuple[str, ...]  # tensors that hold only zeros

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
        zeros = f"{len(self.zeros)} of {len(self.tensors):,} tensors hold only zeros: {_named(self.zeros)}"
        told = [f"{zeros} (so may a bias)"] if self.zeros and not self.published else []
        return (first, *([authentic] if self.published else []), *told, loads)


def verify_model(
    path: str | Path,
    *,
    sha256: str = "",
    against: Files | Sequence[str | Path] | None = None,
    write_manifest: bool = False,
) -> Verification:
    """Read a model once, and compare it with all there is to compare it with.

    That is: the hash given; the hash published for a file of its name and size (``data/models.toml``); its
    manifest; the tensors of its shards. `IntegrityError`: bytes differ (it names the tensors, where it can).
    `HeaderError`, `LayoutError`, `ShardError`: a file is too broken to compare. `OutputError`: no right to
    write a manifest.
    """
    path, began = Path(path), time.perf_counter()
    if sha256 and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise DfqsError(f"{sha256!r} is no SHA-256", hint="give its 64 hexadecimal digits")
    if write_manifest and path.exists() and not os.access(path.parent, os.W_OK):
        hint = "move the file to a folder that you may write, or verify it without a manifest"
        raise OutputError("no manifest can be written here", where=path.parent, hint=hint)
    if write_manifest:
        remove_stale(manifest_path(path))
    diagnosis, before, manifest = diagnose(path), identities([path]), read_manifest(path)
    headers = diagnosis.headers or (read_header(path),)
    if diagnosis.kind is not Kind.RAW_CONCATENATION:
        headers = headers[:1]
        check_layout(headers[0])
    digest, tensors, zeros = hash_file(path, headers)
    published, known = _published(path.name, diagnosis.nbytes, digest)
    equal: list[str] = []
    if manifest:
        equal.append(_compared(path, tensors, manifest.tensors, "its manifest"))
    if against:
        hashes = open_shards(against).tensor_hashes()
        equal.append(_compared(path, tensors, hashes, "the tensors of its shards"))
    kept = manifest.sha256 if manifest else None
    wholes = {"the SHA-256 that was given": sha256, "the SHA-256 in its manifest": kept}
    for what, other in {**wholes, "its published SHA-256": known}.items():
        if other and other.lower() != digest:
            inner = "; its tensors are those of its manifest, so header or padding was changed"
            inner = inner if kept and kept != digest else ""
            message = f"SHA-256 is {digest}, {what} is {other.lower()}{inner}"
            raise IntegrityError(message, where=path, hint=f"the file was changed or damaged: {AGAIN}")
        equal += [what] if other else []
    if identities([path]) != before:
        raise IntegrityError("changed while it was read", where=path, hint="try again when it is at rest")
    if write_manifest:
        if diagnosis.kind is Kind.UNFINISHED:
            what = f"gets no manifest: {diagnosis.finding}"
            raise IntegrityError(what, where=path, hint=diagnosis.next_step)
        seconds = time.perf_counter() - began
        save_manifest(MergeResult(path, diagnosis.nbytes, digest, tensors, (), seconds), path)
    return Verification(path, diagnosis.nbytes, digest, tensors, tuple(equal), published, diagnosis, zeros)


def _published(name: str, nbytes: int, sha256: str) -> tuple[str, str]:
    """Title and SHA-256 of the registered file that has this hash, or that has this name and size; or ""."""
    files = [(model, file) for model in models.registered().values() for file in model.files]
    known = [(model, file) for model, file in files if file.sha256 == sha256]
    known += [(model, file) for model, file in files if (file.name, file.size_bytes) == (name, nbytes)]
    return (f"{known[0][1].name} of {known[0][0].name}", known[0][1].sha256) if known else ("", "")


def _compared(path: Path, ours: dict[str, str], expected: dict[str, str], what: str) -> str:
    """``what``, if these hashes are equal to those; else an `IntegrityError` names the tensors."""
    damaged = [name for name in expected if name in ours and ours[name] != expected[name]]
    if damaged:
        message = f"{len(damaged)} of {len(expected):,} tensors differ from {what}: {_named(damaged)}"
        raise IntegrityError(message, where=path, hint=AGAIN)
    if odd := sorted(ours.keys() ^ expected.keys()):
        message = f"has not the same tensors as {what}: {_named(odd)}"
        raise IntegrityError(message, where=path, hint="these are of different models")
    return what


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED_AT_MOST]) + ", ..." * (len(names) > NAMED_AT_MOST)


@dataclass(frozen=True)
class MergeResult(Hashes):
    """A model that passed every check, as its manifest keeps it; ``mtime_ns`` and ``inode`` of its file."""

    sources: tuple[Identity, ...]
    seconds: float
    mtime_ns: int = 0
    inode: int = 0


def manifest_path(output: Path) -> Path:
    """Where the hashes of ``output`` are kept: beside it."""
    return output.with_name(output.name + ".manifest.json")


def read_manifest(path: Path) -> MergeResult | None:
    """What the manifest of a model holds, or None; `IntegrityError`: it is broken, or of another size."""
    place = manifest_path(path)
    if not place.exists():
        return None
    from pydantic import TypeAdapter  # here: it is slow to import

    try:
        kept = TypeAdapter(MergeResult).validate_python({**read_json(place), "path": path})
    except (OSError, ValueError, TypeError) as error:  # no file, no JSON, no object, or other fields
        hint = f"remove it; if you trust the model: `dfqs-nb verify {quoted(path)} --write-manifest`"
        raise IntegrityError("cannot be read as a manifest", where=place, hint=hint) from error
    size = path.stat().st_size
    if kept.nbytes != size:
        message = f"has {size:,} bytes, its manifest says {kept.nbytes:,}"
        raise IntegrityError(message, where=path, hint=AGAIN)
    return kept


def save_manifest(result: MergeResult, file: Path) -> None:
    """Write the manifest of a result, whole or not at all; ``file`` is where its bytes are now."""
    stat = file.stat()
    content = {"file": result.path.name, "nbytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    content |= {"inode": stat.st_ino, "sha256": result.sha256, "seconds": result.seconds}
    write_json(manifest_path(result.path), {**content, "sources": result.sources, "tensors": result.tensors})


def hash_file(path: Path, headers: Sequence[GGUFHeader]) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """SHA-256 of a file, XXH64 of the tensors of its headers, and which are only zeros, in one reading."""
    size, position = headers[0].file_size, 0
    placed = [Copy(t.name, 0, 0, h.data_offset + t.offset, t.nbytes) for h in headers for t in h.tensors]
    runs = sorted(placed, key=lambda run: run.target_offset)
    digests = {run.name: xxhash.xxh64() for run in runs}
    zeros = dict.fromkeys(run.name for run in runs if run.nbytes)

    def update(chunk: bytes) -> None:
        nonlocal position
        for run, low, high in overlaps(runs, position, len(chunk)):
            at = run.target_offset - position
            digests[run.name].update(piece := memoryview(chunk)[at + low : at + high])
            if run.name in zeros and bytes(piece).strip(b"\0"):
                del zeros[run.name]
        position += len(chunk)
        bar.update(len(chunk))

    with tqdm(total=size, unit="B", unit_scale=True, desc="hash") as bar:
        try:
            sha256 = sha256_of_file(path, on_chunk=update)
        except OSError as error:
            hint = "the disk may be failing: copy or download the file again"
            raise IntegrityError(f"cannot be read ({error.strerror})", where=path, hint=hint) from error
    if position != size:
        raise IntegrityError("ended while it was read", where=path, hint="try again when it is at rest")
    return sha256, {name: digest.hexdigest() for name, digest in digests.items()}, tuple(zeros)
