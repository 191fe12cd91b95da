"""The best positions of a row of scores, in order of position: what sparse attention reads.

    taken = {n : key(n) > least} and of its equals the first,    least = the K-th largest key

A key is the score's bits, turned so that they order as integers: NaN counts as -inf, -0 as 0. Ties go to the
smaller column, and a row depends on itself alone. Short rows stay in registers.

Few rows: a row is shared out in chunks. The K-th largest key is found digit by digit, four of 8 bits, a
launch each: by histograms of the chunks, of the last two, where few still agree, each key adds itself. A last
launch writes the columns taken, each at its rank. Bound: launches, some 3 us each, and histograms, 100
instructions a key and warp: 19.5, 31 and 90 us for 1, 8 and 32 rows of 128k on an H200 (2026-11-29).
Many rows: a program each. What K groups of 8 columns reach, K columns do, so by the groups' largest few
columns are kept, 8 K at most but for ties, and of these the best are found bit by bit: 1.2 ms for 1,024 rows,
4.3 by histograms. One row takes a multiprocessor 150 us; of 128 rows the chunks would take twice that.
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
CHUNK, KEPT = 4096, 16384  # columns that a program has at once, where it has a row, and that it keeps
GROUP, MOST_GROUPS, ROWS = 8, 32768, 528  # there: columns of a group, groups, rows of a launch
FEW_CHUNK = 4096  # and where a row is shared out
MANY = 128  # rows from which each has one program


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
def _reaches(key, least, SHIFT: tl.constexpr):
    """How many keys reach `least` with the two bits at SHIFT as 1, 2 and 3: three counts of 21 bits."""
    one = (key >= (least | (1 << SHIFT))).to(tl.int64)
    two = (key >= (least | (2 << SHIFT))).to(tl.int64)
    three = (key >= (least | (3 << SHIFT))).to(tl.int64)
    return tl.sum(one + (two << 21) + (three << 42), 0)


@triton.jit
def _two_bits(counts, least, K, SHIFT: tl.constexpr):
    """The K-th largest key with two more bits settled by those counts."""
    bits = (counts & 0x1FFFFF >= K).to(tl.int32) + ((counts >> 21) & 0x1FFFFF >= K).to(tl.int32)
    return least | ((bits + (counts >> 42 >= K).to(tl.int32)) << SHIFT)


@triton.jit
def _kth(key, K, BITS: tl.constexpr):
    """The K-th largest of the keys, of which there are so many at least, cut to its sign and BITS more."""
    least = tl.where(tl.sum((key >= 0).to(tl.int32), 0) >= K, 0, -2147483648).to(tl.int32)
    for pair in tl.static_range(BITS // 2):
        least = _two_bits(_reaches(key, least, 29 - 2 * pair), least, K, 29 - 2 * pair)
    if BITS % 2:
        last = least | 1
        least = tl.where(tl.sum((key >= last).to(tl.int32), 0) >= K, last, least)
    return least


@triton.jit
def groups_kernel(
    scores_ptr, groups_ptr, N, GROUPS, GROUP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """The largest key of each GROUP columns: (T, GROUPS)."""
    wait_for_previous(PDL)
    row = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    largest = tl.max(_keys(scores_ptr + row * N, column, N), 1)
    tl.store(groups_ptr + row * GROUPS + group, largest, mask=group < GROUPS)


@triton.jit
def _count(scores_ptr, probe, N, BLOCK: tl.constexpr):
    """How many keys of a row reach `probe`."""
    reach = tl.zeros((), tl.int32)
    for start in range(0, N, BLOCK):
        reach += tl.sum((_keys(scores_ptr, start + tl.arange(0, BLOCK), N) >= probe).to(tl.int32), 0)
    return reach


@triton.jit
def _finish(scores_ptr, kept_ptr, out_ptr, total, N, K, BLOCK: tl.constexpr):
    """The best of the columns that were kept, and how many they are."""
    n = tl.arange(0, BLOCK)
    column = tl.load(kept_ptr + n, mask=n < total, other=N)
    key = _keys(scores_ptr, column, N)
    least = _kth(key, K, 31)
    room = K - tl.sum((key > least).to(tl.int32), 0)
    taken, _ = _take(key, least, 0, room, column, out_ptr, K)
    return taken


@triton.jit(do_not_specialize=["GROUPS"])
def long_kernel(
    scores_ptr,
    groups_ptr,
    kept_ptr,
    out_ptr,
    N,
    GROUPS,
    K,
    KEPT: tl.constexpr,
    G_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    LOWEST: tl.constexpr = -2139095041
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * N
    kept_ptr += row * KEPT
    out_ptr += row * K
    wait_for_previous(PDL)
    # 1. What K groups reach, K columns do: nothing below is taken.
    group = tl.arange(0, G_PAD)
    largest = tl.load(groups_ptr + row * GROUPS + group, mask=group < GROUPS, other=-2147483648)
    bound = LOWEST + 1 + tl.zeros((), tl.int32)
    if GROUPS >= K:
        bound = tl.maximum(_kth(largest, K, 16), bound)
    # 2. The columns that reach it, in order; too many are none.
    total = tl.zeros((), tl.int32)
    for start in range(0, N, BLOCK):
        column = start + tl.arange(0, BLOCK)
        keep = (_keys(scores_ptr, column, N) >= bound).to(tl.int32)
        rank = total + tl.cumsum(keep, 0) - 1
        tl.store(kept_ptr + rank, column, mask=(keep > 0) & (rank < KEPT))
        total += tl.sum(keep, 0)
    tl.debug_barrier()
    # 3. The best of them.
    taken = tl.zeros((), tl.int32)
    if total <= BLOCK:
        taken = _finish(scores_ptr, kept_ptr, out_ptr, total, N, K, BLOCK)
    elif total <= KEPT:
        taken = _finish(scores_ptr, kept_ptr, out_ptr, total, N, K, KEPT)
    else:
        # More columns tie than the list has room for: over the row, again and again.
        least = tl.where(_count(scores_ptr, 0, N, BLOCK) >= K, 0, -2147483648).to(tl.int32)
        for bit in range(31):
            probe = least | (1 << (30 - bit))
            least = tl.where(_count(scores_ptr, probe, N, BLOCK) >= K, probe, least)
        room = K - _count(scores_ptr, least + 1, N, BLOCK)
        for start in range(0, N, BLOCK):
            column = start + tl.arange(0, BLOCK)
            taken, room = _take(_keys(scores_ptr, column, N), least, taken, room, column, out_ptr, K)
    for start in range(taken, K, BLOCK):
        rank = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + rank, tl.full((BLOCK,), -1, tl.int64), mask=rank < K)


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
    pdl = programmatic(scores_TN.device)
    early: dict[str, Any] = {"PDL": pdl, "launch_pdl": pdl}
    if N <= SHORT:
        places_TK.fill_(-1)
        block = triton.next_power_of_2(max(N, 32))
        arguments = (scores_TN, places_TK, N, top_k)
        short_kernel[(T,)](*arguments, BLOCK=block, num_warps=1 if block <= 1024 else 4)
        return places_TK
    if T >= MANY:
        group = max(GROUP, triton.next_power_of_2(N) // MOST_GROUPS)
        groups, rows = triton.cdiv(N, group), min(T, ROWS)
        groups_TG, kept_TX = (
            torch.empty(rows * width, dtype=torch.int32, device=scores_TN.device) for width in (groups, KEPT)
        )
        for first in range(0, T, rows):
            some_TN, out_TK = scores_TN[first : first + rows], places_TK[first : first + rows]
            groups_kernel[(triton.cdiv(groups, 128), len(some_TN))](
                some_TN, groups_TG, N, groups, GROUP=group, BLOCK=128, **early
            )
            long_kernel[(len(some_TN),)](
                some_TN, groups_TG, kept_TX, out_TK, N, groups, top_k, KEPT=KEPT,
                G_PAD=max(KEPT, triton.next_power_of_2(groups)), BLOCK=CHUNK, num_warps=16, **early,
            )  # fmt: skip
        return places_TK
    size = chunk or FEW_CHUNK
    chunks = triton.cdiv(N, size)
    totals, counts, state, above = (
        torch.empty(T, width, dtype=torch.int32, device=scores_TN.device)
        for width in (1024, chunks * 1024, 8, chunks)
    )
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
