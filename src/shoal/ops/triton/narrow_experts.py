"""Experts of very few rows with narrow weights: `narrow_lanes` by tiles of 8 rows of x.

    h = silu(g) u, [g u]^T = [gate up]_e x_t^T
    y^T = w_e h^T

A program multiplies 16 rows of gate and of up, or some sixteens of the product's, by all their columns, and
asks for them at once: of memory that lies together. Nothing but that is waited for long: scales and the first
of x are asked for before.

Bound: bytes, 1.002 a weight in FP8 and 0.516 in INT4, of 4.555 TB/s on an H200.
"""

from __future__ import annotations

import triton
from torch import Tensor, int32, uint8
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoal.ops.triton.narrow_lanes import add_warps, places_of, sum_columns
from shoal.ops.triton.permutation import Groups

TILE = 8  # rows of x


@gluon.jit
def narrow_experts_kernel(
    x_ptr,
    w_ptr,
    scales_ptr,
    y_ptr,
    choices_ptr,
    tile_experts_ptr,
    first_tile_ptr,
    E: gl.constexpr,
    K: gl.constexpr,
    C: gl.constexpr,
    N: gl.constexpr,
    TILES: gl.constexpr,
    SWIGLU: gl.constexpr,
    INT4: gl.constexpr,
    WARPS: gl.constexpr,
):
    """SWIGLU: h by slot of x (T, C), w (E, 2, N, .), half of a program's tiles gate's, half up's. Else y by
    choice of h by slot, w (E, N, .). Program 0 is one of rows of the weight, program 1 a tile of slots.
    """
    SUMS: gl.constexpr = gl.BlockedLayout([1, TILES, 1, 4], [32, 1, 1, 1], [WARPS, 1, 1, 1], [3, 2, 1, 0])
    OUT: gl.constexpr = gl.BlockedLayout([1, 1, 1, 1], [32, 1, 1, 1], [1, 1, 1, WARPS], [0, 1, 2, 3])
    ROWS: gl.constexpr = gl.SliceLayout(2, SUMS)
    X: gl.constexpr = gl.SliceLayout(1, SUMS)
    STRIDE: gl.constexpr = C // 8 if INT4 else C // 4
    SCALES: gl.constexpr = C // 128 * (N if INT4 else (N + 127) // 128)  # a matrix
    HALF: gl.constexpr = TILES // 2 if SWIGLU else TILES
    if SWIGLU:
        gdc_wait()
        gdc_launch_dependents()
    # What the kernel before last wrote: a product reads it, and asks for its weight, while h is being made.
    # All of it at once, so what is read of a tile that there is not counts for nothing.
    slots = gl.program_id(1) * 8
    expert = gl.load(tile_experts_ptr + gl.program_id(1)).to(gl.int64)
    one = gl.load(choices_ptr + slots)  # a tile's first slot is never empty
    if (gl.program_id(1) < gl.load(first_tile_ptr + E)) & (expert >= 0) & (one >= 0):
        on_x = gl.arange(0, 32 * WARPS, gl.SliceLayout(1, gl.SliceLayout(2, X)))
        row = slots + (on_x % 32 // 4)[:, None]
        lane = gl.arange(0, 32 * WARPS, gl.SliceLayout(1, gl.SliceLayout(2, ROWS)))
        tile = gl.arange(0, TILES, gl.SliceLayout(0, gl.SliceLayout(2, ROWS)))[None, :]
        first = gl.program_id(0) * (16 * HALF)
        w_row = gl.minimum(first + tile % HALF * 16, N - 16) + (lane % 32 // 4)[:, None]
        if SWIGLU:  # an empty slot's row is that of the first
            choice = gl.load(choices_ptr + row)
            row = gl.where(choice >= 0, choice, one) // K
            w, scales = w_ptr + expert * (2 * N * STRIDE), scales_ptr + expert * (2 * SCALES)
            gates = w_row * 0 + tile < HALF
            w, scales = gl.where(gates, w, w + N * STRIDE), gl.where(gates, scales, scales + SCALES)
        else:
            w, scales = w_ptr + expert * (N * STRIDE), scales_ptr + expert * SCALES
        sums = sum_columns(x_ptr, row, w, scales, w_row, N, C, INT4, 1, TILES, WARPS, SUMS, True, not SWIGLU)
        to, column = places_of(1, OUT)
        to, column = to + slots, column + first
        choice = gl.load(choices_ptr + to)
        if not SWIGLU:
            to = choice
        for t in gl.static_range(HALF):
            y = add_warps(sums, t, WARPS, OUT).to(gl.bfloat16)
            if SWIGLU:
                gate = y.to(gl.float32)
                up = add_warps(sums, t + HALF, WARPS, OUT).to(gl.bfloat16).to(gl.float32)
                y = (gate / (1.0 + gl.exp(-gate)) * up).to(gl.bfloat16)
            at = to.to(gl.int64) * N + column + t * 16
            gl.store(y_ptr + at, y, mask=(choice >= 0) & (column + t * 16 < N))
    elif not SWIGLU:
        gdc_wait()


def narrow_experts(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    y: Tensor,
    groups: Groups,
    choices: int,
    *,
    tiles: int,
    warps: int,
) -> None:
    """Into y: h by slot of values (E, 2, N, .), or the product with (E, N, .) by choice; groups by `TILE`."""
    swiglu, N = values.dim() == 4, values.shape[-2]
    narrow_experts_kernel[(triton.cdiv(N, (8 if swiglu else 16) * tiles), groups.max_tiles)](
        x,
        values.view(int32),
        scales,
        y,
        groups.choices_P,
        groups.experts_N,
        groups.first_tile_E1,
        E=values.shape[0],
        K=choices,
        C=x.shape[-1],
        N=N,
        TILES=tiles,
        SWIGLU=swiglu,
        INT4=values.dtype == uint8,
        WARPS=warps,
        launch_pdl=True,
        num_warps=warps,
    )
