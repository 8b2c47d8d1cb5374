"""Names to files: the models that the workbook knows, any local path, and any GGUF file of the hub.

The table is ``data/models.toml``. huggingface_hub downloads. It resumes a connection that closes early. After
a reset, and in a later run, it begins that file again (huggingface/huggingface_hub#4196) and keeps complete
files. We ask for every file before we fetch the first, so a missing file or a full disk shows at once.
"""

from __future__ import annotations

import errno
import re
import shutil
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from dfqs_nb.core.display import did_you_mean, entries
from dfqs_nb.core.errors import DfqsError, IntegrityError, OutputError, RegistryError, SpaceError, proxy_fault
from dfqs_nb.core.files import sha256_of
from dfqs_nb.core.paths import data_dir, tilde
from dfqs_nb.gguf.shards import SHARD_NAME, shard_path

LARGER_DISK = "free some space, or set HF_HOME to a folder on a larger disk"
FORM = "hf://owner/repo/file.gguf or hf://owner/repo/file.gguf@revision"
CAUSES = entries("""
RevisionNotFoundError: the repository has no such revision; name a branch, a tag or a commit of it |
GatedRepoError: the repository is gated; accept its terms on its web page, then `hf auth login` |
RepositoryNotFoundError: no such repository, or it is private; check the spelling, or `hf auth login` |
OfflineModeIsEnabled: not in the cache, and offline; unset HF_HUB_OFFLINE (or local_files_only), run again |
FileMetadataError: the server does not answer like a hub; check HF_ENDPOINT, and any proxy |
HFValidationError: not a name the hub allows; check the spelling |
ProxyError: the proxy refuses; check HTTPS_PROXY
""")  # errors of huggingface_hub and httpx by name: what is wrong, and the next step
NO_RIGHT = "the token lacks the right to read it: `hf auth login` with one that has it, or unset HF_TOKEN"
STATUS_HINTS = {401: NO_RIGHT, 403: NO_RIGHT, 429: "too many requests: wait some minutes"}


@dataclass(frozen=True)
class ModelFile:
    """A file of a model: its name without folder, its size, its SHA-256 in lower-case hex."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Model:
    """A registered model, with its files in order.

    ``merged_sha256``: of what ``llama-gguf-split --merge`` makes of the files; empty if not recorded.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    name: str
    title: str
    files: tuple[ModelFile, ...]
    source: str
    licence: str
    numbers_from: str
    note: str
    merged_sha256: str = ""

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
        models = TypeAdapter(list[Model]).validate_python(
            [{"name": n, **entry} for n, entry in table.items()]
        )
    except (OSError, ValueError, TypeError) as error:  # pydantic's errors are ValueErrors
        hint = "restore it with git, or set DFQS_DATA to a folder that has it"
        what = f"cannot read the table of models ({error})"
        raise RegistryError(what, where=tilde(path), hint=hint) from error
    return {model.name: model for model in models}


def resolve(model: str | Path, *, local_files_only: bool = False) -> tuple[Path, ...]:
    """The local paths of a model's files, shards in order; missing files are downloaded.

    Args:
        model: a registered name; a local file (also one shard); or a file of the hub, where one shard stands
            for all, as ``hf://owner/repo/path/file.gguf[@revision]`` or the address of its page.
        local_files_only: take only what is in the hub's cache, as with ``HF_HUB_OFFLINE``.

    `RegistryError`: nothing has that name, or the hub does not give the files. `IntegrityError`: a registered
    file has another size than in the table. `SpaceError`, `OutputError`: no room in the cache, or no right.

    >>> [path.name for path in resolve("dfqs-nano-iq1_s-xl")]
    ['DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf', 'DFQS-Nano-IQ1_S-XL-00002-of-00002.gguf']
    """
    if is_address(model):
        address = parse_address(str(model))
        shards = [replace(address, file=name) for name in siblings(address.file)]
        return download(shards, local_files_only=local_files_only)
    if isinstance(model, str) and model in (known := registered()):
        return _registered(known[model], local_files_only)
    path, given = Path(model).expanduser(), str(model)
    if path.is_file():
        return (path,)
    if path.is_dir():
        raise RegistryError("is a folder", where=tilde(path), hint="give the path of a file in it")
    names = ", ".join(registered())
    if "/" in given or "\\" in given or given.lower().endswith(".gguf"):
        hint = f"check the path, or give the name of a known model: {names}"
        raise RegistryError("no such file", where=given, hint=hint)
    hint = f"{did_you_mean(given.lower(), registered(), 0.4)}known: {names}; or give a path or {FORM}"
    raise RegistryError(f"no model is called {given!r}", hint=hint)


def is_address(model: str | Path) -> bool:
    """Whether this is the address of a file on the hub or a web server.

    >>> is_address("hf://a/b/c.gguf"), is_address("https://x.org/c.gguf"), is_address("models/c.gguf")
    (True, True, False)
    """
    return isinstance(model, str) and re.match(r"(hf|https?)://", model) is not None


def siblings(file: str) -> list[str]:
    """The names of all shards in order, from the name of any; a name without a shard number stays alone.

    >>> siblings("IQ1/tiny-00002-of-00002.gguf")
    ['IQ1/tiny-00001-of-00002.gguf', 'IQ1/tiny-00002-of-00002.gguf']
    """
    match = SHARD_NAME.fullmatch(file)
    if match is None or not 1 <= int(match["number"]) <= (count := int(match["count"])):
        return [file]
    names = [shard_path(match["prefix"], number, count).as_posix() for number in range(1, count + 1)]
    names[int(match["number"]) - 1] = file  # as given: `.GGUF`, or a doubled slash
    return names


def check_sizes(paths: Sequence[Path], model: Model) -> None:
    """Compare the number and the sizes of files with the table; an IntegrityError where they differ."""
    if len(paths) != len(model.files):
        what = f"{len(paths)} files given, but {model.name} has {len(model.files)}"
        raise IntegrityError(what, hint="give all files, in order")
    for path, file in zip(paths, model.files, strict=True):
        surplus = path.stat().st_size - file.size_bytes
        if surplus:
            how = f"{abs(surplus):,} bytes {'short' if surplus < 0 else 'too long'}"
            raise _damaged(path, model, file, f"is {how} (expected {file.size_bytes:,})")


def check_hashes(paths: Sequence[Path], model: Model) -> tuple[str, ...]:
    """Compare sizes and SHA-256 with the table; an IntegrityError where they differ. Returns the hashes."""
    check_sizes(paths, model)
    hashes = tuple(map(sha256_of, paths))
    for path, file, digest in zip(paths, model.files, hashes, strict=True):
        if digest != file.sha256:
            what = f"has SHA-256 {digest[:16]}... (expected {file.sha256[:16]}...)"
            raise _damaged(path, model, file, what)
    return hashes


def _damaged(path: Path, model: Model, file: ModelFile, what: str) -> IntegrityError:
    number, count, real = model.files.index(file) + 1, len(model.files), path.resolve()
    which = f"shard {number} of {count}" if count > 1 else "the file"
    first = f"delete {tilde(real)} and " if real != path.absolute() else ""  # the hub's cache has links
    return IntegrityError(f"{which} {what}", where=tilde(path), hint=f"{first}download it again")


def _registered(model: Model, local_files_only: bool) -> tuple[Path, ...]:
    if model.source.startswith("hf://"):
        files = [HubFile(model.source.removeprefix("hf://"), file.name) for file in model.files]
        try:
            paths = download(files, local_files_only=True)  # the table pins them, so the cache is enough
        except RegistryError:
            if local_files_only:
                raise
            paths = download([located(file) for file in files])
    else:
        folder = data_dir() / PurePosixPath(model.source).relative_to("data")
        paths = tuple(folder / file.name for file in model.files)
        if missing := [path for path in paths if not path.is_file()]:
            hint = f"it belongs to the repository: `git checkout -- {model.source}`"
            raise RegistryError("missing", where=tilde(missing[0]), hint=hint)
    check_sizes(paths, model)
    return paths


@dataclass(frozen=True)
class HubFile:
    """A file on the hub: ``owner/name`` of its repository, its path there, a revision (None: main)."""

    repo: str
    file: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hf://{self.repo}/{self.file}" + (f"@{self.revision}" if self.revision else "")


def parse_address(address: str) -> HubFile:
    """The parts of a hub file's address: ``hf://owner/repo/path/file.gguf@revision``, or that of its page.

    >>> parse_address("hf://someone/models/IQ1/tiny.gguf@v1")
    HubFile(repo='someone/models', file='IQ1/tiny.gguf', revision='v1')
    >>> parse_address("https://huggingface.co/someone/models/blob/main/tiny.gguf?download=true")
    HubFile(repo='someone/models', file='tiny.gguf', revision='main')
    """
    from huggingface_hub import constants, parse_hf_uri
    from huggingface_hub.errors import HfUriError

    with suppress(HfUriError):
        uri = parse_hf_uri(address, endpoint=constants.ENDPOINT)
        file, _, revision = uri.path_in_repo.partition("@")
        parts = re.split("/|%2F", f"{uri.id}/{file}/{uri.revision or revision or 'main'}")
        # a name that begins with `-` would be an option of the hub's own command
        fine = not any(part in ("", "..") or part[0] == "-" for part in parts)
        if fine and uri.type == "model" and file.lower().endswith(".gguf"):
            return HubFile(uri.id, file, uri.revision or revision or None)
    raise RegistryError("not the address of a GGUF file on the hub", where=address, hint=f"write {FORM}")


def download(files: Sequence[HubFile], *, local_files_only: bool = False) -> tuple[Path, ...]:
    """Local paths of ``files`` in the hub's cache, fetched if they are not there; errors as `resolve`.

    The paths are the cache's links. Never resolve them: their targets have other names.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    plans = [_fetch(file, local_files_only=local_files_only, dry_run=True) for file in files]
    need = sum(plan.file_size or 0 for plan in plans if plan.will_download)
    folder = Path(HF_HUB_CACHE).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if need > free:
        what = f"the download needs {need:,} bytes and the disk has {free:,} free"
        raise SpaceError(what, where=tilde(folder), hint=LARGER_DISK)
    return tuple(Path(_fetch(file, local_files_only=local_files_only)) for file in files)


def located(file: HubFile) -> HubFile:
    """The same file in the folder of its repository that has it; unchanged where the hub does not tell."""
    name = PurePosixPath(file.file).name
    places = [path for path in _listed(file) if PurePosixPath(path).name == name]
    return replace(file, file=places[0]) if len(places) == 1 else file


def _listed(file: HubFile) -> list[str]:
    """The GGUF files of a repository, as far as the hub lists them."""
    import httpx2
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(file.repo, revision=file.revision)
    except (OSError, ValueError, RuntimeError, ImportError, httpx2.HTTPError, httpx2.InvalidURL):
        return []  # `_fetch` reports the same fault
    return [name for name in names if name.endswith(".gguf")]


def _fetch(file: HubFile, **options: Any) -> Any:
    """Call huggingface_hub, again after a reset; its errors become those of the workbook."""
    import httpx2
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import XetDownloadError

    network = (OSError, ValueError, RuntimeError, httpx2.HTTPError, httpx2.InvalidURL, XetDownloadError)
    resets = retrying(4, 30, httpx2.ReadError, httpx2.RemoteProtocolError)
    try:
        return resets(hf_hub_download, file.repo, file.file, revision=file.revision, **options)
    except (ImportError, *network) as error:
        if isinstance(error, ImportError) and "socksio" not in str(error):
            raise
        raise explained(error, file) from error


def retrying(tries: int, most_seconds: float, *errors: type[Exception]) -> Any:
    """Calls a function again after one of these errors, with growing pauses; raises the last error."""
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

    again, wait = retry_if_exception_type(errors), wait_exponential(max=most_seconds)
    return Retrying(retry=again, stop=stop_after_attempt(tries), wait=wait, reraise=True)


def explained(error: BaseException, file: HubFile) -> DfqsError:
    """The workbook's error for what huggingface_hub raised: the likely cause, and the next step."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    match error:
        case OSError(errno=errno.ENOSPC):
            return SpaceError("the disk filled up during the download", where=str(file), hint=LARGER_DISK)
        case OSError(errno=errno.EACCES | errno.EPERM | errno.EROFS):
            hint = "set HF_HOME to a folder you may write"
            return OutputError("the hub's cache cannot be written", where=error.filename, hint=hint)
    unreachable = isinstance(error, hub.LocalEntryNotFoundError)
    if unreachable:
        error = error.__cause__ or hub.OfflineModeIsEnabled()
    if cause := CAUSES.get(type(error).__name__):
        what, _, hint = cause.partition("; ")
    elif isinstance(error, hub.RemoteEntryNotFoundError):
        what, names = "the repository has no such file", _listed(file)
        hint = f"it has {', '.join(names[:8])}" if names else "it shows no .gguf file"
    elif isinstance(error, hub.HfHubHTTPError):
        status = error.response.status_code
        what = f"the hub answers {status}"
        hint = STATUS_HINTS.get(status, "the hub has a problem: run again later")
    elif unreachable:
        what = f"not in the cache, and {constants.ENDPOINT} cannot be reached ({error})"
        hint = "check the network, the proxy and HF_ENDPOINT, then run again"
    elif isinstance(error, ImportError | httpx2.InvalidURL) or "proxy URL" in str(error):
        what, hint = proxy_fault(error)
    elif isinstance(error, ValueError):  # over 50 GB without hf_xet, for example: it has the next step
        what, hint = str(error), ""
    else:
        what = f"the download was interrupted ({error})"
        hint = "run again: complete files are kept, this one starts over"
    return RegistryError(what, where=str(file), hint=hint)
