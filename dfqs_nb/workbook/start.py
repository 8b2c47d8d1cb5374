"""What notebook 00 shows: what each notebook answers and takes, and every parameter."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dfqs_nb.core.paths import data_dir
from dfqs_nb.workbook import tiers
from dfqs_nb.workbook.run import declared_parameters, find_notebooks

if TYPE_CHECKING:
    import pandas as pd

SIZES = {"reference": "reference model (6 MB)", "seven_b": "7 B at Q4_K_M (5 GB)", "flash": "61 GB"}


def overview() -> pd.DataFrame:
    """One row a notebook: what it answers, and its minutes and memory for models of three sizes.

    Figures without a mark were measured. ``~`` marks an estimate, "budget" a share of a run's default hour.
    """
    import pandas as pd

    content = tomllib.loads((data_dir() / "notebooks.toml").read_text(encoding="utf-8"))
    rows = {
        name[:2]: {"answers": row["answers"]}
        | {SIZES[size]: _cost(name, size, row, content) for size in SIZES}
        for name, row in content["notebooks"].items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("notebook")


def _cost(name: str, size: str, row: Mapping[str, Any], content: Mapping[str, Any]) -> str:
    if size in row:
        minutes, gigabytes = row[size]
        return f"{minutes:.2g} min, {gigabytes:.2g} GB"
    if size == "reference" or not tiers.share_of(name):
        return "not measured"
    minutes, budget = "minutes not measured", tiers.BUDGET_MINUTES * tiers.share_of(name)
    if "budget_minutes" in declared_parameters(find_notebooks([name])[0]):
        minutes = f"budget {budget:.0f} min"
    return f"{minutes}, ~{content['estimate'][size]:.0f} GB"


def parameters() -> pd.DataFrame:
    """One row a parameter, from the notebooks: where it counts, its value in both tiers, what it is."""
    import pandas as pd

    rows: dict[str, dict[str, str]] = {}
    standard = tiers.settings_of(tiers.STANDARD)
    for path in find_notebooks():
        for name, facts in declared_parameters(path).items():
            row = rows.setdefault(name, {"notebooks": "", "reference model": facts["default"].strip('"')})
            row["notebooks"] = f"{row['notebooks']} {path.stem[:2]}".strip()
            row["other models"] = str(standard.get(name, row["reference model"]))
            row.setdefault("what it is", facts["help"])
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("parameter")
