"""Batches of documents, drawn and tokenized by worker processes while the model trains."""

from __future__ import annotations

import multiprocessing
import os
import queue
import random
from collections.abc import Callable, Iterator

import numpy as np
from families import tasks
from tokenizer import Encoder

# lengths of batches: few, so that a GPU can keep the work of each as a graph; longer ones are multiples of 64
LENGTHS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1088)
POOL = 6  # batches that are sorted by length together: fewer mix lengths, more save padding
# Schedules: a value from this progress on.
PROMPT_WEIGHT = ((0.0, 0.1), (0.1, 0.04), (0.7, 0.1))  # of a prompt's tokens
# sentences of filler at most
ROOM = ((0.0, 0), (0.08, 2), (0.14, 4), (0.2, 8), (0.4, 16), (0.52, 34), (0.64, 60))

Batch = tuple[np.ndarray, np.ndarray]  # ids (int16) and weights (float16), both [documents, length]


def at(schedule, progress: float):
    """The value of a schedule's last step that has begun."""
    return [value for start, value in schedule if start <= progress][-1]


def rounded(length: int) -> int:
    """The length of a batch whose longest document has ``length`` tokens."""
    return next((n for n in LENGTHS if n >= length), -(-length // 64) * 64)


def padded(documents: list[tuple[list[int], list[float]]]) -> Batch:
    """The documents as rows of one length."""
    length = rounded(max(len(ids) for ids, _ in documents))
    ids = np.zeros((len(documents), length), dtype=np.int16)
    weights = np.zeros((len(documents), length), dtype=np.float16)
    for row, (tokens, of_tokens) in enumerate(documents):
        ids[row, : len(tokens)], weights[row, : len(tokens)] = tokens, of_tokens
    return ids, weights


def batches(encoder: Encoder, progress: Callable[[], float], tokens: int, seed: str) -> Iterator[Batch]:
    """Batches of documents of like length, of at most ``tokens`` tokens with padding."""
    shuffle = random.Random(seed)
    source = tasks(seed, lambda: at(ROOM, progress()))
    while True:
        pool, n_drawn = [], 0
        while n_drawn < tokens * POOL:
            pool.append(encoder.encode(next(source), at(PROMPT_WEIGHT, progress())))
            n_drawn += len(pool[-1][0])
        pool.sort(key=lambda document: -len(document[0]))
        made, rows = [], []
        for document in pool:
            if rows and rounded(len(rows[0][0])) * (len(rows) + 1) > tokens:
                made.append(rows)
                rows = []
            rows.append(document)  # the last rows, short ones, are too few for a batch
        shuffle.shuffle(made)
        yield from map(padded, made)


class Workers:
    """Batches from ``n`` processes; call ``start`` before the first use of a GPU, since they are forks.

    With ``n`` 0 this process draws, and a run that its token budget ends is reproducible.
    """

    def __init__(self, encoder: Encoder, n: int, tokens: int, seed: str) -> None:
        context = multiprocessing.get_context("fork")
        self._progress = context.Value("d", 0.0, lock=False)
        self._own = None if n else batches(encoder, self.progress, tokens, seed)
        self._made = context.Queue(maxsize=max(1, 3 * n))
        given = [(encoder, tokens, f"{seed}, worker {number}") for number in range(n)]
        self._team = [context.Process(target=self._work, args=one, daemon=True) for one in given]

    def start(self) -> None:
        for process in self._team:
            process.start()

    def progress(self) -> float:
        return self._progress.value

    def _work(self, encoder: Encoder, tokens: int, seed: str) -> None:
        parent = os.getppid()
        for batch in batches(encoder, self.progress, tokens, seed):
            while True:
                try:
                    self._made.put(batch, timeout=10)
                    break
                except queue.Full:
                    if os.getppid() != parent:
                        return

    def next(self, progress: float) -> Batch:
        """The next batch; ``progress`` is what new documents are drawn by."""
        self._progress.value = progress
        return next(self._own) if self._own else self._made.get(timeout=300)

    def stop(self) -> None:
        for process in self._team:
            process.kill()
