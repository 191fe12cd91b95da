"""Reference of the router: scores, groups, selection, weights, in numbered steps.

DeepSeek-V2 eq. 20-22 and V3 eq. 12-16; Mixtral, Qwen3 and OLMoE are the same steps with other switches. Two
facts are easily got wrong: the softmax runs over all experts before anything is masked, and masked experts
get -inf, not 0 (biased scores may be negative).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.ops.reference.layers import add_rms_norm


def gate_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    return F.linear(x_TD.float(), weight_ED.float())


def _best(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of the last dimension, best first, ties to the smaller index."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _keep_best_groups(selection_TE: Tensor, n_group: int, topk_group: int, has_bias: bool) -> Tensor:
    groups_TGE = selection_TE.unflatten(-1, (n_group, -1))
    value_TG = groups_TGE.topk(2, dim=-1).values.sum(-1) if has_bias else groups_TGE.amax(-1)
    dropped_TG = torch.ones_like(value_TG, dtype=torch.bool)
    dropped_TG.scatter_(1, _best(value_TG, topk_group), False)
    return groups_TGE.masked_fill(dropped_TG.unsqueeze(-1), float("-inf")).flatten(-2)


def route(
    logits_TE: Tensor,
    top_k: int,
    scoring_func: str,
    bias_E: Tensor | None,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    replay_TK: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    # 1. Score every expert.
    scores_TE = logits_TE.sigmoid() if scoring_func == "sigmoid" else logits_TE.softmax(-1)
    if replay_TK is not None:
        experts_TK = replay_TK.long()
    else:
        experts_TK = select(scores_TE, top_k, bias_E, n_group, topk_group)
    dropped = replay_TK is not None
    weights_TK = weigh(scores_TE, experts_TK, norm_topk_prob, routed_scaling_factor, dropped, _add_up)
    return experts_TK, weights_TK, scores_TE


def select(scores_TE: Tensor, top_k: int, bias_E: Tensor | None, n_group: int, topk_group: int) -> Tensor:
    # 2. Selection is by score plus bias, and has no gradient.
    selection_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    # 3. Keep the best groups.
    if n_group > 1:
        selection_TE = _keep_best_groups(selection_TE, n_group, topk_group, bias_E is not None)
    # 4. Choose.
    return _best(selection_TE, top_k)


def weigh(
    scores_TE: Tensor,
    experts_TK: Tensor,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    dropped: bool,
    add_up: Callable[[Tensor], Tensor],
) -> Tensor:
    """Weights of the chosen; where some may be `dropped` they are -1. `add_up` sums the last dimension."""
    # 5. Weights are the unbiased scores of the chosen; nothing for a dropped choice.
    if dropped:
        weights_TK = scores_TE.gather(1, experts_TK.clamp(min=0)).masked_fill(experts_TK < 0, 0.0)
    else:
        weights_TK = scores_TE.gather(1, experts_TK)
    # 6. Normalise, 7. scale.
    if norm_topk_prob:
        weights_TK = weights_TK / (add_up(weights_TK).unsqueeze(-1) + 1e-20)
    if routed_scaling_factor != 1.0:
        weights_TK = weights_TK * routed_scaling_factor
    return weights_TK


def _add_up(x: Tensor) -> Tensor:
    return x.sum(-1)


def limit_capacity(experts_TK: Tensor, n_experts: int, capacity: int) -> Tensor:
    # 1. Choices in order of service: all first choices, then all second ones.
    order_M = experts_TK.t().flatten()
    # 2. A choice's place in the queue of its expert: how many before it, in that order, asked for the same.
    # The dropped queue too, as expert -1, and get nothing for it.
    by_expert = order_M.argsort(stable=True)
    counts = torch.bincount(order_M + 1, minlength=n_experts + 1)
    starts = counts.cumsum(0) - counts
    place_M = torch.empty_like(order_M)
    place_M[by_expert] = torch.arange(order_M.numel(), device=order_M.device)
    place_M = place_M - starts[order_M + 1]
    # 3. Those past the capacity lose their place.
    kept_M = torch.where(place_M < capacity, order_M, -1)
    return kept_M.view(experts_TK.shape[1], -1).t().contiguous()


def gate(x_TD: Tensor, weight_ED: Tensor, top_k: int, *rule: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits_TE = gate_logits(x_TD, weight_ED)
    return *route(logits_TE, top_k, *rule), logits_TE


def add_norm_gate(
    x_TD: Tensor, y_TD: Tensor, norm_D: Tensor, eps: float, weight_ED: Tensor, top_k: int, *rule: Any
) -> tuple[Tensor, ...]:
    total_TD, normal_TD = add_rms_norm(x_TD, y_TD, norm_D, eps)
    return total_TD, normal_TD, *gate(normal_TD, weight_ED, top_k, *rule)
