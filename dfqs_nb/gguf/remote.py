"""Models wherever they are: their headers before the download.

They are read by HTTP ranges, and written to sparse files of the original sizes. All code that reads headers
works on these: the diagnosis, the shards' cross-check, and llama.cpp's own loader, which plans without data.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from dfqs_nb.core.errors import DfqsError, HeaderError, RegistryError
from dfqs_nb.gguf import models
from dfqs_nb.gguf.header import headers_inside, read_header
from dfqs_nb.gguf.shards import ShardSet, check_set, open_shards, shard_path

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
    glued: bool  # the shards lie in one file, which llama.cpp refuses before `dfqs-nb repair`
    places: Mapping[Path, str]  # the addresses whose headers were copied to these paths; none for files here

    def open(self, path: Path) -> Any:
        """A shard's bytes, here or remote, for reading in a ``with`` block."""
        return nullcontext(RemoteFile(self.places[path], STREAM_BYTES)) if self.places else super().open(path)


@contextmanager
def outline(model: str | Path) -> Iterator[Outline]:
    """The headers of a model: of a path, a registered name, or an address (copied for the block)."""
    with headers_of(_first_file(model)) as (path, places), _copies(str(model), {}) as folder:
        headers = list(headers_inside(path))
        if len(headers) == 1:
            yield Outline(open_shards(headers[0]).headers, str(model), False, places)
            return
        laid_out = []  # each as a sparse file that llama.cpp's loader can plan
        for number, header in enumerate(check_set(headers, glued=True).headers, 1):
            laid_out.append(shard_path(folder / "glued", number, len(headers)))
            with laid_out[-1].open("wb") as file:
                file.write(header.raw)
                file.truncate(header.end_offset - header.start)
        yield Outline(tuple(map(read_header, laid_out)), str(model), True, places)


def _first_file(model: str | Path) -> Path | str:
    """The first file of a model on this machine or in the hub's cache; else an address."""
    entry = models.registered().get(str(model))
    address = f"{entry.source}/{entry.files[0].name}" if entry else str(model)
    try:
        return models.resolve(model, local_files_only=True)[0]
    except RegistryError:
        if not models.ADDRESS.match(address):
            raise
    return models.located(address) if entry else address


@contextmanager
def _copies(model: str, places: Mapping[Path, str]) -> Iterator[Path]:
    """A folder for copies of headers; an error about one is raised again about its place, or the model."""
    with TemporaryDirectory() as folder:
        try:
            yield Path(folder)
        except DfqsError as error:
            if folder not in str(error.where):
                raise
            where = models.shown(places.get(Path(str(error.where)), model))
            raise type(error)(error.what, where=where, hint=error.hint) from None


@contextmanager
def headers_of(file: str | Path) -> Iterator[tuple[Path, dict[Path, str]]]:
    """The path of a local file, or of a copy of a remote one's headers; and the address of each copy."""
    if not models.ADDRESS.match(address := str(file)):
        yield Path(file), {}
        return
    from concurrent.futures import ThreadPoolExecutor

    places = dict[Path, str]()
    with _copies(address, places) as folder, ThreadPoolExecutor(8) as pool:
        places |= {folder / _located(other)[1]: other for other in models.siblings(address)}
        path = folder / _located(address)[1]

        def copy(other: Path) -> None:
            try:
                with other.open("wb") as sparse:
                    remote = RemoteFile(places[other], LEAST_BYTES, sparse)
                    with suppress(HeaderError):  # whoever reads the copy meets the same bytes, and reports it
                        for _ in headers_inside(other, remote):
                            pass  # each is fetched as it is read
                    sparse.truncate(remote.size)
            except RegistryError:
                if other == path:
                    raise
                other.unlink()  # the shards' cross-check names it

        copy(path)
        with suppress(HeaderError):
            if "split.no" in read_header(path):
                list(pool.map(copy, places.keys() - {path}))
        yield path, places


def _located(address: str) -> tuple[str, str, bool]:
    """The URL of an address, the file's name, and whether it is on the hub."""
    from huggingface_hub import hf_hub_url

    try:
        uri = models.parse_address(address)
        url, path = hf_hub_url(uri.id, uri.path_in_repo, revision=uri.revision), uri.path_in_repo
    except RegistryError:
        if address.startswith("hf://"):
            raise
        with models.explained(address):
            url, path = "", unquote(urlsplit(address).path)
    name = path.rpartition("/")[2]
    if not 0 < len(name.encode()) < 256 or "\0" in name or name in (".", ".."):
        raise RegistryError("no usable name of a file", where=models.shown(address), hint="check the address")
    return url or address, name, bool(url)


class RemoteFile:
    """A remote file, read through a window of ``block`` bytes or more; ``copy`` keeps all that was read."""

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
        if not self.copy:
            self.until = time.monotonic() + TOTAL_SECONDS
        with models.explained(self.address):
            if self.copy and self.fetched_bytes + n > MOST_BYTES:
                raise ValueError(f"its headers take more than {MOST_BYTES:,} bytes")
            self.window, size = models.retrying(TRIES, 2)(self._ranged, self.position, self.position + n)
            if self.size not in (0, size):
                raise ValueError("the file changed while it was read")
            self.start, self.size = self.position, size
            self.fetched_bytes += len(self.window)
            if self.copy:
                self.copy.seek(self.start)
                self.copy.write(self.window)

    def _ranged(self, start: int, end: int) -> tuple[bytes, int]:
        """The bytes of a range (fewer at the end of the file), and the file's size."""
        from huggingface_hub.utils import _headers, _http

        url, _, on_hub = _located(self.address)
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        headers |= _headers.build_hf_headers() if on_hub else {}
        data, session = bytearray(), _http.get_session()
        with session.stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS) as answer:
            if on_hub and answer.status_code >= 400:
                answer.read()  # the error has the hub's message
                _http.hf_raise_for_status(answer)
            answer.raise_for_status()
            place = RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if answer.status_code != 206 or not place or int(place[1]) != start:
                what = "the server gives no byte ranges, only whole files"
                raise RegistryError(what, where=models.shown(url), hint="download it, and give its path")
            for chunk in answer.iter_raw():
                data += chunk
                if len(data) >= end - start:
                    break  # of a server that sends more than it was asked for
                if time.monotonic() > self.until:
                    raise ValueError(f"the server sends too slowly: {TOTAL_SECONDS:.0f} seconds are over")
        if len(data) < min(end, size := int(place[2])) - start:
            raise ValueError("the server does not send all that it promises")
        return bytes(data[: end - start]), size
