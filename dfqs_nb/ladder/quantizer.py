"""Quantize a model with llama.cpp's own quantizer, tensor by tensor as a recipe says.

A recipe (``data/quantize/*.toml``) is a mix of llama.cpp, and rules that override it for named tensors.
``llama_model_quantize`` runs in a child process, which may die of a broken header. A dry run of llama.cpp
itself tells beforehand which tensors it will write.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pydantic.dataclasses

from dfqs_nb.core import child, display, files, machine
from dfqs_nb.core.errors import DfqsError, IntegrityError, SpaceError
from dfqs_nb.core.paths import data_dir, tilde
from dfqs_nb.gguf.facts import INTEGER_TYPES, bits_per_weight, class_sizes, layer_of
from dfqs_nb.gguf.header import DEFAULT_ALIGNMENT, TENSOR_TYPES, GGUFHeader, Tensor, check_layout, read_header
from dfqs_nb.gguf.shards import Files, ShardSet, open_shards
from dfqs_nb.ladder.imatrix import ImportanceMatrix, read_imatrix
from dfqs_nb.llama.log import ERROR, LOG
from dfqs_nb.llama.settings import llama_version

NO_WEIGHTS = ("Q8_1", "Q8_K", "F64", *INTEGER_TYPES)  # types of activations and tables
WRITTEN = [name for name, *_ in TENSOR_TYPES.values() if name not in NO_WEIGHTS]
STRICT = pydantic.ConfigDict(extra="forbid")
BLOCKS = {name: (code, block, nbytes) for code, (name, block, nbytes) in TENSOR_TYPES.items()}
BUFFER_BYTES = 512 << 20  # of rows that the child holds at once
HEADER_BYTES = 1 << 20  # that a new header may need beyond the source's, with padding
MAX_TEXT_BYTES = 127  # of a key's value, as llama.cpp overrides it
REPORT = "report this file and recipe as a bug of the workbook"
CHILD = "dfqs_nb.ladder.run"
IN_A_CHILD: Callable[..., dict[str, Any]] = partial(child.run, CHILD)
TENSOR = re.compile(
    r"\[ *\d+/ *\d+\] +(\S+) +- \[.*?\], type = +(\S+), size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((\S+)\))?"
)  # a line of llama.cpp's log


def file_types() -> dict[str, int]:
    """llama.cpp's file types by name, as this build numbers them."""
    import llama_cpp.llama_cpp as api

    prefix = re.compile(r"LLAMA_FTYPE_(MOSTLY_|ALL_)?(?!GUESSED)")
    return {prefix.sub("", name): value for name, value in vars(api).items() if prefix.match(name)}


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Rule:
    """Tensors whose name contains a match of ``pattern`` get ``type``."""

    pattern: re.Pattern[str]
    type: str
    layers: float = 1.0  # only the first layers, this share of all: rounded down, at least one; 1: all
    optional: bool = False  # whether the rule may match no tensor

    def matches(self, name: str, n_layers: int) -> bool:
        """Whether the rule is about this tensor of a model of so many layers.

        >>> rule = Rule(re.compile("ffn_down_exps"), "Q2_K", layers=0.125)
        >>> rule.matches("blk.4.ffn_down_exps.weight", 43), rule.matches("blk.5.ffn_down_exps.weight", 43)
        (True, False)
        """
        layer = layer_of(name)
        in_reach = self.layers >= 1 or (layer is not None and layer < max(1, int(self.layers * n_layers)))
        return in_reach and self.pattern.search(name) is not None


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Recipe:
    """How a model is quantized; a ``ValueError`` says what is wrong with it."""

    name: str
    mix: str  # of `file_types`: chooses for tensors that no rule names
    keep: tuple[re.Pattern[str], ...] = ()  # tensors that stay as in the source
    rules: tuple[Rule, ...] = ()  # the first that matches counts
    weights: re.Pattern[str] | None = None  # the importance matrix's entries that are used
    sha256: str = ""  # of the recipe's file

    def __post_init__(self) -> None:
        for name, known in [(self.mix, list(file_types())), *((rule.type, WRITTEN) for rule in self.rules)]:
            if name not in known:
                raise ValueError(f"unknown type {name!r}; there are: {', '.join(known)}")

    def chosen(self, header: GGUFHeader) -> dict[str, Rule | None]:
        """The tensors that the mix does not choose for, by name, with their rule; None: it stays as it is."""
        rules = dict[str, Rule | None]()
        for name in [tensor.name for tensor in header.tensors if tensor.type not in INTEGER_TYPES]:
            if any(pattern.search(name) for pattern in self.keep):
                rules[name] = None
            elif rule := next((rule for rule in self.rules if rule.matches(name, header.n_layers)), None):
                rules[name] = rule
        return rules

    def idle_rules(self, header: GGUFHeader) -> list[Rule]:
        """The rules that match no tensor of a model, although they have to."""
        used = self.chosen(header).values()
        return [rule for rule in self.rules if rule not in used and not rule.optional]


def load_recipe(name: str | Path) -> Recipe:
    """A recipe by its name, in any case, or by the path of its file; a `DfqsError` if it is none."""
    path, folder = Path(name), data_dir() / "quantize"
    if path.suffix != ".toml":
        path = folder / f"{str(name).lower()}.toml"
        if not path.exists():
            known = ", ".join(sorted(file.stem.upper() for file in folder.glob("*.toml")))
            hint = f"there are: {known}; or give a .toml file"
            raise DfqsError(f"no recipe is called {str(name)!r}", hint=hint)
    try:
        raw = path.read_bytes()
        return Recipe(**tomllib.loads(raw.decode("utf-8")), sha256=hashlib.sha256(raw).hexdigest())
    except OSError as error:
        raise DfqsError(f"cannot be read ({error.strerror})", where=path, hint="check the path") from error
    except (ValueError, TypeError) as error:  # TypeError: the file gives its own sha256
        what = str(error)
        if isinstance(error, pydantic.ValidationError):
            at = ".".join(map(str, (first := error.errors()[0])["loc"]))
            what = f"{at}: {first['msg']}" if at else first["msg"].removeprefix("Value error, ")
        hint = "see data/quantize/ for the format"
        raise DfqsError(f"not a recipe ({what})", where=tilde(path), hint=hint) from error


@dataclass(frozen=True)
class Plan:
    """What a quantization writes."""

    recipe: Recipe
    source: ShardSet = field(repr=False)
    tensors: tuple[Tensor, ...] = field(repr=False)  # as they will be, in the order of the file
    job: dict[str, Any] = field(repr=False, default_factory=dict)  # of the child, without its output

    @property
    def nbytes(self) -> int:
        """Size of the tensors; the file's header, about as long as the source's, comes on top."""
        return sum(tensor.nbytes for tensor in self.tensors)

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
    source: Files,
    recipe: Recipe | str,
    imatrix: ImportanceMatrix | None = None,
    run: Callable[..., dict[str, Any]] = IN_A_CHILD,
) -> Plan:
    """Ask llama.cpp in a dry run what it would make of a model by a recipe. Writes nothing.

    ``source``: of F32, F16 or BF16 weights. ``imatrix``: an importance matrix that lies in a file; a recipe
    with ``weights`` uses it. ``run``: does the child's job, for several calls. A `DfqsError`: recipe or
    matrix do not fit the model, or a type needs a matrix. A `ModelError`: llama.cpp dies on the source.
    """
    recipe, shards = load_recipe(recipe) if isinstance(recipe, str) else recipe, open_shards(source)
    where, header = shards.paths[0], shards.as_one
    _check_source(shards)
    for rule in recipe.idle_rules(header):
        what = f"no tensor matches {rule.pattern.pattern!r} of the recipe {recipe.name}"
        raise DfqsError(what, where=where, hint="correct the pattern, or say optional = true")
    before = {tensor.name: tensor for tensor in shards.tensors}
    types = {name: rule.type if rule else before[name].type for name, rule in recipe.chosen(header).items()}
    codes, mix = {name: BLOCKS[kind][0] for name, kind in types.items()}, file_types()[recipe.mix]
    keys: dict[str, Any] = {"general.file_type": mix, "dfqs.recipe": recipe.name}
    keys |= {"dfqs.recipe_sha256": recipe.sha256, "dfqs.quantizer": f"llama-cpp-python {llama_version()}"}
    job: dict[str, Any] = {"work": "quantize", "mix": mix, "types": codes, "keys": keys}
    job["source"] = str(where.absolute())  # links stay: a shard's name is the link's
    if imatrix is not None and recipe.weights:
        entries = imatrix.fitting(header, recipe.weights)
        job |= {"imatrix": str(Path(imatrix.path).resolve()), "entries": entries}
        about: dict[str, Any] = {"file": Path(imatrix.path).name, "dataset": ", ".join(imatrix.datasets)}
        about |= {"entries_count": len(entries), "chunks_count": imatrix.chunk_count}
        keys |= {f"quantize.imatrix.{name}": value for name, value in about.items()}
    answer = run({**job, "dry_run": True}, where=where)
    if {name for name, _ in answer["tensors"]} != set(before):
        raise DfqsError("llama.cpp's dry run names other tensors than the header", where=where, hint=REPORT)
    tensors = []
    for name, kind in answer["tensors"]:
        code, block, nbytes = BLOCKS[kind]
        nbytes *= before[name].n_elements // block
        tensors.append(replace(before[name], type=kind, type_code=code, nbytes=nbytes))
    return Plan(recipe, shards, tuple(tensors), job)


def _check_source(shards: ShardSet) -> None:
    """Refuse what is quantized already, and what llama.cpp would make an unreadable file of."""
    what, hint = "", "quantize the original F32, F16 or BF16 model: losses add up"
    floats = "F32", "F16", "BF16", *INTEGER_TYPES
    if quantized := [tensor for tensor in shards.tensors if tensor.type not in floats]:
        what = f"{quantized[0].name} is quantized already ({quantized[0].type})"
    elif (alignment := shards.headers[0].alignment) != DEFAULT_ALIGNMENT:  # it pads to 32, and keeps the key
        what = f"its tensors are aligned to {alignment:,} bytes: llama.cpp would write a file that it refuses"
        hint = f"write the source again with an alignment of {DEFAULT_ALIGNMENT}"
    if what:
        raise DfqsError(what, where=shards.paths[0], hint=hint)


def quantize(
    source: Files,
    recipe: Recipe | str,
    output: str | Path,
    *,
    imatrix: ImportanceMatrix | None = None,
    n_threads: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    run: Callable[..., dict[str, Any]] = IN_A_CHILD,
) -> Plan:
    """Quantize a model into one file, which appears whole or not at all; returns what was written.

    See `plan`; shards need no merge first. The result does not depend on ``n_threads`` (0: the usable cores).
    An `OutputError` or a `SpaceError`: the output exists, is the source, or finds no room. An
    `IntegrityError`: what llama.cpp wrote is not what was planned.
    """
    output, shards = Path(output), open_shards(source)
    files.check_output(output, shards.paths, overwrite)
    files.remove_stale(output)
    planned = plan(shards, recipe, imatrix, run)
    needed = planned.nbytes + shards.headers[0].data_offset + HEADER_BYTES
    free = shutil.disk_usage(output.parent).free  # an output that is replaced stays until then
    if free < needed:
        what, hint = f"needs {needed:,} bytes and {free:,} are free", "take another disk"
        raise SpaceError(what, where=output.parent, hint=f"free {needed - free:,} bytes, or {hint}")
    job = planned.job | {"n_threads": n_threads or machine.usable_cores()}
    job["keys"]["dfqs.source_sha256"] = shards.sha256
    n_tensors, name = len(planned.tensors), planned.recipe.name
    bar = display.tqdm(total=n_tensors, desc=name, unit="tensor", disable=not progress)
    with files.whole_path(output) as part, bar:
        job["output"] = str(part)
        run(job, where=shards.paths[0], on_message=lambda message: bar.update(message["tensor"] - bar.n))
        check_layout(header := read_header(part))
        written, wanted = ([(t.name, t.type, t.nbytes) for t in each.tensors] for each in (header, planned))
        if written != wanted:
            raise IntegrityError("llama.cpp wrote other types than in its dry run", where=part, hint=REPORT)
    return planned


# ---- the child process ----


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Quantize, or only plan it; the tensors with their types."""
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
        reason = (re.findall(r"failed to quantize: (.*?)[.!]*\n", log) or ["llama.cpp gives no reason"])[-1]
        hint = f"correct the recipe, or check the source: `dfqs-nb verify {display.quoted(job['source'])}`"
        if re.search("imatrix|importance matrix", reason):
            hint = "add --calibrate with a text, or --imatrix with a file of llama-imatrix"
        raise DfqsError(reason, where=job["source"], hint=hint)
    return {"tensors": [(name, (new or old).upper()) for name, old, new in TENSOR.findall(log)]}


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
            text = value.encode()[:MAX_TEXT_BYTES].decode(errors="ignore")  # no character cut in two
            slot.tag, slot.value.val_str = api.LLAMA_KV_OVERRIDE_TYPE_STR, text.encode()
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
