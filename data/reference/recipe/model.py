"""The tiny model, and a faster forward pass for its training: same weights, same numbers, less waste on a CPU.

``fast_forward`` differs from transformers' in four ways. Window attention is computed in blocks, not over all
pairs. Tokens are sorted by expert, one product an expert. What surrounds the products of the hyper-connections is
compiled into few loops, where there is a compiler. And it returns what trains the indexer: in the model
itself the indexer only picks entries, by ``topk``, so no gradient reaches its weights; as in DeepSeek-V3.2
(arXiv:2512.02556, section 2.1) it learns from the Kullback-Leibler divergence between its scores' softmax and the
attention that the heads give to the compressed entries.
"""

from __future__ import annotations

import os
import re
import shutil

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import apply_rotary_pos_emb

RATIOS = (0, 4, 128, 4)
N_STREAMS = 4
# Queries and keys are normalized, so a score is at most the root of the head's size (8 here) times the keys' gain:
# with a gain of 1 attention starts too flat to find a single token, and learns to only slowly.
KEY_GAIN = 2.0
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
    """Let the first layer's first two heads begin by attending to the tokens one and two before.

    To find what followed a word, keys must know what stood before them. Found by chance that takes longer than all of
    the rest. All embeddings get one number in common, of which the keys take a constant and these heads' queries the
    same constant, turned as rotary embedding turns it in one or two tokens.
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
        for head, back in enumerate((1, 2)):
            angle = -turn[pair] * back
            at.q_b_proj.weight[head * size + row : head * size + row + 2, 0] = (
                0.96 * share**0.5 * torch.stack([angle.cos(), angle.sin()])
            )


def fast_forward(model: DeepseekV4ForCausalLM, ids: Tensor, index_loss: bool = False
                 ) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Logits of right-padded ``ids`` [batch, length], the indexers' loss, and tokens by expert of each layer."""
    core = model.model
    position = torch.arange(ids.shape[1])[None]
    x = core.embed_tokens(ids)
    rope = {kind: core.rotary_emb(x, position_ids=position, layer_type=kind) for kind in ("main", "compress")}
    streams = x.unsqueeze(2).expand(-1, -1, model.config.hc_mult, -1).contiguous()
    loss, loads = x.new_zeros(()), []
    for block in core.layers:
        post, comb, inner = _enter(block.attn_hc, streams)
        out, one = _attention(block.self_attn, block.input_layernorm(inner), rope, position, index_loss)
        loss = loss + one
        streams = _leave(post, comb, out, streams)
        post, comb, inner = _enter(block.ffn_hc, streams)
        out, load = _experts(block.mlp, block.post_attention_layernorm(inner), ids)
        loads.append(load)
        streams = _leave(post, comb, out, streams)
    return model.lm_head(core.norm(core.hc_head(streams))), loss, loads


def _compiled(function):
    """The function in fused loops, or as it is where nothing compiles C++."""
    return torch.compile(function, dynamic=True) if shutil.which(os.environ.get("CXX", "g++")) else function


def _enter(site, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A hyper-connection's shares for leaving, its mixing matrix, and the one stream [batch, length, size] within."""
    return _shares(
        streams, site.fn, site.base, site.scale, site.input_norm.eps, site.hc_eps, site.hc_sinkhorn_iters
    )


@_compiled
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


@_compiled
def _leave(post: Tensor, comb: Tensor, out: Tensor, streams: Tensor) -> Tensor:
    """The streams after a block: its output by shares, and what was there, mixed."""
    return post.unsqueeze(-1) * out.unsqueeze(-2) + (comb.unsqueeze(-1) * streams.unsqueeze(3)).sum(2)


def _experts(moe, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    flat = x.reshape(-1, x.shape[-1])
    _, weights, chosen = moe.gate(x, ids) if moe.is_hash else moe.gate(x)
    order = chosen.flatten().argsort(stable=True)
    load = chosen.flatten().bincount(minlength=moe.experts.num_experts)
    token = order // chosen.shape[1]
    parts = flat[token].split(load.tolist())
    outs = [
        F.linear(moe.experts._apply_gate(F.linear(part, up)), down)
        for part, up, down in zip(parts, moe.experts.gate_up_proj, moe.experts.down_proj, strict=True)
        if len(part)
    ]
    routed = torch.zeros_like(flat).index_add(0, token, torch.cat(outs) * weights.flatten()[order, None])
    return routed.view_as(x) + moe.shared_experts(x), load


def _attention(at, x: Tensor, rope: dict, position: Tensor, index_loss: bool) -> tuple[Tensor, Tensor]:
    batch, length, _ = x.shape
    heads, size, window = at.num_heads, at.head_dim, at.sliding_window
    cos, sin = rope[at.rope_layer_type]
    residual = at.q_a_norm(at.q_a_proj(x))
    q = at.q_b_norm(at.q_b_proj(residual).view(batch, length, heads, size))
    q = apply_rotary_pos_emb(q, cos, sin, unsqueeze_dim=2) * at.scaling
    kv = _turned(at.kv_norm(at.kv_proj(x)), cos, sin)
    near, near_values = _window_scores(q, kv, window)
    scores, loss, far = [near], x.new_zeros(()), None
    rate = getattr(at.compressor, "compress_rate", length + 1)
    if length >= rate:
        far, bias = at.compressor(x, residual, position, None, at.layer_idx) if rate != 4 else _sparse(at, x)
        far = far[:, 0]  # [batch, entries, size]
        raw = torch.einsum("blhd,bed->blhe", q, far)
        if rate == 4:
            future = torch.arange(far.shape[1]) >= (position[0, :, None] + 1) // rate
            index = _index_scores(at.compressor.indexer, x.detach(), residual.detach(), position)
            index = index.masked_fill(future, float("-inf"))
            bias = future.new_zeros((), dtype=x.dtype).expand(index.shape).masked_fill(future, float("-inf"))
            top = at.compressor.indexer.index_topk
            if far.shape[1] > top:
                kept = index.detach().topk(top, dim=-1).indices
                bias = (
                    torch.full_like(bias, float("-inf"))
                    .scatter(-1, kept, 0.0)
                    .masked_fill(future, float("-inf"))
                )
            if index_loss:
                loss = _index_loss(raw.detach(), near.detach(), at.sinks.detach(), index, future)
            bias = bias[:, :, None]
        else:
            bias = bias.transpose(1, 2)
        scores.append(raw + bias)
    sinks = at.sinks.view(1, 1, heads, 1).expand(batch, length, heads, 1)
    shares = torch.cat([*scores, sinks], dim=-1).softmax(-1)
    out = near_values(shares[..., : near.shape[-1]])
    if far is not None:
        out = out + torch.einsum("blhe,bed->blhd", shares[..., near.shape[-1] : -1], far)
    out = apply_rotary_pos_emb(out, cos, -sin, unsqueeze_dim=2)
    out = at.o_a_proj(out.reshape(batch, length, at.config.o_groups, -1)).flatten(2)
    return at.o_b_proj(out), loss


def _window_scores(q: Tensor, kv: Tensor, window: int):
    """Scores [batch, length, heads, keys] against the window's keys, and the function that applies shares to them."""
    batch, length, heads, size = q.shape
    if length <= 2 * window:
        at = torch.arange(length)
        seen = (at <= at[:, None]) & (at > at[:, None] - window)
        scores = torch.einsum("blhd,bkd->blhk", q, kv).masked_fill(~seen[:, None], float("-inf"))
        return scores, lambda shares: torch.einsum("blhk,bkd->blhd", shares, kv)
    blocks = -(-length // window)
    pad = blocks * window - length
    q, kv = F.pad(q, (0, 0, 0, 0, 0, pad)), F.pad(kv, (0, 0, window, pad))
    keys = kv.unfold(1, 2 * window, window).transpose(-1, -2)  # [batch, blocks, 2 windows, size]
    rows, cols = torch.arange(window)[:, None], torch.arange(2 * window)
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


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [batch, length, size]."""
    return apply_rotary_pos_emb(x.unsqueeze(2), cos, sin, unsqueeze_dim=2).squeeze(2)


def _compress(part, x: Tensor) -> Tensor:
    """Entries [batch, entries, size] of a ratio-4 compressor or its indexer, with their overlap."""
    rate, size, (batch, length, _) = part.compress_rate, part.head_dim, x.shape
    n = length // rate
    kv = part.kv_proj(x[:, : n * rate]).view(batch, n, rate, 2, size)
    gate = (part.gate_proj(x[:, : n * rate]).view(batch, n, rate, -1) + part.position_bias).view(kv.shape)
    before = F.pad(kv[:, :-1, :, 0], (0, 0, 0, 0, 1, 0))
    before_gate = F.pad(gate[:, :-1, :, 0], (0, 0, 0, 0, 1, 0), value=float("-inf"))
    shares = torch.cat([before_gate, gate[:, :, :, 1]], dim=2).softmax(2)
    entries = part.kv_norm((torch.cat([before, kv[:, :, :, 1]], dim=2) * shares).sum(2))
    cos, sin = part.rotary_emb(entries, position_ids=(torch.arange(n) * rate)[None], layer_type="compress")
    return _turned(entries, cos, sin)


def _sparse(at, x: Tensor) -> tuple[Tensor, None]:
    return _compress(at.compressor, x)[:, None], None


def _index_scores(indexer, x: Tensor, residual: Tensor, position: Tensor) -> Tensor:
    batch, length, _ = x.shape
    cos, sin = indexer.rotary_emb(x, position_ids=position, layer_type="compress")
    q = indexer.q_b_proj(residual).view(batch, length, -1, indexer.head_dim)
    q = apply_rotary_pos_emb(q, cos, sin, unsqueeze_dim=2)
    return indexer.scorer(q, _compress(indexer, x), x)


def _index_loss(raw: Tensor, near: Tensor, sinks: Tensor, index: Tensor, future: Tensor) -> Tensor:
    """Divergence of the indexer's softmax from the heads' attention to the entries, weighted by that attention."""
    everything = torch.cat([near, raw.masked_fill(future[:, None], float("-inf")),
                            sinks.view(1, 1, -1, 1).expand(*near.shape[:3], 1)], dim=-1)  # fmt: skip
    given = everything.softmax(-1)[..., near.shape[-1] : -1].sum(2)  # [batch, length, entries]
    some = ~future.all(-1)
    given, index, closed = given[:, some], index[:, some], future[some]
    target = given / given.sum(-1, keepdim=True).clamp(min=1e-9)
    log_shares = index.log_softmax(-1).masked_fill(closed, 0.0)
    return (
        (target * (target.clamp(min=1e-9).log() - log_shares)).sum(-1).mean()
        if some.any()
        else index.sum() * 0
    )
