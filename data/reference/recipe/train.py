"""Train DFQS-Nano from random weights: ``python train.py OUT --minutes 110 --tokens 12e6``.

Muon (Jordan, 2024, kellerjordan.github.io/posts/muon) for the attention's and shared experts' matrices, AdamW for
the rest; routed experts balanced by their selection bias (DeepSeek-V3, arXiv:2412.19437, section 2.1.2). Documents
of like length share a micro-batch, so little is padding. Length grows with progress, which is the larger of the
tokens' and the clock's share: a run that its token budget ends is reproducible, one that the clock ends is not.
What an answer has that was sure already teaches little, so its tokens count by how unlikely they still were (the
focal loss of Lin et al., arXiv:1708.02002, with exponent 1), and prompts, much of which is drawn at random and
cannot be known, count next to nothing once the wording is learnt.
OUT gets ``tokenizer.json``, ``model.safetensors`` (replaced at every checkpoint) and ``log.jsonl``; ``--resume`` goes
on from there, at the progress that is given.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from families import FAMILIES, tasks
from model import fast_forward, new_model
from tokenizer import Encoder, load, train_tokenizer

SEED, BIAS_STEP, INDEX_WEIGHT = 7, 2e-3, 0.2
PROMPT_WEIGHT = ((0.0, 0.1), (0.3, 0.02))  # of a prompt's tokens, from this progress on
ROOM = ((0.0, 2), (0.2, 6), (0.4, 16), (0.6, 34), (0.75, 60))  # sentences of filler from this progress on


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal by Newton-Schulz steps; for matrices [.., rows, columns]."""

    def __init__(self, params, lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for one in group["params"]:
                if one.grad is None:
                    continue
                held = self.state[one].setdefault("momentum", torch.zeros_like(one))
                held.lerp_(one.grad, 1 - group["momentum"])
                update = orthogonal(one.grad.lerp(held, group["momentum"]))
                one.mul_(1 - group["lr"] * 0.05)
                one.add_(update, alpha=-group["lr"] * max(1, one.shape[-2] / one.shape[-1]) ** 0.5)


def orthogonal(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def optimizers(model, peak: float) -> list[torch.optim.Optimizer]:
    matrices, rest = [], []
    for name, one in model.named_parameters():
        inner = "layers" in name and one.dim() == 2 and ("self_attn" in name or "shared" in name)
        (matrices if inner and "position_bias" not in name else rest).append(one)
    return [Muon(matrices, lr=peak * 7), torch.optim.AdamW(rest, lr=peak, betas=(0.9, 0.97), weight_decay=0.01)]


def at(schedule, progress: float):
    """The value of a schedule's last step that has begun."""
    return [value for start, value in schedule if start <= progress][-1]


def batches(encoder: Encoder, progress: Progress, tokens: int, seed: int | str):
    """Micro-batches of documents of like length: ids and weights [documents, length], from a pool of 16 batches."""
    shuffle = random.Random(seed)
    drawn = tasks(seed, lambda: at(ROOM, progress()))
    source = (encoder.encode(one, at(PROMPT_WEIGHT, progress())) for one in drawn)
    while True:
        pool, held = [], 0
        while held < tokens * 16:
            pool.append(next(source))
            held += len(pool[-1][0])
        pool.sort(key=lambda one: len(one[0]))
        made, rows = [], []
        for one in pool:
            if rows and len(one[0]) * (len(rows) + 1) > tokens:
                made.append(rows)
                rows = []
            rows.append(one)
        made.append(rows)
        shuffle.shuffle(made)
        for rows in made:
            longest = max(len(ids) for ids, _ in rows)
            yield (torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows]),
                   torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in rows]))


def loss_of(model, ids, weights):
    logits, index, loads = fast_forward(model, ids, index_loss=True)
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weight = weights[:, 1:].flatten()
    weight = torch.where(weight == 1, 1 - torch.exp(-each.detach()), weight)
    sure = (logits[:, :-1].argmax(-1) == ids[:, 1:])[weights[:, 1:] == 1].float().mean()
    return (each * weight).sum() / weight.sum(), index, loads, sure


@torch.no_grad()
def balance(model, loads) -> None:
    for block, load in zip(model.model.layers, loads, strict=True):
        if not block.mlp.is_hash:
            load = load.float()
            block.mlp.gate.e_score_correction_bias += BIAS_STEP * torch.sign(load.mean() - load)


@torch.no_grad()
def exact_match(model, encoder: Encoder, family: str, n: int, room: int) -> float:
    """Share of held-out questions whose every answer token is the most likely one (which is greedy decoding)."""
    right = 0
    for task in islice(tasks("evaluation", lambda: room, held_out=True, family=family), n):
        prompt = encoder.prompt(task)
        ids = torch.tensor([[*prompt, *encoder.text(task.turns[0][1]), encoder.eos]])
        likely = fast_forward(model, ids)[0][0].argmax(-1)
        right += bool((likely[len(prompt) - 1 : -1] == ids[0, len(prompt) :]).all())
    return right / n


def save(model, out: Path) -> None:
    fresh = out / "model.safetensors.new"
    save_file({name: one.contiguous() for name, one in model.state_dict().items()}, fresh)
    os.replace(fresh, out / "model.safetensors")


class Progress:
    """How far a run is, 0 to 1, by the larger share of its budget of tokens or of its clock."""

    def __init__(self, tokens: float, minutes: float, start: float = 0.0) -> None:
        self.tokens, self.limit, self.start, self.done = tokens, minutes, start, 0
        self._began = time.monotonic()

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self._began) / 60

    def __call__(self) -> float:
        spent = max(self.done / self.tokens, self.minutes / self.limit)
        return self.start + (1 - self.start) * min(1.0, spent)


def rate(progress: float, step: int) -> float:
    """Share of the peak learning rate: a short rise, level, then half a cosine from progress 0.4 on."""
    rise = min(1.0, (step + 1) / 60)
    fall = 0.5 * (1 + math.cos(math.pi * max(0.0, progress - 0.4) / 0.6))
    return rise * (0.03 + 0.97 * fall)


class Trainer:
    """A model, what tunes it, and what it learns from."""

    def __init__(self, encoder: Encoder, model, progress: Progress, peak: float, batch: int, seed: int | str) -> None:
        self.encoder, self.model, self.progress = encoder, model, progress
        self.tuners = optimizers(model, peak)
        self.peaks = [one.param_groups[0]["lr"] for one in self.tuners]
        self.source = batches(encoder, progress, batch, seed)
        self.steps = 0
        self.recent: list[tuple[float, ...]] = []
        self.loads: list = []

    def step(self) -> None:
        """Two micro-batches, one update, and a step of the experts' balance."""
        share = rate(self.progress(), self.steps)
        for tuner, peak in zip(self.tuners, self.peaks, strict=True):
            for group in tuner.param_groups:
                group["lr"] = peak * share
        loads = [self._learn(ids, weights) for ids, weights in islice(self.source, 2)]
        self.loads = [sum(layer) for layer in zip(*loads, strict=True)]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for tuner in self.tuners:
            tuner.step()
            tuner.zero_grad(set_to_none=True)
        balance(self.model, self.loads)
        self.steps += 1

    def _learn(self, ids: torch.Tensor, weights: torch.Tensor) -> list:
        loss, index, loads, sure = loss_of(self.model, ids, weights)
        (loss / 2 + INDEX_WEIGHT * index / 2).backward()
        self.progress.done += int((weights > 0).sum())
        self.recent.append((float(loss.detach()), float(index.detach()), float(sure)))
        return loads

    def summary(self) -> dict[str, float]:
        """Means since the last summary, and the load of the busiest expert over the mean load."""
        loss, index, sure = (round(sum(x) / len(x), 4) for x in zip(*self.recent, strict=True))
        self.recent = []
        worst = max(float(x.max() / x.float().mean()) for x in self.loads[1:])
        return {"loss": loss, "index_loss": index, "answer_tokens": sure, "worst_load": round(worst, 2),
                "progress": round(self.progress(), 3)}  # fmt: skip

    def evaluate(self, n: int) -> dict[str, float]:
        """Held-out exact match of each family, on ``n`` questions with as much filler as is trained on now."""
        room = at(ROOM, self.progress())
        return {name: exact_match(self.model, self.encoder, name, n, room) for name in FAMILIES if n}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=float, default=12e6)
    parser.add_argument("--minutes", type=float, default=110)
    parser.add_argument("--batch", type=int, default=2048, help="tokens of a micro-batch; two make a step")
    parser.add_argument("--peak", type=float, default=3e-3)
    parser.add_argument("--every", type=float, default=4, help="minutes between checkpoints")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", type=float, metavar="PROGRESS", help="go on from OUT's checkpoint, 0 to 1")
    parser.add_argument("--evaluate", type=int, default=20, help="held-out questions a family at a checkpoint")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    asked.out.mkdir(parents=True, exist_ok=True)
    encoder, model = fresh(asked.out) if asked.resume is None else restored(asked.out)
    progress = Progress(asked.tokens, asked.minutes, asked.resume or 0.0)
    seed = SEED if asked.resume is None else f"{SEED} from {asked.resume}"
    run = Trainer(encoder, model.train(), progress, asked.peak, asked.batch, seed)

    def log(**facts) -> None:
        line = {"step": run.steps, "tokens": progress.done, "minutes": round(progress.minutes, 2), **facts}
        print(json.dumps(line), flush=True)
        with (asked.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    saved = progress.minutes
    while progress() < 1:
        run.step()
        if run.steps % 20 == 0:
            log(**run.summary())
        if progress.minutes - saved > asked.every or progress() >= 1:
            save(model, asked.out)
            log(held_out=run.evaluate(asked.evaluate), room=at(ROOM, progress()))
            saved = progress.minutes


def fresh(out: Path):
    """A new tokenizer, kept in ``out``, and random weights."""
    tokenizer = train_tokenizer()
    tokenizer.save(str(out / "tokenizer.json"))
    return Encoder(tokenizer), new_model(tokenizer.get_vocab_size(), SEED)


def restored(out: Path):
    """The encoder and model of a finished or stopped run."""
    tokenizer = load(out / "tokenizer.json")
    model = new_model(tokenizer.get_vocab_size(), SEED)
    model.load_state_dict(load_file(out / "model.safetensors"))
    return Encoder(tokenizer), model.eval()


if __name__ == "__main__":
    main()
