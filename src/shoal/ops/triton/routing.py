"""Router kernels: scores, bias, groups, top-k, renormalisation and scale in one launch, and their backward.

    s = softmax(l) or sigmoid(l),  chosen = top_k(s + b in the best groups),  w_k = c s_k / (sum s + 1e-20)

Layout: a program is one warp and owns ROWS tokens, one at sizes that decode, with all their experts in
registers: no reduction waits at a barrier. Groups are padded to SIZE columns, a power of two, which keeps the
order of experts, hence the rule of ties. Top-k is K rounds of argmax, cheaper than a sort to K = 16. A score
is compared as the integer whose order is the same, because a warp reduces integers in one instruction: the
largest key, then the smallest column that holds it. Bound: it reads and writes T * E floats, and below 4k
tokens it is the launch that costs: 2 us for 64 experts and 4 for V3's rule over 256 (H200, 2026-11-22), 8 and
32 at 16k tokens.

The backward reads the saved scores and the choices only. `limit_capacity` is one program an expert.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoal.ops.triton.gate import gate_logits, gate_logits_refusal, gate_parts, norm_parts
from shoal.ops.triton.launch import programmatic, wait_for_previous
from shoal.ops.triton.norms import add_rms_norm, add_rms_norm_refusal

MAX_EXPERTS, MAX_TOP_K = 1024, 32


@triton.jit
def _score(logits, valid, SIGMOID: tl.constexpr):
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        exp = tl.exp(logits - tl.max(logits, 1)[:, None])
        scores = exp / tl.sum(exp, 1)[:, None]
    return tl.where(valid, scores, 0.0)


@triton.jit
def _order(values):
    """Integers in the order of the floats, which have no -0."""
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _first_of_largest(keys, column, axis: tl.constexpr):
    """The column of the largest key of a row, the first if there are several."""
    largest = keys == tl.max(keys, axis, keep_dims=True)
    return tl.min(tl.where(largest, column, 0x7FFFFFFF), axis, keep_dims=True)


@triton.jit
def _drop_groups(
    selection,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    TOP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """-inf outside the TOP groups of a row, judged by their largest value, or with a bias by their two."""
    in_groups = tl.reshape(selection, (ROWS, GROUPS, SIZE))
    value = tl.max(in_groups, 2)
    if HAS_BIAS:
        column = tl.arange(0, SIZE)[None, None, :]
        first = _first_of_largest(_order(in_groups), column, 2)
        value += tl.max(tl.where(column == first, float("-inf"), in_groups), 2)
    keys = _order(value)
    group = tl.arange(0, GROUPS)[None, :]
    kept = tl.zeros((ROWS, GROUPS), tl.int32)
    for _ in tl.static_range(TOP):
        hit = group == _first_of_largest(keys, group, 1)
        kept = tl.where(hit, 1, kept)
        keys = tl.where(hit, -0x80000000, keys)
    return tl.reshape(tl.where(kept[:, :, None] > 0, in_groups, float("-inf")), (ROWS, GROUPS * SIZE))


@triton.jit(do_not_specialize=["T"])
def _route_kernel(
    logits_ptr,
    bias_ptr,
    replay_ptr,
    experts_ptr,
    weights_ptr,
    scores_ptr,
    T,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    N_GROUP: tl.constexpr,
    TOP_GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    SIGMOID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    REPLAY: tl.constexpr,
    NORMALISE: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
    parts_ptr=None,
    PARTS: tl.constexpr = 0,  # of the logits, to be added and kept; 0: they are given
):
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, GROUPS * SIZE)
    expert = column // SIZE * (E // N_GROUP) + column % SIZE
    real = (column % SIZE < E // N_GROUP) & (column // SIZE < N_GROUP)
    valid = real[None, :]
    inside = (row < T)[:, None] & valid
    cell = row[:, None] * E + expert[None, :]
    if PARTS:
        logits = tl.zeros((ROWS, GROUPS * SIZE), tl.float32)
        for part in tl.static_range(PARTS):
            logits += tl.load(parts_ptr + part * T * E + cell, mask=inside, other=0.0)
        tl.store(logits_ptr + cell, logits, mask=inside)
        logits = tl.where(inside, logits, float("-inf"))
    else:
        logits = tl.load(logits_ptr + cell, mask=inside, other=float("-inf"))
    logits = tl.where((row < T)[:, None], logits, 0.0)
    # 1. Score every expert.
    scores = _score(logits, valid, SIGMOID)
    tl.store(scores_ptr + cell, scores, mask=inside)
    # 2. Selection, 3. groups.
    selection = scores
    if HAS_BIAS:
        selection += tl.load(bias_ptr + expert, mask=real, other=0.0)[None, :]
    selection = tl.where(valid, selection, float("-inf"))
    if N_GROUP > 1 and not REPLAY:
        selection = _drop_groups(selection, ROWS, GROUPS, SIZE, TOP_GROUP, HAS_BIAS)
    # 4. Choose, 5. weigh.
    keys = _order(selection)
    place = tl.arange(0, K_PAD)[None, :]
    chosen = tl.full((ROWS, K_PAD), -1, tl.int64)
    weights = tl.zeros((ROWS, K_PAD), tl.float32)
    for k in tl.static_range(K):
        if REPLAY:
            one = tl.load(replay_ptr + row * K + k, mask=row < T, other=-1).to(tl.int64)[:, None]
            hit = (expert[None, :] == one) & valid
        else:
            best = _first_of_largest(keys, column[None, :], 1)
            one = (best // SIZE * (E // N_GROUP) + best % SIZE).to(tl.int64)
            hit = column[None, :] == best
            keys = tl.where(hit, -0x80000000, keys)
        chosen = tl.where(place == k, one, chosen)
        weights = tl.where(place == k, tl.sum(tl.where(hit, scores, 0.0), 1)[:, None], weights)
    # 6. Normalise, 7. scale.
    if NORMALISE:
        weights = weights / (tl.sum(weights, 1)[:, None] + 1e-20)
    at = row[:, None] * K + place
    wanted = (row < T)[:, None] & (place < K)
    tl.store(weights_ptr + at, weights * scale, mask=wanted)
    tl.store(experts_ptr + at, chosen, mask=wanted)


@triton.jit(do_not_specialize=["T"])
def _route_backward_kernel(
    scores_ptr,
    experts_ptr,
    dweights_ptr,
    dscores_ptr,
    dlogits_ptr,
    T,
    scale,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALISE: tl.constexpr,
    HAS_DSCORES: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, E_PAD)
    inside = (row < T)[:, None] & (expert < E)[None, :]
    at = row[:, None] * E + expert[None, :]
    scores = tl.load(scores_ptr + at, mask=inside, other=0.0)
    dscores = tl.zeros((ROWS, E_PAD), tl.float32)
    if HAS_DSCORES:
        dscores = tl.load(dscores_ptr + at, mask=inside, other=0.0)
    # w_k = c s_k / z with z = sum s + 1e-20, so ds_k = c (dw_k - <dw, s> / z) / z; or c dw_k.
    z = tl.full((ROWS,), 1.0, tl.float32)
    mean = tl.zeros((ROWS,), tl.float32)
    if NORMALISE:
        z = tl.full((ROWS,), 1e-20, tl.float32)
        for k in tl.static_range(K):
            hit = expert[None, :] == tl.load(experts_ptr + row * K + k, mask=row < T, other=-1)[:, None]
            score = tl.sum(tl.where(hit, scores, 0.0), 1)
            z += score
            mean += score * tl.load(dweights_ptr + row * K + k, mask=row < T, other=0.0)
        mean = mean / z
    for k in tl.static_range(K):
        hit = expert[None, :] == tl.load(experts_ptr + row * K + k, mask=row < T, other=-1)[:, None]
        dweight = tl.load(dweights_ptr + row * K + k, mask=row < T, other=0.0)
        dscores += tl.where(hit, (scale * (dweight - mean) / z)[:, None], 0.0)
    if SIGMOID:
        dlogits = dscores * scores * (1.0 - scores)
    else:
        dlogits = scores * (dscores - tl.sum(dscores * scores, 1)[:, None])
    tl.store(dlogits_ptr + at, dlogits, mask=inside)


def _rows_of_program(tokens: int, columns: int, invariant: bool = False) -> int:
    """Tokens of a warp: one until the chip is full, then as many as keep 16 scores or more to a thread. How
    the lanes share out a row follows from it, hence the order of its sums."""
    return 1 if tokens <= 1024 or invariant else max(1, min(8, 512 // columns))


def _choose(
    logits_TE: Tensor,
    top_k: int,
    scoring_func: str,
    bias_E: Tensor | None,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    scale: float,
    replay_TK: Tensor | None,
    parts: Tensor | None = None,
    *,
    invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Experts, weights and scores. With `parts` (PARTS, T, E) their sum is written to the logits first."""
    T, E = logits_TE.shape
    experts_TK = torch.empty(T, top_k, dtype=torch.int64, device=logits_TE.device)
    weights_TK = torch.empty(T, top_k, dtype=torch.float32, device=logits_TE.device)
    scores_TE = torch.empty_like(logits_TE)
    groups, size = triton.next_power_of_2(n_group), triton.next_power_of_2(E // n_group)
    rows, pdl = _rows_of_program(T, groups * size, invariant), programmatic(logits_TE.device)
    if T:
        _route_kernel[(triton.cdiv(T, rows),)](
            logits_TE,
            bias_E,
            None if replay_TK is None else replay_TK.contiguous(),
            experts_TK,
            weights_TK,
            scores_TE,
            T,
            scale,
            E=E,
            K=top_k,
            K_PAD=triton.next_power_of_2(top_k),
            N_GROUP=n_group,
            TOP_GROUP=topk_group,
            GROUPS=groups,
            SIZE=size,
            SIGMOID=scoring_func == "sigmoid",
            HAS_BIAS=bias_E is not None,
            REPLAY=replay_TK is not None,
            NORMALISE=norm_topk_prob,
            ROWS=rows,
            PDL=pdl,
            parts_ptr=parts,
            PARTS=0 if parts is None else parts.shape[0],
            launch_pdl=pdl,
            num_warps=1,
        )
    return experts_TK, weights_TK, scores_TE


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: Tensor,
        top_k: int,
        scoring_func: str,
        bias_E: Tensor | None,
        n_group: int,
        topk_group: int,
        norm_topk_prob: bool,
        scale: float,
        replay_TK: Tensor | None,
        invariant: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        experts_TK, weights_TK, scores_TE = _choose(
            logits_TE.contiguous(),
            top_k,
            scoring_func,
            bias_E,
            n_group,
            topk_group,
            norm_topk_prob,
            scale,
            replay_TK,
            invariant=invariant,
        )
        ctx.save_for_backward(scores_TE, experts_TK)
        ctx.rule = (scoring_func == "sigmoid", norm_topk_prob, scale)
        ctx.mark_non_differentiable(experts_TK)
        ctx.set_materialize_grads(False)
        return experts_TK, weights_TK, scores_TE

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, _: None, dweights_TK: Tensor | None, dscores_TE: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if dweights_TK is None and dscores_TE is None:
            return (None,) * 10
        scores_TE, experts_TK = ctx.saved_tensors
        sigmoid, normalise, scale = ctx.rule
        T, E = scores_TE.shape
        if dweights_TK is None:
            dweights_TK = torch.zeros_like(experts_TK, dtype=torch.float32)
        dlogits_TE = torch.empty_like(scores_TE)
        columns = triton.next_power_of_2(E)
        rows = _rows_of_program(T, columns)
        if T:
            _route_backward_kernel[(triton.cdiv(T, rows),)](
                scores_TE,
                experts_TK,
                dweights_TK.contiguous(),
                None if dscores_TE is None else dscores_TE.contiguous(),
                dlogits_TE,
                T,
                scale,
                E=E,
                E_PAD=columns,
                K=experts_TK.shape[1],
                SIGMOID=sigmoid,
                NORMALISE=normalise,
                HAS_DSCORES=dscores_TE is not None,
                ROWS=rows,
                num_warps=1,
            )
        return dlogits_TE, *(None,) * 9


def route_refusal(
    logits_TE: Tensor,
    top_k: int,
    scoring_func: str,
    bias_E: Tensor | None,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    replay_TK: Tensor | None,
) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    if logits_TE.dtype != torch.float32:
        return f"logits are {logits_TE.dtype}; the kernel takes float32"
    return _rule_refusal(logits_TE.shape[1], top_k, bias_E, n_group, topk_group)


def _rule_refusal(E: int, top_k: int, bias_E: Tensor | None, n_group: int, topk_group: int) -> str | None:
    if E > MAX_EXPERTS:
        return f"{E} experts; a program holds at most {MAX_EXPERTS} scores a token"
    if top_k > MAX_TOP_K:
        return f"top_k is {top_k}; the kernel unrolls at most {MAX_TOP_K} rounds"
    if E % n_group or (n_group > 1 and bias_E is not None and E // n_group < 2):
        return (
            f"{E} experts in {n_group} groups; groups must be equal and, with a bias, of two experts or more"
        )
    if n_group > 1 and top_k > topk_group * (E // n_group):
        return (
            f"top_k is {top_k}, but the {topk_group} best groups hold {topk_group * (E // n_group)} experts"
        )
    return None


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
    *,
    invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Experts, weights and scores, as `ops.api.route` says."""
    return _Route.apply(
        logits_TE,
        top_k,
        scoring_func,
        bias_E,
        n_group,
        topk_group,
        norm_topk_prob,
        routed_scaling_factor,
        replay_TK,
        invariant,
    )


def gate_refusal(
    x_TD: Tensor,
    weight_ED: Tensor,
    top_k: int,
    scoring_func: str,
    bias_E: Tensor | None,
    n_group: int,
    topk_group: int,
    *_: Any,
) -> str | None:
    """Why the kernels do not take this call; None if they do."""
    refused = gate_logits_refusal(x_TD, weight_ED)
    return refused or _rule_refusal(weight_ED.shape[0], top_k, bias_E, n_group, topk_group)


def gate(
    x_TD: Tensor, weight_ED: Tensor, top_k: int, *rule: Any, invariant: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Experts, weights, scores and logits, as `ops.api.gate` says: few tokens in two launches, but in
    batch-invariant form always the product's own, then that of the rule."""
    learns = torch.is_grad_enabled() and (x_TD.requires_grad or weight_ED.requires_grad)
    parts = None if learns or invariant else gate_parts(x_TD, weight_ED)
    if parts is None:
        logits_TE = gate_logits(x_TD, weight_ED)
        return *route(logits_TE, top_k, *rule, invariant=invariant), logits_TE
    logits_TE = torch.empty(parts.shape[1:], dtype=torch.float32, device=x_TD.device)
    return *_choose(logits_TE, top_k, *rule, parts=parts), logits_TE


def add_norm_gate_refusal(
    x_TD: Tensor, y_TD: Tensor, norm_D: Tensor, eps: float, weight_ED: Tensor, *rule: Any
) -> str | None:
    """Why the kernels do not take this call; None if they do."""
    return add_rms_norm_refusal(x_TD, y_TD, norm_D, eps) or gate_refusal(x_TD, weight_ED, *rule)


def add_norm_gate(
    x_TD: Tensor,
    y_TD: Tensor,
    norm_D: Tensor,
    eps: float,
    weight_ED: Tensor,
    top_k: int,
    *rule: Any,
    invariant: bool = False,
) -> tuple[Tensor, ...]:
    """The sum, its norm, and what `gate` gives, as `ops.api.add_norm_gate` says: one row in two launches."""
    inputs = (x_TD, y_TD, norm_D, weight_ED)
    learns = torch.is_grad_enabled() and any(each.requires_grad for each in inputs)
    if len(x_TD) != 1 or learns or invariant:
        total_TD, normal_TD = add_rms_norm(x_TD, y_TD, norm_D, eps)
        return total_TD, normal_TD, *gate(normal_TD, weight_ED, top_k, *rule, invariant=invariant)
    *rows, parts = norm_parts(x_TD, y_TD, norm_D, eps, weight_ED)
    logits_TE = torch.empty(parts.shape[1:], dtype=torch.float32, device=x_TD.device)
    return *rows, *_choose(logits_TE, top_k, *rule, parts=parts), logits_TE


@triton.jit(do_not_specialize=["T", "capacity"])
def _limit_capacity_kernel(experts_ptr, kept_ptr, T, capacity, K: tl.constexpr, BLOCK: tl.constexpr):
    """Program e walks the queue, first choices, then second ones, and closes the door at `capacity`."""
    before = tl.zeros((), tl.int32)
    for first in range(0, T * K, BLOCK):
        queue = first + tl.arange(0, BLOCK)
        at = (queue % T).to(tl.int64) * K + queue // T
        mine = tl.load(experts_ptr + at, mask=queue < T * K, other=-1) == tl.program_id(0)
        place = before + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(kept_ptr + at, tl.full((BLOCK,), -1, tl.int64), mask=mine & (place >= capacity))
        before += tl.sum(mine.to(tl.int32), 0)


def limit_capacity(experts_TK: Tensor, n_experts: int, capacity: int) -> Tensor:
    """The choices, -1 where an expert was full, as `ops.api.limit_capacity` says."""
    experts_TK = experts_TK.contiguous()
    kept_TK = experts_TK.clone()
    if experts_TK.numel():
        T, K = experts_TK.shape
        block = min(1024, triton.next_power_of_2(T * K))
        _limit_capacity_kernel[(n_experts,)](experts_TK, kept_TK, T, capacity, K=K, BLOCK=block)
    return kept_TK
