"""Public long-context tasks: what their texts hold, and how answers count."""

from __future__ import annotations

import random
import re
from collections import Counter
from types import SimpleNamespace

import pandas as pd
import pytest
from report_builder import append_damaged

from dfqs_nb.context import tasks
from dfqs_nb.context.plan import PrefillSpeed
from dfqs_nb.context.tasks import Text, Writer
from dfqs_nb.core.paths import data_dir
from dfqs_nb.core.prompts import load_prompts
from dfqs_nb.llama.model import open_model
from dfqs_nb.llama.settings import OpenSettings
from dfqs_nb.stats import wilson

SET = load_prompts(tasks.NAME, tasks.Tasks)

FREE = PrefillSpeed(0.0, 0.0)
NANO = data_dir() / "reference" / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf"


@pytest.fixture(scope="module")
def writer() -> Writer:
    """Words are tokens, so that tokens can be read."""
    return Writer(lambda text: text.split(" "), ("<user>", "</user>\n"), ())


def body(writer: Writer, task: str, length: int = 400, number: int = 0) -> tuple[Text, str]:
    text = writer.text(task, length, number)
    return text, " ".join(map(str, text.tokens)).partition(SET.intro)[2].partition(SET.joint)[0]


@pytest.mark.parametrize("name", SET.tasks)
def test_a_text_fills_its_length_and_is_the_same_every_time(writer, name):
    for length in (300, 1200):
        text = writer.text(name, length, 3)
        assert text == writer.text(name, length, 3) and text != writer.text(name, length, 4)
        assert 0.6 * length < len(text.tokens) + text.max_tokens <= length
    assert writer.text(name, 20, 0) is None, "too short"


@pytest.mark.parametrize(
    ("name", "n_keys", "n_values", "n_expected", "guess"),
    [
        ("single needle", 1, 1, 1, 0.0),
        ("several keys", 4, 4, 1, 0.25),
        ("several values", 1, 4, 4, 0.0),
        ("several questions", 4, 4, 4, 0.0),
    ],
)
def test_keys_and_values_as_ruler_has_them(writer, name, n_keys, n_values, n_expected, guess):
    depths = []
    for number in range(20):
        text, haystack = body(writer, name, number=number)
        facts = re.findall(r"code of the ([a-z ]+?) is (\d+)\.", haystack)
        assert len({key for key, _ in facts}) == n_keys and len({value for _, value in facts}) == n_values
        assert len(text.expected) == n_expected and set(text.expected) <= {value for _, value in facts}
        assert text.guess == guess
        depths.append(haystack.index(text.expected[0]) / len(haystack))
    assert min(depths) < 0.25 and max(depths) > 0.75, "facts lie over the whole text"


def test_a_chain_leads_from_its_number_to_every_expected_thing(writer):
    hops = 4
    text, haystack = body(writer, f"variables, {hops} hops")
    start = re.findall(r"The ([a-z ]+) has the number (\d+)\.", haystack)
    links = re.findall(r"The ([a-z ]+) has the same number as the ([a-z ]+)\.", haystack)
    code = re.search(r"number (\d+)\?", " ".join(map(str, text.tokens)))
    assert len(start) == 2 and len(links) == 2 * hops and code
    reached = [key for key, value in start if value == code[1]]
    for _ in range(hops):
        reached += [key for key, before in links if before == reached[-1]]
    assert reached == list(text.expected) and len(reached) == hops + 1


# ---- the rules of RULER's own generators, derived anew ----

# scripts/data/synthetic of github.com/NVIDIA/RULER, synthetic.yaml: niah_multikey_1, niah_multivalue and vt. Ours
# has a second chain, which RULER's vt leaves out.
RULER = {
    "several keys": {"keys": 4, "values": 1, "asked": 1},
    "several values": {"keys": 1, "values": 4, "asked": 1},
    "variables, 4 hops": {"chains": 1, "hops": 4},
}


def ruler_depths(draw: random.Random, task: str, n_sentences: int) -> list[float]:
    """Where RULER puts a text's facts, from 0 to 1.

    Needles: depths drawn without repetition from 40 even ones. Chains: places drawn without repetition.
    """
    if "chains" in RULER[task]:
        places = draw.sample(range(n_sentences), RULER[task]["hops"] + 1)
    else:
        n = RULER[task]["keys"] * RULER[task]["values"]
        places = [
            int(n_sentences * percent / 100) for percent in draw.sample([100 * k / 39 for k in range(40)], n)
        ]
    return [place / n_sentences for place in places]


@pytest.mark.parametrize("name", RULER)
def test_needles_distractors_depths_and_tokens_are_those_of_rulers_rules(writer, name):
    from scipy.stats import ks_2samp

    rules, draw, ours, theirs = RULER[name], random.Random(0), [], []
    for number in range(150):
        text, haystack = body(writer, name, number=number)
        sentences = haystack.strip().rstrip(".").split(". ")
        at = [
            k
            for k, sentence in enumerate(sentences)
            if re.search(r"code of the|the (same )?number", sentence)
        ]
        if "hops" in rules:
            chain = [
                sentence
                for sentence in sentences
                if sentence.startswith(tuple(f"The {k} has" for k in text.expected))
            ]
            assert len(text.expected) == len(chain) == rules["hops"] + 1
            assert len(at) == 2 * len(chain), "a chain, and one like it as the distractor"
            at = [sentences.index(sentence) for sentence in chain]
            assert at == sorted(at), "in the order of the chain"
        else:
            facts = [re.search(r"code of the (.+) is (\d+)$", sentences[k]) for k in at]
            asked = [fact for fact in facts if fact[2] in text.expected]
            assert len(facts) == rules["keys"] * rules["values"], "needles and distractors"
            assert (
                len({fact[1] for fact in facts}) == rules["keys"]
                and len({fact[1] for fact in asked}) == rules["asked"]
            )
            assert len(asked) == len(text.expected) == rules["asked"] * rules["values"]
        ours += [k / len(sentences) for k in at]
        theirs += ruler_depths(draw, name, len(sentences))
        longest = max(len(sentence.split()) for sentence in sentences)
        assert 0 <= 400 - text.max_tokens - len(text.tokens) <= 2 * longest, "as much filler as fits"
    assert ks_2samp(ours, theirs).pvalue > 0.01


def test_common_words_are_the_most_frequent(writer):
    for length, number in ((300, 0), (1500, 0), (600, 1)):
        text, haystack = body(writer, "common words", length, number)
        counts = Counter(haystack.strip().split(", ")).most_common()
        assert {word for word, _ in counts[:3]} == set(text.expected)
        assert counts[2][1] > counts[3][1], "without a tie"


def test_the_question_without_shared_words_shares_none(writer):
    text, haystack = body(writer, "no shared words")
    town = re.search(r"been to ([A-Z][A-Za-z ]+)\?", " ".join(map(str, text.tokens)))
    assert town and town[1] not in haystack and text.guess == 0.25
    sight = dict((town, sight) for sight, town in SET.sights)[town[1]]
    assert f"{text.expected[0]} lives right next to {sight}." in haystack


def test_an_answer_counts_by_whole_words():
    text = Text("t", (1,), ("12", "34"))
    assert text.is_right("12 and 34.") and not text.is_right("34, 125") and not text.is_right("")


def test_answers_are_counted_by_task_and_length():
    rows = [("b", 512, k < 9, 0.0) for k in range(10)] + [("a", 256, k < 3, 0.25) for k in range(10)]
    table = tasks.rates(pd.DataFrame(rows, columns=["task", "length", "right", "guess"]), ["b", "a"])
    assert table[["task", "length", "n", "right", "guess"]].values.tolist() == [
        ["b", 512, 10, 9, 0.0],
        ["a", 256, 10, 3, 0.25],
    ]
    assert tuple(table.loc[0, ["low", "high"]]) == tuple(float(edge) for edge in wilson(9, 10))


def test_a_list_counts_where_several_words_are_expected(monkeypatch):
    said = SimpleNamespace(text=":\n\n1. 12\n2. 34")
    monkeypatch.setattr(tasks, "generate", lambda *_: said)
    both = Text("t", (1,), ("12", "34"))
    assert both.is_right(tasks.greedy(None, both))
    assert tasks.greedy(None, Text("t", (1,), ("34",))) == "1. 12", "a single word is named first"


def only(monkeypatch, *names: str) -> None:
    """Ask these tasks alone."""
    few = SET.model_copy(update={"tasks": {name: SET.tasks[name] for name in names}})
    load = tasks.load_prompts
    monkeypatch.setattr(
        tasks, "load_prompts", lambda name, kind: few if name == tasks.NAME else load(name, kind)
    )


def test_a_task_that_fails_at_the_shortest_length_is_not_asked_again(tmp_path, monkeypatch):
    only(monkeypatch, "single needle", "several keys")
    monkeypatch.setattr(
        tasks, "greedy", lambda _, text: text.expected[0] if text.task == "single needle" else ""
    )
    with open_model(NANO, OpenSettings(n_ctx=1024, n_threads=1)) as model:
        table, missing = tasks.measure_tasks(model, tmp_path, [256, 512], FREE, n_texts=2)
    assert table["length"].tolist() == [256, 512, 256]
    assert not missing, "no budget took it away"


def test_a_model_is_asked_and_a_second_run_asks_nothing(tmp_path, monkeypatch):
    only(monkeypatch, "single needle", "common words")
    with open_model(NANO, OpenSettings(n_ctx=512, n_threads=1)) as model:
        first, missing = tasks.measure_tasks(model, tmp_path, [60, 512], FREE, n_texts=2)
        assert first["n"].tolist() == [2, 2]
        assert missing == ["4 texts of the table of tasks"], "60 tokens hold neither task"
        append_damaged(tmp_path / "long_context_tasks.jsonl")
        monkeypatch.setattr(tasks, "greedy", lambda *_: pytest.fail("asked again"))
        again, _ = tasks.measure_tasks(model, tmp_path, [512], FREE, n_texts=2)
        pd.testing.assert_frame_equal(first, again)
        none, missing = tasks.measure_tasks(model, tmp_path, [256], FREE, n_texts=2, budget_seconds=-1)
    assert (
        not len(none) and missing == ["the table of tasks: not measured"] and {"accuracy", "low"} <= set(none)
    )
