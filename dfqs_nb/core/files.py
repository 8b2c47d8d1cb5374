"""Files: written whole or not at all, and hashed."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import OutputError

if TYPE_CHECKING:
    import pandas as pd

# For any text as a name: pathlib raises where it is too long, or holds a NUL.
there_is, is_file = os.path.exists, os.path.isfile
CHUNK_BYTES = 8 << 20
STEERING = re.compile("[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")  # control characters without the spaces
FORMULA = re.compile(r"[=@\t\r]|[+-](?!\d+(\.\d+)?(e[+-]?\d+)?$)")  # signed numbers are none
JSON_BYTES = 256 << 20  # no report, stage or manifest is larger


def check_output(path: Path, sources: Iterable[Path] = (), overwrite: bool = False) -> None:
    """Raise `OutputError` unless a file can have this name and takes none away that should stay."""
    what, hint = "", "choose another name"
    if not path.parent.is_dir():
        what, hint = "its folder does not exist", "make the folder first"
    elif path.exists() and any(path.samefile(source) for source in sources):
        what = "is one of the files that it would be made from"
    elif path.exists() and not path.is_file():
        what, hint = "is no regular file", "name a file, like model.gguf"
    elif os.path.lexists(path) and not overwrite:
        what, hint = "exists already", "choose another name, or pass --overwrite"
    if what:
        raise OutputError(what, where=path, hint=hint)


@contextmanager
def whole_file(path: str | Path, mode: str = "w") -> Iterator[Any]:
    """Open a temporary file beside ``path``; it takes that name only when the block ends without an error."""
    encoding, errors = (None, None) if "b" in mode else ("utf-8", "replace")  # lone surrogates become `?`
    with whole_path(path) as part, part.open(mode, encoding=encoding, errors=errors) as file:
        yield file


@contextmanager
def whole_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` for others to write; it takes that name as `whole_file` does.

    The bytes are on the disk before the rename, so after a crash there is the old file or the new one.
    """
    path = Path(path)
    while True:
        own = path.with_name(f"{_temporary(path)}{os.urandom(4).hex()}.tmp")
        held = own.open("xb")  # with the rights of any new file
        if lock(held) is not False and own.exists():
            break
        held.close()  # another process took it for a stale one, before it was locked
    with held:
        try:
            yield own
            with own.open("rb+") as file:
                os.fsync(file.fileno())
            own.replace(path)
            fsync_dir(path.parent)
        finally:
            own.unlink(missing_ok=True)


def _temporary(path: Path) -> str:
    """How the names of the temporary files of this path, and of no other, begin.

    They end in ``.tmp``: a ``.part`` can hold bytes that nothing else has, and only `merge` may name one.
    """
    name = os.fsencode(path.name)  # its hash is for names that are too long to be taken whole
    return f".{name[:80].decode(errors='ignore')}.{hashlib.sha256(name).hexdigest()[:8]}"


def remove_stale(path: str | Path) -> None:
    """Remove what killed processes left of `whole_path`, of exactly this path; the living hold a lock."""
    path = Path(path)
    for stale in path.parent.glob(f"{glob.escape(_temporary(path))}????????.tmp"):
        with suppress(OSError), stale.open("rb+") as file:
            if lock(file):  # where there are no locks it stays: nobody knows who writes it
                stale.unlink()


def lock(file: IO[Any], how: int = fcntl.LOCK_EX) -> bool | None:
    """Lock a file until it is closed: whether nobody else had it; None where there are no locks."""
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except OSError as error:  # Lustre, CIFS or NFS can be without locks
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


def fsync_dir(folder: str | Path) -> None:
    """Make a rename in ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> Path:
    """Write a text, whole or not at all, and return the path."""
    with whole_file(path) as file:
        file.write(text)
    return Path(path)


def write_json(path: str | Path, value: Any) -> Path:
    """Write ``value`` as indented JSON, whole or not at all, and return the path."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: str | Path) -> Any:
    """The JSON in a file of unknown origin; `ValueError`: no regular file, too large, or as `parse_json`."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")
    if path.stat().st_size > JSON_BYTES:
        raise ValueError(f"larger than {JSON_BYTES:,} bytes")
    return parse_json(path.read_bytes())


def parse_json(raw: bytes) -> Any:
    """JSON of unknown origin; `ValueError`: no JSON, nested too deep, or with NaN or a boundless number."""
    try:
        return json.loads(raw.decode(), parse_constant=_number, parse_float=_number, parse_int=_number)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _number(text: str) -> float:
    """A finite number; an integer of more digits than any count has is a float."""
    value = int(text) if len(text) < 20 and text.lstrip("-").isdigit() else float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no number that is read here")
    return value


def write_table(path: str | Path, table: pd.DataFrame, *, index: bool = True) -> Path:
    """Write a frame as CSV, whole or not at all, and return the path; texts, also of headings, by `_safe`."""
    safe = table.rename(columns=_safe, index=_safe)
    for place, dtype in enumerate(table.dtypes):
        if dtype.kind not in "biufcM":
            safe.isetitem(place, safe.iloc[:, place].map(_safe))
    return write_text(path, safe.to_csv(index=index, lineterminator="\n"))


def _safe(cell: Any) -> Any:
    """A cell with an apostrophe before what a spreadsheet would run, and without what steers a terminal."""
    if not isinstance(cell, str):
        return cell
    # Python's csv quotes a line's end, but not a lone carriage return, which readers take for one
    cell = STEERING.sub("\ufffd", re.sub("\r\n?", "\n", cell))
    return f"'{cell}" if FORMULA.match(cell) else cell


def canonical_sha256(value: Any) -> str:
    """SHA-256, in hex, of a JSON value in its canonical form: keys sorted, no spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sha256_of_file(*paths: str | Path, on_chunk: Callable[[bytes], object] = lambda chunk: None) -> str:
    """SHA-256, in hex, of the bytes of a file, or of several one after another, as of a model's shards.

    A thread hashes each piece while this one reads the next piece and calls ``on_chunk`` with it.
    """
    from concurrent.futures import Future, ThreadPoolExecutor

    digest, hashing = hashlib.sha256(), Future[None]()
    hashing.set_result(None)
    with ThreadPoolExecutor(1) as beside:
        for path in paths:
            with Path(path).open("rb", buffering=0) as file:
                while chunk := file.read(CHUNK_BYTES):
                    hashing.result()
                    hashing = beside.submit(digest.update, chunk)
                    on_chunk(chunk)
    return digest.hexdigest()


def sha256_of(*paths: str | Path) -> str:
    """SHA-256 of one large file, or of several one after another, in hex, under a progress bar."""
    total = sum(Path(path).stat().st_size for path in paths)
    with tqdm(total=total, unit="B", unit_scale=True, desc="sha256") as bar:
        return sha256_of_file(*paths, on_chunk=lambda chunk: bar.update(len(chunk)))
