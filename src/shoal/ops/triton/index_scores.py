"""The lightning indexer's scores on a GPU, of a pack or over a paged cache.

    I_tn = sum_j w_tj relu(q_tj k_n)      a program is a token and some tiles of BN positions

The keys of a tile are the tall side of the product, the index heads its wide one; the weighted sum over heads
is taken where the product lies. What a program waits for before its first key (sequence, length, page) is
paid once for its tiles, whose loads are in flight ahead. How many tiles it has changes no bit. Keys may be
views into wider rows: the indexer's key lies behind the latent in one row of the cache. A tile within a page
looks up that page alone, which leaves time for a second load in flight.

Narrow keys (`index`) are e4m3 with a scale each: one product of I <= 128 columns in the tensor core, whose 14
bits that many sum well enough to, scaled where it lies.

Bound: the keys' bytes when decoding (256 a position, narrow 132), the matrix rate for prompts. On an H200
(2026-11-29) 14, 78 and 278 us at batch 1, 8 and 32 of 128k positions, narrow 11.5, 49 and 153, of which 3 us
narrow the queries: 79% of the bus at 32, and 85% in bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from shoal.ops.triton.launch import programmatic
from shoal.ops.triton.quantise import FP8, lacks_e4m3

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_SEQUENCES = 8192
PROGRAMS = 528  # four a multiprocessor: from there on each has several tiles


@dataclass(frozen=True)
class Plan:
    """Of scores: positions of a tile, tiles of a program at most, warps, loads in flight."""

    bn: int
    tiles: int
    warps: int
    stages: int


PLAIN, WIDE_KEYS, NARROW_KEYS = Plan(32, 1, 4, 2), Plan(64, 8, 4, 3), Plan(128, 8, 4, 3)
PAGES = Plan(64, 8, 4, 5)  # tiles within pages


@triton.jit(do_not_specialize=["TILES"])
def scores_kernel(
    q_ptr,
    by_ptr,  # scales of narrow queries
    weights_ptr,
    keys_ptr,
    scales_ptr,
    table_ptr,
    contexts_ptr,
    cu_ptr,
    out_ptr,
    S,
    B,
    N,
    TILES,  # of a program
    J: tl.constexpr,
    W: tl.constexpr,
    BJ: tl.constexpr,
    BI: tl.constexpr,
    ROW: tl.constexpr,
    PAGE: tl.constexpr,
    PAGED: tl.constexpr,
    WITHIN: tl.constexpr,  # a tile lies within a page
    NARROW: tl.constexpr,
    S_PAD: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()
    token, part = tl.program_id(1), tl.program_id(0)
    index = tl.arange(0, S_PAD)
    ends = tl.load(cu_ptr + index + 1, mask=index < S, other=0x7FFFFFFF)
    s = tl.sum((ends <= token).to(tl.int32), 0)
    first = tl.load(cu_ptr + s)
    seen = token - first + 1
    if PAGED:
        seen += tl.load(contexts_ptr + s) - (tl.load(cu_ptr + s + 1) - first)
    begin, end = part * TILES, tl.minimum(part * TILES + TILES, (N + BN - 1) // BN)
    last = tl.minimum(end, (seen + BN - 1) // BN)
    out_ptr += token.to(tl.int64) * N
    i, j = tl.arange(0, BI), tl.arange(0, BJ)
    q = tl.load(
        q_ptr + (token.to(tl.int64) * J + j)[:, None] * W + i[None, :],
        mask=(j < J)[:, None] & (i < W)[None, :],
        other=0.0,
    )
    weight = tl.load(weights_ptr + token.to(tl.int64) * J + j, mask=j < J, other=0.0)
    if NARROW:
        weight *= tl.load(by_ptr + token.to(tl.int64) * J + j, mask=j < J, other=0.0)
    for tile in range(begin, last):
        n = tile * BN + tl.arange(0, BN)
        if WITHIN:
            page = tl.load(table_ptr + s.to(tl.int64) * B + tile * BN // PAGE).to(tl.int64)
            first_row = page * PAGE + tile * BN % PAGE
            row = first_row + tl.arange(0, BN)
        elif PAGED:
            page = tl.load(table_ptr + s.to(tl.int64) * B + n // PAGE, mask=n < seen, other=0).to(tl.int64)
            row = page * PAGE + n % PAGE
        else:
            row = (first + n).to(tl.int64)
        if WITHIN:  # and of the page what is past the context is read, but has no score
            k = tl.load(
                keys_ptr + first_row * ROW + (tl.arange(0, BN)[:, None] * ROW + i[None, :]),
                mask=None if W == BI else (i < W)[None, :],
            )
        else:
            k = tl.load(
                keys_ptr + row[:, None] * ROW + i[None, :],
                mask=(n < seen)[:, None] & (i < W)[None, :],
                other=0.0,
            )
        heads = tl.maximum(tl.dot(k, q.T, input_precision=PRECISION), 0.0)
        score = tl.sum(heads * weight[None, :], 1)
        if NARROW:
            score *= tl.load(scales_ptr + row, mask=n < seen, other=0.0)
        tl.store(out_ptr + n, tl.where(n < seen, score, float("-inf")), mask=n < N)
    for tile in range(tl.maximum(begin, last), end):
        n = tile * BN + tl.arange(0, BN)
        tl.store(out_ptr + n, tl.full((BN,), float("-inf"), tl.float32), mask=n < N)


def _scores_refusal(q_TJI: Tensor, weights_TJ: Tensor, keys: Tensor, sequences: int) -> str | None:
    if q_TJI.dtype not in DTYPES:
        return f"queries are {q_TJI.dtype}; the kernel takes bfloat16, float16 and float32"
    if keys.dtype != q_TJI.dtype or weights_TJ.dtype != torch.float32:
        return f"queries are {q_TJI.dtype}, keys {keys.dtype}, weights {weights_TJ.dtype}; cast them"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q_TJI, weights_TJ, keys)):
        return "the kernel has no gradient, and the indexer is learning"
    if q_TJI.shape[1] > 128 or q_TJI.shape[2] > 256:
        return f"{q_TJI.shape[1]} index heads of {q_TJI.shape[2]}; a program holds at most 128 of 256"
    if sequences > MAX_SEQUENCES:
        return f"{sequences} sequences; a program counts at most {MAX_SEQUENCES}"
    return None


def index_scores_refusal(
    q_TJI: Tensor, weights_TJ: Tensor, k_TI: Tensor, cu_S1: Tensor, *_: Any
) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    return _scores_refusal(q_TJI, weights_TJ, k_TI, cu_S1.shape[0] - 1)


def paged_index_scores_refusal(
    q_TJI: Tensor, weights_TJ: Tensor, pages: Tensor, table_SB: Tensor, *_: Any
) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    if pages.stride(2) != 1 or pages.stride(0) != pages.shape[1] * pages.stride(1):
        return "the pages are no rows of one stride; the kernel does not copy a cache"
    return _scores_refusal(q_TJI, weights_TJ, pages, table_SB.shape[0])


def _choose(dtype: torch.dtype, page: int, *, narrow: bool) -> Plan:
    if dtype == torch.float32:
        return PLAIN
    if page % PAGES.bn == 0:
        return PAGES
    return NARROW_KEYS if narrow else WIDE_KEYS


def _scores(
    q_TJI: Tensor,
    weights_TJ: Tensor,
    keys: Tensor,
    row: int,
    table_SB: Tensor,
    contexts_S: Tensor,
    cu_S1: Tensor,
    width: int,
    page: int,
    *,
    paged: bool,
    by_TJ: Tensor | None = None,
    scales: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    T, J, W = q_TJI.shape
    scores_TN = torch.empty(T, width, dtype=torch.float32, device=q_TJI.device)
    S = cu_S1.shape[0] - 1
    if scores_TN.numel():
        plan = plan or _choose(q_TJI.dtype, page if paged else 1, narrow=scales is not None)
        tiles, pdl = triton.cdiv(width, plan.bn), programmatic(q_TJI.device)
        each = max(1, min(plan.tiles, T * tiles // PROGRAMS))
        scores_kernel[(triton.cdiv(tiles, each), T)](
            q_TJI.contiguous(), by_TJ, weights_TJ.contiguous(), keys, scales, table_SB.contiguous(),
            contexts_S, cu_S1, scores_TN, S, table_SB.shape[1], width, each, J=J, W=W,
            BJ=max(16, triton.next_power_of_2(J)),
            BI=max(16 if scales is None else 32, triton.next_power_of_2(W)), ROW=row, PAGE=page, PAGED=paged,
            WITHIN=paged and page % plan.bn == 0,
            NARROW=scales is not None, S_PAD=triton.next_power_of_2(max(S, 1)), BN=plan.bn,
            PRECISION="ieee" if q_TJI.dtype == torch.float32 else "tf32", PDL=pdl,
            launch_pdl=pdl, num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip
    return scores_TN


def index_scores(q_TJI: Tensor, weights_TJ: Tensor, k_TI: Tensor, cu_S1: Tensor, max_seqlen: int) -> Tensor:
    """As `ops.api.index_scores` says, where nothing learns."""
    k_TI = k_TI.contiguous()
    table = cu_S1.view(1, -1)
    return _scores(q_TJI, weights_TJ, k_TI, k_TI.shape[1], table, cu_S1, cu_S1, max_seqlen, 1, paged=False)


@torch.no_grad()
def paged_index_scores(
    q_TJI: Tensor,
    weights_TJ: Tensor,
    pages: Tensor,
    table_SB: Tensor,
    contexts_S: Tensor,
    longest: int,
    cu_S1: Tensor,
    max_seqlen: int,
    *,
    plan: Plan | None = None,
) -> Tensor:
    """As `ops.api.paged_index_scores` says. `plan` overrides how a program reads."""
    where = table_SB, contexts_S, cu_S1, longest, pages.shape[1]
    return _scores(q_TJI, weights_TJ, pages, pages.stride(1), *where, paged=True, plan=plan)


def narrow_index_scores_refusal(
    q_TJI: Tensor,
    by_TJ: Tensor,
    weights_TJ: Tensor,
    values: Tensor,
    scales: Tensor,
    table_SB: Tensor,
    *_: Any,
) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    if q_TJI.dtype != FP8 or values.dtype != FP8 or weights_TJ.dtype != torch.float32:
        return f"queries are {q_TJI.dtype}, keys {values.dtype}, weights {weights_TJ.dtype}; narrow them"
    if q_TJI.shape[1] > 128 or table_SB.shape[0] > MAX_SEQUENCES:
        return f"{q_TJI.shape[1]} index heads, {table_SB.shape[0]} sequences; at most 128, {MAX_SEQUENCES}"
    if not (values.is_contiguous() and scales.is_contiguous()):
        return "the pages are no rows of one stride; the kernel does not copy a cache"
    return lacks_e4m3(values)


@torch.no_grad()
def narrow_index_scores(
    q_TJI: Tensor,
    by_TJ: Tensor,
    weights_TJ: Tensor,
    values: Tensor,
    scales: Tensor,
    table_SB: Tensor,
    contexts_S: Tensor,
    longest: int,
    cu_S1: Tensor,
    max_seqlen: int,
    *,
    plan: Plan | None = None,
) -> Tensor:
    """As `ops.quantised.narrow_index_scores` says. `plan` overrides how a program reads."""
    where = table_SB, contexts_S, cu_S1, longest, values.shape[1]
    width = values.shape[2]
    by_TJ = by_TJ.contiguous()
    return _scores(
        q_TJI, weights_TJ, values, width, *where, paged=True, by_TJ=by_TJ, scales=scales, plan=plan
    )
