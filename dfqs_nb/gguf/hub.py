"""Files of the Hugging Face hub, through huggingface_hub: its cache, progress and environment variables.

Added here: every file is asked for before the first is fetched, so that a missing file or a full disk shows
at once; a reset connection is resumed; and each failure names its likely cause and the next step.

A connection lost on the way is resumed where it broke, for as long as this process runs. A later run begins
that file again, because huggingface_hub keeps no partial files (huggingface/huggingface_hub#4196); files that
were complete stay in its cache.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from dfqs_nb.core.errors import DfqsError, OutputError, RegistryError, SpaceError
from dfqs_nb.core.paths import tilde

ADDRESS = re.compile(
    r"hf://(?P<repo>[^/@\s]+/[^/@\s]+)(@(?P<early>[^/@]+))?/(?P<file>[^@]+\.gguf)(@(?P<late>\S+))?"
)
LARGER_DISK = "free some space, or set HF_HOME to a folder on a larger disk"


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
