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
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urlsplit, urlunsplit

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
class Place:
    """A remote file: its address for people, its name, its URL, and its place on the hub, if any."""

    address: str
    name: str
    url: str
    hub: models.HubFile | None = None


@dataclass(frozen=True)
class Copy:
    """Sparse files that hold headers only; ``path``: that of the address, with its other shards beside it.

    ``places``: where the original of each copy is.
    """

    path: Path
    fetched_bytes: int
    places: Mapping[Path, Place]


@dataclass(frozen=True)
class Outline:
    """The headers of a whole model, wherever its files are.

    ``glued``: the shards lie in one file, which no runtime loads before `dfqs-nb repair`. ``copy``: what was
    fetched; None for files that are here.
    """

    model: str
    shards: ShardSet
    glued: bool
    copy: Copy | None

    @property
    def path(self) -> Path:
        """The file to name to llama.cpp, which plans it without its data."""
        return self.shards.paths[0]

    def open(self, path: Path) -> AbstractContextManager[Any]:
        """A shard's bytes for reading, here or remote."""
        return nullcontext(RemoteFile(self.copy.places[path], STREAM_BYTES)) if self.copy else path.open("rb")


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
    """The headers of a model: a path, a registered name, or an address. Remote ones are copied for the block.

    `RegistryError`: nothing has that name, or the server gives no file or no ranges. `HeaderError`,
    `LayoutError`, `ShardError`: the files are not all shards of one model.
    """
    with ExitStack() as stack:
        path, copy = _first_file(model), None
        if isinstance(path, str):
            copy = stack.enter_context(headers_of(path))
            path = copy.path
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dfqs-headers-")))
        try:
            headers = list(headers_inside(path))
            if glued := len(headers) > 1:
                laid_out = []  # each as a sparse file that llama.cpp's loader can plan
                for number, header in enumerate(check_set(headers, glued=True).headers, 1):
                    laid_out.append(shard_path(folder / "glued", number, len(headers)))
                    with laid_out[-1].open("wb") as file:
                        file.write(header.raw)
                        file.truncate(header.end_offset - header.start)
                shards = ShardSet(tuple(map(read_header, laid_out)))
            else:
                shards = open_shards(path)
            yield Outline(str(model), shards, glued, copy)
        except DfqsError as error:
            copies = [folder, *([copy.path.parent] if copy else [])]
            if not any(Path(error.where or "").is_relative_to(place) for place in copies):
                raise
            raise type(error)(error.what, where=shown(str(model)), hint=error.hint) from None


def _first_file(model: str | Path) -> Path | str:
    """The first file of a model on this machine or in the hub's cache; else an address."""
    entry = models.registered().get(str(model))
    if not models.is_address(model) and (entry is None or not entry.source.startswith("hf://")):
        return models.resolve(model)[0]
    with suppress(RegistryError):
        return models.resolve(model, local_files_only=True)[0]
    if entry is None:
        return str(model)
    return str(models.located(models.HubFile(entry.source.removeprefix("hf://"), entry.files[0].name)))


@contextmanager
def headers_of(address: str) -> Iterator[Copy]:
    """Fetch the headers of a remote file and of its other shards; the copies go when the block ends.

    `RegistryError`: the server does not give the file, or gives no ranges.
    """
    places = places_of(address)
    wanted = next(place for place in places if place.address == address)
    with tempfile.TemporaryDirectory(prefix="dfqs-headers-") as name, ThreadPoolExecutor(8) as pool:
        folder, path = Path(name), Path(name) / wanted.name
        fetched = _copied(wanted, path)
        with suppress(HeaderError):  # whoever reads the copy reports it
            if "split.no" in read_header(path):
                others = [place for place in places if place is not wanted]
                fetched += sum(pool.map(lambda place: _if_there(place, folder / place.name), others))
        yield Copy(path, fetched, {folder / place.name: place for place in places})


def places_of(address: str) -> list[Place]:
    """The file of an address and its other shards, by their names, in order.

    >>> [place.name for place in places_of("https://x.org/m-00001-of-00002.gguf?download=true")]
    ['m-00001-of-00002.gguf', 'm-00002-of-00002.gguf']
    """
    from huggingface_hub import hf_hub_url

    try:
        file = models.parse_address(address)
    except RegistryError:
        if address.startswith("hf://"):
            raise
    else:
        places = []
        for name in models.siblings(file.file):
            shard, url = replace(file, file=name), hf_hub_url(file.repo, name, revision=file.revision)
            label = address if name == file.file else str(shard)
            places.append(Place(label, PurePosixPath(name).name, url, shard))
        return places
    scheme, host, path, query, _ = urlsplit(address)
    folder, own = unquote(path).rpartition("/")[::2]
    if len(own.encode()) > 255 or "\0" in own or own in (".", ".."):
        raise RegistryError("no file can have such a name", where=address, hint="check the address")
    names = models.siblings(own)
    urls = {name: urlunsplit((scheme, host, quote(f"{folder}/{name}"), query, "")) for name in names}
    return [Place(address if name == own else url, name or "index", url) for name, url in urls.items()]


def _if_there(place: Place, path: Path) -> int:
    """Copy one more shard; the bytes fetched. The shards' cross-check names one that is missing."""
    try:
        return _copied(place, path)
    except RegistryError:
        path.unlink()
        return 0


def _copied(place: Place, path: Path) -> int:
    """Make a sparse copy of a file's headers; the bytes fetched."""
    with path.open("wb") as copy:
        remote = RemoteFile(place, LEAST_BYTES, copy)
        with suppress(HeaderError):  # whoever reads the copy meets the same bytes, and reports the error
            for _ in headers_inside(path, remote):
                pass  # each is fetched as it is read
        copy.truncate(remote.size)
    return remote.fetched_bytes


class RemoteFile:
    """A remote file for reading, through a window of at least ``block`` bytes in memory.

    ``copy``: a file that keeps every window at its place, up to `MOST_BYTES` in all.
    """

    def __init__(self, place: Place, block: int, copy: BinaryIO | None = None) -> None:
        self.place, self.block, self.copy = place, block, copy
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
        if self.copy and self.fetched_bytes + n > MOST_BYTES:
            what = f"its headers take more than {MOST_BYTES:,} bytes"
            raise _refused(self.place, what, "check the address")
        self.start = self.position
        self.window, size = fetch(self.place, self.start, self.start + n)
        if self.size not in (0, size):
            raise _refused(self.place, "the file changed while it was read")
        self.size, self.fetched_bytes = size, self.fetched_bytes + len(self.window)
        if self.copy:
            self.copy.seek(self.start)
            self.copy.write(self.window)


def fetch(place: Place, start: int, end: int) -> tuple[bytes, int]:
    """Bytes of a remote file (fewer at its end), and its size; `RegistryError`: the server gives none."""
    import httpx2

    again = models.retrying(TRIES, 2, httpx2.NetworkError, httpx2.RemoteProtocolError)
    try:
        data, size = again(_fetch_once, place, start, end)
    except (OSError, ValueError, RuntimeError, httpx2.HTTPError, httpx2.InvalidURL) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if place.hub and status:
            raise models.explained(error, place.hub) from error
        what = f"the server answers {status}" if status else f"cannot be reached ({error})"
        raise _refused(place, what, "check the address, the network and any proxy") from error
    if len(data) < min(end, size) - start:
        raise _refused(place, "the server sends no more")
    return data, size


def _fetch_once(place: Place, start: int, end: int) -> tuple[bytes, int]:
    from huggingface_hub.utils import _headers, _http

    headers = _headers.build_hf_headers() if place.hub else {}
    headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    options: dict[str, Any] = {"headers": headers, "timeout": TIMEOUT_SECONDS}
    with _http.get_session().stream("GET", place.url, **options) as answer:
        if answer.status_code >= 400:
            if place.hub:
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
            what = "this server gives no byte ranges, only whole files"
            raise _refused(place, what, "download the file, and inspect it here")
        data, latest = bytearray(), time.monotonic() + TIMEOUT_SECONDS + (end - start) / SLOWEST
        for chunk in answer.iter_raw():
            data += chunk
            if len(data) >= end - start:
                break
            if time.monotonic() > latest:
                raise _refused(place, "the server sends too slowly")
    return bytes(data[: end - start]), size


def _refused(place: Place, what: str, hint: str = "try again") -> RegistryError:
    return RegistryError(what, where=shown(place.address), hint=hint)
