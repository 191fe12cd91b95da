"""The best positions of a row of scores, in order of position: what sparse attention reads.

    taken = {n : key(n) > least} and of its equals the first,    least = the K-th largest key

A key is the score's bits, turned so that they order as integers: NaN counts as -inf, -0 as 0. The K-th
largest is found digit by digit, four of 8 bits, by the histogram of what agrees so far; then the columns
taken are counted, and written, each at its rank. So ties go to the smaller column, and a row depends on
itself alone. Short rows stay in registers, where the digits are single bits. Of long ones a program each where there are
many; few are shared out, and after each step the programs of a row wait for one another: there are never
more than the chip holds at once. Triton's interpreter runs programs one after the other, hence step by step.

Of the last two digits few agree, and each adds itself; before, a histogram does, some 100 instructions a key
and warp. Bound: six steps that each wait for what all wrote, a few microseconds apart. As a launch a step,
seven in all, 128k columns took 31 us on an H200 (2026-11-29); by one program 0.45 ms.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.ops.triton.block_rows import sequence_of
from shoal.ops.triton.expert_plan import num_multiprocessors
from shoal.ops.triton.launch import programmatic, wait_for_previous

SHORT = 2048  # columns that one program keeps in registers
LEAST, MOST = 1024, 2048  # columns that a program has at once, of a longer row
RESIDENT, REGISTERS = 2, 64  # programs a multiprocessor: half of what it surely holds, by registers a thread
STEPS = 6  # four digits, counts of what is taken, places


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
def _meet(gate_ptr, programs):
    """All of a row's programs have come here, and see what the others wrote."""
    tl.debug_barrier()
    tl.atomic_add(gate_ptr, 1, sem="release")
    while tl.atomic_add(gate_ptr, 0, sem="acquire") < programs:
        pass
    tl.debug_barrier()


@triton.jit
def _settle(counts, least, room, LEVEL: tl.constexpr):
    """By the counts of digit LEVEL: the K-th largest key so far, and how many of its equals are taken."""
    digit = tl.arange(0, 256)
    # Fewer than K: all digits are 0, and least below all keys.
    chosen = tl.maximum(tl.sum((tl.cumsum(counts, 0, reverse=True) >= room).to(tl.int32), 0) - 1, 0)
    room -= tl.sum(tl.where(digit > chosen, counts, 0), 0)
    return least | ((chosen ^ (128 if LEVEL == 0 else 0)) << (24 - 8 * LEVEL)), room


@triton.jit
def clear_kernel(memory_ptr, out_ptr, K, WORDS: tl.constexpr, K_PAD: tl.constexpr, PDL: tl.constexpr):
    """Zero what the programs of a row share; -1 for its places."""
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    word, rank = tl.arange(0, 2048), tl.arange(0, K_PAD)
    tl.store(memory_ptr + row * WORDS + word, tl.zeros((2048,), tl.int32), mask=word < WORDS)
    tl.store(out_ptr + row * K + rank, tl.full((K_PAD,), -1, tl.int64), mask=rank < K)


@triton.jit
def long_kernel(
    scores_ptr,
    memory_ptr,
    out_ptr,
    N,
    K,
    PROGRAMS: tl.constexpr,  # that share a row: a power of two
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Steps FIRST to LAST of a row. In `memory`, if several share it: counts of the digits (4, 256), gates
    (8), and of each program how many are above and how many equal (PROGRAMS, 2)."""
    LOWEST: tl.constexpr = -2139095041  # the key of -inf, which is never taken, and there may be many
    wait_for_previous(PDL)
    row = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    mine = tl.program_id(0) % PROGRAMS
    share = tl.cdiv(tl.cdiv(N, PROGRAMS), BLOCK) * BLOCK
    begin = mine * share
    end = tl.minimum(begin + share, N)
    scores_ptr += row * N
    memory_ptr += row * WORDS
    digits = tl.arange(0, 256)
    least = tl.zeros((), tl.int32)
    room = K + tl.zeros((), tl.int32)
    # 1. Four digits of the K-th largest key; those that launches before have counted are read.
    for level in tl.static_range(4):
        counts = tl.zeros((256,), tl.int32)
        if (level >= FIRST) & (level <= LAST):
            for start in range(begin, end, BLOCK):
                column = start + tl.arange(0, BLOCK)
                key = _keys(scores_ptr, column, end)
                same = key > LOWEST
                if level > 0:
                    same = same & ((key >> (32 - 8 * level)) == (least >> (32 - 8 * level)))
                digit = ((key >> (24 - 8 * level)) ^ (128 if level == 0 else 0)) & 255
                if (level < 2) | (PROGRAMS == 1):
                    counts += tl.histogram(digit, 256, mask=same)
                else:
                    tl.atomic_add(memory_ptr + 256 * level + digit, 1, mask=same, sem="relaxed")
            if (level < 2) & (PROGRAMS > 1):
                tl.atomic_add(memory_ptr + 256 * level + digits, counts, mask=counts > 0, sem="relaxed")
        if level < LAST:
            if PROGRAMS > 1:
                if level >= FIRST:
                    _meet(memory_ptr + 1024 + level, PROGRAMS)
                counts = tl.load(memory_ptr + 256 * level + digits)
            least, room = _settle(counts, least, room, level)
    # 2. How many each program takes, hence where those of this one go.
    taken = tl.zeros((), tl.int32)
    if PROGRAMS > 1:
        kept_ptr = memory_ptr + 1032
        if (FIRST <= 4) & (LAST >= 4):
            above = tl.zeros((), tl.int32)
            equal = tl.zeros((), tl.int32)
            for start in range(begin, end, BLOCK):
                key = _keys(scores_ptr, start + tl.arange(0, BLOCK), end)
                above += tl.sum(((key > least) & (key > LOWEST)).to(tl.int32), 0)
                equal += tl.sum(((key == least) & (key > LOWEST)).to(tl.int32), 0)
            tl.store(kept_ptr + 2 * mine, above)
            tl.store(kept_ptr + 2 * mine + 1, equal)
            if LAST > 4:
                _meet(memory_ptr + 1028, PROGRAMS)
        if LAST == 5:
            before = tl.arange(0, PROGRAMS)
            above = tl.sum(tl.load(kept_ptr + 2 * before, mask=before < mine, other=0), 0)
            equal = tl.sum(tl.load(kept_ptr + 2 * before + 1, mask=before < mine, other=0), 0)
            taken = above + tl.minimum(equal, room)
            room -= equal
    # 3. Their places.
    if LAST == 5:
        for start in range(begin, end, BLOCK):
            column = start + tl.arange(0, BLOCK)
            taken, room = _take(
                _keys(scores_ptr, column, end), least, taken, room, column, out_ptr + row * K, K
            )


def select_top_refusal(scores_TN: Tensor, top_k: int) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    if scores_TN.dtype != torch.float32:
        return f"scores are {scores_TN.dtype}; the kernel orders float32 by its bits"
    return None


@torch.no_grad()
def select_top(scores_TN: Tensor, top_k: int, *, least: int = LEAST) -> Tensor:
    """As `ops.api.select_top` says. `least` overrides how many columns a program has."""
    T, N = scores_TN.shape
    places_TK = torch.empty(T, top_k, dtype=torch.int64, device=scores_TN.device)
    if not places_TK.numel():
        return places_TK
    scores_TN = scores_TN.contiguous()
    if N <= SHORT:
        places_TK.fill_(-1)
        block = triton.next_power_of_2(max(N, 32))
        short_kernel[(T,)](scores_TN, places_TK, N, top_k, BLOCK=block, num_warps=1 if block <= 1024 else 4)
        return places_TK
    index, pdl = scores_TN.device.index if scores_TN.is_cuda else None, programmatic(scores_TN.device)
    programs = max(1, min(triton.cdiv(N, least), RESIDENT * num_multiprocessors(index) // T))
    programs = 1 << programs.bit_length() - 1  # few to compile
    words = 1032 + 2 * programs if programs > 1 else 0
    memory = torch.empty(T * words, dtype=torch.int32, device=scores_TN.device)
    early = {"PDL": pdl, "launch_pdl": pdl}
    clear_kernel[(T,)](
        memory, places_TK, top_k, WORDS=words, K_PAD=triton.next_power_of_2(top_k), num_warps=8, **early
    )
    block = min(MOST, triton.next_power_of_2(triton.cdiv(N, programs)))
    at_once = scores_TN.is_cuda or programs == 1
    steps = [(0, STEPS - 1)] if at_once else [(step, step) for step in range(STEPS)]
    for first, last in steps:
        long_kernel[(T * programs,)](
            scores_TN, memory, places_TK, N, top_k, PROGRAMS=programs, WORDS=words, BLOCK=block,
            FIRST=first, LAST=last, num_warps=max(4, block // 256), maxnreg=REGISTERS, **early,
        )  # fmt: skip
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
