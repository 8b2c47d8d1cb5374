"""Names to files: the models that the workbook knows, any local path, and any GGUF file of the hub.

The table is ``data/models.toml``. huggingface_hub downloads. It resumes a connection that closes early. After
a reset, and in a later run, it begins that file again (huggingface/huggingface_hub#4196) and keeps complete
files. We ask for every file before we fetch the first, so a missing file or a full disk shows at once.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple

from dfqs_nb.core.display import did_you_mean, entries, one_line
from dfqs_nb.core.errors import DfqsError, IntegrityError, OutputError, RegistryError, SpaceError, proxy_fault
from dfqs_nb.core.files import sha256_of
from dfqs_nb.core.paths import data_dir, tilde

OTHER_DISK = "free some space, or set HF_HOME to a folder on another disk that you may write"
FORM = "hf://owner/repo/file.gguf or hf://owner/repo/file.gguf@revision"
ADDRESS = re.compile("(hf|https?)://")  # of a file on the hub or a web server; paths lose a slash
SHARD = re.compile(r"(.+-)(\d{5})-of-(\d{5})(\.gguf(?:[@?#].*)?)", re.DOTALL | re.IGNORECASE)
CAUSES = entries("""
RevisionNotFoundError: the repository has no such revision; name a branch, a tag or a commit of it |
GatedRepoError: the repository is gated; accept its terms on its web page, then `hf auth login` |
RepositoryNotFoundError: no such repository, or it is private; check the spelling, or `hf auth login` |
RemoteEntryNotFoundError: the repository has no such file; its page shows the names |
OfflineModeIsEnabled: not in the cache, and offline; unset HF_HUB_OFFLINE (or local_files_only), run again
""")  # errors of huggingface_hub: what is wrong, and the next step; for others it has words of its own
NEXT = "check the address, the network and any proxy (a private model: `hf auth login`), and run again"


@dataclass(frozen=True)
class ModelFile:
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
    """The registered models by name, in the order of ``data/models.toml``.

    >>> [len(model.files) for model in registered().values()]
    [2, 2, 1, 2, 1]
    """
    from pydantic import TypeAdapter

    path = data_dir() / "models.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        rows = {name: {"name": name, **entry} for name, entry in table.items()}
        return TypeAdapter(dict[str, Model]).validate_python(rows)
    except (OSError, ValueError, TypeError) as error:  # pydantic's errors are ValueErrors
        hint = "restore it with git, or set DFQS_DATA to a folder that has it"
        what = f"cannot read the table of models ({error})"
        raise RegistryError(what, where=tilde(path), hint=hint) from error


def resolve(model: str | Path, *, local_files_only: bool = False) -> tuple[Path, ...]:
    """The local paths of a model's files, shards in order; missing files are downloaded.

    ``model``: a registered name; a local file (also one shard); or a file of the hub, where one shard stands
    for all, as ``hf://owner/repo/path/file.gguf[@revision]`` or the address of its page.
    ``local_files_only``: take only what is in the hub's cache, as with ``HF_HUB_OFFLINE``. `RegistryError`:
    nothing has that name, or the hub does not give the files. `IntegrityError`: a registered file has another
    size than in the table. `SpaceError`, `OutputError`: no room in the cache, or no right.

    >>> [path.name for path in resolve("dfqs-nano-iq1_s-xl")]
    ['DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf', 'DFQS-Nano-IQ1_S-XL-00002-of-00002.gguf']
    """
    path, given, known = Path(model).expanduser(), str(model), registered()
    if ADDRESS.match(given):
        return download(siblings(given), local_files_only)
    if isinstance(model, str) and model in known:
        return _files_of(known[model], local_files_only)
    if path.is_file():
        return (path,)
    if path.is_dir():
        raise RegistryError("is a folder", where=tilde(path), hint="give the path of a file in it")
    names = ", ".join(known)
    if "/" in given or "\\" in given or given.lower().endswith(".gguf"):
        hint = f"check the path, or give the name of a known model: {names}"
        raise RegistryError("no such file", where=given, hint=hint)
    hint = f"{did_you_mean(given.lower(), known, 0.4)}known: {names}; or give a path or {FORM}"
    raise RegistryError(f"no model is called {given!r}", hint=hint)


def shown(address: str) -> str:
    """An address without what may be a secret: user, password, query and fragment.

    >>> shown("https://me:word@x.org/c.gguf?token=1"), shown("hf://a/b/c.gguf@v1"), shown("my?#.gguf")
    ('https://***@x.org/c.gguf?***', 'hf://a/b/c.gguf@v1', 'my?#.gguf')
    """
    if not ADDRESS.match(address):
        return address
    return re.sub(r"([?#]).*", r"\1***", re.sub("(?<=://)[^/]*@", "***@", address))


def siblings(file: str) -> list[str]:
    """The names (or addresses) of all shards in order, from that of any; without a shard number, only this.

    >>> siblings("hf://a/b/tiny-00002-of-00002.gguf@v1")
    ['hf://a/b/tiny-00001-of-00002.gguf@v1', 'hf://a/b/tiny-00002-of-00002.gguf@v1']
    """
    match = SHARD.fullmatch(file)
    if match is None or not 1 <= int(match[2]) <= int(match[3]):
        return [file]
    return [f"{match[1]}{number:05d}-of-{match[3]}{match[4]}" for number in range(1, int(match[3]) + 1)]


def _files_of(model: Model, local_files_only: bool) -> tuple[Path, ...]:
    """The files of a registered model, here or in the hub's cache, of the sizes in the table."""
    if model.source.startswith("hf://"):
        addresses = [f"{model.source}/{file.name}" for file in model.files]
        try:
            paths = download(addresses, local_files_only=True)  # the table pins them, so the cache is enough
        except RegistryError:
            if local_files_only:
                raise
            paths = download([located(address) for address in addresses])
    else:
        folder = data_dir() / PurePosixPath(model.source).relative_to("data")
        paths = tuple(folder / file.name for file in model.files)
        if missing := [path for path in paths if not path.is_file()]:
            hint = f"it belongs to the repository: `git checkout -- {model.source}`"
            raise RegistryError("missing", where=tilde(missing[0]), hint=hint)
    check_files(paths, model, hashed=False)
    return paths


def check_files(paths: Sequence[Path], model: Model, *, hashed: bool = True) -> tuple[str, ...]:
    """Compare the number, the sizes and the SHA-256 of files with the table. Returns the hashes.

    ``hashed``: False compares sizes only. `IntegrityError`: something differs.
    """
    count = len(model.files)
    if len(paths) != count:
        what = f"{len(paths)} files given, but {model.name} has {count}"
        raise IntegrityError(what, hint="give all files, in order")
    wrong, hashes = {}, list[str]()
    for path, file in zip(paths, model.files, strict=True):
        if surplus := path.stat().st_size - file.size_bytes:
            how = f"{abs(surplus):,} bytes {'short' if surplus < 0 else 'too long'}"
            wrong[path] = f"is {how} (expected {file.size_bytes:,})"
    for path, file in zip(paths, model.files, strict=True) if hashed and not wrong else ():
        hashes.append(sha256_of(path))
        if hashes[-1] != file.sha256:
            wrong[path] = f"has SHA-256 {hashes[-1][:16]}... (expected {file.sha256[:16]}...)"
    for path, what in wrong.items():
        which = f"shard {list(paths).index(path) + 1} of {count}" if count > 1 else "the file"
        real = path.resolve()  # the hub's cache has links
        first = f"delete {tilde(real)} and " if real != path.absolute() else ""
        raise IntegrityError(f"{which} {what}", where=tilde(path), hint=f"{first}download it again")
    return tuple(hashes)


class HubFile(NamedTuple):
    """A file on the hub: ``owner/name`` of its repository, its path there, a revision (None: main)."""

    repo: str
    file: str
    revision: str | None = None


def parse_address(address: str) -> HubFile:
    """The parts of a hub file's address: ``hf://owner/repo/path/file.gguf@revision``, or that of its page.

    >>> parse_address("https://huggingface.co/someone/models/blob/main/tiny.gguf?download=true")
    HubFile(repo='someone/models', file='tiny.gguf', revision='main')
    """
    from huggingface_hub import constants, parse_hf_uri
    from huggingface_hub.errors import HfUriError

    with suppress(HfUriError, ValueError):  # such as a bracket in a host's name
        uri = parse_hf_uri(address, endpoint=constants.ENDPOINT)
        file, _, revision = uri.path_in_repo.partition("@")
        parts = re.split("/|%2F", f"{uri.id}/{file}/{uri.revision or revision or 'main'}")
        # a name that begins with `-` would be an option of the hub's own command
        fine = not any(part in ("", "..") or part[0] == "-" for part in parts)
        if fine and uri.type == "model" and file.lower().endswith(".gguf"):
            return HubFile(uri.id, file, uri.revision or revision or None)
    raise RegistryError(
        "not the address of a GGUF file on the hub", where=shown(address), hint=f"write {FORM}"
    )


def download(addresses: Sequence[str], local_files_only: bool = False) -> tuple[Path, ...]:
    """Local paths of files of the hub in its cache, fetched if they are not there; errors as `resolve`.

    The paths are the cache's links. Never resolve them: their targets have other names.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    plans = [_fetch(address, local_files_only=local_files_only, dry_run=True) for address in addresses]
    need = sum(plan.file_size or 0 for plan in plans if plan.will_download)
    cache = Path(HF_HUB_CACHE).expanduser().absolute()
    folder = next(place for place in (cache, *cache.parents) if place.exists())
    if need > (free := shutil.disk_usage(folder).free):
        what = f"the download needs {need:,} bytes and the disk has {free:,} free"
        raise SpaceError(what, where=tilde(folder), hint=OTHER_DISK)
    return tuple(Path(_fetch(address, local_files_only=local_files_only)) for address in addresses)


def located(address: str) -> str:
    """The address of a file in the folder that has it; as given where the hub does not tell."""
    from huggingface_hub import HfApi

    file = parse_address(address)
    with suppress(DfqsError), explained(address):  # `_fetch` reports the same fault
        names = HfApi().list_repo_files(file.repo)
        places = [name for name in names if PurePosixPath(name).name == file.file]
        return f"hf://{file.repo}/{places[0]}" if len(places) == 1 else address
    return address


def _fetch(address: str, **options: Any) -> Any:
    """Call huggingface_hub, again after a reset."""
    import httpx2
    from huggingface_hub import hf_hub_download

    file, resets = parse_address(address), retrying(4, 30, httpx2.ReadError, httpx2.RemoteProtocolError)
    with explained(address):
        return resets(hf_hub_download, file.repo, file.file, revision=file.revision, **options)


def retrying(tries: int, most_seconds: float, *errors: type[Exception]) -> Any:
    """Calls a function again after one of these errors, with growing pauses; raises the last error."""
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

    again, wait = retry_if_exception_type(errors), wait_exponential(max=most_seconds)
    return Retrying(retry=again, stop=stop_after_attempt(tries), wait=wait, reraise=True)


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Turn errors of huggingface_hub, httpx and the disk into the workbook's; the hub's own words say why."""
    import httpx2
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled, XetDownloadError

    network = (OSError, ValueError, RuntimeError, httpx2.HTTPError, httpx2.InvalidURL, XetDownloadError)
    try:
        yield
    except (ImportError, *network) as error:
        kind: type[DfqsError] = RegistryError
        cause: BaseException = error
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS):
            kind = SpaceError if number == errno.ENOSPC else OutputError
            what, hint = f"the hub's cache cannot be written ({os.strerror(number)})", OTHER_DISK
        elif isinstance(error, httpx2.InvalidURL) or "proxy URL" in str(error) or "socksio" in str(error):
            what, hint = proxy_fault(error)
        elif isinstance(error, ImportError):
            raise
        else:
            if isinstance(error, LocalEntryNotFoundError):  # its cause says why the hub was of no help
                cause = error.__cause__ or OfflineModeIsEnabled()
            words = re.sub(r"https?://[^\s'\"]+", lambda url: shown(url[0]), one_line(cause))
            words = f"cannot be fetched ({words.partition(' For more information')[0]}); {NEXT}"
            what, _, hint = CAUSES.get(type(cause).__name__, words).partition("; ")
        raise kind(what, where=shown(address), hint=hint) from error
