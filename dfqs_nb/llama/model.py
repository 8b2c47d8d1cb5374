"""Open a model safely, evaluate tokens with it, and save and restore its state."""

from __future__ import annotations

import contextlib
import ctypes
import math
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dfqs_nb.core import child
from dfqs_nb.core.display import heartbeat
from dfqs_nb.core.errors import ModelError
from dfqs_nb.gguf.facts import require_model
from dfqs_nb.gguf.memory import check_fits
from dfqs_nb.gguf.shards import Files, ShardSet, open_shards
from dfqs_nb.llama import check
from dfqs_nb.llama.build import buffers, build_llama, loaded_facts
from dfqs_nb.llama.graph import Paging, ggml_function, interrupts_held
from dfqs_nb.llama.log import LOG, WARNING
from dfqs_nb.llama.settings import OpenSettings, llama_version

Floats = NDArray[np.float32]
TOLERANCE = 1e-2  # of a logit, at a quarter of the tokens; the logits of a vocabulary spread over about 2
PLAIN_CHAT = "Question: {prompt}\nAnswer:"  # what a file without a chat template is asked
PLAIN_STOP = "\nQuestion:"  # there a base model would ask itself the next question
SECONDS, START_SECONDS = 10.0, 120.0  # of a template's prompt, and of its child's start
PLAIN = "use a file with a sound chat template"
HARMLESS = re.compile(r"full capacity of the model will not be utilized")  # a warning: of n_ctx, as asked for


class DecodeError(ModelError):
    """A decode failed; ``cause`` names it as the failure boundary does."""

    cause = "decode_error"


class ContextFullError(DecodeError):
    """More tokens were asked for than the context holds."""

    cause = "n_ctx"


class NanLogitsError(DecodeError):
    """The logits hold NaN."""

    cause = "nan_logits"


class Prefix(NamedTuple):
    """What several texts begin with: a context's state, or without one the tokens to evaluate for each."""

    n_tokens: int
    data: Any = None
    tokens: Sequence[int] = ()


@dataclass(repr=False)
class Model(contextlib.AbstractContextManager["Model"]):
    """An open model. Close it (or use it in a ``with`` block) to free its memory."""

    llama: Any  # llama-cpp-python's `Llama`; None when closed
    shards: ShardSet
    settings: OpenSettings
    buffers: dict[str, dict[str, int]]  # bytes by place and kind, as llama.cpp logged them
    load_seconds: float
    loading_speed: float = math.nan  # bytes a second that its load read, or its trial; NaN: under 1 GiB
    loaded: dict[str, Any] = field(default_factory=dict)  # `loaded_facts`, and ``paging``, a sentence
    paging: Paging | None = None
    warnings: tuple[str, ...] = ()  # of llama.cpp while it loaded the model, and ours

    def __post_init__(self) -> None:
        import llama_cpp.llama_cpp as api

        self.api: Any = api
        self.path, self.header = self.shards.paths[0], self.shards.as_one  # its first file; of all shards
        source, vocabulary = self.header.text("tokenizer.chat_template"), self.llama._model
        special = self.llama.token_bos(), self.llama.token_eos()
        bos, eos = (vocabulary.token_get_text(token) if token >= 0 else "" for token in special)
        self.template = ChatTemplate(source, bos, eos, self.path)  # its process starts with the first chat
        # without a template it is asked in `PLAIN_CHAT`; of tokens: in the context now, of the vocabulary
        self.has_template, self.n_past, self.n_vocab = bool(source), 0, int(self.llama.n_vocab())
        self.bos = int(special[0]) if vocabulary.add_bos_token() else -1  # begins every text; -1: none does

    def __repr__(self) -> str:
        """In a notebook: the file's name, without the folders of this machine."""
        how = f"n_ctx={self.settings.n_ctx}, n_threads={self.settings.n_threads}"
        return f"Model({self.path.name}, {self.header.architecture}, {how}{'' if self.llama else ', closed'})"

    def close(self, *_exc: object) -> None:
        """Free the weights and the context; closing twice is fine."""
        self.template.close()
        if self.llama is not None:
            self.llama.close()
            self.llama = None

    __exit__ = close

    def _open(self) -> Any:
        if self.llama is None:
            raise ModelError("the model is closed", where=self.path, hint="open it again")
        return self.llama

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of ``text``, without a BOS; ``special``: the text of a control token is that token."""
        raw = text.encode("utf-8", "replace")  # a lone surrogate becomes "?"
        return list(self._open().tokenize(raw, add_bos=False, special=special))

    def with_bos(self, tokens: Sequence[int]) -> list[int]:
        """The tokens with exactly one BOS in front where the vocabulary asks for one, else unchanged."""
        return [self.bos, *tokens] if self.bos >= 0 and list(tokens[:1]) != [self.bos] else list(tokens)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token's text; control tokens have none."""
        piece_of, vocab = self.api.llama_token_to_piece, self._open()._model.vocab
        size = -piece_of(vocab, token, None, 0, 0, False)  # the room that it asks for
        buffer = ctypes.create_string_buffer(size)  # `Llama.detokenize` cuts at 32 bytes
        piece_of(vocab, token, buffer, size, 0, False)
        return buffer.raw

    def text(self, tokens: Iterable[int]) -> str:
        """The text of these tokens; a broken character is replaced."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", "replace")

    def ends(self, token: int) -> bool:
        """Whether this token ends a generation."""
        return bool(self.api.llama_vocab_is_eog(self._open()._model.vocab, token))

    def clear(self) -> None:
        """Empty the context, wholly: ``deepseek4`` refuses to forget a part of it."""
        self._open()._ctx.kv_cache_clear()
        self.n_past = 0

    def decode(self, tokens: Sequence[int]) -> None:
        """Evaluate more tokens. `ContextFullError`: beyond ``n_ctx``. `DecodeError`: llama.cpp fails."""
        for _ in self._batches(tokens):
            pass
        self.api.llama_synchronize(self.llama.ctx)  # a GPU works on its own

    def evaluate(self, tokens: Sequence[int]) -> Floats:
        """As `decode`; the logits after the last token, float32 ``(n_vocab,)``, or `NanLogitsError`."""
        self.decode(tokens)
        logits = np.ctypeslib.as_array(self.llama._ctx.get_logits_ith(-1), shape=(self.n_vocab,)).copy()
        if np.isnan(logits).any():
            hint = "the weights are damaged, or the KV type is too coarse: try type_k='f16'"
            raise NanLogitsError(f"logits after {self.n_past:,} tokens hold NaN", where=self.path, hint=hint)
        return logits

    def logits(self, tokens: Sequence[int]) -> Iterator[Floats]:
        """As `decode`; each token's logits, float32 ``(n, n_vocab)``, in views that the next overwrites."""
        for n in self._batches(tokens, every_logit=True):
            yield np.ctypeslib.as_array(self.llama._ctx.get_logits(), shape=(n, self.n_vocab))

    def check_room(self, tokens: Sequence[int]) -> None:
        """Raise `ContextFullError` if these tokens do not fit after those in the context."""
        n_tokens = self.n_past + len(tokens)
        if not len(tokens):
            raise DecodeError("there are no tokens to evaluate", where=self.path, hint="give a prompt")
        if n_tokens > self.settings.n_ctx:
            what = f"{n_tokens:,} tokens exceed the context of {self.settings.n_ctx:,}"
            hint = "open the model with a larger n_ctx, or shorten the prompt"
            raise ContextFullError(what, where=self.path, hint=hint)

    def _batches(self, tokens: Sequence[int], *, every_logit: bool = False) -> Iterator[int]:
        """One ``llama_decode`` after another, with logits for each token or the last; yields their sizes."""
        self.check_room(tokens)
        self._open()
        for start in range(0, len(tokens), self.settings.n_batch):
            part = tokens[start : start + self.settings.n_batch]
            if self.paging is not None:
                self.paging.before(part)
            n = len(part)
            ids = (self.api.llama_token * n)(*part)  # the batch points into it
            batch = self.api.llama_batch_get_one(ids, n)
            if every_logit:
                batch.logits = (ctypes.c_int8 * n)(*[1] * n)
            self.decode_batch(batch)
            yield n

    def decode_batch(self, batch: Any) -> None:
        """One ``llama_decode`` of a ``llama_batch``, or a `DecodeError`."""
        run, listened = self.api.llama_decode, bool(self.llama.context_params.cb_eval)
        if listened and batch.n_tokens == 1:  # a callback that need not take Python's lock costs half as much
            run = ggml_function("llama_decode", run.restype, *run.argtypes)
        with interrupts_held() if listened else contextlib.nullcontext():
            status = run(self.llama.ctx, batch)
        if status != 0:
            what = f"llama_decode returned {status} after {self.n_past:,} tokens ({'; '.join(LOG.tail(2))})"
            hint = "clear the context and try again; lower n_ubatch if memory is short"
            raise DecodeError(what, where=self.path, hint=hint)
        self.n_past += batch.n_tokens

    def hold(self, tokens: Sequence[int], *, reuse: bool) -> Prefix:
        """Tokens for `restore`; ``reuse``: they are evaluated now, and then restored from their state."""
        if not (reuse and tokens):
            return Prefix(len(tokens), None, tokens)
        self.clear()
        self.decode(tokens)
        return self.save()

    def save(self) -> Prefix:
        """Copy the context's state, so that several questions can follow one evaluated text."""
        data = (ctypes.c_uint8 * self.api.llama_state_seq_get_size(self._open().ctx, 0))()
        if not data or self.api.llama_state_seq_get_data(self.llama.ctx, data, len(data), 0) != len(data):
            raise DecodeError("llama.cpp does not give its state", where=self.path, hint="use reuse=False")
        return Prefix(self.n_past, data)

    def restore(self, prefix: Prefix) -> None:
        """Let the context hold this and nothing else."""
        self.clear()
        if prefix.tokens:
            self.decode(prefix.tokens)
        set_state, data = self.api.llama_state_seq_set_data, prefix.data
        if data is not None and set_state(self.llama.ctx, data, len(data), 0) != len(data):
            raise DecodeError("llama.cpp refuses its own state", where=self.path, hint="use reuse=False")
        self.n_past = prefix.n_tokens

    def conditions(self) -> dict[str, Any]:
        """What a measurement with this model depends on, beside the model and the prompts; closed, too."""
        return {
            "runtime": f"llama-cpp-python {llama_version()}",
            "system_info": self.api.llama_print_system_info().decode("utf-8", "replace").strip(),
            **self.settings.as_dict(),
            "paging": "on" if self.paging else "off",
            **{name: self.loaded.get(name) for name in ("offloaded_layers", "repacked")},
            **({} if self.has_template else {"chat_frame": PLAIN_CHAT}),
        }


def kernels() -> str:
    """llama.cpp's commit, and the instruction sets and options of its kernels, by which results differ."""
    import llama_cpp

    LOG.install()  # the first call starts the GPUs' libraries, which log what they find
    facts = llama_cpp.llama_print_system_info().decode("utf-8", "replace")
    commit = ggml_function("ggml_commit", ctypes.c_char_p)().decode().removesuffix("-dirty")  # as any sdist
    used = ", ".join(filter(None, map(str.strip, re.sub(r" = 1\b", "", facts).split("|"))))
    return f"llama.cpp (commit {commit}) with {used.replace(' :', ':')}"


def open_model(model: Files, settings: OpenSettings | None = None, *, trial: bool = True) -> Model:
    """Check a model's files, its memory and its first decode, and only then open it in this process.

    ``model``: see `shards.Files`. Without a ``trial`` it can end this process. A RuntimeWarning: weights
    exceed the free memory, or llama.cpp warns. Errors: of `open_shards` and `check.trial`.
    """
    settings, shards = settings or OpenSettings(), open_shards(model)
    header, first = shards.as_one, shards.paths[0]
    require_model(header)
    needs = check.needs_of(header, settings)
    # a certain shortage is refused early; llama.cpp's own plan judges others, and a GPU has its own memory
    certain = settings.n_gpu_layers == 0 and needs.kv.exactness == "exact"
    slow, speed = check_fits(needs, where=first) if certain else "", math.nan
    if trial:
        with heartbeat(f"trying {first.name}", shards.nbytes):
            slow, speed = check.trial(shards, settings)
    with heartbeat(f"loading {first.name}", shards.nbytes):
        unhelped, built = Paging.unhelped(shards, settings), build_llama(shards, settings)
    speed = speed if math.isnan(built.speed) else built.speed  # mostly NaN: after the trial it is cached
    log, help_ = LOG.tail(), built.paging.sentence if built.paging else ""
    loaded = loaded_facts(log) | {"paging": help_ or unhelped}
    opened = Model(built.llama, shards, settings, buffers(log), built.seconds, speed, loaded, built.paging)
    lines = [re.sub(r"^\w+: ", "", line).strip(" *-") for line in LOG.tail(level=WARNING)]
    texts = [f"llama.cpp warns: {line}" for line in lines if line and not HARMLESS.search(line)]
    if not opened.has_template:
        texts.append(f"it has no chat template, as base models: a prompt is asked as {PLAIN_CHAT!r}")
    opened.warnings = tuple(dict.fromkeys(texts))
    for text in (". ".join(filter(None, (slow, help_))), *(f"{first.name}: {it}" for it in opened.warnings)):
        if text:
            warnings.warn(text, RuntimeWarning, stacklevel=2)
    return opened


class ChatTemplate:
    """A model's chat template: its author's code, so a child renders it in a sandbox, with limits."""

    # a prompt is the same in every run: clock and random choices repeat
    def __init__(self, source: str, bos: str, eos: str, where: Path) -> None:
        self._job = {"question": "render", "source": source, "bos": bos, "eos": eos}
        self._worker, self._lock, self.where = child.Worker("dfqs_nb.llama"), threading.Lock(), where
        self._fault = ""  # of a child that died: no other prompt waits for that long

    def render(self, question: str, variables: Mapping[str, bool] | None = None) -> str:
        """As `generate.chat_text`; a `ModelError` also when the template exceeds its limits."""
        chat = {"messages": [{"role": "user", "content": question}], **(variables or {})}
        job, limit = {**self._job, "seconds": SECONDS, "chat": chat}, START_SECONDS + SECONDS
        with self._lock:
            try:
                answer = {} if self._fault else self._worker.run(job, timeout_seconds=limit)
            except child.ChildDied as error:
                answer, late = {}, error.cause in ("SIGALRM", "timeout")
                self._fault = f"it exceeds its limit of {f'{SECONDS:.0f} seconds' if late else 'memory'}"
        if (text := answer.get("text")) is None:
            what = f"its chat template fails ({answer.get('fault', self._fault)})"
            raise ModelError(what, where=self.where, hint=PLAIN)
        at = 0  # a template may quote the question, or strip its lines: its words must be there, in order
        for word in re.findall(r"\w+", question):
            at = text.find(word, at) + len(word)
            if at < len(word):
                raise ModelError("its chat template leaves out the question", where=self.where, hint=PLAIN)
        return str(text)

    def close(self) -> None:
        """End the child, if there is one."""
        self._worker.close()


@dataclass(frozen=True)
class ReuseCheck:
    """Logits of a question asked from a saved state, against those of the same calls without one."""

    n_text: int  # tokens of the text before it
    n_tokens: int  # of the question
    n_close: int  # of them, those whose logits all lie within `TOLERANCE`
    largest_difference: float  # over all logits and tokens
    n_evaluated: int  # tokens, by the check itself

    @property
    def allowed(self) -> bool:
        """Whether it is the right state: a wrong one moves the logits of all tokens; rounding, of a few."""
        return 4 * self.n_close >= self.n_tokens

    @property
    def sentence(self) -> str:
        """The verdict for people, with what was compared."""
        so = "each text is read once" if self.allowed else "each question is asked afresh with its text"
        text = f"check of the saved state: after the first {self.n_text:,} tokens of the first text, "
        how = f"{self.n_close} of {self.n_tokens} tokens of a question get the same logits to within "
        return f"{text}{how}{TOLERANCE:g} (largest difference {self.largest_difference:.2g}). So {so}"


def check_reuse(model: Model, text: Sequence[int], question: Sequence[int]) -> ReuseCheck:
    """Compare the logits of a question after a text and after its saved state; to save changes nothing."""
    # both evaluate the text first, then the question: other calls would round differently
    model.clear()
    model.decode(text)
    state, fresh = model.save(), np.concatenate([rows.copy() for rows in model.logits(question)])
    model.restore(state)
    reused = np.concatenate([rows.copy() for rows in model.logits(question)])
    model.clear()
    moved, n = np.abs(fresh - reused).max(axis=1), len(question)
    return ReuseCheck(len(text), n, int((moved <= TOLERANCE).sum()), float(moved.max()), len(text) + 2 * n)
