"""From the logits of a step to one token for each row, for all rows at once.

A token is the inverse of the cumulative distribution at a number u in [0, 1) that depends on the request's
seed and the token's position alone. A counter, not a generator with state, because then what is drawn depends
on nothing else: not on the other rows, not on how the prompt was cut into chunks, not on a sequence having
been computed twice; and a drafted token can be verified by drawing it again. One u a row is made on the host,
so every device draws the same.

The law: what is drawn from a row depends on its logits and its `Draw` alone.

Shape letters: S rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shoal.engine.sequence import SamplingParams

_MASK = 2**64 - 1


class Draw(NamedTuple):
    """How one row is sampled."""

    params: SamplingParams
    seed: int
    position: int  # of the token to draw, in its sequence
    banned_ids: frozenset[int] = frozenset()
    prompt_ids: tuple[int, ...] = ()  # of the sequence, for the penalties
    text_ids: tuple[int, ...] = ()


class Sample(NamedTuple):
    """A token, and log-probabilities as the model has them: before bans, temperature and restrictions."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the `params.logprobs` most probable tokens, best first


def _mix(bits: int) -> int:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014)."""
    bits = (bits + 0x9E3779B97F4A7C15) & _MASK
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
    return bits ^ (bits >> 31)


def hash_pair(first: int, second: int) -> int:
    """64 well-mixed bits of two integers of at most 64."""
    return _mix(_mix(first) ^ second)


def uniform(seed: int, position: int) -> float:
    """52 bits in [0, 1): few enough that u times a total of float64 is always below the total."""
    return (hash_pair(seed, position) >> 12) * 2.0**-52


def sample(logits_SV: Tensor, draws: list[Draw]) -> list[Sample]:
    """One token for each row. NaN or +inf in a row shows as a log-probability that is not finite."""
    logits_SV = logits_SV.float()
    tokens_S1 = _choose(_bend(logits_SV, draws), draws)
    total_S1 = logits_SV.logsumexp(-1, keepdim=True)
    logprobs_S1 = logits_SV.gather(1, tokens_S1) - total_S1
    tops = _list_top(logits_SV, total_S1, [draw.params.logprobs for draw in draws])
    return list(map(Sample, tokens_S1.flatten().tolist(), logprobs_S1.flatten().tolist(), tops))


def _bend(logits_SV: Tensor, draws: list[Draw]) -> Tensor:
    """What is asked for before the logits are a distribution: penalties, biases, bans, in this order."""
    bent_SV = logits_SV
    for row, draw in enumerate(draws):
        params = draw.params
        penalised = params.frequency_penalty, params.presence_penalty, params.repetition_penalty
        if penalised == (0, 0, 1) and not params.logit_bias and not draw.banned_ids:
            continue
        bent_SV = logits_SV.clone() if bent_SV is logits_SV else bent_SV
        bent_V = bent_SV[row]
        counts_V = torch.bincount(
            torch.tensor(draw.text_ids, dtype=torch.int64, device=bent_V.device), minlength=len(bent_V)
        )
        seen_V = counts_V > 0
        seen_V[list(draw.prompt_ids)] = True
        factor = params.repetition_penalty
        bent_V.copy_(torch.where(seen_V, torch.where(bent_V > 0, bent_V / factor, bent_V * factor), bent_V))
        bent_V -= params.frequency_penalty * counts_V + params.presence_penalty * (counts_V > 0)
        for token, bias in params.logit_bias:
            bent_V[token] += bias
        bent_V[list(draw.banned_ids)] = float("-inf")
    return bent_SV


def _choose(logits_SV: Tensor, draws: list[Draw]) -> Tensor:
    params = [draw.params for draw in draws]
    best_S1 = logits_SV.argmax(-1, keepdim=True)
    if all(p.temperature == 0 for p in params):
        return best_S1
    # 1. The distribution. The largest logit is subtracted first, or a temperature near 0 would overflow.
    temperature_S1 = _column([p.temperature for p in params], logits_SV)
    shifted_SV = logits_SV - logits_SV.gather(1, best_S1)
    probs_SV = (shifted_SV / temperature_S1.where(temperature_S1 > 0, 1.0)).softmax(-1)
    # 2. What may be drawn of it.
    if any(p.top_k is not None or p.top_p < 1 or p.min_p > 0 for p in params):
        probs_SV = probs_SV * (probs_SV >= _least(probs_SV, params))
    # 3. The first token whose cumulative probability exceeds u; in float64, or a large vocabulary blurs it.
    cumulative_SV = probs_SV.cumsum(-1, dtype=torch.float64)
    uniform_S1 = _column([uniform(draw.seed, draw.position) for draw in draws], cumulative_SV)
    drawn_S1 = torch.searchsorted(cumulative_SV, uniform_S1 * cumulative_SV[:, -1:], right=True)
    drawn_S1 = drawn_S1.clamp_(max=logits_SV.shape[1] - 1)  # past the end only where logits are NaN
    return drawn_S1.where(temperature_S1 > 0, best_S1)


def _least(probs_SV: Tensor, params: list[SamplingParams]) -> Tensor:
    """The smallest probability that may be drawn from each row (S, 1)."""
    size = probs_SV.shape[1]
    # 1. Rank the best `top_k` of a row, or those that top-p could want: all the tokens below (1 - top_p) / V
    #    together weigh less than 1 - top_p. A full sort would cost more than the rest of sampling.
    negligible_S1 = _column([(1 - p.top_p) / size for p in params], probs_SV)
    num_wanted = (probs_SV >= negligible_S1).sum(-1).tolist()
    limits = [
        min(p.top_k, size) if p.top_k is not None else max(count, 1) if p.top_p < 1 else 1
        for p, count in zip(params, num_wanted, strict=True)
    ]
    best_SK = probs_SV.topk(max(limits), dim=-1).values
    inside_SK = torch.arange(max(limits), device=probs_SV.device) < _column(limits, probs_SV)
    # 2. Of these keep the fewest that reach top_p, in parts of what top-k left (of 1, where it left all).
    reached_SK = (best_SK * inside_SK).cumsum(-1, dtype=torch.float64)
    has_top_k_S1 = _column([p.top_k is not None for p in params], inside_SK)
    goal_S1 = _column([p.top_p for p in params], reached_SK) * reached_SK[:, -1:].where(has_top_k_S1, 1.0)
    inside_SK &= reached_SK - best_SK < goal_S1
    least_S1 = best_SK.gather(1, (inside_SK.sum(-1, keepdim=True) - 1).clamp_(min=0))  # below 0 only for NaN
    # 3. A row that asked for neither has no such bound. Min-p bounds by the ratio to the best.
    ranked_S1 = _column([p.top_k is not None or p.top_p < 1 for p in params], inside_SK)
    min_p_S1 = _column([p.min_p for p in params], probs_SV)
    return least_S1.where(ranked_S1, 0.0).maximum(min_p_S1 * best_SK[:, :1])


def _column(values: list[float] | list[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


def _list_top(logits_SV: Tensor, total_S1: Tensor, counts: list[int]) -> list[tuple[tuple[int, float], ...]]:
    if not any(counts):
        return [()] * len(counts)
    best, tokens = logits_SV.topk(max(counts), dim=-1)
    rows = zip(counts, tokens.tolist(), (best - total_S1).tolist(), strict=True)
    return [tuple(zip(ids[:count], logprobs[:count], strict=True)) for count, ids, logprobs in rows]
