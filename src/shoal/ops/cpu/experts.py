"""Feed-forward steps of a few rows on a CPU: checks, scratch memory, and the call of `kernels/experts.py`.

Bound by the weights' way from the caches: for the quickstart's layer (32 experts of 64, 4 a token, 192 wide)
30 us at one row and 162 us at eight on one core (LOG.md). Contracts in `ops/api.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shoal.ops.cpu.limits import count_parts, refusal
from shoal.ops.cpu.load import run


def mlp_refusal(
    x_TD: Tensor, norm_D: Tensor, norm_eps: float, gate_ID: Tensor, up_ID: Tensor, down_DI: Tensor
) -> str | None:
    return refusal(x_TD, (norm_D, gate_ID, up_ID, down_DI), 3 * gate_ID.numel())


def mlp_step(
    x_TD: Tensor, norm_D: Tensor, norm_eps: float, gate_ID: Tensor, up_ID: Tensor, down_DI: Tensor
) -> Tensor:
    (tokens, hidden), inner = x_TD.shape, gate_ID.shape[0]
    parts = count_parts(tokens, 3 * gate_ID.numel())
    scratch = x_TD.new_empty(tokens * (parts * hidden + 2 * inner))
    out_TD = torch.empty_like(x_TD)
    run(
        *("mlp_step", parts),
        *(x_TD.data_ptr(), tokens, hidden, norm_D.data_ptr(), norm_eps),
        *(gate_ID.data_ptr(), up_ID.data_ptr(), down_DI.data_ptr(), inner),
        *(scratch.data_ptr(), out_TD.data_ptr()),
    )
    return out_TD


def moe_refusal(
    x_TD: Tensor,
    norm_D: Tensor,
    norm_eps: float,
    weights: Any,
    top_k: int,
    scoring_func: str,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> str | None:
    shared = weights.shared or ()
    tensors = (norm_D, weights.gate_ED, weights.bias_E, weights.gate_up_E2FD, weights.down_EDF, *shared)
    return refusal(x_TD, tensors, _read(weights, x_TD.shape[0] * top_k))


def _read(weights: Any, choices: int) -> int:
    n_experts, twice, hidden = weights.gate_up_E2FD.shape
    busy = min(n_experts, choices) * twice * hidden * 3 // 2
    return weights.gate_ED.numel() + busy + sum(weight.numel() for weight in weights.shared or ())


def moe_step(
    x_TD: Tensor,
    norm_D: Tensor,
    norm_eps: float,
    weights: Any,
    top_k: int,
    scoring_func: str,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[Tensor, ...]:
    (tokens, hidden), (n_experts, twice, _) = x_TD.shape, weights.gate_up_E2FD.shape
    inner = twice // 2
    shared = (0, 0, 0, 0)
    if weights.shared is not None:
        shared = (*(weight.data_ptr() for weight in weights.shared), weights.shared[0].shape[0])
    parts = count_parts(tokens, _read(weights, tokens * top_k))
    of_part = n_experts + 2 * n_group + 2 * tokens * (hidden + max(inner, shared[3]))
    scratch = x_TD.new_empty(tokens * (1 + top_k) * hidden + parts * of_part)
    out_TD, scores_TE = torch.empty_like(x_TD), x_TD.new_empty(tokens, n_experts)
    logits_TE = torch.empty_like(scores_TE)
    weights_TK = x_TD.new_empty(tokens, top_k)
    experts_TK = x_TD.new_empty(tokens, top_k, dtype=torch.int64)
    bias = weights.bias_E
    run(
        *("moe_step", parts),
        *(x_TD.data_ptr(), tokens, hidden, norm_D.data_ptr(), norm_eps),
        *(weights.gate_ED.data_ptr(), 0 if bias is None else bias.data_ptr(), bias is not None),
        *(n_experts, top_k, scoring_func == "sigmoid"),
        *(n_group, topk_group, norm_topk_prob, routed_scaling_factor),
        *(weights.gate_up_E2FD.data_ptr(), weights.down_EDF.data_ptr(), inner),
        *shared,
        *(experts_TK.data_ptr(), weights_TK.data_ptr(), scores_TE.data_ptr(), logits_TE.data_ptr()),
        *(scratch.data_ptr(), out_TD.data_ptr()),
    )
    return out_TD, experts_TK, weights_TK, scores_TE, logits_TE
