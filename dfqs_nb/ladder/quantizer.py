"""Quantize a model with llama.cpp's own quantizer, tensor by tensor as a recipe says.

``llama_model_quantize`` runs in a child process, which may die of a broken header. A dry run of llama.cpp
itself tells beforehand what it will write, to the byte.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from dfqs_nb.core import child, display, files, machine
from dfqs_nb.core.errors import IntegrityError, OutputError, SpaceError
from dfqs_nb.gguf.facts import INTEGER_TYPES, bits_per_weight, class_sizes
from dfqs_nb.gguf.header import DEFAULT_ALIGNMENT, Tensor, check_layout, padded, read_header
from dfqs_nb.gguf.shards import ShardSet, open_shards
from dfqs_nb.gguf.types import TENSOR_TYPES
from dfqs_nb.ladder.imatrix import ImportanceMatrix, read_imatrix
from dfqs_nb.ladder.recipes import FLOATS, QuantizeError, Recipe, Rule, file_types, load_recipe
from dfqs_nb.llama.build import ERROR, LOG
from dfqs_nb.llama.settings import llama_version

BLOCKS = {name: (code, block, nbytes) for code, (name, block, nbytes) in TENSOR_TYPES.items()}
BUFFER_BYTES = 512 << 20  # of rows that the child holds at once
MAX_TEXT_BYTES = 127  # of a key's value, as llama.cpp overrides it
SPLIT_KEYS = {"split.no", "split.count", "split.tensors.count"}
REPORT = "report this file and recipe as a bug of the workbook"
CHILD = "dfqs_nb.ladder"
# lines of llama.cpp's log
TENSOR = re.compile(
    r"\[ *\d+/ *\d+\] +(\S+) +- \[.*?\], type = +(\S+), size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((\S+)\))?"
)
FALLBACK = re.compile(r"warning: +(\S+) +- (ncols.*?)\) .*?(-> falling back to +\S+)")


@dataclass(frozen=True)
class Plan:
    """What a quantization writes."""

    recipe: Recipe
    source: ShardSet = field(repr=False)
    tensors: tuple[Tensor, ...] = field(repr=False)  # as they will be, in the order of the file
    nbytes: int  # of the file, exactly
    notes: tuple[str, ...] = ()  # to read first: shapes that do not suit a type, unused entries of the matrix
    matrix: ImportanceMatrix | None = field(repr=False, default=None)  # the entries that are used
    job: dict[str, Any] = field(repr=False, default_factory=dict)  # of the child, without its output

    @property
    def bits_per_weight(self) -> float:
        """Average over all weights, without tables of integers."""
        return bits_per_weight(self.tensors)

    def by_class(self) -> pd.DataFrame:
        """One row a tensor class, largest first; see `gguf.facts.class_sizes`, and ``source_bytes``."""
        before = {row["class"]: row["bytes"] for row in class_sizes(self.source.as_one)}
        sizes = pd.DataFrame(class_sizes(replace(self.source.as_one, tensors=self.tensors)))
        sizes.insert(3, "source_bytes", sizes["class"].map(before))
        return sizes


def plan(
    source: str | Path,
    recipe: Recipe | str,
    imatrix: str | Path | ImportanceMatrix | None = None,
    worker: child.Worker | None = None,
) -> Plan:
    """Ask llama.cpp in a dry run what it would make of a model by a recipe. Writes nothing.

    ``source``: a GGUF with F32, F16 or BF16 weights, or any of its shards. ``imatrix``: an importance matrix
    that lies in a file, or that file; a recipe with ``weights`` uses it. ``worker``: a child, for several
    calls. A `QuantizeError`: the recipe does not fit the model, or a type needs an importance matrix. An
    `ImatrixError`: that is broken, or of another model. A `ModelError`: llama.cpp dies on the source.
    """
    recipe, shards = load_recipe(recipe) if isinstance(recipe, str) else recipe, open_shards(source)
    where, matrix, notes = shards.paths[0], None, list[str]()
    _check_source(shards)
    if imatrix is not None and recipe.weights:
        given = imatrix if isinstance(imatrix, ImportanceMatrix) else read_imatrix(imatrix)
        matrix, odd = given.fitting(shards.as_one, recipe.weights)
        if odd:
            names = ", ".join(odd[:3]) + (", ..." if len(odd) > 3 else "")
            notes.append(f"{len(odd)} entries of the importance matrix do not fit and are not used: {names}")
    before, rules = {tensor.name: tensor for tensor in shards.tensors}, recipe.chosen(shards.as_one)
    types = {name: rule.type if rule else before[name].type for name, rule in rules.items()}
    job: dict[str, Any] = {
        "work": "quantize",
        "source": str(where.resolve()),
        "mix": file_types()[recipe.mix],
    }
    job |= {"keys": _keys(recipe, matrix), "types": {name: BLOCKS[kind][0] for name, kind in types.items()}}
    if matrix and matrix.entries:
        job |= {"imatrix": str(Path(matrix.path).resolve()), "entries": list(matrix.entries)}
    with nullcontext(worker) if worker else child.Worker(CHILD) as serving:
        answer = serving.run({**job, "dry_run": True}, where=where)
    chosen = dict(answer["tensors"])
    if set(chosen) != set(before):
        what = "llama.cpp's dry run names other tensors than the header"
        raise QuantizeError(what, where=where, hint=REPORT)
    _check_rules(recipe, rules, chosen, where)
    tensors = []
    for name, kind in chosen.items():
        code, block, nbytes = BLOCKS[kind]
        nbytes *= before[name].n_elements // block
        tensors.append(replace(before[name], type=kind, type_code=code, nbytes=nbytes))
    nbytes = _file_bytes(shards, tensors, job["keys"])
    return Plan(recipe, shards, tuple(tensors), nbytes, (*answer["fallbacks"], *notes), matrix, job)


def _check_source(shards: ShardSet) -> None:
    """Refuse what is quantized already, and what llama.cpp would make an unreadable file of."""
    what, hint = "", "quantize the original F32, F16 or BF16 model: losses add up"
    if quantized := [t for t in shards.tensors if t.type not in (*FLOATS, *INTEGER_TYPES)]:
        what = f"{quantized[0].name} is quantized already ({quantized[0].type})"
    elif (alignment := shards.headers[0].alignment) != DEFAULT_ALIGNMENT:  # it pads to 32, and keeps the key
        what = f"its tensors are aligned to {alignment:,} bytes: llama.cpp would write a file that it refuses"
        hint = f"write the source again with an alignment of {DEFAULT_ALIGNMENT}"
    if what:
        raise QuantizeError(what, where=shards.paths[0], hint=hint)


def _check_rules(
    recipe: Recipe, rules: Mapping[str, Rule | None], chosen: Mapping[str, str], where: Path
) -> None:
    """Refuse a rule without effect: no tensor is its own, or llama.cpp gives them all another type."""
    for rule in recipe.rules:
        names = [name for name, its_rule in rules.items() if its_rule == rule]
        if not names and not rule.optional:
            what = f"no tensor matches {rule.pattern!r} of the recipe {recipe.name}"
            raise QuantizeError(what, where=where, hint="correct the pattern, or say optional = true")
        if names and all(chosen[name] != rule.type for name in names):
            # it leaves norms, routers and vectors as they are, and takes another type for some shapes
            what = f"llama.cpp gives {chosen[names[0]]} to {names[0]}, whatever {rule.pattern!r} says"
            raise QuantizeError(what, where=where, hint="take the rule out, or give a type of blocks of 32")


def _keys(recipe: Recipe, used: ImportanceMatrix | None) -> dict[str, str | int]:
    """The metadata that llama.cpp writes on top of the source's; texts cut to what it takes."""
    keys: dict[str, str | int] = {
        "general.file_type": file_types()[recipe.file_type or recipe.mix],
        "dfqs.recipe": recipe.name,
        "dfqs.recipe_sha256": recipe.sha256 or "not from a file",
        "dfqs.source_sha256": "0" * 64,  # in its place until the source is hashed
        "dfqs.quantizer": f"llama-cpp-python {llama_version()}",
    }
    if used and used.entries:
        keys |= {
            "quantize.imatrix.file": Path(used.path).name,
            "quantize.imatrix.dataset": (used.datasets or ("not stated",))[0],
            "quantize.imatrix.entries_count": len(used.entries),
            "quantize.imatrix.chunks_count": used.chunk_count,
        }
    return {
        name: value if isinstance(value, int) else value.encode()[:MAX_TEXT_BYTES].decode(errors="ignore")
        for name, value in keys.items()
    }


def _file_bytes(shards: ShardSet, tensors: Sequence[Tensor], keys: Mapping[str, str | int]) -> int:
    """The size of the file that llama.cpp will write, from the format's rules."""
    added = {**keys, "general.quantization_version": 2}
    gone = added.keys() | SPLIT_KEYS
    kept = [entry.record for name, entry in shards.headers[0].fields.items() if name not in gone]
    nbytes = 24 + sum(end - start for start, end in kept)
    for name, value in added.items():
        nbytes += 12 + len(name) + (8 + len(value.encode()) if isinstance(value, str) else 4)
    for tensor in tensors:
        n_dims = max((i for i, extent in enumerate(tensor.shape, 1) if extent > 1), default=1)
        nbytes += 8 + len(tensor.name.encode()) + 4 + 8 * n_dims + 4 + 8
    return padded(nbytes, DEFAULT_ALIGNMENT) + sum(padded(t.nbytes, DEFAULT_ALIGNMENT) for t in tensors)


def quantize(
    source: str | Path,
    recipe: Recipe | str,
    output: str | Path,
    *,
    imatrix: str | Path | ImportanceMatrix | None = None,
    n_threads: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    source_sha256: str = "",
    worker: child.Worker | None = None,
) -> Plan:
    """Quantize a model into one file, which appears whole or not at all; returns what was written.

    See `plan`; shards need no merge first. The result does not depend on ``n_threads`` (0: the usable cores).
    ``source_sha256``: where it is known. An `OutputError` or a `SpaceError`: the output exists, is the
    source, or finds no room. An `IntegrityError`: what llama.cpp wrote is not what was planned.
    """
    output, shards = Path(output), open_shards(source)
    if any(output.exists() and output.samefile(path) for path in shards.paths):
        raise OutputError("is the source itself", where=output, hint="name another file")
    if output.exists() and not overwrite:
        raise OutputError("exists already", where=output, hint="name another file, or pass --overwrite")
    if not output.parent.is_dir():
        raise OutputError("its folder does not exist", where=output, hint="make the folder first")
    with nullcontext(worker) if worker else child.Worker(CHILD) as serving:
        planned = plan(source, recipe, imatrix, serving)
        free = shutil.disk_usage(output.parent).free  # an output that is replaced stays until then
        if free < planned.nbytes:
            what = f"needs {planned.nbytes:,} bytes and {free:,} are free"
            hint = f"free {planned.nbytes - free:,} bytes, or take another disk"
            raise SpaceError(what, where=output.parent, hint=hint)
        job = planned.job | {"n_threads": n_threads or machine.usable_cores()}
        job["keys"]["dfqs.source_sha256"] = source_sha256 or files.sha256_of_files(shards.paths)
        bar = display.tqdm(
            total=len(planned.tensors), desc=planned.recipe.name, unit="tensor", disable=not progress
        )
        with files.whole_path(output) as part, bar:
            job["output"] = str(part)
            serving.run(job, where=source, on_message=lambda message: bar.update(message["tensor"] - bar.n))
            _check_written(part, planned)
    return planned


def _check_written(part: Path, planned: Plan) -> None:
    """Compare the file with the plan."""
    header = read_header(part)
    check_layout(header)
    written, wanted = ([(t.name, t.type, t.nbytes) for t in each.tensors] for each in (header, planned))
    if written != wanted:
        raise IntegrityError("llama.cpp wrote other types than in its dry run", where=part, hint=REPORT)
    if header.file_size != planned.nbytes:
        what = f"has {header.file_size:,} bytes; {planned.nbytes:,} were planned"
        raise IntegrityError(what, where=part, hint="is the disk full?")


# ---- the child process ----


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Quantize, or only plan it; the tensors with their types, and llama.cpp's warnings."""
    import llama_cpp.llama_cpp as api

    lines: list[str] = []

    def hear(level: int, text: bytes, _data: object) -> None:
        lines.append(text.decode("utf-8", "replace"))
        if begun := re.match(r"\[ *(\d+)/", lines[-1]):
            child.tell(tensor=int(begun[1]))
        if level >= ERROR:  # and what continues errors
            os.write(2, text)

    callback = api.llama_log_callback(hear)
    api.llama_log_set(callback, None)
    params, alive = _params(job)
    paths = os.fsencode(job["source"]), os.fsencode(job.get("output", ""))
    status = api.llama_model_quantize(*paths, ctypes.byref(params))
    LOG.install()  # takes the log back: the callback ends with this call
    del alive
    log = "".join(lines)
    if status:
        reason = [*re.findall(r"failed to quantize: (.*)", log)[-1:], "llama.cpp could not quantize it"][0]
        hint = f"correct the recipe, or check the source: `dfqs-nb verify {display.quoted(job['source'])}`"
        if re.search("imatrix|importance matrix", reason):
            hint = "add --calibrate with a text, or --imatrix with a file of llama-imatrix"
        raise QuantizeError(reason, where=job["source"], hint=hint)
    fallbacks = [" ".join(f"{name}: {why}) {what}".split()) for name, why, what in FALLBACK.findall(log)]
    types = [(name, (new or old).upper()) for name, old, new in TENSOR.findall(log)]
    return {"tensors": types, "fallbacks": fallbacks}


def _params(job: dict[str, Any]) -> tuple[Any, list[Any]]:
    """llama.cpp's parameters, and the objects that they point to."""
    import llama_cpp.llama_cpp as api

    params = api.llama_model_quantize_default_params()
    params.ftype, params.dry_run = job["mix"], bool(job.get("dry_run"))
    params.nthread, params.max_buf_size = job.get("n_threads", 1), BUFFER_BYTES
    # each list ends with an empty entry
    types = (api.llama_model_tensor_override * (len(job["types"]) + 1))()
    for slot, (name, code) in zip(types, job["types"].items(), strict=False):
        slot.pattern, slot.type = f"^{re.escape(name)}$".replace(r"\-", "-").encode(), code
    keys = (api.llama_model_kv_override * (len(job["keys"]) + 1))()
    for slot, (name, value) in zip(keys, job["keys"].items(), strict=False):
        slot.key = name.encode()
        if isinstance(value, str):
            slot.tag, slot.value.val_str = api.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
        else:
            slot.tag, slot.value.val_i64 = api.LLAMA_KV_OVERRIDE_TYPE_INT, value
    lists: dict[str, Any] = {"tt_overrides": types, "kv_overrides": keys}
    alive = list[Any]()  # what they point to
    if "imatrix" in job:
        entries = read_imatrix(job["imatrix"]).entries
        lists["imatrix"] = (api.llama_model_imatrix_data * (len(job["entries"]) + 1))()
        for slot, name in zip(lists["imatrix"], job["entries"], strict=False):
            alive.append(values := entries[name].weights())
            slot.name, slot.size = name.encode(), values.size
            slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    for field_name, array in lists.items():
        setattr(params, field_name, ctypes.cast(array, ctypes.POINTER(array._type_)))
    return params, [lists, alive]
