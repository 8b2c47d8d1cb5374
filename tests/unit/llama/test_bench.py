"""The speed sweep: its columns against llama-bench's own, its advice, and what it leaves out."""

from __future__ import annotations

import csv
import io
import math
import subprocess

import llama_cpp_tools
import pandas as pd
import pytest

from dfqs_nb.core.errors import HeaderError, ModelError
from dfqs_nb.core.paths import data_dir
from dfqs_nb.llama import bench
from dfqs_nb.llama.bench import advice, grid
from dfqs_nb.llama.settings import OpenSettings

MODEL = data_dir() / "reference" / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf"
BASE = OpenSettings(n_threads=1)


def test_every_setting_is_timed_in_every_round_and_a_refused_one_is_left_out():
    # f16 keys beside q8_0 values need flash attention, so llama.cpp refuses the second setting
    cases = grid(BASE, {"cache_type": ["f16", "q4_0"]}, 16, 4, [0, 32])
    timed, refused = bench.run(MODEL, cases, rounds=2)
    table = bench.table(timed)
    assert [case.name for case in cases[:4]] == ["pp16", "tg4", "pp16 @ d32", "tg4 @ d32"]
    assert len(refused) == 2 and "flash_attn" in refused[0], "at each depth"
    assert len(table) == 4 and (table["type_k"] == "f16").all() and len(timed) == 8
    seconds = timed.groupby("case")["seconds"].apply(list)
    assert table["avg_ts"].to_numpy() == pytest.approx(
        [sum(n / s for s in seconds[at]) / 2 for at, n in enumerate([16, 4, 16, 4])]
    )


def of(*seconds: list[float]) -> list[str]:
    """The advice after these seconds of settings with 1, 2, ... threads, a number a round."""
    parameters = dict.fromkeys(bench.PARAMETERS, 1)
    rows = [
        parameters | {"case": at, "name": "tg8", "round": turn, "seconds": taken, "n_threads": at + 1}
        for at, each in enumerate(seconds)
        for turn, taken in enumerate(each)
    ]
    return advice(pd.DataFrame(rows))


def test_advice_names_the_fastest_only_where_every_round_agrees():
    assert of([2.0, 2.2], [1.0, 1.0]) == [
        "tg8: n_threads=2 is 2.10 x as fast as the first (2.00 to 2.20 in 2 rounds)"
    ]
    assert of([1.0, 2.0], [1.1, 0.5]) == ["tg8: no setting is faster than the first in every round"]
    assert of([1.0, 1.0], [2.0, 2.0]) == ["tg8: no setting is faster than the first in every round"]


def test_energy_is_read_where_the_system_shows_it_and_a_counter_may_begin_anew(tmp_path, monkeypatch):
    package = tmp_path / "intel-rapl:0"
    package.mkdir()
    (package / "max_energy_range_uj").write_text("9999999\n")
    counter = package / "energy_uj"
    monkeypatch.setattr(bench, "RAPL", tmp_path)
    kept = []
    for before, after in ((1_000_000, 3_000_000), (9_000_000, 1_000_000)):
        counter.write_text(f"{before}\n")
        counters = bench._counters()
        counter.write_text(f"{after}\n")
        kept.append(bench._joules_since(counters))
    assert kept == [2.0, 2.0]
    monkeypatch.setattr(bench, "RAPL", tmp_path / "none")
    assert math.isnan(bench._joules_since(bench._counters()))


def test_a_file_that_nothing_opens_is_its_own_error(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF no")
    with pytest.raises(HeaderError):
        bench.run(tmp_path / "model.gguf", grid(BASE, {}, 4, 0, [0]), rounds=1)


@pytest.mark.slow
def test_columns_are_those_of_llama_bench():
    tool = llama_cpp_tools.tool("llama-bench")
    command = [
        str(tool),
        "-m",
        str(MODEL),
        "-p",
        "8",
        "-n",
        "0",
        "-r",
        "1",
        "-t",
        "1",
        "--repack",
        "0",
        "-o",
        "csv",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    theirs = next(csv.DictReader(io.StringIO(done.stdout[done.stdout.index("build_commit") :])))
    row = bench.table(bench.run(MODEL, grid(BASE, {}, 8, 0, [0]), rounds=1)[0]).iloc[0]
    assert set(row.index) - set(theirs) == {"joules_per_token"}
    assert int(theirs["model_n_params"]) == row["model_n_params"]
    assert (theirs["n_prompt"], theirs["n_batch"] != "") == (str(row["n_prompt"]), True)


@pytest.mark.parametrize(("n_prompt", "n_gen", "depths"), [(64, 0, [-60, 0]), (0, 0, [0])])
def test_nothing_to_time_is_refused(n_prompt, n_gen, depths):
    with pytest.raises(ModelError, match="nothing to time"):
        grid(BASE, {}, n_prompt, n_gen, depths)


def test_the_fastest_is_sought_among_those_that_won_every_round():
    (line,) = of([10.0, 10.0, 10.0], [8.0, 8.0, 8.0], [7.0, 7.0, 11.0])
    assert line.startswith("tg8: n_threads=2 is 1.25 x")
