"""Names to files: the models that the workbook knows, any local path, and any GGUF file of the hub.

The table is data: ``data/models.toml``. Downloads are in :mod:`dfqs_nb.gguf.hub`.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dfqs_nb.core.errors import IntegrityError, RegistryError
from dfqs_nb.core.files import sha256_each
from dfqs_nb.core.paths import data_dir, tilde
from dfqs_nb.gguf.hub import HubFile, download, parse_address
from dfqs_nb.gguf.shards import SHARD_NAME


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


def models() -> dict[str, Model]:
    """The registered models by name, in the order of ``data/models.toml``.

    Raises:
        RegistryError: the table is missing, not TOML, or lacks a field.

    >>> [len(model.files) for model in models().values()]
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
        for model in models().values()
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
    if isinstance(model, str) and model in (known := models()):
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
            hint=f"check the path, or give the name of a known model: {', '.join(models())}",
        )
    close = difflib.get_close_matches(given.lower(), models(), n=1, cutoff=0.4)
    question = f"did you mean {close[0]}? " if close else ""
    raise RegistryError(
        f"no model is called {given!r}",
        hint=f"{question}known: {', '.join(models())}; or give a path or hf://owner/repo/file.gguf",
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
