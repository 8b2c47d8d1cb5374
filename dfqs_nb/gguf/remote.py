"""Models wherever they are: their headers before the download, and how two of them differ.

Headers on the hub or at any address are read by HTTP ranges, and written to sparse files of the original
sizes. All code that reads headers works on these: the diagnosis, the shards' cross-check, and llama.cpp's own
loader, which plans a model without its data.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO
from urllib.parse import unquote

from dfqs_nb.core.errors import DfqsError, HeaderError, RegistryError
from dfqs_nb.gguf import models
from dfqs_nb.gguf.header import GGUFHeader, read_header
from dfqs_nb.gguf.shards import ShardSet, check_set, headers_inside, shard_path, shards_of, tensor_hashes

SHOWN = 60  # characters of a value that differs
SPLIT = ("split.no", "split.count", "split.tensors.count")  # how a model is cut, not what it is
COPIES = "dfqs-headers-"  # folders of copied headers
LEAST_BYTES = 1 << 19  # of a request
MOST_BYTES = 128 << 20  # of headers in one file; real headers stay under 50 MB, and the reader doubles
STREAM_BYTES = 64 << 20  # of one request for data
TIMEOUT_SECONDS, TRIES = 20.0, 3
TOTAL_SECONDS = 600.0  # of the headers of one file, or of one request for data
RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})")


@dataclass(frozen=True)
class Outline(ShardSet):
    """The headers of a whole model, wherever its files are; llama.cpp plans a model from them."""

    model: str  # as it was named
    glued: bool  # the shards lie in one file, which no runtime loads before `dfqs-nb repair`
    places: Mapping[Path, str]  # the addresses whose headers were copied to these paths; none for files here

    def open(self, path: Path) -> Any:
        """A shard's bytes for reading in a ``with`` block, here or remote."""
        return nullcontext(RemoteFile(self.places[path], STREAM_BYTES)) if self.places else path.open("rb")


@contextmanager
def outline(model: str | Path) -> Iterator[Outline]:
    """The headers of a model: a path, a registered name, or an address. Remote ones are copied for the block.

    `RegistryError`: nothing has that name, or the server gives no file or no ranges. `HeaderError`,
    `LayoutError`, `ShardError`: the files are not all shards of one model.
    """
    first = _first_file(model)
    with headers_of(first) as (path, places), TemporaryDirectory(prefix=COPIES) as folder:
        try:
            headers = list(headers_inside(path))
            if len(headers) == 1:
                yield Outline(shards_of(headers[0]).headers, str(model), False, places)
                return
            laid_out = []  # each as a sparse file that llama.cpp's loader can plan
            for number, header in enumerate(check_set(headers, glued=True).headers, 1):
                laid_out.append(shard_path(Path(folder, "glued"), number, len(headers)))
                with laid_out[-1].open("wb") as file:
                    file.write(header.raw)
                    file.truncate(header.end_offset - header.start)
            yield Outline(tuple(map(read_header, laid_out)), str(model), True, places)
        except DfqsError as error:
            if COPIES not in str(error.where):
                raise
            raise type(error)(error.what, where=models.shown(str(model)), hint=error.hint) from None


def compare(a: Outline, b: Outline, *, data: bool = False) -> tuple[dict[str, list[str]], str]:
    """What differs between two models, line by line by its kind, and a sentence on what was compared.

    ``data``: also hash every tensor that both have with equal type and shape. This reads a remote model as a
    whole, without storing it.
    """
    headers = a.as_one, b.as_one
    stated = [{t.name: f"{t.type} {' x '.join(map(str, t.shape))}" for t in it.tensors} for it in headers]
    left, right = stated
    both = [name for name in left if name in right]
    alike = {name for name in both if left[name] == right[name]}
    fields = [name for name in {**headers[0].fields, **headers[1].fields} if name not in SPLIT]
    lines = {
        "only in the first": [f"{name}: {left[name]}" for name in left if name not in right],
        "only in the second": [f"{name}: {right[name]}" for name in right if name not in left],
        "other type or shape": [f"{it}: {left[it]} | {right[it]}" for it in both if it not in alike],
        "metadata": [line for name in fields if (line := _field(name, *headers))],
    }
    if data:
        for model in (a, b):  # before hours of reading the other model
            if model.glued:
                hint = "repair it first: `dfqs-nb repair FILE --in-place`"
                hint = "download and repair it first" if model.places else hint
                what = "the bytes of glued shards are not compared"
                raise DfqsError(what, where=models.shown(model.model), hint=hint)
        hashes, others = (tensor_hashes(it.headers, alike, opened=it.open) for it in (a, b))
        lines["other bytes"] = sorted(name for name in alike if hashes[name] != others[name])
    lines = {kind: rows for kind, rows in lines.items() if rows}
    scope = f"{len(fields):,} metadata fields and {len(left | right):,} tensors"
    looked = f"bytes of {len(alike):,} tensors compared" if data else "bytes not compared (--data does)"
    return lines, f"{'different' if lines else 'equal'}: {scope}; {looked}"


def _field(name: str, *headers: GGUFHeader) -> str:
    """The line for a field that differs; else an empty text."""
    own = [(header, header.fields.get(name)) for header in headers]
    texts = [f"{field.type} {header[name]!r}" if field else "missing" for header, field in own]
    if texts[0] == texts[1]:
        return ""
    # of long texts and lists, the place where they begin to differ
    start = max(0, len(os.path.commonprefix(texts)) - SHOWN // 2) if max(map(len, texts)) > SHOWN else 0
    parts = [(text[start : start + SHOWN], len(text) > start + SHOWN) for text in texts]
    return f"{name}: " + " | ".join(f"{'…' * (start > 0)}{part}{'…' * more}" for part, more in parts)


def _first_file(model: str | Path) -> Path | str:
    """The first file of a model on this machine or in the hub's cache; else an address."""
    entry = models.registered().get(str(model))
    try:
        return models.resolve(model, local_files_only=True)[0]
    except RegistryError:
        address = f"{entry.source}/{entry.files[0].name}" if entry else str(model)
        if not models.ADDRESS.match(address):
            raise
        return models.located(address) if entry else address


@contextmanager
def headers_of(file: str | Path) -> Iterator[tuple[Path, dict[Path, str]]]:
    """A local path as it is; of an address, copies of the headers of its file and of its other shards.

    Yields a path, and the address of each copy. `RegistryError`: the server gives no file, or no ranges.
    """
    address = str(file)
    if not models.ADDRESS.match(address):
        yield Path(file), {}
        return
    with TemporaryDirectory(prefix=COPIES) as folder, ThreadPoolExecutor(8) as pool:
        places = {Path(folder, _located(other)[1]): other for other in models.siblings(address)}
        path = Path(folder, _located(address)[1])

        def copy(other: Path) -> None:
            with other.open("wb") as sparse:
                remote = RemoteFile(places[other], LEAST_BYTES, sparse)
                with suppress(HeaderError):  # whoever reads the copy meets the same bytes, and reports it
                    for _ in headers_inside(other, remote):
                        pass  # each is fetched as it is read
                sparse.truncate(remote.size)

        def copy_sibling(other: Path) -> None:
            try:
                copy(other)
            except RegistryError:  # the shards' cross-check names one that is missing
                other.unlink()

        copy(path)
        with suppress(HeaderError):
            if "split.no" in read_header(path):
                list(pool.map(copy_sibling, places.keys() - {path}))
        yield path, places


def _located(address: str) -> tuple[str, str, bool]:
    """The URL of an address, the file's name, and whether it is on the hub."""
    import httpx2
    from huggingface_hub import hf_hub_url

    on_hub = True
    try:
        file = models.parse_address(address)
        url, name = hf_hub_url(file.repo, file.file, revision=file.revision), file.file
    except RegistryError:
        if address.startswith("hf://"):
            raise
        on_hub, url, name = False, address, ""
        with suppress(httpx2.InvalidURL):
            name = unquote(httpx2.URL(address).path)
    name = name.rpartition("/")[2]
    if not 0 < len(name.encode()) < 256 or "\0" in name or name in (".", ".."):
        what = "no address of a file that a disk can hold"
        raise RegistryError(what, where=models.shown(address), hint="check the address")
    return url, name, on_hub


class RemoteFile:
    """A remote file for reading, through a window of at least ``block`` bytes in memory.

    ``copy``: a file that keeps every window at its place, up to `MOST_BYTES` in all. `RegistryError`: the
    server does not give the bytes.
    """

    def __init__(self, address: str, block: int, copy: BinaryIO | None = None) -> None:
        self.address, self.block, self.copy = address, block, copy
        self.position = self.start = self.fetched_bytes = self.size = 0
        self.window, self.until = b"", time.monotonic() + TOTAL_SECONDS
        self._fetch(block)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move; nothing is fetched."""
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def read(self, n: int) -> bytes:
        """``n`` bytes, or fewer at the end of the file."""
        n = max(0, min(n, self.size - self.position))
        if not self.start <= self.position <= self.position + n <= self.start + len(self.window):
            self._fetch(max(n, self.block))
        at, self.position = self.position - self.start, self.position + n
        return self.window[at : at + n]

    def _fetch(self, n: int) -> None:
        import httpx2

        url, _, on_hub = _located(self.address)
        again = models.retrying(TRIES, 2, httpx2.NetworkError, httpx2.RemoteProtocolError)
        if not self.copy:
            self.until = time.monotonic() + TOTAL_SECONDS
        with models.explained(self.address):
            if self.copy and self.fetched_bytes + n > MOST_BYTES:
                raise ValueError(f"its headers take more than {MOST_BYTES:,} bytes")
            self.window, size = again(_ranged, url, on_hub, self.position, self.position + n, self.until)
            if self.size not in (0, size):
                raise ValueError("the file changed while it was read")
        self.start, self.size = self.position, size
        self.fetched_bytes += len(self.window)
        if self.copy:
            self.copy.seek(self.start)
            self.copy.write(self.window)


def _ranged(url: str, on_hub: bool, start: int, end: int, until: float) -> tuple[bytes, int]:
    """Bytes of a remote file (fewer at its end), and its size; ``until``: the last moment for them."""
    from huggingface_hub.utils import _headers, _http

    headers = _headers.build_hf_headers() if on_hub else {}
    headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    options: dict[str, Any] = {"headers": headers, "timeout": TIMEOUT_SECONDS}
    with _http.get_session().stream("GET", url, **options) as answer:
        if answer.status_code >= 400:
            if on_hub:
                answer.read()  # the error has the hub's message
                _http.hf_raise_for_status(answer)
            answer.raise_for_status()
        place = RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        if answer.status_code != 206 or not place or int(place[1]) != start:
            what = "the server gives no byte ranges, only whole files"
            raise RegistryError(what, where=models.shown(url), hint="download the file, and inspect it here")
        data, size = bytearray(), int(place[2])
        for chunk in answer.iter_raw():
            data += chunk
            if len(data) >= end - start:
                break  # of a server that sends more than it was asked for
            if time.monotonic() > until:
                raise ValueError(f"the server sends too slowly: {TOTAL_SECONDS:.0f} seconds are over")
    if len(data) < min(end, size) - start:
        raise ValueError("the server does not send all that it promises")
    return bytes(data[: end - start]), size
