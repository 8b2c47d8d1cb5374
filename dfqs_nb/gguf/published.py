"""Published sizes of a model whose file is not here, enough to compute its cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfqs_nb.core.paths import data_dir
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.memory import kv_cache_bytes

if TYPE_CHECKING:
    import pandas as pd

ARCHITECTURE = "deepseek4"


class PublishedShape(GGUFHeader):
    """Published sizes as a header without tensors; its ``fields`` are values."""

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]


def published() -> dict[str, Any]:
    """What DeepSeek published, and the specimen's shape: ``data/deepseek_v4_flash.json``."""
    content: dict[str, Any] = json.loads((data_dir() / "deepseek_v4_flash.json").read_text(encoding="utf-8"))
    return content


def published_shape() -> PublishedShape:
    """The published sizes of DeepSeek-V4-Flash.

    >>> published_shape().arch("block_count")
    43
    """
    content = published()
    keys = {f"{ARCHITECTURE}.{key}": value for key, value in content["keys"].items()}
    fields: dict[str, Any] = {"general.architecture": ARCHITECTURE, **keys}
    return PublishedShape(Path(content["name"]), 0, 3, 32, fields, (), 0, 0, b"")


def flash_cache_table(lengths: Sequence[int]) -> pd.DataFrame:
    """The cache of DeepSeek-V4-Flash at f16, in bytes, beside the value on its card (NaN: not stated)."""
    import pandas as pd

    shape = published_shape()
    card = {int(n): 1e9 * gigabytes for n, gigabytes in published()["card"]["kv_cache_gigabytes"].items()}
    columns = ["n_ctx", "swa_window", "swa_full", "card"]
    rows = [
        (
            n,
            *(kv_cache_bytes(shape, n, swa_full=full).total for full in (False, True)),
            card.get(n, float("nan")),
        )
        for n in lengths
    ]
    return pd.DataFrame(rows, columns=columns)
