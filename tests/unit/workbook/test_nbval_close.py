"""Outputs of notebooks are compared as their tags say: neither blind nor touchy."""

import pytest
from nbval_close import made_equal

SCORE = "reasoning 0.745 (95 % interval 0.679 to 0.801, n = 192), PASS: 0 of 4,608 differ"


@pytest.mark.parametrize(
    ("other", "tag", "passes"),
    [
        (SCORE.replace("0.745", "0.747"), "nbval-close", True),
        (SCORE.replace("0.745", "0.700"), "nbval-close", False),
        (SCORE.replace("0.745", "0.700"), "nbval-close-20", True),
        (SCORE.replace("192", "193"), "nbval-close", True),
        (SCORE.replace(" 0 of", " 1 of"), "nbval-close", False),
        (SCORE.replace(" 0 of", " 1 of"), "nbval-close-20", False),
        (SCORE.replace("PASS", "FAIL"), "nbval-close-20", False),
        (SCORE.replace("PASS", "FAIL"), "nbval-words", False),
        (SCORE.replace("0.745", "0.1").replace("4,608", "9"), "nbval-words", True),
        (SCORE + " more", "nbval-words", False),
        (SCORE.replace("IQ1", "IQ2"), "nbval-close", True),
    ],
)
def test_what_a_tag_lets_pass(other, tag, passes):
    assert (made_equal(SCORE, other, tag) == SCORE) is passes


def test_widths_of_columns_and_truth_of_a_machine_do_not_count():
    assert made_equal("memory     22.9 free\n-----", "memory  3.1 free\n--------", "nbval-words").startswith(
        "memory     22.9"
    )
    busy, quiet = "<td>yes</td> 33 s", "<td>no</td> 2 min"
    assert made_equal(busy, quiet, "nbval-words") == busy
    assert made_equal(busy, quiet, "nbval-close") == quiet
    assert made_equal(
        "decode | yes | 5\nrepacked | no", "decode | no | 7\nrepacked | yes", "nbval-words"
    ).endswith("no")
    assert made_equal("no help", "yes help", "nbval-words") == "yes help", "a word of a sentence"
    assert made_equal("IQ1_S 1.65", "IQ2_S 1.65", "nbval-close") == "IQ2_S 1.65"


def test_a_comma_behind_a_number_is_no_part_of_it():
    stored = "cpu_tokens_per_sec 568, failure_boundary_tokens 1,278"
    assert (
        made_equal(stored, "cpu_tokens_per_sec 543.9, failure_boundary_tokens 1,280", "nbval-words") == stored
    )
