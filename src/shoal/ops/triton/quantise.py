"""Narrowing to e4m3 on a GPU: rows in 1 x 128, weights in 128 x 128, these also transposed.

    s = amax / 448, q = round(x / s)

A program takes 32 rows of one block of columns, or one block of a weight; the grid is all of them. The tensor
core multiplies e4m3 only where both operands lie along the reduction, so the products of a backward pass want
W^T as an array of its own: its values and scales are W's, another way round, and written in the same pass.

Bound: bytes. x in bfloat16 read once, q written once (twice with the transpose): 3 or 4 bytes an element.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.ops.triton.permutation import Groups

BLOCK = 128
FP8 = torch.float8_e4m3fn
ROWS = 32  # of a program


@triton.jit
def scale_of(amax):
    """s, and its inverse, as the reference rounds them."""
    scale = tl.math.div_rn(tl.maximum(amax, 7.888609052210118e-31), 448.0)  # 2^-100
    return scale, tl.math.div_rn(1.0, scale)


@triton.jit
def to_e4m3(x, ROUND: tl.constexpr):
    """Rounded to nearest even. A GPU does so by itself; Triton's interpreter loses the carry of 127 to 128,
    so there (ROUND) it is given numbers that e4m3 holds: 4 bits, or multiples of 2^-9 below 2^-6.
    """
    if ROUND:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        x = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, bits.to(tl.float32, bitcast=True))
    return x.to(tl.float8e4nv)


@triton.jit(do_not_specialize=["rows"])
def _rows_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    tiles_ptr,
    rows,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    ROUND: tl.constexpr,
):
    """With TILE only the first `tiles` times TILE rows are there."""
    if TILE:
        rows = tl.load(tiles_ptr) * TILE
    block: tl.constexpr = (K + 127) // 128
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * 128 + tl.arange(0, 128)
    at = row[:, None] * K + column[None, :]
    inside = (row < rows)[:, None] & (column < K)[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale, inverse = scale_of(tl.max(tl.abs(x), 1))
    tl.store(values_ptr + at, to_e4m3(x * inverse[:, None], ROUND), mask=inside)
    tl.store(scales_ptr + row * block + tl.program_id(1), scale, mask=row < rows)


def quantise_rows(x: Tensor, groups: Groups | None = None) -> tuple[Tensor, Tensor]:
    """Of rows in slots, those past the last tile are left alone: nobody wrote them."""
    x = x.contiguous()
    *shape, K = x.shape
    values = torch.empty(x.shape, dtype=FP8, device=x.device)
    scales = torch.empty(*shape, triton.cdiv(K, BLOCK), dtype=torch.float32, device=x.device)
    rows = x.numel() // max(1, K)
    if rows:
        grid = (triton.cdiv(rows, ROWS), scales.shape[-1])
        tiles = None if groups is None else groups.first_tile_E1[-1:]
        tile = 0 if groups is None else groups.tile
        _rows_kernel[grid](x, values, scales, tiles, rows, K=K, ROWS=ROWS, TILE=tile, ROUND=not x.is_cuda)
    return values, scales


@triton.jit
def _blocks_kernel(
    w_ptr,
    values_ptr,
    scales_ptr,
    values_t_ptr,
    scales_t_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    WRITE: tl.constexpr,
    WRITE_T: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Block (program 0 of n k, matrix program 1): as it lies if WRITE, and its transpose if WRITE_T."""
    across: tl.constexpr = (K + 127) // 128
    down: tl.constexpr = (N + 127) // 128
    n, k = tl.program_id(0) // across, tl.program_id(0) % across
    matrix = tl.program_id(1).to(tl.int64)
    row, column = n * 128 + tl.arange(0, 128), k * 128 + tl.arange(0, 128)
    at = matrix * N * K + row.to(tl.int64)[:, None] * K + column[None, :]
    inside = (row < N)[:, None] & (column < K)[None, :]
    w = tl.load(w_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale, inverse = scale_of(tl.max(tl.max(tl.abs(w), 1), 0))
    values = to_e4m3(w * inverse, ROUND)
    if WRITE:
        tl.store(values_ptr + at, values, mask=inside)
        tl.store(scales_ptr + (matrix * down + n) * across + k, scale)
    if WRITE_T:
        at = matrix * N * K + column.to(tl.int64)[:, None] * N + row[None, :]
        tl.store(values_t_ptr + at, tl.trans(values), mask=(column < K)[:, None] & (row < N)[None, :])
        tl.store(scales_t_ptr + (matrix * across + k) * down + n, scale)


def _blocks(weight: Tensor, write: bool, write_t: bool) -> tuple[Tensor | None, ...]:
    weight = weight.contiguous()
    *stack, N, K = weight.shape
    down, across = triton.cdiv(N, BLOCK), triton.cdiv(K, BLOCK)
    as_it_lies = transposed = (None, None)
    where = {"device": weight.device}
    if write:
        as_it_lies = (
            torch.empty(weight.shape, dtype=FP8, **where),
            torch.empty(*stack, down, across, dtype=torch.float32, **where),
        )
    if write_t:
        transposed = (
            torch.empty(*stack, K, N, dtype=FP8, **where),
            torch.empty(*stack, across, down, dtype=torch.float32, **where),
        )
    matrices = weight.numel() // max(1, N * K)
    if weight.numel():
        _blocks_kernel[(down * across, matrices)](
            weight,
            *as_it_lies,
            *transposed,
            N=N,
            K=K,
            WRITE=write,
            WRITE_T=write_t,
            ROUND=not weight.is_cuda,
            num_warps=8,
        )
    return *as_it_lies, *transposed


def quantise_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    return _blocks(weight, True, False)[:2]


def quantise_transposed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values (..., K, N) and scales (..., k, n) of the transpose."""
    return _blocks(weight, False, True)[2:]


def lacks_e4m3(x: Tensor) -> str | None:
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        return "this GPU knows no e4m3; the kernels want compute capability 8.9"
    return None


def quantise_refusal(x: Tensor) -> str | None:
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the tensor is {x.dtype}; the kernels read bfloat16, float16 and float32"
    return lacks_e4m3(x)
