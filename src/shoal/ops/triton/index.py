"""Queries and keys of the lightning indexer in FP8: turned, scaled, rounded, keys written to the cache.

    y = I^-1/2 x H      H_ij = (-1)^popcount(i & j), I a power of two up to 128
    s = 2^ceil(log2(max |y| / 448)),   q = round(y / s)

A program is some rows; the rotation is one product with a matrix of signs that it makes itself, exact in any
dtype, summed in float32. With slots the rows of a pack go to their places in the cache.

Bound: launches when decoding, bytes for prompts: 2 read and 1 written an element.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.ops.triton.launch import programmatic, wait_for_previous
from shoal.ops.triton.quantise import FP8, lacks_e4m3, to_e4m3

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _narrow_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    slots_ptr,
    rows,
    root,  # I^-1/2
    W: tl.constexpr,
    BW: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    ROUND: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column, other = tl.arange(0, BW), tl.arange(0, BW)
    inside = (row < rows)[:, None] & (column < W)[None, :]
    x = tl.load(x_ptr + row[:, None] * W + column[None, :], mask=inside, other=0.0)
    common = column[:, None] & other[None, :]
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    signs = (1 - 2 * (common & 1)).to(x.dtype)
    turned = tl.dot(x, signs, input_precision="ieee") * root
    turned = tl.where(inside, turned, 0.0)
    bits = tl.maximum(tl.max(tl.abs(turned), 1), 1e-4).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    to = tl.load(slots_ptr + row, mask=row < rows, other=0).to(tl.int64) if SLOTS else row
    values = to_e4m3(turned * inverse[:, None], ROUND)
    tl.store(values_ptr + to[:, None] * W + column[None, :], values, mask=inside)
    tl.store(scales_ptr + to, scale, mask=row < rows)


def _narrow(x: Tensor, values: Tensor, scales: Tensor, slots_T: Tensor | None) -> None:
    x, width = x.contiguous(), x.shape[-1]
    rows = x.numel() // width
    if rows:
        tile, pdl = 32 if rows > 32 else 16, programmatic(x.device)
        _narrow_kernel[(triton.cdiv(rows, tile),)](
            x, values, scales, slots_T, rows, width**-0.5, W=width, BW=max(16, width), ROWS=tile,
            SLOTS=slots_T is not None, ROUND=not x.is_cuda, PDL=pdl, launch_pdl=pdl,
        )  # fmt: skip


def narrow_index_refusal(x: Tensor) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    if x.dtype not in DTYPES:
        return f"the tensor is {x.dtype}; the kernel reads bfloat16, float16 and float32"
    return lacks_e4m3(x)


@torch.no_grad()
def narrow_index(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `ops.quantised.narrow_index` says."""
    values = torch.empty(x.shape, dtype=FP8, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    _narrow(x, values, scales, None)
    return values, scales


def write_index_keys_refusal(values: Tensor, scales: Tensor, slots_T: Tensor, k_TI: Tensor) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    if not (values.is_contiguous() and scales.is_contiguous()):
        return "the pages are no rows of one stride; the kernel does not copy a cache"
    return narrow_index_refusal(k_TI)


@torch.no_grad()
def write_index_keys(values: Tensor, scales: Tensor, slots_T: Tensor, k_TI: Tensor, *_: Any) -> None:
    """As `ops.quantised.write_index_keys` says."""
    _narrow(k_TI, values, scales, slots_T)
