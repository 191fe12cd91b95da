"""Products of a few rows with one to three narrow weights, one launch, a lane reading what it multiplies.

    y_i = x w_i^T    for each i

A linear of few rows is over in a few microseconds, so what counts is instructions of a warp, one after the
other, and nothing may wait. In Gluon, since all rests on which lane holds what. mma.sync (m16n8k16) takes 16
rows of the weight and 8 of x; lane 4 g + t holds of rows g and g + 8 the same columns as of row g of x, and
which columns those are is free. So they are those that lie side by side: 16 bytes of a row of the weight, 128
columns of INT4 or 64 of FP8 by four lanes (a piece), and of x runs of 8. Nothing is exchanged between lanes,
nothing widened into shared memory. A warp has columns of its own and asks for all its bytes, by cp.async,
before it waits for the kernel before; at the end the warps' sums are added, in their order.

INT4: four in 16 bits are columns 32 apart; four bits at 0 or 4 of 16 are a subnormal bfloat16, of which one
fused multiply-add makes the number, less 8, times 2^-9. FP8: the 7 bits of a magnitude, four places lower in
16, are its bfloat16 times 2^-120, subnormal numbers too; four bytes take 4.5 instructions for two. A block of
128 columns is summed unscaled, and its scale meets the sum.

How a row is summed depends on the weights' shape and not on BM: so it does not depend on its batch.

Bound: bytes, 1.002 a weight in FP8 and 0.516 in INT4, of 4.555 TB/s on an H200, there (2026-11-29) 0.5 to
2.5 us; at 32 rows V2-Lite's linears take 3.7 to 7.9, bfloat16's 6.8 to 11.6.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

MAX_WEIGHTS = 3
MOST_HELD = 196_608  # bytes of shared memory

_INT4 = gl.constexpr(
    "{ .reg .b32 t, low, high, less, s;"
    "mov.b32 low, 0x7d807d80; mov.b32 high, 0x7b807b80; mov.b32 less, 0xbc80bc80;"
    + "".join(
        f"and.b32 t, ${16 + i}, 0x000f000f; fma.rn.bf16x2 ${i}, t, low, less;"
        f"and.b32 t, ${16 + i}, 0x00f000f0; fma.rn.bf16x2 ${4 + i}, t, high, less;"
        f"shr.b32 s, ${16 + i}, 8;"
        f"and.b32 t, s, 0x000f000f; fma.rn.bf16x2 ${8 + i}, t, low, less;"
        f"and.b32 t, s, 0x00f000f0; fma.rn.bf16x2 ${12 + i}, t, high, less;"
        for i in range(4)
    )
    + "}"
)
_E4M3 = gl.constexpr(
    "{ .reg .b32 high, low, t, up; mov.b32 up, 0x7b807b80;"
    + "".join(
        f"shr.b32 t, ${8 + i}, 4; and.b32 t, t, 0x07070707; lop3.b32 high, ${8 + i}, 0x80808080, t, 0xea;"
        f"shl.b32 t, ${8 + i}, 4; and.b32 low, t, 0xf0f0f0f0;"
        f"prmt.b32 t, low, high, 0x5140; mul.bf16x2 ${2 * i}, t, up;"
        f"prmt.b32 t, low, high, 0x7362; mul.bf16x2 ${2 * i + 1}, t, up;"
        for i in range(4)
    )
    + "}"
)
_PRODUCT = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
_TIMES = gl.constexpr(
    "{ .reg .f32 a, b, c, d;"
    + _PRODUCT + " {a, b, c, d}, {$8, $12, $9, $13}, {$16, $17}, {$4, $5, $6, $7};"
    + _PRODUCT + " {$0, $1, $2, $3}, {$10, $14, $11, $15}, {$18, $19}, {a, b, c, d};"
    + "}"
)  # fmt: skip
_FROM_INT4 = gl.constexpr(",".join(["=r"] * 16 + ["r"] * 4))
_FROM_E4M3 = gl.constexpr(",".join(["=r"] * 8 + ["r"] * 4))
_FROM_THREE = gl.constexpr(",".join(["=f"] * 4 + ["f"] * 4 + ["r"] * 12))


@gluon.jit
def _widen(w, INT4: gl.constexpr):
    """16 bytes a lane as runs of 8 columns in bfloat16: four, times 2^-9, or two."""
    if INT4:
        return gl.inline_asm_elementwise(
            _INT4, _FROM_INT4, [w], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=4
        )
    else:
        return gl.inline_asm_elementwise(
            _E4M3, _FROM_E4M3, [w], dtype=(gl.int32, gl.int32), is_pure=True, pack=4
        )


@gluon.jit
def _times(part, above, below, x, INT4: gl.constexpr):
    """`part` (lanes, tiles of 16 rows, of 8 of x, 4 sums) plus a piece's: rows g `above`, g + 8 `below`."""
    above, below = _widen(above, INT4), _widen(below, INT4)
    for run in gl.static_range(4 if INT4 else 2):
        part = gl.inline_asm_elementwise(
            _TIMES,
            _FROM_THREE,
            [part, above[run][:, :, None, :], below[run][:, :, None, :], x[run][:, None, :, :]],
            dtype=gl.float32,
            is_pure=True,
            pack=4,
        )
    return part


@gluon.jit
def _load_run(x_at, column, C: gl.constexpr):
    """8 columns from `column` of each row of x; zeros past C."""
    if C % 128:
        return gl.load(x_at + column // 2, mask=column < C, other=0)
    else:
        return gl.load(x_at + column // 2)


@gluon.jit
def _load_x(x_at, column, C: gl.constexpr, INT4: gl.constexpr):
    """The runs that a lane multiplies a piece by, the first at `column`."""
    if INT4:
        return (
            _load_run(x_at, column, C),
            _load_run(x_at, column + 32, C),
            _load_run(x_at, column + 64, C),
            _load_run(x_at, column + 96, C),
        )
    else:
        return _load_run(x_at, column, C), _load_run(x_at, column + 8, C)


@gluon.jit
def _x_at(x_ptr, row, C: gl.constexpr, X: gl.constexpr):
    """Where the rows `row` (lanes, tiles) of x (., C) begin, in 32 bits."""
    i = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, X)))
    start = row.to(gl.int64) * (C // 2)
    return x_ptr.to(gl.pointer_type(gl.int32), bitcast=True) + (start[:, :, None] + i[None, :][:, None, :])


@gluon.jit
def _w_at(w_ptr, row, lane, STRIDE: gl.constexpr, ROWS: gl.constexpr):
    """Where a lane reads its 16 bytes of piece 0 of the rows `row` (lanes, tiles)."""
    i = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, ROWS)))
    start = row * STRIDE + (lane % 4 * 4)[:, None]
    return w_ptr + (start[:, :, None] + i[None, :][:, None, :])


@gluon.jit
def _scale_at(scales_ptr, row, BLOCKS: gl.constexpr, INT4: gl.constexpr, ROWS: gl.constexpr):
    """Where the scales of block 0 of the rows `row` are: for INT4 that of each of a lane's four sums."""
    if INT4:
        i = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, ROWS)))
        return scales_ptr + (row[:, :, None] + i[None, :][:, None, :] // 2 * 8)
    else:
        return scales_ptr + (row // 128 * BLOCKS)[:, :, None]


@gluon.jit
def _ask(above, below, w_at, place, STRIDE: gl.constexpr):
    async_copy.async_copy_global_to_shared(above.index(place), w_at)
    async_copy.async_copy_global_to_shared(below.index(place), w_at + 8 * STRIDE)
    async_copy.commit_group()


@gluon.jit
def _places(COUNT: gl.constexpr, LANES: gl.constexpr, TILES: gl.constexpr):
    """A lane's 16 bytes beside its neighbour's."""
    PLACE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 0, 1])
    return gl.allocate_shared_memory(gl.int32, [COUNT, LANES, TILES, 4], PLACE)


@gluon.jit
def _tile(
    x_ptr, w_ptr, scales_ptr, y_ptr, block, M, N: gl.constexpr, C: gl.constexpr, BM: gl.constexpr,
    TILES: gl.constexpr, INT4: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """16 TILES rows of the weight times BM of x, each warp of its own columns."""
    NT: gl.constexpr = BM // 8
    LANES: gl.constexpr = 32 * WARPS
    SUMS: gl.constexpr = gl.BlockedLayout([1, TILES, NT, 4], [32, 1, 1, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(2, SUMS)
    X: gl.constexpr = gl.SliceLayout(1, SUMS)
    BLOCKS: gl.constexpr = (C + 127) // 128
    STRIDE: gl.constexpr = BLOCKS * 16 if INT4 else C // 4  # 32 bits a row
    PIECES: gl.constexpr = 1 if INT4 else 2  # of a block
    MINE: gl.constexpr = (BLOCKS + WARPS - 1) // WARPS  # blocks of a warp
    # 1. What a lane has of the weight; of pieces that there are not, the last.
    lane = gl.arange(0, LANES, gl.SliceLayout(1, gl.SliceLayout(2, ROWS)))
    tile = gl.arange(0, TILES, gl.SliceLayout(0, gl.SliceLayout(2, ROWS)))
    w_row = gl.minimum(block * (16 * TILES) + tile * 16, N - 16)[None, :] + (lane % 32 // 4)[:, None]
    w_at = _w_at(w_ptr, w_row, lane, STRIDE, ROWS)
    above, below = _places(MINE * PIECES, LANES, TILES), _places(MINE * PIECES, LANES, TILES)
    for k in gl.static_range(MINE * PIECES):
        piece = gl.minimum(lane // 32 * (MINE * PIECES) + k, STRIDE // 16 - 1) * 16
        _ask(above, below, w_at + piece[:, None][:, :, None], k, STRIDE)
    scale_at = _scale_at(scales_ptr, w_row, BLOCKS, INT4, ROWS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    # 2. Its blocks, one after the other; those that there are not weigh nothing.
    on_x = gl.arange(0, LANES, gl.SliceLayout(1, gl.SliceLayout(2, X)))
    eight = gl.arange(0, NT, gl.SliceLayout(0, gl.SliceLayout(2, X)))[None, :] * 8
    row = gl.program_id(1) * BM + eight + (on_x % 32 // 4)[:, None]
    x_at = _x_at(x_ptr, gl.minimum(row, M - 1), C, X)
    y = gl.full([LANES, TILES, NT, 4], 0.0, gl.float32, SUMS)
    for b in gl.static_range(MINE):
        at = (lane // 32 * MINE + b)[:, None][:, :, None]
        scale = gl.load(
            scale_at + gl.minimum(at, BLOCKS - 1) * (N if INT4 else 1), mask=at < BLOCKS, other=0.0
        ).to(gl.float32)
        part = gl.full([LANES, TILES, NT, 4], 0.0, gl.float32, SUMS)
        for j in gl.static_range(PIECES):
            column = (on_x // 32 * MINE + b) * 128 + j * 64
            if C % 128 == 0:
                column = gl.minimum(column, C - 128 + j * 64)
            column += on_x % 4 * (8 if INT4 else 16)
            x = _load_x(x_at, column[:, None][:, :, None], C, INT4)
            async_copy.wait_group((MINE - b) * PIECES - 1 - j)
            w_above, w_below = above.index(b * PIECES + j), below.index(b * PIECES + j)
            part = _times(part, w_above.load(ROWS), w_below.load(ROWS), x, INT4)
        y = y + part * (scale * 512.0 if INT4 else scale)[:, :, None, :]
    # 3. Warps' sums, added in their order, each by one thread. Of 16 x 8 a lane has rows g and g + 8 of the
    # weight, of x rows 2 t and 2 t + 1.
    parts = gl.allocate_shared_memory(
        gl.float32, [LANES, TILES, NT, 4], gl.SwizzledSharedLayout(1, 1, 1, [0, 3, 2, 1])
    )
    parts.store(y)
    OUT: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, 1], [32, 1, 1, 1], [1, TILES, NT, WARPS // (TILES * NT)], [0, 1, 2, 3]
    )
    OF_LANE: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, OUT))
    OF_SUM: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, OUT))
    y = parts.slice(0, 32).load(OUT)
    for warp in gl.static_range(1, WARPS):
        y = y + parts.slice(warp * 32, 32).load(OUT)
    lane = gl.arange(0, 32, gl.SliceLayout(1, OF_LANE))[:, None][:, :, None][:, :, :, None]
    tile = gl.arange(0, TILES, gl.SliceLayout(0, OF_LANE))[None, :][:, :, None][:, :, :, None]
    eight = gl.arange(0, NT, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, OUT))))
    eight = eight[None, :][:, None, :][:, :, :, None]
    i = gl.arange(0, 4, gl.SliceLayout(0, OF_SUM))[None, :][:, None, :][:, :, None, :]
    row = gl.program_id(1) * BM + eight * 8 + lane % 4 * 2 + i % 2
    column = block * (16 * TILES) + tile * 16 + lane // 4 + i // 2 * 8
    gl.store(y_ptr + (row.to(gl.int64) * N + column), y.to(gl.bfloat16), mask=(row < M) & (column < N))


@gluon.jit(do_not_specialize=["M"])
def narrow_linears_kernel(
    x_ptr,
    w0_ptr,
    w1_ptr,
    w2_ptr,
    s0_ptr,
    s1_ptr,
    s2_ptr,
    y0_ptr,
    y1_ptr,
    y2_ptr,
    M,
    N0: gl.constexpr,
    N1: gl.constexpr,
    N2: gl.constexpr,
    C: gl.constexpr,
    BM: gl.constexpr,
    TILES: gl.constexpr,
    INT4: gl.constexpr,
    WARPS: gl.constexpr,
    PDL: gl.constexpr,
):
    """x (M, C) times each w (N, .) narrow, in 32 bits; none where N is 0."""
    block = gl.program_id(0)
    P0: gl.constexpr = (N0 + 16 * TILES - 1) // (16 * TILES)
    P1: gl.constexpr = (N1 + 16 * TILES - 1) // (16 * TILES)
    if block < P0:
        _tile(x_ptr, w0_ptr, s0_ptr, y0_ptr, block, M, N0, C, BM, TILES, INT4, WARPS, PDL)
    if N1:  # noqa: SIM102
        if (block >= P0) & (block < P0 + P1):
            _tile(x_ptr, w1_ptr, s1_ptr, y1_ptr, block - P0, M, N1, C, BM, TILES, INT4, WARPS, PDL)
    if N2:  # noqa: SIM102
        if block >= P0 + P1:
            _tile(x_ptr, w2_ptr, s2_ptr, y2_ptr, block - P0 - P1, M, N2, C, BM, TILES, INT4, WARPS, PDL)


@dataclass(frozen=True)
class Lanes:
    """Programs of `warps`, with `tiles` of 16 rows of the weights and `bm` of x."""

    bm: int
    tiles: int
    warps: int


def choose_lanes(rows: int, columns: int, depth: int, *, int4: bool) -> Lanes | None:
    """For weights of `columns` rows in all and `depth` columns; None if a program cannot hold its weights."""
    bm = 8 if rows <= 8 else 16 if rows <= 16 else 32
    tiles, warps = (1, 8) if columns <= 132 * 16 else (2, 8) if columns <= 132 * 32 else (1, 4)
    blocks = triton.cdiv(triton.cdiv(depth, 128), warps) * warps
    held = blocks * 16 * 128 // (2 if int4 else 1)
    if held > MOST_HELD:
        return None
    return Lanes(bm, tiles if tiles * held <= MOST_HELD else 1, warps)


def lanes_take(x_MC: Tensor, values: tuple[Tensor, ...]) -> bool:
    """Whether x and the weights are what the kernel reads: bfloat16, rows by 16 and of whole 16 bytes."""
    cuda = x_MC.is_cuda and torch.cuda.get_device_capability(x_MC.device)[0] in (9, 10)
    columns = 8 if values[0].dtype == torch.uint8 else 64
    whole = all(each.shape[0] % 16 == 0 and each.data_ptr() % 16 == 0 for each in values)
    return cuda and x_MC.dtype == torch.bfloat16 and x_MC.shape[1] % columns == 0 and whole


def narrow_linears(
    x_MC: Tensor, values: tuple[Tensor, ...], scales: tuple[Tensor, ...], lanes: Lanes
) -> tuple[Tensor, ...]:
    """x w^T of each, for M of at least 1."""
    (M, C), sizes = x_MC.shape, [each.shape[0] for each in values]
    outs = tuple(x_MC.new_empty(M, size) for size in sizes)
    words, spare = tuple(each.view(torch.int32) for each in values), MAX_WEIGHTS - len(values)
    n0, n1, n2 = *sizes, *(0,) * spare
    blocks = sum(triton.cdiv(size, 16 * lanes.tiles) for size in sizes)
    narrow_linears_kernel[(blocks, triton.cdiv(M, lanes.bm))](
        x_MC,
        *words,
        *words[:1] * spare,
        *scales,
        *scales[:1] * spare,
        *outs,
        *outs[:1] * spare,
        M,
        N0=n0,
        N1=n1,
        N2=n2,
        C=C,
        BM=lanes.bm,
        TILES=lanes.tiles,
        INT4=values[0].dtype == torch.uint8,
        WARPS=lanes.warps,
        PDL=True,
        launch_pdl=True,
        num_warps=lanes.warps,
    )
    return outs
