"""Signs of life while something large is loaded."""

from __future__ import annotations

import time

from dfqs_nb.core import progress


def test_a_large_file_gets_a_bar_that_moves_and_a_small_one_none(monkeypatch, capsys):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(progress, "BEAT_SECONDS", 0.05)
    with progress.heartbeat("loading m.gguf", 1000):
        time.sleep(0.2)
    assert not capsys.readouterr().err
    with progress.heartbeat("loading m.gguf", progress.LARGE_BYTES):
        time.sleep(0.5)
    shown = capsys.readouterr().err
    assert "loading m.gguf" in shown and "cores" in shown


def test_activity_counts_this_process_where_it_is_asked_to():
    own = progress.Activity(own=True)
    own.text()
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    assert "in memory" in own.text() and not own.text().startswith("0 B in memory")
