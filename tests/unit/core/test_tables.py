"""Tables for people: what stands to the left, and that it does so where style sheets are dropped."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from dfqs_nb.core import figures
from dfqs_nb.core.display import TEXT_WIDTH, facts, say, shown

TABLE = pd.DataFrame(
    {"name": ["one", "two"], "bytes": [1234567, 5], "share": [0.5, 0.25]},
    index=pd.Index(["a", "b"], name="row"),
)


def cells(html: str) -> dict[str, str]:
    """Attributes of each body cell, by its text."""
    rows = [line.strip() for line in html.splitlines() if line.strip().startswith(("<td", "<th"))]
    return {line.split(">")[1].split("<")[0]: line.split(">")[0] for line in rows}


def test_text_stands_left_and_numbers_do_not():
    by_text = cells(shown(TABLE)._repr_html_())
    left = {text for text, attributes in by_text.items() if 'style="text-align: left"' in attributes}
    assert left == {"row", "name", "one", "two", "a", "b"}


def test_no_style_sheet_is_needed_and_equal_tables_give_the_same_page():
    first, again = (shown(TABLE)._repr_html_() for _ in range(2))
    assert first == again and "<style" not in first and "id=" not in first


def test_numbers_are_readable():
    by_text = cells(shown(TABLE, percent=("share",))._repr_html_())
    assert {"1,234,567", "50.0 %", "25.0 %"} <= set(by_text)


def test_a_table_of_numbers_alone():
    assert "1,234,567" in shown(TABLE[["bytes"]])._repr_html_()


def test_a_dollar_in_a_figure_is_no_formula_and_powers_of_ten_are(tmp_path):
    ax = figures.new_axes()
    ax.plot([1, 1000], [1, 2], label=r"$\notacommand$")
    ax.set_xscale("log")
    ax.legend()
    figures.set_title(ax, r"costs $5, $\frac{1")
    figures.save(ax, tmp_path / "figure.png")
    ticks = {label for label in ax.get_xticklabels() if "mathdefault" in label.get_text()}
    assert ticks and all(label.get_parse_math() for label in ticks)
    assert not ax.get_legend().get_texts()[0].get_parse_math()


def test_the_name_of_the_rows_stands_in_the_row_of_headings():
    page = shown(TABLE)._repr_html_()
    several = TABLE.set_index("name", append=True)
    assert re.findall(r"<th[^>]*>([^<]+)</th>", shown(several)._repr_html_())[:3] == ["row", "name", "bytes"]
    assert page.count("<tr>") == 3 and page.index(">row<") < page.index(">name<") and ">a<" in page


def test_long_lines_break_between_words(capsys):
    say("- " + "word " * 40, "short")
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "short" and lines[1].startswith("  word") and max(map(len, lines)) <= TEXT_WIDTH


def test_names_with_hyphens_and_numbers_with_their_unit_stay_whole(capsys):
    for n in range(50):
        say("x " * n + "nano-reasoning-hard n = 32 95 %")
        lines = capsys.readouterr().out.splitlines()
        for whole in ("nano-reasoning-hard", "n = 32", "95 %"):
            assert any(whole in line for line in lines), n


def test_a_truth_value_is_yes_or_no_and_a_text_stays_what_it_is():
    values = {"sure": [True, False], "perhaps": [None, True], "text": ["True", "1"], "n": [1, 0]}
    page = shown(pd.DataFrame(values, index=["a", "b"]))._repr_html_()
    assert re.findall(r"<td[^>]*>([^<]+)</td>", page) == ["yes", "–", "True", "1", "no", "yes", "1", "0"]
    table = facts({"offloaded_layers": 0, "repacked": False})
    assert repr(table) == " | value\noffloaded layers | 0\nrepacked | no"


def test_a_pivoted_table_keeps_its_headings():
    pivoted = pd.DataFrame({"rung": ["a", "a"], "layer": ["x", "y"], "share": [1.0, 2.0]})
    page = shown(pivoted.pivot(index="rung", columns="layer", values="share"))._repr_html_()
    assert re.findall(r"<th[^>]*>([^<]+)</th>", page) == ["rung", "x", "y", "a"]
    by_number = pd.DataFrame({"right": [1]}, index=pd.Index([0.5], name="temperature"))
    assert ">0.5<" in shown(by_number)._repr_html_()


def test_facts_show_a_long_text_whole_and_cut_a_very_long_one():
    table = facts({"template": "x" * 200, "name": "y" * 100_000})
    for form in (repr(table), table._repr_html_()):
        assert "x" * 200 in form and "y" * 199 + "…" in form and "y" * 200 not in form


def test_a_table_has_a_form_without_html_and_no_cell_steers_a_terminal_or_a_page():
    hostile = pd.DataFrame({"<b>": ["<i>\x1b[2J\n&", None], "n": [1234, 5]}, index=["a", "b"])
    table = shown(hostile)
    assert repr(table).splitlines() == [" | <b> | n", "a | <i>�[2J & | 1,234", "b | – | 5"]
    assert "&lt;i&gt;�[2J\n&amp;</td>" in table._repr_html_() and "<b>" not in table._repr_html_()


def test_numbers_of_every_kind_look_alike():
    mixed = pd.Series([np.int64(1234), 0.25], dtype=object)
    values = {"float": [1234.5, None], "Int64": pd.array([1234, None], "Int64"), "object": mixed}
    page = shown(pd.DataFrame(values), precision=1)._repr_html_()
    assert re.findall(r"<td[^>]*>([^<]+)</td>", page) == ["1,234.5", "1,234", "1,234", "–", "–", "0.2"]
