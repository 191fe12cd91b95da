"""Weights published as float8: e4m3 elements and one float32 scale for each block of rows and columns.

DeepSeek-V3, R1 and V3.1 are released so, in blocks of 128 x 128. The scale is stored beside the weight `w` as
`w_scale_inv`; despite the name it multiplies. Blocks at the right and lower edge may be ragged: the 576 rows
of `kv_a_proj_with_mqa` are four blocks and a half. Its one law: products are taken in float32 and rounded
once, by whoever stores them. Computing in float8 is left to the ops.

Shape letters: M rows, N columns, m and n the same counted in blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def scale_shape(shape: Sequence[int], block: tuple[int, int]) -> tuple[int, ...]:
    """Of the scales that belong to a weight of `shape` (..., M, N)."""
    *stack, rows, columns = shape
    return (*stack, math.ceil(rows / block[0]), math.ceil(columns / block[1]))


def dequantise(weight_MN: Tensor, scale_mn: Tensor, block: tuple[int, int]) -> Tensor:
    """Float32 (..., M, N): every element times the scale of its block. Leading dimensions stack matrices."""
    assert tuple(scale_mn.shape) == scale_shape(weight_MN.shape, block)
    out_MN = weight_MN.float()
    scale_Mn = scale_mn.repeat_interleave(block[0], dim=-2)[..., : out_MN.shape[-2], :]
    whole = out_MN.shape[-1] // block[1]
    edge = whole * block[1]
    out_MN[..., :edge].unflatten(-1, (whole, block[1])).mul_(scale_Mn[..., :whole, None])
    out_MN[..., edge:].mul_(scale_Mn[..., whole:])
    return out_MN
