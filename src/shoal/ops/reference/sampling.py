"""Reference of sampling: penalties, then a token by the inverse of the cumulative distribution.

Probabilities are float32, what is added up of them float64, or a large vocabulary blurs it. A full sort would
cost more than all the rest, so only the ranks that can matter are ranked; how many, the host is told, which a
GPU would have to wait for.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def sample(
    logits_SV: Tensor,
    temperature_S: Tensor,
    top_k_S: Tensor,
    top_p_S: Tensor,
    min_p_S: Tensor,
    uniforms_S: Tensor,
    scores_SV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    logits_SV = logits_SV.float()
    scores_SV = logits_SV if scores_SV is None else scores_SV
    rows = (temperature_S, top_k_S, top_p_S, min_p_S, uniforms_S)
    temperature_S1, top_k_S1, top_p_S1, min_p_S1, uniforms_S1 = (row.unsqueeze(1) for row in rows)
    size = scores_SV.shape[1]
    best_S1 = scores_SV.argmax(-1, keepdim=True)
    # 1. The distribution. The largest score is subtracted first, or a temperature near 0 would overflow.
    shifted_SV = scores_SV - scores_SV.gather(1, best_S1)
    probs_SV = (shifted_SV / temperature_S1.where(temperature_S1 > 0, 1.0)).softmax(-1)
    # 2. Rank the best `top_k` of a row, or those that top-p could want: all the tokens below (1 - top_p) / V
    #    together weigh less than 1 - top_p.
    has_top_k_S1 = top_k_S1 > 0
    wanted_S1 = (probs_SV >= (1 - top_p_S1) / size).sum(-1, keepdim=True).clamp(min=1)
    limits_S1 = top_k_S1.clamp(max=size).where(has_top_k_S1, wanted_S1.where(top_p_S1 < 1, 1))
    most = int(limits_S1.max()) if limits_S1.numel() else 1
    ranked_SK = probs_SV.topk(most, dim=-1).values
    inside_SK = torch.arange(most, device=probs_SV.device) < limits_S1
    # 3. Of these keep the fewest that reach top_p, in parts of what top-k left (of 1, where it left all).
    reached_SK = (ranked_SK * inside_SK).cumsum(-1, dtype=torch.float64)
    goal_S1 = top_p_S1 * reached_SK[:, -1:].where(has_top_k_S1, 1.0)
    inside_SK &= reached_SK - ranked_SK < goal_S1
    last_S1 = (inside_SK.sum(-1, keepdim=True) - 1).clamp_(min=0)  # below 0 only for NaN
    least_S1 = ranked_SK.gather(1, last_S1)
    # 4. A row that asked for neither has no such bound. Min-p bounds by the ratio to the best.
    least_S1 = least_S1.where(has_top_k_S1 | (top_p_S1 < 1), 0.0).maximum(min_p_S1 * ranked_SK[:, :1])
    # 5. The first token whose cumulative probability exceeds u.
    cumulative_SV = (probs_SV * (probs_SV >= least_S1)).cumsum(-1, dtype=torch.float64)
    drawn_S1 = torch.searchsorted(cumulative_SV, uniforms_S1 * cumulative_SV[:, -1:], right=True)
    drawn_S1 = drawn_S1.clamp_(max=size - 1)  # past the end only where logits are NaN
    tokens_S1 = drawn_S1.where(temperature_S1 > 0, best_S1)
    # 6. Its log-probability, as the model has it.
    logprobs_S1 = logits_SV.gather(1, tokens_S1) - logits_SV.logsumexp(-1, keepdim=True)
    return tokens_S1.squeeze(1), logprobs_S1.squeeze(1)


@torch.no_grad()
def penalise(
    logits_SV: Tensor,
    ids_SN: Tensor,
    lengths_S: Tensor,
    num_prompt_S: Tensor,
    repetition_S: Tensor,
    frequency_S: Tensor,
    presence_S: Tensor,
) -> Tensor:
    scores_SV = logits_SV.to(torch.float32, copy=True)
    repetition_S1, frequency_S1, presence_S1 = (
        row.unsqueeze(1) for row in (repetition_S, frequency_S, presence_S)
    )
    # 1. How often each token is in the text, and whether it is there or in the prompt.
    place_1N = torch.arange(ids_SN.shape[1], device=ids_SN.device).unsqueeze(0)
    before_SN = place_1N < lengths_S.unsqueeze(1)
    known_SN = ids_SN.where(before_SN, 0).long()
    counts_SV = torch.zeros_like(scores_SV)
    counts_SV.scatter_add_(1, known_SN, (before_SN & (place_1N >= num_prompt_S.unsqueeze(1))).float())
    seen_SV = torch.zeros_like(scores_SV).scatter_add_(1, known_SN, before_SN.float())
    # 2. Repetition, 3. frequency, 4. presence.
    repeated_SV = (scores_SV / repetition_S1).where(scores_SV > 0, scores_SV * repetition_S1)
    scores_SV = repeated_SV.where(seen_SV > 0, scores_SV)
    return scores_SV - frequency_S1 * counts_SV - presence_S1 * (counts_SV > 0)
