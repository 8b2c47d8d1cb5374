"""Which settings a run takes: the nano tier for the reference model, the standard tier for any other.

The values are data: ``data/tiers.toml``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dfqs_nb.core.display import quoted
from dfqs_nb.core.errors import DfqsError, StageError
from dfqs_nb.core.paths import data_dir, outputs_dir
from dfqs_nb.core.stage import read_stage
from dfqs_nb.gguf import models as registry
from dfqs_nb.gguf.facts import layer_of, types_by_bytes
from dfqs_nb.gguf.shards import open_shards

NANO, STANDARD = "nano", "standard"
BUDGET_MINUTES = 60.0
UNQUANTIZED = {"F16", "BF16", "F32", "I32"}


def tier_of(model: str | None, run: str = "") -> str:
    """The tier of a model: ``nano`` for a registered reference model, else ``standard``.

    Without a model: that of the one that notebook 01 of ``run`` prepared, else of the default.
    """
    with suppress(StageError, KeyError):
        model = model or str(read_stage(outputs_dir() / run, "merge")["conditions"]["model"])
    if not model:
        return NANO
    known = registry.registered().get(model)
    is_local = known is not None and not known.source.startswith("hf://")
    reference = (data_dir() / "reference").absolute()
    return NANO if is_local or Path(model).absolute().is_relative_to(reference) else STANDARD


def settings_of(tier: str) -> dict[str, Any]:
    """The parameters that a tier sets; none for ``nano``, whose values are the notebooks' defaults."""
    if tier not in (NANO, STANDARD):
        raise DfqsError(f"there is no tier {tier!r}", hint="use --tier nano or --tier standard")
    return dict(_table().get(tier, {}))


def ladder_source(folder: Path) -> str:
    """The weights for the ladder: the model of the run in this folder; `DfqsError` if it is quantized."""
    path = Path(read_stage(folder, "merge")["model"]["path"])
    tensors = open_shards(path).tensors
    if {tensor.type for tensor in tensors} <= UNQUANTIZED:
        return str(path)
    # a small model's embedding can outweigh its layers
    layers = [tensor for tensor in tensors if layer_of(tensor.name) is not None]
    kind = next(iter(types_by_bytes(layers or tensors)))
    what = f"{path.name} is quantized already (mostly {kind}), and a ladder starts from F16 weights"
    command = f"dfqs-nb run 08 --run {quoted(folder.name)} -p ladder_source=FILE"
    hint = f"to climb one, put the same model at F16 for FILE: `{command}`"
    raise DfqsError(what, hint=hint)


def budget_of(notebook: str, left_minutes: float, to_come: Iterable[str]) -> float:
    """Minutes for one notebook: its share of what is left, among those that still come (itself included)."""
    total = sum(map(share_of, to_come))
    return max(0.5, left_minutes * share_of(notebook) / total) if total else left_minutes


def share_of(notebook: str) -> float:
    """A notebook's share of the budget of a run of all notebooks; 0 for one without a budget."""
    shares: Mapping[str, float] = _table()["budget_shares"]
    return shares.get(notebook, 0) / sum(shares.values())


def _table() -> dict[str, Any]:
    return tomllib.loads((data_dir() / "tiers.toml").read_text(encoding="utf-8"))
