"""Latent attention over chosen rows on a GPU: what a token of sparse attention reads.

    o_t = sum_{n in S_t} softmax_n(scale q_t c_n) c_n[:C]     a program: a token, BM heads, a part of its rows

`cache_splits` over rows that are named instead of paged: a row is read once, as key and as value. Where
tokens are few, a token's rows are shared out and the parts joined. Rows may be views into wider ones,
or narrow (narrow_rows.py) and widened as they come. On Hopper more than FEW tokens of many heads are
sequences to `cache_turns`, and each of their rows a page.

Bound: 2 K H (2 C + R) FLOPs a token. On an H200 (2026-11-29), V3.2's shape, 2048 rows: 18, 36 and 54 us at
batch 1, 8 and 32, 1.4 ms for 1,024 tokens (in turns; 111 us and 2.6 ms otherwise).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from shoal.ops.triton import cache_attention
from shoal.ops.triton.cache_plan import TURNS, Plan
from shoal.ops.triton.launch import programmatic, wait_for_previous
from shoal.ops.triton.narrow_rows import NARROW, behind_narrow, load_narrow
from shoal.ops.triton.quantise import lacks_e4m3

FEW = 8  # tokens; of more `cache_turns` is quicker
TOKENS = 256  # of a call of `cache_turns`: each of its warpgroups counts them all
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
    NARROW: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_wait()  # and nothing is let in early: what follows would take the place of other programs
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
        if NARROW:
            k = load_narrow(rows, there[:, None], C, BC).to(dtype)
            behind = behind_narrow(rows, C) + r[None, :]
            k_rope = tl.load(behind, mask=there[:, None] & (r < R)[None, :], other=0.0).to(dtype)
        else:
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
    PDL: tl.constexpr,
):
    """One row of its parts: (parts, rows, C) and log2-sum-exp (parts, rows), none of which need be there."""
    wait_for_previous(PDL)
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
    pdl = programmatic(out.device)
    join_kernel[(rows, triton.cdiv(C, block))](
        partial, lse, out, lse if out_lse is None else out_lse, rows, parts, C=C, BC=block,
        BP=triton.next_power_of_2(parts), LSE=out_lse is not None, PDL=pdl, launch_pdl=pdl, num_warps=2,
    )  # fmt: skip


@triton.jit
def lengths_kernel(indices_ptr, lengths_ptr, cu_ptr, K, K_PAD: tl.constexpr, PDL: tl.constexpr):
    """How many rows a token names, and each token as a sequence."""
    wait_for_previous(PDL)
    token, k = tl.program_id(0), tl.arange(0, K_PAD)
    index = tl.load(indices_ptr + token.to(tl.int64) * K + k, mask=k < K, other=-1)
    tl.store(lengths_ptr + token, tl.sum((index >= 0).to(tl.int32), 0))
    tl.store(cu_ptr + token + 1, token + 1)
    if token == 0:
        tl.store(cu_ptr, 0)


def attend_as_pages(
    q_THL: Tensor, rows_XL: Tensor, indices_TK: Tensor, rank: int, scale: float, plan: Plan = TURNS
) -> Tensor:
    """By the kernels of a cache: each token is a sequence, and each of its rows a page."""
    (T, K), row, pdl = indices_TK.shape, rows_XL.stride(0), programmatic(q_THL.device)
    pages = rows_XL.as_strided((len(rows_XL), 1, rows_XL.shape[1]), (row, row, 1))
    lengths_T, cu_T1 = (torch.empty(n, dtype=torch.int32, device=q_THL.device) for n in (T, T + 1))
    lengths_kernel[(T,)](
        indices_TK, lengths_T, cu_T1, K, K_PAD=triton.next_power_of_2(K), PDL=pdl, launch_pdl=pdl
    )

    def attend(some: slice) -> Tensor:
        return cache_attention.latent_attention(
            q_THL[some], pages, indices_TK[some], lengths_T[some], K, cu_T1, 1, rank, scale, plan=plan
        )

    if T <= TOKENS:
        return attend(slice(0, T))
    out_THC = q_THL.new_empty(T, q_THL.shape[1], rank)
    for at in range(0, T, TOKENS):
        out_THC[at : at + TOKENS] = attend(slice(at, at + TOKENS))
    return out_THC


def sparse_latent_attention_refusal(
    q_THL: Tensor, rows_XL: Tensor, indices_TK: Tensor, rank: int, scale: float
) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    narrow = rows_XL.dtype == NARROW
    if q_THL.dtype not in DTYPES or (rows_XL.dtype != q_THL.dtype and not narrow):
        return f"queries are {q_THL.dtype} and rows {rows_XL.dtype}; both bfloat16, float16 or float32"
    if narrow and (why := lacks_e4m3(rows_XL)):
        return why
    if torch.is_grad_enabled() and (q_THL.requires_grad or rows_XL.requires_grad):
        return "the kernel has no gradient"
    if rows_XL.stride(1) != 1:
        return "the elements of a row are not side by side"
    if rank > 512 or q_THL.shape[2] - rank > 512:
        return f"rows of {rank} + {q_THL.shape[2] - rank} elements; a program holds at most 512 of each"
    return None


@dataclass(frozen=True)
class Tiles:
    """Of attention: heads and rows of a step, warps, loads in flight, and into how many a token's rows are
    shared out."""

    bm: int
    bn: int
    warps: int
    stages: int
    parts: int


def choose_tiles(tokens: int, heads: int, rows: int, rank: int, dtype: torch.dtype) -> Tiles:
    """For so many tokens at once. Enough programs for every multiprocessor, and rows enough for a program."""
    half = dtype != torch.float32
    bm = (64 if heads > 32 else 16) if half else 16
    bn = (64 if half and rank >= 64 else 16) if rows > 16 else 16
    parts = min(132 // (tokens * triton.cdiv(heads, bm)), triton.cdiv(rows, 2 * bn))
    return Tiles(bm, bn, 8 if bm == 64 else 4, 2, max(1, parts))


def sparse_latent_attention(
    q_THL: Tensor,
    rows_XL: Tensor,
    indices_TK: Tensor,
    rank: int,
    scale: float,
    *,
    parts: int | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """As `ops.api.sparse_latent_attention` says, where nothing learns. `parts` overrides in how many a
    token's rows are shared out, `tiles` everything."""
    (T, H, L), K = q_THL.shape, indices_TK.shape[1]
    out_THC = q_THL.new_empty(T, H, rank)
    if not out_THC.numel():
        return out_THC
    chosen = parts is not None or tiles is not None
    rows = rows_XL.unsqueeze(0)
    if T > FEW and not chosen and H > 32 and cache_attention.turns_refusal(q_THL, rows, rank) is None:
        return attend_as_pages(q_THL, rows_XL, indices_TK.contiguous(), rank, scale)
    tiles = tiles or choose_tiles(T, H, K, rank, q_THL.dtype)
    blocks, pdl = triton.cdiv(H, tiles.bm), programmatic(q_THL.device)
    part = triton.cdiv(triton.cdiv(K, parts or tiles.parts), tiles.bn) * tiles.bn
    parts = triton.cdiv(K, part)
    scratch = parts if parts > 1 else 0
    partial = torch.empty(scratch, T, H, rank, dtype=torch.float32, device=q_THL.device)
    lse = torch.empty(scratch, T, H, dtype=torch.float32, device=q_THL.device)
    named_kernel[(parts, blocks, T)](
        q_THL.contiguous(), rows_XL, indices_TK.contiguous(), out_THC, partial, lse, T, K, part,
        scale * math.log2(math.e), H=H, C=rank, R=L - rank, BC=triton.next_power_of_2(max(rank, 16)),
        BR=triton.next_power_of_2(max(L - rank, 16)), ROW=rows_XL.stride(0), BM=tiles.bm, BN=tiles.bn,
        SPLIT=parts > 1, PRECISION="ieee" if q_THL.dtype == torch.float32 else "tf32",
        NARROW=rows_XL.dtype == NARROW, PDL=pdl,
        launch_pdl=pdl, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if parts > 1:
        join(partial, lse, out_THC)
    return out_THC
