"""Attention of many heads over a cache of latents, on Hopper's wide instructions: `split`, in Gluon.

    s = scale [q_c | q_r] [c | r]^T,   p = exp2(s - m),   o = o exp2(m' - m) + p c

What `cache_splits.split_kernel` computes, of the same pieces and into the same scratch, for 64 rows, latents
of 512 and 64 behind them. Triton lays scores that feed another product out with all warps in a column, so two
warpgroups make them twice; here layouts are written down: of 64 x 64 scores a warpgroup makes 64 x 32, of the
64 x 512 result 64 x 256. Queries stay in shared memory, two tiles of latents take turns (224 KB in all),
weights go through it to both warpgroups.

Order of one tile: weights of it on the cores, its values and then the next tile's scores on the tensor cores;
once the values are made its place is filled with the tile after the next.

Bound, in clocks of a tile and a multiprocessor: 2176 of products; 1728 + 640 + 640 of shared memory (a
64 x 32 x 16 reads 3 KB for 16 clocks of products); the weights, some 700, are not hidden.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_wait

ROWS, LATENT, ROPE, WARPS = (
    64,
    512,
    64,
    8,
)  # queries of a program and positions of a tile; of a row; of a program


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
def _copy(to_c, to_r, base, at, kept, C: gl.constexpr, R: gl.constexpr, LOADS: gl.constexpr):
    """Rows from elements `at` of `base`, C to one place, the R behind to another; zeros where not kept."""
    c = gl.arange(0, C, gl.SliceLayout(0, LOADS))
    r = gl.arange(0, R, gl.SliceLayout(0, LOADS))
    async_copy.async_copy_global_to_shared(to_c, base + (at[:, None] + c[None, :]), kept[:, None])
    async_copy.async_copy_global_to_shared(to_r, base + (at[:, None] + (C + r)[None, :]), kept[:, None])
    async_copy.commit_group()


@gluon.jit
def _find(table, tile, limit, PAGE: gl.constexpr, BN: gl.constexpr, LOADS: gl.constexpr):
    """The pages of a tile's positions, 0 past the limit."""
    position = tile * BN + gl.arange(0, BN, gl.SliceLayout(1, LOADS))
    return gl.load(table + position // PAGE, mask=position < limit, other=0)


@gluon.jit
def _copy_tile(
    to_c,
    to_r,
    base,
    page,
    tile,
    limit,
    ROW: gl.constexpr,
    PAGE: gl.constexpr,
    BN: gl.constexpr,
    C: gl.constexpr,
    R: gl.constexpr,
    LOADS: gl.constexpr,
):
    position = tile * BN + gl.arange(0, BN, gl.SliceLayout(1, LOADS))
    at = (page.to(gl.int64) * PAGE + position % PAGE) * ROW
    _copy(to_c, to_r, base, at, position < limit, C, R, LOADS)


@gluon.jit
def _arrive(pending: gl.constexpr):
    """All but the `pending` newest copies lie where the tensor cores see them."""
    async_copy.wait_group(pending)
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _score(q_c, q_r, k_c, k_r, SCORES: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):
    """Begun, not ended."""
    none = gl.zeros([BM, BN], gl.float32, SCORES)
    s = warpgroup_mma(q_c, k_c.permute((1, 0)), none, use_acc=False, is_async=True)
    return warpgroup_mma(q_r, k_r.permute((1, 0)), s, is_async=True)


@gluon.jit
def _weigh(s, tile, visible, scale, top, total, BN: gl.constexpr, SCORES: gl.constexpr):
    """Weights of a tile's positions, and what the softmax runs on with."""
    position = tile * BN + gl.arange(0, BN, gl.SliceLayout(0, SCORES))
    s = gl.where(position[None, :] < visible[:, None], s * scale, float("-inf"))
    higher = gl.maximum(top, gl.max(s, 1))
    ground = gl.where(higher == float("-inf"), 0.0, higher)
    fade = _exp2(top - ground)
    p = _exp2(s - ground[:, None])
    return p, higher, total * fade[:, None] + p, fade


@gluon.jit(do_not_specialize=["S", "B", "W", "RB"])
def wide_kernel(
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
    gdc_wait()
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    LOADS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BN // 2, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, C // 2, 16])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    q_c = gl.allocate_shared_memory(dtype, [BM, C], SHARED)
    q_r = gl.allocate_shared_memory(dtype, [BM, R], SHARED)
    k_c = gl.allocate_shared_memory(dtype, [2, BN, C], SHARED)
    k_r = gl.allocate_shared_memory(dtype, [2, BN, R], SHARED)
    weights = gl.allocate_shared_memory(dtype, [BM, BN], SHARED)

    # 0. The line of all sequences' tiles, and this program's pieces of it: as in `cache_splits`.
    lane = gl.program_id(0) % RB
    w = gl.program_id(0) // RB
    row = lane * BM
    index = gl.arange(0, S_PAD, LINE)
    first = gl.load(cu_ptr + index, mask=index < S, other=0)
    news = gl.load(cu_ptr + index + 1, mask=index < S, other=0) - first
    contexts = gl.load(contexts_ptr + index, mask=index < S, other=0)
    seen = contexts - news + 1 + gl.minimum((row + BM - 1) // REP, news - 1)
    tiles = gl.where(news * REP > row, (gl.maximum(seen, 0) + BN - 1) // BN, 0)
    line = (tiles + UNIT - 1) // UNIT * UNIT if FIXED else tiles
    ends = gl.associative_scan(line, 0, _add)
    total_tiles = gl.sum(line, 0)
    if FIXED:
        piece = gl.to_tensor(UNIT)
        units = total_tiles // UNIT
    else:
        piece = gl.maximum((total_tiles + W - 1) // W, 1)
        units = W
    for u in range(w, units, W):
        at = u * piece
        stop = gl.minimum(at + piece, total_tiles)
        while at < stop:
            # 1. The sequence at this place of the line, and the tiles of it that are ours.
            s = gl.sum((ends <= at).to(gl.int32), 0)
            before = gl.sum(gl.where(index < s, line, 0), 0)
            mine = gl.sum(gl.where(index == s, tiles, 0), 0)
            length = gl.sum(gl.where(index == s, line, 0), 0)
            begin = at - before
            end = gl.minimum(stop - before, mine)
            start = gl.load(cu_ptr + s)
            new = gl.load(cu_ptr + s + 1) - start
            context = gl.load(contexts_ptr + s)
            table = table_ptr + s.to(gl.int64) * B
            limit = gl.minimum(context, end * BN)
            # 2. Its queries and two tiles, asked for; the pages of the third.
            page = _find(table, begin, limit, PAGE, BN, LOADS)
            after = _find(table, begin + 1, limit, PAGE, BN, LOADS)
            asked = row + gl.arange(0, BM, gl.SliceLayout(1, LOADS))
            q_at = ((start + asked // REP).to(gl.int64) * H + asked % REP) * (C + R)
            gl.thread_barrier()  # all have done with what lies there
            _copy(q_c, q_r, q_ptr, q_at, asked < new * REP, C, R, LOADS)
            _copy_tile(k_c.index(0), k_r.index(0), pages_ptr, page, begin, limit, ROW, PAGE, BN, C, R, LOADS)
            _copy_tile(
                k_c.index(1), k_r.index(1), pages_ptr, after, begin + 1, limit, ROW, PAGE, BN, C, R, LOADS
            )
            page = _find(table, begin + 2, limit, PAGE, BN, LOADS)
            i = row + gl.arange(0, BM, gl.SliceLayout(1, SCORES))
            visible = gl.where(i < new * REP, context - new + 1 + i // REP, 0)
            top = gl.full([BM], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
            total = gl.zeros([BM, BN], gl.float32, SCORES)
            o = gl.zeros([BM, C], gl.float32, VALUES)
            # 3. Scores, running softmax, values.
            _arrive(1)
            scores = _score(q_c, q_r, k_c.index(0), k_r.index(0), SCORES, BM, BN)
            scores = warpgroup_mma_wait(0, deps=[scores])
            for tile in range(begin, end - 1):
                here = (tile - begin) % 2
                p, top, total, fade = _weigh(scores, tile, visible, scale, top, total, BN, SCORES)
                o = o * gl.convert_layout(fade, gl.SliceLayout(1, VALUES), assert_trivial=True)[:, None]
                weights.store(p.to(dtype))
                fence_async_shared()
                gl.thread_barrier()
                o = warpgroup_mma(weights, k_c.index(here), o, is_async=True)
                _arrive(0)
                scores = _score(q_c, q_r, k_c.index(1 - here), k_r.index(1 - here), SCORES, BM, BN)
                o = warpgroup_mma_wait(2, deps=[o])  # two products of scores may be under way
                gl.thread_barrier()
                _copy_tile(
                    k_c.index(here), k_r.index(here), pages_ptr, page, tile + 2, limit, ROW, PAGE, BN, C, R,
                    LOADS,
                )  # fmt: skip
                page = _find(table, tile + 3, limit, PAGE, BN, LOADS)
                scores = warpgroup_mma_wait(0, deps=[scores])
            here = (end - 1 - begin) % 2
            p, top, total, fade = _weigh(scores, end - 1, visible, scale, top, total, BN, SCORES)
            o = o * gl.convert_layout(fade, gl.SliceLayout(1, VALUES), assert_trivial=True)[:, None]
            weights.store(p.to(dtype))
            fence_async_shared()
            gl.thread_barrier()
            o = warpgroup_mma(weights, k_c.index(here), o, is_async=True)
            o = warpgroup_mma_wait(0, deps=[o])
            async_copy.wait_group(0)
            # 4. The end of it, or a part for the merge.
            weight = gl.sum(total, 1)
            weight = gl.where(weight > 0, weight, 1.0)  # nothing seen: 0 / 1, and log-sum-exp -inf from top
            o = o / gl.convert_layout(weight, gl.SliceLayout(1, VALUES), assert_trivial=True)[:, None]
            m = row + gl.arange(0, BM, gl.SliceLayout(1, VALUES))
            column = gl.arange(0, C, gl.SliceLayout(0, VALUES))
            if (begin == 0) & (end == mine):
                to = ((start + m // REP).to(gl.int64) * H + m % REP) * C
                gl.store(
                    out_ptr + (to[:, None] + column[None, :]), o.to(dtype), mask=(m < new * REP)[:, None]
                )
            else:
                slot = u if FIXED else 2 * u + (at > u * piece).to(gl.int32)
                part = (slot.to(gl.int64) * RB + lane) * BM
                gl.store(partial_ptr + ((part + m - row) * C)[:, None] + column[None, :], o)
                gl.store(lse_ptr + part + (i - row), top + gl.log2(weight))
            at = before + gl.minimum(stop - before, length)
