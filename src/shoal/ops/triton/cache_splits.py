"""Attention of few new tokens over a paged cache: positions split over programs, then merged.

    o = sum_j softmax_j(scale q k_j) v_j     split    one program, some positions: o and log-sum-exp of them
                                             merge    o = sum_u 2^(l_u - l) o_u,  l = log2 sum_u 2^l_u

Layout: the queries of a sequence that share a key head are its rows (token, then head), BM a block. The tiles
of BN positions of all sequences, laid end to end, are one line, and program w takes an equal piece of it,
whatever the lengths: a program may end one sequence and begin the next. So the load is even for any ragged
batch, the host need not know a length, and a CUDA graph serves every step. A sequence that lies in one piece
is written at once; of the others a piece holds at most two parts, hence 2 W slots of scratch.

FIXED (batch-invariant): pieces are UNIT tiles from a sequence's own beginning, so what is added, and in what
order, depends on that sequence alone. Scratch grows with the longest context.

A latent row serves as key and, its first C elements, as value: it is read once. Rows in FP8 (NARROW) are
widened as they are read, by words where their width is a power of two from 64 on (QUARTERS). Of latents for
many heads `cache_turns` does the same on Hopper.
Positions past a context are never read: they may hold NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shoal.ops.triton.cache_tiles import (
    load_behind_tile,
    load_narrow_tile,
    load_quarters_tile,
    load_query_quarter,
    load_tile,
)
from shoal.ops.triton.launch import bring_near, wait_for_previous


@triton.jit
def count_tiles(
    cu_ptr, contexts_ptr, S, row, S_PAD: tl.constexpr, REP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Tiles of each sequence (S_PAD) that the BM rows from `row` see; none where it has no such rows."""
    s = tl.arange(0, S_PAD)
    new = tl.load(cu_ptr + s + 1, mask=s < S, other=0) - tl.load(cu_ptr + s, mask=s < S, other=0)
    context = tl.load(contexts_ptr + s, mask=s < S, other=0)
    seen = context - new + 1 + tl.minimum((row + BM - 1) // REP, new - 1)
    return tl.where(new * REP > row, (tl.maximum(seen, 0) + BN - 1) // BN, 0)


@triton.jit
def _find_place(
    at,
    ends,
    line,
    tiles,
    cu_ptr,
    contexts_ptr,
    table_ptr,
    S,
    B,
    S_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    BN: tl.constexpr,
):
    """The sequence at a place of the line, the last one past its end: what lies before it, its tiles and its
    length there, its first row, how many it has, and its context."""
    index = tl.arange(0, S_PAD)
    s = tl.minimum(tl.sum((ends <= at).to(tl.int32), 0), S - 1)
    before = tl.sum(tl.where(index < s, line, 0), 0)
    mine = tl.sum(tl.where(index == s, tiles, 0), 0)
    length = tl.sum(tl.where(index == s, line, 0), 0)
    start = tl.load(cu_ptr + s)
    new, limit = tl.load(cu_ptr + s + 1) - start, tl.load(contexts_ptr + s)
    # The first page's number, asked for before the queries: it is there when the tiles want it.
    page = tl.minimum((at - before) * BN // PAGE, B - 1)
    limit += tl.minimum(tl.load(table_ptr + s.to(tl.int64) * B + page), 0)
    return s, before, mine, length, start, new, limit


@triton.jit
def _put(o, out_ptr, partial_ptr, to, part, whole, kept, column, C: tl.constexpr, BC: tl.constexpr):
    """Columns of rows to their end, rows `to` of the output, or as a part to rows `part` of the scratch."""
    if whole:
        mask = kept[:, None] & (column < C)[None, :]
        tl.store(out_ptr + (to * C)[:, None] + column[None, :], o.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(partial_ptr + (part * BC)[:, None] + column[None, :], o)


@triton.jit
def _load_queries(
    q_ptr,
    token,
    head,
    kept,
    first: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    H: tl.constexpr,
    DIM: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    mask = kept[:, None]
    if WIDTH != BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    at = (token.to(tl.int64) * H + head) * DIM
    return tl.load(q_ptr + at[:, None] + first + column[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["S", "B", "W", "RB"])
def split_kernel(
    q_ptr,
    pages_ptr,
    table_ptr,
    contexts_ptr,
    cu_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    S,
    B,
    W,
    scale,  # times log2(e)
    H: tl.constexpr,
    REP: tl.constexpr,  # query heads of a key head
    RB,  # blocks of rows of a key head
    C: tl.constexpr,
    R: tl.constexpr,  # elements of a key past the C that have a value's place in a latent row; 0 otherwise
    LATENT: tl.constexpr,
    NARROW: tl.constexpr,  # rows in FP8, of bytes
    ROW: tl.constexpr,  # from one cached position to the next
    PAGE: tl.constexpr,
    BC: tl.constexpr,
    BR: tl.constexpr,
    QUARTERS: tl.constexpr,  # rows in FP8 by words
    ASM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    S_PAD: tl.constexpr,
    FIXED: tl.constexpr,
    UNIT: tl.constexpr,
    AHEAD: tl.constexpr,  # positions of a program's first sequence that are on their way before its wait
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    G: tl.constexpr = H // REP
    lane = tl.program_id(0) % (RB * G)
    w = tl.program_id(0) // (RB * G)
    group = lane // RB
    row = lane % RB * BM
    head_row: tl.constexpr = C + 4 * ((C + 127) // 128) if NARROW else C
    base = pages_ptr if LATENT else pages_ptr + group * head_row
    tiles = count_tiles(cu_ptr, contexts_ptr, S, row, S_PAD, REP, BM, BN)
    line = (tiles + UNIT - 1) // UNIT * UNIT if FIXED else tiles
    ends = tl.cumsum(line, 0)
    total = tl.sum(line, 0)
    piece = UNIT if FIXED else tl.maximum((total + W - 1) // W, 1)
    # Lengths and pages are older than the kernel before (`launch`), and what it writes meets the L2 as it is.
    u, at = w, w * piece
    s, before, mine, length, start, new, limit = _find_place(
        at, ends, line, tiles, cu_ptr, contexts_ptr, table_ptr, S, B, S_PAD, PAGE, BN
    )
    if PDL and LATENT and not NARROW:  # noqa: SIM102
        if at < total:
            position = tl.minimum((at - before) * BN + tl.arange(0, AHEAD), limit - 1)
            page = tl.load(table_ptr + s.to(tl.int64) * B + position // PAGE).to(tl.int64)
            rows = base + (page * PAGE + position % PAGE)[:, None] * ROW
            bring_near(rows, C, BC, PDL)
            bring_near(rows + C, R, BR, PDL)
    wait_for_previous(PDL)
    while at < total:
        # 1. The tiles of this sequence that are ours.
        stop = tl.minimum((u + 1) * piece, total)
        begin, end = at - before, tl.minimum(stop - before, mine)
        pages = table_ptr + s.to(tl.int64) * B
        # 2. Its queries.
        i = row + tl.arange(0, BM)
        token, head = start + i // REP, group * REP + i % REP
        kept = i < new * REP
        visible = tl.where(kept, limit - new + 1 + i // REP, 0)
        if QUARTERS:
            q0 = load_query_quarter(q_ptr, token, head, kept, 0, C, H, C + R)
            q1 = load_query_quarter(q_ptr, token, head, kept, 1, C, H, C + R)
            q2 = load_query_quarter(q_ptr, token, head, kept, 2, C, H, C + R)
            q3 = load_query_quarter(q_ptr, token, head, kept, 3, C, H, C + R)
            o0 = tl.zeros((BM, C // 4), tl.float32)
            o1 = tl.zeros((BM, C // 4), tl.float32)
            o2 = tl.zeros((BM, C // 4), tl.float32)
            o3 = tl.zeros((BM, C // 4), tl.float32)
        else:
            q = _load_queries(q_ptr, token, head, kept, 0, C, BC, H, C + R)
            o = tl.zeros((BM, BC), tl.float32)
        if R:
            q_rope = _load_queries(q_ptr, token, head, kept, C, R, BR, H, C + R)
        top = tl.full((BM,), float("-inf"), tl.float32)
        # 3. Scores, running softmax, values.
        total_M = tl.zeros((BM,), tl.float32)
        for tile in range(begin, end):
            if QUARTERS:
                k0, k1, k2, k3 = load_quarters_tile(base, pages, tile, limit, 0, C, ROW, PAGE, BN, dtype, ASM)
            elif NARROW:
                k = load_narrow_tile(base, pages, tile, limit, 0, C, BC, ROW, PAGE, BN, dtype)
            else:
                k = load_tile(base, pages, tile, limit, 0, C, BC, ROW, PAGE, BN)
            if R and NARROW:
                k_rope = load_behind_tile(base, pages, tile, limit, C, R, BR, ROW, PAGE, BN, dtype)
            elif R:
                k_rope = load_tile(base, pages, tile, limit, C, R, BR, ROW, PAGE, BN)
            if QUARTERS and LATENT:
                v0, v1, v2, v3 = k0, k1, k2, k3
            elif QUARTERS:
                v0, v1, v2, v3 = load_quarters_tile(
                    base, pages, tile, limit, G * head_row, C, ROW, PAGE, BN, dtype, ASM
                )
            elif LATENT:
                v = k
            elif NARROW:
                v = load_narrow_tile(base, pages, tile, limit, G * head_row, C, BC, ROW, PAGE, BN, dtype)
            else:
                v = load_tile(base, pages, tile, limit, G * C, C, BC, ROW, PAGE, BN)
            position = tile * BN + tl.arange(0, BN)
            if QUARTERS:
                scores = tl.dot(q0, k0.T, input_precision=PRECISION)
                scores = tl.dot(q1, k1.T, scores, input_precision=PRECISION)
                scores = tl.dot(q2, k2.T, scores, input_precision=PRECISION)
                scores = tl.dot(q3, k3.T, scores, input_precision=PRECISION)
            else:
                scores = tl.dot(q, k.T, input_precision=PRECISION)
            if R:
                scores = tl.dot(q_rope, k_rope.T, scores, input_precision=PRECISION)
            seen = position[None, :] < visible[:, None]
            scores = tl.where(seen, scores * scale, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            ground = tl.where(higher == float("-inf"), 0.0, higher)
            fade = tl.exp2(top - ground)
            p = tl.exp2(scores - ground[:, None])
            total_M = total_M * fade + tl.sum(p, 1)
            if QUARTERS:
                p = p.to(dtype)
                o0 = tl.dot(p, v0, o0 * fade[:, None], input_precision=PRECISION)
                o1 = tl.dot(p, v1, o1 * fade[:, None], input_precision=PRECISION)
                o2 = tl.dot(p, v2, o2 * fade[:, None], input_precision=PRECISION)
                o3 = tl.dot(p, v3, o3 * fade[:, None], input_precision=PRECISION)
            else:
                o = tl.dot(p.to(dtype), v, o * fade[:, None], input_precision=PRECISION)
            top = higher
        # 4. The end of it, or a part for the merge.
        # Nothing seen: 0 / 1, and log-sum-exp -inf from top.
        total_M = tl.where(total_M > 0, total_M, 1.0)
        whole = (begin == 0) & (end == mine)
        slot = u if FIXED else 2 * u + (at > u * piece).to(tl.int32)
        to = token.to(tl.int64) * H + head
        part = (slot.to(tl.int64) * (RB * G) + lane) * BM + tl.arange(0, BM)
        if QUARTERS:
            column, by = 4 * tl.arange(0, C // 4), total_M[:, None]
            _put(o0 / by, out_ptr, partial_ptr, to, part, whole, kept, column, C, BC)
            _put(o1 / by, out_ptr, partial_ptr, to, part, whole, kept, column + 1, C, BC)
            _put(o2 / by, out_ptr, partial_ptr, to, part, whole, kept, column + 2, C, BC)
            _put(o3 / by, out_ptr, partial_ptr, to, part, whole, kept, column + 3, C, BC)
        else:
            o = o / total_M[:, None]
            _put(o, out_ptr, partial_ptr, to, part, whole, kept, tl.arange(0, BC), C, BC)
        if not whole:
            tl.store(lse_ptr + part, top + tl.log2(total_M))
        at = before + tl.minimum(stop - before, length)
        done = at >= stop
        u = tl.where(done, u + W, u)
        at = tl.where(done, u * piece, at)
        if at < total:
            s, before, mine, length, start, new, limit = _find_place(
                at, ends, line, tiles, cu_ptr, contexts_ptr, table_ptr, S, B, S_PAD, PAGE, BN
            )


@triton.jit(do_not_specialize=["S", "W", "RB"])
def merge_kernel(
    contexts_ptr,
    cu_ptr,
    out_ptr,
    partial_ptr,
    lse_ptr,
    S,
    W,
    H: tl.constexpr,
    REP: tl.constexpr,
    RB,
    C: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    S_PAD: tl.constexpr,
    FIXED: tl.constexpr,
    UNIT: tl.constexpr,
    HB: tl.constexpr,  # heads of a program; divides REP and BM
    VB: tl.constexpr,  # columns of a program
    UB: tl.constexpr,  # parts in flight
    PDL: tl.constexpr,
):
    """Rows of one token, HB heads: the parts of its sequence, or zeros where it sees nothing."""
    BLOCKS: tl.constexpr = H // HB
    token = tl.program_id(0) // BLOCKS
    head = tl.program_id(0) % BLOCKS * HB
    index = tl.arange(0, S_PAD)
    last = tl.load(cu_ptr + index + 1, mask=index < S, other=0x7FFFFFFF)
    s = tl.sum((last <= token).to(tl.int32), 0)
    i = (token - tl.load(cu_ptr + s)) * REP + head % REP
    lane = head // REP * RB + i // BM
    tiles = count_tiles(cu_ptr, contexts_ptr, S, i // BM * BM, S_PAD, REP, BM, BN)
    line = (tiles + UNIT - 1) // UNIT * UNIT if FIXED else tiles
    total = tl.sum(line, 0)
    piece = UNIT if FIXED else tl.maximum((total + W - 1) // W, 1)
    before = tl.sum(tl.where(index < s, line, 0), 0)
    mine = tl.sum(tl.where(index == s, tiles, 0), 0)
    first = before // piece
    final = (before + mine - 1) // piece
    wait_for_previous(PDL)
    if (mine == 0) | (final > first):
        column = tl.program_id(1) * VB + tl.arange(0, VB)
        h = tl.arange(0, HB)
        top = tl.full((HB,), float("-inf"), tl.float32)
        weight = tl.zeros((HB,), tl.float32)
        o = tl.zeros((HB, VB), tl.float32)
        if mine > 0:
            for unit in range(first, final + 1, UB):
                u = unit + tl.arange(0, UB)
                slot = u if FIXED else 2 * u + ((u == first) & (before > first * piece)).to(tl.int32)
                at = (slot.to(tl.int64) * (RB * (H // REP)) + lane) * BM + i % BM
                at = at[:, None] + h[None, :]
                there = (u <= final)[:, None]
                lse = tl.load(lse_ptr + at, mask=there, other=float("-inf"))
                part = tl.load(
                    partial_ptr + at[:, :, None] * BC + column[None, None, :],
                    mask=there[:, :, None],
                    other=0.0,
                )
                higher = tl.maximum(top, tl.max(lse, 0))
                ground = tl.where(higher == float("-inf"), 0.0, higher)
                share = tl.exp2(lse - ground[None, :])
                fade = tl.exp2(top - ground)
                weight = weight * fade + tl.sum(share, 0)
                o = o * fade[:, None] + tl.sum(part * share[:, :, None], 0)
                top = higher
        o = o / tl.where(weight > 0, weight, 1.0)[:, None]
        to = (token.to(tl.int64) * H + head + h) * C
        tl.store(
            out_ptr + to[:, None] + column[None, :],
            o.to(out_ptr.dtype.element_ty),
            mask=(column < C)[None, :] & (h >= 0)[:, None],
        )
