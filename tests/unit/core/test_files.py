"""What the core does with files that others wrote, and with text that others chose."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest

from dfqs_nb.core import files
from dfqs_nb.core.display import markdown
from dfqs_nb.core.errors import StageError
from dfqs_nb.core.files import read_json, remove_stale, whole_path, write_table, write_text
from dfqs_nb.core.stage import Stage, read_stage


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": NaN}', '{"a": 1e999}', '{"a": ' + "9" * 400 + "}", "", "{", "\x00", "\xff"]
)
def test_json_of_others_gives_a_value_error_and_nothing_else(text, tmp_path):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError):
        read_json(tmp_path / "x.json")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_is_refused_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(ValueError, match="not a regular file"):
        read_json(tmp_path / "x.json")


def test_cells_of_a_csv_are_no_formulas_and_numbers_stay(tmp_path):
    table = pd.DataFrame({"a": ["=1+1", "-12", "@x", "plain", None], "n": [-1.5, 2, 3, 4, 5]})
    again = pd.read_csv(write_table(tmp_path / "t.csv", table, index=False))
    assert again["a"].tolist()[:4] == ["'=1+1", "-12", "'@x", "plain"] and pd.isna(again["a"][4])
    assert again["n"].tolist() == [-1.5, 2, 3, 4, 5] and table["a"][0] == "=1+1"


def test_a_carriage_return_in_an_answer_ends_no_line_of_a_csv(tmp_path):
    table = pd.DataFrame({"answer": ["12\r34", "a\r\nb"], "n": [1, 2]})
    again = pd.read_csv(write_table(tmp_path / "t.csv", table, index=False))
    assert again["answer"].tolist() == ["12\n34", "a\nb"] and again["n"].tolist() == [1, 2]


def test_headings_and_the_index_of_a_csv_are_no_formulas_and_nothing_steers_a_terminal(tmp_path):
    frame = pd.DataFrame({"=1+1": ["\x1b[31mred\x07", "a\nb"]}, index=["@SUM(1)", "-1+1"])
    text = write_table(tmp_path / "t.csv", frame).read_text()
    assert text == ",'=1+1\n'@SUM(1),\ufffd[31mred\ufffd\n'-1+1,\"a\nb\"\n"
    frame.index = pd.MultiIndex.from_tuples([("=a", 1), ("b", 2)], names=["n", "m"])
    rows = pd.read_csv(write_table(tmp_path / "t.csv", frame))
    assert rows.columns[-1] == "'=1+1" and rows.iloc[0, 0] == "'=a" and rows.iloc[:, 1].tolist() == [1, 2]


def names_like(name):
    """What else may lie beside a file of this name: a merge's working files, and those of other names."""
    cut = os.fsdecode(os.fsencode(name)[:80])
    yield from (f".{name}.part", f".{name}.journal", f".{name}.tmp", f".{cut}.part", f".{cut}.journal")
    yield from (f".{cut}.0123456789abcdef.tmp", f".{cut}.01234567.part", f"{name}.manifest.json")
    yield from (f".{name[:-1]}.part", f".{name}x.0123456789abcdef.tmp")


@pytest.mark.parametrize("letter", ["M", "ä", "[", "*", "?"])
@pytest.mark.parametrize("size", [5, *range(70, 96), 241])
def test_only_what_a_kill_left_of_this_very_path_is_removed(letter, size, tmp_path):
    for place in range(1, size) if letter == "M" and size < 99 else [size // 2]:
        stem = (letter * place)[: place // len(letter.encode())]
        name = f"{stem}.{letter * ((size - place) // len(letter.encode()))}"
        folder = tmp_path / str(place)
        folder.mkdir()
        others = {other for other in names_like(name) if len(os.fsencode(other)) < 255}
        for other in others:
            (folder / other).write_text("precious")
        with closing(whole_path(folder / name).gen) as killed:
            stale = next(killed)
            stale.write_text("torn")
            remove_stale(folder / name)
            assert stale.exists(), "a living process is at work on it"
        stale.write_text("torn")  # as a kill leaves it: nobody holds it
        remove_stale(folder / name)
        assert {path.name for path in folder.iterdir()} == others
        assert write_text(folder / name, "whole").read_text() == "whole"


def test_a_temporary_file_that_was_taken_for_a_stale_one_is_made_again(tmp_path, monkeypatch):
    real, taken = files.lock, []

    def lock(file, *how):
        if not taken:
            taken.append(file.name)
            Path(file.name).unlink()
        return real(file, *how)

    monkeypatch.setattr(files, "lock", lock)
    assert write_text(tmp_path / "x", "whole").read_text() == "whole"
    assert taken and [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    "text", ["# H", "a\n\n# H", "![x](y)", "[a](javascript:b)", "<script>", "http://x", "www.x.y"]
)
def test_text_of_others_makes_no_heading_image_link_or_html(text):
    import nbconvert.filters.markdown_mistune as mistune

    page = mistune.markdown2html_mistune(markdown(text))
    assert not [tag for tag in ("<h1", "<img", "<a ", "<script") if tag in page], page


def test_a_sealed_stage_is_refused_when_it_or_a_file_of_it_was_edited(tmp_path):
    stage = Stage(tmp_path, "scores")
    stage.table("items", pd.DataFrame({"a": [1]}))
    path = stage.finish(conditions={}, summary=[])
    assert read_stage(tmp_path, "scores", sealed=True)["files"].keys() == {"items.csv"}
    (tmp_path / "items.csv").write_text("a\n2\n")
    with pytest.raises(StageError, match="items.csv: is missing, or was changed after scores.json"):
        read_stage(tmp_path, "scores", sealed=True)
    path.write_text(json.dumps({**json.loads(path.read_text()), "value": 1}))
    with pytest.raises(StageError, match="was edited after it was written; run 06_score"):
        read_stage(tmp_path, "scores", sealed=True)
    assert read_stage(tmp_path, "scores")["value"] == 1
