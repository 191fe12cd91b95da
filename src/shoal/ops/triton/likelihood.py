"""Minus the log-probability of one token of each row, for batch-invariant mode: one kernel for whoever asks.

    nll = lse(z) - z_target

The engine asks it of the token that it drew, the trainer of the one that it learns from. That both say the
same bits is not a matter of two kernels alike: it is one compiled program. Its tiles, warps and order of sums
follow from the vocabulary and the dtype; strides and addresses take no part in compiling it, so a row of an
odd vocabulary, which begins where vectors do not, is added as any other.

Layout: one program a row, twice over it, lanes on their own until the end. Bound: the bytes of the row, the
second time out of L2; elements are loaded one by one, which costs some of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # of the vocabulary, at a time


@triton.jit(
    do_not_specialize=["stride"],
    do_not_specialize_on_alignment=["logits_ptr", "targets_ptr", "nll_ptr"],
)
def _nll_kernel(logits_ptr, targets_ptr, nll_ptr, stride, V: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    # 1. The largest logit: in any order the same.
    peaks = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in range(0, V, BLOCK):
        column = first + tl.arange(0, BLOCK)
        logit = tl.load(logits_ptr + column, mask=column < V, other=float("-inf")).to(tl.float32)
        peaks = tl.maximum(peaks, logit)
    peak = tl.max(peaks, 0)
    # 2. The sum of exponentials, tile by tile in each lane, then over the lanes.
    totals = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, V, BLOCK):
        column = first + tl.arange(0, BLOCK)
        logit = tl.load(logits_ptr + column, mask=column < V, other=float("-inf")).to(tl.float32)
        totals += tl.exp(logit - peak)
    # 3. A target outside is not read, and shows as NaN.
    target = tl.load(targets_ptr + row)
    known = (target >= 0) & (target < V)
    wanted = tl.load(logits_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    tl.store(nll_ptr + row, peak + tl.log(tl.sum(totals, 0)) - wanted)


def nll(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """(T,) float32, of logits whose rows are contiguous and targets in int64."""
    T, V = logits_TV.shape
    nll_T = torch.empty(T, dtype=torch.float32, device=logits_TV.device)
    if T:
        _nll_kernel[(T,)](
            logits_TV,
            targets_T.contiguous(),
            nll_T,
            logits_TV.stride(0),
            V=V,
            BLOCK=min(TILE, triton.next_power_of_2(V)),
            num_warps=8,
        )
    return nll_T
