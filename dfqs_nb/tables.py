"""Tables as people read them: thousands separated, text to the left, numbers to the right."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from pandas.io.formats.style import Styler


def shown(table: pd.DataFrame, name: str, *, precision: int = 2, percent: tuple[str, ...] = ()) -> Styler:
    """The frame, dressed for display in a notebook; its values stay as they are.

    Args:
        name: of the table in the page, unique in the notebook and the same in every run.
        precision: digits after the point of floats.
        percent: columns of shares, shown in per cent.
    """
    text = [i for i, column in enumerate(table.columns) if table[column].dtype.kind not in "iufb"]
    aligned = "text-align: left !important"  # JupyterLab aligns every cell to the right
    left = [{"selector": f".col{i}", "props": aligned} for i in text]
    left += [{"selector": "th.row_heading", "props": aligned}]
    styler = table.style.format(thousands=",", precision=precision)
    if percent:
        styler = styler.format("{:.1%}", subset=list(percent))
    return styler.set_table_styles(left).set_uuid(name)
