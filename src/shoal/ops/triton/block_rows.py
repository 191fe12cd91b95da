"""Rows of keys, values and queries, as the kernels of native sparse attention load and store them.

The heads of a group read the same keys, so they are the rows of a product; a key whose dim is no power of
two is two products wide, 192 = 128 + 64. What a call of these kernels must have is said once, here.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.ops.triton.attention import DTYPES, MAX_DIM


def dims(heads: int, groups: int, key: int, value: int, dtype: torch.dtype) -> dict[str, Any]:
    """A key's dims as one power of two and the rest, as in `attention`."""
    first = 1 << (key.bit_length() - 1)
    if first < 16:
        first = key
    return {
        "H": heads,
        "G": groups,
        "D1": first,
        "D2": key - first,
        "V": value,
        "B1": triton.next_power_of_2(max(first, 16)),
        "B2": triton.next_power_of_2(max(key - first, 16)),
        "BV": triton.next_power_of_2(max(value, 16)),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


@triton.jit
def load_rows(ptr, row, kept, stride, first: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """WIDTH elements from `first` of these rows, (rows, BLOCK), zeros elsewhere."""
    column = tl.arange(0, BLOCK)
    mask = kept[:, None]
    if WIDTH != BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(ptr + row.to(tl.int64)[:, None] * stride + first + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, row, kept, stride, x, first: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * stride + first + column[None, :]
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=kept[:, None] & (column < WIDTH)[None, :])


@triton.jit
def sequence_of(cu_ptr, token, S, S_PAD: tl.constexpr):
    index = tl.arange(0, S_PAD)
    ends = tl.load(cu_ptr + index + 1, mask=index < S, other=0x7FFFFFFF)
    return tl.sum((ends <= token).to(tl.int32), 0)


def head_refusal(q_THQ: Tensor, key: Tensor, groups: int, value_dim: int = 1) -> str | None:
    if q_THQ.dtype not in DTYPES or key.dtype != q_THQ.dtype:
        return f"q is {q_THQ.dtype} and keys {key.dtype}; both bfloat16, float16 or float32"
    if max(q_THQ.shape[2], value_dim) > MAX_DIM:
        return f"head dims {q_THQ.shape[2]} and {value_dim}; the kernels take at most {MAX_DIM}"
    if q_THQ.shape[1] % groups or q_THQ.shape[1] // groups > 64:
        return f"{q_THQ.shape[1]} query heads over {groups} key heads; they must divide, 64 at most to one"
    return None
