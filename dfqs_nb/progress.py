"""One progress bar for the package: a widget in JupyterLab, text in a terminal, none when disabled.

>>> list(tqdm([1, 2], disable=True))
[1, 2]
"""

import os

if os.environ.get("TQDM_DISABLE"):
    from tqdm import tqdm  # honours TQDM_DISABLE, which the widget of tqdm.auto does not
else:
    from tqdm.auto import tqdm

__all__ = ["tqdm"]
