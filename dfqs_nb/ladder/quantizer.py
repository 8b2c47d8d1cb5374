"""Quantize a model with llama.cpp's own quantizer, tensor by tensor as a recipe says.

``llama_model_quantize`` runs in a child process, which may die of a broken header without taking this one
along, and which holds some rows of one tensor at a time. A dry run of llama.cpp itself tells beforehand what
it will write, to the byte.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqs_nb.core import child
from dfqs_nb.core.display import quoted, tqdm
from dfqs_nb.core.errors import IntegrityError, OutputError, SpaceError
from dfqs_nb.core.files import sha256_of_files, whole_path
from dfqs_nb.core.machine import usable_cores
from dfqs_nb.gguf.facts import bits_per_weight, class_of, class_sizes, layer_of
from dfqs_nb.gguf.header import DEFAULT_ALIGNMENT, Tensor, check_layout, padded, read_header
from dfqs_nb.gguf.shards import ShardSet, open_shards
from dfqs_nb.gguf.types import TENSOR_TYPES
from dfqs_nb.ladder.imatrix import ImportanceMatrix, read_imatrix
from dfqs_nb.ladder.recipes import (
    FLOATS,
    INTEGERS,
    QuantizeError,
    Recipe,
    Rule,
    check_recipe,
    file_types,
    load_recipe,
)
from dfqs_nb.llama import check
from dfqs_nb.llama.settings import llama_version

if TYPE_CHECKING:
    import pandas as pd

BLOCKS = {name: (block, nbytes) for name, block, nbytes in TENSOR_TYPES.values()}
CODES = {name: code for code, (name, *_) in TENSOR_TYPES.items()}
# llama.cpp refuses these without an importance matrix, but for the embedding and the output
# (tensor_requires_imatrix in src/llama-quant.cpp)
NEED_MATRIX = ("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S")
NO_MATRIX = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")
BUFFER_BYTES = 512 << 20  # of rows that the child holds at once
MAX_TEXT_BYTES = 127  # of a key's value, as llama.cpp overrides it
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
REPORT = "report this file and recipe as a bug of the workbook"
CHILD = "dfqs_nb.ladder"


# ---- the plan ----


@dataclass(frozen=True)
class Planned(Tensor):
    """A tensor as it will be, and as it is now; ``decided_by``: ``rule``, ``keep`` or ``llama.cpp``."""

    source_type: str
    source_nbytes: int
    decided_by: str


@dataclass(frozen=True)
class Plan:
    """What a quantization will write.

    Attributes:
        tensors: in the order of the file.
        nbytes: of the file, exactly.
        fallbacks: llama.cpp's lines about tensors whose shape does not suit the type it wanted.
        entries: of the importance matrix that will be used.
        left_out: entries of the matrix that do not fit the model (see `ImportanceMatrix.fitting`).
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
        """Average over all weights, without tables of integers."""
        return bits_per_weight(self.tensors)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should read before the work: fallbacks, and entries of the matrix that are not used."""
        names = ", ".join(self.left_out[:3]) + (", ..." if len(self.left_out) > 3 else "")
        unused = f"{len(self.left_out)} entries of the importance matrix do not fit and are not used: {names}"
        return (*self.fallbacks, *([unused] if self.left_out else []))

    def by_class(self) -> pd.DataFrame:
        """One row a tensor class, largest first; see `gguf.facts.class_sizes`, and ``source_bytes``."""
        import pandas as pd

        before: Counter[str] = Counter()
        for tensor in self.tensors:
            before[class_of(tensor.name)] += tensor.source_nbytes
        sizes = pd.DataFrame(class_sizes(replace(self.source.as_one, tensors=self.tensors)))
        sizes.insert(3, "source_bytes", sizes["class"].map(before))
        return sizes


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
        ImatrixError: the importance matrix is broken, or of another model.
        HeaderError, ShardError, LayoutError: the source is not a sound model.
        ModelError: llama.cpp dies on it.
    """
    return _prepare(source, recipe, imatrix)[0]


def _prepare(
    source: str | Path, recipe: Recipe | str, imatrix: str | Path | ImportanceMatrix | None
) -> tuple[Plan, dict[str, Any], ImportanceMatrix | None]:
    """The plan, the child's job without its output, and the entries of the matrix that are used."""
    recipe = load_recipe(recipe) if isinstance(recipe, str) else check_recipe(recipe)
    shards = open_shards(source)
    _check_source(shards)
    matrix, left_out = _usable(imatrix, recipe, shards)
    types, kept = _types_by_rule(shards, recipe)
    overrides = [
        [f"^{re.escape(name)}$".replace(r"\-", "-"), CODES[kind]] for name, kind in {**types, **kept}.items()
    ]
    keys = _keys(recipe, matrix)
    job = {
        "work": "quantize",
        "source": str(shards.paths[0].resolve()),
        "mix": file_types()[recipe.mix],
        "overrides": overrides,
        "keys": keys,
    }
    answer = child.run(CHILD, {**job, "dry_run": True}, where=shards.paths[0])
    by_name = {tensor.name: tensor for tensor in shards.tensors}
    chosen = dict(answer["tensors"])
    if set(chosen) != set(by_name):
        raise QuantizeError(
            "llama.cpp's dry run names other tensors than the header", where=source, hint=REPORT
        )
    deciders = dict.fromkeys(types, "rule") | dict.fromkeys(kept, "keep")
    tensors = tuple(
        _planned(by_name[name], kind, deciders.get(name, "llama.cpp")) for name, kind in chosen.items()
    )
    _check_followed(tensors, recipe, shards)
    _check_matrix(tensors, matrix, shards)
    nbytes, entries = _file_bytes(shards, tensors, keys), len(matrix.entries) if matrix else 0
    return Plan(recipe, shards, tensors, nbytes, tuple(answer["fallbacks"]), entries, left_out), job, matrix


def _planned(tensor: Tensor, kind: str, decided_by: str) -> Planned:
    block, block_nbytes = BLOCKS[kind]
    nbytes = tensor.n_elements // block * block_nbytes
    after = asdict(tensor) | {"type": kind, "type_code": CODES[kind], "nbytes": nbytes}
    return Planned(**after, source_type=tensor.type, source_nbytes=tensor.nbytes, decided_by=decided_by)


def _usable(
    given: str | Path | ImportanceMatrix | None, recipe: Recipe, shards: ShardSet
) -> tuple[ImportanceMatrix | None, tuple[str, ...]]:
    """The entries of the importance matrix that will be used, and the names of those that do not fit."""
    if given is None or not recipe.weights:
        return None, ()
    matrix = given if isinstance(given, ImportanceMatrix) else read_imatrix(given)
    matrix.fitting(shards.as_one)  # refuses the matrix of another model, whatever the recipe uses of it
    matrix = matrix.only(recipe.weights)
    used = matrix.fitting(shards.as_one)
    return used, tuple(sorted(set(matrix.entries) - set(used.entries)))


def _check_source(shards: ShardSet) -> None:
    where = shards.paths[0]
    if (alignment := shards.headers[0].alignment) != DEFAULT_ALIGNMENT:  # it pads to 32, and keeps the key
        raise QuantizeError(
            f"its tensors are aligned to {alignment:,} bytes: llama.cpp would write a file that it refuses",
            where=where,
            hint=f"write the source again with an alignment of {DEFAULT_ALIGNMENT}",
        )
    for tensor in shards.tensors:
        if tensor.type not in (*FLOATS, *INTEGERS):
            raise QuantizeError(
                f"{tensor.name} is quantized already ({tensor.type})",
                where=where,
                hint="quantize the original F32, F16 or BF16 model: losses add up",
            )


def _keys(recipe: Recipe, used: ImportanceMatrix | None) -> dict[str, str | int]:
    """The metadata that llama.cpp writes on top of the source's; texts cut to what it takes."""
    kinds = file_types()
    keys: dict[str, str | int] = {
        "general.file_type": kinds[recipe.file_type or recipe.mix],
        "dfqs.recipe": recipe.name,
        "dfqs.recipe_sha256": recipe.sha256 or "not from a file",
        "dfqs.source_sha256": "0" * 64,  # in its place until the source is hashed
        "dfqs.quantizer": f"llama-cpp-python {llama_version()}",
    }
    if used and used.entries:
        keys |= {
            "quantize.imatrix.file": Path(used.path).name or "not from a file",
            "quantize.imatrix.dataset": (used.datasets or ("not stated",))[0],
            "quantize.imatrix.entries_count": len(used.entries),
        }
        keys |= {"quantize.imatrix.chunks_count": used.chunk_count} if used.chunk_count > 0 else {}
    return {name: value if isinstance(value, int) else _shortened(value) for name, value in keys.items()}


def _shortened(text: str) -> str:
    return text.encode("utf-8")[:MAX_TEXT_BYTES].decode("utf-8", "ignore")


def _n_layers(tensors: Iterable[Tensor]) -> int:
    return 1 + max((layer_of(tensor.name) or 0 for tensor in tensors), default=0)


def _types_by_rule(shards: ShardSet, recipe: Recipe) -> tuple[dict[str, str], dict[str, str]]:
    """Types of the tensors that a rule names, and of those that are kept."""
    n_layers, where = _n_layers(shards.tensors), shards.paths[0]
    types, kept, hit = {}, {}, set()
    for tensor in shards.tensors:
        if tensor.type in INTEGERS:
            continue
        if any(re.search(pattern, tensor.name) for pattern in recipe.keep):
            kept[tensor.name] = tensor.type
        elif rule := _rule_for(tensor.name, recipe, n_layers):
            hit.add(rule)
            types[tensor.name] = rule.type
            block = BLOCKS[rule.type][0]
            if len(tensor.shape) > 1 and tensor.shape[0] % block:
                raise QuantizeError(
                    f"{tensor.name} has rows of {tensor.shape[0]:,} values, which blocks of {block} "
                    f"({rule.type}) do not divide",
                    where=where,
                    hint="give it Q8_0 or Q4_0 (blocks of 32), or leave it to the mix",
                )
    for rule in recipe.rules:
        if rule not in hit and not rule.optional:
            what = f"no tensor matches {rule.pattern!r} of the recipe {recipe.name}"
            raise QuantizeError(what, where=where, hint="correct the pattern, or say optional = true")
    return types, kept


def _rule_for(name: str, recipe: Recipe, n_layers: int) -> Rule | None:
    return next((rule for rule in recipe.rules if rule.matches(name, n_layers)), None)


def _check_followed(tensors: Sequence[Planned], recipe: Recipe, shards: ShardSet) -> None:
    """Refuse a rule that llama.cpp follows for none of its tensors: it leaves norms, routers and vectors."""
    n_layers = _n_layers(tensors)
    ruled = [tensor for tensor in tensors if tensor.decided_by == "rule"]
    for rule in recipe.rules:
        mine = [tensor for tensor in ruled if _rule_for(tensor.name, recipe, n_layers) is rule]
        if mine and all(tensor.type != rule.type for tensor in mine):
            raise QuantizeError(
                f"llama.cpp keeps {mine[0].name} at {mine[0].type}, whatever the rule {rule.pattern!r} says",
                where=shards.paths[0],
                hint="take the rule out",
            )


def _check_matrix(tensors: Sequence[Planned], matrix: ImportanceMatrix | None, shards: ShardSet) -> None:
    known = {*NO_MATRIX, *(matrix.entries if matrix else ())}
    bare = [
        tensor
        for tensor in tensors
        if tensor.type in NEED_MATRIX and tensor.name not in known and tensor.type != tensor.source_type
    ]
    if bare:
        more = f" (and {len(bare) - 1} more)" if len(bare) > 1 else ""
        raise QuantizeError(
            f"{bare[0].type} needs an importance matrix for {bare[0].name}{more}",
            where=shards.paths[0],
            hint="collect it over more text, or give these tensors another type"
            if matrix
            else "add --calibrate with a text, or --imatrix with a file of llama-imatrix",
        )


def _file_bytes(shards: ShardSet, tensors: Sequence[Planned], keys: Mapping[str, str | int]) -> int:
    """The size of the file that llama.cpp will write, from the format's rules."""
    added = {**keys, "general.quantization_version": 2}
    records = [
        end - start
        for name, entry in shards.headers[0].fields.items()
        if name not in {*added, *SPLIT_KEYS}
        for start, end in [entry.record]
    ]
    records += [
        12 + len(name) + (8 + len(value.encode()) if isinstance(value, str) else 4)
        for name, value in added.items()
    ]
    for tensor in tensors:
        n_dims = max((i for i, extent in enumerate(tensor.shape, 1) if extent > 1), default=1)
        records.append(8 + len(tensor.name.encode()) + 4 + 8 * n_dims + 4 + 8)
    data = sum(padded(tensor.nbytes, DEFAULT_ALIGNMENT) for tensor in tensors)
    return padded(24 + sum(records), DEFAULT_ALIGNMENT) + data


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
        source: as for `plan`; shards need no merge first.
        recipe: a recipe, or the name of one.
        imatrix: as for `plan`.
        n_threads: 0: the usable cores. The result does not depend on it.
        overwrite: replace an existing output.

    Raises:
        OutputError: the output exists, or is the source.
        SpaceError: the disk has too little room; nothing was written.
        QuantizeError, ImatrixError, ModelError: as `plan`, or llama.cpp fails; nothing is left behind then.
        IntegrityError: what llama.cpp wrote is not what was planned.
    """
    output, started = Path(output), time.perf_counter()
    shards = open_shards(source)
    _check_output(output, shards, overwrite)
    planned, job, matrix = _prepare(source, recipe, imatrix)
    free = shutil.disk_usage(output.parent).free  # an output that is replaced stays until then
    if free < planned.nbytes:
        raise SpaceError(
            f"needs {planned.nbytes:,} bytes and {free:,} are free",
            where=output.parent,
            hint=f"free {planned.nbytes - free:,} bytes, or take another disk",
        )
    job["keys"]["dfqs.source_sha256"] = sha256_of_files(shards.paths)
    with tempfile.TemporaryDirectory() as folder, whole_path(output) as part:
        job |= {"n_threads": n_threads or usable_cores(), "output": str(part)}
        if matrix and matrix.entries:
            job["imatrix"] = matrix.save(Path(folder) / "used.gguf").path
        with tqdm(
            total=len(planned.tensors), desc=planned.recipe.name, unit="tensor", disable=not progress
        ) as bar:
            child.run(CHILD, job, where=source, on_message=lambda told: bar.update(told["tensor"] - bar.n))
        _check_written(part, planned)
    return Quantized(output, planned.nbytes, planned, time.perf_counter() - started)


def _check_output(output: Path, shards: ShardSet, overwrite: bool) -> None:
    if any(output.exists() and output.samefile(path) for path in shards.paths):
        raise OutputError("is the source itself", where=output, hint="name another file")
    if output.exists() and not overwrite:
        raise OutputError("exists already", where=output, hint="name another file, or pass --overwrite")
    if not output.parent.is_dir():
        raise OutputError("its folder does not exist", where=output, hint="make the folder first")


def _check_written(part: Path, planned: Plan) -> None:
    """Compare the file with the plan, and ask llama.cpp's own parser."""
    header = read_header(part)
    check_layout(header)
    written = [(tensor.name, tensor.type, tensor.nbytes) for tensor in header.tensors]
    if written != [(tensor.name, tensor.type, tensor.nbytes) for tensor in planned.tensors]:
        raise IntegrityError("llama.cpp wrote other types than in its dry run", where=part, hint=REPORT)
    if header.file_size != planned.nbytes:
        raise IntegrityError(
            f"has {header.file_size:,} bytes; {planned.nbytes:,} were planned",
            where=part,
            hint="is the disk full?",
        )
    if not check.parse(part).accepted:
        raise IntegrityError("llama.cpp's parser refuses it", where=part, hint=REPORT)


# ---- the child process ----


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Quantize, or only plan it; the tensors with their types, and llama.cpp's warnings."""
    import llama_cpp.llama_cpp as api

    lines: list[str] = []

    def hear(level: int, text: bytes, _data: object) -> None:
        lines.append(text.decode("utf-8", "replace"))
        if begun := re.match(r"\[ *(\d+)/", lines[-1]):
            child.tell(tensor=int(begun[1]))
        if level >= 4:  # errors, and what continues them
            os.write(2, text)

    callback = api.llama_log_callback(hear)
    api.llama_log_set(callback, None)
    params, alive = _params(job)
    status = api.llama_model_quantize(
        os.fsencode(job["source"]), os.fsencode(job.get("output", "")), ctypes.byref(params)
    )
    del alive
    log = "".join(lines)
    if status:
        reasons = re.findall(r"failed to quantize: (.*)", log)
        raise QuantizeError(
            reasons[-1] if reasons else "llama.cpp could not quantize it",
            where=job["source"],
            hint=f"correct the recipe, or check the source: `dfqs-nb verify {quoted(job['source'])}`",
        )
    rows = re.findall(
        r"\[ *\d+/ *\d+\] +(\S+) +- \[.*?\], type = +(\S+), size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((\S+)\))?",
        log,
    )
    warned = re.findall(r"warning: +(\S+) +- (ncols.*?)\) .*?(-> falling back to +\S+)", log)
    return {
        "tensors": [(name, (new or old).upper()) for name, old, new in rows],
        "fallbacks": [" ".join(f"{name}: {why}) {what}".split()) for name, why, what in warned],
    }


def _params(job: dict[str, Any]) -> tuple[Any, list[Any]]:
    """llama.cpp's parameters, and the objects that they point to."""
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
    entries = read_imatrix(job["imatrix"]).entries if job.get("imatrix") else {}
    data = (api.llama_model_imatrix_data * (len(entries) + 1))()
    arrays = [entry.weights() for entry in entries.values()]
    for slot, name, values in zip(data, entries, arrays, strict=False):
        slot.name, slot.size = name.encode(), values.size
        slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params.tt_overrides = ctypes.cast(overrides, ctypes.POINTER(api.llama_model_tensor_override))
    params.kv_overrides = ctypes.cast(keys, ctypes.POINTER(api.llama_model_kv_override))
    if entries:
        params.imatrix = ctypes.cast(data, ctypes.POINTER(api.llama_model_imatrix_data))
    return params, [overrides, keys, data, arrays]
