"""The tiny model, and a faster forward pass for its training: same weights, same numbers, on a CPU or a GPU.

``fast_forward`` differs from transformers' in four ways. Window attention is computed in blocks, not over all
pairs. Tokens are sorted by expert into blocks of one expert each, so all experts are one batched product, and a GPU
never waits to learn how many tokens an expert has. Rotary angles are computed without a matrix product, which a GPU
may round. And it returns what trains the indexer: in the model itself the indexer only picks entries, by ``topk``,
so no gradient reaches its weights; as in DeepSeek-V3.2 (arXiv:2512.02556, section 2.1) it learns from the
Kullback-Leibler divergence between its scores' softmax and the attention that the heads give to the compressed
entries.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

RATIOS = (0, 4, 128, 4)
N_STREAMS = 4
# Queries and keys are normalized, so a score is at most the root of the head's size (8 here) times the keys' gain:
# with a gain of 1 attention starts too flat to find a single token, and learns to only slowly.
KEY_GAIN = 2.0
BLOCK = {"cpu": 64, "cuda": 256}  # rows of one expert in a batched product
KINDS = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}


def new_model(vocabulary: int, seed: int, **changes) -> DeepseekV4ForCausalLM:
    """Random weights; streams that begin as almost separate residuals; a balanced random hash table."""
    sizes = {
        "hidden_size": 256, "moe_intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64, "q_lora_rank": 128,
        "num_experts_per_tok": 2, "n_routed_experts": 16, "o_groups": 2, "o_lora_rank": 64, "index_n_heads": 4,
        "index_head_dim": 64, "index_topk": 64, "sliding_window": 64, "partial_rotary_factor": 0.5,
        "hc_mult": N_STREAMS, "hc_sinkhorn_iters": 4, "initializer_range": 0.05, "max_position_embeddings": 65536,
    } | changes  # fmt: skip
    torch.manual_seed(seed)
    config = DeepseekV4Config(
        vocab_size=vocabulary, num_hidden_layers=len(RATIOS), layer_types=[KINDS[one] for one in RATIOS],
        mlp_layer_types=["hash_moe"] + ["moe"] * (len(RATIOS) - 1), attn_implementation="eager", **sizes)  # fmt: skip
    model = DeepseekV4ForCausalLM(config)
    with torch.no_grad():
        for block in model.model.layers:
            for site in (block.attn_hc, block.ffn_hc):
                site.fn.mul_(0.4)
                site.base[8:] += 2 * torch.eye(4).flatten()
        for name, one in model.named_parameters():
            if re.search(r"self_attn\.(compressor\.)?kv_norm\.weight", name):
                one.fill_(KEY_GAIN)
        _look_back(model)
        table, n = model.model.layers[0].mlp.gate.tid2eid, config.n_routed_experts
        first = torch.randperm(vocabulary) % n
        table.copy_(torch.stack([first, (first + 1 + torch.randint(n - 1, (vocabulary,))) % n], dim=1))
    return model


def _look_back(model: DeepseekV4ForCausalLM) -> None:
    """Let the first layer's first three heads begin by attending to the tokens one, two and three before.

    To find what followed a word, keys must know what stood before them. Found by chance that takes longer than all of
    the rest. All embeddings get one number in common, of which the keys take a constant and these heads' queries the
    same constant, turned as rotary embedding turns it in one to three tokens.
    """
    at, size, turn = (
        model.model.layers[0].self_attn,
        model.config.head_dim,
        model.model.rotary_emb.main_inv_freq,
    )
    model.model.embed_tokens.weight[:, 0] = 0.46
    at.q_a_proj.weight[0] = 0.0
    at.q_a_proj.weight[0, 0] = 1.0
    for pair, share in enumerate((0.45, 0.3, 0.15, 0.1)):
        row = size - 2 * len(turn) + 2 * pair
        at.kv_proj.weight[row : row + 2] = 0.0
        at.kv_proj.weight[row, 0] = 0.75 * share**0.5
        for head, back in enumerate((1, 2, 3)):
            angle = -turn[pair] * back
            at.q_b_proj.weight[head * size + row : head * size + row + 2, 0] = (
                0.96 * share**0.5 * torch.stack([angle.cos(), angle.sin()])
            )


def fast_forward(model: DeepseekV4ForCausalLM, ids: Tensor, index_loss: bool = False
                 ) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Logits of right-padded ``ids`` [batch, length], the indexers' loss, and tokens by expert of each layer."""
    core = model.model
    x = core.embed_tokens(ids)
    rope = {kind: _angles(core.rotary_emb, kind, ids) for kind in ("main", "compress")}
    streams = x.unsqueeze(2).expand(-1, -1, model.config.hc_mult, -1).contiguous()
    loss, loads = x.new_zeros(()), []
    for block in core.layers:
        post, comb, inner = _enter(block.attn_hc, streams)
        out, of_layer = _attention(block.self_attn, block.input_layernorm(inner), rope, index_loss)
        loss = loss + of_layer
        streams = _leave(post, comb, out, streams)
        post, comb, inner = _enter(block.ffn_hc, streams)
        out, load = _experts(block.mlp, block.post_attention_layernorm(inner), ids)
        loads.append(load)
        streams = _leave(post, comb, out, streams)
    return model.lm_head(core.norm(core.hc_head(streams))), loss, loads


def _angles(rotary, kind: str, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine [length, rotary size] of every position; each angle stands twice, for a pair of numbers."""
    position = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)
    angles = position[:, None] * getattr(rotary, f"{kind}_inv_freq")
    angles = torch.stack([angles, angles], dim=-1).flatten(-2)
    return angles.cos(), angles.sin()


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the last numbers of ``x`` [batch, length, (heads,) size]."""
    if x.dim() == 4:
        cos, sin = cos[:, None], sin[:, None]
    plain, pairs = x.split((x.shape[-1] - cos.shape[-1], cos.shape[-1]), dim=-1)
    across = torch.stack([-pairs[..., 1::2], pairs[..., 0::2]], dim=-1).flatten(-2)
    return torch.cat([plain, pairs * cos + across * sin], dim=-1)


class _Fused:
    """A function, in few loops that torch compiles where ``on`` is set; as it is where that fails, or to evaluate."""

    on = False

    def __init__(self, function) -> None:
        self.plain, self.compiled = function, None

    def __call__(self, *given):
        if not (_Fused.on and torch.is_grad_enabled()):
            return self.plain(*given)
        try:
            self.compiled = self.compiled or torch.compile(self.plain, dynamic=True)
            return self.compiled(*given)
        except Exception as error:  # whatever a compiler may raise
            print(f"not compiled: {type(error).__name__}: {str(error)[:300]}", flush=True)
            _Fused.on = False
            return self.plain(*given)


def fuse() -> None:
    """Compile what surrounds the products of the hyper-connections; needs a C++ compiler."""
    _Fused.on = True


def _enter(site, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A hyper-connection's shares for leaving, its mixing matrix, and the one stream [batch, length, size] within."""
    return _shares(
        streams, site.fn, site.base, site.scale, site.input_norm.eps, site.hc_eps, site.hc_sinkhorn_iters
    )


@_Fused
def _shares(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float, rounds: int
            ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n, flat = N_STREAMS, streams.flatten(2)
    raw = F.linear(flat, fn) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    pre = torch.sigmoid(raw[..., :n] * scale[0] + base[:n]) + eps
    post = 2 * torch.sigmoid(raw[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = (raw[..., 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n)).softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(rounds - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return post, comb, (pre.unsqueeze(-1) * streams).sum(2)


@_Fused
def _leave(post: Tensor, comb: Tensor, out: Tensor, streams: Tensor) -> Tensor:
    """The streams after a block: its output by shares, and what was there, mixed."""
    return post.unsqueeze(-1) * out.unsqueeze(-2) + (comb.unsqueeze(-1) * streams.unsqueeze(3)).sum(2)


def _experts(moe, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    flat, block = x.reshape(-1, x.shape[-1]), BLOCK[x.device.type]
    _, weights, chosen = moe.gate(x, ids) if moe.is_hash else moe.gate(x)
    experts, (n_tokens, used) = moe.experts, chosen.shape
    slot, expert_of_block, load = _slots(chosen.flatten(), experts.num_experts, block)
    rows = flat.new_zeros(len(expert_of_block) * block, flat.shape[1])
    rows = rows.index_copy(0, slot, flat.unsqueeze(1).expand(-1, used, -1).flatten(0, 1))
    rows = rows.view(-1, block, flat.shape[1])
    up = experts.gate_up_proj.index_select(0, expert_of_block)
    down = experts.down_proj.index_select(0, expert_of_block)
    out = experts._apply_gate(rows @ up.mT) @ down.mT
    out = out.flatten(0, 1).index_select(0, slot).view(n_tokens, used, -1)
    return (out * weights[..., None]).sum(1).view_as(x) + moe.shared_experts(x), load


def _slots(chosen: Tensor, n_experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """A row for each choice, the expert of each block of rows, and choices by expert; no block has two experts.

    How many blocks there are does not depend on the choices, so that a GPU's size of work is known beforehand.

    >>> slot, expert_of_block, load = _slots(torch.tensor([1, 0, 1, 1]), 2, 2)
    >>> slot.tolist(), expert_of_block.tolist(), load.tolist()
    ([2, 0, 3, 4], [0, 1, 1, 1], [1, 3])
    """
    expert = torch.arange(n_experts, device=chosen.device)
    load = (chosen[:, None] == expert).sum(0)
    ends = ((load + block - 1) // block * block).cumsum(0)
    order = chosen.argsort(stable=True)
    sorted_expert = chosen[order]
    start = ends - (load + block - 1) // block * block - (load.cumsum(0) - load)
    slot = torch.empty_like(chosen)
    slot[order] = start[sorted_expert] + torch.arange(len(chosen), device=chosen.device)
    blocks = torch.arange(-(-len(chosen) // block) + n_experts, device=chosen.device) * block
    expert_of_block = (blocks[:, None] >= ends).sum(1).clamp(max=n_experts - 1)
    return slot, expert_of_block, load


def _attention(at, x: Tensor, rope: dict, index_loss: bool) -> tuple[Tensor, Tensor]:
    batch, length, _ = x.shape
    heads, size, window = at.num_heads, at.head_dim, at.sliding_window
    cos, sin = rope[at.rope_layer_type]
    residual = at.q_a_norm(at.q_a_proj(x))
    q = at.q_b_norm(at.q_b_proj(residual).view(batch, length, heads, size))
    q = _turned(q, cos, sin) * at.scaling
    kv = _turned(at.kv_norm(at.kv_proj(x)), cos, sin)
    near, near_values = _window_scores(q, kv, window)
    scores, loss, far = [near], x.new_zeros(()), None
    rate = getattr(at.compressor, "compress_rate", length + 1)
    if length >= rate:
        far = _compress(at.compressor, x, rope["compress"])  # [batch, entries, size]
        raw = torch.einsum("blhd,bed->blhe", q, far)
        entry = torch.arange(far.shape[1], device=x.device)
        closed = entry >= (torch.arange(length, device=x.device)[:, None] + 1) // rate  # [length, entries]
        if rate == 4:
            indexer = at.compressor.indexer
            index = _index_scores(indexer, x.detach(), residual.detach(), rope["compress"])
            index = index.masked_fill(closed, float("-inf"))
            if index_loss:
                loss = _index_loss(raw.detach(), near.detach(), at.sinks.detach(), index, closed, rate)
            if far.shape[1] > indexer.index_topk:
                kept = index.detach().topk(indexer.index_topk, dim=-1).indices
                closed = torch.ones_like(index, dtype=torch.bool).scatter(-1, kept, False) | closed
        scores.append(raw.masked_fill(closed.unsqueeze(-2), float("-inf")))
    sinks = at.sinks.view(1, 1, heads, 1).expand(batch, length, heads, 1)
    shares = torch.cat([*scores, sinks], dim=-1).softmax(-1)
    out = near_values(shares[..., : near.shape[-1]])
    if far is not None:
        out = out + torch.einsum("blhe,bed->blhd", shares[..., near.shape[-1] : -1], far)
    out = _turned(out, cos, -sin)
    out = at.o_a_proj(out.reshape(batch, length, at.config.o_groups, -1)).flatten(2)
    return at.o_b_proj(out), loss


def _window_scores(q: Tensor, kv: Tensor, window: int):
    """Scores [batch, length, heads, keys] against the window's keys, and the function that applies shares to them."""
    batch, length, heads, size = q.shape
    if length <= 2 * window:
        at = torch.arange(length, device=q.device)
        seen = (at <= at[:, None]) & (at > at[:, None] - window)
        scores = torch.einsum("blhd,bkd->blhk", q, kv).masked_fill(~seen[:, None], float("-inf"))
        return scores, lambda shares: torch.einsum("blhk,bkd->blhd", shares, kv)
    blocks = -(-length // window)
    pad = blocks * window - length
    q, kv = F.pad(q, (0, 0, 0, 0, 0, pad)), F.pad(kv, (0, 0, window, pad))
    keys = kv.unfold(1, 2 * window, window).transpose(-1, -2)  # [batch, blocks, 2 windows, size]
    rows = torch.arange(window, device=q.device)[:, None]
    cols = torch.arange(2 * window, device=q.device)
    seen = (cols > rows) & (cols <= rows + window)
    first = seen & (cols >= window)
    seen = torch.stack([first] + [seen] * (blocks - 1))[None, :, :, None]
    q = q.view(batch, blocks, window * heads, size)
    scores = (q @ keys.transpose(-1, -2)).view(batch, blocks, window, heads, 2 * window)
    scores = scores.masked_fill(~seen, float("-inf")).view(batch, -1, heads, 2 * window)[:, :length]

    def values(shares: Tensor) -> Tensor:
        shares = F.pad(shares, (0, 0, 0, 0, 0, pad)).reshape(batch, blocks, window * heads, 2 * window)
        return (shares @ keys).view(batch, -1, heads, size)[:, :length]

    return scores, values


def _compress(part, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Entries [batch, entries, size] of a compressor or an indexer; at ratio 4 each also takes from the four before."""
    rate, size, (batch, length, _) = part.compress_rate, part.head_dim, x.shape
    n = length // rate
    kv = part.kv_proj(x[:, : n * rate]).view(batch, n, rate, -1)
    gate = part.gate_proj(x[:, : n * rate]).view(batch, n, rate, -1) + part.position_bias
    if rate == 4:
        (before, kv), (before_gate, gate) = kv.split(size, dim=-1), gate.split(size, dim=-1)
        kv = torch.cat([F.pad(before[:, :-1], (0, 0, 0, 0, 1, 0)), kv], dim=2)
        before_gate = F.pad(before_gate[:, :-1], (0, 0, 0, 0, 1, 0), value=float("-inf"))
        gate = torch.cat([before_gate, gate], dim=2)
    entries = part.kv_norm((kv * gate.softmax(2)).sum(2))
    return _turned(entries, *(angles[::rate][:n] for angles in rope))


def _index_scores(indexer, x: Tensor, residual: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    q = indexer.q_b_proj(residual).view(*x.shape[:2], -1, indexer.head_dim)
    scorer, keys = indexer.scorer, _compress(indexer, x, rope)
    scores = F.relu(torch.einsum("blhd,bed->blhe", _turned(q, *rope), keys)) * scorer.softmax_scale
    weights = scorer.weights_proj(x) * scorer.weights_scaling
    return (scores * weights.unsqueeze(-1)).sum(2)


def _index_loss(raw: Tensor, near: Tensor, sinks: Tensor, index: Tensor, closed: Tensor, rate: int) -> Tensor:
    """Divergence of the indexer's softmax from the heads' attention to the entries, weighted by that attention."""
    everything = torch.cat([near, raw.masked_fill(closed[:, None], float("-inf")),
                            sinks.view(1, 1, -1, 1).expand(*near.shape[:3], 1)], dim=-1)  # fmt: skip
    given = everything.softmax(-1)[..., near.shape[-1] : -1].sum(2)  # [batch, length, entries]
    given, index, closed = given[:, rate - 1 :], index[:, rate - 1 :], closed[rate - 1 :]  # an entry is open
    target = given / given.sum(-1, keepdim=True).clamp(min=1e-9)
    log_shares = index.log_softmax(-1).masked_fill(closed, 0.0)
    return (target * (target.clamp(min=1e-9).log() - log_shares)).sum(-1).mean()
