"""What all CPU kernels ask of a call: few rows, no gradient, float32 in order on a CPU, moderate weights.

One kernel runs on one thread. That is the fastest for a step whose weights the caches of a core reach in some
tens of microseconds; for more rows or larger weights it is left to PyTorch's products on all cores. Both
limits are where a dense layer's two ways met on 2 cores (LOG.md); experts would gain beyond 16 rows.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from shoal.ops.cpu import load

FEW_ROWS = 16
MANY_WEIGHTS = 1 << 21  # elements read by one call


def refusal(x_TD: Tensor, tensors: Iterable[Tensor | None], read: int) -> str | None:
    """`read`: elements of weights that the call goes through."""
    if torch.is_grad_enabled():
        return "gradients may be asked for; run under torch.inference_mode()"
    if not 0 < x_TD.shape[0] <= FEW_ROWS:
        return f"there are {x_TD.shape[0]} rows; the kernels are for 1 to {FEW_ROWS}"
    if read > MANY_WEIGHTS:
        return f"it reads {read:,} weights; above {MANY_WEIGHTS:,} PyTorch's products are faster"
    for tensor in (x_TD, *tensors):
        if tensor is None:
            continue
        if tensor.dtype is not torch.float32:
            return f"a tensor is {tensor.dtype}; the kernels are for float32"
        if not tensor.is_cpu or not tensor.is_contiguous():
            return "a tensor is not in order on the CPU"
    return load.refusal()


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
