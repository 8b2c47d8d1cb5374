"""Train DFQS-Nano from random weights: ``python train.py OUT --minutes 8``, on a GPU where there is one.

Muon (Jordan, 2024, kellerjordan.github.io/posts/muon) for the attention's and shared experts' matrices, AdamW for
the rest; routed experts balanced by their selection bias (DeepSeek-V3, arXiv:2412.19437, section 2.1.2). Length grows
with progress, which is the larger of the tokens' and the clock's share. What an answer has that was sure already
teaches little, so its tokens count by how unlikely they still were (the focal loss of Lin et al., arXiv:1708.02002,
with exponent 1), and prompts, much of which is drawn at random and cannot be known, count little.
OUT gets ``tokenizer.json``, ``log.jsonl`` and, replaced at every checkpoint, ``model-1.safetensors`` and
``model-2.safetensors``: the weights as the exported F16 file has them. ``--resume`` goes on from there, at the
progress that is given. A run that gets SIGTERM writes a checkpoint and ends.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import signal
import time
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from batches import ROOM, Workers, at, padded
from families import FAMILIES, tasks
from model import fast_forward, fuse, new_model
from safetensors.torch import load_file, save_file
from tokenizer import Encoder, load, train_tokenizer

SEED, BIAS_STEP, INDEX_WEIGHT, LOG_EVERY = 7, 2e-3, 0.2, 50
KEPT_F32 = re.compile(r"norm|position_bias|_hc\.|hc_head|mlp\.gate\.|sinks")  # as in export.py


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal by Newton-Schulz steps; for matrices, those of one shape in one product."""

    def __init__(self, params, lr: float, momentum: float = 0.95) -> None:
        by_shape: dict[torch.Size, list] = {}
        for matrix in params:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        super().__init__([{"params": group} for group in by_shape.values()], {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            gradient, share = torch.stack([matrix.grad for matrix in group["params"]]), group["momentum"]
            momentum = self.state[group["params"][0]].setdefault("momentum", torch.zeros_like(gradient))
            momentum.lerp_(gradient, 1 - share)
            rows, columns = gradient.shape[-2:]
            update = orthogonal(gradient.lerp(momentum, share)) * (
                group["lr"] * max(1, rows / columns) ** 0.5
            )
            torch._foreach_mul_(group["params"], 1 - group["lr"] * 0.05)  # decay
            torch._foreach_sub_(group["params"], list(update.unbind()))


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
    for name, parameter in model.named_parameters():
        inner = "layers" in name and parameter.dim() == 2 and ("self_attn" in name or "shared" in name)
        (matrices if inner and "position_bias" not in name else rest).append(parameter)
    on_gpu = rest[0].is_cuda
    # on a GPU the rates are tensors, which a captured graph reads anew
    rates = [torch.tensor(x, device=rest[0].device) if on_gpu else x for x in (peak * 10, peak)]
    adam = torch.optim.AdamW(
        rest, lr=rates[1], betas=(0.9, 0.97), weight_decay=0.01, fused=on_gpu, capturable=on_gpu
    )
    return [Muon(matrices, lr=rates[0]), adam]


def loss_of(model, ids: torch.Tensor, weights: torch.Tensor):
    """Loss, the indexer's loss, tokens by expert of each layer, and the share of answer tokens that are right."""
    logits, index, loads = fast_forward(model, ids, index_loss=True)
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weight = weights[:, 1:].flatten()
    answer = weight == 1
    weight = torch.where(answer, 1 - torch.exp(-each.detach()), weight)
    right = (logits[:, :-1].argmax(-1) == ids[:, 1:]).flatten() & answer
    return (each * weight).sum() / weight.sum(), index, loads, right.sum() / answer.sum()


@torch.no_grad()
def balance(model, loads: list[torch.Tensor]) -> None:
    for block, counts in zip(model.model.layers, loads, strict=True):
        if not block.mlp.is_hash:
            mean = counts.float().mean()
            block.mlp.gate.e_score_correction_bias += BIAS_STEP * torch.sign(mean - counts)


@torch.no_grad()
def exact_match(model, encoder: Encoder, family: str, n: int, room: int) -> float:
    """Share of held-out questions whose every answer token is the most likely one (which is greedy decoding)."""
    documents = []
    for task in islice(tasks("evaluation", lambda: room, held_out=True, family=family), n):
        prompt, answer = encoder.prompt(task), [*encoder.text(task.turns[0][1]), encoder.eos]
        documents.append(([*prompt, *answer], [0.0] * len(prompt) + [1.0] * len(answer)))
    right, device = 0, model.lm_head.weight.device
    for first in range(0, n, 20):
        ids, asked = (torch.from_numpy(x).to(device) for x in padded(documents[first : first + 20]))
        likely = fast_forward(model, ids.long())[0][:, :-1].argmax(-1)
        right += int(((likely == ids[:, 1:]) | (asked[:, 1:] == 0)).all(1).sum())
    return right / n


def save(model, out: Path) -> None:
    """The weights in two files of about 15 MB, each tensor as the exported F16 file has it."""
    parts: list[dict[str, torch.Tensor]] = [{}, {}]
    for name, tensor in model.state_dict().items():
        halve = tensor.is_floating_point() and tensor.dim() > 1 and not KEPT_F32.search(name)
        part = min(parts, key=lambda part: sum(held.nbytes for held in part.values()))
        part[name] = (tensor.half() if halve else tensor).cpu().contiguous()
    fresh = [out / f"model-{number}.safetensors.new" for number in (1, 2)]
    for path, part in zip(fresh, parts, strict=True):
        save_file(part, path)
    for path in fresh:
        path.replace(path.with_suffix(""))


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
    rise = min(1.0, (step + 1) / 100)
    fall = 0.5 * (1 + math.cos(math.pi * max(0.0, progress - 0.4) / 0.6))
    return rise * (0.03 + 0.97 * fall)


class Trainer:
    """A model in training. All gradients are views of one vector, so to clip them is one product.

    With ``graphs``, a GPU's work for a batch of one shape is captured at its third use, and replayed from then on:
    a step is thousands of small kernels, which take longer to launch one by one than to run.
    """

    def __init__(self, model, source: Workers, progress: Progress, peak: float, graphs: bool = False) -> None:
        self.model, self.source, self.progress, self.peak = model, source, progress, peak
        self.device = model.lm_head.weight.device
        self.use_graphs = graphs and self.device.type == "cuda"
        parameters = list(model.parameters())
        self.gradient = torch.zeros(sum(x.numel() for x in parameters), device=self.device)
        for parameter, part in zip(
            parameters, self.gradient.split([x.numel() for x in parameters]), strict=True
        ):
            parameter.grad = part.view_as(parameter)
        self.steps, self.recent, self.loads = 0, [], []
        self._begin()

    def _begin(self) -> None:
        """Optimizers without a past, no captured work, and a copy of the weights to go back to."""
        self.tuners = optimizers(self.model, self.peak)
        self.peaks = [float(tuner.param_groups[0]["lr"]) for tuner in self.tuners]
        self.uses, self.graphs, self.pool = {}, {}, None
        self.safe = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def step(self) -> None:
        """One batch, one update, and a step of the experts' balance; a GPU is never waited for."""
        progress = self.progress()
        ids, weights = (torch.from_numpy(x) for x in self.source.next(progress))
        self.progress.done += int((weights > 0).sum())
        if self.device.type == "cuda":  # from memory that stays in place, so that the copy waits for nothing
            ids, weights = (x.pin_memory().to(self.device, non_blocking=True) for x in (ids, weights))
        share = rate(progress, self.steps)
        for tuner, peak in zip(self.tuners, self.peaks, strict=True):
            for group in tuner.param_groups:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(peak * share)
                else:
                    group["lr"] = peak * share
        self.recent.append(self._run(ids.long(), weights.float()).clone())
        self.steps += 1

    def _run(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`_update`, from its graph where this shape has one."""
        shape = tuple(ids.shape)
        self.uses[shape] = self.uses.get(shape, 0) + 1
        if not self.use_graphs or self.uses[shape] < 3:
            return self._update(ids, weights)
        if shape not in self.graphs:
            given, graph = (ids.clone(), weights.clone()), torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, pool=self.pool, stream=torch.cuda.current_stream()):
                facts = self._update(*given)
            self.pool = self.pool or graph.pool()
            self.graphs[shape] = (graph, given, facts, self.loads)
        graph, given, facts, self.loads = self.graphs[shape]
        given[0].copy_(ids)
        given[1].copy_(weights)
        graph.replay()
        return facts

    def _update(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The work of a step; loss, the indexer's loss, share of right answer tokens, the gradient's norm."""
        loss, index, self.loads, right = loss_of(self.model, ids, weights)
        (loss + INDEX_WEIGHT * index).backward()
        norm = self.gradient.norm()
        # a gradient that is not finite changes nothing
        factor = torch.where(norm.isfinite(), (1 / (norm + 1e-6)).clamp(max=1.0), 0.0)
        torch.nan_to_num_(self.gradient, 0.0, 0.0, 0.0).mul_(factor)
        for tuner in self.tuners:
            tuner.step()
        self.gradient.zero_()
        balance(self.model, self.loads)
        return torch.stack([loss.detach(), index.detach(), right, norm])

    def summary(self) -> dict[str, float]:
        """Means since the last summary, and the load of the busiest expert over the mean load."""
        loss, index, right, norm = (round(float(x), 4) for x in torch.stack(self.recent).mean(0))
        self.recent = []
        worst = max(float(counts.max() / counts.float().mean()) for counts in self.loads[1:])
        facts = {"loss": loss, "index_loss": index, "answer_tokens": right, "norm": norm, "worst_load": worst,
                 "progress": self.progress()}  # fmt: skip
        if math.isfinite(loss) and all(x.isfinite().all() for x in self.model.parameters()):
            self.safe = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        else:  # back to the last summary's weights, with half the learning rate
            self.model.load_state_dict(self.safe)
            self.peak /= 2
            self._begin()
            facts["went_back"] = True
        return facts


def run(asked: argparse.Namespace, encoder: Encoder, model, source: Workers) -> None:
    """Train, log, and write checkpoints until the budget is spent or SIGTERM comes."""
    progress = Progress(asked.tokens, asked.minutes, asked.resume or 0.0)
    trainer, ends = Trainer(model.train(), source, progress, asked.peak, asked.graphs), []
    signal.signal(signal.SIGTERM, lambda *_: ends.append(True))

    def log(**facts) -> None:
        line = {
            "step": trainer.steps,
            "tokens": progress.done,
            "minutes": round(progress.minutes, 3),
            **facts,
        }
        print(json.dumps(line), flush=True)
        with (asked.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def held_out(n: int, room: int) -> None:
        if n:
            found = {name: exact_match(model, encoder, name, n, room) for name in FAMILIES}
            log(held_out=found, n=n, room=room)

    due = progress.minutes + asked.save_every
    while not (ends or progress() >= 1):
        trainer.step()
        if trainer.steps % LOG_EVERY == 0:
            log(**trainer.summary())
        if progress.minutes >= due:
            save(model, asked.out)
            held_out(asked.evaluate, at(ROOM, progress()))
            due = progress.minutes + asked.save_every
    if trainer.recent:
        log(**trainer.summary())
    save(model, asked.out)
    log(saved=True, stopped=bool(ends))
    if not ends:
        held_out(5 * asked.evaluate, ROOM[-1][1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=float, default=1e9, help="budget; the clock may end the run before")
    parser.add_argument("--minutes", type=float, default=110)
    parser.add_argument("--peak", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--batch", type=int, help="tokens of a step; 16384 on a GPU, else 2048")
    parser.add_argument("--workers", type=int, help="processes that draw documents; 8 on a GPU, else 0")
    parser.add_argument("--threads", type=int, default=2, help="of this process")
    parser.add_argument("--fuse", action="store_true", help="compile a part of the model")
    parser.add_argument("--graphs", action="store_true", help="capture a GPU's work for each shape of batch")
    parser.add_argument("--save-every", type=float, default=1.0, metavar="MINUTES")
    parser.add_argument(
        "--evaluate", type=int, default=20, help="held-out questions a family at a checkpoint"
    )
    parser.add_argument(
        "--resume", type=float, metavar="PROGRESS", help="go on from OUT's checkpoint, 0 to 1"
    )
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.device_count() else "cpu"
    torch.set_num_threads(asked.threads)
    asked.out.mkdir(parents=True, exist_ok=True)
    encoder, model = fresh(asked.out) if asked.resume is None else restored(asked.out)
    workers = asked.workers if asked.workers is not None else 8 * (device == "cuda")
    seed = f"{SEED}" if asked.resume is None else f"{SEED} from {asked.resume}"
    source = Workers(encoder, workers, asked.batch or (16384 if device == "cuda" else 2048), seed)
    source.start()
    torch.backends.cuda.matmul.allow_tf32 = True
    if asked.fuse:
        fuse()
    model = model.to(device)
    stream = torch.cuda.Stream() if asked.graphs and device == "cuda" else None
    try:
        with torch.cuda.stream(stream):  # a graph is captured on the stream that the other steps use
            run(asked, encoder, model, source)
    finally:
        source.stop()


def fresh(out: Path):
    """A new tokenizer, kept in ``out``, and random weights."""
    tokenizer = train_tokenizer()
    tokenizer.save(str(out / "tokenizer.json"))
    return Encoder(tokenizer), new_model(tokenizer.get_vocab_size(), SEED)


def restored(out: Path):
    """The encoder and model of a finished or stopped run."""
    tokenizer = load(out / "tokenizer.json")
    model = new_model(tokenizer.get_vocab_size(), SEED)
    weights = {**load_file(out / "model-1.safetensors"), **load_file(out / "model-2.safetensors")}
    model.load_state_dict(weights)  # into f32, whatever the file has
    return Encoder(tokenizer), model.eval()


if __name__ == "__main__":
    main()
