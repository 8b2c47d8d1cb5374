"""Recipes (``data/quantize/*.toml``): which tensor gets which type.

A recipe names one of llama.cpp's file types, whose mix chooses each tensor's type, and rules that overrule
the mix for tensors by name.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.paths import data_dir, tilde
from dfqs_nb.gguf.facts import layer_of
from dfqs_nb.gguf.types import TENSOR_TYPES

FLOATS = ("F32", "F16", "BF16")
INTEGERS = ("I8", "I16", "I32", "I64")
NOT_WRITTEN = ("Q8_1", "Q8_K", "F64", *INTEGERS)  # types of activations and tables: no weight is stored so


class QuantizeError(DfqsError):
    """A recipe does not fit a model, or llama.cpp refuses it."""


def _a_pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is no regular expression ({error})") from error
    return text


def _a_type(name: str) -> str:
    known = [kind for kind, *_ in TENSOR_TYPES.values() if kind not in NOT_WRITTEN]
    if name not in known:
        raise ValueError(f"unknown type {name!r}; there are: {', '.join(known)}")
    return name


def _a_file_type(name: str) -> str:
    if name and name not in file_types():
        raise ValueError(f"unknown file type {name!r}; there are: {', '.join(file_types())}")
    return name


def _a_mix(name: str) -> str:
    if name in FLOATS:
        raise ValueError(
            f"{name} as a mix leaves no tensor to the rules: take Q8_0, and a rule of pattern '.' and {name}"
        )
    return _a_file_type(name)


Pattern = Annotated[str, AfterValidator(_a_pattern)]
STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Rule:
    """Tensors whose name contains a match of ``pattern`` get ``type``.

    Attributes:
        layers: only those of the first layers: this share of all, rounded down, but one layer at least; 1:
            all.
        optional: whether the rule may match no tensor.
    """

    __pydantic_config__ = STRICT

    pattern: Pattern
    type: Annotated[str, AfterValidator(_a_type)]
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
        mix: llama.cpp's file type: its mix chooses for tensors that no rule names.
        keep: patterns of tensors that stay as they are in the source.
        rules: the first that matches counts.
        weights: pattern of the importance matrix's entries that are used; empty: none.
        file_type: what the header says; the mix where not given.
        sha256: of the recipe's file.
    """

    __pydantic_config__ = STRICT

    name: str
    mix: Annotated[str, AfterValidator(_a_mix)]
    note: str = ""
    keep: tuple[Pattern, ...] = ()
    rules: tuple[Rule, ...] = ()
    weights: Pattern = ""
    file_type: Annotated[str, AfterValidator(_a_file_type)] = ""
    sha256: str = ""


def find_recipes() -> dict[str, Path]:
    """The shipped recipe files by the name that stands in each."""
    return {load_recipe(path).name: path for path in sorted((data_dir() / "quantize").glob("*.toml"))}


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
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise QuantizeError(what, where=path, hint="check the path") from error
    except ValueError as error:
        raise _wrong(str(error), tilde(path)) from error
    return check_recipe(content | {"sha256": hashlib.sha256(raw).hexdigest()}, tilde(path))


def check_recipe(recipe: Recipe | dict[str, Any], where: str = "") -> Recipe:
    """The recipe, checked.

    Raises:
        QuantizeError: a field is missing or unknown, a type is unknown, or a pattern is no regular
            expression.
    """
    content = dataclasses.asdict(recipe) if isinstance(recipe, Recipe) else recipe
    try:
        checked: Recipe = _adapter().validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        what = str(first["msg"]).removeprefix("Value error, ")
        raise _wrong(f"{place}: {what}", where) from error
    return checked


@functools.cache
def _adapter() -> TypeAdapter[Recipe]:
    return TypeAdapter(Recipe)


def _wrong(what: str, where: str) -> QuantizeError:
    return QuantizeError(
        f"not a recipe ({what})", where=where or None, hint="see data/quantize/ for the format"
    )


def file_types() -> dict[str, int]:
    """llama.cpp's file types by name, as this build numbers them."""
    import llama_cpp.llama_cpp as api

    types = {
        name.removeprefix("LLAMA_FTYPE_").removeprefix("MOSTLY_").removeprefix("ALL_"): value
        for name, value in vars(api).items()
        if name.startswith("LLAMA_FTYPE_")
    }
    return {name: value for name, value in types.items() if name != "GUESSED"}
