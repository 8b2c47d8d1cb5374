"""Public long-context tasks: what their texts hold, and how answers count."""

from __future__ import annotations

import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest
from report_builder import append_damaged

from dfqs_nb.context import figures, tasks
from dfqs_nb.context.plan import PrefillSpeed
from dfqs_nb.context.tasks import TaskRun, Text, Writer
from dfqs_nb.core.errors import PromptError
from dfqs_nb.core.paths import data_dir
from dfqs_nb.core.prompts import load_prompts
from dfqs_nb.llama.model import open_model
from dfqs_nb.llama.settings import OpenSettings

SET = load_prompts(tasks.NAME, tasks.Tasks)

FREE = PrefillSpeed(0.0, 0.0)


@pytest.fixture(scope="module")
def writer() -> Writer:
    """Words are tokens, so that tokens can be read."""
    return Writer(SET, lambda text: text.split(" "), ("<user>", "</user>\n"), ())


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


@pytest.mark.parametrize("hops", [2, 4])
def test_a_chain_leads_from_its_number_to_every_expected_thing(writer, hops):
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


def test_common_and_frequent_words_are_the_most_frequent(writer):
    for name, split in (("common words", ", "), ("frequent words", " ")):
        for length, number in [(300, 0), (1500, 0), *((200, number) for number in range(30))]:
            if writer.text(name, length, number) is None:
                continue  # common words need more
            text, haystack = body(writer, name, length, number)
            counts = Counter(haystack.strip().split(split)).most_common()
            assert {word for word, _ in counts[:3]} == set(text.expected)
            assert counts[2][1] > counts[3][1], "without a tie"


def test_the_question_without_shared_words_shares_none(writer):
    text, haystack = body(writer, "no shared words")
    town = re.search(r"been to ([A-Z][A-Za-z ]+)\?", " ".join(map(str, text.tokens)))
    assert town and town[1] not in haystack and text.guess == 0.25
    sight = dict((town, sight) for sight, town in SET.sights)[town[1]]
    assert f"{text.expected[0]} lives right next to {sight}." in haystack


def test_one_of_many_people_is_asked_for(writer):
    text, haystack = body(writer, "questions on a text")
    name = re.search(r"What does (\w+ Number \d+) work as", " ".join(map(str, text.tokens)))
    assert name and re.search(rf"{name[1]} lives in house \d+ and works as a {text.expected[0]}\.", haystack)
    assert haystack.count(" lives in house ") > 10


def test_an_answer_counts_by_whole_words():
    text = Text("t", (1,), ("12", "34"))
    assert (text.recall("12 and 34."), text.recall("34, 125"), text.recall("")) == (1.0, 0.5, 0.0)


def test_effective_length_ends_at_the_first_fall_and_chance_is_none():
    import pandas as pd

    rows = [
        {"task": task, "length": length, "right": k < right, "recall": float(k < right), "guess": guess}
        for task, guess, by_length in (
            ("dips", 0.0, {256: 10, 512: 5, 1024: 10}),
            ("holds", 0.0, {256: 10, 512: 9, 1024: 9}),
            ("chance", 0.25, {256: 3, 512: 3, 1024: 3}),
        )
        for length, right in by_length.items()
        for k in range(10)
    ]
    table = TaskRun(pd.DataFrame(rows)).effective().set_index("task")
    assert table["effective"].to_dict() == {"dips": 256, "holds": 1024, "chance": 0}
    assert table["censored"].to_dict() == {"dips": False, "holds": True, "chance": False}
    title = figures.tasks_by_length(TaskRun(pd.DataFrame(rows))).get_title(loc="left")
    assert title == "2 of 3 tasks beat guessing at 256 tokens; 1 holds to 1,024"


def test_a_run_without_answers_has_empty_tables():
    import pandas as pd

    for run in (TaskRun(pd.DataFrame()), TaskRun(pd.DataFrame({"task": [], "length": []}))):
        assert not len(run.table()) and {"accuracy", "low", "high"} <= set(run.table())
        assert not len(run.effective()) and "effective" in run.effective()
        assert figures.tasks_by_length(run) == "No figure of tasks: none was asked."


def test_a_list_counts_where_several_words_are_expected(monkeypatch):
    said = SimpleNamespace(text=":\n\n1. 12\n2. 34")
    monkeypatch.setattr(tasks, "generate", lambda *_: said)
    both = Text("t", (1,), ("12", "34"))
    assert both.recall(tasks.greedy(None, both)) == 1
    assert tasks.greedy(None, Text("t", (1,), ("34",))) == "1. 12", "a single word is named first"


def test_a_task_that_fails_at_the_shortest_length_is_not_asked_again(tmp_path, monkeypatch):
    path = data_dir() / "reference" / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf"
    chosen = ["single needle", "several keys"]
    monkeypatch.setattr(tasks, "greedy", lambda _, text: text.expected[0] if text.task == chosen[0] else "")
    with open_model(path, OpenSettings(n_ctx=1024, n_threads=1)) as model:
        run = tasks.measure_tasks(model, tmp_path, [256, 512], FREE, tasks=chosen, n_texts=2)
    assert run.table()["length"].tolist() == [256, 512, 256]
    assert not run.left_out, "no budget took it away"


def test_a_model_is_asked_and_a_second_run_asks_nothing(tmp_path, monkeypatch):
    chosen = ["single needle", "common words"]
    path = data_dir() / "reference" / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf"
    with open_model(path, OpenSettings(n_ctx=512, n_threads=1)) as model:
        first = tasks.measure_tasks(model, tmp_path, [512, 60], FREE, tasks=chosen, n_texts=2)
        assert len(first.items) == 4 and first.table()["n"].tolist() == [2, 2]
        assert first.left_out == ("4 texts of the table of tasks",), "60 tokens hold neither task"
        append_damaged(tmp_path / "long_context_tasks.jsonl")
        monkeypatch.setattr(tasks, "greedy", lambda *_: pytest.fail("asked again"))
        again = tasks.measure_tasks(model, tmp_path, [512, 512], FREE, tasks=chosen * 2, n_texts=2)
        assert again.table()["n"].tolist() == [2, 2], "no answer counts twice"
        assert again.items["answer"].tolist() == first.items["answer"].tolist()
        none = tasks.measure_tasks(model, tmp_path, [256], FREE, tasks=chosen, n_texts=2, budget_seconds=-1)
        assert not len(none.items) and none.left_out == ("the table of tasks: not measured",)
        with pytest.raises(PromptError, match="there is no task 'x'"):
            tasks.measure_tasks(model, tmp_path, [256], FREE, tasks=["x"])
