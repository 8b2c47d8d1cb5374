"""Recipes (``data/quantize/*.toml``): a mix of llama.cpp, and rules that override it for named tensors."""

from __future__ import annotations

import hashlib
import re
import tomllib
from pathlib import Path

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.paths import data_dir, tilde
from dfqs_nb.gguf.facts import INTEGER_TYPES, layer_of
from dfqs_nb.gguf.header import TENSOR_TYPES, GGUFHeader

NO_WEIGHTS = ("Q8_1", "Q8_K", "F64", *INTEGER_TYPES)  # types of activations and tables
WRITTEN = [name for name, *_ in TENSOR_TYPES.values() if name not in NO_WEIGHTS]
STRICT = ConfigDict(extra="forbid")


class QuantizeError(DfqsError):
    """A recipe does not fit a model, or llama.cpp refuses it."""


def file_types() -> dict[str, int]:
    """llama.cpp's file types by name, as this build numbers them."""
    import llama_cpp.llama_cpp as api

    prefix = re.compile(r"LLAMA_FTYPE_(MOSTLY_|ALL_)?(?!GUESSED)")
    return {prefix.sub("", name): value for name, value in vars(api).items() if prefix.match(name)}


@dataclass(frozen=True, config=STRICT)
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


@dataclass(frozen=True, config=STRICT)
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
    """A recipe by its name, in any case, or by the path of its file; a `QuantizeError` if it is none."""
    path, folder = Path(name), data_dir() / "quantize"
    if path.suffix != ".toml":
        path = folder / f"{str(name).lower()}.toml"
        if not path.exists():
            known = ", ".join(sorted(file.stem.upper() for file in folder.glob("*.toml")))
            hint = f"there are: {known}; or give a .toml file"
            raise QuantizeError(f"no recipe is called {str(name)!r}", hint=hint)
    try:
        raw = path.read_bytes()
        return Recipe(**tomllib.loads(raw.decode("utf-8")), sha256=hashlib.sha256(raw).hexdigest())
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
        raise QuantizeError(what, where=path, hint="check the path") from error
    except (ValueError, TypeError) as error:  # TypeError: the file gives its own sha256
        what = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}"
        hint = "see data/quantize/ for the format"
        raise QuantizeError(f"not a recipe ({what})", where=tilde(path), hint=hint) from error
