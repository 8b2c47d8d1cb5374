"""A look before the download: the headers of files on the hub, or behind any address, read by HTTP ranges.

They are written to sparse files of the original sizes, so that all code that reads headers works on them:
the diagnosis, the shards' cross-check, and llama.cpp's own loader, which plans a model without its data.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from dfqs_nb.core.errors import DfqsError, HeaderError, OutputError, RegistryError
from dfqs_nb.gguf import models
from dfqs_nb.gguf.header import GGUFHeader, next_start, read_header
from dfqs_nb.gguf.shards import SHARD_NAME, ShardSet, check_set, open_shards, shard_path

FIRST_BYTES, NEXT_BYTES = 1 << 20, 1 << 18  # of a request, at least: for the first header; for others
MOST_BYTES = 128 << 20  # of headers in one file; real ones stay under 50 MB, and the reader doubles
SMALL_BYTES = 1 << 20  # a whole answer of up to this size is taken, such as a page that says "not found"
STREAM_BYTES = 64 << 20  # of one request for data
AT_ONCE = 8
TIMEOUT_SECONDS, TRIES = 20.0, 3
SLOWEST = 50_000  # bytes a second of an answer as a whole; slower, and it is given up
RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
LONGEST_NAME = 255  # bytes


@dataclass(frozen=True)
class Place:
    """Where a file is: its address for people, its name, its URL, and its place on the hub, if any."""

    address: str
    name: str
    url: str
    hub: models.HubFile | None = None

    @property
    def shown(self) -> str:
        """The address without what may be a secret."""
        return shown(self.address)


@dataclass(frozen=True)
class Copy:
    """Files of the originals' sizes that hold their headers only.

    Attributes:
        path: of the file that was asked for; its other shards lie beside it, as far as the server has them.
        fetched_bytes: what the network brought.
        places: where each copy's original is.
    """

    path: Path
    fetched_bytes: int
    places: Mapping[Path, Place]


@dataclass(frozen=True)
class Outline:
    """The headers of a whole model, wherever its files are; llama.cpp's loader can plan it from ``shards``.

    Attributes:
        glued: the shards lie in one file, byte after byte, which no runtime loads before `dfqs-nb repair`.
        copy: what was fetched; None for files that are here.
    """

    model: str
    shards: ShardSet
    glued: bool
    copy: Copy | None

    @property
    def path(self) -> Path:
        """The file to name to llama.cpp."""
        return self.shards.paths[0]

    def open(self, path: Path) -> AbstractContextManager[Any]:
        """A shard's bytes for reading, wherever they are."""
        return nullcontext(Stream(self.copy.places[path])) if self.copy else path.open("rb")


def shown(address: str) -> str:
    """An address without what may be a secret: user, password, query and fragment.

    >>> shown("https://me:word@x.org/c.gguf?token=1"), shown("hf://a/b/c.gguf@v1"), shown("my?#.gguf")
    ('https://***@x.org/c.gguf?***', 'hf://a/b/c.gguf@v1', 'my?#.gguf')
    """
    if not models.is_address(address):
        return address
    return re.sub(r"([?#]).*", r"\1***", re.sub("(?<=://)[^/]*@", "***@", address))


@contextmanager
def outline(model: str | Path) -> Iterator[Outline]:
    """The headers of a local or remote model: a path, a registered name, or an address.

    Only headers are downloaded; what lies in the hub's cache is read there. Copies go when the block ends.

    Raises:
        RegistryError: nothing has that name, or the server does not give the file, or gives no ranges.
        HeaderError, LayoutError, ShardError: the files are not all shards of one model.
    """
    with ExitStack() as stack:
        path, copy = _here(model), None
        if path is None:
            copy = stack.enter_context(headers_of(_address(str(model))))
            path = copy.path
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dfqs-headers-"))
        try:
            headers = _headers_inside(path)
            if glued := len(headers) > 1:
                check_set(headers, glued=True, allow_mixed=True)
                shards = open_shards(_laid_out(headers, folder), allow_mixed=True)
            else:
                shards = open_shards(path)
            yield Outline(str(model), shards, glued, copy)
        except DfqsError as error:
            places = [Path(folder), *([copy.path.parent] if copy else [])]
            if not any(Path(error.where or "").is_relative_to(place) for place in places):
                raise
            where = shown(str(model))  # not the copy's name
            raise type(error)(error.what, where=where, hint=error.hint) from None


def _here(model: str | Path) -> Path | None:
    """The first file of a model on this machine, be it in the hub's cache; None where there is none."""
    entry = models.registered().get(str(model))
    if not models.is_address(model) and (entry is None or not entry.source.startswith("hf://")):
        return models.resolve(model)[0]
    try:
        return models.resolve(model, local_files_only=True)[0]
    except RegistryError:
        return None


def _address(model: str) -> str:
    """The address of a registered model's first file, in whatever folder of its repository; or an address."""
    if entry := models.registered().get(model):
        return str(models.located(models.HubFile(entry.source.removeprefix("hf://"), entry.files[0].name)))
    return model


@contextmanager
def headers_of(address: str) -> Iterator[Copy]:
    """Fetch the headers of a remote file and of its other shards; the copies go when the block ends.

    Args:
        address: ``hf://owner/repo/file.gguf[@revision]``, the address of a file's page on the hub, or any
            ``https://`` address.

    Raises:
        RegistryError: the server does not give the file, or gives no ranges.
        HeaderError: its headers are larger than any real ones.
    """
    places = places_of(address)
    wanted = next(place for place in places if place.address == address)
    with tempfile.TemporaryDirectory(prefix="dfqs-headers-") as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        path, fetched = _copied(wanted, Path(folder), FIRST_BYTES)
        others = [place for place in places if place is not wanted] if _is_shard(path) else []
        fetched += sum(pool.map(lambda place: _if_there(place, Path(folder)), others))
        yield Copy(path, fetched, {Path(folder) / place.name: place for place in places})


def places_of(address: str) -> list[Place]:
    """The file of an address and its other shards, by their names, in order.

    >>> [place.name for place in places_of("https://x.org/m-00001-of-00002.gguf?download=true")]
    ['m-00001-of-00002.gguf', 'm-00002-of-00002.gguf']
    """
    from huggingface_hub import constants, hf_hub_url

    page = address.replace(constants.ENDPOINT.rstrip("/"), "https://huggingface.co", 1)
    if address.startswith("hf://") or models.PAGE.fullmatch(page):
        file = models.parse_address(page)
        places = []
        for name in models.siblings(file.file):
            shard = models.HubFile(file.repo, name, file.revision)
            label = address if name == file.file else str(shard)
            url = hf_hub_url(shard.repo, shard.file, revision=shard.revision)
            places.append(Place(label, PurePosixPath(name).name, url, shard))
        return places
    scheme, host, path, query, _ = urlsplit(address)
    folder, own = unquote(path).rpartition("/")[::2]
    if len(own.encode()) > LONGEST_NAME or "\0" in own or own in (".", ".."):
        raise RegistryError("its name is none that a file can have", where=address, hint="check the address")
    names = models.siblings(own)
    urls = {name: urlunsplit((scheme, host, quote(f"{folder}/{name}"), query, "")) for name in names}
    return [Place(address if name == own else url, name or "index", url) for name, url in urls.items()]


def _laid_out(headers: Sequence[GGUFHeader], folder: str) -> list[Path]:
    """Shards that lie glued in one file, each as a sparse file that llama.cpp's loader can plan."""
    ordered = sorted(headers, key=lambda header: header.count("split.no"))
    paths = [shard_path(Path(folder) / "glued", n, len(headers)) for n in range(1, len(headers) + 1)]
    for path, header in zip(paths, ordered, strict=True):
        with path.open("wb") as file:
            file.write(header.raw)
            file.truncate(header.end_offset - header.start)
    return paths


def _headers_inside(path: Path) -> list[GGUFHeader]:
    """The header of a file, and those of the shards that are glued behind it."""
    headers: list[GGUFHeader] = []
    start: int | None = 0
    with path.open("rb", buffering=0) as file:
        while start is not None:
            headers.append(read_header(path, start))
            start = next_start(headers[-1], file)
    return headers


def _is_shard(path: Path) -> bool:
    """Whether a copy's header, too, calls it one of as many shards as its name does."""
    match = SHARD_NAME.fullmatch(path.name)
    try:
        header, count = read_header(path), int(match["count"]) if match else 1
        return "split.no" in header and header.count("split.count", count) == count
    except DfqsError:
        return False


def _if_there(place: Place, folder: Path) -> int:
    """Copy one more shard; the bytes that came. The shards' cross-check names one that is missing."""
    try:
        return _copied(place, folder, NEXT_BYTES)[1]
    except RegistryError:
        (folder / place.name).unlink(missing_ok=True)
        return 0


def _copied(place: Place, folder: Path, block: int) -> tuple[Path, int]:
    """A sparse copy of one file's headers, and the bytes that came."""
    path = folder / place.name
    with path.open("w+b") as copy:
        remote = RemoteFile(place, copy, block)
        remote.block = NEXT_BYTES
        start: int | None = 0
        while start is not None:
            try:
                header = read_header(path, start, file=remote)
            except HeaderError:
                if remote.is_too_long:
                    raise
                break  # whoever reads the copy meets the same bytes, and says what is wrong
            start = next_start(header, remote)
    return path, remote.fetched_bytes


class RemoteFile:
    """A file behind an address, for reading: each range is fetched once, and kept in ``copy``."""

    def __init__(self, place: Place, copy: BinaryIO, block: int) -> None:
        self.place, self.copy, self.block = place, copy, block
        self.position = self.fetched_bytes = self.size = 0
        self.is_too_long = False
        self.window = (0, 0)
        self._fetch(0, block)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move; nothing is fetched."""
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def read(self, n: int) -> bytes:
        """Up to ``n`` bytes from here on; fewer at the end only."""
        end = min(self.position + n, self.size)
        if end <= self.position:
            return b""
        start, stop = self.window
        if not start <= self.position <= stop:
            self.window = (self.position, self.position)
        while (before := self.window[1]) < end:
            self._fetch(before, min(max(end, before + self.block), self.size))
        self.copy.seek(self.position)
        taken = self.copy.read(end - self.position)
        self.position = end
        return taken

    def _fetch(self, start: int, end: int) -> None:
        if self.fetched_bytes + end - start > MOST_BYTES:
            self.is_too_long = True
            what = f"its headers take more than {MOST_BYTES:,} bytes"
            raise HeaderError(what, where=self.place.shown, hint="no real model's do: check the address")
        data, size = fetch(self.place, start, end)
        if self.size not in (0, size):
            hint = "try again when it is at rest"
            raise RegistryError("the file changed while it was read", where=self.place.shown, hint=hint)
        if not self.size:
            self.size = size
            try:
                self.copy.truncate(size)
            except OSError as error:
                what = f"no sparse file of {size:,} bytes can be made here ({error.strerror})"
                raise OutputError(
                    what, where=self.copy.name, hint="set TMPDIR to a folder on a disk"
                ) from error
        self.copy.seek(start)
        self.copy.write(data)
        self.copy.flush()
        self.fetched_bytes += len(data)
        self.window = (self.window[0], start + len(data))


class Stream:
    """The same for data: a window of bytes in memory that moves on, and nothing on the disk."""

    def __init__(self, place: Place) -> None:
        self.place, self.position = place, 0
        self.start, self.window = 0, b""

    def seek(self, offset: int) -> None:
        """Move; nothing is fetched."""
        self.position = offset

    def read(self, n: int) -> bytes:
        """Up to ``n`` bytes from here on, at least one before the end of the file."""
        if not self.start <= self.position < self.start + len(self.window):
            self.start = self.position
            self.window, _ = fetch(self.place, self.start, self.start + STREAM_BYTES)
        at = self.position - self.start
        taken = self.window[at : at + n]
        self.position += len(taken)
        return taken


def fetch(place: Place, start: int, end: int) -> tuple[bytes, int]:
    """Bytes of a remote file (fewer at its end), and its size; a connection that breaks is tried again.

    Raises:
        RegistryError: the server does not give them.
    """
    import httpx2

    again = models.retrying(TRIES, 2, httpx2.NetworkError, httpx2.RemoteProtocolError)
    try:
        data, size = again(_fetch_once, place, start, end)
    except (OSError, ValueError, RuntimeError, httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise _refusal(error, place) from error
    if len(data) < min(end, size) - start:
        raise RegistryError("the server sends no more", where=place.shown, hint="try again")
    return data, size


def _fetch_once(place: Place, start: int, end: int) -> tuple[bytes, int]:
    from huggingface_hub.utils import _headers, _http

    headers = _headers.build_hf_headers() if place.hub else {}
    headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    options: dict[str, Any] = {"headers": headers, "timeout": TIMEOUT_SECONDS}
    with _http.get_session().stream("GET", place.url, **options) as answer:
        if answer.status_code >= 400:
            if place.hub:
                answer.read()  # its message is the hub's own
                _http.hf_raise_for_status(answer)
            answer.raise_for_status()
        size, data = _size_told(answer, start, place.shown), bytearray()
        latest = time.monotonic() + TIMEOUT_SECONDS + (end - start) / SLOWEST
        for chunk in answer.iter_raw():
            data += chunk
            if len(data) >= end - start:
                break
            if time.monotonic() > latest:
                raise RegistryError("the server sends too slowly", where=place.shown, hint="try again")
    return bytes(data[: end - start]), size


def _refusal(error: Exception, place: Place) -> DfqsError:
    """The network's and the hub's errors in our words."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", None)
    if place.hub and status:
        return models.explained(error, place.hub)
    if status:
        return RegistryError(f"the server answers {status}", where=place.shown, hint="check the address")
    if isinstance(error, OfflineModeIsEnabled):
        return RegistryError("offline, and not here", where=place.shown, hint="unset HF_HUB_OFFLINE")
    hint = "check the address, the network and any proxy"
    return RegistryError(f"cannot be reached ({error})", where=place.shown, hint=hint)


def _size_told(answer: Any, start: int, address: str) -> int:
    """The file's size, from an answer to a request for a range.

    Raises:
        RegistryError: the server gave the whole file, or another range.
    """
    told = RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    if answer.status_code == 206 and told and int(told[1]) == start:
        return int(told[3])
    length = answer.headers.get("Content-Length", "")
    if answer.status_code == 200 and start == 0 and length.isdigit() and int(length) <= SMALL_BYTES:
        return int(length)
    hint = "download the file, and inspect it here"
    raise RegistryError("this server gives no byte ranges, only whole files", where=address, hint=hint)
