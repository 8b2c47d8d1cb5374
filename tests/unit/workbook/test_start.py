"""What notebook 00 shows, and how columns are named for people."""

import pandas as pd

from dfqs_nb.core.display import shown
from dfqs_nb.core.paths import REPOSITORY
from dfqs_nb.workbook import find_notebooks, overview, parameter_table
from dfqs_nb.workbook.run import declared_parameters


def test_the_overview_has_every_notebook_and_invents_no_figure():
    table = overview()
    assert list(table.index) == [path.stem[:2] for path in find_notebooks()][1:]
    figures = table.drop(columns="answers").stack()
    assert figures.str.fullmatch(
        r"not measured|[\d.]+ min(, [\d.]+ GB|, [a-z0-9]([\w.,/ ]+))?|needs F16 weights"
    ).all()


def test_the_parameters_are_those_of_the_notebooks_with_the_values_of_both_tiers():
    table = parameter_table()
    assert table.loc["n_ctx", ["reference model", "other models"]].tolist() == ["1024", "4096"]
    assert "03" in table.loc["n_ctx", "notebooks"] and set(table.loc["run_name", "notebooks"].split()) >= {
        "00",
        "09",
    }


def test_a_parameter_of_several_notebooks_has_one_type_and_one_default():
    seen: dict[str, set[tuple[str, str]]] = {}
    for path in find_notebooks():
        for name, it in declared_parameters(path).items():
            seen.setdefault(name, set()).add((it["inferred_type_name"], it["default"]))
    assert not {name: values for name, values in seen.items() if len(values) > 1}


def test_a_run_of_another_model_has_a_model_and_a_name_of_its_own():
    others = parameter_table()["other models"]
    assert (others["model"], others["run_name"]) == ("your file", "from the file's name")


def test_a_table_has_names_with_units_and_stays_as_it_is():
    table = pd.DataFrame(
        {"kld": [0.5], "n_missing": [3], "<b>": ["<i>"]}, index=pd.Index(["a"], name="n_ctx")
    )
    page = shown(table)._repr_html_()
    assert "KL divergence (nats)" in page and ">missing<" in page and "context (tokens)" in page
    assert "<b>" not in page and "<i>" not in page and "overflow-x" in page
    assert list(table.columns) == ["kld", "n_missing", "<b>"] and table.index.name == "n_ctx"


def test_every_drawing_is_attached_to_a_notebook_and_has_a_title():
    prose = "".join(path.read_text() for path in find_notebooks())
    for path in (REPOSITORY / "notebooks" / "diagrams").glob("*.svg"):
        assert (
            f"(attachment:{path.stem}.png)" in prose
            and path.with_suffix(".png").exists()
            and "<title>" in path.read_text()
        ), path.stem
