"""Tables as people read them: thousands separated, text to the left, numbers to the right."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from IPython.display import HTML


def shown(table: pd.DataFrame, name: str, *, precision: int = 2, percent: tuple[str, ...] = ()) -> HTML:
    """The frame, dressed for display in a notebook; its values stay as they are.

    JupyterLab aligns every cell to the right, and drops style sheets from outputs that it has not run itself,
    so the alignment of text stands in each cell.

    Args:
        name: of the table in the page, unique in the notebook and the same in every run.
        precision: digits after the point of floats.
        percent: columns of shares, shown in per cent.
    """
    from IPython.display import HTML

    styler = table.style.format(thousands=",", precision=precision)
    if percent:
        styler = styler.format("{:.1%}", subset=list(percent))
    html = re.sub(r"<style.*?</style>\s*", "", styler.set_uuid(name).to_html(), flags=re.DOTALL)
    text = [str(i) for i, column in enumerate(table.columns) if table[column].dtype.kind not in "iufb"]
    heads = (
        r"(?:row_heading level\d+ row\d+|index_name level\d+|col_heading level0 col(?:{0})"
        r"|data row\d+ col(?:{0}))"
    )
    aligned = heads.format("|".join(text) or "none")
    return HTML(re.sub(rf'(class="{aligned}")', r'\1 style="text-align: left"', html))
