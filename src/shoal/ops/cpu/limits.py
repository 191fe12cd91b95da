"""What all CPU kernels ask of a call: few rows, no gradient, float32 in order on a CPU, moderate weights.

From `ROWS_OF_TEAM` rows on a kernel takes one more of PyTorch's threads for each `WEIGHTS_OF_PART` that it
reads. More rows or larger weights are left to PyTorch's products. Both limits are where a dense layer's two
ways met on 2 cores, the kernel on one of them (LOG.md); experts would gain beyond 16 rows.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from shoal.ops.cpu import load

FEW_ROWS = 16
MANY_WEIGHTS = 1 << 21  # elements read by one call
ROWS_OF_TEAM = 4
WEIGHTS_OF_PART = 1 << 16  # some 15 us of reading, beside 2 us for a team to meet


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


def count_parts(rows: int, read: int) -> int:
    """Threads for a call. One row gains little by a second, and loses much where that must be waited for."""
    return min(torch.get_num_threads(), 1 + read // WEIGHTS_OF_PART) if rows >= ROWS_OF_TEAM else 1


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
