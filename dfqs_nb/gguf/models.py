"""Names to files: the models that the workbook knows, any local path, and any GGUF file of the hub.

The table is data: ``data/models.toml``. Downloads go through huggingface_hub: its cache, progress and
environment variables. Added here: every file is asked for before the first is fetched, so that a missing
file or a full disk shows at once; and each failure names its likely cause and the next step.

huggingface_hub resumes a connection that closes early. After a reset, and in a later run, it begins that file
again (huggingface/huggingface_hub#4196); files that were complete stay in its cache.
"""

from __future__ import annotations

import errno
import re
import shutil
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from dfqs_nb.core.display import did_you_mean
from dfqs_nb.core.errors import DfqsError, IntegrityError, OutputError, RegistryError, SpaceError, proxy_fault
from dfqs_nb.core.files import sha256_of
from dfqs_nb.core.paths import data_dir, tilde
from dfqs_nb.gguf.shards import SHARD_NAME, shard_path

ADDRESS = re.compile(
    r"hf://(?P<repo>[^/@\s]+/[^/@\s]+)(@(?P<early>[^/@]+))?/(?P<file>[^@]+\.gguf)(@(?P<late>\S+))?", re.I
)
PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co|hf-mirror\.com)/(?P<repo>[^/\s]+/[^/\s]+)/"
    r"(?:blob|resolve|raw)/(?P<revision>refs/[^/]+/[^/]+|[^/]+)/(?P<file>[^?#\s]+\.gguf)(?:[?#]\S*)?",
    re.I,
)
LARGER_DISK = "free some space, or set HF_HOME to a folder on a larger disk"
TRIES = 4  # of a download whose connection is reset
CAUSES = {  # errors of huggingface_hub by name
    "RevisionNotFoundError": (
        "the repository has no such revision",
        "name a branch, a tag or a commit of it",
    ),
    "GatedRepoError": ("the repository is gated", "accept its terms on its web page, then `hf auth login`"),
    "RepositoryNotFoundError": (
        "no such repository, or it is private",
        "check the spelling; for a private one log in with `hf auth login`",
    ),
}
STATUS_HINTS = {
    401: "the token is not valid: `hf auth login`, or unset HF_TOKEN",
    403: "the token lacks the right to read it: `hf auth login` with one that has it",
    429: "too many requests: wait some minutes, or log in with `hf auth login`",
}


@dataclass(frozen=True)
class ModelFile:
    """A file of a model: its name without folder, its size, its SHA-256 in lower-case hex."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Model:
    """A registered model: its files in order, where they come from, and who says so.

    ``merged_sha256`` is what ``llama-gguf-split --merge`` makes of the files; empty where nobody recorded it.
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

    Raises:
        RegistryError: the table is missing, not TOML, or has a wrong field.

    >>> [len(model.files) for model in registered().values()]
    [2, 2, 1, 2, 1]
    """
    from pydantic import TypeAdapter

    path = data_dir() / "models.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        entries = [{"name": name, **entry} for name, entry in table.items()]
        models = TypeAdapter(list[Model]).validate_python(entries)
    except (OSError, ValueError, TypeError) as error:  # pydantic's errors are ValueErrors
        hint = "restore it with git, or set DFQS_DATA to a folder that has it"
        what = f"cannot read the table of models ({error})"
        raise RegistryError(what, where=tilde(path), hint=hint) from error
    return {model.name: model for model in models}


def resolve(model: str | Path, *, local_files_only: bool = False) -> tuple[Path, ...]:
    """The local paths of a model's files, shards in order; what is missing here is downloaded.

    Args:
        model: a registered name; a local file (returned as it is, also when it is one shard of several) or a
            folder that holds one model; or a file of the hub, as
            ``hf://owner/repo/path/file.gguf[@revision]`` or by the address of its page, where the name of one
            shard stands for all of them. A registered name goes before a folder of that name.
        local_files_only: take only what is in the hub's cache. ``HF_HUB_OFFLINE`` does the same.

    Raises:
        RegistryError: nothing has that name, or the hub does not give the files.
        IntegrityError: a registered file has another size than the table says.
        SpaceError: the files do not fit on the disk of the cache.
        OutputError: the cache cannot be written.

    >>> [path.name for path in resolve("dfqs-nano-iq1_s-xl")]
    ['DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf', 'DFQS-Nano-IQ1_S-XL-00002-of-00002.gguf']
    """
    if is_address(model):
        address = parse_address(str(model))
        shards = [replace(address, file=name) for name in siblings(address.file)]
        return download(shards, local_files_only=local_files_only)
    if isinstance(model, str) and model in (known := registered()):
        return _registered(known[model], local_files_only)
    return _local(Path(model).expanduser(), str(model))


def is_address(model: str | Path) -> bool:
    """Whether this names a file of the hub or of a web server.

    >>> is_address("hf://a/b/c.gguf"), is_address("https://x.org/c.gguf"), is_address("models/c.gguf")
    (True, True, False)
    """
    return isinstance(model, str) and re.match(r"(hf|https?)://", model) is not None


def siblings(file: str) -> list[str]:
    """All shards of the file that this name belongs to, in order; a file without a shard number is alone.

    >>> siblings("IQ1/tiny-00002-of-00002.gguf")
    ['IQ1/tiny-00001-of-00002.gguf', 'IQ1/tiny-00002-of-00002.gguf']
    """
    match = SHARD_NAME.fullmatch(file)
    if match is None or not 1 <= int(match["number"]) <= (count := int(match["count"])):
        return [file]
    names = [shard_path(match["prefix"], number, count).as_posix() for number in range(1, count + 1)]
    names[int(match["number"]) - 1] = file  # as it was given: `.GGUF`, or a doubled slash
    return names


def check_sizes(paths: Sequence[Path], model: Model) -> None:
    """Compare the size of each file with the table (it reads no data).

    Raises:
        IntegrityError: a file is shorter or longer, or the number of files is another one.
    """
    if len(paths) != len(model.files):
        what = f"{len(paths)} files given, but {model.name} has {len(model.files)}"
        raise IntegrityError(what, hint="give all of them, in order")
    for number, (path, file) in enumerate(zip(paths, model.files, strict=True), 1):
        surplus = Path(path).stat().st_size - file.size_bytes
        if surplus:
            how = f"{abs(surplus):,} bytes {'short' if surplus < 0 else 'too long'}"
            raise _damaged(path, model, number, f"is {how} (expected {file.size_bytes:,})")


def check_hashes(paths: Sequence[Path], model: Model) -> tuple[str, ...]:
    """Compare the size, then the SHA-256 of each file with the table, and return the hashes.

    Raises:
        IntegrityError: a file is not the one that the table describes.
    """
    check_sizes(paths, model)
    hashes = tuple(map(sha256_of, paths))
    for number, (path, file, digest) in enumerate(zip(paths, model.files, hashes, strict=True), 1):
        if digest != file.sha256:
            text = f"has SHA-256 {digest[:16]}... (expected {file.sha256[:16]}...)"
            raise _damaged(path, model, number, text)
    return hashes


def _damaged(path: Path, model: Model, number: int, what: str) -> IntegrityError:
    which = f"shard {number} of {len(model.files)}" if len(model.files) > 1 else "the file"
    real = Path(path).resolve()  # in the hub's cache the name is a link, and the bytes are elsewhere
    first = f"delete {tilde(real)} and " if real != Path(path).absolute() else ""
    return IntegrityError(f"{which} {what}", where=tilde(path), hint=f"{first}download it again")


def _registered(model: Model, local_files_only: bool) -> tuple[Path, ...]:
    if model.source.startswith("hf://"):
        files = [HubFile(model.source.removeprefix("hf://"), file.name) for file in model.files]
        paths = download(files, any_folder=True, local_files_only=local_files_only)
    else:
        folder = data_dir() / PurePosixPath(model.source).relative_to("data")
        paths = tuple(folder / file.name for file in model.files)
        for path in paths:
            if not path.is_file():
                hint = f"it belongs to the repository: `git checkout -- {model.source}`"
                raise RegistryError("missing", where=tilde(path), hint=hint)
    check_sizes(paths, model)
    return paths


def _local(path: Path, given: str) -> tuple[Path, ...]:
    if path.is_file():
        return (path,)
    if path.is_dir():
        paths = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
        named = [(SHARD_NAME.fullmatch(file.name), file.name) for file in paths]
        stems = sorted({match["prefix"] if match else name for match, name in named})
        if len(stems) == 1:
            return tuple(paths)
        contents = f"{len(stems)} models ({', '.join(stems[:5])})" if stems else "no .gguf file"
        what = f"the folder has {contents}"
        raise RegistryError(what, where=tilde(path), hint="give the path of one file")
    known = ", ".join(registered())
    if "/" in given or "\\" in given or given.lower().endswith(".gguf"):
        hint = f"check the path, or give the name of a known model: {known}"
        raise RegistryError("no such file", where=given, hint=hint)
    question = did_you_mean(given.lower(), registered(), 0.4)
    hint = f"{question}known: {known}; or give a path or hf://owner/repo/file.gguf"
    raise RegistryError(f"no model is called {given!r}", hint=hint)


# ---- the hub ----


@dataclass(frozen=True)
class HubFile:
    """A file on the hub: ``owner/name`` of its repository, its path there, a revision (None: main)."""

    repo: str
    file: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hf://{self.repo}/{self.file}" + (f"@{self.revision}" if self.revision else "")


class FileNotInRepo(RegistryError):
    """The repository is there, the file is not; ``files`` are its GGUF files, as far as the hub tells."""

    files: tuple[str, ...] = ()


def parse_address(address: str) -> HubFile:
    """Take the address of a hub file apart.

    It is ``hf://owner/repo/path/file.gguf@revision``, or ``repo@revision/path`` as the hub writes it, or the
    address of the file's page or download.

    Raises:
        RegistryError: it names no GGUF file of a repository.

    >>> parse_address("hf://someone/models/IQ1/tiny.gguf@v1")
    HubFile(repo='someone/models', file='IQ1/tiny.gguf', revision='v1')
    >>> parse_address("https://huggingface.co/someone/models/blob/main/tiny.gguf?download=true")
    HubFile(repo='someone/models', file='tiny.gguf', revision='main')
    """
    from urllib.parse import unquote

    if page := PAGE.fullmatch(address):
        file = HubFile(page["repo"], unquote(page["file"]), unquote(page["revision"]))
    elif match := ADDRESS.fullmatch(address):
        file = HubFile(match["repo"], match["file"], match["early"] or match["late"])
    else:
        file = HubFile("", "")
    names = (*file.repo.split("/"), file.file, file.revision or "main")
    # a name that begins with `-` would be an option of the hub's own command
    if any(not name or name[0] == "-" or ".." in name.split("/") for name in names):
        hint = "write hf://owner/repo/file.gguf or hf://owner/repo/file.gguf@revision"
        raise RegistryError("not the address of a GGUF file on the hub", where=address, hint=hint)
    return file


def download(
    files: Sequence[HubFile], *, local_files_only: bool = False, any_folder: bool = False
) -> tuple[Path, ...]:
    """Local paths of ``files`` in the hub's cache, fetched if they are not there yet.

    The paths are the cache's links: their targets have other names, so never resolve them.

    Args:
        any_folder: when the path is not there, take the file of that name in another folder.

    Raises:
        RegistryError: the hub does not give a file; the message says why, as far as the hub tells.
        SpaceError: the files do not fit on the disk of the cache.
        OutputError: the cache cannot be written.
    """
    plans = [_plan(file, any_folder, local_files_only) for file in files]
    _check_space(sum(info.file_size or 0 for _, info in plans if info.will_download))
    return tuple(Path(_fetch(file, local_files_only=local_files_only)) for file, _ in plans)


def located(file: HubFile) -> HubFile:
    """The same file in the folder of its repository that it lies in.

    Raises:
        RegistryError: the hub does not give it, or several folders have one of that name.
    """
    return _plan(file, True, False)[0]


def _plan(file: HubFile, any_folder: bool, local_files_only: bool) -> tuple[HubFile, Any]:
    """Where the file is and what its download would cost, without fetching it."""
    options = {"local_files_only": local_files_only, "dry_run": True}
    try:
        return file, _fetch(file, **options)
    except FileNotInRepo as error:
        name = PurePosixPath(file.file).name
        places = [path for path in error.files if PurePosixPath(path).name == name]
        if not any_folder or len(places) != 1:
            raise
        return (there := replace(file, file=places[0])), _fetch(there, **options)


def _fetch(file: HubFile, **options: Any) -> Any:
    """Call huggingface_hub, again after a reset; what it raises becomes an error of ours."""
    import httpx2
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import XetDownloadError

    network = (OSError, ValueError, RuntimeError, httpx2.HTTPError, httpx2.InvalidURL, XetDownloadError)
    resets = retrying(TRIES, 30, httpx2.ReadError, httpx2.RemoteProtocolError)
    try:
        return resets(hf_hub_download, file.repo, file.file, revision=file.revision, **options)
    except (ImportError, *network) as error:
        if isinstance(error, ImportError) and "socksio" not in str(error):
            raise
        raise explained(error, file) from error


def retrying(tries: int, most_seconds: float, *errors: type[Exception]) -> Any:
    """Calls a function again after one of these errors, with growing pauses; the last error is raised."""
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

    again, wait = retry_if_exception_type(errors), wait_exponential(max=most_seconds)
    return Retrying(retry=again, stop=stop_after_attempt(tries), wait=wait, reraise=True)


def _check_space(need: int) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if need > free:
        what = f"the download needs {need:,} bytes and the disk has {free:,} free"
        raise SpaceError(what, where=tilde(folder), hint=LARGER_DISK)


def explained(error: Exception, file: HubFile) -> DfqsError:
    """Why the hub does not give a file, from what huggingface_hub raised."""
    from huggingface_hub.errors import RemoteEntryNotFoundError

    match error:
        case RemoteEntryNotFoundError():
            return _not_in_repo(file)
        case OSError(errno=errno.ENOSPC):
            return SpaceError("the disk filled up during the download", where=str(file), hint=LARGER_DISK)
        case OSError(errno=errno.EACCES | errno.EPERM | errno.EROFS):
            hint = "set HF_HOME to a folder you may write"
            return OutputError("the hub's cache cannot be written", where=error.filename, hint=hint)
    what, hint = _cause(error)
    return RegistryError(what, where=str(file), hint=hint)


def _cause(error: BaseException) -> tuple[str, str]:
    """Why the hub does not give a file, and what to do."""
    import httpx2
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    if cause := CAUSES.get(type(error).__name__):
        return cause
    match error:
        case hub.LocalEntryNotFoundError(__cause__=hub.HfHubHTTPError() as answer):
            return _cause(answer)
        case hub.LocalEntryNotFoundError(__cause__=None | hub.OfflineModeIsEnabled()):
            hint = "unset HF_HUB_OFFLINE (or local_files_only) and run once with a network"
            return "not in the cache, and offline", hint
        case hub.LocalEntryNotFoundError(__cause__=hub.FileMetadataError()):
            return f"{constants.ENDPOINT} does not answer like a hub", "check HF_ENDPOINT, and any proxy"
        case hub.LocalEntryNotFoundError(__cause__=why):
            what = f"not in the cache, and {constants.ENDPOINT} cannot be reached ({why})"
            return what, "check the network, the proxy and HF_ENDPOINT, then run again"
        case hub.HfHubHTTPError(response=response):
            hint = STATUS_HINTS.get(response.status_code, "the hub has a problem: run again later")
            return f"the hub answers {response.status_code}", hint
        case hub.HFValidationError():
            return f"not a name the hub allows ({error})", "check the spelling"
        case ImportError() | httpx2.InvalidURL():
            return proxy_fault(error)
        case ValueError():  # over 50 GB without hf_xet, for example: the message says what to do
            return proxy_fault(error) if "proxy URL" in str(error) else (str(error), "")
        case httpx2.ProxyError():
            return f"the proxy refuses ({error})", "check HTTPS_PROXY"
    hint = "run again: complete files are kept, this one starts over"
    return f"the download was interrupted ({error})", hint


def _not_in_repo(file: HubFile) -> FileNotInRepo:
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(file.repo, revision=file.revision)
    except OSError:  # the hub's errors are of this kind; without the list the message is shorter
        names = []
    files = tuple(name for name in names if name.endswith(".gguf"))
    hint = f"it has {', '.join(files[:8])}" if files else "it shows no .gguf file"
    error = FileNotInRepo("the repository has no such file", where=str(file), hint=hint)
    error.files = files
    return error
