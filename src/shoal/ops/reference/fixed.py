"""Products, sums and exponentials in which a row's bits depend on that row alone.

Three facts make them so. Additions, multiplications, divisions and square roots of whole tensors are IEEE's,
one rounding an element. A sum is a tree whose shape follows from its length alone. A product is taken in
tiles of one number of rows, so that the library is only ever called with one shape; that it then treats
every row of a tile alike, and an exponential every element, depends on the shape and not on the values, and
is tried once for each shape before it is relied on. Where a product does not, every row is a call of its own.

Nothing here has a gradient (ops/invariance.py gives one). Shape letters: M rows, N columns, D summed over.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 32  # of a tile: one row costs as much as these, and a thousand little more than in one call
_ALIGNED = 64  # bytes: what the library may choose its loads by
_TRIALS = 4


def product(x: Tensor, weight_ND: Tensor) -> Tensor:
    """x W^T, of any leading shape of x."""
    columns, depth = weight_ND.shape
    if 1 not in weight_ND.stride():
        weight_ND = weight_ND.contiguous()
    x_MD = _align(x.reshape(-1, depth))
    rows = x_MD.shape[0]
    offset = weight_ND.data_ptr() % _ALIGNED
    threads = torch.get_num_threads()
    tile = _tile_rows(x.dtype, tuple(weight_ND.shape), weight_ND.stride(), offset, threads)
    if tile == 1:  # each into memory of its own: a row of a larger one may lie at any address
        weight_DN = weight_ND.t()
        parts = [torch.mm(_align(x_1D), weight_DN) for x_1D in x_MD.split(1)] if rows else []
        y_MN = torch.cat(parts) if parts else x.new_empty(0, columns)
        return y_MN.view(*x.shape[:-1], columns)
    whole = rows // tile * tile
    y_MN = x.new_empty(-(-rows // tile) * tile, columns)
    weight_DN = weight_ND.t()
    for start in range(0, whole, tile):
        torch.mm(_align(x_MD[start : start + tile]), weight_DN, out=y_MN[start : start + tile])
    if whole < rows:
        rest = F.pad(x_MD[whole:], (0, 0, 0, whole + tile - rows))
        torch.mm(rest, weight_DN, out=y_MN[whole:])
    return y_MN[:rows].view(*x.shape[:-1], columns)


def _align(x: Tensor) -> Tensor:
    if x.is_contiguous() and x.data_ptr() % _ALIGNED == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


@cache
def _tile_rows(
    dtype: torch.dtype, shape: tuple[int, int], strides: tuple[int, ...], offset: int, threads: int
) -> int:
    """ROWS, if a tile of equal rows comes out as equal rows for a weight so laid out; else 1.

    Of two orders of a sum of random numbers, all columns and trials agreeing is as good as impossible unless
    the orders are one.
    """
    random = torch.Generator().manual_seed(0)
    skip = offset // dtype.itemsize
    length = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    storage = torch.randn(skip + length, generator=random).to(dtype)
    weight_DN = storage.as_strided(shape, strides, skip).t()
    for _ in range(_TRIALS):
        x_MD = torch.randn(1, shape[1], generator=random).to(dtype).repeat(ROWS, 1)
        y_MN = torch.mm(x_MD, weight_DN)
        if not torch.equal(y_MN, y_MN[:1].expand_as(y_MN)):
            return 1
    return ROWS


def add_up(x: Tensor) -> Tensor:
    """The sum over the last dimension, by halves."""
    while (length := x.shape[-1]) > 1:
        half = length // 2
        pairs = x[..., :half] + x[..., half : 2 * half]
        x = torch.cat((pairs, x[..., 2 * half :]), -1) if length % 2 else pairs
    return x.squeeze(-1)


def exp(x: Tensor) -> Tensor:
    return _elementwise(torch.exp, x)


def log(x: Tensor) -> Tensor:
    return _elementwise(torch.log, x)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + exp(-x))


def softmax(x: Tensor) -> Tensor:
    weights = exp(x - x.amax(-1, keepdim=True))
    return weights / add_up(weights).unsqueeze(-1)


def logsumexp(x: Tensor) -> Tensor:
    most = x.amax(-1, keepdim=True)
    return log(add_up(exp(x - most))) + most.squeeze(-1)


def _elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    _check_elements(function, x.dtype)
    return function(x.contiguous())


@cache
def _check_elements(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """That a value has one image, in the vectors of a kernel and in what is left at its end."""
    values = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=dtype).abs()
    for length in (1, 37, 256):
        images = torch.stack([function(value.repeat(length)) for value in values])
        if not torch.equal(images, function(values).unsqueeze(1).expand_as(images)):
            raise ValueError(
                f"batch-invariant mode: {function.__name__} of this PyTorch depends on where an element "
                f"lies; use another build, or leave the mode off"
            )
