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
import random
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from families import FAMILIES, tasks
from model import fast_forward, new_model
from safetensors.torch import load_file, save_file
from tokenizer import Encoder, load, train_tokenizer

SEED, BIAS_STEP, INDEX_WEIGHT = 7, 2e-3, 0.2
# Schedules: a value from this progress on.
PROMPT_WEIGHT = ((0.0, 0.1), (0.25, 0.02), (0.85, 0.05))  # of a prompt's tokens
BATCH = ((0.0, 512), (0.15, 1024), (0.5, 2048))  # tokens of a micro-batch; each process has one a step
ROOM = (
    (0.0, 0),
    (0.12, 2),
    (0.22, 4),
    (0.35, 8),
    (0.62, 16),
    (0.76, 34),
    (0.88, 60),
)  # sentences of filler at most


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


def optimizers(parameters, peak: float) -> list[torch.optim.Optimizer]:
    matrices, rest = [], []
    for name, one in parameters:
        inner = "layers" in name and one.dim() == 2 and ("self_attn" in name or "shared" in name)
        (matrices if inner and "position_bias" not in name else rest).append(one)
    return [
        Muon(matrices, lr=peak * 10),
        torch.optim.AdamW(rest, lr=peak, betas=(0.9, 0.97), weight_decay=0.01),
    ]


def at(schedule, progress: float):
    """The value of a schedule's last step that has begun."""
    return [value for start, value in schedule if start <= progress][-1]


def batches(encoder: Encoder, progress: Callable[[], float], seed: int | str):
    """Micro-batches of documents of like length: ids and weights [documents, length], from a pool of 16 batches."""
    shuffle = random.Random(seed)
    drawn = tasks(seed, lambda: at(ROOM, progress()))
    source = (encoder.encode(one, at(PROMPT_WEIGHT, progress())) for one in drawn)
    while True:
        pool, held, tokens = [], 0, at(BATCH, progress())
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
            yield (
                torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows]),
                torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in rows]),
            )


def loss_of(model, ids, weights):
    logits, index, loads = fast_forward(model, ids, index_loss=True)
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weight = weights[:, 1:].flatten()
    weight = torch.where(weight == 1, 1 - torch.exp(-each.detach()), weight)
    sure = (logits[:, :-1].argmax(-1) == ids[:, 1:])[weights[:, 1:] == 1].float().mean()
    return (each * weight).sum() / weight.sum(), index, loads, sure


@torch.no_grad()
def balance(model, loads: list[torch.Tensor]) -> None:
    for block, one in zip(model.model.layers, loads, strict=True):
        if not block.mlp.is_hash:
            block.mlp.gate.e_score_correction_bias += BIAS_STEP * torch.sign(one.mean() - one)


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
    Path(fresh).replace(out / "model.safetensors")


class Team:
    """The processes that train one model, each with a micro-batch of a step, all in one shared memory.

    Each keeps gradients of its own, and updates its part of the parameters by the sum of all gradients. Tensors of
    floats: ``gradients`` [process][parameter], ``loads`` [process, layer, expert], ``facts`` [process, 5] (of the step:
    loss, indexer's loss, share of sure answer tokens, tokens; of the process: its part of the gradient's squared norm),
    ``held_out`` [family].
    """

    def __init__(self, model, size: int, barrier) -> None:
        config = model.config
        self.size, self.barrier = size, barrier
        self.gradients = [
            [torch.zeros_like(one).share_memory_() for one in model.parameters()] for _ in range(size)
        ]
        shape = (size, config.num_hidden_layers, config.n_routed_experts)
        self.loads = torch.zeros(shape).share_memory_()
        self.facts = torch.zeros(size, 5).share_memory_()
        self.held_out = torch.zeros(len(FAMILIES)).share_memory_()
        self.progress = torch.zeros((), dtype=torch.float64).share_memory_()

    def meet(self) -> None:
        """Wait for all; an error where one has died."""
        self.barrier.wait(timeout=1200)


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
    """One process's share in the training of a model."""

    def __init__(self, encoder: Encoder, model, team: Team, rank: int, progress: Progress, asked) -> None:
        self.encoder, self.model, self.team, self.rank, self.progress = encoder, model, team, rank, progress
        parameters = list(model.named_parameters())
        for (_, one), gradient in zip(parameters, team.gradients[rank], strict=True):
            one.grad = gradient
        mine = set(shares([one.numel() for _, one in parameters], team.size)[rank])
        self.mine = sorted(mine)
        self.tuners = optimizers([parameters[at] for at in self.mine], asked.peak)
        self.peaks = [one.param_groups[0]["lr"] for one in self.tuners]
        seed = SEED if asked.resume is None else f"{SEED} from {asked.resume}"
        self.source = batches(encoder, lambda: float(team.progress), f"{seed}, process {rank}")
        self.steps = 0
        self.recent: list[torch.Tensor] = []

    def step(self) -> None:
        """A micro-batch in each process, one update, and a step of the experts' balance."""
        team, model = self.team, self.model
        if self.rank == 0:
            team.progress.fill_(self.progress())
        ids, weights = next(self.source)
        loss, index, loads, sure = loss_of(model, ids, weights)
        (loss + INDEX_WEIGHT * index).backward()
        team.loads[self.rank] = torch.stack(loads).float()
        facts = (loss.detach(), index.detach(), sure, (weights > 0).sum())
        team.facts[self.rank, :4] = torch.tensor([float(one) for one in facts])
        team.meet()  # every gradient is there
        with torch.no_grad():
            for at in self.mine:
                own = team.gradients[self.rank][at]
                for other in range(team.size):
                    if other != self.rank:
                        own.add_(team.gradients[other][at])
                own.div_(team.size)
            norms = [team.gradients[self.rank][at].square().sum() for at in self.mine]
            team.facts[self.rank, 4] = torch.stack(norms).sum()
        team.meet()  # every norm is there
        clip = min(1.0, 1 / (float(team.facts[:, 4].sum().sqrt()) + 1e-6))
        share = rate(float(team.progress), self.steps)
        for tuner, peak in zip(self.tuners, self.peaks, strict=True):
            for group in tuner.param_groups:
                group["lr"] = peak * share
        for at in self.mine:
            team.gradients[self.rank][at].mul_(clip)
        for tuner in self.tuners:
            tuner.step()
        for gradient in team.gradients[self.rank]:
            gradient.zero_()
        if self.rank == 0:
            balance(model, list(team.loads.sum(0)))
            self.progress.done += int(team.facts[:, 3].sum())
            self.recent.append(team.facts[:, :3].mean(0))
        self.steps += 1
        team.meet()  # every parameter is new

    def summary(self) -> dict[str, float]:
        """Means since the last summary, and the load of the busiest expert over the mean load."""
        loss, index, sure = (round(float(one), 4) for one in torch.stack(self.recent).mean(0))
        self.recent = []
        worst = max(float(one.max() / one.mean()) for one in self.team.loads.sum(0)[1:])
        return {"loss": loss, "index_loss": index, "answer_tokens": sure, "worst_load": round(worst, 2),
                "progress": round(float(self.team.progress), 3)}  # fmt: skip

    def evaluate(self, n: int) -> dict[str, float]:
        """Held-out exact match of each family, on ``n`` questions with as much filler as is trained on now."""
        room = at(ROOM, float(self.team.progress))
        for number, name in enumerate(FAMILIES):
            if n and number % self.team.size == self.rank:
                self.team.held_out[number] = exact_match(self.model, self.encoder, name, n, room)
        self.team.meet()
        return {name: round(float(x), 4) for name, x in zip(FAMILIES, self.team.held_out, strict=True) if n}


def shares(sizes: list[int], n: int) -> list[list[int]]:
    """``n`` lists of places, their sizes' sums about equal: the largest first, each to the smallest sum.

    >>> shares([5, 1, 4], 2)
    [[0], [2, 1]]
    """
    made: list[list[int]] = [[] for _ in range(n)]
    for place in sorted(range(len(sizes)), key=lambda one: -sizes[one]):
        min(made, key=lambda one: sum(sizes[x] for x in one)).append(place)
    return made


def work(rank: int, asked: argparse.Namespace, encoder_path: Path, model, team: Team) -> None:
    """What each process does, from the first step to the last checkpoint."""
    torch.set_num_threads(asked.threads)
    encoder = Encoder(load(encoder_path))
    progress = Progress(asked.tokens, asked.minutes, asked.resume or 0.0)
    run = Trainer(encoder, model.train(), team, rank, progress, asked)

    def log(**facts) -> None:
        line = {"step": run.steps, "tokens": progress.done, "minutes": round(progress.minutes, 2), **facts}
        print(json.dumps(line), flush=True)
        with (asked.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    due, over = 1, False
    while not over:
        run.step()
        over = float(team.progress) >= 1
        checkpoint = float(team.progress) * asked.checkpoints >= due or over
        team.meet()  # before the progress changes again
        if rank == 0 and run.steps % 20 == 0:
            log(**run.summary())
        if checkpoint:
            due += 1
            held_out = run.evaluate(asked.evaluate)
            if rank == 0:
                save(model, asked.out)
                log(held_out=held_out, room=at(ROOM, float(team.progress)))
            team.meet()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=float, default=16e6)
    parser.add_argument("--minutes", type=float, default=110)
    parser.add_argument("--peak", type=float, default=2e-3)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2, help="on a GPU always 1")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument(
        "--resume", type=float, metavar="PROGRESS", help="go on from OUT's checkpoint, 0 to 1"
    )
    parser.add_argument(
        "--evaluate", type=int, default=20, help="held-out questions a family at a checkpoint"
    )
    asked = parser.parse_args()
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
        asked.processes = 1
    asked.out.mkdir(parents=True, exist_ok=True)
    _, model = fresh(asked.out) if asked.resume is None else restored(asked.out)
    context = torch.multiprocessing.get_context("spawn")
    team = Team(model.share_memory(), asked.processes, context.Barrier(asked.processes))
    given = (asked, asked.out / "tokenizer.json", model, team)
    if asked.processes == 1:
        work(0, *given)
    else:
        torch.multiprocessing.spawn(work, given, nprocs=asked.processes)


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
