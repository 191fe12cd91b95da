"""Reference of the elementwise ops: RMSNorm, SwiGLU, RoPE.

They state the cast points that parity with published checkpoints depends on. Narrow inputs are computed in
float32; float64 inputs stay float64, so that every other implementation can be held against these.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    if x.dtype in (torch.float32, torch.float64):
        return F.rms_norm(x, weight_D.shape, weight_D, eps)
    wide = _widen(x)
    # 1. Normalise in float32.   2. Cast back.   3. Multiply by the weight in the narrow dtype.
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normal.to(x.dtype) * weight_D


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def rope(x_THR: Tensor, cos_TR2: Tensor, sin_TR2: Tensor, interleaved: bool) -> Tensor:
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
