"""Reference of the small ops: RMSNorm, with a residual add or without, SwiGLU, RoPE.

They state the cast points that parity with published checkpoints depends on. Narrow inputs are computed in
float32; float64 inputs stay float64, so that every other implementation can be held against these.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _RMSNorm(torch.autograd.Function):
    """Float32 with its gradient written out: nine passes over x, where autograd takes some fifteen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, inverse)
        return (x * inverse).mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, inverse = ctx.saved_tensors
        product_ND = (dy * x).flatten(0, -2)
        dweight_D = torch.mv(product_ND.t(), inverse.flatten())
        # dx = r (w dy) - x r^3 <w dy, x> / D, with r the inverse norm.
        along = torch.mv(product_ND, weight_D).view_as(inverse) * inverse.pow(3) / x.shape[-1]
        return (dy * weight_D).mul_(inverse).addcmul_(x, along, value=-1), dweight_D, None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    if x.dtype == weight_D.dtype and x.dtype in (torch.float32, torch.float64):
        if torch.is_grad_enabled():
            return _RMSNorm.apply(x, weight_D, eps)
        return F.rms_norm(x, weight_D.shape, weight_D, eps)
    wide = _widen(x)
    # 1. Normalise in float32.   2. Cast back.   3. Multiply by the weight in the narrow dtype.
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normal.to(x.dtype) * weight_D


def add_rms_norm(x: Tensor, y: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + y
    return total, rms_norm(total, weight_D, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def rope(x_THQ: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, interleaved: bool) -> Tensor:
    kept = x_THQ.shape[-1] - 2 * cos_TR2.shape[-1]
    if kept:
        turned_THR = rope(x_THQ[..., kept:], cos_TR2, sin_TR2, interleaved)
        return torch.cat((x_THQ[..., :kept], turned_THR), dim=-1)
    x_THR = x_THQ
    wide = _widen(x_THR)
    if interleaved:
        # A pair is a complex number and the rotation a product. Copied, because x is often a slice that
        # begins at an odd element, where no complex number can.
        turn_T1R2 = torch.complex(cos_TR2, sin_TR2).unsqueeze(1)
        pairs = wide.unflatten(-1, (-1, 2)).clone(memory_format=torch.contiguous_format)
        return torch.view_as_real(torch.view_as_complex(pairs) * turn_T1R2).flatten(-2).to(x_THR.dtype)
    cos, sin = cos_TR2.unsqueeze(1), sin_TR2.unsqueeze(1)
    first, second = wide.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_THR.dtype)


def linears(
    x_TD: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    return tuple(F.linear(x_TD, weight, bias) for weight, bias in zip(weights, biases, strict=True))
