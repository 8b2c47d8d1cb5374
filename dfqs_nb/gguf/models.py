"""Names to files: the models that the workbook knows, any local path, and any GGUF file of the hub.

Headers can be had before the download. llama.cpp and our own checks want files, so a remote header, read by
HTTP ranges, becomes a sparse file of the original's size. An error about that file names the address.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from errno import EACCES, ENOSPC, EPERM, EROFS
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, NamedTuple
from urllib.parse import unquote, urlsplit

from dfqs_nb.core.display import did_you_mean, one_line
from dfqs_nb.core.errors import DfqsError, HeaderError, IntegrityError, OutputError, RegistryError, SpaceError
from dfqs_nb.core.files import is_file, sha256_of, there_is
from dfqs_nb.core.paths import data_dir, tilde
from dfqs_nb.gguf.header import headers_inside, read_header
from dfqs_nb.gguf.shards import SHARD_NAME, ShardSet, check_set, open_shards, shard_path

if TYPE_CHECKING:
    from huggingface_hub import HfUri

OTHER_DISK = "free some space, or set HF_HOME to a folder on another disk that you may write"
NOT_WRITTEN = {ENOSPC: SpaceError, EACCES: OutputError, EPERM: OutputError, EROFS: OutputError}
FORM = "hf://owner/repo/file.gguf or hf://owner/repo/file.gguf@revision"
ADDRESS = re.compile("(hf|https?)://")  # of a file on the hub or a web server; paths lose a slash
LEAST_BYTES, STREAM_BYTES = 1 << 19, 64 << 20  # of a request for headers, and of one for data
MOST_BYTES = 128 << 20  # of headers in one file; real headers stay under 50 MB, and the reader doubles
TIMEOUT_SECONDS, TRIES = 20.0, 4  # of a request, and of each request when connections break
TOTAL_SECONDS = 600.0  # of the headers of one file, or of one request for data
RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})")
NEXT = "check address, network, proxy and offline mode (a private model: `hf auth login`), and run again"


class ModelFile(NamedTuple):
    """A file of a model: its name without folder, its size, its SHA-256 in lower-case hex."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Model:
    """A registered model, with its files in order."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    name: str
    title: str
    files: tuple[ModelFile, ...]
    source: str
    licence: str
    numbers_from: str
    note: str
    merged_sha256: str = ""  # of what ``llama-gguf-split --merge`` makes of the files, if recorded

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.size_bytes for file in self.files)


def registered() -> dict[str, Model]:
    """The registered models by name, in the order of ``data/models.toml``."""
    import tomllib

    from pydantic import TypeAdapter

    path = data_dir() / "models.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        rows = {name: {"name": name, **entry} for name, entry in table.items()}
        return TypeAdapter(dict[str, Model]).validate_python(rows)
    except (OSError, ValueError, TypeError) as error:  # pydantic's errors are ValueErrors
        hint = "restore it with git, or set DFQS_DATA to a folder that has it"
        raise RegistryError(f"cannot read the table ({error})", where=tilde(path), hint=hint) from error


def resolve(model: str | Path, *, local_files_only: bool = False) -> tuple[Path, ...]:
    """The local paths of a model's files, shards in order; missing files are downloaded.

    ``model``: a registered name; a local file (also one shard); or a file of the hub (``hf://`` or its page),
    where one shard stands for all. `RegistryError`, `SpaceError`, `OutputError`: why there are none.
    """
    given, known = str(model), registered()
    if ADDRESS.match(given):
        return download(siblings(given), local_files_only)
    if isinstance(model, str) and given in known:
        places = [f"{known[given].source}/{file.name}" for file in known[given].files]
        if not ADDRESS.match(places[0]):
            return tuple(data_dir() / PurePosixPath(place).relative_to("data") for place in places)
        try:
            return download(places, local_files_only=True)  # the table pins them, so the cache is enough
        except RegistryError:
            if local_files_only:
                raise
            return download([located(place) for place in places])
    path = Path(os.path.expanduser(given))  # noqa: PTH111 (pathlib raises for a user whom it does not know)
    if is_file(path):
        return (path,)
    if there_is(path):
        raise RegistryError("is a folder, or no regular file", where=tilde(path), hint="name a file")
    close = did_you_mean(given.lower(), known, 0.4)
    what = "no such file" if "/" in given or given.lower().endswith(".gguf") else "no such model"
    raise RegistryError(what, where=given, hint=f"{close}known: {', '.join(known)}; or give a path or {FORM}")


def check_files(paths: Sequence[Path], model: Model) -> tuple[str, ...]:
    """The SHA-256 of a registered model's files. `IntegrityError`: one is not that of the table."""
    for path, file in zip(paths, model.files, strict=True):
        if (sha256 := sha256_of(path)) != file.sha256:
            what = f"not the published file: its SHA-256 is {sha256[:16]}..., not {file.sha256[:16]}..."
            hint = f"delete {tilde(path.resolve())} and download it again"  # the hub's cache has links
            raise IntegrityError(what, where=tilde(path), hint=hint)
    return tuple(file.sha256 for file in model.files)


def shown(address: str) -> str:
    """An address without what may be a secret: user, password, query and fragment."""
    public = re.sub(r"([?#]).*", r"\1***", re.sub("(?<=://)[^/]*@", "***@", address))
    return public if ADDRESS.match(address) else address


def siblings(file: str) -> list[str]:
    """The names (or addresses) of all shards in order, from that of any; without a number, only this."""
    if not (match := SHARD_NAME.fullmatch(file)) or not 1 <= int(match[2]) <= int(match["count"]):
        return [file]
    return [f"{match[1]}-{number:05d}-of-{match[3]}{match[4]}" for number in range(1, int(match[3]) + 1)]


def parse_address(address: str) -> HfUri:
    """The parts of a hub file's address: ``hf://owner/repo/path/file.gguf@revision``, or that of its page."""
    from huggingface_hub import constants, parse_hf_uri
    from huggingface_hub.errors import HfUriError

    with suppress(HfUriError, ValueError):  # such as a bracket in a host's name
        uri = parse_hf_uri(address, endpoint=constants.ENDPOINT)
        file, _, revision = uri.path_in_repo.partition("@")
        uri = replace(uri, path_in_repo=file, revision=uri.revision or revision or None)
        parts = re.split("/|%2F", f"{uri.id}/{file}/{uri.revision or 'main'}")
        # a name that begins with `-` would be an option of the hub's own command
        fine = not any(part in ("", "..") or part[0] == "-" for part in parts)
        if fine and uri.type == "model" and file.lower().endswith(".gguf"):
            return uri
    raise RegistryError("not the address of a GGUF on the hub", where=shown(address), hint=f"write {FORM}")


def download(addresses: Sequence[str], local_files_only: bool = False) -> tuple[Path, ...]:
    """Paths of files of the hub in its cache: links, whose targets have other names; errors as `resolve`."""
    from huggingface_hub import constants, hf_hub_download

    def fetched(address: str, **options: Any) -> Any:
        uri = parse_address(address)
        options |= {"revision": uri.revision, "local_files_only": local_files_only}
        with explained(address):  # after a reset huggingface_hub begins the file again (its issue 4196)
            return persistently(hf_hub_download, uri.id, uri.path_in_repo, **options)

    plans = [fetched(address, dry_run=True) for address in addresses]  # all, before the first byte
    need = sum(plan.file_size or 0 for plan in plans if plan.will_download)
    cache = Path(constants.HF_HUB_CACHE).expanduser().absolute()
    folder = next(place for place in (cache, *cache.parents) if place.exists())
    if need > (free := shutil.disk_usage(folder).free):
        what = f"the download needs {need:,} bytes and the disk has {free:,} free"
        raise SpaceError(what, where=tilde(folder), hint=OTHER_DISK)
    return tuple(Path(fetched(address)) for address in addresses)


def located(address: str) -> str:
    """The address of a file in the folder that has it; as given where the hub does not tell."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    uri = parse_address(address)
    with explained(address), suppress(HfHubHTTPError):  # the download reports what the hub refuses
        places = [it for it in HfApi().list_repo_files(uri.id) if PurePosixPath(it).name == uri.path_in_repo]
        return f"hf://{uri.id}/{places[0]}" if len(places) == 1 else address
    return address


def persistently(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function, and again after growing pauses while connections break; raises the last error."""
    import httpx2
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

    broken = retry_if_exception_type((httpx2.NetworkError, httpx2.RemoteProtocolError))
    again = Retrying(retry=broken, wait=wait_exponential(), stop=stop_after_attempt(TRIES), reraise=True)
    return again(function, *arguments, **options)


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Turn errors of huggingface_hub, httpx and the disk into the workbook's; their own words say why."""
    import httpx2
    from huggingface_hub.errors import LocalEntryNotFoundError, XetDownloadError

    network = (OSError, ValueError, RuntimeError, httpx2.HTTPError, httpx2.InvalidURL, XetDownloadError)
    try:
        yield
    except (ImportError, *network) as error:  # an import: a SOCKS proxy needs one more package
        if kind := NOT_WRITTEN.get(getattr(error, "errno", None) or 0):
            what = f"the hub's cache cannot be written ({error})"
            raise kind(what, where=shown(address), hint=OTHER_DISK) from error
        # where a file is not in the cache either, the cause says why the hub was of no help
        cause = (isinstance(error, LocalEntryNotFoundError) and error.__cause__) or error
        words = re.sub(r"https?://[^\s'\"]+", lambda url: shown(url[0]), one_line(cause))
        words = words.partition(" For more information")[0]
        raise RegistryError(f"cannot be fetched ({words})", where=shown(address), hint=NEXT) from error


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
    entry = registered().get(str(model))
    address = f"{entry.source}/{entry.files[0].name}" if entry else str(model)
    try:
        return resolve(model, local_files_only=True)[0]
    except RegistryError:
        if not ADDRESS.match(address):
            raise
    return located(address) if entry else address


@contextmanager
def _copies(model: str, places: Mapping[Path, str]) -> Iterator[Path]:
    """A folder for copies of headers; an error about one is raised again about its place, or the model."""
    with TemporaryDirectory() as folder:
        try:
            yield Path(folder)
        except DfqsError as error:
            if folder not in str(error.where):
                raise
            where = shown(places.get(Path(str(error.where)), model))
            raise type(error)(error.what, where=where, hint=error.hint) from None


@contextmanager
def headers_of(file: str | Path) -> Iterator[tuple[Path, dict[Path, str]]]:
    """The path of a local file, or of a copy of a remote one's headers; and the address of each copy."""
    if not ADDRESS.match(address := str(file)):
        yield Path(file), {}
        return
    places = dict[Path, str]()
    with _copies(address, places) as folder, ThreadPoolExecutor(8) as pool:
        places |= {folder / _located(other)[1]: other for other in siblings(address)}
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
        uri = parse_address(address)
        url, path = hf_hub_url(uri.id, uri.path_in_repo, revision=uri.revision), uri.path_in_repo
    except RegistryError:
        if address.startswith("hf://"):
            raise
        with explained(address):
            url, path = "", unquote(urlsplit(address).path)
    name = path.rpartition("/")[2]
    if not 0 < len(name.encode()) < 256 or "\0" in name or name in (".", ".."):
        raise RegistryError("no usable name of a file", where=shown(address), hint="check the address")
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
        with explained(self.address):
            if self.copy and self.fetched_bytes + n > MOST_BYTES:
                raise ValueError(f"its headers take more than {MOST_BYTES:,} bytes")
            self.window, size = persistently(self._ranged, self.position, self.position + n)
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
                raise RegistryError(what, where=shown(url), hint="download it, and give its path")
            for chunk in answer.iter_raw():
                data += chunk
                if len(data) >= end - start:
                    break  # of a server that sends more than it was asked for
                if time.monotonic() > self.until:
                    raise ValueError(f"the server sends too slowly: {TOTAL_SECONDS:.0f} seconds are over")
        if len(data) < min(end, size := int(place[2])) - start:
            raise ValueError("the server does not send all that it promises")
        return bytes(data[: end - start]), size
