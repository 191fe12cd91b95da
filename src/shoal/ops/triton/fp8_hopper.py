"""FP8 products of experts on Hopper, two warpgroups each at its own pace: `fp8_products`, in Gluon.

    h = silu(g) u, [g u] = x_t [gate up]_e^T    GATED     128 columns of each a tile; h leaves quantised
    y = a w_e^T                                           256 columns a tile

    acc += (sum over 128 columns of q_a q_w) * s_a s_w

The same numbers by the same products, bit for bit: each block of 128 columns begins at zero and is added in
float32, scaled. Triton has all warps multiply, then all add, so the tensor core rests for as long as a block
is added. Here each warpgroup has 64 of a tile's 128 rows, and adds one half of the columns while the other
multiplies; a third copies: weights, and rows where they lie by slot, by TMA; rows of tokens each thread by
itself. A warpgroup may be as far ahead as there are places.

    loaded[s]   a block's operands lie in place s      copier -> both
    freed[s]    they are multiplied                    both (2) -> copier

Registers: a warpgroup's sums, 64 x 256, are 128 a thread, a block's half 64 (ptxas: no spills). Shared
memory, clocks of a block and a multiprocessor: copies 384, operands 768, where the products take 1,024.

Bound: shared memory, 0.89 of the matrix rate, which is 1,512 TFLOP/s on an H200. There (2026-11-29), V2-Lite
at 16k tokens: gate-up 980, down 1,016, dh 986, dx 1,103, where `fp8_products` has 772, 663, 721 and 783.
Tiles 128 columns wide have 0.87 to 0.96 of that; warpgroups that wait for one another's products to be
issued, 0.96 to 1.03.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

ROWS, BLOCK = gl.constexpr(64), gl.constexpr(128)  # of a warpgroup; columns of a scale
STAGES, GROUP = gl.constexpr(4), gl.constexpr(16)  # places; tiles down before the next column


@gluon.jit
def _walk(tile, num_m, num_n):
    """As `expert_products.walk`."""
    width = GROUP * num_n
    first = tile // width * GROUP
    height = gl.minimum(num_m - first, GROUP)
    within = tile % width
    return first + within % height, within // height


@gluon.jit
def _size(first_tile_ptr, E: gl.constexpr, C: gl.constexpr, N: gl.constexpr, GATED: gl.constexpr):
    """Tiles of rows, tiles of columns, blocks of the reduction."""
    STEP: gl.constexpr = 128 if GATED else 256
    num_n: gl.constexpr = (N + STEP - 1) // STEP
    blocks: gl.constexpr = (C + 127) // 128
    return gl.load(first_tile_ptr + E), num_n, blocks


@gluon.jit
def _copier(
    given_to, held,
    E: gl.constexpr, K: gl.constexpr, C: gl.constexpr, N: gl.constexpr,
    GATED: gl.constexpr, SCATTER: gl.constexpr, SAVE: gl.constexpr,
):  # fmt: skip
    LOADS: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    a, _, w, _, _, _, _, choices_ptr, tile_experts_ptr, first_tile_ptr = given_to
    a_s, w_s, loaded, freed = held
    num_m, num_n, blocks = _size(first_tile_ptr, E, C, N, GATED)
    # What a half's columns begin at, in rows of w: an expert has EACH, the second half stands NEXT behind.
    EACH: gl.constexpr = 2 * N if GATED else N
    NEXT: gl.constexpr = N if GATED else 128
    STEP: gl.constexpr = 128 if GATED else 256
    it = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        m, n = _walk(tile, num_m, num_n)
        row = gl.load(tile_experts_ptr + m) * EACH + n * STEP
        if GATED:
            i = m * 128 + gl.arange(0, 64, gl.SliceLayout(1, LOADS))
            low, high = gl.load(choices_ptr + i), gl.load(choices_ptr + i + 64)
            c = gl.arange(0, 128, gl.SliceLayout(0, LOADS))
            low_at = ((low // K).to(gl.int64) * C)[:, None] + c[None, :]
            high_at = ((high // K).to(gl.int64) * C)[:, None] + c[None, :]
        for k in range(blocks):
            s = it % STAGES
            mbarrier.wait(freed.index(s), (it // STAGES & 1) ^ 1)
            place = loaded.index(s)
            if GATED:
                mbarrier.expect(place, 128 * 256)
            else:
                gl.thread_barrier()  # no warp is a round behind
                mbarrier.expect(place, 128 * 384)
                tma.async_copy_global_to_shared(a, [m * 128, k * 128], place, a_s.index(2 * s))
                tma.async_copy_global_to_shared(a, [m * 128 + 64, k * 128], place, a_s.index(2 * s + 1))
            tma.async_copy_global_to_shared(w, [row, k * 128], place, w_s.index(2 * s))
            tma.async_copy_global_to_shared(w, [row + NEXT, k * 128], place, w_s.index(2 * s + 1))
            if GATED:
                there = (k * 128 + c < C)[None, :]
                async_copy.async_copy_global_to_shared(
                    a_s.index(2 * s), a + k * 128 + low_at, (low >= 0)[:, None] & there
                )
                async_copy.async_copy_global_to_shared(
                    a_s.index(2 * s + 1), a + k * 128 + high_at, (high >= 0)[:, None] & there
                )
                async_copy.mbarrier_arrive(place, increment_count=False)
            it += 1


@gluon.jit
def _issue(a, w, PART: gl.constexpr):
    """The products of one half's block, from zero, under way."""
    none = gl.zeros([ROWS, BLOCK], gl.float32, PART)
    return warpgroup_mma(a, w.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def _store(x, pointer, row, kept, column, WIDTH: gl.constexpr, N: gl.constexpr):
    """BLOCK columns from `column` on of rows WIDTH long, N of them there."""
    c = column + gl.arange(0, BLOCK, gl.SliceLayout(0, x.type.layout))
    at = (row.to(gl.int64) * WIDTH)[:, None] + c[None, :]
    gl.store(pointer + at, x, mask=kept[:, None] & (c < N)[None, :])


@gluon.jit
def _multiply(
    given_to, held,
    E: gl.constexpr, K: gl.constexpr, C: gl.constexpr, N: gl.constexpr,
    GATED: gl.constexpr, SCATTER: gl.constexpr, SAVE: gl.constexpr, SIDE: gl.constexpr,
):  # fmt: skip
    """The warpgroup of one half of the rows."""
    PART: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    BY_ROW: gl.constexpr = gl.SliceLayout(1, PART)
    STORES: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    _, a_scales_ptr, _, w_scales_ptr, out_ptr, out_scales_ptr, saved_ptr = given_to[:7]
    choices_ptr, tile_experts_ptr, first_tile_ptr = given_to[7:]
    a_s, w_s, loaded, freed = held
    num_m, num_n, blocks = _size(first_tile_ptr, E, C, N, GATED)
    EACH: gl.constexpr = (2 * N if GATED else N + 127) // 128  # an expert's blocks of columns
    NEXT: gl.constexpr = N // 128 if GATED else 1
    STEP: gl.constexpr = 1 if GATED else 2
    it = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        # 1. Where the scales lie of our rows, and of the weight's two blocks.
        m, n = _walk(tile, num_m, num_n)
        first = gl.load(tile_experts_ptr + m) * EACH
        slot = m * 128 + SIDE * ROWS
        i = slot + gl.arange(0, ROWS, BY_ROW)
        if GATED:
            choice = gl.load(choices_ptr + i)
            a_scale = a_scales_ptr + (gl.maximum(choice, 0) // K).to(gl.int64) * blocks
        else:
            a_scale = a_scales_ptr + i.to(gl.int64) * blocks
        w_scale = w_scales_ptr + (first + n * STEP).to(gl.int64) * blocks
        # A second half past the last column is multiplied by some scale, and not stored.
        next_scale = w_scales_ptr + (first + gl.minimum(n * STEP + NEXT, EACH - 1)).to(gl.int64) * blocks
        by_row, by_first, by_next = gl.load(a_scale), gl.load(w_scale), gl.load(next_scale)
        acc = gl.zeros([ROWS, BLOCK], gl.float32, PART)
        other = gl.zeros([ROWS, BLOCK], gl.float32, PART)
        # 2. Blocks of the reduction.
        for k in range(blocks):
            s = it % STAGES
            mbarrier.wait(loaded.index(s), it // STAGES & 1)
            if GATED:
                fence_async_shared()
            a = a_s.index(2 * s + SIDE)
            part = _issue(a, w_s.index(2 * s), PART)
            scale, other_scale = by_row * by_first, by_row * by_next
            ahead = gl.minimum(k + 1, blocks - 1)
            by_row = gl.load(a_scale + ahead)
            by_first, by_next = gl.load(w_scale + ahead), gl.load(next_scale + ahead)
            part = warpgroup_mma_wait(0, deps=[part])
            acc += part * scale[:, None]
            part = _issue(a, w_s.index(2 * s + 1), PART)
            part = warpgroup_mma_wait(0, deps=[part])
            gl.thread_barrier()
            mbarrier.arrive(freed.index(s), count=1)
            other += part * other_scale[:, None]
            it += 1
        # 3. What leaves.
        to = slot + gl.arange(0, ROWS, gl.SliceLayout(1, STORES))
        always = to >= 0
        if GATED:
            gate = gl.convert_layout(acc.to(saved_ptr.dtype.element_ty), STORES)
            up = gl.convert_layout(other.to(saved_ptr.dtype.element_ty), STORES)
            if SAVE:
                _store(gate, saved_ptr, to, always, n * 128, 2 * N, N)
                _store(up, saved_ptr + N, to, always, n * 128, 2 * N, N)
            gate = gate.to(gl.float32)
            h = gate * (1.0 / (1.0 + gl.exp(-gate))) * up.to(gl.float32)
            # As `quantise.scale_of`.
            scale = gl.div_rn(gl.maximum(gl.max(gl.abs(h), 1), 7.888609052210118e-31), 448.0)
            h = (h * gl.div_rn(1.0, scale)[:, None]).to(out_ptr.dtype.element_ty)
            _store(h, out_ptr, to, always, n * 128, N, N)
            gl.store(out_scales_ptr + (to.to(gl.int64) * num_n + n), scale)
        else:
            if SCATTER:
                to = gl.load(choices_ptr + to)
                always = to >= 0
            y = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), STORES)
            _store(y, out_ptr, to, always, n * 256, N, N)
            y = gl.convert_layout(other.to(out_ptr.dtype.element_ty), STORES)
            _store(y, out_ptr, to, always, n * 256 + 128, N, N)


@gluon.jit
def fp8_hopper_kernel(
    a,
    a_scales_ptr,
    w,
    w_scales_ptr,
    out_ptr,
    out_scales_ptr,
    saved_ptr,
    choices_ptr,
    tile_experts_ptr,
    first_tile_ptr,
    E: gl.constexpr,
    K: gl.constexpr,
    C: gl.constexpr,
    N: gl.constexpr,
    GATED: gl.constexpr,
    SCATTER: gl.constexpr,
    SAVE: gl.constexpr,
):
    """a (P, C), or x (T, C) if GATED, times w (E N, C), or (E 2 N, C), both 128 x 128 a copy (a's 64 x 128).
    Out (P, N) by slot, by choice if SCATTER; GATED: h (P, N), its scales, and g and u (P, 2, N) if SAVE."""
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    narrow: gl.constexpr = gl.float8e4nv
    a_s = gl.allocate_shared_memory(narrow, [2 * STAGES, ROWS, BLOCK], SHARED)
    w_s = gl.allocate_shared_memory(narrow, [2 * STAGES, BLOCK, BLOCK], SHARED)
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    freed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(loaded.index(s), count=129 if GATED else 1)
        mbarrier.init(freed.index(s), count=2)
    given_to = (
        a,
        a_scales_ptr,
        w,
        w_scales_ptr,
        out_ptr,
        out_scales_ptr,
        saved_ptr,
        choices_ptr,
        tile_experts_ptr,
        first_tile_ptr,
    )
    held = a_s, w_s, loaded, freed
    gl.warp_specialize(
        [
            (_copier, (given_to, held, E, K, C, N, GATED, SCATTER, SAVE)),
            (_multiply, (given_to, held, E, K, C, N, GATED, SCATTER, SAVE, 0)),
            (_multiply, (given_to, held, E, K, C, N, GATED, SCATTER, SAVE, 1)),
        ],
        [4, 4],
        [216, 216],
    )
