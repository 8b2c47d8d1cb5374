"""Names to files: the models that the workbook knows, any local path, and any GGUF file of the hub.

The table is data: ``data/models.toml``. Downloads go through huggingface_hub: its cache, progress and environment
variables.
"""

from __future__ import annotations

import difflib
import errno
import re
import shutil
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from dfqs_nb.core.errors import DfqsError, IntegrityError, OutputError, RegistryError, SpaceError
from dfqs_nb.core.files import sha256_each
from dfqs_nb.core.paths import data_dir, tilde
from dfqs_nb.gguf.shards import SHARD_NAME

ADDRESS = re.compile(
    r"hf://(?P<repo>[^/@\s]+/[^/@\s]+)(@(?P<early>[^/@]+))?/(?P<file>[^@]+\.gguf)(@(?P<late>\S+))?"
)
LARGER_DISK = "free some space, or set HF_HOME to a folder on a larger disk"


@dataclass(frozen=True)
class ModelFile:
    """One file of a model: its name without folder, its size in bytes, its SHA-256 in lower-case hex."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Model:
    """A registered model: its files in order, where they come from, and who says so.

    ``merged_sha256`` is what ``llama-gguf-split --merge`` makes of the files; empty where nobody recorded it.
    """

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
        RegistryError: the table is missing, not TOML, or lacks a field.

    >>> [len(model.files) for model in registered().values()]
    [2, 2, 1, 2, 1]
    """
    path = data_dir() / "models.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        return {name: _model(name, entry) for name, entry in table.items()}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RegistryError(
            f"cannot read the table of models ({error})",
            where=tilde(path),
            hint="restore it with git, or set DFQS_DATA to a folder that has it",
        ) from error


def _model(name: str, entry: dict[str, Any]) -> Model:
    files = tuple(ModelFile(**file) for file in entry["files"])
    return Model(name=name, **{**entry, "files": files})


def describe() -> list[dict[str, Any]]:
    """One row a registered model, for ``dfqs-nb models`` or ``pandas.DataFrame``; sizes in 10^9 bytes."""
    return [
        {
            "name": model.name,
            "title": model.title,
            "files": len(model.files),
            "gigabytes": round(model.size_bytes / 1e9, 3),
            "licence": model.licence,
            "source": model.source,
            "note": model.note,
        }
        for model in registered().values()
    ]


def resolve(
    model: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool | None = None,
) -> tuple[Path, ...]:
    """The local paths of a model's files, shards in order; what is missing here is downloaded.

    Args:
        model: a registered name; a local file (returned as it is, also when it is one shard of several) or a
            folder that holds one model; or ``hf://owner/repo/path/file.gguf[@revision]``, where the name of
            one shard stands for all of them. A registered name goes before a folder of that name.
        revision: branch, tag or commit on the hub, instead of the one in the address.
        cache_dir: the hub cache to use; huggingface_hub's own by default.
        local_files_only: take only what is in that cache; by default as ``HF_HUB_OFFLINE`` says.

    Raises:
        RegistryError: nothing has that name, or the hub does not give the files.
        IntegrityError: a registered file has another size than the table says.
        SpaceError: the files do not fit on the disk of the cache.
        OutputError: the cache cannot be written.

    >>> [path.name for path in resolve("dfqs-nano-iq1_s-xl")]
    ['DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf', 'DFQS-Nano-IQ1_S-XL-00002-of-00002.gguf']
    """
    options = {"cache_dir": cache_dir, "local_files_only": bool(local_files_only)}
    if isinstance(model, str) and model.startswith("hf://"):
        address = parse_address(model)
        files = [HubFile(address.repo, name, revision or address.revision) for name in siblings(address.file)]
        return download(files, **options)
    if isinstance(model, str) and model in (known := registered()):
        return _registered(known[model], revision, options)
    return _local(Path(model).expanduser(), str(model))


def siblings(file: str) -> list[str]:
    """All shards of the file that this name belongs to, in order; a file without a shard number is alone.

    >>> siblings("IQ1/tiny-00002-of-00002.gguf")
    ['IQ1/tiny-00001-of-00002.gguf', 'IQ1/tiny-00002-of-00002.gguf']
    """
    match = SHARD_NAME.fullmatch(file)
    if match is None or not 1 <= int(match["number"]) <= (count := int(match["count"])):
        return [file]
    return [f"{match['prefix']}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def check_sizes(paths: Sequence[Path], model: Model) -> None:
    """Compare the size of each file with the table (it reads no data).

    Raises:
        IntegrityError: a file is shorter or longer, or the number of files is another one.
    """
    if len(paths) != len(model.files):
        raise IntegrityError(
            f"{len(paths)} files given, but {model.name} has {len(model.files)}",
            hint="give all of them, in order",
        )
    for number, (path, file) in enumerate(zip(paths, model.files, strict=True), 1):
        surplus = Path(path).stat().st_size - file.size_bytes
        if surplus:
            raise _damaged(
                path,
                f"{_which(number, model)} is {abs(surplus):,} bytes "
                f"{'short' if surplus < 0 else 'too long'} (expected {file.size_bytes:,})",
            )


def check_hashes(paths: Sequence[Path], model: Model) -> tuple[str, ...]:
    """Compare sizes, then the SHA-256 of each file with the table, with a progress bar; return the hashes.

    Raises:
        IntegrityError: a file is not the one that the table describes.
    """
    check_sizes(paths, model)
    hashes = sha256_each(paths, name=f"SHA-256 of {model.name}")
    for number, (path, file, found) in enumerate(zip(paths, model.files, hashes, strict=True), 1):
        if found != file.sha256:
            raise _damaged(
                path, f"{_which(number, model)} has SHA-256 {found[:16]}... (expected {file.sha256[:16]}...)"
            )
    return hashes


def _which(number: int, model: Model) -> str:
    count = len(model.files)
    return "the file" if count == 1 else f"shard {number} of {count}"


def _damaged(path: Path, what: str) -> IntegrityError:
    real = Path(path).resolve()  # in the hub's cache the name is a link, and the bytes are elsewhere
    first = f"delete {tilde(real)} and " if real != Path(path).absolute() else ""
    return IntegrityError(what, where=tilde(path), hint=f"{first}download it again")


def _registered(model: Model, revision: str | None, options: dict[str, Any]) -> tuple[Path, ...]:
    if model.source.startswith("hf://"):
        repo = model.source.removeprefix("hf://")
        files = [HubFile(repo, file.name, revision) for file in model.files]
        paths = download(files, any_folder=True, **options)
    else:
        folder = data_dir() / PurePosixPath(model.source).relative_to("data")
        paths = tuple(folder / file.name for file in model.files)
        for path in paths:
            if not path.is_file():
                raise RegistryError(
                    "missing",
                    where=tilde(path),
                    hint=f"it belongs to the repository: git checkout -- {model.source}",
                )
    check_sizes(paths, model)
    return paths


def _local(path: Path, given: str) -> tuple[Path, ...]:
    if path.is_file():
        return (path,)
    if path.is_dir():
        return _folder(path)
    if "/" in given or "\\" in given or given.endswith(".gguf"):
        raise RegistryError(
            "no such file",
            where=given,
            hint=f"check the path, or give the name of a known model: {', '.join(registered())}",
        )
    close = difflib.get_close_matches(given.lower(), registered(), n=1, cutoff=0.4)
    question = f"did you mean {close[0]}? " if close else ""
    raise RegistryError(
        f"no model is called {given!r}",
        hint=f"{question}known: {', '.join(registered())}; or give a path or hf://owner/repo/file.gguf",
    )


def _folder(folder: Path) -> tuple[Path, ...]:
    paths = sorted(folder.glob("*.gguf"))
    stems = sorted(
        {(match["prefix"] if (match := SHARD_NAME.fullmatch(path.name)) else path.name) for path in paths}
    )
    if len(stems) != 1:
        found = f"{len(stems)} models ({', '.join(stems[:5])})" if stems else "no .gguf file"
        raise RegistryError(f"the folder has {found}", where=tilde(folder), hint="give the path of one file")
    return tuple(paths)


# ---- the hub ----


@dataclass(frozen=True)
class HubFile:
    """A file on the hub: ``owner/name`` of its repository, its path there, a revision (None: main)."""

    repo: str
    file: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hf://{self.repo}/{self.file}" + (f"@{self.revision}" if self.revision else "")


def parse_address(address: str) -> HubFile:
    """Take ``hf://owner/repo/path/file.gguf@revision`` apart, or ``repo@revision/path``, as the hub does.

    Raises:
        RegistryError: it names no GGUF file of a repository.

    >>> parse_address("hf://someone/models/IQ1/tiny.gguf@v1")
    HubFile(repo='someone/models', file='IQ1/tiny.gguf', revision='v1')
    """
    match = ADDRESS.fullmatch(address)
    if match is None:
        raise RegistryError(
            "not the address of a GGUF file on the hub",
            where=address,
            hint="write hf://owner/repo/file.gguf or hf://owner/repo/file.gguf@revision",
        )
    return HubFile(match["repo"], match["file"], match["early"] or match["late"])


def download(
    files: Sequence[HubFile],
    *,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    any_folder: bool = False,
) -> tuple[Path, ...]:
    """Local paths of ``files`` in the hub's cache, fetched if they are not there yet.

    Args:
        any_folder: when the path is not there, take the file of that name in another folder.

    Raises:
        RegistryError: the hub does not give a file; the message says why, as far as the hub tells.
        SpaceError: the files do not fit on the disk of the cache.
        OutputError: the cache cannot be written.
    """
    options = {"cache_dir": cache_dir, "local_files_only": local_files_only}
    plans = [_plan(file, options, any_folder) for file in files]
    _check_space([info.file_size or 0 for _, info in plans if info.will_download], cache_dir)
    return tuple(Path(_call(file, options)) for file, _ in plans)


def _plan(file: HubFile, options: dict[str, Any], any_folder: bool) -> tuple[HubFile, Any]:
    """Where the file is and what its download would cost, without fetching it."""
    try:
        return file, _call(file, options, dry_run=True)
    except FileNotInRepo as error:
        name = PurePosixPath(file.file).name
        found = [path for path in error.files if PurePosixPath(path).name == name]
        if not any_folder or len(found) != 1:
            raise
        return (there := replace(file, file=found[0])), _call(there, options, dry_run=True)


def _call(file: HubFile, options: dict[str, Any], **more: Any) -> Any:
    from huggingface_hub import hf_hub_download

    with _clear_errors(file), _resets_resumed():
        return hf_hub_download(file.repo, file.file, revision=file.revision, **options, **more)


def _check_space(sizes_bytes: Sequence[int], cache_dir: str | Path | None) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(cache_dir or HF_HUB_CACHE).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    need, free = sum(sizes_bytes), shutil.disk_usage(folder).free
    if need > free:
        raise SpaceError(
            f"the download needs {need:,} bytes and the disk has {free:,} free",
            where=tilde(folder),
            hint=LARGER_DISK,
        )


class FileNotInRepo(RegistryError):
    """The repository is there, the file is not; ``files`` are its GGUF files, as far as the hub tells."""

    files: tuple[str, ...] = ()


@contextmanager
def _resets_resumed() -> Iterator[None]:
    """Let huggingface_hub resume after a connection reset, as it does after a connection that closes early.

    Its download loop resumes on ``RemoteProtocolError`` but not on ``ReadError``, which is how httpx reports
    a reset, so the body of each response reports the one as the other while the block runs.
    """
    from huggingface_hub.utils import get_session

    hooks = get_session().event_hooks
    before = hooks["response"]
    get_session().event_hooks = {**hooks, "response": [*before, _translate_resets]}
    try:
        yield
    finally:
        get_session().event_hooks = {**get_session().event_hooks, "response": before}


def _translate_resets(response: Any) -> None:
    import httpx2

    class Body(httpx2.SyncByteStream):
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __iter__(self) -> Iterator[bytes]:
            try:
                yield from self.stream
            except httpx2.ReadError as error:
                raise httpx2.RemoteProtocolError(str(error) or "connection reset") from error

        def close(self) -> None:
            self.stream.close()

    response.stream = Body(response.stream)


@contextmanager
def _clear_errors(file: HubFile) -> Iterator[None]:
    """Turn what huggingface_hub raises into an error of ours."""
    import httpx2
    from huggingface_hub.errors import XetDownloadError

    try:
        yield
    except (OSError, ValueError, RuntimeError, httpx2.HTTPError, XetDownloadError) as error:
        raise _explain(error, file) from error


def _explain(error: Exception, file: HubFile) -> DfqsError:
    import httpx2
    from huggingface_hub import errors as hub

    match error:
        case hub.LocalEntryNotFoundError():
            return _not_cached(error.__cause__, file)
        case hub.RemoteEntryNotFoundError():
            return _not_in_repo(file)
        case hub.RevisionNotFoundError():
            return RegistryError(
                "the repository has no such revision",
                where=file,
                hint="name a branch, a tag or a commit of it",
            )
        case hub.GatedRepoError():
            return RegistryError(
                "the repository is gated",
                where=file,
                hint="accept its terms on its web page, then log in with `hf auth login`",
            )
        case hub.RepositoryNotFoundError():
            return RegistryError(
                "no such repository, or it is private",
                where=file,
                hint="check the spelling; for a private one log in with `hf auth login`",
            )
        case hub.HfHubHTTPError():
            return _refused(error.response.status_code, file)
        case OSError(errno=errno.ENOSPC):
            return SpaceError("the disk filled up during the download", where=file, hint=LARGER_DISK)
        case OSError(errno=errno.EACCES | errno.EPERM | errno.EROFS):
            return OutputError(
                "the hub's cache cannot be written",
                where=error.filename,
                hint="set HF_HOME to a folder you may write",
            )
        case hub.HFValidationError():
            return RegistryError(
                f"not a name the hub allows ({error})", where=file, hint="check the spelling"
            )
        case ValueError():  # over 50 GB without hf_xet, for example: the message says what to do
            return RegistryError(str(error), where=file)
        case httpx2.ProxyError():
            return RegistryError(f"the proxy refuses ({error})", where=file, hint="check HTTPS_PROXY")
        case _:
            return RegistryError(
                f"the download was interrupted ({error})",
                where=file,
                hint="run again: complete files are kept, this one starts over",
            )


def _not_cached(cause: BaseException | None, file: HubFile) -> RegistryError:
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    if cause is None or isinstance(cause, hub.OfflineModeIsEnabled):
        return RegistryError(
            "not in the cache, and offline",
            where=file,
            hint="unset HF_HUB_OFFLINE (or local_files_only) and run once with a network",
        )
    if isinstance(cause, hub.HfHubHTTPError):
        return _refused(cause.response.status_code, file)
    if isinstance(cause, hub.FileMetadataError):
        return RegistryError(
            f"{constants.ENDPOINT} does not answer like a hub",
            where=file,
            hint="check HF_ENDPOINT, and any proxy in between",
        )
    return RegistryError(
        f"not in the cache, and {constants.ENDPOINT} cannot be reached ({cause})",
        where=file,
        hint="check the network, the proxy and HF_ENDPOINT, then run again",
    )


def _refused(status: int, file: HubFile) -> RegistryError:
    hint = {
        401: "the token is not valid: `hf auth login`, or unset HF_TOKEN",
        403: "the token lacks the right to read it: `hf auth login` with one that has it",
        429: "too many requests: wait some minutes, or log in with `hf auth login`",
    }
    return RegistryError(
        f"the hub answers {status}",
        where=file,
        hint=hint.get(status, "the hub has a problem: run again later"),
    )


def _not_in_repo(file: HubFile) -> FileNotInRepo:
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(file.repo, revision=file.revision)
    except OSError:  # the hub's errors are of this kind; without the list the message is shorter
        names = []
    files = tuple(name for name in names if name.endswith(".gguf"))
    error = FileNotInRepo(
        "the repository has no such file",
        where=file,
        hint=f"it has {', '.join(files[:8])}" if files else "it shows no .gguf file",
    )
    error.files = files
    return error
