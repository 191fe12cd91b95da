"""Narrowing to e4m3 on a GPU: rows in 1 x 128, weights in 128 x 128, these also transposed.

    s = amax / 448, q = round(x / s)

A program takes some rows of one block of columns, or one block of a weight, which it holds in registers as it
came: widened for its largest element it would spill (float32 is 255 of them, and 188 to 504 bytes). The grid
is all of them. The tensor core multiplies e4m3 only where both operands lie along the reduction, so the
products of a backward pass want W^T as an array of its own: its values and scales are W's, another way round,
and written in the same pass. Several weights of the same columns are quantised as one, each from a row of
blocks of its own on; so are several gradients, as the rows of one matrix.

Bound: bytes. x in bfloat16 read once, q written once (twice with the transpose): 3 or 4 bytes an element. On
an H200 (2026-11-29) rows reach 3.3 TB/s, 64 matrices of 2816 x 2048 4.1, by 4, 8 or 16 warps a block.
Gradients that a kernel makes anyway are narrowed there (`store_narrow`), for the byte that is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128
FP8 = torch.float8_e4m3fn
ROWS = 16  # of a program
WARPS = 4


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
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    ALL: tl.constexpr,
    ROWS: tl.constexpr,
    TALL: tl.constexpr,
    ROUND: tl.constexpr,
):
    """K columns, and zeros up to WIDTH, of the ALL that a row has where they go. TALL: the scales of a block
    of columns lie together.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * 128 + tl.arange(0, 128)
    there = (row < rows)[:, None]
    x = tl.load(
        x_ptr + row[:, None] * STRIDE + column[None, :], mask=there & (column < K)[None, :], other=0.0
    )
    x = x.to(tl.float32)
    scale, inverse = scale_of(tl.max(tl.abs(x), 1))
    at = row[:, None] * ALL + column[None, :]
    tl.store(values_ptr + at, to_e4m3(x * inverse[:, None], ROUND), mask=there & (column < WIDTH)[None, :])
    blocks: tl.constexpr = (ALL + 127) // 128
    at = tl.program_id(1).to(tl.int64) * rows + row if TALL else row * blocks + tl.program_id(1)
    tl.store(scales_ptr + at, scale, mask=row < rows)


def _narrow_rows(x_MK: Tensor, values: Tensor, scales: Tensor, first: int, width: int, tall: bool) -> None:
    """Rows into columns `first` to `first + width` of `values` (M, ALL); scales lie (k, M) if `tall`."""
    rows, K = x_MK.shape
    block = first // BLOCK
    _rows_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(width, BLOCK))](
        x_MK,
        values[:, first:],
        scales[block:] if tall else scales[:, block:],
        rows,
        STRIDE=x_MK.stride(0),
        K=K,
        WIDTH=width,
        ALL=values.shape[1],
        ROWS=ROWS,
        TALL=tall,
        ROUND=not x_MK.is_cuda,
        num_warps=WARPS,
    )


def quantise_rows(x: Tensor, *, tall: bool = False) -> tuple[Tensor, Tensor]:
    """`tall`, of a matrix: scales (M, k) whose first dimension lies dense, as cuBLAS wants them."""
    *shape, K = x.shape
    rows, blocks = x.numel() // max(1, K), triton.cdiv(K, BLOCK)
    values = torch.empty(x.shape, dtype=FP8, device=x.device)
    scales = torch.empty((blocks, rows) if tall else (*shape, blocks), dtype=torch.float32, device=x.device)
    if rows:
        flat = scales if tall else scales.view(rows, blocks)
        _narrow_rows(x.contiguous().view(rows, K), values.view(rows, K), flat, 0, K, tall)
    return values, scales.mT if tall else scales


def quantise_side_by_side(parts: Sequence[Tensor], *, tall: bool = False) -> tuple[Tensor, Tensor]:
    """Matrices (M, K_i) as the rows of one, each from a block of its own on, zeros between."""
    rows, device = parts[0].shape[0], parts[0].device
    *firsts, width = places(part.shape[1] for part in parts)
    values = torch.empty(rows, width, dtype=FP8, device=device)
    shape = (width // BLOCK, rows) if tall else (rows, width // BLOCK)
    scales = torch.empty(shape, dtype=torch.float32, device=device)
    for part, (first, end) in zip(parts, pairwise((*firsts, width)), strict=True):
        part = part if part.stride(1) == 1 else part.contiguous()
        _narrow_rows(part, values, scales, first, end - first, tall)
    return values, scales.mT if tall else scales


def places(sizes: Iterable[int]) -> list[int]:
    """Where each of several begins, and last where they end, if each begins at a block."""
    return [0, *accumulate(triton.cdiv(size, BLOCK) * BLOCK for size in sizes)]


@triton.jit
def _blocks_kernel(
    w_ptr,
    values_ptr,
    scales_ptr,
    values_t_ptr,
    scales_t_ptr,
    STRIDE: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    ALL: tl.constexpr,
    WRITE: tl.constexpr,
    WRITE_T: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Block (program 0 of n k, matrix program 1): as it lies if WRITE, and its transpose if WRITE_T. N rows,
    and zeros up to WIDTH, of the ALL that a matrix has where they go."""
    across: tl.constexpr = (K + 127) // 128
    down: tl.constexpr = (ALL + 127) // 128
    n, k = tl.program_id(0) // across, tl.program_id(0) % across
    matrix = tl.program_id(1).to(tl.int64)
    row, column = n * 128 + tl.arange(0, 128), k * 128 + tl.arange(0, 128)
    inside = (row < N)[:, None] & (column < K)[None, :]
    w = tl.load(w_ptr + matrix * STRIDE + row[:, None] * K + column[None, :], mask=inside, other=0.0)
    # Not widened before: the reduction does it, and a float32 copy would be held beside.
    scale, inverse = scale_of(tl.max(tl.max(tl.abs(w), 1), 0).to(tl.float32))
    values = to_e4m3(w.to(tl.float32) * inverse, ROUND)
    kept = (row < WIDTH)[:, None] & (column < K)[None, :]
    if WRITE:
        tl.store(values_ptr + matrix * ALL * K + row[:, None] * K + column[None, :], values, mask=kept)
        tl.store(scales_ptr + (matrix * down + n) * across + k, scale)
    if WRITE_T:
        at = matrix * ALL * K + column[:, None] * ALL + row[None, :]
        tl.store(values_t_ptr + at, tl.trans(values), mask=tl.trans(kept))
        tl.store(scales_t_ptr + (matrix * across + k) * down + n, scale)


def _blocks(parts: Sequence[Tensor], write: bool, write_t: bool) -> tuple[Tensor | None, ...]:
    """Of a weight, which keeps its size, or of several (..., N_i, K) as one."""
    *stack, N, K = parts[0].shape
    ends = [0, N] if len(parts) == 1 else places(part.shape[-2] for part in parts)
    ALL, where = ends[-1], {"device": parts[0].device}
    down, across = triton.cdiv(ALL, BLOCK), triton.cdiv(K, BLOCK)
    as_it_lies = transposed = (None, None)
    if write:
        as_it_lies = (
            torch.empty(*stack, ALL, K, dtype=FP8, **where),
            torch.empty(*stack, down, across, dtype=torch.float32, **where),
        )
    if write_t:
        transposed = (
            torch.empty(*stack, K, ALL, dtype=FP8, **where),
            torch.empty(*stack, across, down, dtype=torch.float32, **where),
        )
    for part, (first, end) in zip(parts, pairwise(ends), strict=True):
        if not part.numel():
            continue
        part = part if part.stride()[-2:] == (K, 1) else part.contiguous()
        matrices = part.flatten(0, -3) if stack else part.unsqueeze(0)
        _blocks_kernel[(triton.cdiv(part.shape[-2], BLOCK) * across, len(matrices))](
            matrices,
            *(None if t is None else t[..., first:, :] for t in as_it_lies[:1]),
            *(None if t is None else t[..., first // BLOCK :, :] for t in as_it_lies[1:]),
            *(None if t is None else t[..., first:] for t in transposed[:1]),
            *(None if t is None else t[..., first // BLOCK :] for t in transposed[1:]),
            STRIDE=matrices.stride(0),
            N=part.shape[-2],
            K=K,
            WIDTH=end - first,
            ALL=ALL,
            WRITE=write,
            WRITE_T=write_t,
            ROUND=not part.is_cuda,
            num_warps=WARPS,
        )
    return *as_it_lies, *transposed


def quantise_blocks(*weights: Tensor) -> tuple[Tensor, Tensor]:
    """Several weights (..., N_i, K) as one, each from a block of its own on, zeros between."""
    return _blocks(weights, True, False)[:2]


def quantise_transposed(*weights: Tensor) -> tuple[Tensor, Tensor]:
    """Values (..., K, N) and scales (..., k, n) of the transpose."""
    return _blocks(weights, False, True)[2:]


def quantise_both(*weights: Tensor) -> tuple[Tensor, ...]:
    """Values and scales as the weight lies, then those of its transpose, in one reading."""
    return _blocks(weights, True, True)


def lacks_e4m3(x: Tensor) -> str | None:
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        return "this GPU knows no e4m3; the kernels want compute capability 8.9"
    return None


def quantise_refusal(x: Tensor, *_: Tensor) -> str | None:
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the tensor is {x.dtype}; the kernels read bfloat16, float16 and float32"
    return lacks_e4m3(x)
