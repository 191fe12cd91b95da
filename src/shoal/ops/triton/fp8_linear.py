"""One matrix in FP8 on a GPU: who multiplies, and what the backward pass keeps.

    y = rows(x) blocks(W)^T,  dx = rows(dy) blocks(W)     "cublas", or "ours" (`fp8`)
    dW = dy^T x                                           cuBLAS, of the numbers as they came

cuBLAS has DeepSeek's scaling of 1 x 128 and 128 x 128 as its own since CUDA 12.9, on Hopper alone (PyTorch's
`scaled_mm` by blocks). Its demands: scales of rows lie along the rows, those of a weight along the reduction,
padded to four; rows are a multiple of 4 (its documentation), columns of 16 (PyTorch). It says that a last
block may be short; that was timed and not yet compared, so what has one is ours. Batch-invariant mode is
ours, too: which of its kernels cuBLAS takes depends on how many rows there are. On an H200 (2026-11-29) it
takes 0.59 to 0.81 of our time on V2-Lite's and V3's linears, 0.60 to 0.83 of its own in bfloat16.

W and its transpose are quantised in one reading where `keep` asks for it, as in `fp8`.
"""

from __future__ import annotations

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
    quantise_blocks,
    quantise_both,
    quantise_rows,
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


def product_of_rows(
    x_MK: Tensor, values: Tensor, scales: Tensor, dtype: torch.dtype, *, invariant: bool = False
) -> Tensor:
    """x W^T with x quantised as it is met."""
    if invariant or cublas_refusal(x_MK, x_MK.shape[0], *values.shape) is not None:
        return product(*quantise_rows(x_MK), values, scales, dtype)
    return cublas_product(*quantise_rows(x_MK, tall=True), values, scales, dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor, keep: bool, invariant: bool) -> Tensor:
        values, scales, *transposed = (quantise_both if keep else quantise_blocks)(weight_NK)
        ctx.save_for_backward(x_MK, weight_NK, *transposed)
        ctx.invariant = invariant
        return product_of_rows(x_MK, values, scales, x_MK.dtype, invariant=invariant)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MN: Tensor) -> tuple[Tensor | None, ...]:
        x_MK, weight_NK, *kept = ctx.saved_tensors
        dx_MK = dweight_NK = None
        if ctx.needs_input_grad[0]:
            transposed = kept or quantise_transposed(weight_NK)
            dx_MK = product_of_rows(dy_MN, *transposed, x_MK.dtype, invariant=ctx.invariant)
        if ctx.needs_input_grad[1]:
            dweight_NK = dy_MN.mT @ x_MK
        return dx_MK, dweight_NK, None, None


def linear(x: Tensor, weight_NK: Tensor, keep: bool = False, *, invariant: bool = False) -> Tensor:
    x_MK, keep = x.reshape(-1, x.shape[-1]), keep and torch.is_grad_enabled()
    return _Linear.apply(x_MK, weight_NK, keep, invariant).view(*x.shape[:-1], weight_NK.shape[0])


def choose(x: Tensor, weight_NK: Tensor, keep: bool = False, *, invariant: bool = False) -> tuple[str, str]:
    """Who multiplies, forward and for the gradient of x, and why."""
    if invariant:
        return "ours", "batch-invariant"
    refusal = cublas_refusal(x, x.numel() // x.shape[-1], *weight_NK.shape)
    return ("cublas", "whole blocks of 128 on Hopper") if refusal is None else ("ours", refusal)


def linear_refusal(x: Tensor, weight_NK: Tensor, keep: bool = False) -> str | None:
    if x.dtype not in DTYPES or x.dtype != weight_NK.dtype:
        return (
            f"x is {x.dtype} and the weight {weight_NK.dtype}; the kernels take two alike of {list(DTYPES)}"
        )
    if x.numel() == 0:
        return "there are no rows"
    return lacks_e4m3(x)
