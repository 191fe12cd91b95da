"""Narrowing to e4m3 on a GPU: rows in 1 x 128, weights in 128 x 128, these also transposed.

    s = amax / 448, q = round(x / s)

A program takes some rows of one block of columns, or one block of a weight, which it reads twice, the second
time from L1: held in registers it spilled (255 of them, and 188 to 504 bytes). The grid is all of them. The
tensor core multiplies e4m3 only where both operands lie along the reduction, so the products of a backward
pass want W^T as an array of its own: its values and scales are W's, another way round, and written in the
same pass.

Bound: bytes. x in bfloat16 read once, q written once (twice with the transpose): 3 or 4 bytes an element. On
an H200 (2026-11-29) rows reach 3.4 TB/s; 64 matrices of 2816 x 2048 in slices of 64 rows 2.9, both ways 2.6.
Gradients that a kernel makes anyway are narrowed there (`store_narrow`), for the byte that is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
FP8 = torch.float8_e4m3fn
ROWS, SLICE, WARPS = 16, 64, 4  # rows of a program; rows of a weight's block at a time; warps of either


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


@triton.jit
def store_narrow(
    x, values_ptr, scales_ptr, first, count: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr
):
    """BLOCK elements of a row from `first` on, as e4m3 and a scale for each 128: those below `count` alone.
    Both pointers are the row's; BLOCK and count are multiples of 128."""
    blocks: tl.constexpr = BLOCK // 128
    x = tl.reshape(x.to(tl.float32), (blocks, 128))
    scale, inverse = scale_of(tl.max(tl.abs(x), 1))
    block = first // 128 + tl.arange(0, blocks)
    at = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    tl.store(values_ptr + at, to_e4m3(x * inverse[:, None], ROUND), mask=at < count)
    tl.store(scales_ptr + block, scale, mask=block < count // 128)


@triton.jit(do_not_specialize=["rows"])
def _rows_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    rows,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TALL: tl.constexpr,
    ROUND: tl.constexpr,
):
    """TALL: the scales of a block of columns lie together."""
    block: tl.constexpr = (K + 127) // 128
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * 128 + tl.arange(0, 128)
    at = row[:, None] * K + column[None, :]
    inside = (row < rows)[:, None] & (column < K)[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale, inverse = scale_of(tl.max(tl.abs(x), 1))
    tl.store(values_ptr + at, to_e4m3(x * inverse[:, None], ROUND), mask=inside)
    at = tl.program_id(1).to(tl.int64) * rows + row if TALL else row * block + tl.program_id(1)
    tl.store(scales_ptr + at, scale, mask=row < rows)


def quantise_rows(x: Tensor, *, tall: bool = False) -> tuple[Tensor, Tensor]:
    """`tall`, of a matrix: scales (M, k) whose first dimension lies dense, as cuBLAS wants them."""
    x = x.contiguous()
    *shape, K = x.shape
    rows, blocks = x.numel() // max(1, K), triton.cdiv(K, BLOCK)
    values = torch.empty(x.shape, dtype=FP8, device=x.device)
    scales = torch.empty((blocks, rows) if tall else (*shape, blocks), dtype=torch.float32, device=x.device)
    if rows:
        grid = (triton.cdiv(rows, ROWS), blocks)
        _rows_kernel[grid](
            x, values, scales, rows, K=K, ROWS=ROWS, TALL=tall, ROUND=not x.is_cuda, num_warps=WARPS
        )
    return values, scales.mT if tall else scales


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
    SLICE: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Block (program 0 of n k, matrix program 1): as it lies if WRITE, and its transpose if WRITE_T."""
    across: tl.constexpr = (K + 127) // 128
    down: tl.constexpr = (N + 127) // 128
    n, k = tl.program_id(0) // across, tl.program_id(0) % across
    matrix = tl.program_id(1).to(tl.int64)
    w_ptr += matrix * N * K
    column = k * 128 + tl.arange(0, 128)
    most = tl.zeros((128,), tl.float32)
    for first in tl.static_range(0, 128, SLICE):
        row = n * 128 + first + tl.arange(0, SLICE)
        inside = (row < N)[:, None] & (column < K)[None, :]
        w = tl.load(w_ptr + row[:, None] * K + column[None, :], mask=inside, other=0.0)
        most = tl.maximum(most, tl.max(tl.abs(w.to(tl.float32)), 0))
    scale, inverse = scale_of(tl.max(most, 0))
    for first in tl.static_range(0, 128, SLICE):
        row = n * 128 + first + tl.arange(0, SLICE)
        inside = (row < N)[:, None] & (column < K)[None, :]
        w = tl.load(w_ptr + row[:, None] * K + column[None, :], mask=inside, other=0.0)
        values = to_e4m3(w.to(tl.float32) * inverse, ROUND)
        if WRITE:
            at = matrix * N * K + row[:, None] * K + column[None, :]
            tl.store(values_ptr + at, values, mask=inside)
        if WRITE_T:
            at = matrix * N * K + column[:, None] * N + row[None, :]
            tl.store(values_t_ptr + at, tl.trans(values), mask=(column < K)[:, None] & (row < N)[None, :])
    if WRITE:
        tl.store(scales_ptr + (matrix * down + n) * across + k, scale)
    if WRITE_T:
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
            SLICE=SLICE,
            ROUND=not weight.is_cuda,
            num_warps=WARPS,
        )
    return *as_it_lies, *transposed


def quantise_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    return _blocks(weight, True, False)[:2]


def quantise_transposed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values (..., K, N) and scales (..., k, n) of the transpose."""
    return _blocks(weight, False, True)[2:]


def quantise_both(weight: Tensor) -> tuple[Tensor, ...]:
    """Values and scales as the weight lies, then those of its transpose, in one reading."""
    return _blocks(weight, True, True)


def lacks_e4m3(x: Tensor) -> str | None:
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        return "this GPU knows no e4m3; the kernels want compute capability 8.9"
    return None


def quantise_refusal(x: Tensor) -> str | None:
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the tensor is {x.dtype}; the kernels read bfloat16, float16 and float32"
    return lacks_e4m3(x)
