"""Words, sizes and names as people read them."""

from __future__ import annotations

import pandas as pd
import pytest

from dfqs_nb.core import display
from dfqs_nb.core.display import counted
from dfqs_nb.core.errors import HeaderError
from dfqs_nb.core.files import there_is
from dfqs_nb.core.journal import differing_fields
from dfqs_nb.core.paths import REPOSITORY, tilde


def test_sizes_and_cells_are_short():
    assert [display.size(n) for n in (61_540_805_344, 999, 5_800_000)] == ["61.5 GB", "999 B", "5.8 MB"]
    cells = [display.cell(value) for value in (0.8645833333333334, 61540805344, True, None)]
    assert cells == ["0.8646", "61,540,805,344", "yes", "not stated"]
    assert counted(1, "timed repetitions") == "1 timed repetition"
    assert counted(4, "texts a length") == "4 texts a length"
    assert [counted(1, name) for name in ("processes", "pieces")] == ["1 process", "1 piece"]


def test_columns_have_names_for_people_with_units():
    names = [display.label(name) for name in ("kld", "n_missing", "perplexity_low", "IQ1_S-XL")]
    assert names == ["KL divergence (nats)", "missing", "perplexity from", "IQ1_S-XL"]


def test_what_steers_a_terminal_is_taken_out():
    assert display.plain("a\x1b[31mred\x07") == "a\ufffd[31mred\ufffd"


def test_a_path_is_a_word_of_a_command_and_short_for_people():
    assert display.quoted("my model.gguf") == "'my model.gguf'"
    assert tilde(REPOSITORY / "data") == "data"
    assert [there_is(name) for name in ("x" * 100_000, "a\0b", ".")] == [False, False, True]


@pytest.mark.parametrize(("name", "hint"), [("max_token", "did you mean max_tokens? "), ("zzz", "")])
def test_a_close_name_is_offered(name, hint):
    assert display.did_you_mean(name, ["max_tokens", "n_ctx"]) == hint


def test_a_table_is_escaped_and_its_numbers_stand_right():
    table = display.markdown_table(pd.DataFrame({"name": ["a|<b>"], "n": [1]}))
    assert table == "| name | n |\n|---|---:|\n| a\\|&lt;b> | 1 |"
    assert display.entries("a: one | b: two") == {"a": "one", "b": "two"}


def test_an_error_says_where_what_and_what_to_do():
    error = HeaderError("not a GGUF file", where="model.gguf", hint="download it again")
    assert str(error) == "model.gguf: not a GGUF file; download it again"
    error.add_note("its last lines: ...")
    assert error._render_traceback_() == [f"HeaderError: {error}", "its last lines: ..."]


def test_nested_conditions_are_compared_field_by_field():
    a, b = ({"n_ctx": 1, "sampling": {"seed": seed}} for seed in (1, 2))
    assert differing_fields(a, b) == {"sampling.seed": (1, 2)}


def test_a_command_is_not_broken_in_two(capsys):
    """It could not be copied out of a notebook."""
    display.say(f"{'word ' * 16}so repeat it with `dfqs-nb run 03 --run nano`")
    assert "`dfqs-nb run 03 --run nano`" in capsys.readouterr().out.splitlines()[1]
