"""What a step of few rows needs beside its blocks on a CPU: the last norm, and the product with the head.

At few rows PyTorch's calls cost more than the work. Contracts in `ops/api.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.ops.cpu import load
from shoal.ops.cpu.limits import FEW_ROWS, count_parts, refusal
from shoal.ops.cpu.load import kernel, run


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
    run(
        *("head_step", count_parts(x_TD.shape[0], weight_VD.numel()), x_TD.data_ptr(), *x_TD.shape),
        *(weight_VD.data_ptr(), weight_VD.shape[0], out_TV.data_ptr()),
    )
    return out_TV


def greedy_refusal(logits_SV: Tensor, scores_SV: Tensor) -> str | None:
    """For any number of rows, so that a row's bits do not depend on it; and whoever draws need not be in
    inference mode, for a drawn token has no gradient."""
    for tensor in (logits_SV, scores_SV):
        if tensor.dtype is not torch.float32 or tensor.requires_grad or not tensor.is_contiguous():
            return "the logits are not float32 in order without a gradient"
    return load.refusal()


def greedy_step(logits_SV: Tensor, scores_SV: Tensor) -> tuple[Tensor, Tensor]:
    rows = logits_SV.shape[0]
    tokens_S, logprobs_S = logits_SV.new_empty(rows, dtype=torch.int64), logits_SV.new_empty(rows)
    kernel("greedy_step")(
        *(logits_SV.data_ptr(), scores_SV.data_ptr(), *logits_SV.shape),
        *(tokens_S.data_ptr(), logprobs_S.data_ptr()),
    )
    return tokens_S, logprobs_S


def record_refusal(slots_T: Tensor, ids_T: Tensor, choices_LTK: Tensor, *state: Tensor | int) -> str | None:
    if slots_T.shape[0] > FEW_ROWS:
        return f"there are {slots_T.shape[0]} rows; the kernel is for at most {FEW_ROWS}"
    for tensor in (slots_T, ids_T, choices_LTK, *(part for part in state if isinstance(part, Tensor))):
        if not tensor.is_contiguous():
            return "a tensor is not in order"
    return load.refusal()


def record_step(
    slots_T: Tensor,
    ids_T: Tensor,
    choices_LTK: Tensor,
    ids_X: Tensor,
    experts_XLK: Tensor,
    tokens_LE: Tensor,
    touched_L: Tensor,
    num_slots: int,
) -> bool:
    layers, tokens, top_k = choices_LTK.shape
    counts_E = torch.empty_like(tokens_LE[:1])
    wrong = kernel("record_step")(
        *(slots_T.data_ptr(), ids_T.data_ptr(), choices_LTK.data_ptr(), ids_X.data_ptr()),
        *(experts_XLK.data_ptr(), tokens_LE.data_ptr(), touched_L.data_ptr()),
        *(tokens, layers, top_k, tokens_LE.shape[1], ids_X.shape[0], num_slots, counts_E.data_ptr()),
    )
    if wrong:
        what = "a slot is outside of the cache" if wrong == 1 else "an expert is outside of the table"
        raise IndexError(f"records of a step: {what}")
    return True
