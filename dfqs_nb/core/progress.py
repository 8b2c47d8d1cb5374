"""One progress bar for the package: a widget in JupyterLab, text in a terminal, none when disabled.

>>> list(tqdm([1, 2], disable=True))
[1, 2]
"""

import os
from typing import Any

if os.environ.get("TQDM_DISABLE"):
    import tqdm.std

    class tqdm(tqdm.std.tqdm):
        """No bar, whatever the caller asks: the variable alone loses against ``disable=False``."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})

else:
    from tqdm.auto import tqdm

__all__ = ["tqdm"]
