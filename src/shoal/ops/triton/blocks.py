"""Which blocks a token reads in native sparse attention, on a GPU.

    value[j] = sum_e w_e sum_h exp(scale q_h k_(r j + e) - l_h)     e: the entries that overlap block j

Eight tokens with the 16 heads of their group are the rows of a product with the entries of 64 blocks, one
overlap after another; the sum over heads is taken where the product lies. Entries are those of a pack, or
lie in the slots of a cache where their last tokens do. `select` picks the best.

Bound: the matrix rate, for a fourth more products than there are entries; when decoding, the bytes of the
keys.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.ops.triton.block_rows import dims, head_refusal, load_rows
from shoal.ops.triton.cache import are_rows
from shoal.ops.triton.select import select_top

_LOG2E = math.log2(math.e)
PROGRAMS = 264  # two a multiprocessor


@triton.jit
def _overlap(
    q,
    q_rest,
    lse,
    seen,
    most,
    z,
    k_ptr,
    k_row,
    table_ptr,
    scale,
    E: tl.constexpr,
    RATIO: tl.constexpr,
    BACK: tl.constexpr,
    LENGTH: tl.constexpr,
    STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    PAGED: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BZ: tl.constexpr,
):
    """What the E-th entries of blocks z add to their values (BT, BZ), as often as they overlap in strides."""
    # How many of the m < RATIO and n <= BACK have RATIO - 1 - m - n = E.
    LOW: tl.constexpr = RATIO - 1 - E - BACK if RATIO - 1 - E > BACK else 0
    HIGH: tl.constexpr = RATIO - 1 if E < 0 else RATIO - 1 - E
    entry = z * RATIO + E
    there = (entry >= 0) & (entry < most)
    if PAGED:
        place = entry * STRIDE + LENGTH - 1
        page = tl.load(table_ptr + place // PAGE, mask=there, other=0)
        at = page.to(tl.int64) * PAGE + place % PAGE
    else:
        at = entry.to(tl.int64)
    k = load_rows(k_ptr, at, there, k_row, 0, D1, B1)
    scores = tl.dot(q, k.T, input_precision=PRECISION)
    if D2:
        k_rest = load_rows(k_ptr, at, there, k_row, D1, D2, B2)
        scores = tl.dot(q_rest, k_rest.T, scores, input_precision=PRECISION)
    p = tl.exp2(scores * scale - lse[:, None])
    p = tl.where(there[None, :] & (entry[None, :] < seen[:, None]), p, 0.0)
    return (HIGH - LOW + 1) * tl.sum(tl.reshape(p, (BT, BR, BZ)), 1)


@triton.jit
def values_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    out_ptr,
    cu_ptr,
    cu_entries_ptr,
    table_ptr,
    contexts_ptr,
    B,
    Z,
    SHARE,  # blocks of a program, a multiple of BZ
    k_row,  # from one entry (of a pack) or slot (of a cache) to the next
    k_group,
    scale,  # times log2(e)
    LENGTH: tl.constexpr,
    STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    FIRST: tl.constexpr,
    LOCAL: tl.constexpr,
    PAGE: tl.constexpr,
    PAGED: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    V: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,  # tokens
    BR: tl.constexpr,  # heads of a group, padded
    BZ: tl.constexpr,
):
    """Values (T, G, Z) of BT tokens: -inf for blocks that begin later, inf for forced ones."""
    REP: tl.constexpr = H // G
    RATIO: tl.constexpr = SIZE // STRIDE
    BACK: tl.constexpr = LENGTH // STRIDE - 1
    group, s = tl.program_id(1), tl.program_id(2)
    first = tl.load(cu_ptr + s)
    n = tl.load(cu_ptr + s + 1) - first
    shares = (Z + SHARE - 1) // SHARE
    start = tl.program_id(0) // shares * BT
    begin = tl.program_id(0) % shares * SHARE
    if start < n:
        before = 0
        if PAGED:
            before = tl.load(contexts_ptr + s) - n
        else:
            k_ptr += tl.load(cu_entries_ptr + s).to(tl.int64) * k_row
        k_ptr += group * k_group
        m = tl.arange(0, BT * BR)
        i, r = start + m // BR, m % BR
        kept = (i < n) & (r < REP)
        row = (first + i) * H + group * REP + r
        q = load_rows(q_ptr, row, kept, D1 + D2, 0, D1, B1)
        if D2:
            q_rest = load_rows(q_ptr, row, kept, D1 + D2, D1, D2, B2)
        else:
            q_rest = q
        lse = tl.load(lse_ptr + row, mask=kept, other=float("inf")) * 1.4426950408889634
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        seen = tl.maximum(before + i + 1 - LENGTH + STRIDE, 0) // STRIDE
        most = tl.maximum(before + tl.minimum(start + BT, n) - LENGTH + STRIDE, 0) // STRIDE
        t = start + tl.arange(0, BT)
        own = (before + t) // SIZE
        for z0 in range(begin, tl.minimum(begin + SHARE, Z), BZ):
            z = z0 + tl.arange(0, BZ)
            value = tl.zeros((BT, BZ), tl.float32)
            if z0 * RATIO - BACK < most:
                for e in tl.static_range(-BACK, RATIO):
                    value += _overlap(
                        q, q_rest, lse, seen, most, z, k_ptr, k_row, table_ptr + s.to(tl.int64) * B, scale,
                        e, RATIO, BACK, LENGTH, STRIDE, PAGE, PAGED, D1, D2, B1, B2, PRECISION, BT, BR, BZ,
                    )  # fmt: skip
            forced = (z[None, :] < FIRST) | (z[None, :] > own[:, None] - LOCAL)
            value = tl.where(forced, float("inf"), value)
            value = tl.where(z[None, :] > own[:, None], float("-inf"), value)
            to = ((first + t).to(tl.int64) * G + group) * Z
            tl.store(out_ptr + to[:, None] + z[None, :], value, mask=(t < n)[:, None] & (z < Z)[None, :])


def select_blocks_refusal(q_THQ: Tensor, k_MGQ: Tensor, *_: Any) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    return head_refusal(q_THQ, k_MGQ, k_MGQ.shape[1])


def paged_select_blocks_refusal(q_THQ: Tensor, pages: Tensor, *_: Any) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    if not are_rows(pages):
        return "the pages are no rows of one stride; the kernels do not copy a cache"
    return head_refusal(q_THQ, pages, pages.shape[2])


def _values(
    q_THQ: Tensor,
    keys: Tensor,
    strides: tuple[int, int],
    lse_TH: Tensor,
    cu_S1: Tensor,
    cu_entries_S1: Tensor,
    table_SB: Tensor,
    contexts_S: Tensor,
    most: int,
    width: int,
    blocking: tuple[int, ...],
    scale: float,
    page: int,
    *,
    paged: bool,
    wide: bool = True,
) -> Tensor:
    (T, H, Q), G = q_THQ.shape, keys.shape[-2]
    values_TGZ = torch.empty(T, G, width, dtype=torch.float32, device=q_THQ.device)
    if values_TGZ.numel():
        rows = triton.next_power_of_2(H // G)
        half = q_THQ.dtype != torch.float32
        tokens = max(1, (128 if half and wide else 16) // rows)
        bz, S = 64 if half else 16, cu_S1.shape[0] - 1
        # Few tokens: the blocks are shared out, which changes no bit of their values.
        programs = triton.cdiv(most, tokens) * G * S
        share = triton.cdiv(triton.cdiv(width, max(1, PROGRAMS // programs)), bz) * bz
        values_kernel[(triton.cdiv(most, tokens) * triton.cdiv(width, share), G, S)](
            q_THQ.contiguous(), keys, lse_TH.contiguous(), values_TGZ, cu_S1, cu_entries_S1,
            table_SB, contexts_S, table_SB.shape[-1], width, share, *strides, scale * _LOG2E,
            LENGTH=blocking[0], STRIDE=blocking[1],
            SIZE=blocking[2], FIRST=blocking[4], LOCAL=blocking[5], PAGE=page, PAGED=paged,
            BT=tokens, BR=rows, BZ=bz, num_warps=8 if tokens * rows == 128 else
            4, num_stages=2,
            **dims(H, G, Q, 1, q_THQ.dtype),
        )  # fmt: skip
    return values_TGZ


def _best(values_TGZ: Tensor, top_k: int) -> Tensor:
    T, G, Z = values_TGZ.shape
    return select_top(values_TGZ.view(T * G, Z), min(top_k, Z)).view(T, G, -1)


@torch.no_grad()
def select_blocks(
    q_THQ: Tensor,
    k_MGQ: Tensor,
    lse_TH: Tensor,
    cu_S1: Tensor,
    cu_entries_S1: Tensor,
    most: int,
    blocking: tuple[int, ...],
    scale: float,
) -> Tensor:
    """As `ops.api.select_blocks` says."""
    k_MGQ, Q = k_MGQ.contiguous(), q_THQ.shape[2]
    where = (k_MGQ.shape[1] * Q, Q), lse_TH, cu_S1, cu_entries_S1, cu_S1, cu_S1, most
    width = triton.cdiv(most, blocking[2])
    return _best(_values(q_THQ, k_MGQ, *where, width, blocking, scale, 1, paged=False), blocking[3])


@torch.no_grad()
def paged_select_blocks(
    q_THQ: Tensor,
    pages: Tensor,
    lse_TH: Tensor,
    table_SB: Tensor,
    contexts_S: Tensor,
    longest: int,
    cu_S1: Tensor,
    most: int,
    blocking: tuple[int, ...],
    scale: float,
    *,
    invariant: bool = False,
) -> Tensor:
    """As `ops.api.paged_select_blocks` says."""
    wide = invariant or most > 8
    strides = pages.stride(1), pages.stride(2)
    where = strides, lse_TH, cu_S1, cu_S1, table_SB.contiguous(), contexts_S, most
    width, page = triton.cdiv(longest, blocking[2]), pages.shape[1]
    values_TGZ = _values(q_THQ, pages, *where, width, blocking, scale, page, paged=True, wide=wide)
    return _best(values_TGZ, blocking[3])
