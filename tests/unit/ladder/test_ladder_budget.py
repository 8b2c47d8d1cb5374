"""A climb within a budget: questions and texts go before rungs, and the most telling rungs stay."""

from __future__ import annotations

import math

from dfqs_nb.core.paths import data_dir
from dfqs_nb.ladder import RUNGS, Settings
from dfqs_nb.ladder.budget import within_budget

SOURCE = data_dir() / "reference" / "DFQS-Nano-F16.gguf"


def test_a_climb_is_cut_in_the_stated_order():
    settings = Settings(n_threads=1)
    whole, rungs, fitted = within_budget(settings, SOURCE, RUNGS, math.inf)
    assert whole == settings and rungs == list(RUNGS) and fitted.left_out == ()
    least, rungs, fitted = within_budget(settings, SOURCE, RUNGS, 0)
    assert rungs == ["F16", "Q4_K_M", "IQ1_S-XL"]
    assert (least.max_items, least.n_haystacks, least.longest, least.n_chunks) == (1, 1, 256, 4)
    assert "3 rungs, not 8" in fitted.left_out
