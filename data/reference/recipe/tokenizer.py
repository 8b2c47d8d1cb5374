"""Byte-level BPE with a small vocabulary, trained on the task families; digits stay single."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from families import Task, tasks
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 768
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
SPECIAL = (BOS, EOS, USER, ASSISTANT)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\n"
    "{% elif m['role'] == 'user' %}" + USER + "{{ m['content'] }}{% else %}" + ASSISTANT + "{{ m['content'] }}"
    + EOS + "{% endif %}{% endfor %}{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)  # fmt: skip


def train_tokenizer(n_tasks: int = 6000, size: int = VOCABULARY) -> Tokenizer:
    """A tokenizer of ``size`` tokens; special ones come last, as in the files of this model.

    ``tokenizer.ggml.pre = gpt-2`` is what llama.cpp calls the pre-tokenizer: the ``ByteLevel`` regular expression.
    Splitting digits first, while the merges are learnt, keeps every merge free of digits.
    """
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level])
    tokenizer.decoder = decoders.ByteLevel()
    texts = [
        text
        for task in islice(tasks("tokenizer", lambda: 6), n_tasks)
        for turn in task.turns
        for text in turn
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIAL), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = level
    tokenizer.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in SPECIAL])
    return tokenizer


def load(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path))


class Encoder:
    """Tasks as token ids with a weight for each token to be predicted."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.bos, self.eos, self.user, self.assistant = (tokenizer.token_to_id(one) for one in SPECIAL)

    def text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def prompt(self, task: Task) -> list[int]:
        """What is evaluated before the first answer."""
        ask = self.text(task.turns[0][0])
        return [self.bos, self.user, *ask, self.assistant] if task.chat else [self.bos, *ask]

    def encode(self, task: Task, prompt_weight: float = 0.1) -> tuple[list[int], list[float]]:
        """Ids of the whole task, and the weight of each: answers and their end 1, prompts less, BOS 0."""
        ids, weights = [self.bos], [0.0]

        def add(tokens: Sequence[int], weight: float) -> None:
            ids.extend(tokens)
            weights.extend([weight] * len(tokens))

        for ask, answer in task.turns:
            if task.chat:
                add([self.user], 0.0)
            add(self.text(ask), prompt_weight)
            if task.chat:
                add([self.assistant], 0.0)
            add([*self.text(answer), self.eos], 1.0)
        return ids, weights
