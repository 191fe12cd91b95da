"""A token for each row of logits: the inverse of the cumulative distribution, without sorting the vocabulary.

    e_v = exp((s_v - max s) / temperature),   kept = {v : e_v >= least}
    token = the first v whose cumulative e over the kept exceeds u * total

The bounds of top-k and top-p are one search: the largest t with measure{e >= t} >= goal, where the measure
counts (goal k) or weighs (goal top_p * total). e lies in [0, 1], so the bits of a float32 are its order, and
t is found among them:

1. A pass over the row tries 4 values of t at once and keeps a fifth of the range, until at most CAP elements
   are left in it (a few passes; equals may hold it up to the last bit).
2. Those are copied out, and the rest of the bits is halved over them in registers.

Greedy rows take two passes, unrestricted ones three, and a tile again.

Layout: one program a row, whose pieces are summed in one order, so a row depends on itself alone. It reads
the row out of L2 some 2 to 8 times. Weights are float32, added over a lane's tiles in float32 and from there
on, and in the final cumulative sum, in float64: a bound is placed to 2^-19 of the total. Nothing asks the
host.

On an H200 (2026-11-24), V 129k, flat logits: 12 us greedy, 38 with a temperature, 212 with top-k 50, 270 with
top-p 0.95, for 1 row or 32; 34, 86, 467 and 611 for 256. What bounds it is one program's way through a row:
its reductions and its search wait for each other, at 1 to 8% of the memory bus.

Penalties are counted by integer atomics, whose order changes nothing, then applied as the scores are written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.ops.triton.likelihood import nll
from shoal.ops.triton.norms import DTYPES

TILE = 4096  # of the vocabulary, at a time
CAP = 4096  # elements that the second half of a search holds
ONE: tl.constexpr = tl.constexpr(0x3F800000)  # the bits of 1.0, the weight of the best
SEEN: tl.constexpr = tl.constexpr(1 << 30)  # beside a count: the prompt has the token


@triton.jit
def _weigh(scores_ptr, column, largest, temperature, V: tl.constexpr):
    """e of a tile, and its bits: -1 past the end."""
    inside = column < V
    score = tl.load(scores_ptr + column, mask=inside, other=float("-inf")).to(tl.float32)
    e = tl.where(inside, tl.exp((score - largest) / temperature), 0.0)
    return e, tl.where(inside, e.to(tl.int32, bitcast=True), -1)


@triton.jit
def _search(
    scores_ptr,
    scratch_ptr,
    largest,
    temperature,
    goal,
    low,
    BY_COUNT: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    CAP: tl.constexpr,
):
    """The largest bits t >= `low` with measure{e >= t} >= goal; count and weight of what lies above."""
    step = tl.arange(0, 4)
    high = tl.full((), ONE + 1, tl.int32)
    inside = tl.full((), V, tl.int32)  # elements in [low, high)
    above = tl.zeros((), tl.int32)
    weight_above = tl.zeros((), tl.float64)
    # 1. Passes over the row.
    if V > CAP:  # known to the compiler: Triton 3.6 fails on a loop that it can fold away
        while (high - low > 1) & (inside > CAP):
            width = tl.maximum((high - low) // 5, 1)
            bound = tl.minimum(low + width * (step + 1), high)
            counts = tl.zeros((4, BLOCK), tl.int32)
            weights = tl.zeros((4, BLOCK), tl.float32)
            for first in tl.range(0, V, BLOCK, loop_unroll_factor=4):
                e, bits = _weigh(scores_ptr, first + tl.arange(0, BLOCK), largest, temperature, V)
                hit = bits[None, :] >= bound[:, None]
                counts += hit.to(tl.int32)
                weights += tl.where(hit, e[None, :], 0.0)
            count = tl.sum(counts, 1)
            weight = tl.sum(weights.to(tl.float64), 1)
            measure = count.to(tl.float64) if BY_COUNT else weight
            reached = tl.sum((measure >= goal).to(tl.int32), 0)  # the measure falls as t rises
            at_low = tl.sum(tl.where(step == reached - 1, count, 0), 0)
            at_low = tl.where(reached > 0, at_low, inside + above)
            low = tl.where(reached > 0, tl.sum(tl.where(step == reached - 1, bound, 0), 0), low)
            if reached < 4:
                high = tl.sum(tl.where(step == reached, bound, 0), 0)
                above = tl.sum(tl.where(step == reached, count, 0), 0)
                weight_above = tl.sum(tl.where(step == reached, weight, 0.0), 0)
            inside = at_low - above
    # 2. What is left, in registers.
    if high - low > 1:
        place = tl.zeros((), tl.int32)
        for first in tl.range(0, V, 2 * BLOCK, loop_unroll_factor=2):
            _, bits = _weigh(scores_ptr, first + tl.arange(0, 2 * BLOCK), largest, temperature, V)
            hit = ((bits >= low) & (bits < high)).to(tl.int32)
            to = place + tl.cumsum(hit, 0) - 1
            tl.store(scratch_ptr + to, bits, mask=(hit > 0) & (to < CAP))
            place += tl.sum(hit, 0)
        tl.debug_barrier()
        at = tl.arange(0, CAP)
        bits = tl.load(scratch_ptr + at, mask=at < place, other=-1)
        e = tl.where(at < place, bits, 0).to(tl.float32, bitcast=True).to(tl.float64)
        tl.debug_barrier()
        higher, weight_higher = above, weight_above
        while high - low > 1:
            middle = low + (high - low) // 2
            hit = bits >= middle
            count = higher + tl.sum(hit.to(tl.int32), 0)
            weight = weight_higher + tl.sum(tl.where(hit, e, 0.0), 0)
            measure = count.to(tl.float64) if BY_COUNT else weight
            if measure >= goal:
                low = middle
            else:
                high = middle
                above = count
                weight_above = weight
    return low, above, weight_above


@triton.jit
def _sample_kernel(
    logits_ptr,
    scores_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    uniforms_ptr,
    scratch_ptr,
    tokens_ptr,
    logprobs_ptr,
    logits_stride,
    scores_stride,
    PENALISED: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    CAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    scores_ptr += row * scores_stride
    scratch_ptr += row * CAP
    # 1. The best score, and the total of the model's own distribution. Lanes go on their own: nothing waits.
    peaks = tl.full((BLOCK,), float("-inf"), tl.float32)
    bests = tl.full((BLOCK,), float("-inf"), tl.float32)
    at = tl.full((BLOCK,), V - 1, tl.int32)
    for first in tl.range(0, V, BLOCK, loop_unroll_factor=8):
        column = first + tl.arange(0, BLOCK)
        logit = tl.load(logits_ptr + column, mask=column < V, other=float("-inf")).to(tl.float32)
        score = logit
        if PENALISED:
            peaks = tl.maximum(peaks, logit)
            score = tl.load(scores_ptr + column, mask=column < V, other=float("-inf"))
        better = score > bests
        bests = tl.where(better, score, bests)
        at = tl.where(better, column, at)
    largest = tl.max(bests, 0)
    token = tl.min(tl.where(bests == largest, at, V - 1), 0)
    peak = tl.max(peaks, 0) if PENALISED else largest
    totals = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, V, BLOCK, loop_unroll_factor=8):
        column = first + tl.arange(0, BLOCK)
        logit = tl.load(logits_ptr + column, mask=column < V, other=float("-inf")).to(tl.float32)
        totals += tl.exp(logit - peak)
    total = tl.sum(totals, 0)
    # 2. Draw.
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        temperature = tl.maximum(temperature, 1.1754944e-38)
        top_k = tl.load(top_k_ptr + row).to(tl.int32)
        top_p = tl.load(top_p_ptr + row)
        low = tl.zeros((), tl.int32)
        whole = tl.zeros((), tl.float64)
        if (top_k > 0) & (top_k < V):
            low, above, weight_above = _search(
                scores_ptr,
                scratch_ptr,
                largest,
                temperature,
                top_k.to(tl.float64),
                low,
                True,
                V,
                BLOCK,
                CAP,
            )
            whole = weight_above + (top_k - above).to(tl.float64) * low.to(tl.float32, bitcast=True)
        if top_p < 1:
            if whole == 0:
                weights = tl.zeros((BLOCK,), tl.float32)
                for first in tl.range(0, V, BLOCK, loop_unroll_factor=4):
                    e, _ = _weigh(scores_ptr, first + tl.arange(0, BLOCK), largest, temperature, V)
                    weights += e
                whole = tl.sum(weights.to(tl.float64), 0)
            low, _, _ = _search(
                scores_ptr,
                scratch_ptr,
                largest,
                temperature,
                top_p * whole,
                low,
                False,
                V,
                BLOCK,
                CAP,
            )
        least = tl.maximum(low.to(tl.float32, bitcast=True), tl.load(min_p_ptr + row))
        # 3. The weight of each tile, the tile in which u falls, the token in it.
        tile = tl.arange(0, TILES)
        weights = tl.zeros((TILES,), tl.float64)
        for first in tl.range(0, V, 2 * BLOCK, loop_unroll_factor=2):
            e, _ = _weigh(scores_ptr, first + tl.arange(0, 2 * BLOCK), largest, temperature, V)
            weight = tl.sum(tl.where(e >= least, e, 0.0).to(tl.float64), 0)
            weights = tl.where(tile == first // (2 * BLOCK), weight, weights)
        reached = tl.cumsum(weights, 0)
        goal = tl.load(uniforms_ptr + row) * tl.sum(tl.where(tile == TILES - 1, reached, 0.0), 0)
        mine = tl.minimum(tl.sum((reached <= goal).to(tl.int32), 0), (V - 1) // (2 * BLOCK))
        before = tl.sum(tl.where(tile == mine - 1, reached, 0.0), 0)
        column = mine * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
        e, _ = _weigh(scores_ptr, column, largest, temperature, V)
        kept = (e >= least) & (e > 0)
        inner = before + tl.cumsum(tl.where(kept, e, 0.0).to(tl.float64), 0)
        drawn = tl.min(tl.where(kept & (inner > goal), column, V), 0)
        last = tl.max(tl.where(kept, column, -1), 0)  # two orders of one sum may differ in the last bit
        drawn = tl.where(drawn < V, drawn, last)
        token = tl.where(drawn >= 0, drawn, token)
    tl.store(tokens_ptr + row, token.to(tl.int64))
    logit = tl.load(logits_ptr + token).to(tl.float32)
    tl.store(logprobs_ptr + row, logit - (peak + tl.log(total)))


@triton.jit(do_not_specialize=["N", "ids_stride"])
def _count_kernel(
    ids_ptr, lengths_ptr, num_prompt_ptr, counts_ptr, N, ids_stride, V: tl.constexpr, BLOCK: tl.constexpr
):
    """How often the text of a row has each token, and SEEN if its prompt has it."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    length, prompt = tl.load(lengths_ptr + row), tl.load(num_prompt_ptr + row)
    inside = (at < N) & (at < length)
    token = tl.load(ids_ptr + row * ids_stride + at, mask=inside, other=0)
    one = tl.full((BLOCK,), 1, tl.int32)
    tl.atomic_add(counts_ptr + row * V + token, one, mask=inside & (at >= prompt), sem="relaxed")
    seen = tl.full((BLOCK,), SEEN, tl.int32)
    tl.atomic_or(counts_ptr + row * V + token, seen, mask=inside & (at < prompt), sem="relaxed")


@triton.jit
def _penalise_kernel(
    logits_ptr,
    counts_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    scores_ptr,
    stride,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(logits_ptr + row * stride + column, mask=column < V, other=0.0).to(tl.float32)
    count = tl.load(counts_ptr + row * V + column, mask=column < V, other=0)
    factor = tl.load(repetition_ptr + row)
    score = tl.where(count != 0, tl.where(score > 0, score / factor, score * factor), score)
    count = count & (SEEN - 1)
    score -= tl.load(frequency_ptr + row) * count.to(tl.float32)
    score -= tl.where(count > 0, tl.load(presence_ptr + row), 0.0)
    tl.store(scores_ptr + row * V + column, score, mask=column < V)


def sample_refusal(
    logits_SV: Tensor,
    temperature_S: Tensor,
    top_k_S: Tensor,
    top_p_S: Tensor,
    min_p_S: Tensor,
    uniforms_S: Tensor,
    scores_SV: Tensor | None,
) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    if logits_SV.dtype not in DTYPES:
        return f"logits are {logits_SV.dtype}; the kernel takes bfloat16, float16 and float32"
    if logits_SV.stride(1) != 1 or (scores_SV is not None and scores_SV.stride(1) != 1):
        return "the logits of a row are not side by side; make them contiguous"
    return None


@torch.no_grad()
def sample(
    logits_SV: Tensor,
    temperature_S: Tensor,
    top_k_S: Tensor,
    top_p_S: Tensor,
    min_p_S: Tensor,
    uniforms_S: Tensor,
    scores_SV: Tensor | None,
    *,
    cap: int = CAP,
) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities, as `ops.api.sample` says; `cap`: what a search's second half holds."""
    S, V = logits_SV.shape
    tokens_S = torch.empty(S, dtype=torch.int64, device=logits_SV.device)
    logprobs_S = torch.empty(S, dtype=torch.float32, device=logits_SV.device)
    if S:
        block = min(TILE, triton.next_power_of_2(V))
        scores = logits_SV if scores_SV is None else scores_SV
        _sample_kernel[(S,)](
            logits_SV,
            scores,
            temperature_S,
            top_k_S,
            top_p_S,
            min_p_S,
            uniforms_S,
            torch.empty(S, cap, dtype=torch.int32, device=logits_SV.device),
            tokens_S,
            logprobs_S,
            logits_SV.stride(0),
            scores.stride(0),
            PENALISED=scores_SV is not None,
            V=V,
            BLOCK=block,
            TILES=max(32, triton.next_power_of_2(triton.cdiv(V, 2 * block))),
            CAP=cap,
            num_warps=16 if block >= 4096 else 4,
        )
    return tokens_S, logprobs_S


def fixed_sample(logits_SV: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same in batch-invariant form: a token's log-probability is the one `fixed_linear_cross_entropy`
    has."""
    tokens_S, _ = sample(logits_SV, *rest)  # type: ignore[arg-type]
    return tokens_S, -nll(logits_SV, tokens_S)


@torch.no_grad()
def penalise(
    logits_SV: Tensor,
    ids_SN: Tensor,
    lengths_S: Tensor,
    num_prompt_S: Tensor,
    repetition_S: Tensor,
    frequency_S: Tensor,
    presence_S: Tensor,
) -> Tensor:
    """Scores in float32, as `ops.api.penalise` says."""
    (S, V), N = logits_SV.shape, ids_SN.shape[1]
    scores_SV = torch.empty(S, V, dtype=torch.float32, device=logits_SV.device)
    if S:
        counts_SV = torch.zeros(S, V, dtype=torch.int32, device=logits_SV.device)
        if N:
            _count_kernel[(S, triton.cdiv(N, 256))](
                ids_SN, lengths_S, num_prompt_S, counts_SV, N, ids_SN.stride(0), V=V, BLOCK=256
            )
        block = min(2048, triton.next_power_of_2(V))
        _penalise_kernel[(S, triton.cdiv(V, block))](
            logits_SV,
            counts_SV,
            repetition_S,
            frequency_S,
            presence_S,
            scores_SV,
            logits_SV.stride(0),
            V=V,
            BLOCK=block,
        )
    return scores_SV


def penalise_refusal(logits_SV: Tensor, ids_SN: Tensor, *_: Tensor) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    if logits_SV.dtype not in DTYPES:
        return f"logits are {logits_SV.dtype}; the kernel takes bfloat16, float16 and float32"
    if logits_SV.stride(1) != 1 or ids_SN.stride(1) != 1:
        return "the logits or the ids of a row are not side by side; make them contiguous"
    return None
