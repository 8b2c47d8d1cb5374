"""Names to files: the models that the workbook knows, any local path, and any GGUF file of the hub."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from errno import EACCES, ENOSPC, EPERM, EROFS
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from dfqs_nb.core.display import did_you_mean, one_line
from dfqs_nb.core.errors import DfqsError, IntegrityError, OutputError, RegistryError, SpaceError
from dfqs_nb.core.files import is_file, sha256_of, there_is
from dfqs_nb.core.paths import data_dir, tilde

if TYPE_CHECKING:
    from huggingface_hub import HfUri

OTHER_DISK = "free some space, or set HF_HOME to a folder on another disk that you may write"
NOT_WRITTEN = {ENOSPC: SpaceError, EACCES: OutputError, EPERM: OutputError, EROFS: OutputError}
FORM = "hf://owner/repo/file.gguf or hf://owner/repo/file.gguf@revision"
ADDRESS = re.compile("(hf|https?)://")  # of a file on the hub or a web server; paths lose a slash
SHARD = re.compile(r"(.+-)(\d{5})-of-(\d{5})(\.gguf(?:[@?#].*)?)", re.DOTALL | re.IGNORECASE)
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
    if not (match := SHARD.fullmatch(file)) or not 1 <= int(match[2]) <= int(match[3]):
        return [file]
    return [f"{match[1]}{number:05d}-of-{match[3]}{match[4]}" for number in range(1, int(match[3]) + 1)]


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

    after_reset = retrying(4, 30)  # huggingface_hub begins the file again (huggingface/huggingface_hub#4196)

    def fetched(address: str, **options: Any) -> Any:
        uri = parse_address(address)
        options |= {"revision": uri.revision, "local_files_only": local_files_only}
        with explained(address):
            return after_reset(hf_hub_download, uri.id, uri.path_in_repo, **options)

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

    uri = parse_address(address)
    with suppress(DfqsError), explained(address):  # the download reports the same fault
        places = [it for it in HfApi().list_repo_files(uri.id) if PurePosixPath(it).name == uri.path_in_repo]
        return f"hf://{uri.id}/{places[0]}" if len(places) == 1 else address
    return address


def retrying(tries: int, most_seconds: float) -> Any:
    """Calls a function again when a connection breaks, with growing pauses; raises the last error."""
    import httpx2
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

    again = retry_if_exception_type((httpx2.NetworkError, httpx2.RemoteProtocolError))
    wait, stop = wait_exponential(max=most_seconds), stop_after_attempt(tries)
    return Retrying(retry=again, wait=wait, stop=stop, reraise=True)


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
