"""A few rows of x times rows of a narrow weight, a lane reading what it multiplies: what `narrow_linears` and
`narrow_experts` are made of.

In Gluon, since all rests on which lane holds what. mma.sync (m16n8k16) takes 16 rows of the weight and 8 of
x; lane 4 g + t holds of rows g and g + 8 the same columns as of row g of x, and which columns those are is
free. So they are those that lie side by side: 16 bytes of a row of the weight, 128 columns of INT4 or 64 of
FP8 by four lanes (a piece), and of x runs of 8. Nothing is exchanged between lanes, nothing widened into
shared memory. A warp has blocks of columns of its own and asks for all its bytes at once, by cp.async: of 16
rows all columns, which lie together; then for scales and x, and waits. At the end the warps' sums are added,
in their order.

INT4: four in 16 bits are columns 32 apart; four bits at 0 or 4 of 16 are a subnormal bfloat16, of which one
fused multiply-add makes the number, less 8, times 2^-9. FP8: the 7 bits of a magnitude, four places lower in
16, are its bfloat16 times 2^-120, subnormal numbers too; four bytes take 4.5 instructions for two. A block of
128 columns is summed unscaled, and its scale meets the sum.

How a row is summed depends on the weights' shape and not on BM: so it does not depend on its batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

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
    return _each(w_ptr) + (start[:, :, None] + i[None, :][:, None, :])


@gluon.jit
def _each(ptr):
    if ptr.type.is_block():
        return ptr[:, :, None]
    else:
        return ptr


@gluon.jit
def _scale_at(scales_ptr, row, BLOCKS: gl.constexpr, INT4: gl.constexpr, ROWS: gl.constexpr):
    """Where the scales of block 0 of the rows `row` are: for INT4 that of each of a lane's four sums."""
    if INT4:
        i = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, ROWS)))
        return _each(scales_ptr) + (row[:, :, None] + i[None, :][:, None, :] // 2 * 8)
    else:
        return _each(scales_ptr) + (row // 128 * BLOCKS)[:, :, None]


@gluon.jit
def _ask(above, below, w_at, place, STRIDE: gl.constexpr):
    async_copy.async_copy_global_to_shared(above.index(place), w_at)
    async_copy.async_copy_global_to_shared(below.index(place), w_at + 8 * STRIDE)


@gluon.jit
def _places(COUNT: gl.constexpr, LANES: gl.constexpr, TILES: gl.constexpr):
    """A lane's 16 bytes beside its neighbour's."""
    PLACE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 0, 1])
    return gl.allocate_shared_memory(gl.int32, [COUNT, LANES, TILES, 4], PLACE)


@gluon.jit
def _load_piece(
    x_at, lane, k: gl.constexpr, C: gl.constexpr, INT4: gl.constexpr, FIRST: gl.constexpr, THEN: gl.constexpr
):  # fmt: skip
    """What a lane multiplies its piece k by."""
    PIECES: gl.constexpr = 1 if INT4 else 2
    column = (lane // 32 * FIRST + k // PIECES * THEN) * 128 + k % PIECES * 64
    if C % 128 == 0:
        column = gl.minimum(column, C - 128 + k % PIECES * 64)
    column += lane % 4 * (8 if INT4 else 16)
    return _load_x(x_at, column[:, None][:, :, None], C, INT4)


@gluon.jit
def sum_columns(
    x_ptr, row, w_ptr, scales_ptr, w_row, N: gl.constexpr, C: gl.constexpr,
    INT4: gl.constexpr, NT: gl.constexpr, TILES: gl.constexpr, WARPS: gl.constexpr, SUMS: gl.constexpr,
    ROUND: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The warps' sums (lanes, TILES, NT, 4), in shared memory: rows `w_row` (lanes, TILES) of a weight (N,
    C), and those 8 below, times the rows `row` (lanes, NT) of x. The weight and its scales are one or (lanes,
    TILES). Blocks of columns go round the warps, or each has its share of
    them in a row. With PDL what ran before is waited for when the weight was asked for.
    """
    LANES: gl.constexpr = 32 * WARPS
    ROWS: gl.constexpr = gl.SliceLayout(2, SUMS)
    X: gl.constexpr = gl.SliceLayout(1, SUMS)
    BLOCKS: gl.constexpr = (C + 127) // 128
    STRIDE: gl.constexpr = BLOCKS * 16 if INT4 else C // 4  # 32 bits a row
    PIECES: gl.constexpr = 1 if INT4 else 2  # of a block
    MINE: gl.constexpr = (BLOCKS + WARPS - 1) // WARPS  # blocks of a warp
    FIRST: gl.constexpr = 1 if ROUND else MINE
    THEN: gl.constexpr = WARPS if ROUND else 1
    # 1. What a lane has of the weight; of pieces that there are not, the last.
    lane = gl.arange(0, LANES, gl.SliceLayout(1, gl.SliceLayout(2, ROWS)))
    w_at = _w_at(w_ptr, w_row, lane, STRIDE, ROWS)
    above, below = _places(MINE * PIECES, LANES, TILES), _places(MINE * PIECES, LANES, TILES)
    for k in gl.static_range(MINE * PIECES):
        piece = (lane // 32 * FIRST + k // PIECES * THEN) * PIECES + k % PIECES
        piece = gl.minimum(piece, STRIDE // 16 - 1) * 16
        _ask(above, below, w_at + piece[:, None][:, :, None], k, STRIDE)
    async_copy.commit_group()
    # 2. Its scales; blocks that there are not weigh nothing.
    scale_at = _scale_at(scales_ptr, w_row, BLOCKS, INT4, ROWS)
    scales = ()
    for b in gl.static_range(MINE):
        at = (lane // 32 * FIRST + b * THEN)[:, None][:, :, None]
        place = gl.minimum(at, BLOCKS - 1) * (N if INT4 else 1)
        scales += (gl.load(scale_at + place, mask=at < BLOCKS, other=0.0),)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    # 3. Its blocks, one after the other, x a piece ahead. The barrier keeps loads before the wait.
    on_x = gl.arange(0, LANES, gl.SliceLayout(1, gl.SliceLayout(2, X)))
    x_at = _x_at(x_ptr, row, C, X)
    x = _load_piece(x_at, on_x, 0, C, INT4, FIRST, THEN)
    gl.thread_barrier()
    async_copy.wait_group(0)
    y = gl.full([LANES, TILES, NT, 4], 0.0, gl.float32, SUMS)
    for b in gl.static_range(MINE):
        part = gl.full([LANES, TILES, NT, 4], 0.0, gl.float32, SUMS)
        for j in gl.static_range(PIECES):
            then = _load_piece(x_at, on_x, min(b * PIECES + j + 1, MINE * PIECES - 1), C, INT4, FIRST, THEN)
            w_above, w_below = above.index(b * PIECES + j), below.index(b * PIECES + j)
            part = _times(part, w_above.load(ROWS), w_below.load(ROWS), x, INT4)
            x = then
        scale = scales[b].to(gl.float32)
        y = y + part * (scale * 512.0 if INT4 else scale)[:, :, None, :]
    sums = gl.allocate_shared_memory(
        gl.float32, [LANES, TILES, NT, 4], gl.SwizzledSharedLayout(1, 1, 1, [0, 3, 2, 1])
    )
    sums.store(y)
    return sums


@gluon.jit
def add_warps(sums, tile: gl.constexpr, WARPS: gl.constexpr, OUT: gl.constexpr):
    """Of one tile, each sum by one thread: (32, 1, NT, 4). Of 16 x 8 lane 4 g + t has rows g and g + 8 of the
    weight, of x rows 2 t and 2 t + 1."""
    y = sums.slice(0, 32).slice(tile, 1, 1).load(OUT)
    for warp in gl.static_range(1, WARPS):
        y = y + sums.slice(warp * 32, 32).slice(tile, 1, 1).load(OUT)
    return y


@gluon.jit
def places_of(NT: gl.constexpr, OUT: gl.constexpr):
    """Which row of x, and which of the weight's 16, a sum of `add_warps` is of."""
    OF_LANE: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, OUT))
    lane = gl.arange(0, 32, gl.SliceLayout(1, OF_LANE))[:, None][:, :, None][:, :, :, None]
    eight = gl.arange(0, NT, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, OUT))))
    eight = eight[None, :][:, None, :][:, :, :, None]
    i = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, OUT))))
    i = i[None, :][:, None, :][:, :, None, :]
    return eight * 8 + lane % 4 * 2 + i % 2, lane // 4 + i // 2 * 8


def lanes_take(x: Tensor, values: tuple[Tensor, ...], columns: int) -> bool:
    """Whether x and weights of so many columns are read: bfloat16, rows by 16 and of whole 16 bytes."""
    cuda = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
    by = 8 if values[0].dtype == torch.uint8 else 64
    whole = all(each.shape[-2] % 16 == 0 and each.data_ptr() % 16 == 0 for each in values)
    return cuda and x.dtype == torch.bfloat16 and columns % by == 0 and whole
