"""Numbers of DeepSeek-V4-Flash-IQ1_S-XL that statements in the report are held against."""

from __future__ import annotations

from typing import NamedTuple

from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.memory import published


class Bytes(NamedTuple):
    """Bytes of weights that a token reads, ``total`` in all; and those of all routed experts, and of all weights."""

    dense: int
    routed: int
    routed_total: int
    weights: int

    @property
    def total(self) -> int:
        return self.dense + self.routed


# DeepSeek-V4-Flash-IQ1_S-XL. Experts: from the shapes and types of its configuration. The rest: what the
# published file's 61,540,805,344 bytes leave, less the embedding (129,280 x 4096 at Q8_0), of which a token
# reads a row. With everything but experts at Q8_0 or F32, shapes alone would say 8.7 GB a token, not 7.6.
FLASH = Bytes(6_301_231_840, 1_281_490_944, routed_total=54_676_946_944, weights=61_540_805_344)


def card_compute(header: GGUFHeader, n_ctx: int, experts: str = "all") -> int | None:
    """Bytes of the compute buffer that llama.cpp makes on one card for a model of the published shape.

    As it was planned on a card (``card_compute`` in the data), at the next longer context that was planned.
    ``experts``: ``all`` on the card, or ``experts_in_memory`` of some layers. None where nobody planned it.
    """
    known = published()
    keys = {name: value if isinstance(value, list) else [value] for name, value in known["keys"].items()}
    if header.architecture != "deepseek4":
        return None
    if any(header.counts(name)[: len(values)] != values for name, values in keys.items()):
        return None
    planned, routed = known["card_compute"], (t.nbytes for t in header.tensors if "_exps." in t.name)
    if max(routed, default=0) > planned["largest_expert_tensor"]:
        return None
    return next((nbytes for n, nbytes in planned[experts].items() if int(n) >= n_ctx), None)
