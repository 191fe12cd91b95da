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

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shoal.engine import staging
from shoal.engine.sequence import SamplingParams, Top

_MASK = 2**64 - 1


class Draw(NamedTuple):
    """How one row is sampled."""

    params: SamplingParams
    seed: int
    position: int  # of the token to draw, in its sequence
    banned_ids: frozenset[int] = frozenset()


class History(NamedTuple):
    """Where the ids are that came before the tokens to draw. Only penalties read it."""

    ids: Callable[[list[int], int], Tensor]  # the first N ids before each of these rows: (S, N)
    num_prompt: list[int]  # by row: how many of them are the prompt's


class Scores(NamedTuple):
    """Rows of logits, and what every way to sample needs of them. Made where a graph can hold it."""

    logits_SV: Tensor  # float32
    best_S1: Tensor  # int64: the lowest id among the largest
    total_S1: Tensor  # float32: log of the sum of exponentials

    @classmethod
    def of(cls, logits_SV: Tensor) -> Scores:
        logits_SV = logits_SV.float()
        return cls(logits_SV, logits_SV.argmax(-1, keepdim=True), logits_SV.logsumexp(-1, keepdim=True))

    def first(self, rows: int) -> Scores:
        return Scores(*(column[:rows] for column in self))


class Drawn(NamedTuple):
    """Tokens, and log-probabilities as the model has them: before all that was asked for. On the device."""

    tokens_S1: Tensor  # int64
    logprobs_S1: Tensor
    top_ids_SK: Tensor
    top_logprobs_SK: Tensor

    def pack(self) -> Tensor:
        """All of it as float64, which holds every id exactly: (S, 2 + 2K)."""
        return torch.cat([column.double() for column in self], dim=1)


class Sample(NamedTuple):
    token: int
    logprob: float  # not finite where NaN or +inf was among the logits
    top: Top  # the `params.logprobs` most probable tokens


def read(packed: Tensor, counts: list[int]) -> list[Sample]:
    """What `Drawn.pack` gave, on the host."""
    most = (packed.shape[1] - 2) // 2
    samples = []
    for count, (token, logprob, *tops) in zip(counts, packed.tolist(), strict=True):
        ids = map(int, tops[:count])
        top = tuple(zip(ids, tops[most : most + count], strict=True))
        samples.append(Sample(int(token), logprob, top))
    return samples


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


def draw(
    scores: Scores, draws: list[Draw], history: History | None = None, allowed_SV: Tensor | None = None
) -> Drawn:
    """One token for each row. Launches only, on CUDA. `allowed_SV` are the tokens that grammars leave."""
    logits_SV, best_S1, total_S1 = scores
    bent_SV = _bend(logits_SV, draws, history)
    if allowed_SV is not None:
        bent_SV = bent_SV.masked_fill(~allowed_SV, float("-inf"))
    tokens_S1 = choose(bent_SV, draws, best_S1 if bent_SV is logits_SV else bent_SV.argmax(-1, keepdim=True))
    best, ids = logits_SV[:, :0], tokens_S1[:, :0]
    if most := max((draw.params.logprobs for draw in draws), default=0):
        best, ids = logits_SV.topk(most, dim=-1)
    return Drawn(tokens_S1, logits_SV.gather(1, tokens_S1) - total_S1, ids, best - total_S1)


def sample(logits_SV: Tensor, draws: list[Draw], history: History | None = None) -> list[Sample]:
    """One token for each row, on the host."""
    packed = draw(Scores.of(logits_SV), draws, history).pack()
    return read(packed.cpu(), [draw.params.logprobs for draw in draws])


def _bend(logits_SV: Tensor, draws: list[Draw], history: History | None) -> Tensor:
    """What is asked for before the logits are a distribution: penalties, biases, bans, in this order."""
    bent_SV = logits_SV
    if rows := [row for row, draw in enumerate(draws) if draw.params.penalises]:
        assert history is not None
        bent_SV = _penalise(bent_SV, draws, rows, history)
    shifts = [
        (row, token, shift)
        for row, draw in enumerate(draws)
        for token, shift in (*draw.params.logit_bias, *((banned, -math.inf) for banned in draw.banned_ids))
    ]
    if shifts:
        rows_X, ids_X, shifts_X = map(np.array, zip(*shifts, strict=True))
        index = staging.send([rows_X, ids_X, shifts_X.astype(np.float32)], logits_SV.device)
        bent_SV = bent_SV.index_put((index[0], index[1]), index[2], accumulate=True)
    return bent_SV


def _penalise(logits_SV: Tensor, draws: list[Draw], rows: list[int], history: History) -> Tensor:
    params = [draws[row].params for row in rows]
    positions = [draws[row].position for row in rows]
    rows_S, *columns = staging.send(
        [
            np.array(rows),
            np.array(positions),
            np.array([history.num_prompt[row] for row in rows]),
            np.array([p.repetition_penalty for p in params], np.float32),
            np.array([p.frequency_penalty for p in params], np.float32),
            np.array([p.presence_penalty for p in params], np.float32),
        ],
        logits_SV.device,
    )
    position_S1, num_prompt_S1, repetition_S1, frequency_S1, presence_S1 = (
        column.unsqueeze(1) for column in columns
    )
    # 1. How often each token is in the text, and whether it is there or in the prompt.
    ids_SN = history.ids(rows, max(positions))
    place_1N = torch.arange(ids_SN.shape[1], device=ids_SN.device).unsqueeze(0)
    before_SN = place_1N < position_S1
    chosen_SV = logits_SV[rows_S]
    counts_SV, seen_SV = torch.zeros_like(chosen_SV), torch.zeros_like(chosen_SV)
    counts_SV.scatter_add_(1, ids_SN, (before_SN & (place_1N >= num_prompt_S1)).float())
    seen_SV.scatter_add_(1, ids_SN, before_SN.float())
    # 2. Repetition, 3. frequency and presence.
    scaled_SV = torch.where(chosen_SV > 0, chosen_SV / repetition_S1, chosen_SV * repetition_S1)
    chosen_SV = torch.where(seen_SV > 0, scaled_SV, chosen_SV)
    chosen_SV = chosen_SV - frequency_S1 * counts_SV - presence_S1 * (counts_SV > 0)
    return logits_SV.index_copy(0, rows_S, chosen_SV)


def choose(logits_SV: Tensor, draws: list[Draw], best_S1: Tensor) -> Tensor:
    """The token (S, 1) of each row: temperature, top-k, top-p, min-p, and the inverse of the cumulative
    distribution at the row's number. Everything that precedes it is in the logits, whose best are given."""
    params = [draw.params for draw in draws]
    if all(p.temperature == 0 for p in params):
        return best_S1
    size = logits_SV.shape[1]
    columns = staging.send(
        [
            np.array([p.temperature for p in params], np.float32),
            np.array([uniform(draw.seed, draw.position) for draw in draws]),
        ],
        logits_SV.device,
    )
    temperature_S1, uniform_S1 = (column.unsqueeze(1) for column in columns)
    # 1. The distribution. The largest logit is subtracted first, or a temperature near 0 would overflow.
    shifted_SV = logits_SV - logits_SV.gather(1, best_S1)
    probs_SV = (shifted_SV / temperature_S1.where(temperature_S1 > 0, 1.0)).softmax(-1)
    # 2. What may be drawn of it.
    if any(p.top_k is not None or p.top_p < 1 or p.min_p > 0 for p in params):
        probs_SV = probs_SV * (probs_SV >= _least(probs_SV, params))
    # 3. The first token whose cumulative probability exceeds u; in float64, or a large vocabulary blurs it.
    cumulative_SV = probs_SV.cumsum(-1, dtype=torch.float64)
    drawn_S1 = torch.searchsorted(cumulative_SV, uniform_S1 * cumulative_SV[:, -1:], right=True)
    drawn_S1 = drawn_S1.clamp_(max=size - 1)  # past the end only where logits are NaN
    return drawn_S1.where(temperature_S1 > 0, best_S1)


def _least(probs_SV: Tensor, params: list[SamplingParams]) -> Tensor:
    """The smallest probability that may be drawn from each row (S, 1)."""
    size, nucleus = probs_SV.shape[1], any(p.top_p < 1 for p in params)
    # 1. Rank the best `top_k` of a row, or those that top-p could want. On a CPU these are counted: all the
    #    tokens below (1 - top_p) / V together weigh less than 1 - top_p, and a full sort would cost more than
    #    the rest of sampling. On CUDA the host would have to wait for the count: all are ranked.
    limits = [min(p.top_k or size, size) if p.top_k or p.top_p < 1 else 1 for p in params]
    if nucleus and not probs_SV.is_cuda:
        negligible_S1 = torch.tensor([[(1 - p.top_p) / size] for p in params])
        wanted = (probs_SV >= negligible_S1).sum(-1).tolist()
        limits = [
            limit if p.top_k else min(limit, max(count, 1))
            for limit, p, count in zip(limits, params, wanted, strict=True)
        ]
    columns = staging.send(
        [
            np.array(limits),
            np.array([p.top_k is not None for p in params], np.int32),
            np.array([p.top_p for p in params]),
            np.array([p.top_k is not None or p.top_p < 1 for p in params], np.int32),
            np.array([p.min_p for p in params], np.float32),
        ],
        probs_SV.device,
    )
    limit_S1, has_top_k_S1, top_p_S1, ranked_S1, min_p_S1 = (column.unsqueeze(1) for column in columns)
    best_SK = probs_SV.topk(max(limits), dim=-1).values
    inside_SK = torch.arange(max(limits), device=probs_SV.device) < limit_S1
    # 2. Of these keep the fewest that reach top_p, in parts of what top-k left (of 1, where it left all).
    reached_SK = (best_SK * inside_SK).cumsum(-1, dtype=torch.float64)
    goal_S1 = top_p_S1 * reached_SK[:, -1:].where(has_top_k_S1 > 0, 1.0)
    inside_SK &= reached_SK - best_SK < goal_S1
    least_S1 = best_SK.gather(1, (inside_SK.sum(-1, keepdim=True) - 1).clamp_(min=0))  # below 0 only for NaN
    # 3. A row that asked for neither has no such bound. Min-p bounds by the ratio to the best.
    return least_S1.where(ranked_S1 > 0, 0.0).maximum(min_p_S1 * best_SK[:, :1])
