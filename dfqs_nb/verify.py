"""Prove that a merged model holds its shards' tensors, bit for bit, and has the hash it should have."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from dfqs_nb.errors import IntegrityError
from dfqs_nb.gguf_header import GGUFHeader, check_layout, read_header
from dfqs_nb.progress import tqdm
from dfqs_nb.shards import open_shards
from dfqs_nb.transfer import CHUNK_BYTES, hash_range

if TYPE_CHECKING:
    import pandas as pd


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
        with (ThreadPoolExecutor(os.cpu_count()) as pool,
              tqdm(total=total, unit="B", unit_scale=True, desc="hash", disable=not progress) as bar):
            def work(job):
                header, tensor = job
                found = hash_range(handles[header.path], header.data_offset + tensor.offset, tensor.nbytes)
                bar.update(tensor.nbytes)
                return tensor.name, found
            return dict(pool.map(work, jobs))
    finally:
        for handle in handles.values():
            os.close(handle)


def compare_tensors(model: str | Path, shards: str | Path | Sequence[str | Path], *,
                    progress: bool = True) -> pd.DataFrame:
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


def sha256_of(paths: str | Path | Iterable[str | Path], *, progress: bool = True) -> str:
    """SHA-256, in hex, of a file, or of several files' bytes one after another."""
    files = [Path(paths)] if isinstance(paths, (str, Path)) else [Path(path) for path in paths]
    digest, total = hashlib.sha256(), sum(path.stat().st_size for path in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="sha256", disable=not progress) as bar:
        for path in files:
            with path.open("rb", buffering=0) as file:
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
                    bar.update(len(chunk))
    return digest.hexdigest()


def check_sha256(path: str | Path, expected: str, *, progress: bool = True) -> None:
    """Check a file against the SHA-256 that someone published.

    Raises:
        IntegrityError: they differ; the message shows both.
    """
    found = sha256_of(path, progress=progress)
    if found != expected.lower():
        raise IntegrityError(f"SHA-256 is {found}, expected {expected.lower()}", where=path,
                             hint="the file was changed or damaged: get it from its source again")
