"""Products of a few rows with one to three narrow weights, one launch: `narrow_lanes`.

    y_i = x w_i^T    for each i

A linear of few rows is over in a few microseconds, so what counts is instructions of a warp, one after the
other, and nothing may wait: the weights are asked for before the kernel before has ended.

Bound: bytes, 1.002 a weight in FP8 and 0.516 in INT4, of 4.555 TB/s on an H200, there (2026-11-29) 0.5 to
2.5 us; at 32 rows V2-Lite's linears take 3.7 to 7.9, bfloat16's 6.8 to 11.6.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor, int32, uint8
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from shoal.ops.triton.narrow_lanes import add_warps, places_of, sum_columns

MAX_WEIGHTS = 3
MOST_HELD = 196_608  # bytes of shared memory


@gluon.jit
def _tile(
    x_ptr, w_ptr, scales_ptr, y_ptr, block, M, N: gl.constexpr, C: gl.constexpr, BM: gl.constexpr,
    TILES: gl.constexpr, INT4: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """16 TILES rows of the weight times BM of x, each warp of its own columns."""
    NT: gl.constexpr = BM // 8
    SUMS: gl.constexpr = gl.BlockedLayout([1, TILES, NT, 4], [32, 1, 1, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    ROWS: gl.constexpr = gl.SliceLayout(2, SUMS)
    X: gl.constexpr = gl.SliceLayout(1, SUMS)
    first = block * (16 * TILES)
    lane = gl.arange(0, 32 * WARPS, gl.SliceLayout(1, gl.SliceLayout(2, ROWS)))
    tile = gl.arange(0, TILES, gl.SliceLayout(0, gl.SliceLayout(2, ROWS)))
    w_row = gl.minimum(first + tile * 16, N - 16)[None, :] + (lane % 32 // 4)[:, None]
    on_x = gl.arange(0, 32 * WARPS, gl.SliceLayout(1, gl.SliceLayout(2, X)))
    eight = gl.arange(0, NT, gl.SliceLayout(0, gl.SliceLayout(2, X)))[None, :] * 8
    row = gl.minimum(gl.program_id(1) * BM + eight + (on_x % 32 // 4)[:, None], M - 1)
    sums = sum_columns(x_ptr, row, w_ptr, scales_ptr, w_row, N, C, INT4, NT, TILES, WARPS, SUMS, False, PDL)
    OUT: gl.constexpr = gl.BlockedLayout([1, 1, 1, 1], [32, 1, 1, 1], [1, 1, NT, WARPS // NT], [0, 1, 2, 3])
    row, column = places_of(NT, OUT)
    row, column = row + gl.program_id(1) * BM, column + first
    for t in gl.static_range(TILES):
        y = add_warps(sums, t, WARPS, OUT).to(gl.bfloat16)
        at = row.to(gl.int64) * N + column + t * 16
        gl.store(y_ptr + at, y, mask=(row < M) & (column + t * 16 < N))


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


def narrow_linears(
    x_MC: Tensor, values: tuple[Tensor, ...], scales: tuple[Tensor, ...], lanes: Lanes
) -> tuple[Tensor, ...]:
    """x w^T of each, for M of at least 1."""
    (M, C), sizes = x_MC.shape, [each.shape[0] for each in values]
    outs = tuple(x_MC.new_empty(M, size) for size in sizes)
    words, spare = tuple(each.view(int32) for each in values), MAX_WEIGHTS - len(values)
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
        INT4=values[0].dtype == uint8,
        WARPS=lanes.warps,
        PDL=True,
        launch_pdl=True,
        num_warps=lanes.warps,
    )
    return outs
