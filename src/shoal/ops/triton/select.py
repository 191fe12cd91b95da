"""The best positions of a row of scores, in order of position: what sparse attention reads.

    taken = {n : key(n) > least} and of its equals the first,    least = the K-th largest key

A key is the score's bits, turned so that they order as integers: NaN counts as -inf, -0 as 0. The K-th
largest is found digit by digit, four of 8 bits, by the histogram of what agrees so far; a last pass writes
the columns taken, each at its rank. So ties go to the smaller column, and a row depends on itself alone.
Many rows: a program each. Few: a row is shared out in chunks, a launch a digit, and each reads what all
counted before it. Short rows stay in registers, where the digits are single bits.

Of the last two digits few agree, and each adds itself; before, a histogram of the chunk does. Bound: five
reads of a row, one from memory and four from the L2; with few rows, launches. One program took 0.45 ms for a
row of 128k on an H200 (2026-11-24), however few the rows: hence the chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.ops.triton.block_rows import sequence_of
from shoal.ops.triton.launch import programmatic, wait_for_previous

SHORT = 2048  # columns that one program keeps in registers
CHUNK = 8192  # columns that a program has at once, where it has a row
FEW_CHUNK = 4096  # and where a row is shared out
MANY = 264  # rows from which each has one program


@triton.jit
def _keys(scores_ptr, column, N):
    """Scores as integers in their order; what is past the row counts as -inf."""
    score = tl.load(scores_ptr + column, mask=column < N, other=float("-inf"))
    score = tl.where(score == score, score, float("-inf")) + 0.0
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _take(key, least, taken_before, room, column, out_ptr, K):
    """Write the columns that are taken of a block, and count on: all above `least`, of its equals `room`."""
    LOWEST: tl.constexpr = -2139095041  # the key of -inf, which is never taken
    same = (key == least) & (key > LOWEST)
    order = tl.cumsum(same.to(tl.int32), 0)
    taken = ((key > least) & (key > LOWEST)) | (same & (order <= room))
    rank = taken_before + tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(out_ptr + rank, column.to(tl.int64), mask=taken & (rank < K))
    return taken_before + tl.sum(taken.to(tl.int32), 0), room - tl.sum(same.to(tl.int32), 0)


@triton.jit
def short_kernel(scores_ptr, out_ptr, N, K, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    key = _keys(scores_ptr + row * N, column, N)
    # The largest value that K keys reach: its sign, then bit by bit.
    least = tl.where(tl.sum((key >= 0).to(tl.int32), 0) >= K, 0, -2147483648).to(tl.int32)
    for bit in range(31):
        probe = least | (1 << (30 - bit))
        least = tl.where(tl.sum((key >= probe).to(tl.int32), 0) >= K, probe, least)
    room = K - tl.sum((key > least).to(tl.int32), 0)
    _take(key, least, 0, room, column, out_ptr + row * K, K)


@triton.jit
def _settle(scores_ptr, N, least, room, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """Eight more bits of the K-th largest key, and how many are taken of those that agree so far."""
    FLIP: tl.constexpr = 128 if SHIFT == 24 else 0  # of the digit with the sign
    counts = tl.zeros((256,), tl.int32)
    for start in range(0, N, BLOCK):
        column = start + tl.arange(0, BLOCK)
        key = _keys(scores_ptr, column, N)
        same = column < N
        if SHIFT < 24:
            same = same & ((key >> (SHIFT + 8)) == (least >> (SHIFT + 8)))
        counts += tl.histogram(((key >> SHIFT) ^ FLIP) & 255, 256, mask=same)
    reach = tl.cumsum(counts, 0, reverse=True)
    chosen = tl.sum((reach >= room).to(tl.int32), 0) - 1
    room -= tl.sum(tl.where(tl.arange(0, 256) > chosen, counts, 0), 0)
    return least | ((chosen ^ FLIP) << SHIFT), room


@triton.jit
def long_kernel(scores_ptr, out_ptr, N, K, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * N
    least = tl.zeros((), tl.int32)
    room = K + tl.zeros((), tl.int32)
    least, room = _settle(scores_ptr, N, least, room, 24, BLOCK)
    least, room = _settle(scores_ptr, N, least, room, 16, BLOCK)
    least, room = _settle(scores_ptr, N, least, room, 8, BLOCK)
    least, room = _settle(scores_ptr, N, least, room, 0, BLOCK)
    taken = tl.zeros((), tl.int32)
    for start in range(0, N, BLOCK):
        column = start + tl.arange(0, BLOCK)
        taken, room = _take(_keys(scores_ptr, column, N), least, taken, room, column, out_ptr + row * K, K)


@triton.jit
def _agreed(totals_ptr, counts_ptr, state_ptr, K, LEVEL: tl.constexpr):
    """After the digit of LEVEL - 1, by what all chunks of a row counted: that digit, the K-th largest key so
    far, how many of those that agree with it are taken; and how many of this chunk's are above it."""
    least = tl.zeros((), tl.int32)
    room = K + tl.zeros((), tl.int32)
    if LEVEL > 1:
        least = tl.load(state_ptr)
        room = tl.load(state_ptr + 1)
    digit = tl.arange(0, 256)
    counts = tl.load(totals_ptr + digit)
    own = tl.load(counts_ptr + digit)
    # Fewer than K: all digits are 0, and least below all keys.
    chosen = tl.maximum(tl.sum((tl.cumsum(counts, 0, reverse=True) >= room).to(tl.int32), 0) - 1, 0)
    room -= tl.sum(tl.where(digit > chosen, counts, 0), 0)
    least |= (chosen ^ (128 if LEVEL == 1 else 0)) << (32 - 8 * LEVEL)
    return chosen, least, room, tl.sum(tl.where(digit > chosen, own, 0), 0)


@triton.jit
def clear_kernel(totals_ptr, out_ptr, K, K_PAD: tl.constexpr, PDL: tl.constexpr):
    """Zero the totals of a row (4, 256); -1 for its places."""
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    tl.store(totals_ptr + row * 1024 + tl.arange(0, 1024), tl.zeros((1024,), tl.int32))
    rank = tl.arange(0, K_PAD)
    tl.store(out_ptr + row * K + rank, tl.full((K_PAD,), -1, tl.int64), mask=rank < K)


@triton.jit
def digit_kernel(
    scores_ptr,
    totals_ptr,
    counts_ptr,
    state_ptr,
    above_ptr,
    T,
    N,
    CHUNKS,
    K,
    LEVEL: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Counts of the next digit, of what agrees so far: of a row, (T, 4, 256), and of each chunk, (T, CHUNKS,
    4, 256). What agrees, (T, 4, 2), and how many of each chunk are above it, (T, CHUNKS)."""
    SHIFT: tl.constexpr = 24 - 8 * LEVEL
    FLIP: tl.constexpr = 128 if LEVEL == 0 else 0
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    wait_for_previous(PDL)
    totals_ptr += row * 1024
    counts_ptr += (row * CHUNKS + chunk) * 1024
    state_ptr += row * 8
    column = chunk * BLOCK + tl.arange(0, BLOCK)
    key = _keys(scores_ptr + row * N, column, N)
    same = key > -2139095041  # -inf is never taken, and there may be many
    digit = ((key >> SHIFT) ^ FLIP) & 255
    if LEVEL > 0:
        before: tl.constexpr = 256 * (LEVEL - 1)
        _, least, room, above = _agreed(
            totals_ptr + before, counts_ptr + before, state_ptr + 2 * (LEVEL - 1), K, LEVEL
        )
        same = same & ((key >> (SHIFT + 8)) == (least >> (SHIFT + 8)))
        if chunk == 0:
            tl.store(state_ptr + 2 * LEVEL, least)
            tl.store(state_ptr + 2 * LEVEL + 1, room)
        above_ptr += row * CHUNKS + chunk
        if LEVEL > 1:
            above += tl.load(above_ptr)
        tl.store(above_ptr, above)
    place = tl.arange(0, 256)
    if LEVEL < 2:
        counts = tl.histogram(digit, 256, mask=same)
        tl.store(counts_ptr + 256 * LEVEL + place, counts)
        tl.atomic_add(totals_ptr + 256 * LEVEL + place, counts, mask=counts > 0, sem="relaxed")
    else:  # few agree by now
        tl.atomic_add(counts_ptr + 256 * LEVEL + digit, 1, mask=same, sem="relaxed")
        tl.atomic_add(totals_ptr + 256 * LEVEL + digit, 1, mask=same, sem="relaxed")
    if (LEVEL == 1) | (LEVEL == 2):
        tl.store(counts_ptr + 256 * (LEVEL + 1) + place, tl.zeros((256,), tl.int32))


@triton.jit
def chunk_kernel(
    scores_ptr,
    totals_ptr,
    counts_ptr,
    state_ptr,
    above_ptr,
    out_ptr,
    N,
    CHUNKS,
    K,
    C_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Write what is taken of a chunk, after what is taken of those before."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    wait_for_previous(PDL)
    column = chunk * BLOCK + tl.arange(0, BLOCK)
    key = _keys(scores_ptr + row * N, column, N)
    counts_ptr += row * CHUNKS * 1024 + 768
    chosen, least, room, _ = _agreed(
        totals_ptr + row * 1024 + 768, counts_ptr + chunk * 1024, state_ptr + row * 8 + 6, K, 4
    )
    # Of the chunks before: how many are above, by the first digits and by the last, and how many are equal.
    c, digit = tl.arange(0, C_PAD), tl.arange(0, 256)
    earlier = c < chunk
    above = tl.sum(tl.load(above_ptr + row * CHUNKS + c, mask=earlier, other=0), 0)
    table = tl.load(counts_ptr + c[:, None] * 1024 + digit[None, :], mask=earlier[:, None], other=0)
    above += tl.sum(tl.where((digit > chosen)[None, :], table, 0))
    same = tl.sum(tl.where((digit == chosen)[None, :], table, 0))
    same = tl.where(least > -2139095041, same, 0)
    _take(key, least, above + tl.minimum(same, room), room - same, column, out_ptr + row * K, K)


def select_top_refusal(scores_TN: Tensor, top_k: int) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    if scores_TN.dtype != torch.float32:
        return f"scores are {scores_TN.dtype}; the kernel orders float32 by its bits"
    return None


@torch.no_grad()
def select_top(scores_TN: Tensor, top_k: int, *, chunk: int | None = None) -> Tensor:
    """As `ops.api.select_top` says. `chunk` overrides how many columns a program has."""
    T, N = scores_TN.shape
    places_TK = torch.empty(T, top_k, dtype=torch.int64, device=scores_TN.device)
    if not places_TK.numel():
        return places_TK
    scores_TN = scores_TN.contiguous()
    if N <= SHORT or T >= MANY:
        places_TK.fill_(-1)
        arguments: tuple[Any, ...] = (scores_TN, places_TK, N, top_k)
        if N <= SHORT:
            block = triton.next_power_of_2(max(N, 32))
            short_kernel[(T,)](*arguments, BLOCK=block, num_warps=1 if block <= 1024 else 4)
        else:
            long_kernel[(T,)](*arguments, BLOCK=CHUNK, num_warps=16)
        return places_TK
    size = chunk or FEW_CHUNK
    chunks, pdl = triton.cdiv(N, size), programmatic(scores_TN.device)
    totals, counts, state, above = (
        torch.empty(T, width, dtype=torch.int32, device=scores_TN.device)
        for width in (1024, chunks * 1024, 8, chunks)
    )
    early = {"PDL": pdl, "launch_pdl": pdl}
    words: dict[str, Any] = {"BLOCK": size, "num_warps": max(4, size // 512), **early}
    clear_kernel[(T,)](totals, places_TK, top_k, K_PAD=triton.next_power_of_2(top_k), **early)
    arguments = (scores_TN, totals, counts, state, above)
    for level in range(4):
        digit_kernel[(chunks, T)](*arguments, T, N, chunks, top_k, LEVEL=level, **words)
    chunk_kernel[(chunks, T)](
        *arguments, places_TK, N, chunks, top_k, C_PAD=triton.next_power_of_2(chunks), **words
    )
    return places_TK


@triton.jit
def rows_kernel(
    places_ptr,
    cu_ptr,
    table_ptr,
    out_ptr,
    S,
    B,
    K,
    PAGE: tl.constexpr,
    PAGED: tl.constexpr,
    S_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    token, k = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    s = sequence_of(cu_ptr, token, S, S_PAD)
    at = token.to(tl.int64) * K + k
    place = tl.load(places_ptr + at, mask=(k < K) & (s < S), other=-1)
    if PAGED:
        page = tl.load(table_ptr + s.to(tl.int64) * B + place // PAGE, mask=place >= 0, other=0)
        row = page.to(tl.int64) * PAGE + place % PAGE
    else:
        row = tl.load(cu_ptr + s).to(tl.int64) + place
    tl.store(out_ptr + at, tl.where(place >= 0, row, place), mask=k < K)


def name_rows_refusal(places_TK: Tensor, *_: Any) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    if places_TK.dtype != torch.int64:
        return f"places are {places_TK.dtype}; the kernel reads int64"
    return None


@torch.no_grad()
def name_rows(places_TK: Tensor, cu_S1: Tensor, table_SB: Tensor | None, page: int) -> Tensor:
    """As `ops.api.name_rows` says."""
    (T, K), S = places_TK.shape, cu_S1.shape[0] - 1
    rows_TK = torch.empty_like(places_TK, memory_format=torch.contiguous_format)
    if rows_TK.numel():
        paged, pdl = table_SB is not None, programmatic(places_TK.device)
        table_SB = cu_S1.view(1, -1) if table_SB is None else table_SB.contiguous()
        block = min(1024, triton.next_power_of_2(K))
        rows_kernel[(triton.cdiv(K, block), T)](
            places_TK.contiguous(), cu_S1, table_SB, rows_TK, S, table_SB.shape[1], K, PAGE=page, PAGED=paged,
            S_PAD=triton.next_power_of_2(max(S, 1)), BLOCK=block, PDL=pdl, launch_pdl=pdl,
        )  # fmt: skip
    return rows_TK
