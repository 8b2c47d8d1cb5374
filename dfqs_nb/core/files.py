"""Files: written whole or not at all, flushed, and hashed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


from collections.abc import Iterable
from typing import TYPE_CHECKING

from dfqs_nb.core.errors import IntegrityError
from dfqs_nb.core.progress import tqdm

if TYPE_CHECKING:
    import pandas as pd


_written: dict[Path, None] = {}  # by this process, in order, since the last stage was written


@contextmanager
def whole_file(path: str | Path, mode: str = "w") -> Iterator[Any]:
    """Open a temporary file beside ``path``; it takes that name only when the block ends well.

    The bytes are flushed to the disk before the rename, so a reader (or a crash) sees the old file
    or the new one, never a part.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        encoding = None if "b" in mode else "utf-8"
        with os.fdopen(handle, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
        fsync_dir(path.parent)
        stood_on(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def fsync_dir(folder: str | Path) -> None:
    """Make a rename in ``folder`` durable (a no-op where folders cannot be opened)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: str | Path, value: Any) -> Path:
    """Write ``value`` as indented JSON, whole or not at all, and return the path."""
    with whole_file(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False, default=str)
        file.write("\n")
    return Path(path)


def write_table(path: str | Path, table: pd.DataFrame, *, index: bool = True) -> Path:
    """Write a frame as CSV, whole or not at all, and return the path."""
    with whole_file(path) as file:
        table.to_csv(file, index=index, lineterminator="\n")
    return Path(path)


def stood_on(path: str | Path) -> None:
    """Note that this process wrote ``path``, or used what it holds: the next stage's seal covers it."""
    _written[Path(path).resolve()] = None


def canonical_sha256(value: Any) -> str:
    """SHA-256, in hex, of a JSON value written in one way only: keys sorted, no spaces.

    >>> canonical_sha256({"b": 1, "a": [0.5]}) == canonical_sha256({"a": [0.5], "b": 1})
    True
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of_file(path: str | Path) -> str:
    """SHA-256, in hex, of a small file's bytes (for models: `verify.sha256_of`, which shows its progress)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


CHUNK_BYTES = 8 << 20


def sha256_of(path: str | Path, *, progress: bool = True) -> str:
    """SHA-256 of a file, in hex."""
    return sha256_each([path], progress=progress)[0]


def sha256_each(
    paths: Iterable[str | Path], *, name: str = "sha256", progress: bool = True
) -> tuple[str, ...]:
    """SHA-256 of each of several files, in hex, under one progress bar of that ``name``."""
    files = [Path(path) for path in paths]
    total, found = sum(path.stat().st_size for path in files), []
    with tqdm(total=total, unit="B", unit_scale=True, desc=name, disable=not progress) as bar:
        for path in files:
            digest = hashlib.sha256()
            with path.open("rb", buffering=0) as file:
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
                    bar.update(len(chunk))
            found.append(digest.hexdigest())
    return tuple(found)


def check_sha256(path: str | Path, expected: str, *, progress: bool = True) -> None:
    """Check a file against the SHA-256 that someone published.

    Raises:
        IntegrityError: they differ; the message shows both.
    """
    found = sha256_of(path, progress=progress)
    if found != expected.lower():
        raise IntegrityError(
            f"SHA-256 is {found}, expected {expected.lower()}",
            where=path,
            hint="the file was changed or damaged: get it from its source again",
        )
