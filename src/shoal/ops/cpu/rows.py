"""What a step of few rows needs beside its blocks on a CPU: the last norm, and the product with the head.

At one row PyTorch's calls cost more than the work, at eight its second thread does. Contracts in
`ops/api.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.ops.cpu.limits import refusal
from shoal.ops.cpu.load import kernel


def norm_refusal(x_TD: Tensor, weight_D: Tensor, eps: float) -> str | None:
    return refusal(x_TD, (weight_D,), weight_D.numel())


def norm_step(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    out_TD = torch.empty_like(x_TD)
    kernel("norm_step")(x_TD.data_ptr(), *x_TD.shape, weight_D.data_ptr(), eps, out_TD.data_ptr())
    return out_TD


def head_refusal(x_TD: Tensor, weight_VD: Tensor) -> str | None:
    return refusal(x_TD, (weight_VD,), weight_VD.numel())


def head_step(x_TD: Tensor, weight_VD: Tensor) -> Tensor:
    out_TV = x_TD.new_empty(x_TD.shape[0], weight_VD.shape[0])
    kernel("head_step")(
        x_TD.data_ptr(), *x_TD.shape, weight_VD.data_ptr(), weight_VD.shape[0], out_TV.data_ptr()
    )
    return out_TV
