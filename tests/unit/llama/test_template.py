"""Chat templates as files have them: faulty, endless, dated, without the question; and warnings while loading."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from gguf_fixtures import Spec, field, gguf_bytes
from models_apart import Apart
from no_hang import no_hang

from dfqs_nb.core.errors import ModelError
from dfqs_nb.llama import model as llama_model
from dfqs_nb.llama.check import loader_verdict
from dfqs_nb.llama.generate import chat, chat_text, generate
from dfqs_nb.llama.model import ChatTemplate, open_model
from dfqs_nb.llama.settings import OpenSettings

SETTINGS = OpenSettings(n_ctx=256, n_threads=1)
QUESTION = 'What is "2 + 2"?\nSay it.'


def render(source: str, question: str = QUESTION) -> str:
    chat_template = ChatTemplate(source, "<s>", "</s>", Path("m.gguf"))
    try:
        return chat_template.render(question)
    finally:
        chat_template.close()


@pytest.fixture(scope="module")
def nano(merged_reference: Path) -> Apart:
    return Apart.of(merged_reference)


def opened(nano: Apart, folder: Path, **fields: tuple[str, object]):
    for name, (kind, value) in fields.items():
        nano = nano.with_field(name.replace("__", "."), kind, value)
    path = folder / "m.gguf"
    path.write_bytes(nano.bytes())
    assert loader_verdict(path).accepted
    return open_model(path, SETTINGS, trial=False)


# ---- rendering ----


def test_what_llama_cpp_python_offers_a_template_is_offered():
    source = (
        "{{ bos_token }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ messages | tojson }}"
        "{{ tools is none }}{{ add_generation_prompt }}{{ eos_token }}"
    )
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    messages = [{"role": "user", "content": QUESTION}]
    theirs = Jinja2ChatFormatter(source, eos_token="</s>", bos_token="<s>")(messages=messages).prompt
    assert render(source) == theirs


@pytest.mark.parametrize(
    "source",
    [
        "{{ bos_token }}Hello",  # ignores the messages
        "{{ messages[0]['content'][0]['text'] }}",  # takes content for a list of parts
        "{{ bos_token }}",
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}",
        "{{ messages[0].content | reverse }}",
        "{{ messages[0].content.split() | sort | join(' ') }}",
        "{{ messages[0].content.split()[0] }}",
    ],
)
def test_a_template_that_leaves_the_question_out_is_refused(source):
    with pytest.raises(ModelError, match="chat template leaves out the question"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content | trim }}!",
        "{{ messages[0].content | tojson }}",
        "{{ messages[0].content | upper }}",
    ],
)
def test_a_question_may_be_trimmed_or_quoted(source):
    if "upper" in source:
        with pytest.raises(ModelError):
            render(source)
    else:
        assert "2 + 2" in render(source)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% unknowntag %}x", "unknowntag"),
        ("{{ if .System }}{{ .System }}{{ end }}{{ .Prompt }}", "expected"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ nothing.at.all }}", "undefined"),
    ],
)
def test_a_fault_in_a_template_is_an_error_that_says_which(source, words):
    with pytest.raises(ModelError, match=f"its chat template fails .*{words}.*sound chat template"):
        render(source)


ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(9) %}"
    + "{% endfor %}" * 3,
    "a huge number": "{{ 10 ** (10 ** 9) }}",
    "loops over the text": "{% for a in messages[0].content * 99 %}{% for b in messages[0].content * 99 %}"
    "{% for c in messages[0].content * 99 %}{% for d in messages[0].content * 99 %}" + "{% endfor %}" * 4,
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_a_template_that_never_ends_is_stopped_and_not_asked_again(source, monkeypatch):
    monkeypatch.setattr(llama_model, "SECONDS", 0.7)
    endless, asked = ChatTemplate(source, "", "", Path("m.gguf")), []
    ask = endless._worker.run
    monkeypatch.setattr(
        endless._worker, "run", lambda *job, **limits: asked.append(job) or ask(*job, **limits)
    )
    for _ in range(3):
        with no_hang(), pytest.raises(ModelError, match="exceeds its limit of"):
            endless.render(QUESTION)
    assert len(asked) == 1, "for the first prompt"


@pytest.mark.parametrize(
    "source",
    [
        "{% set t = namespace(x='x' * 1000) %}{% for i in range(40) %}{% set t.x = t.x ~ t.x %}{% endfor %}{{ t.x }}",
        "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
        "{{ 'x' * 99999999999 }}",
    ],
    ids=["doubling", "many pieces", "one piece"],
)
def test_a_text_without_end_does_not_fill_the_memory(source):
    with pytest.raises(ModelError, match="its chat template fails"):
        render(source)


def test_the_clock_of_a_template_stands_still():
    source = "Today is {{ strftime_now('%d %B %Y %H:%M') }}. {{ messages[0].content }}"
    assert render(source).startswith("Today is 01 January 2026 12:00. What") and render(source) == render(
        source
    )


@pytest.mark.parametrize("source", ["{{ range(99999) | random }}", "{{ lipsum(2) }}"])
def test_a_template_that_draws_at_random_gives_the_same_prompt_in_every_run(source):
    source += "{{ messages[0].content }}"
    assert render(source) == render(source)


def test_a_lone_surrogate_in_a_question_is_no_traceback(nano, tmp_path):
    with opened(nano, tmp_path) as model:
        assert chat(model, "What is \ud800?", max_tokens=2).n_prompt > 3


# ---- models ----


@pytest.mark.parametrize("name", ["tokenizer__chat_template", "tokenizer__chat_template__tool_use"])
def test_a_template_that_jinja_cannot_parse_does_not_stop_plain_completion(nano, tmp_path, name):
    with opened(nano, tmp_path, **{name: ("STRING", "{% unknowntag %}")}) as model:
        assert generate(model, model.tokenize("def add(a, b):\n"), max_tokens=2).n_tokens
        if name.endswith("tool_use"):
            assert "France" in chat_text(model, "What is the capital of France?")
        else:
            with pytest.raises(ModelError, match="unknowntag"):
                chat(model, "What is the capital of France?")


def test_a_model_without_a_template_is_asked_in_a_plain_frame_and_says_so(nano, tmp_path):
    with pytest.warns(RuntimeWarning, match="no chat template"):
        model = opened(nano.without_field("tokenizer.chat_template"), tmp_path)
    with model:
        assert chat_text(model, "What is 1 + 1?") == "Question: What is 1 + 1?\nAnswer:"
        assert chat(model, "What is 1 + 1?", max_tokens=4).n_tokens
        assert model.conditions()["chat_frame"] == "Question: {prompt}\nAnswer:"


def test_warnings_of_llama_cpp_are_collected_and_shown_once(nano, tmp_path):
    """A special token outside of the vocabulary, and no pre-tokenizer."""
    broken = nano.without_field("tokenizer.ggml.pre").with_field(
        "tokenizer.ggml.eot_token_id", "UINT32", 99_999
    )
    with pytest.warns(RuntimeWarning) as shown:
        model = opened(broken, tmp_path)
    model.close()
    assert any("GENERATION QUALITY WILL BE DEGRADED" in text for text in model.warnings)
    assert any("bad special token" in text for text in model.warnings)
    ours = [warning for warning in shown if warning.category is RuntimeWarning]
    assert len(model.warnings) == len(set(model.warnings)) == len(ours)


def test_a_sound_model_has_no_warnings(nano, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = opened(nano, tmp_path)
    model.close()
    assert model.warnings == ()


def test_a_name_of_100_kilobytes_does_not_hang(nano, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(nano.with_field("general.name", "STRING", "y" * 100_000).bytes())
    with no_hang():
        model = open_model(path, SETTINGS)
    model.close()
    assert model.warnings == ()


def test_a_file_that_is_no_model_is_refused_before_llama_cpp_sees_it(tmp_path):
    path = tmp_path / "lora.gguf"
    fields = [field("general.architecture", "STRING", "llama"), field("general.type", "STRING", "adapter")]
    path.write_bytes(gguf_bytes(fields, [Spec("blk.0.attn_q.weight.lora_a", "F32", (32, 4))]))
    with pytest.raises(ModelError, match=".adapter., not a language model"):
        open_model(path, SETTINGS)


def test_tensors_that_llama_cpp_does_not_use_are_explained(nano, tmp_path):
    path = tmp_path / "vision.gguf"
    path.write_bytes(nano.with_tensor(Spec("v.blk.0.attn_q.weight", "F32", (64, 64))).bytes())
    with pytest.raises(ModelError, match="wrong number of tensors.*does not use"):
        open_model(path, SETTINGS)
