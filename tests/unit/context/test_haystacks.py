"""Prompt sets and haystacks: frozen wording, a fixed number of keys, depths over the whole text."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from test_memory import NANO

from dfqs_nb.context.haystacks import PROBES, Haystacks, Probe, Question, probe_of
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.core.prompts import load_prompts
from dfqs_nb.llama.model import open_model
from dfqs_nb.llama.settings import OpenSettings

LENGTHS = (256, 512, 1024, 2048)


@pytest.fixture(scope="module")
def nano():
    with open_model(NANO, OpenSettings(n_ctx=640, n_threads=1), trial=False) as model:
        yield model


def words(text: str, special: bool = True) -> list[int]:
    """A tokenizer that anyone can follow: a word is a token."""
    return [sum(ord(c) * 31**i for i, c in enumerate(word)) % 2**31 for word in text.split()]


# Words in the place of a model; a text begins with the tokens 1 and 2.
READER = SimpleNamespace(tokenize=words, with_bos=lambda tokens: [1, 2, *tokens], header={})


@pytest.fixture
def many_keys() -> Haystacks:
    return Haystacks(READER, probe_of("standard"), 256)


# ---- prompt sets ----


@pytest.mark.parametrize(
    "name, sha256",
    [
        ("long-context-nano", "5ccc6a309631f28dd8f1c369d5d9a2f4a607ef4d03b6cf54cc336ae3bfdb56c4"),
        ("long-context-nano-keys", "9bb739cd0244df0b7e68b3ec0806e6d838a18a857f7e550f3c8bfa9142560c62"),
        ("long-context-standard", "177b31b98b343573d4b7c8eb6d67f4aa1e1d1f158f6791602ae558bc36d5f881"),
    ],
)
def test_prompt_sets_are_frozen(name, sha256):
    """Results under another wording are not comparable: a new wording is a new set, with a new name."""
    probe = probe_of(name)
    assert probe.sha256 == sha256
    assert probe.licence == "MIT" and probe.source


def test_both_tiers_have_one_probe():
    nano, standard = (load_prompts(PROBES[tier], Probe) for tier in ("nano", "standard"))
    assert (nano.tier, standard.tier) == ("nano", "standard")
    own = {"name", "tier", "source", "sha256", "of"}
    assert nano.model_dump(exclude=own) == standard.model_dump(exclude=own)


def test_unknown_prompt_set_names_the_known():
    with pytest.raises(DfqsError, match="there are: .*long-context-nano"):
        probe_of("long-context")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"needles": None}, "needles Field required"),
        ({"tier": "huge"}, "tier Input should be 'nano' or 'standard'"),
        ({"needles": "six"}, "needles Input should be a valid integer"),
    ],
)
def test_a_broken_set_names_its_field(tmp_path, monkeypatch, change, message):
    content = probe_of("standard").model_dump(exclude={"sha256"}) | change
    content = {key: value for key, value in content.items() if value is not None}
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "broken.json").write_text(json.dumps(content))
    monkeypatch.setenv("DFQS_DATA", str(tmp_path))
    with pytest.raises(DfqsError, match=message):
        probe_of("broken")


# ---- haystacks ----


@pytest.mark.parametrize(("name", "lengths"), [("long-context-nano", (64, 300, 512)), ("nano", (300, 512))])
def test_pieces_are_tokenized_as_the_whole_text_would_be(nano, name, lengths):
    haystacks = Haystacks(nano, probe_of(name), lengths[0])
    for number, length in itertools.product(range(5), lengths):
        case = haystacks.case(number, length)
        for question in case.questions:
            tokens = list(case.body + question.prompt)
            text = nano.llama.detokenize(tokens, special=True).decode()
            assert nano.tokenize(text) == tokens
        longest = max(len(question.prompt) for question in case.questions)
        assert length - 30 <= len(case.body) + longest <= length, "filled to within a sentence"


def test_the_wording_is_the_reference_models_own(nano):
    probe = probe_of("long-context-nano")
    case = Haystacks(nano, probe, 64).case(0, 64)
    text = nano.llama.detokenize(list(case.body + case.questions[0].prompt), special=True).decode()
    code = case.questions[0].expected.removeprefix("The pass key is ").rstrip(".")
    assert f"The pass key is {code}. Remember it. {code} is the pass key." in text
    assert text.endswith("What is the pass key?<｜Assistant｜>") and text.count(code) == 2


def test_the_number_of_keys_is_the_same_at_every_length(many_keys):
    text = [w for w in "The code of the".split()]
    for number, length in itertools.product(range(10), LENGTHS):
        case = many_keys.case(number, length)
        assert len(case.questions) == len({q.name for q in case.questions}) == 6
        assert max(len(case.body) + len(q.prompt) for q in case.questions) <= length
        start = words(" ".join(text))
        found = sum(case.body[i : i + 4] == tuple(start) for i in range(len(case.body)))
        assert found == 6, "no needle beside those that are asked for"


def test_depths_are_spread_over_the_whole_text(many_keys):
    depths = [q.depth for t in range(40) for q in many_keys.case(t, 1024).questions]
    counts = np.histogram(depths, 10, (0, 1))[0]
    assert counts.sum() == 240 and counts.min() >= 14, counts
    assert min(depths) < 0.03 and max(depths) > 0.93


def test_the_depths_of_a_single_key_are_stratified_over_texts(nano):
    haystacks = Haystacks(nano, probe_of("long-context-nano"), 64)
    depths = [haystacks.case(t, 512).questions[0].depth for t in range(20)]
    assert np.histogram(depths, 5, (0, 1))[0].min() >= 3, (
        "four are drawn in each; whole sentences shift them a little"
    )


def test_texts_are_fresh_for_each_length_and_the_same_for_every_tokenizer(many_keys, nano):
    keys = {length: {q.name for q in many_keys.case(3, length).questions} for length in LENGTHS}
    assert all(keys[a] != keys[b] for a, b in itertools.combinations(LENGTHS, 2))
    other = Haystacks(nano, probe_of("standard"), 256)
    assert [(q.name, q.expected) for q in other.case(3, 512).questions] == [
        (q.name, q.expected) for q in many_keys.case(3, 512).questions
    ]


@pytest.mark.parametrize("shortest", [32, 100, 120])
def test_a_length_that_cannot_hold_the_keys_is_refused(shortest):
    with pytest.raises(DfqsError, match="cannot hold the keys.*use lengths from"):
        Haystacks(READER, probe_of("standard"), shortest)


# ---- judging ----


@pytest.mark.parametrize(
    ("text", "right", "another"),
    [
        ("1234", True, False),
        ("1234 and more", True, False),
        ("12", False, False),
        ("98", False, False),
        ("9876.", False, True),
        ("13", False, False),
    ],
)
def test_an_answer_is_right_or_anothers(text, right, another):
    question = Question("k", "retrieve", 0.5, (), "1234", ("9876", "5555"))
    assert question.is_right(text) == right and question.is_another(text) == another
    assert not Question("k", "retrieve", 0.5, (), "1234").is_another(text)
