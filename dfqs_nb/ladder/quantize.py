"""Quantize a model with llama.cpp's own quantizer, tensor by tensor as a recipe says.

A recipe (``data/quantize/*.toml``) names one of llama.cpp's file types, whose mixture chooses each tensor's
type, and rules that overrule it for tensors by name. The work is done by ``llama_model_quantize`` in a child
process, which may die of a broken header without taking this one along, and which holds some rows of one
tensor at a time. What it will write is known beforehand to the byte: llama.cpp itself is asked in a dry run.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.core.child import died, ending
from dfqs_nb.core.display import tqdm
from dfqs_nb.core.errors import DfqsError, IntegrityError, OutputError, SpaceError
from dfqs_nb.core.files import fsync_dir
from dfqs_nb.core.machine import usable_cores
from dfqs_nb.core.paths import data_dir, tilde
from dfqs_nb.gguf.facts import class_of, layer_of
from dfqs_nb.gguf.header import DEFAULT_ALIGNMENT, TENSOR_TYPES, Tensor, check_layout, padded, read_header
from dfqs_nb.gguf.shards import ShardSet, open_shards
from dfqs_nb.ladder.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from dfqs_nb.llama import check
from dfqs_nb.llama.settings import llama_version

if TYPE_CHECKING:
    import pandas as pd

FLOATS = ("F32", "F16", "BF16")
INTEGERS = ("I8", "I16", "I32", "I64")
NOT_WRITTEN = ("Q8_1", "Q8_K", "F64", *INTEGERS)  # types of activations and tables: no weight is stored so
# llama.cpp refuses these without an importance matrix, but for the embedding and the output
# (tensor_requires_imatrix in src/llama-quant.cpp)
NEED_MATRIX = ("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S")
NO_MATRIX = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")
BUFFER_BYTES = 512 << 20  # of rows that the child holds at once
MAX_TEXT_BYTES = 127  # of a key's value, as llama.cpp overrides it
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")


class QuantizeError(DfqsError):
    """A recipe does not fit a model, or llama.cpp refuses it."""


# ---- recipes ----


@dataclass(frozen=True)
class Rule:
    """Tensors whose name contains a match of ``pattern`` get ``type``.

    Attributes:
        layers: only those of the first layers: this share of all, rounded down, but one layer at least;
            1 for all.
        optional: that no tensor matches is no mistake.
    """

    pattern: str
    type: str
    layers: float = 1.0
    optional: bool = False

    def matches(self, name: str, n_layers: int) -> bool:
        """Whether the rule is about this tensor of a model of so many layers.

        >>> rule = Rule("ffn_down_exps", "Q2_K", layers=0.125)
        >>> rule.matches("blk.4.ffn_down_exps.weight", 43), rule.matches("blk.5.ffn_down_exps.weight", 43)
        (True, False)
        """
        if not re.search(self.pattern, name):
            return False
        layer = layer_of(name)
        return self.layers >= 1 or (layer is not None and layer < max(1, int(self.layers * n_layers)))


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized.

    Attributes:
        mix: llama.cpp's file type: its mixture chooses for tensors that no rule names.
        keep: patterns of tensors that stay as they are in the source.
        rules: the first that matches counts.
        weights: pattern of the importance matrix's entries that are used; empty: none.
        file_type: what the header says; the mix where not given.
        sha256: of the recipe's file.
    """

    name: str
    mix: str
    note: str = ""
    keep: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    weights: str = ""
    file_type: str = ""
    sha256: str = ""


def find_recipes(folder: str | Path | None = None) -> dict[str, Path]:
    """The recipe files of a folder (by default the shipped ones) by the name that stands in each."""
    folder = Path(folder) if folder else data_dir() / "quantize"
    return {load_recipe(path).name: path for path in sorted(folder.glob("*.toml"))}


def load_recipe(name: str | Path) -> Recipe:
    """A recipe by its name, in any case, or by the path of its file.

    Raises:
        QuantizeError: there is none, its file cannot be read, or a type or pattern in it is wrong.

    >>> load_recipe("iq1_s-xl").rules[0]
    Rule(pattern='ffn_down_exps', type='Q2_K', layers=0.125, optional=False)
    """
    path = Path(name)
    if path.suffix != ".toml":
        path = data_dir() / "quantize" / f"{str(name).lower()}.toml"
        if not path.exists():
            raise QuantizeError(
                f"no recipe is called {str(name)!r}",
                hint=f"there are: {', '.join(find_recipes())}; or give a .toml file",
            )
    try:
        raw = path.read_bytes()
        content = tomllib.loads(raw.decode("utf-8"))
        rules = tuple(Rule(**rule) for rule in content.pop("rules", ()))
        recipe = Recipe(
            rules=rules,
            keep=tuple(content.pop("keep", ())),
            sha256=hashlib.sha256(raw).hexdigest(),
            **content,
        )
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise QuantizeError(what, where=path, hint="check the path") from error
    except (ValueError, TypeError) as error:
        raise QuantizeError(
            f"not a recipe ({error})", where=tilde(path), hint="see data/quantize/ for the format"
        ) from error
    check_recipe(recipe, tilde(path))
    return recipe


def check_recipe(recipe: Recipe, where: str = "") -> None:
    """Refuse a recipe that no model could be quantized by.

    Raises:
        QuantizeError: an unknown type or file type, or a pattern that is no regular expression.
    """
    known = [name for name, *_ in TENSOR_TYPES.values() if name not in NOT_WRITTEN]
    for rule in recipe.rules:
        if rule.type not in known:
            raise QuantizeError(
                f"unknown type {rule.type!r} for {rule.pattern!r}",
                where=where or None,
                hint=f"there are: {', '.join(known)}",
            )
    for kind in filter(None, (recipe.mix, recipe.file_type)):
        if kind not in file_types():
            raise QuantizeError(
                f"unknown file type {kind!r}",
                where=where or None,
                hint=f"there are: {', '.join(file_types())}",
            )
    if recipe.mix in FLOATS:
        raise QuantizeError(
            f"{recipe.mix} as a mix leaves no tensor to the rules",
            where=where or None,
            hint=f"take Q8_0 as the mix, and a rule with the pattern '.' and {recipe.mix}",
        )
    for pattern in (*recipe.keep, *(rule.pattern for rule in recipe.rules), recipe.weights):
        try:
            re.compile(pattern)
        except re.error as error:
            raise QuantizeError(
                f"{pattern!r} is no regular expression ({error})",
                where=where or None,
                hint="correct the pattern",
            ) from error


def file_types() -> dict[str, int]:
    """llama.cpp's file types by name, as this build numbers them."""
    import llama_cpp.llama_cpp as api

    found = {
        name.removeprefix("LLAMA_FTYPE_").removeprefix("MOSTLY_").removeprefix("ALL_"): value
        for name, value in vars(api).items()
        if name.startswith("LLAMA_FTYPE_")
    }
    return {name: value for name, value in found.items() if name != "GUESSED"}


# ---- the plan ----


@dataclass(frozen=True)
class Planned:
    """One tensor: its type now and then, its bytes now and then, and who decided: ``rule``, ``keep`` or
    ``llama.cpp``."""

    name: str
    shape: tuple[int, ...]
    source_type: str
    type: str
    source_nbytes: int
    nbytes: int
    decided_by: str


@dataclass(frozen=True)
class Plan:
    """What a quantization will write.

    Attributes:
        tensors: in the order of the file.
        nbytes: of the file, exactly.
        fallbacks: llama.cpp's lines about tensors whose shape does not suit the type it wanted.
        entries: of the importance matrix that will be used.
        left_out: entries of the matrix whose size is not the tensor's (see ``ImportanceMatrix.fitting``).
    """

    recipe: Recipe
    source: ShardSet = field(repr=False)
    tensors: tuple[Planned, ...] = field(repr=False)
    nbytes: int
    fallbacks: tuple[str, ...] = ()
    entries: int = 0
    left_out: tuple[str, ...] = ()

    @property
    def bits_per_weight(self) -> float:
        """Average over all weights, tables of integers apart."""
        return bits(one for one in self.tensors)

    def by_class(self) -> pd.DataFrame:
        """One row a tensor class, largest first: ``class``, ``tensors``, ``weights``, ``source_bytes``,
        ``bytes``, ``bits_per_weight``, ``types``."""
        import pandas as pd

        groups: dict[str, list[Planned]] = {}
        for one in self.tensors:
            groups.setdefault(class_of(one.name), []).append(one)
        rows = [
            {
                "class": name,
                "tensors": len(group),
                "weights": sum(_n_elements(t.shape) for t in group),
                "source_bytes": sum(t.source_nbytes for t in group),
                "bytes": sum(t.nbytes for t in group),
                "bits_per_weight": bits(group),
                "types": ", ".join(_types(group)),
            }
            for name, group in groups.items()
        ]
        return pd.DataFrame(rows).sort_values("bytes", ascending=False, ignore_index=True)

    def frame(self) -> pd.DataFrame:
        """One row a tensor, with the fields of ``Planned``."""
        import pandas as pd

        return pd.DataFrame([vars(one) for one in self.tensors])


def bits(tensors: Iterator[Planned] | Sequence[Planned]) -> float:
    """Bits a weight over these tensors."""
    chosen = [one for one in tensors if one.type not in INTEGERS]
    weights = sum(_n_elements(one.shape) for one in chosen)
    return 8 * sum(one.nbytes for one in chosen) / weights if weights else float("nan")


def _n_elements(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _types(tensors: Sequence[Planned]) -> list[str]:
    sizes: dict[str, int] = {}
    for one in tensors:
        sizes[one.type] = sizes.get(one.type, 0) + one.nbytes
    return sorted(sizes, key=lambda kind: -sizes[kind])


def plan(
    source: str | Path, recipe: Recipe | str, imatrix: str | Path | ImportanceMatrix | None = None
) -> Plan:
    """Ask llama.cpp in a dry run what it would make of a model by a recipe. Writes nothing.

    Args:
        source: a GGUF with F32, F16 or BF16 weights, or any of its shards.
        imatrix: an importance matrix, or its file; a recipe with ``weights`` uses it.

    Raises:
        QuantizeError: a tensor is quantized already, a rule fits no tensor (or llama.cpp does not follow it,
            or its type's blocks do not divide a tensor's rows), or a type needs an importance matrix.
        HeaderError, ShardError, LayoutError: the source is not a sound model.
        ModelError: llama.cpp dies on it.
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    shards = open_shards(source)
    matrix = _matrix(imatrix, recipe)
    return _plan(shards, recipe, _job(shards, recipe, matrix), matrix)


def _plan(shards: ShardSet, recipe: Recipe, job: dict[str, Any], matrix: ImportanceMatrix | None) -> Plan:
    said = run_child("dfqs_nb.ladder.quantize", {**job, "dry_run": True}, shards.paths[0])
    chosen = {name: new for name, _, new in said["tensors"]}
    by_name = {one.name: one for one in shards.tensors}
    if set(chosen) != set(by_name):
        raise QuantizeError(
            "llama.cpp's dry run names other tensors than the header",
            where=shards.paths[0],
            hint="report this file",
        )
    deciders = {name: "rule" for name in job["types"]} | {name: "keep" for name in job["kept"]}
    tensors = tuple(
        _planned(by_name[name], new, deciders.get(name, "llama.cpp")) for name, new in chosen.items()
    )
    _check_followed(tensors, recipe, shards)
    used = matrix.fitting(shards.as_one) if matrix else None
    _check_matrix(tensors, used, shards)
    left_out = tuple(sorted((set(matrix.entries) & set(by_name)) - set(used.entries))) if matrix else ()
    return Plan(
        recipe,
        shards,
        tensors,
        _file_bytes(shards, tensors, job["keys"]),
        tuple(said["fallbacks"]),
        len(used.entries) if used else 0,
        left_out,
    )


def _planned(tensor: Tensor, new: str, decided_by: str) -> Planned:
    block, block_bytes = next((n, size) for name, n, size in TENSOR_TYPES.values() if name == new)
    nbytes = tensor.n_elements // block * block_bytes
    return Planned(tensor.name, tensor.shape, tensor.type, new, tensor.nbytes, nbytes, decided_by)


def _matrix(given: str | Path | ImportanceMatrix | None, recipe: Recipe) -> ImportanceMatrix | None:
    """The entries of the importance matrix that the recipe uses."""
    if given is None or not recipe.weights:
        return None
    return (given if isinstance(given, ImportanceMatrix) else read_imatrix(given)).only(recipe.weights)


def _job(shards: ShardSet, recipe: Recipe, matrix: ImportanceMatrix | None) -> dict[str, Any]:
    """What the child is told, but for the output; checks all that the source's header can tell."""
    check_recipe(recipe)
    if (alignment := shards.headers[0].alignment) != DEFAULT_ALIGNMENT:  # it pads to 32, and keeps the key
        raise QuantizeError(
            f"its tensors are aligned to {alignment:,} bytes: llama.cpp would write a file "
            "that it then refuses",
            where=shards.paths[0],
            hint=f"write the source again with an alignment of {DEFAULT_ALIGNMENT}",
        )
    for tensor in shards.tensors:
        if tensor.type not in (*FLOATS, *INTEGERS):
            raise QuantizeError(
                f"{tensor.name} is quantized already ({tensor.type})",
                where=shards.paths[0],
                hint="quantize the original F32, F16 or BF16 model: losses add up",
            )
    types, kept = _types_by_rule(shards, recipe)
    kinds = file_types()
    used = matrix.fitting(shards.as_one) if matrix else None
    keys = {
        "general.file_type": kinds[recipe.file_type or recipe.mix],
        "dfqs.recipe": recipe.name,
        "dfqs.recipe_sha256": recipe.sha256 or "not from a file",
        "dfqs.source_sha256": "0" * 64,
        "dfqs.quantizer": f"llama-cpp-python {llama_version()}",
    }
    if used and used.entries:
        keys |= {
            "quantize.imatrix.file": Path(used.path).name or "not from a file",
            "quantize.imatrix.dataset": (used.datasets or ("not stated",))[0],
            "quantize.imatrix.entries_count": len(used.entries),
        }
        keys |= {"quantize.imatrix.chunks_count": used.chunk_count} if used.chunk_count > 0 else {}
    keys = {name: _shortened(value) if isinstance(value, str) else value for name, value in keys.items()}
    codes = {name: code for code, (name, *_) in TENSOR_TYPES.items()}
    overrides = [
        [f"^{re.escape(name)}$".replace(r"\-", "-"), codes[kind]] for name, kind in {**types, **kept}.items()
    ]
    return {
        "source": str(shards.paths[0].resolve()),
        "mix": kinds[recipe.mix],
        "overrides": overrides,
        "types": types,
        "kept": kept,
        "keys": keys,
    }


def _shortened(text: str) -> str:
    """At most as many bytes as llama.cpp takes for a value."""
    return text.encode("utf-8")[:MAX_TEXT_BYTES].decode("utf-8", "ignore")


def _types_by_rule(shards: ShardSet, recipe: Recipe) -> tuple[dict[str, str], dict[str, str]]:
    """Types of the tensors that a rule names, and of those that are kept."""
    n_layers = 1 + max((layer_of(one.name) or 0 for one in shards.tensors), default=0)
    types, kept, hit = {}, {}, set()
    for tensor in shards.tensors:
        if any(re.search(pattern, tensor.name) for pattern in recipe.keep):
            kept[tensor.name] = tensor.type
            continue
        rule = next((rule for rule in recipe.rules if rule.matches(tensor.name, n_layers)), None)
        if rule is not None and tensor.type not in INTEGERS:
            hit.add(rule)
            types[tensor.name] = rule.type
            _check_rows(tensor, rule, shards)
    for rule in recipe.rules:
        if rule not in hit and not rule.optional:
            raise QuantizeError(
                f"no tensor matches {rule.pattern!r} of the recipe {recipe.name}",
                where=shards.paths[0],
                hint="correct the pattern, or say optional = true",
            )
    return types, {name: kind for name, kind in kept.items() if kind not in INTEGERS}


def _check_rows(tensor: Tensor, rule: Rule, shards: ShardSet) -> None:
    block = next(n for name, n, _ in TENSOR_TYPES.values() if name == rule.type)
    if len(tensor.shape) > 1 and tensor.shape[0] % block:
        raise QuantizeError(
            f"{tensor.name} has rows of {tensor.shape[0]:,} values, which blocks of {block} "
            f"({rule.type}) do not divide",
            where=shards.paths[0],
            hint="give it Q8_0 or Q4_0 (blocks of 32), or leave it to the mix",
        )


def _check_followed(tensors: Sequence[Planned], recipe: Recipe, shards: ShardSet) -> None:
    """Refuse a rule that llama.cpp follows for none of its tensors: it leaves norms, routers and vectors."""
    n_layers = 1 + max((layer_of(one.name) or 0 for one in tensors), default=0)
    for rule in recipe.rules:
        mine = [
            one
            for one in tensors
            if one.decided_by == "rule"
            and next(r for r in recipe.rules if r.matches(one.name, n_layers)) is rule
        ]
        if mine and all(one.type != rule.type for one in mine):
            raise QuantizeError(
                f"llama.cpp keeps {mine[0].name} at {mine[0].type}, whatever the rule {rule.pattern!r} says",
                where=shards.paths[0],
                hint="take the rule out",
            )


def _check_matrix(tensors: Sequence[Planned], matrix: ImportanceMatrix | None, shards: ShardSet) -> None:
    known = matrix.entries if matrix else {}
    bare = [
        one
        for one in tensors
        if one.type in NEED_MATRIX
        and one.name not in known
        and one.name not in NO_MATRIX
        and one.type != one.source_type
    ]
    if bare:
        more = f" (and {len(bare) - 1} more)" if len(bare) > 1 else ""
        hint = (
            "collect one with dfqs_nb.ladder.imatrix or llama-imatrix and pass it"
            if not known
            else "collect it over more text, or give these tensors another type"
        )
        raise QuantizeError(
            f"{bare[0].type} needs an importance matrix for {bare[0].name}{more}",
            where=shards.paths[0],
            hint=hint,
        )


def _file_bytes(shards: ShardSet, tensors: Sequence[Planned], keys: dict[str, Any]) -> int:
    """The size of the file that llama.cpp will write, from the format's rules."""
    first = shards.headers[0]
    replaced = {*keys, "general.quantization_version", *_SPLIT_KEYS}
    kept = sum(
        end - start
        for name, one in first.fields.items()
        if name not in replaced
        for start, end in [one.record]
    )
    added = sum(
        8 + len(name) + 4 + (8 + len(value.encode()) if isinstance(value, str) else 4)
        for name, value in {**keys, "general.quantization_version": 2}.items()
    )
    table = sum(8 + len(one.name.encode()) + 4 + 8 * _n_dims(one.shape) + 4 + 8 for one in tensors)
    data = sum(padded(one.nbytes, DEFAULT_ALIGNMENT) for one in tensors)
    return padded(24 + kept + added + table, DEFAULT_ALIGNMENT) + data


def _n_dims(shape: Sequence[int]) -> int:
    return max([i for i, extent in enumerate(shape, 1) if extent > 1], default=1)


# ---- the work ----


@dataclass(frozen=True)
class Quantized:
    """A finished quantization: the file, its size, what was planned, and how long it took."""

    path: Path
    nbytes: int
    plan: Plan = field(repr=False)
    seconds: float


def quantize(
    source: str | Path,
    recipe: Recipe | str,
    output: str | Path,
    *,
    imatrix: str | Path | ImportanceMatrix | None = None,
    n_threads: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> Quantized:
    """Quantize a model into one file, which appears whole or not at all.

    Args:
        source: as for ``plan``; shards need no merge first.
        recipe: a recipe, or the name of one.
        imatrix: as for ``plan``.
        n_threads: 0: the usable cores. The result does not depend on it.
        overwrite: replace an existing output.

    Raises:
        OutputError: the output exists, or is the source.
        SpaceError: the disk has too little room; nothing was written.
        QuantizeError, ModelError: as ``plan``, or llama.cpp fails; nothing is left behind then.
        IntegrityError: what llama.cpp wrote is not what was planned.
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    output, started = Path(output), time.perf_counter()
    shards = open_shards(source)
    _check_output(output, shards, overwrite)
    matrix = _matrix(imatrix, recipe)
    job = _job(shards, recipe, matrix)
    planned = _plan(shards, recipe, job, matrix)
    _check_space(output, planned)
    job["keys"]["dfqs.source_sha256"] = source_sha256(shards.paths)
    job |= {"n_threads": n_threads or usable_cores()}
    with tempfile.TemporaryDirectory() as folder, _part(output) as part:
        if matrix and planned.entries:
            write_imatrix(Path(folder) / "used.gguf", matrix.fitting(shards.as_one))
            job["imatrix"] = str(Path(folder) / "used.gguf")
        with tqdm(total=len(planned.tensors), desc=recipe.name, unit="tensor", disable=not progress) as bar:
            run_child(
                "dfqs_nb.ladder.quantize",
                {**job, "output": str(part)},
                shards.paths[0],
                lambda said: bar.update(said["tensor"] - bar.n),
            )
        _check_written(part, planned)
    return Quantized(output, planned.nbytes, planned, time.perf_counter() - started)


def source_sha256(paths: Sequence[Path]) -> str:
    """SHA-256 of the source: of its file, or of its shards one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _check_output(output: Path, shards: ShardSet, overwrite: bool) -> None:
    if any(output.exists() and output.samefile(path) for path in shards.paths):
        raise OutputError("is the source itself", where=output, hint="name another file")
    if output.exists() and not overwrite:
        raise OutputError("exists already", where=output, hint="name another file, or pass --overwrite")
    if not output.parent.is_dir():
        raise OutputError("its folder does not exist", where=output, hint="make the folder first")


def _check_space(output: Path, planned: Plan) -> None:
    """Refuse before hours of work what the disk will not hold; an output that is replaced stays till then."""
    free = shutil.disk_usage(output.parent).free
    if free < planned.nbytes:
        raise SpaceError(
            f"needs {planned.nbytes:,} bytes and {free:,} are free",
            where=output.parent,
            hint=f"free {planned.nbytes - free:,} bytes, or take another disk",
        )


@contextmanager
def _part(output: Path) -> Iterator[Path]:
    """A temporary file beside the output, which takes its name when the block ends well."""
    handle, name = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)
        os.replace(part, output)
        fsync_dir(output.parent)
    finally:
        part.unlink(missing_ok=True)


def _check_written(part: Path, planned: Plan) -> None:
    """Hold the file against the plan, and against llama.cpp's own parser."""
    header = read_header(part)
    check_layout(header)
    found = {one.name: (one.type, one.nbytes) for one in header.tensors}
    if found != {one.name: (one.type, one.nbytes) for one in planned.tensors}:
        raise IntegrityError("llama.cpp wrote other types than it said", where=part, hint="report this file")
    if header.file_size != planned.nbytes:
        raise IntegrityError(
            f"has {header.file_size:,} bytes; {planned.nbytes:,} were planned",
            where=part,
            hint="is the disk full?",
        )
    if not check.parse(part).accepted:
        raise IntegrityError("llama.cpp's parser refuses it", where=part, hint="report this file")


def run_child(
    module: str, job: dict[str, Any], where: Path, told: Callable[[dict[str, Any]], Any] = lambda said: None
) -> dict[str, Any]:
    """Run ``python -m module`` with a job on its standard input and hear JSON lines from it; the last one.

    The child takes its job with ``read_job``, and ends when this process does.

    Args:
        where: the file that a failure is about.
        told: called with every line but the last.

    Raises:
        QuantizeError: the child says ``failed``.
        ModelError: it died.
    """
    root = str(Path(__file__).resolve().parents[2])
    environment = {
        **os.environ,
        "GGML_NO_BACKTRACE": "1",
        "PYTHONIOENCODING": "utf-8",
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
    }
    last: dict[str, Any] = {}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
        ) as child,
    ):
        try:
            child.stdin.write(json.dumps(job).encode() + b"\n")
            child.stdin.flush()  # and left open: when it closes, the child knows that it is alone
            for line in child.stdout:
                if line.startswith(b"{"):
                    last = json.loads(line)
                    told(last) if not {"done", "failed"} & set(last) else None
            child.wait()
        except BrokenPipeError:
            child.wait()
        except BaseException:
            child.kill()
            raise
        errors.seek(0)
        log = errors.read().decode("utf-8", "replace").splitlines()
    if "failed" in last:
        raise QuantizeError(last["failed"], where=last.get("where") or where, hint=last.get("hint", ""))
    if "done" not in last:
        raise died(ending(child.returncode), where, [], log, "while loading it")
    return last


# ---- the child process ----


def read_job() -> dict[str, Any]:
    """The job that ``run_child`` gave. From then on the process ends when its parent is gone, so that no
    orphan writes beside a later run."""
    job = json.loads(sys.stdin.readline())

    def wait() -> None:
        os.read(0, 1)  # nothing more is ever sent: this returns when the other end is closed
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
    return job


def main() -> int:
    """Read a job from standard input, quantize, and say how it goes on standard output."""
    job = read_job()
    log = _Log()
    log.install()
    params, alive = _params(job)
    import llama_cpp.llama_cpp as api

    output = os.fsencode(job.get("output", ""))
    status = api.llama_model_quantize(os.fsencode(job["source"]), output, ctypes.byref(params))
    del alive
    if status:
        _say(failed=log.reason(), hint="see the recipe, and what llama.cpp says of the source")
        return 0
    _say(done=True, tensors=log.tensors(), fallbacks=log.fallbacks())
    return 0


class _Log:
    """llama.cpp's log as text; each tensor that it begins is reported."""

    def __init__(self) -> None:
        self.text: list[str] = []

    def install(self) -> None:
        import llama_cpp.llama_cpp as api

        self._callback = api.llama_log_callback(self._hear)
        api.llama_log_set(self._callback, None)

    def _hear(self, level: int, text: bytes, _data: object) -> None:
        line = text.decode("utf-8", "replace")
        self.text.append(line)
        found = re.match(r"\[ *(\d+)/ *(\d+)\]", line)
        if found:
            _say(tensor=int(found[1]), of=int(found[2]))
        if level >= 4:  # errors, and what continues them
            os.write(2, text)

    def tensors(self) -> list[tuple[str, str, str]]:
        """Name, type and new type of each, from the lines of a dry run."""
        rows = re.findall(
            r"\[ *\d+/ *\d+\] +(\S+) +- \[.*?\], type = +(\S+), size = +[\d.]+ MiB"
            r"(?: -> +[\d.]+ MiB \((\S+)\))?",
            "".join(self.text),
        )
        return [(name, old.upper(), (new or old).upper()) for name, old, new in rows]

    def fallbacks(self) -> list[str]:
        """What llama.cpp says where a shape does not suit the type of its mix."""
        pattern = r"warning: +(\S+) +- (ncols.*?)\) .*?(-> falling back to +\S+)"
        found = re.findall(pattern, "".join(self.text))
        return [" ".join(f"{name}: {why}) {what}".split()) for name, why, what in found]

    def reason(self) -> str:
        lines = [line for line in "".join(self.text).splitlines() if "failed to quantize: " in line]
        return lines[-1].split("failed to quantize: ", 1)[1] if lines else "llama.cpp could not quantize it"


def _params(job: dict[str, Any]) -> tuple[Any, list[Any]]:
    """llama.cpp's parameters, and what they point to."""
    import llama_cpp.llama_cpp as api

    params = api.llama_model_quantize_default_params()
    params.ftype, params.dry_run = job["mix"], bool(job.get("dry_run"))
    params.nthread, params.max_buf_size = job.get("n_threads", 1), BUFFER_BYTES
    overrides = (api.llama_model_tensor_override * (len(job["overrides"]) + 1))()
    for slot, (pattern, code) in zip(overrides, job["overrides"], strict=False):
        slot.pattern, slot.type = pattern.encode(), code
    keys = (api.llama_model_kv_override * (len(job["keys"]) + 1))()
    for slot, (name, value) in zip(keys, job["keys"].items(), strict=False):
        slot.key = name.encode()
        if isinstance(value, str):
            slot.tag, slot.value.val_str = api.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
        else:
            slot.tag, slot.value.val_i64 = api.LLAMA_KV_OVERRIDE_TYPE_INT, value
    params.tt_overrides = ctypes.cast(overrides, ctypes.POINTER(api.llama_model_tensor_override))
    params.kv_overrides = ctypes.cast(keys, ctypes.POINTER(api.llama_model_kv_override))
    alive: list[Any] = [overrides, keys]
    if job.get("imatrix"):
        alive += _point_to_matrix(params, read_imatrix(job["imatrix"]))
    return params, alive


def _point_to_matrix(params: Any, matrix: ImportanceMatrix) -> list[Any]:
    import llama_cpp.llama_cpp as api

    data = (api.llama_model_imatrix_data * (len(matrix.entries) + 1))()
    arrays = [entry.weights() for entry in matrix.entries.values()]
    for slot, name, values in zip(data, matrix.entries, arrays, strict=False):
        slot.name, slot.size = name.encode(), values.size
        slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params.imatrix = ctypes.cast(data, ctypes.POINTER(api.llama_model_imatrix_data))
    return [data, arrays]


def _say(**facts: object) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
