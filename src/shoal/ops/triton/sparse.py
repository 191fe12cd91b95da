"""DeepSeek sparse attention on a GPU: the lightning indexer's scores, and latent attention over chosen rows.

    I_tn = sum_j w_tj relu(q_tj k_n)                       scores: a program is a token and BN positions
    o_t = sum_{n in S_t} softmax_n(scale q_t c_n) c_n[:C]  attention: a token, BM heads, a part of its rows

The keys of a tile are the tall side of the scores' product, the index heads its wide one; the weighted sum
over heads is taken where the product lies. Attention is `cache_splits` over rows that are named instead of
paged: a row is read once, as key and as value. Where tokens are few, a token's rows are shared out and the
parts joined. Rows may be views into wider ones: the indexer's key lies behind the latent in one row of the
cache.

Narrow keys (`index`) are e4m3 with a scale each: one product of I <= 128 columns in the tensor core, whose 14
bits that many sum well enough to, scaled where it lies. Not run on a GPU yet.

Bound: the keys' bytes when decoding (256 a position, narrow 132), the matrix rate for prompts; attention 2 K
H (2 C + R) FLOPs a token. On an H200 (2026-11-24), V3.2's shape at 128k positions: scores 15, 90 and 345 us
at batch 1, 8 and 32, 68% of what their bytes allow; attention over 2048 rows 21, 38 and 109.
benchmarks/kernels/sparse.py holds both, and the selection between them, against dense MLA.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.ops.triton.quantise import FP8, lacks_e4m3

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_SEQUENCES = 8192


@triton.jit
def scores_kernel(
    q_ptr,
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
    J: tl.constexpr,
    W: tl.constexpr,
    BJ: tl.constexpr,
    BI: tl.constexpr,
    ROW: tl.constexpr,
    PAGE: tl.constexpr,
    PAGED: tl.constexpr,
    NARROW: tl.constexpr,
    S_PAD: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    token, tile = tl.program_id(1), tl.program_id(0)
    index = tl.arange(0, S_PAD)
    ends = tl.load(cu_ptr + index + 1, mask=index < S, other=0x7FFFFFFF)
    s = tl.sum((ends <= token).to(tl.int32), 0)
    first = tl.load(cu_ptr + s)
    seen = token - first + 1
    if PAGED:
        seen += tl.load(contexts_ptr + s) - (tl.load(cu_ptr + s + 1) - first)
    n = tile * BN + tl.arange(0, BN)
    to = out_ptr + token.to(tl.int64) * N + n
    if tile * BN < seen:
        if PAGED:
            page = tl.load(table_ptr + s.to(tl.int64) * B + n // PAGE, mask=n < seen, other=0).to(tl.int64)
            row = page * PAGE + n % PAGE
        else:
            row = (first + n).to(tl.int64)
        i, j = tl.arange(0, BI), tl.arange(0, BJ)
        k = tl.load(
            keys_ptr + row[:, None] * ROW + i[None, :], mask=(n < seen)[:, None] & (i < W)[None, :], other=0.0
        )
        q = tl.load(
            q_ptr + (token.to(tl.int64) * J + j)[:, None] * W + i[None, :],
            mask=(j < J)[:, None] & (i < W)[None, :],
            other=0.0,
        )
        weight = tl.load(weights_ptr + token.to(tl.int64) * J + j, mask=j < J, other=0.0)
        heads = tl.maximum(tl.dot(k, q.T, input_precision=PRECISION), 0.0)
        score = tl.sum(heads * weight[None, :], 1)
        if NARROW:
            score *= tl.load(scales_ptr + row, mask=n < seen, other=0.0)
        tl.store(to, tl.where(n < seen, score, float("-inf")), mask=n < N)
    else:
        tl.store(to, tl.full((BN,), float("-inf"), tl.float32), mask=n < N)


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
    scales: Tensor | None = None,
) -> Tensor:
    T, J, W = q_TJI.shape
    scores_TN = torch.empty(T, width, dtype=torch.float32, device=q_TJI.device)
    tile = 128 if q_TJI.dtype != torch.float32 else 32
    S = cu_S1.shape[0] - 1
    if scores_TN.numel():
        scores_kernel[(triton.cdiv(width, tile), T)](
            q_TJI.contiguous(), weights_TJ.contiguous(), keys, scales, table_SB.contiguous(), contexts_S,
            cu_S1, scores_TN, S, table_SB.shape[1], width, J=J, W=W, BJ=max(16, triton.next_power_of_2(J)),
            BI=max(16 if scales is None else 32, triton.next_power_of_2(W)), ROW=row, PAGE=page, PAGED=paged,
            NARROW=scales is not None, S_PAD=triton.next_power_of_2(max(S, 1)), BN=tile,
            PRECISION="ieee" if q_TJI.dtype == torch.float32 else "tf32", num_warps=4,
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
) -> Tensor:
    """As `ops.api.paged_index_scores` says."""
    where = table_SB, contexts_S, cu_S1, longest, pages.shape[1]
    return _scores(q_TJI, weights_TJ, pages, pages.stride(1), *where, paged=True)


def narrow_index_scores_refusal(
    q_TJI: Tensor, weights_TJ: Tensor, values: Tensor, scales: Tensor, table_SB: Tensor, *_: Any
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
    weights_TJ: Tensor,
    values: Tensor,
    scales: Tensor,
    table_SB: Tensor,
    contexts_S: Tensor,
    longest: int,
    cu_S1: Tensor,
    max_seqlen: int,
) -> Tensor:
    """As `ops.quantised.narrow_index_scores` says."""
    where = table_SB, contexts_S, cu_S1, longest, values.shape[1]
    return _scores(q_TJI, weights_TJ, values, values.shape[2], *where, paged=True, scales=scales)


@triton.jit
def named_kernel(
    q_ptr,
    rows_ptr,
    indices_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    T,
    K,
    PART,  # rows of a program, a multiple of BN
    scale,  # times log2(e)
    H: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    ROW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    part, block, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = block * BM + tl.arange(0, BM)
    c, r = tl.arange(0, BC), tl.arange(0, BR)
    base = q_ptr + (token.to(tl.int64) * H + head)[:, None] * (C + R)
    q = tl.load(base + c[None, :], mask=(head < H)[:, None] & (c < C)[None, :], other=0.0)
    q_rope = tl.load(base + C + r[None, :], mask=(head < H)[:, None] & (r < R)[None, :], other=0.0)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    o = tl.zeros((BM, BC), tl.float32)
    indices_ptr += token.to(tl.int64) * K
    for start in range(part * PART, tl.minimum(K, part * PART + PART), BN):
        at = start + tl.arange(0, BN)
        row = tl.load(indices_ptr + at, mask=at < K, other=-1)
        there = row >= 0
        rows = rows_ptr + tl.maximum(row, 0)[:, None] * ROW
        k = tl.load(rows + c[None, :], mask=there[:, None] & (c < C)[None, :], other=0.0)
        k_rope = tl.load(rows + C + r[None, :], mask=there[:, None] & (r < R)[None, :], other=0.0)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        scores = tl.dot(q_rope, k_rope.T, scores, input_precision=PRECISION)
        scores = tl.where(there[None, :], scores * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        ground = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp2(top - ground)
        p = tl.exp2(scores - ground[:, None])
        total = total * fade + tl.sum(p, 1)
        o = tl.dot(p.to(dtype), k, o * fade[:, None], input_precision=PRECISION)
        top = higher
    total = tl.where(total > 0, total, 1.0)
    o = o / total[:, None]
    to = token.to(tl.int64) * H + head
    mask = (head < H)[:, None] & (c < C)[None, :]
    if SPLIT:
        to += part.to(tl.int64) * T * H
        tl.store(partial_ptr + to[:, None] * C + c[None, :], o, mask=mask)
        tl.store(lse_ptr + to, top + tl.log2(total), mask=head < H)
    else:
        tl.store(out_ptr + to[:, None] * C + c[None, :], o.to(dtype), mask=mask)


@triton.jit
def join_kernel(
    partial_ptr,
    lse_ptr,
    out_ptr,
    out_lse_ptr,
    rows,
    parts,
    C: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
    LSE: tl.constexpr,
):
    """One row of its parts: (parts, rows, C) and log2-sum-exp (parts, rows), none of which need be there."""
    row = tl.program_id(0).to(tl.int64)
    part, c = tl.arange(0, BP), tl.program_id(1) * BC + tl.arange(0, BC)
    lse = tl.load(lse_ptr + part * rows.to(tl.int64) + row, mask=part < parts, other=float("-inf"))
    top = tl.max(lse, 0)
    share = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(share, 0)
    at = (part * rows.to(tl.int64) + row)[:, None] * C + c[None, :]
    o = tl.load(partial_ptr + at, mask=(part < parts)[:, None] & (c < C)[None, :], other=0.0)
    o = tl.sum(o * share[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * C + c, o.to(out_ptr.dtype.element_ty), mask=c < C)
    if LSE:
        whole = (top + tl.log2(tl.where(total > 0, total, 1.0))) * 0.6931471805599453
        tl.store(out_lse_ptr + row, whole, mask=tl.program_id(1) == 0)


def join(partial: Tensor, lse: Tensor, out: Tensor, out_lse: Tensor | None = None) -> None:
    """Fill `out` (..., C), and `out_lse` in nats, from float32 parts (P, ..., C) and their log2-sum-exp."""
    parts, C = partial.shape[0], partial.shape[-1]
    rows, block = out.numel() // C, min(128, triton.next_power_of_2(C))
    join_kernel[(rows, triton.cdiv(C, block))](
        partial, lse, out, lse if out_lse is None else out_lse, rows, parts, C=C, BC=block,
        BP=triton.next_power_of_2(parts), LSE=out_lse is not None, num_warps=2,
    )  # fmt: skip


def sparse_latent_attention_refusal(
    q_THL: Tensor, rows_XL: Tensor, indices_TK: Tensor, rank: int, scale: float
) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    if q_THL.dtype not in DTYPES or rows_XL.dtype != q_THL.dtype:
        return f"queries are {q_THL.dtype} and rows {rows_XL.dtype}; both bfloat16, float16 or float32"
    if torch.is_grad_enabled() and (q_THL.requires_grad or rows_XL.requires_grad):
        return "the kernel has no gradient"
    if rows_XL.stride(1) != 1:
        return "the elements of a row are not side by side"
    if rank > 512 or q_THL.shape[2] - rank > 512:
        return f"rows of {rank} + {q_THL.shape[2] - rank} elements; a program holds at most 512 of each"
    return None


def sparse_latent_attention(
    q_THL: Tensor, rows_XL: Tensor, indices_TK: Tensor, rank: int, scale: float, *, parts: int | None = None
) -> Tensor:
    """As `ops.api.sparse_latent_attention` says, where nothing learns. `parts` overrides in how many a
    token's rows are shared out."""
    (T, H, L), K = q_THL.shape, indices_TK.shape[1]
    out_THC = q_THL.new_empty(T, H, rank)
    if not out_THC.numel():
        return out_THC
    half = q_THL.dtype != torch.float32
    bm = (64 if H > 32 else 16) if half else 16
    bn = (64 if half and rank >= 64 else 16) if K > 16 else 16
    blocks = triton.cdiv(H, bm)
    if parts is None:  # enough programs for every multiprocessor, and rows enough for a program
        parts = max(1, min(132 // (T * blocks), triton.cdiv(K, 2 * bn)))
    part = triton.cdiv(triton.cdiv(K, parts), bn) * bn
    parts = triton.cdiv(K, part)
    scratch = parts if parts > 1 else 0
    partial = torch.empty(scratch, T, H, rank, dtype=torch.float32, device=q_THL.device)
    lse = torch.empty(scratch, T, H, dtype=torch.float32, device=q_THL.device)
    named_kernel[(parts, blocks, T)](
        q_THL.contiguous(), rows_XL, indices_TK.contiguous(), out_THC, partial, lse, T, K, part,
        scale * math.log2(math.e), H=H, C=rank, R=L - rank, BC=triton.next_power_of_2(max(rank, 16)),
        BR=triton.next_power_of_2(max(L - rank, 16)), ROW=rows_XL.stride(0), BM=bm, BN=bn,
        SPLIT=parts > 1, PRECISION="tf32" if half else "ieee", num_warps=8 if bm == 64 else 4, num_stages=2,
    )  # fmt: skip
    if parts > 1:
        join(partial, lse, out_THC)
    return out_THC
