"""Headers before the download: of files on the hub, or at any address, read by HTTP ranges.

We write them to sparse files of the original sizes. All code that reads headers works on these: the
diagnosis, the shards' cross-check, and llama.cpp's own loader, which plans a model without its data.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

from dfqs_nb.core.errors import DfqsError, HeaderError, RegistryError
from dfqs_nb.gguf import models
from dfqs_nb.gguf.header import read_header
from dfqs_nb.gguf.shards import ShardSet, check_set, headers_inside, open_shards, shard_path

LEAST_BYTES = 1 << 19  # of a request
MOST_BYTES = 128 << 20  # of headers in one file; real headers stay under 50 MB, and the reader doubles
SMALL_BYTES = 1 << 20  # a small answer may be whole, such as a page that says "not found"
STREAM_BYTES = 64 << 20  # of one request for data
TIMEOUT_SECONDS, TRIES = 20.0, 3
SLOWEST = 50_000  # bytes a second; we give up on a slower answer
RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")


@dataclass(frozen=True)
class Outline(ShardSet):
    """The headers of a whole model, wherever its files are; llama.cpp plans a model from them."""

    model: str  # as it was named
    glued: bool  # the shards lie in one file, which no runtime loads before `dfqs-nb repair`
    places: Mapping[Path, str]  # the addresses whose headers were copied to these paths; none for files here
    fetched_bytes: int

    def open(self, path: Path) -> Any:
        """A shard's bytes for reading in a ``with`` block, here or remote."""
        return nullcontext(RemoteFile(self.places[path], STREAM_BYTES)) if self.places else path.open("rb")


@contextmanager
def outline(model: str | Path) -> Iterator[Outline]:
    """The headers of a model: a path, a registered name, or an address. Remote ones are copied for the block.

    `RegistryError`: nothing has that name, or the server gives no file or no ranges. `HeaderError`,
    `LayoutError`, `ShardError`: the files are not all shards of one model.
    """
    with ExitStack() as stack:
        path, places, fetched = _first_file(model), dict[Path, str](), 0
        if isinstance(path, str):
            path, places, fetched = stack.enter_context(headers_of(path))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dfqs-headers-")))
        try:
            headers = list(headers_inside(path))
            if len(headers) == 1:
                yield Outline(open_shards(path).headers, str(model), False, places, fetched)
                return
            laid_out = []  # each as a sparse file that llama.cpp's loader can plan
            for number, header in enumerate(check_set(headers, glued=True).headers, 1):
                laid_out.append(shard_path(folder / "glued", number, len(headers)))
                with laid_out[-1].open("wb") as file:
                    file.write(header.raw)
                    file.truncate(header.end_offset - header.start)
            yield Outline(tuple(map(read_header, laid_out)), str(model), True, places, fetched)
        except DfqsError as error:
            copies = [folder, *(place.parent for place in places)]
            if not any(Path(error.where or "").is_relative_to(copy) for copy in copies):
                raise
            raise type(error)(error.what, where=models.shown(str(model)), hint=error.hint) from None


def _first_file(model: str | Path) -> Path | str:
    """The first file of a model on this machine or in the hub's cache; else an address."""
    entry = models.registered().get(str(model))
    address = f"{entry.source}/{entry.files[0].name}" if entry else str(model)
    if not models.ADDRESS.match(address):
        return models.resolve(model)[0]
    with suppress(RegistryError):
        return models.resolve(model, local_files_only=True)[0]
    return models.located(address) if entry else address


@contextmanager
def headers_of(address: str) -> Iterator[tuple[Path, dict[Path, str], int]]:
    """Fetch the headers of a remote file and of its other shards; the copies go when the block ends.

    Yields the copy's path, the address of each copy, and the bytes that were fetched. `RegistryError`: the
    server does not give the file, or gives no ranges.
    """
    with tempfile.TemporaryDirectory(prefix="dfqs-headers-") as folder, ThreadPoolExecutor(8) as pool:
        places = {Path(folder) / _located(other)[1]: other for other in models.siblings(address)}
        path = Path(folder) / _located(address)[1]

        def copied(other: Path) -> int:
            try:
                return _copied(places[other], other)
            except RegistryError:  # the shards' cross-check names one that is missing
                other.unlink()
                return 0

        fetched = _copied(address, path)
        with suppress(HeaderError):  # whoever reads the copy reports it
            if "split.no" in read_header(path):
                fetched += sum(pool.map(copied, places.keys() - {path}))
        yield path, places, fetched


def _located(address: str) -> tuple[str, str, models.HubFile | None]:
    """The URL of an address, the file's name, and its place on the hub, if it is there."""
    import httpx2
    from huggingface_hub import hf_hub_url

    try:
        file: models.HubFile | None = models.parse_address(address)
    except RegistryError:
        if address.startswith("hf://"):
            raise
        file = None
    hint = "check the address"
    try:
        name = unquote(file.file if file else httpx2.URL(address).path).rpartition("/")[2] or "index"
    except httpx2.InvalidURL as error:
        what = f"no address of a file ({error})"
        raise RegistryError(what, where=models.shown(address), hint=hint) from None
    if len(name.encode()) > 255 or "\0" in name or name in (".", ".."):
        raise RegistryError("no file can have such a name", where=models.shown(address), hint=hint)
    url = hf_hub_url(file.repo, file.file, revision=file.revision) if file else address
    return url, name, file


def _copied(address: str, path: Path) -> int:
    """Make a sparse copy of a file's headers; the bytes fetched."""
    with path.open("wb") as copy:
        remote = RemoteFile(address, LEAST_BYTES, copy)
        with suppress(HeaderError):  # whoever reads the copy meets the same bytes, and reports the error
            for _ in headers_inside(path, remote):
                pass  # each is fetched as it is read
        copy.truncate(remote.size)
    return remote.fetched_bytes


class RemoteFile:
    """A remote file for reading, through a window of at least ``block`` bytes in memory.

    ``copy``: a file that keeps every window at its place, up to `MOST_BYTES` in all. `RegistryError`: the
    server does not give the bytes.
    """

    def __init__(self, address: str, block: int, copy: BinaryIO | None = None) -> None:
        self.address, self.block, self.copy = address, block, copy
        self.position = self.start = self.fetched_bytes = self.size = 0
        self.window = b""
        self._fetch(block)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move; nothing is fetched."""
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def read(self, n: int) -> bytes:
        """``n`` bytes, or fewer at the end of the file."""
        taken = b""
        while len(taken) < n and self.position < self.size:
            at, missing = self.position - self.start, n - len(taken)
            if not 0 <= at < len(self.window):
                self._fetch(max(missing, self.block))
                at = 0
            taken += self.window[at : at + missing]
            self.position = self.start + min(at + missing, len(self.window))
        return taken

    def _fetch(self, n: int) -> None:
        import httpx2

        url, _, file = _located(self.address)
        again = models.retrying(TRIES, 2, httpx2.NetworkError, httpx2.RemoteProtocolError)
        with models.explained(self.address):
            if self.copy and self.fetched_bytes + n > MOST_BYTES:
                raise ValueError(f"its headers take more than {MOST_BYTES:,} bytes")
            self.start = self.position
            self.window, size = again(_ranged, url, file is not None, self.start, self.start + n)
            if self.size not in (0, size):
                raise ValueError("the file changed while it was read")
        self.size, self.fetched_bytes = size, self.fetched_bytes + len(self.window)
        if self.copy:
            self.copy.seek(self.start)
            self.copy.write(self.window)


def _ranged(url: str, is_hub: bool, start: int, end: int) -> tuple[bytes, int]:
    """Bytes of a remote file (fewer at its end), and its size."""
    from huggingface_hub.utils import _headers, _http

    headers = _headers.build_hf_headers() if is_hub else {}
    headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    options: dict[str, Any] = {"headers": headers, "timeout": TIMEOUT_SECONDS}
    with _http.get_session().stream("GET", url, **options) as answer:
        if answer.status_code >= 400:
            if is_hub:
                answer.read()  # the error has the hub's message
                _http.hf_raise_for_status(answer)
            answer.raise_for_status()
        told = RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        length = answer.headers.get("Content-Length", "")
        if answer.status_code == 206 and told and int(told[1]) == start:
            size = int(told[3])
        elif answer.status_code == 200 and start == 0 and length.isdigit() and int(length) <= SMALL_BYTES:
            size = int(length)
        else:
            what = "the server gives no byte ranges, only whole files"
            raise RegistryError(what, where=models.shown(url), hint="download the file, and inspect it here")
        data, latest = bytearray(), time.monotonic() + TIMEOUT_SECONDS + (end - start) / SLOWEST
        for chunk in answer.iter_raw():
            data += chunk
            if len(data) >= end - start or time.monotonic() > latest:
                break
    if len(data) < min(end, size) - start:
        raise ValueError("the server sends too slowly, or no more")
    return bytes(data[: end - start]), size
