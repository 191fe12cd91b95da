"""The best positions of a row of scores, in order of position: what sparse attention reads.

    taken = {n : key(n) > least} and of its equals the first,    least = the K-th largest key

A key is the score's bits, turned so that they order as integers: NaN counts as -inf, -0 as 0. The K-th
largest is found digit by digit, four of 8 bits, by the histogram of what agrees so far; a last pass writes
the columns taken, each at its rank. So ties go to the smaller column, and a row depends on itself alone.
Many rows: a program each. Few: a row is shared out in chunks, a launch a digit, and each reads what all
counted before it. Short rows stay in registers, where the digits are single bits.

Bound: five reads of a row, one from memory and four from the L2; with few rows, five launches. One program
took 0.45 ms for a row of 128k on an H200 (2026-11-24), however few the rows: hence the chunks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SHORT = 2048  # columns that one program keeps in registers
CHUNK = 8192  # columns of a program, where a row is shared out
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
def _agreed(counts_ptr, row, chunk, T, CHUNKS, K, LEVELS: tl.constexpr, C_PAD: tl.constexpr):
    """What the first digits say: the K-th largest key so far, how many of those that agree with it are taken,
    and how many of the chunks before are above it and agree with it."""
    c, digit = tl.arange(0, C_PAD), tl.arange(0, 256)
    least = tl.zeros((), tl.int32)
    room = K + tl.zeros((), tl.int32)
    above = tl.zeros((), tl.int32)
    same = tl.zeros((), tl.int32)
    for level in tl.static_range(LEVELS):
        at = ((level * T + row) * CHUNKS + c)[:, None] * 256 + digit[None, :]
        table = tl.load(counts_ptr + at, mask=(c < CHUNKS)[:, None], other=0)
        counts = tl.sum(table, 0)
        chosen = tl.sum((tl.cumsum(counts, 0, reverse=True) >= room).to(tl.int32), 0) - 1
        room -= tl.sum(tl.where(digit > chosen, counts, 0), 0)
        before = tl.sum(tl.where((c < chunk)[:, None], table, 0), 0)
        above += tl.sum(tl.where(digit > chosen, before, 0), 0)
        same = tl.sum(tl.where(digit == chosen, before, 0), 0)
        least |= (chosen ^ (128 if level == 0 else 0)) << (24 - 8 * level)
    return least, room, above, same


@triton.jit
def digit_kernel(
    scores_ptr, counts_ptr, T, N, CHUNKS, K, LEVEL: tl.constexpr, C_PAD: tl.constexpr, BLOCK: tl.constexpr
):
    """Counts of the next digit in a chunk of a row, of what agrees so far: (levels, T, CHUNKS, 256)."""
    SHIFT: tl.constexpr = 24 - 8 * LEVEL
    FLIP: tl.constexpr = 128 if LEVEL == 0 else 0
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = chunk * BLOCK + tl.arange(0, BLOCK)
    key = _keys(scores_ptr + row * N, column, N)
    same = column < N
    if LEVEL > 0:
        least, _, _, _ = _agreed(counts_ptr, row, chunk, T, CHUNKS, K, LEVEL, C_PAD)
        same = same & ((key >> (SHIFT + 8)) == (least >> (SHIFT + 8)))
    counts = tl.histogram(((key >> SHIFT) ^ FLIP) & 255, 256, mask=same)
    tl.store(counts_ptr + ((LEVEL * T + row) * CHUNKS + chunk) * 256 + tl.arange(0, 256), counts)


@triton.jit
def chunk_kernel(scores_ptr, counts_ptr, out_ptr, T, N, CHUNKS, K, C_PAD: tl.constexpr, BLOCK: tl.constexpr):
    """Write what is taken of a chunk, after what is taken of those before."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    least, room, above, same = _agreed(counts_ptr, row, chunk, T, CHUNKS, K, 4, C_PAD)
    same = tl.where(least > -2139095041, same, 0)
    column = chunk * BLOCK + tl.arange(0, BLOCK)
    key = _keys(scores_ptr + row * N, column, N)
    _take(key, least, above + tl.minimum(same, room), room - same, column, out_ptr + row * K, K)


def select_top_refusal(scores_TN: Tensor, top_k: int) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    if scores_TN.dtype != torch.float32:
        return f"scores are {scores_TN.dtype}; the kernel orders float32 by its bits"
    return None


@torch.no_grad()
def select_top(scores_TN: Tensor, top_k: int) -> Tensor:
    """As `ops.api.select_top` says."""
    T, N = scores_TN.shape
    places_TK = torch.full((T, top_k), -1, dtype=torch.int64, device=scores_TN.device)
    if places_TK.numel():
        scores_TN = scores_TN.contiguous()
        arguments: tuple[Any, ...] = (scores_TN, places_TK, N, top_k)
        if N <= SHORT:
            block = triton.next_power_of_2(max(N, 32))
            short_kernel[(T,)](*arguments, BLOCK=block, num_warps=1 if block <= 1024 else 4)
        elif T >= MANY:
            long_kernel[(T,)](*arguments, BLOCK=CHUNK, num_warps=16)
        else:
            chunks = triton.cdiv(N, CHUNK)
            counts = torch.empty(4, T, chunks, 256, dtype=torch.int32, device=scores_TN.device)
            words = {"C_PAD": triton.next_power_of_2(chunks), "BLOCK": CHUNK, "num_warps": 16}
            for level in range(4):
                digit_kernel[(chunks, T)](scores_TN, counts, T, N, chunks, top_k, LEVEL=level, **words)
            chunk_kernel[(chunks, T)](scores_TN, counts, places_TK, T, N, chunks, top_k, **words)
    return places_TK
