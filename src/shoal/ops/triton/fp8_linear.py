"""Linears in FP8 on a GPU: who multiplies, and what the backward pass keeps.

    y = rows(x) blocks(W)^T,  dx = rows(dy) blocks(W)     "cublas", or "ours" (`fp8`)
    dW = dy^T x                                           cuBLAS, of the numbers as they came

Linears of the same rows are one product: x is quantised once, their weights lie one below the other, each
from a block of its own on, and dx is one sum, where each alone would give a part to be added. So a matrix of
576 rows beside one of 3072 is whole blocks, too.

cuBLAS has DeepSeek's scaling of 1 x 128 and 128 x 128 as its own since CUDA 12.9, on Hopper alone (PyTorch's
`scaled_mm` by blocks). Its demands: scales of rows lie along the rows, those of a weight along the reduction,
padded to four; rows are a multiple of 4 (its documentation), columns of 16 (PyTorch). It says that a last
block may be short; that was timed and not yet compared, so what has one is ours. Batch-invariant mode is
ours, too: which of its kernels cuBLAS takes depends on how many rows there are. On an H200 (2026-11-29) it
takes 0.59 to 0.81 of our time on V2-Lite's and V3's linears, 0.60 to 0.83 of its own in bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import ScalingType

from shoal.ops.triton.fp8 import DTYPES, product
from shoal.ops.triton.quantise import (
    BLOCK,
    lacks_e4m3,
    places,
    quantise_blocks,
    quantise_rows,
    quantise_side_by_side,
    quantise_transposed,
)

SINCE = (12, 9)  # of CUDA


def cublas_refusal(x: Tensor, rows: int, n: int, k: int) -> str | None:
    """Why cuBLAS does not multiply (rows, k) by the transpose of (n, k); None if it does."""
    if not x.is_cuda or torch.version.cuda is None:
        return f"the tensors are on {x.device}, and cuBLAS is NVIDIA's"
    if tuple(map(int, torch.version.cuda.split("."))) < SINCE:
        return f"PyTorch is built for CUDA {torch.version.cuda}, and cuBLAS scales by blocks since 12.9"
    if (capability := torch.cuda.get_device_capability(x.device))[0] != 9:
        return f"cuBLAS scales by blocks on compute capability 9 alone, and this is {capability[0]}"
    return misfit(rows, n, k)


def misfit(rows: int, n: int, k: int) -> str | None:
    """What of the sizes cuBLAS does not take."""
    if rows % 4:
        return f"{rows} rows are no multiple of 4, as cuBLAS wants them"
    if odd := [size for size in (n, k) if size % BLOCK]:
        return (
            f"{odd[0]} columns are no multiple of 128, and cuBLAS was not held to float64 with a short block"
        )
    return None


def cublas_product(
    a_MK: Tensor, a_scales: Tensor, w_NK: Tensor, w_scales: Tensor, dtype: torch.dtype
) -> Tensor:
    """a w^T of quantised numbers; `a_scales` (M, k) lie tall, `w_scales` (n, k) do not."""
    fours = F.pad(w_scales, (0, -w_scales.shape[1] % 4))
    return F.scaled_mm(
        a_MK,
        w_NK.mT,
        a_scales,
        ScalingType.BlockWise1x128,
        fours.mT,
        ScalingType.BlockWise128x128,
        output_dtype=dtype,
    )


def product_of_rows(x_MK: Tensor, values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """x W^T with x quantised as it is met."""
    return _product((x_MK,), values, scales, dtype)


def _product(
    parts: Sequence[Tensor], values: Tensor, scales: Tensor, dtype: torch.dtype, *, invariant: bool = False
) -> Tensor:
    """The same, x in parts side by side."""
    ours = invariant or cublas_refusal(parts[0], parts[0].shape[0], *values.shape) is not None
    if len(parts) == 1:
        x, x_scales = quantise_rows(parts[0], tall=not ours)
    else:
        x, x_scales = quantise_side_by_side(parts, tall=not ours)
    return (product if ours else cublas_product)(x, x_scales, values, scales, dtype)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MK: Tensor, invariant: bool, pair: tuple[Tensor, ...] | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        values, scales = quantise_blocks(*weights) if pair is None else pair[:2]
        ctx.save_for_backward(x_MK, *weights, *(() if pair is None else pair[2:]))
        ctx.invariant, ctx.count = invariant, len(weights)
        y_MN = _product((x_MK,), values, scales, x_MK.dtype, invariant=invariant)
        firsts = places(len(weight) for weight in weights)
        return tuple(
            y_MN[:, first : first + len(weight)] for first, weight in zip(firsts, weights, strict=False)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x_MK, *rest = ctx.saved_tensors
        weights, kept = rest[: ctx.count], rest[ctx.count :]
        dx_MK = None
        if ctx.needs_input_grad[0]:
            transposed = kept or quantise_transposed(*weights)
            dx_MK = _product(dys, *transposed, x_MK.dtype, invariant=ctx.invariant)
        wanted = ctx.needs_input_grad[3:]
        dweights = (dy.mT @ x_MK if needs else None for dy, needs in zip(dys, wanted, strict=True))
        return dx_MK, None, None, *dweights


def linears(
    x: Tensor,
    weights: tuple[Tensor, ...],
    pair: tuple[Tensor, ...] | None = None,
    *,
    invariant: bool = False,
) -> tuple[Tensor, ...]:
    told = _Linears.apply(x.reshape(-1, x.shape[-1]), invariant, pair, *weights)
    return tuple(y_MN.unflatten(0, x.shape[:-1]) for y_MN in told)


def choose(
    x: Tensor, weights: tuple[Tensor, ...], pair: tuple[Tensor, ...] | None = None, *, invariant: bool = False
) -> tuple[str, str]:
    """Who multiplies, forward and for the gradient of x, and why."""
    if invariant:
        return "ours", "batch-invariant"
    rows = [len(weight) for weight in weights]
    n = rows[0] if len(rows) == 1 else places(rows)[-1]
    refusal = cublas_refusal(x, x.numel() // x.shape[-1], n, x.shape[-1])
    return ("cublas", "whole blocks of 128 on Hopper") if refusal is None else ("ours", refusal)


def linears_refusal(
    x: Tensor, weights: tuple[Tensor, ...], pair: tuple[Tensor, ...] | None = None
) -> str | None:
    if x.dtype not in DTYPES or any(x.dtype != weight.dtype for weight in weights):
        told = ", ".join(str(weight.dtype) for weight in weights)
        return f"x is {x.dtype} and the weights {told}; the kernels take all alike of {list(DTYPES)}"
    if x.numel() == 0:
        return "there are no rows"
    return lacks_e4m3(x)
