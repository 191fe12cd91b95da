"""Attention of many heads over a cache of latents, warpgroups taking turns: `split`, in Gluon, for Hopper.

    s = scale [q_c | q_r] [c | r]^T,   p = exp2(s - m),   o = o exp2(m' - m) + p c

What `cache_splits.split_kernel` computes, of the same pieces and into the same scratch, for 64 rows,
latents of 512 and 64 behind them. Triton has both warpgroups make all scores; here tiles come in pairs: of
the first the one warpgroup makes the scores and weights (64 x 64 x 16 products, 4 KB of shared memory for
32 clocks), of the second the other, and each multiplies the weights of both by its own half of the latents,
64 x 256 sums a warpgroup. Maxima go from tile to tile: what a warpgroup needs of the other's tile are its
weights and the maximum they stand under. A third warpgroup copies rows. A piece of an odd number of tiles
ends with an empty one.

Who waits for whom, of pair g; all but `loaded` and `freed` count one arrival:

    loaded[t]   tile t of the pair lies in place t       copier -> both (its 128 threads, as their copies end)
    given[t]    weights and maxima of tile t             the one that made them -> the other
    freed[t]    values of tile t are made                both (2) -> copier
    ended[t]    sums of weights at the end of a piece    each -> the other

One place serves all weights: the second tile's are put there when the first's have been multiplied by both.

Bound, in clocks of a tile and a multiprocessor: products 2,176; shared memory 2,430; what the L2 gives all
of them at once, some 3,000. On an H200 (2026-11-29) some 3,450: 560 TFLOP/s between contexts of 4k and 32k.
A place of a tile serves copy, scores, weights and values one after the other, and there is room for two.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

LATENT, ROPE = 512, 64  # elements of a row


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _exp2(x):
    """To 0 where it would be denormal."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _line(
    cu_ptr,
    contexts_ptr,
    S,
    row,
    REP: gl.constexpr,
    S_PAD: gl.constexpr,
    FIXED: gl.constexpr,
    UNIT: gl.constexpr,
    N: gl.constexpr,
):
    """Tiles of each sequence that N rows from `row` see, their places of the line, and where those end."""
    index = gl.arange(0, S_PAD, gl.BlockedLayout([1], [32], [4], [0]))
    first = gl.load(cu_ptr + index, mask=index < S, other=0)
    news = gl.load(cu_ptr + index + 1, mask=index < S, other=0) - first
    contexts = gl.load(contexts_ptr + index, mask=index < S, other=0)
    seen = contexts - news + 1 + gl.minimum((row + N - 1) // REP, news - 1)
    tiles = gl.where(news * REP > row, (gl.maximum(seen, 0) + N - 1) // N, 0)
    if FIXED:
        line = (tiles + UNIT - 1) // UNIT * UNIT
    else:
        line = tiles
    return index, tiles, line, gl.associative_scan(line, 0, _add)


@gluon.jit
def _cut(line, W, FIXED: gl.constexpr, UNIT: gl.constexpr):
    """Tiles in all, of a piece, and how many pieces."""
    total = gl.sum(line, 0)
    if FIXED:
        return total, total * 0 + UNIT, total // UNIT
    else:
        return total, gl.maximum((total + W - 1) // W, 1), W


@gluon.jit
def _place(index, tiles, line, ends, at, stop, cu_ptr):
    """The sequence at this place of the line: it, its beginning there, its tiles, its length there; those of
    the tiles before `stop`, from one to another; its first token, and how many."""
    s = gl.sum((ends <= at).to(gl.int32), 0)
    before = gl.sum(gl.where(index < s, line, 0), 0)
    mine = gl.sum(gl.where(index == s, tiles, 0), 0)
    length = gl.sum(gl.where(index == s, line, 0), 0)
    begin = at - before
    end = gl.minimum(stop - before, mine)
    start = gl.load(cu_ptr + s)
    new = gl.load(cu_ptr + s + 1) - start
    return s, before, mine, length, begin, end, start, new


@gluon.jit
def _copy(to_c, to_r, base, at, kept, C: gl.constexpr, R: gl.constexpr, LOADS: gl.constexpr):
    """Rows from elements `at` of `base`, C to one place, the R behind to another; zeros where not kept."""
    c = gl.arange(0, C, gl.SliceLayout(0, LOADS))
    r = gl.arange(0, R, gl.SliceLayout(0, LOADS))
    async_copy.async_copy_global_to_shared(to_c, base + (at[:, None] + c[None, :]), kept[:, None])
    async_copy.async_copy_global_to_shared(to_r, base + (at[:, None] + (C + r)[None, :]), kept[:, None])


@gluon.jit
def _find(table, tile, limit, PAGE: gl.constexpr, N: gl.constexpr, LOADS: gl.constexpr):
    """The pages of a tile's positions, 0 past the limit."""
    position = tile * N + gl.arange(0, N, gl.SliceLayout(1, LOADS))
    return gl.load(table + position // PAGE, mask=position < limit, other=0)


@gluon.jit
def _copier(
    given_to, held,
    H: gl.constexpr, REP: gl.constexpr, C: gl.constexpr, R: gl.constexpr, ROW: gl.constexpr,
    PAGE: gl.constexpr, N: gl.constexpr, S_PAD: gl.constexpr, FIXED: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    LOADS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    q_ptr, pages_ptr, table_ptr, contexts_ptr, cu_ptr, _, _, _, S, B, W, RB, _ = given_to
    q_c, q_r, k_c, k_r, _, _, _, loaded, _, freed, _ = held
    row = gl.program_id(0) % RB * N
    index, tiles, line, ends = _line(cu_ptr, contexts_ptr, S, row, REP, S_PAD, FIXED, UNIT, N)
    total, piece, units = _cut(line, W, FIXED, UNIT)
    pair = 0
    for u in range(gl.program_id(0) // RB, units, W):
        at = u * piece
        stop = gl.minimum(at + piece, total)
        while at < stop:
            s, before, _mine, length, begin, end, start, new = _place(
                index, tiles, line, ends, at, stop, cu_ptr
            )
            limit = gl.minimum(gl.load(contexts_ptr + s), end * N)
            table = table_ptr + s.to(gl.int64) * B
            page = _find(table, begin, limit, PAGE, N, LOADS)
            i = row + gl.arange(0, N, gl.SliceLayout(1, LOADS))
            q_at = ((start + i // REP).to(gl.int64) * H + i % REP) * (C + R)
            # Queries may be written when the last pair before them is done with.
            mbarrier.wait(freed.index(0), (pair & 1) ^ 1)
            mbarrier.wait(freed.index(1), (pair & 1) ^ 1)
            _copy(q_c.index(0), q_r.index(0), q_ptr, q_at, i < new * REP, C, R, LOADS)
            for tile in range(begin, begin + (end - begin + 1) // 2 * 2):
                turn = (tile - begin) % 2
                position = tile * N + gl.arange(0, N, gl.SliceLayout(1, LOADS))
                k_at = (page.to(gl.int64) * PAGE + position % PAGE) * ROW
                page = _find(table, tile + 1, limit, PAGE, N, LOADS)
                mbarrier.wait(freed.index(turn), (pair & 1) ^ 1)
                _copy(k_c.index(turn), k_r.index(turn), pages_ptr, k_at, position < limit, C, R, LOADS)
                async_copy.mbarrier_arrive(loaded.index(turn), increment_count=False)
                pair += turn
            at = before + gl.minimum(stop - before, length)


@gluon.jit
def _score(q_c, q_r, k_c, k_r, SCORES: gl.constexpr, N: gl.constexpr):
    none = gl.zeros([N, N], gl.float32, SCORES)
    s = warpgroup_mma(q_c, k_c.permute((1, 0)), none, use_acc=False, is_async=True)
    s = warpgroup_mma(q_r, k_r.permute((1, 0)), s, is_async=True)
    return warpgroup_mma_wait(0, deps=[s])


@gluon.jit
def _hide(s, tile, visible, N: gl.constexpr, SCORES: gl.constexpr):
    position = tile * N + gl.arange(0, N, gl.SliceLayout(0, SCORES))
    return gl.where(position[None, :] < visible[:, None], s, float("-inf"))


@gluon.jit
def _weigh(s, higher):
    """Weights of a tile's positions under a maximum."""
    return _exp2(s - gl.where(higher == float("-inf"), 0.0, higher)[:, None])


@gluon.jit
def _fade(top, higher):
    return _exp2(top - gl.where(higher == float("-inf"), 0.0, higher))


@gluon.jit
def _signal(barrier):
    """All threads of this warpgroup have come here."""
    gl.thread_barrier()
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def _multiply(
    given_to, held,
    H: gl.constexpr, REP: gl.constexpr, C: gl.constexpr, R: gl.constexpr, ROW: gl.constexpr,
    PAGE: gl.constexpr, N: gl.constexpr, S_PAD: gl.constexpr, FIXED: gl.constexpr, UNIT: gl.constexpr,
    SIDE: gl.constexpr,
):  # fmt: skip
    """The warpgroup of one half of the columns, and of one tile of a pair."""
    q_ptr, _, _, contexts_ptr, cu_ptr, out_ptr, partial_ptr, lse_ptr, S, _, W, RB, scale = given_to
    q_c, q_r, k_c, k_r, weights, tops, sums, loaded, given, freed, ended = held
    HALF: gl.constexpr = C // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, VALUES, 2)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    COLUMNS: gl.constexpr = gl.SliceLayout(1, VALUES)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    lane = gl.program_id(0) % RB
    row = lane * N
    index, tiles, line, ends = _line(cu_ptr, contexts_ptr, S, row, REP, S_PAD, FIXED, UNIT, N)
    total, piece, units = _cut(line, W, FIXED, UNIT)
    pair = 0
    part = 0
    for u in range(gl.program_id(0) // RB, units, W):
        at = u * piece
        stop = gl.minimum(at + piece, total)
        while at < stop:
            # 1. The sequence at this place of the line, and the tiles of it that are ours.
            s, before, mine, length, begin, end, start, new = _place(
                index, tiles, line, ends, at, stop, cu_ptr
            )
            context = gl.load(contexts_ptr + s)
            i = row + gl.arange(0, N, BY_ROW)
            visible = gl.where(i < new * REP, context - new + 1 + i // REP, 0)
            visible = gl.minimum(visible, end * N)
            all_see = gl.minimum(context - new + 1 + row // REP, end * N)
            top = gl.full([N], float("-inf"), gl.float32, BY_ROW)
            weight = gl.zeros([N], gl.float32, BY_ROW)
            o = gl.zeros([N, HALF], gl.float32, VALUES)
            # 2. Pairs of tiles: in each `top` goes from the last to the first to the second.
            for tile in range(begin, end, 2):
                phase = pair & 1
                zero = pair >> 30  # or the compilers keep, and spill, where each product's operands lie
                mbarrier.wait(loaded.index(SIDE), phase)
                fence_async_shared()
                k = SIDE + zero
                scores = _score(q_c.index(zero), q_r.index(zero), k_c.index(k), k_r.index(k), SCORES, N)
                v0 = k_c.index(zero).slice(SIDE * HALF, HALF, 1)
                v1 = k_c.index(1 + zero).slice(SIDE * HALF, HALF, 1)
                if SIDE == 0:
                    scores = scores * scale
                    if (tile + 1) * N > all_see:
                        scores = _hide(scores, tile, visible, N, SCORES)
                    higher = gl.maximum(top, gl.max(scores, 1))
                    p = _weigh(scores, higher)
                    fade = _fade(top, higher)
                    weight = weight * fade + gl.sum(p, 1)
                    p = p.to(dtype)
                    weights.store(p)
                    tops.index(0).store(higher)
                    fence_async_shared()
                    _signal(given.index(0))
                    o = o * gl.convert_layout(fade, COLUMNS, assert_trivial=True)[:, None]
                    o = warpgroup_mma(gl.convert_layout(p, WEIGHTS), v0, o, is_async=True)
                    o = warpgroup_mma_wait(0, deps=[o])
                    _signal(freed.index(0))
                    mbarrier.wait(loaded.index(1), phase)
                    mbarrier.wait(given.index(1), phase)
                    fence_async_shared()
                    top = tops.index(1).load(BY_ROW)
                    fade = _fade(higher, top)
                    weight = weight * fade
                    o = o * gl.convert_layout(fade, COLUMNS, assert_trivial=True)[:, None]
                    o = warpgroup_mma(weights, v1, o, is_async=True)
                    o = warpgroup_mma_wait(0, deps=[o])
                    _signal(freed.index(1))
                else:
                    scores = _hide(scores * scale, tile + 1, visible, N, SCORES)
                    peak = gl.max(scores, 1)
                    mbarrier.wait(loaded.index(0), phase)
                    mbarrier.wait(given.index(0), phase)
                    fence_async_shared()
                    higher = tops.index(0).load(BY_ROW)
                    fade = _fade(top, higher)
                    weight = weight * fade
                    o = o * gl.convert_layout(fade, COLUMNS, assert_trivial=True)[:, None]
                    o = warpgroup_mma(weights, v0, o, is_async=True)
                    top = gl.maximum(higher, peak)
                    p = _weigh(scores, top)
                    fade = _fade(higher, top)
                    weight = weight * fade + gl.sum(p, 1)
                    p = p.to(dtype)
                    o = warpgroup_mma_wait(0, deps=[o])
                    _signal(freed.index(0))
                    weights.store(p)
                    tops.index(1).store(top)
                    fence_async_shared()
                    _signal(given.index(1))
                    o = o * gl.convert_layout(fade, COLUMNS, assert_trivial=True)[:, None]
                    o = warpgroup_mma(gl.convert_layout(p, WEIGHTS), v1, o, is_async=True)
                    o = warpgroup_mma_wait(0, deps=[o])
                    _signal(freed.index(1))
                pair += 1
            # 3. Both halves' sums of weights; the end of it, or a part for the merge.
            sums.index(SIDE).store(weight)
            _signal(ended.index(SIDE))
            mbarrier.wait(ended.index(1 - SIDE), part & 1)
            weight = weight + sums.index(1 - SIDE).load(BY_ROW)
            part += 1
            weight = gl.where(weight > 0, weight, 1.0)  # nothing seen: 0 / 1, and log-sum-exp -inf from top
            o = o / gl.convert_layout(weight, COLUMNS, assert_trivial=True)[:, None]
            m = gl.arange(0, N, COLUMNS)
            column = SIDE * HALF + gl.arange(0, HALF, gl.SliceLayout(0, VALUES))
            if (begin == 0) & (end == mine):
                to = ((start + (row + m) // REP).to(gl.int64) * H + (row + m) % REP) * C
                kept = row + m < new * REP
                gl.store(out_ptr + (to[:, None] + column[None, :]), o.to(dtype), mask=kept[:, None])
            else:
                slot = u if FIXED else 2 * u + (at > u * piece).to(gl.int32)
                place = (slot.to(gl.int64) * RB + lane) * N
                gl.store(partial_ptr + (((place + m) * C)[:, None] + column[None, :]), o)
                if SIDE == 0:
                    gl.store(lse_ptr + (place + gl.arange(0, N, BY_ROW)), top + gl.log2(weight))
            at = before + gl.minimum(stop - before, length)


@gluon.jit(do_not_specialize=["S", "B", "W", "RB"])
def turns_kernel(
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
    H: gl.constexpr,
    REP: gl.constexpr,
    RB,  # blocks of rows
    C: gl.constexpr,
    R: gl.constexpr,
    ROW: gl.constexpr,  # from one cached position to the next
    PAGE: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    S_PAD: gl.constexpr,
    FIXED: gl.constexpr,
    UNIT: gl.constexpr,
):
    gl.static_assert(BM == BN)
    gdc_wait()
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q_c = gl.allocate_shared_memory(dtype, [1, BM, C], SHARED)
    q_r = gl.allocate_shared_memory(dtype, [1, BM, R], SHARED)
    k_c = gl.allocate_shared_memory(dtype, [2, BN, C], SHARED)
    k_r = gl.allocate_shared_memory(dtype, [2, BN, R], SHARED)
    weights = gl.allocate_shared_memory(dtype, [BM, BN], SHARED)
    tops = gl.allocate_shared_memory(gl.float32, [2, BM], PLAIN)
    sums = gl.allocate_shared_memory(gl.float32, [2, BM], PLAIN)
    loaded = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    given = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    freed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ended = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for t in gl.static_range(2):
        mbarrier.init(loaded.index(t), count=128)
        mbarrier.init(given.index(t), count=1)
        mbarrier.init(freed.index(t), count=2)
        mbarrier.init(ended.index(t), count=1)
    given_to = (
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
        RB,
        scale,
    )
    held = q_c, q_r, k_c, k_r, weights, tops, sums, loaded, given, freed, ended
    gl.warp_specialize(
        [
            (_copier, (given_to, held, H, REP, C, R, ROW, PAGE, BM, S_PAD, FIXED, UNIT)),
            (_multiply, (given_to, held, H, REP, C, R, ROW, PAGE, BM, S_PAD, FIXED, UNIT, 0)),
            (_multiply, (given_to, held, H, REP, C, R, ROW, PAGE, BM, S_PAD, FIXED, UNIT, 1)),
        ],
        [4, 4],
        [216, 216],
    )
