"""Open a model safely, generate with it, time it.

Greedy decoding from a cleared context is the default, so that the same prompt gives the same tokens.
"""

from __future__ import annotations

import codecs
import ctypes
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from dfqs_nb.core.errors import ModelError
from dfqs_nb.core.machine import usable_cores
from dfqs_nb.gguf.header import GGUFHeader
from dfqs_nb.gguf.memory import MemoryEstimate, check_fits, estimate
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama.probe import LOG, OpenSettings, Probe, build_llama, llama_version
from dfqs_nb.llama.probe import probe as probe_model

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Completion",
    "ContextFullError",
    "DecodeError",
    "Model",
    "NanLogitsError",
    "OpenSettings",
    "Repeat",
    "Sampling",
    "Speed",
    "Spread",
    "TextStream",
    "answer_table",
    "chat",
    "chat_prompt",
    "chat_text",
    "complete",
    "measure_speed",
    "open_model",
    "same_tokens_twice",
    "stream_chat",
    "stream_tokens",
    "threads_for",
]


class DecodeError(ModelError):
    """A decode failed; ``cause`` names it as the failure boundary does."""

    cause = "decode_error"


class ContextFullError(DecodeError):
    """More tokens were asked for than the context holds."""

    cause = "n_ctx"


class NanLogitsError(DecodeError):
    """The logits hold NaN."""

    cause = "nan_logits"


@dataclass(repr=False)
class Model:
    """An open model: its header, how it was opened, and llama-cpp-python's ``Llama`` itself.

    Close it (or use it in a ``with`` block) to give its memory back.
    """

    llama: Any
    path: Path
    header: GGUFHeader
    settings: OpenSettings
    memory: MemoryEstimate
    probe: Probe | None
    load_seconds: float

    def __repr__(self) -> str:
        """In a notebook: the file's name, without the folders of this machine."""
        state = "" if self.llama is not None else ", closed"
        s = self.settings
        how = f"n_ctx={s.n_ctx}, n_threads={s.n_threads}{state}"
        return f"Model({self.path.name}, {self.header.architecture}, {how})"

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the weights and the context; closing twice is fine."""
        if self.llama is not None:
            self.llama.close()
            self.llama = None

    @property
    def n_vocab(self) -> int:
        """Tokens in the vocabulary."""
        return self._open().n_vocab()

    @property
    def n_past(self) -> int:
        """Tokens evaluated in the context now."""
        return self._open().n_tokens

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of ``text``, without a BOS; ``special``: the text of a control token is that token."""
        return self._open().tokenize(text.encode("utf-8"), add_bos=False, special=special)

    def with_bos(self, tokens: Sequence[int]) -> list[int]:
        """The tokens with exactly one BOS in front where the vocabulary asks for one, else unchanged."""
        llama = self._open()
        bos = llama.token_bos()
        missing = llama._model.add_bos_token() and bos >= 0 and list(tokens[:1]) != [bos]
        return [bos, *tokens] if missing else list(tokens)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token's text; control tokens have none.

        (``Llama.detokenize`` of llama-cpp-python 0.3.36 loses tokens longer than 32 bytes.)
        """
        import llama_cpp

        vocab = self._open()._model.vocab
        buffer = ctypes.create_string_buffer(64)
        n = llama_cpp.llama_token_to_piece(vocab, token, buffer, 64, 0, False)
        if n < 0:
            buffer = ctypes.create_string_buffer(-n)
            n = llama_cpp.llama_token_to_piece(vocab, token, buffer, -n, 0, False)
        return buffer.raw[:n]

    def ends(self, token: int) -> bool:
        """Whether this token ends a generation."""
        import llama_cpp

        return llama_cpp.llama_vocab_is_eog(self._open()._model.vocab, token)

    def clear(self) -> None:
        """Empty the context, wholly: ``deepseek4`` refuses to forget a part of it."""
        llama = self._open()
        llama._ctx.kv_cache_clear()
        llama.reset()

    def evaluate(self, tokens: Sequence[int]) -> np.ndarray:
        """Evaluate tokens after those in the context; the logits after the last, float32 ``(n_vocab,)``.

        Raises:
            ContextFullError: they do not fit in ``n_ctx``.
            NanLogitsError: a logit is NaN.
            DecodeError: llama.cpp fails.
        """
        self.decode(tokens)
        logits = np.ctypeslib.as_array(self.llama._ctx.get_logits_ith(-1), shape=(self.n_vocab,)).copy()
        if np.isnan(logits).any():
            raise NanLogitsError(
                f"the logits after {self.n_past:,} tokens hold NaN",
                where=self.path,
                hint="the weights are damaged, or the KV type is too coarse: try type_k='f16'",
            )
        return logits

    def decode(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens as ``evaluate`` does, without fetching logits."""
        llama = self._open()
        if not tokens:
            raise DecodeError("there are no tokens to evaluate", where=self.path, hint="give a prompt")
        if llama.n_tokens + len(tokens) > self.settings.n_ctx:
            raise ContextFullError(
                f"{llama.n_tokens + len(tokens):,} tokens exceed the context of {self.settings.n_ctx:,}",
                where=self.path,
                hint="open the model with a larger n_ctx, or shorten the prompt",
            )
        try:
            llama.eval(list(tokens))
        except RuntimeError as error:
            last = "; ".join(LOG.tail(2))
            raise DecodeError(
                f"{error} after {llama.n_tokens:,} tokens ({last})",
                where=self.path,
                hint="clear the context and try again; lower n_ubatch if memory is short",
            ) from error

    def conditions(self) -> dict[str, Any]:
        """What a measurement with this model depends on, beside the model and the prompts."""
        import llama_cpp

        return {
            "runtime": f"llama-cpp-python {llama_version()}",
            "system_info": llama_cpp.llama_print_system_info().decode("utf-8", "replace").strip(),
            **self.settings.as_dict(),
        }

    def _open(self) -> Any:
        if self.llama is None:
            raise ModelError("the model is closed", where=self.path, hint="open it again")
        return self.llama


def open_model(path: str | Path, settings: OpenSettings | None = None, *, probe: bool = True) -> Model:
    """Check a model's files, its memory and its first decode, and only then open it in this process.

    Args:
        path: the GGUF file, or any of its shards.
        settings: how to open it; the defaults are those of the class.
        probe: try it in a child process first. Without it a damaged file can end this process.

    Raises:
        HeaderError, ShardError: the file is not a complete, readable GGUF model.
        SpaceError: KV cache and compute buffer exceed the free memory.
        ModelError: llama.cpp refuses the model, dies on it, or computes NaN; llama.cpp's last lines are a
            note of the exception.

    Warns:
        RuntimeWarning: weights exceed the free memory, so they will be read again and again.
    """
    settings = settings or OpenSettings()
    shards = open_shards(path)
    needs = _needs(shards.headers, settings)
    slow = _check_memory(needs, settings, shards.paths[0])
    tried = probe_model(shards.paths, settings, needs) if probe else None
    if tried is not None:
        needs = needs.with_compute(tried.compute_bytes)
    if slow:
        warnings.warn(slow, RuntimeWarning, stacklevel=2)
    started = time.perf_counter()
    llama = build_llama(shards.paths[0], settings)
    return Model(
        llama, shards.paths[0], shards.headers[0], settings, needs, tried, time.perf_counter() - started
    )


SMALL_MODEL_BYTES = 64 << 20


def threads_for(path: str | Path) -> int:
    """Threads that suit the model: one where handing work around costs more than it saves, else all cores.

    A model of under 64 MB computes a token in a millisecond; a second thread then mostly waits for the first.
    """
    shards = open_shards(path)
    return 1 if shards.nbytes < SMALL_MODEL_BYTES else usable_cores()


def _needs(headers: Sequence[GGUFHeader], settings: OpenSettings) -> MemoryEstimate:
    names = ("type_k", "type_v", "swa_full", "use_mmap", "flash_attn")
    return estimate(
        headers,
        settings.n_ctx,
        min(settings.n_batch, settings.n_ubatch),
        **{name: getattr(settings, name) for name in names},
    )


def _check_memory(needs: MemoryEstimate, settings: OpenSettings, path: Path) -> str:
    """Refuse a certain shortage early; bounds are left to llama.cpp's own plan, GPU layers to the GPU."""
    if settings.n_gpu_layers != 0 or needs.kv.exactness != "exact":
        return ""
    return check_fits(needs, where=path)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy: the most likely token, and the lowest id of equals.

    ``top_k``, ``top_p``, ``min_p`` and ``seed`` count only above temperature 0; there is no repeat penalty.
    """

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int = 42


GREEDY = Sampling()


@dataclass(frozen=True)
class Completion:
    """What a model answered.

    ``finish_reason``: ``"eos"`` (the model ended it), ``"stop"`` (a stop text came) or ``"length"``
    (``max_tokens`` or the context was used up). ``token_ids`` excludes the ending token but includes those
    of a stop text. ``decode_seconds`` covers ``n_decoded`` evaluations, one token each.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    n_prompt: int
    prefill_seconds: float
    decode_seconds: float
    n_decoded: int

    @property
    def n_tokens(self) -> int:
        """Tokens of the answer."""
        return len(self.token_ids)

    @property
    def prefill_tokens_per_sec(self) -> float:
        """Prompt tokens a second."""
        return self.n_prompt / self.prefill_seconds if self.prefill_seconds else float("nan")

    @property
    def decode_tokens_per_sec(self) -> float:
        """Evaluated answer tokens a second; NaN when the answer was one token."""
        return self.n_decoded / self.decode_seconds if self.n_decoded else float("nan")


class TextStream:
    """Pieces of text as they come; after the last one, ``completion`` holds the whole.

    A piece never ends inside a character, and never holds the start of a stop text.
    """

    def __init__(
        self, model: Model, prompt: Sequence[int], max_tokens: int, sampling: Sampling, stop: Sequence[str]
    ) -> None:
        self._model, self._prompt, self._sampling = model, list(prompt), sampling
        self._max_tokens, self._stop = max_tokens, tuple(stop)
        self._tokens: list[int] = []
        self._seconds = [0.0, 0.0]
        self._n_decoded = 0
        self._pieces = self._run()
        self._completion: Completion | None = None

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    @property
    def completion(self) -> Completion:
        """The completion; text that was not yet read from the stream is generated first."""
        for _ in self._pieces:
            pass
        if self._completion is None:
            raise ModelError("the stream was cut off by an error", where=self._model.path, hint="ask again")
        return self._completion

    def _run(self) -> Iterator[str]:
        text, shown, reason = "", 0, "length"
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token in self._generate():
            if self._model.ends(token):
                reason = "eos"
                break
            self._tokens.append(token)
            text += decoder.decode(self._model.token_bytes(token))
            cut = _first_stop(text, self._stop)
            if cut is not None:
                text, reason = text[:cut], "stop"
                break
            safe = len(text) - _held_back(text, self._stop)
            if safe > shown:
                yield text[shown:safe]
                shown = safe
        text += "" if reason == "stop" else decoder.decode(b"", final=True)
        if len(text) > shown:
            yield text[shown:]
        self._completion = Completion(
            text, tuple(self._tokens), reason, len(self._prompt), *self._seconds, self._n_decoded
        )

    def _generate(self) -> Iterator[int]:
        """Chosen tokens: prefill from a cleared context, then one evaluation for each but the first."""
        self._model.clear()
        logits = self._timed(self._prompt, 0)
        choose = _chooser(self._model, self._sampling)
        limit = min(self._max_tokens, self._model.settings.n_ctx - len(self._prompt))
        for left in range(limit - 1, -1, -1):
            token = choose(logits)
            yield token
            if left:
                logits = self._timed([token], 1)
                self._n_decoded += 1

    def _timed(self, tokens: Sequence[int], phase: int) -> np.ndarray:
        started = time.perf_counter()
        logits = self._model.evaluate(tokens)
        self._seconds[phase] += time.perf_counter() - started
        return logits


def _chooser(model: Model, sampling: Sampling) -> Any:
    if sampling.temperature <= 0:
        return lambda logits: int(np.argmax(logits))
    model.llama.set_seed(sampling.seed)
    sampler = model.llama._init_sampler(
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        temp=sampling.temperature,
        repeat_penalty=1.0,
    )
    return lambda _logits: int(sampler.sample(model.llama._ctx, -1))


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the earliest stop text begins, or None."""
    found = [at for at in (text.find(one) for one in stop if one) if at >= 0]
    return min(found, default=None)


def _held_back(text: str, stop: Sequence[str]) -> int:
    """Characters at the end that may turn out to begin a stop text.

    >>> _held_back("def f():\\n", ["\\n\\n", "\\nclass"])
    1
    """
    lengths = (n for one in stop for n in range(min(len(one), len(text)), 0, -1) if one.startswith(text[-n:]))
    return max(lengths, default=0)


def chat_prompt(model: Model, prompt: str | Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a chat in the model's own template, up to where the answer begins, with at most one BOS.

    Args:
        prompt: the user's message, or messages with ``role`` and ``content``.

    Raises:
        ModelError: the header has no chat template, or the template refuses the messages.
    """
    return model.with_bos(model.tokenize(chat_text(model, prompt)))


def chat_text(model: Model, prompt: str | Sequence[dict[str, str]]) -> str:
    """The text of a chat in the model's own template, up to where the answer begins.

    Raises:
        ModelError: the header has no chat template, or the template refuses the messages.
    """
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = model.header.get("tokenizer.chat_template")
    if not template:
        raise ModelError(
            "its header has no chat template", where=model.path, hint="use complete() with plain text"
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    llama = model._open()
    bos, eos = (_token_text(llama, token) for token in (llama.token_bos(), llama.token_eos()))
    try:
        return Jinja2ChatFormatter(template, eos_token=eos, bos_token=bos)(messages=messages).prompt
    except Exception as error:  # a template is code of the file's author, and may raise anything
        raise ModelError(
            f"its chat template fails ({error})", where=model.path, hint="use complete() with plain text"
        ) from error


def _token_text(llama: Any, token: int) -> str:
    return llama._model.token_get_text(token) if token >= 0 else ""


def stream_tokens(
    model: Model,
    prompt: Sequence[int],
    max_tokens: int = 256,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
) -> TextStream:
    """Stream the continuation of these tokens, from a cleared context.

    Raises (when the stream is read):
        ContextFullError: the prompt alone exceeds ``n_ctx``.
        NanLogitsError, DecodeError: as ``Model.evaluate``.
    """
    return TextStream(model, prompt, max_tokens, sampling, stop)


def stream_chat(
    model: Model,
    prompt: str | Sequence[dict[str, str]],
    max_tokens: int = 256,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
) -> TextStream:
    """Stream the answer to a chat, piece by piece; ``.completion`` of the result is the whole."""
    return stream_tokens(model, chat_prompt(model, prompt), max_tokens, sampling, stop)


def chat(
    model: Model,
    prompt: str | Sequence[dict[str, str]],
    max_tokens: int = 256,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
) -> Completion:
    """The answer to a chat in the model's own template, greedy by default."""
    return stream_chat(model, prompt, max_tokens, sampling, stop).completion


def complete(
    model: Model, text: str, max_tokens: int = 256, sampling: Sampling = GREEDY, stop: Sequence[str] = ()
) -> Completion:
    """The continuation of plain text, such as code: no template, and control tokens have no meaning."""
    return stream_tokens(
        model, model.with_bos(model.tokenize(text, special=False)), max_tokens, sampling, stop
    ).completion


def answer_table(model: Model, prompts: Sequence[str], max_tokens: int = 256) -> pd.DataFrame:
    """Greedy answers to several prompts, each from a cleared context.

    One row a prompt: ``prompt``, ``answer``, ``tokens``, ``finish_reason`` (see ``Completion``).
    """
    import pandas as pd

    answers = [chat(model, prompt, max_tokens) for prompt in prompts]
    rows = [
        (prompt, one.text, len(one.token_ids), one.finish_reason)
        for prompt, one in zip(prompts, answers, strict=True)
    ]
    return pd.DataFrame(rows, columns=["prompt", "answer", "tokens", "finish_reason"])


@dataclass(frozen=True)
class Repeat:
    """The same prompt answered twice; ``first_difference`` is the index of the first token that differs."""

    first: Completion
    second: Completion
    first_difference: int | None

    @property
    def same(self) -> bool:
        """Whether the tokens are the same."""
        return self.first_difference is None


def same_tokens_twice(model: Model, prompt: str, max_tokens: int = 64) -> Repeat:
    """Answer ``prompt`` twice greedily, each time from a cleared context, and compare token by token."""
    first, second = (chat(model, prompt, max_tokens) for _ in range(2))
    a, b = first.token_ids, second.token_ids
    differs = (i for i in range(max(len(a), len(b))) if a[i : i + 1] != b[i : i + 1])
    return Repeat(first, second, next(differs, None))


@dataclass(frozen=True)
class Spread:
    """Repeated measurements: their median, extremes, and the values in order of measurement."""

    median: float
    min: float
    max: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        return cls(median(values), min(values), max(values), tuple(values))


@dataclass(frozen=True)
class Speed:
    """Tokens a second: prefill of ``depth`` tokens at once, then decode of ``n_tokens`` one by one."""

    depth: int
    n_tokens: int
    repetitions: int
    n_threads: int
    prefill_tokens_per_sec: Spread
    decode_tokens_per_sec: Spread

    def rows(self) -> list[dict[str, Any]]:
        """One row for each of prefill and decode, ready for a DataFrame."""
        shared = {"depth": self.depth, "n_threads": self.n_threads, "repetitions": self.repetitions}
        return [
            {"phase": phase, **shared, "tokens": tokens, **asdict(spread)}
            for phase, tokens, spread in (
                ("prefill", self.depth, self.prefill_tokens_per_sec),
                ("decode", self.n_tokens, self.decode_tokens_per_sec),
            )
        ]


def measure_speed(
    model: Model, depth: int = 512, n_tokens: int = 128, repetitions: int = 5, seed: int = 42
) -> Speed:
    """Time prefill and teacher-forced decode on seeded random tokens, after a warm-up.

    The tokens are given, not chosen, so no sampling is timed; each repetition starts from a cleared context.

    Raises:
        ContextFullError: ``depth + n_tokens`` exceeds ``n_ctx``.
    """
    tokens = np.random.default_rng(seed).integers(0, model.n_vocab, depth + n_tokens).tolist()
    prompt, forced = tokens[:depth], tokens[depth:]
    if len(tokens) > model.settings.n_ctx:
        raise ContextFullError(
            f"{len(tokens):,} tokens exceed the context of {model.settings.n_ctx:,}",
            where=model.path,
            hint="lower the depth, or open the model with a larger n_ctx",
        )
    _time_once(model, prompt[:16], forced[:4])
    seconds = [_time_once(model, prompt, forced) for _ in range(repetitions)]
    model.clear()
    return Speed(
        depth,
        n_tokens,
        repetitions,
        model.settings.n_threads or 0,
        Spread.of([depth / prefill for prefill, _ in seconds]),
        Spread.of([n_tokens / decode for _, decode in seconds]),
    )


def _time_once(model: Model, prompt: Sequence[int], forced: Sequence[int]) -> tuple[float, float]:
    """Seconds of the prefill, and of the decode of all forced tokens.

    Tokens are handed to llama.cpp as llama-bench does it, so that Python's share of a token is small.
    """
    import llama_cpp

    model.clear()
    context = model.llama.ctx
    one = (llama_cpp.llama_token * 1)()
    batch = llama_cpp.llama_batch_get_one(one, 1)
    started = time.perf_counter()
    model.decode(prompt)
    llama_cpp.llama_synchronize(context)
    filled = time.perf_counter()
    for token in forced:
        one[0] = token
        if llama_cpp.llama_decode(context, batch):
            raise DecodeError(
                "llama.cpp fails while it is timed",
                where=model.path,
                hint="lower the depth, or n_ubatch if memory is short",
            )
        llama_cpp.llama_synchronize(context)
    return filled - started, time.perf_counter() - filled
