"""The ops in batch-invariant form, for a CPU: each as its reference has it, by the sums of fixed.py.

The contract is the op's own. Gradients are the reference's (ops/invariance.py). Attention goes over the cache
alone, which in this mode the trainer lays out too (model/served.py): over spans of positions that begin at
multiples of SPAN, added in order, so that neither the length of a context nor the chunks in which it came,
nor the pages, touch a sum. Spans past what a query sees add exact zeros.

Shape letters as in api.py; L width of a cached row, m rows of a block of queries.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from shoal.ops.invariance import with_gradient_of
from shoal.ops.reference import attention, cache, experts, layers, loss, routing, sampling
from shoal.ops.reference.fixed import add_up, exp, logsumexp, product, sigmoid, softmax

SPAN = 64  # positions
_BLOCK = 64  # queries at a time, for their scores' sake


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linears(
    x_TD: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    return tuple(
        with_gradient_of(_plain_linear, _linear, x_TD, weight, bias)
        for weight, bias in zip(weights, biases, strict=True)
    )


def _linear(x_TD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = product(x_TD, weight)
    return y if bias is None else y + bias


def _plain_linear(x_TD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return layers.linears(x_TD, (weight,), (bias,))[0]


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    def fixed(x: Tensor, weight_D: Tensor) -> Tensor:
        wide = _widen(x)
        mean = add_up(wide * wide) / x.shape[-1]
        normal = wide / (mean + eps).sqrt().unsqueeze(-1)
        return normal.to(x.dtype) * weight_D

    return with_gradient_of(lambda x, w: layers.rms_norm(x, w, eps), fixed, x, weight_D)


def add_rms_norm(x: Tensor, y: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + y
    return total, rms_norm(total, weight_D, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return with_gradient_of(layers.swiglu, _swiglu, gate, up)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    wide = _widen(gate)
    return (wide / (1 + exp(-wide))).to(gate.dtype) * up


def rope(x_THR: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, interleaved: bool) -> Tensor:
    def plain(x_THR: Tensor) -> Tensor:
        return layers.rope(x_THR, cos_TR2, sin_TR2, interleaved)

    def fixed(x_THR: Tensor) -> Tensor:
        wide = _widen(x_THR)
        cos, sin = cos_TR2.unsqueeze(1), sin_TR2.unsqueeze(1)
        # One rounding an operation: a complex product may fuse two of them, in some elements.
        first, second = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
        return joined.to(x_THR.dtype)

    return with_gradient_of(plain, fixed, x_THR)


def gate_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    return with_gradient_of(routing.gate_logits, lambda x, w: product(x.float(), w.float()), x_TD, weight_ED)


def route(
    logits_TE: Tensor,
    top_k: int,
    scoring_func: str,
    bias_E: Tensor | None,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    replay_TK: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    score = sigmoid if scoring_func == "sigmoid" else softmax
    last = norm_topk_prob, routed_scaling_factor
    if replay_TK is None:
        with torch.no_grad():
            scores_TE = score(logits_TE)
            replay_TK = routing.select(scores_TE, top_k, bias_E, n_group, topk_group)
    given_TK = replay_TK.long()

    def fixed(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        scores_TE = score(logits_TE)
        return routing.weigh(scores_TE, given_TK, *last, True, add_up), scores_TE

    def plain(logits_TE: Tensor) -> tuple[Tensor, ...]:
        return routing.route(logits_TE, top_k, scoring_func, None, 1, 1, *last, given_TK)[1:]

    return given_TK, *with_gradient_of(plain, fixed, logits_TE)


def gate(x_TD: Tensor, weight_ED: Tensor, top_k: int, *rule: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits_TE = gate_logits(x_TD, weight_ED)
    return *route(logits_TE, top_k, *rule), logits_TE


def add_norm_gate(
    x_TD: Tensor, y_TD: Tensor, norm_D: Tensor, eps: float, weight_ED: Tensor, top_k: int, *rule: Any
) -> tuple[Tensor, ...]:
    total_TD, normal_TD = add_rms_norm(x_TD, y_TD, norm_D, eps)
    return total_TD, normal_TD, *gate(normal_TD, weight_ED, top_k, *rule)


def grouped_mlp(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    def fixed(x_TD: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
        order_M, spans = experts.sort_rows(experts_TK, gate_up_E2FD.shape[0])
        token_M = order_M // experts_TK.shape[1]
        y_MD = x_TD.new_zeros(order_M.shape[0], x_TD.shape[1])
        for expert, start, end in spans:
            x = x_TD.index_select(0, token_M[start:end])
            gate, up = product(x, gate_up_E2FD[expert]).chunk(2, dim=-1)
            y_MD[order_M[start:end]] = product(_swiglu(gate, up), down_EDF[expert])
        return sum_choices(y_MD, experts_TK, weights_TK)

    def plain(x_TD: Tensor, weights_TK: Tensor, *stacks: Tensor) -> Tensor:
        return experts.grouped_mlp(x_TD, experts_TK, weights_TK, *stacks)

    return with_gradient_of(plain, fixed, x_TD, weights_TK, gate_up_E2FD, down_EDF)


def sum_choices(rows_MD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Choice by choice, in the router's order."""
    rows_TKD, weights_TK = rows_MD.unflatten(0, experts_TK.shape), weights_TK.to(_widen(rows_MD[:0]).dtype)
    total_TD = torch.zeros_like(rows_TKD[:, 0], dtype=weights_TK.dtype)
    for row_TD, weight_T in zip(rows_TKD.unbind(1), weights_TK.unbind(1), strict=True):
        total_TD = total_TD + row_TD.to(total_TD.dtype) * weight_T.unsqueeze(1)
    return total_TD.to(rows_MD.dtype)


def mixture(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    gate_GD: Tensor,
    up_GD: Tensor,
    down_DG: Tensor,
) -> Tensor:
    routed_TD = grouped_mlp(x_TD, experts_TK, weights_TK, gate_up_E2FD, down_EDF)
    gate_TG, up_TG = linears(x_TD, (gate_GD, up_GD), (None, None))
    return routed_TD + linears(swiglu(gate_TG, up_TG), (down_DG,), (None,))[0]


# Over the cache: no gradient, as the contracts say.


write_latent_cache = partial(cache.write_latent_cache, norm=rms_norm, turn=rope)
write_kv_cache = partial(cache.write_kv_cache, turn=rope)


def _by_head(x_HTK: Tensor, w_HKN: Tensor) -> Tensor:
    return torch.stack([product(x_TK, w_KN.t()) for x_TK, w_KN in zip(x_HTK, w_HKN, strict=True)])


latent_queries = partial(cache.latent_queries, write=write_latent_cache, multiply=_by_head)
latent_values = torch.no_grad()(partial(cache.latent_values, multiply=_by_head))


@torch.no_grad()
def paged_attention(
    q_THQ: Tensor,
    pages: Tensor,
    block_table_SB: Tensor,
    context_lens_S: Tensor,
    max_context_len: int,
    cu_seqlens_S1: Tensor,
    max_seqlen: int,
    scale: float,
) -> Tensor:
    o_THQ = torch.zeros_like(q_THQ)
    bounds, lengths = cu_seqlens_S1.tolist(), context_lens_S.tolist()
    for s, length in enumerate(lengths):
        if length:
            rows = attention.read_cache(pages, block_table_SB[s], 0, length, q_THQ.shape[2], q_THQ.dtype)
            queries = slice(bounds[s], bounds[s + 1])
            o_THQ[queries] = _attend(q_THQ[queries], rows[:, 0], rows[:, 1], scale)
    return o_THQ


@torch.no_grad()
def latent_attention(
    q_THL: Tensor,
    pages: Tensor,
    block_table_SB: Tensor,
    context_lens_S: Tensor,
    max_context_len: int,
    cu_seqlens_S1: Tensor,
    max_seqlen: int,
    latent_rank: int,
    scale: float,
    values: tuple[Tensor, int] | None = None,
) -> Tensor:
    o_THC = q_THL.new_zeros(*q_THL.shape[:2], latent_rank)
    bounds, lengths = cu_seqlens_S1.tolist(), context_lens_S.tolist()
    for s, length in enumerate(lengths):
        if length:
            rows_NL = attention.read_cache(pages, block_table_SB[s], 0, length, latent_rank, q_THL.dtype)
            rows_N1L = rows_NL.unsqueeze(1)
            queries = slice(bounds[s], bounds[s + 1])
            o_THC[queries] = _attend(q_THL[queries], rows_N1L, rows_N1L[..., :latent_rank], scale)
    return o_THC if values is None else latent_values(o_THC, *values)


def _attend(q_nHd: Tensor, k_NGd: Tensor, v_NGv: Tensor, scale: float) -> Tensor:
    """Attention of one sequence's last n positions over all N of it: (n, H, v)."""
    new, positions, groups = q_nHd.shape[0], k_NGd.shape[0], k_NGd.shape[1]
    k_GNd, v_GNv = _in_spans(k_NGd), _in_spans(v_NGv)
    each = q_nHd.shape[1] // groups
    wide_nGhd = _widen(q_nHd).unflatten(1, (groups, each))
    outputs = []
    for first in range(0, new, _BLOCK):
        last = min(first + _BLOCK, new)
        # A query sees the positions up to its own; no span is read that none of the block sees.
        end = positions - new + last
        own_m = torch.arange(positions - new + first, end).repeat_interleave(each)
        hidden_mN = torch.arange(-(-end // SPAN) * SPAN) > own_m.unsqueeze(1)
        heads = [
            _attend_block(wide_nGhd[first:last, g].flatten(0, 1), k_GNd[g], v_GNv[g], hidden_mN, scale)
            for g in range(groups)
        ]
        outputs.append(torch.stack([o.unflatten(0, (-1, each)) for o in heads], 1).flatten(1, 2))
    return torch.cat(outputs).to(q_nHd.dtype)


def _in_spans(x_NGd: Tensor) -> Tensor:
    """(G, N rounded up to whole spans, d), the rest zeros."""
    positions, groups, dim = x_NGd.shape
    wide_NGd = _widen(x_NGd)
    x_GNd = wide_NGd.new_zeros(groups, -(-positions // SPAN) * SPAN, dim)
    x_GNd[:, :positions] = wide_NGd.transpose(0, 1)
    return x_GNd


def _attend_block(q_md: Tensor, k_Nd: Tensor, v_Nv: Tensor, hidden_mN: Tensor, scale: float) -> Tensor:
    spans = [slice(start, start + SPAN) for start in range(0, hidden_mN.shape[1], SPAN)]
    # 1. Scores, 2. mask, 3. weights up to their sum; the largest score is the same in any order.
    scores_mN = torch.cat([product(q_md, k_Nd[span]) for span in spans], 1) * scale
    scores_mN.masked_fill_(hidden_mN, float("-inf"))
    weights_mN = exp(scores_mN - scores_mN.amax(-1, keepdim=True))
    # 4. Their sum and 5. the values', span by span in order.
    parts = add_up(weights_mN.unflatten(1, (-1, SPAN))).unbind(1)
    total_m, o_mv = torch.zeros_like(parts[0]), q_md.new_zeros(q_md.shape[0], v_Nv.shape[1])
    for span, part_m in zip(spans, parts, strict=True):
        total_m = total_m + part_m
        o_mv = o_mv + product(weights_mN[:, span], v_Nv[span].t())
    return o_mv / total_m.unsqueeze(1)


# Log-probabilities: one logarithm of one sum for the token that is drawn and for the one that is scored.


@torch.no_grad()
def sample(
    logits_SV: Tensor,
    temperature_S: Tensor,
    top_k_S: Tensor,
    top_p_S: Tensor,
    min_p_S: Tensor,
    uniforms_S: Tensor,
    scores_SV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows = (temperature_S, top_k_S, top_p_S, min_p_S, uniforms_S)
    tokens_S, _ = sampling.sample(logits_SV, *rows, scores_SV)
    return tokens_S, -_nll(logits_SV.float(), tokens_S)


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, weights_T: Tensor
) -> tuple[Tensor, Tensor]:
    loss.check_targets(targets_T, weight_VD)

    def plain(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
        return loss.linear_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T)

    def fixed(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
        size = loss.chunk_rows(weight_VD)
        pieces = zip(hidden_TD.split(size), targets_T.split(size), strict=True)
        nll = [_nll(_widen(product(hidden, weight_VD)), targets) for hidden, targets in pieces]
        nll_T = torch.cat(nll)
        return torch.dot(nll_T, weights_T.to(nll_T.dtype)), nll_T

    total, nll_T = with_gradient_of(plain, fixed, hidden_TD, weight_VD)
    return total, nll_T.detach()


def _nll(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    return logsumexp(logits_TV) - logits_TV.gather(1, targets_T.unsqueeze(1)).squeeze(1)
