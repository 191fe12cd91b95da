"""Reference of one AdamW update whose weight and moments may be kept narrow, in numbered steps.

Everything is computed in float32 and rounded once, when it is put back: the moments of this step are exact in
its own update, and only the next step sees what their storage lost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shoal.ops.reference import narrow


def adamw(
    weight: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    master: Tensor | None,
    factor: Tensor | None,
    step: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    key: int,
) -> None:
    first, second, first_scale, second_scale = moments
    # 1. The gradient, clipped. A factor that is not finite calls the update off.
    goes = torch.ones((), dtype=torch.bool, device=weight.device) if factor is None else factor.isfinite()
    g = grad.float() if factor is None else grad.float() * factor
    # 2. The moments, 3. without the bias of their start at 0.
    m_old, v_old = narrow.narrow_load(first, first_scale), narrow.narrow_load(second, second_scale)
    m = betas[0] * m_old + (1 - betas[0]) * g
    v = betas[1] * v_old + (1 - betas[1]) * g * g
    correct_m, correct_v = (1 - torch.exp(step * math.log(beta)) if beta else step * 0 + 1 for beta in betas)
    # 4. The weight: decay, then the step.
    old = weight.float() if master is None else master
    new = old * (1 - lr * weight_decay) - lr * (m / correct_m) / ((v / correct_v).sqrt() + eps)
    # 5. Put back. Each has bits of its own: the weight 16 of the first word, codes 8 of its others, wider
    # moments those others and 16 of the second word.
    bits, more = narrow.random_bits(weight.numel(), key, step)
    if master is not None:
        master.copy_(torch.where(goes, new, old))
        weight.copy_(master)
    else:
        wide = new if weight.dtype == torch.float32 else narrow.to_bfloat16(new, (bits & 0xFFFF).view_as(new))
        weight.copy_(torch.where(goes, wide, weight))
    coded = first.dtype == torch.int8
    _put(first, first_scale, m, (bits >> 16) & 0xFF if coded else bits >> 16, goes)
    _put(second, second_scale, v, bits >> 24 if coded else more & 0xFFFF, goes)


def _put(values: Tensor, scale: Tensor | None, x: Tensor, bits: Tensor, goes: Tensor) -> None:
    if scale is None:
        kept = x if values.dtype == torch.float32 else narrow.to_bfloat16(x, bits.view_as(x))
        values.copy_(torch.where(goes, kept, values))
        return
    encode = narrow.to_linear if values.dtype == torch.int8 else narrow.to_log
    codes, largest = encode(x.flatten(), narrow.to_chance(bits))
    values.copy_(torch.where(goes, codes.view_as(values), values))
    scale.copy_(torch.where(goes, largest, scale))
