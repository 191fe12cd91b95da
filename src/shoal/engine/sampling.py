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
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shoal.engine import staging
from shoal.engine.sequence import SamplingParams, Top
from shoal.ops import api as ops

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


class Drawn(NamedTuple):
    """Tokens, and log-probabilities as the model has them: before all that was asked for. On the device."""

    tokens_S1: Tensor  # int64
    logprobs_S1: Tensor
    top_ids_SK: Tensor
    top_logprobs_SK: Tensor

    def pack(self) -> Tensor:
        """All of it as float64, which holds every id exactly: (..., 2 + 2K)."""
        return torch.cat([column.double() for column in self if column.shape[-1]], dim=-1)


class Sample(NamedTuple):
    token: int
    logprob: float  # not finite where NaN or +inf was among the logits
    top: Top  # the `params.logprobs` most probable tokens


class Samples(NamedTuple):
    """What was drawn, on the host: columns of as many rows."""

    tokens: list[int]
    logprobs: list[float]
    tops: list[Top] | None  # None where no row asked for any
    finite: bool  # all log-probabilities of the step

    def part(self, start: int, end: int) -> Samples:
        tops = None if self.tops is None else self.tops[start:end]
        return Samples(self.tokens[start:end], self.logprobs[start:end], tops, self.finite)


def read(packed: Tensor, counts: Iterable[int]) -> Samples:
    """What `Drawn.pack` gave, on the host; `counts` are the `params.logprobs` of its rows."""
    columns = packed.numpy()
    tokens, logprobs = columns[:, 0].astype(np.int64).tolist(), columns[:, 1].tolist()
    most, finite = (packed.shape[1] - 2) // 2, bool(np.isfinite(columns[:, 1]).all())
    if not most:
        return Samples(tokens, logprobs, None, finite)
    ids, best = columns[:, 2 : 2 + most].astype(np.int64).tolist(), columns[:, 2 + most :].tolist()
    tops = [tuple(zip(*row, strict=True))[:count] for *row, count in zip(ids, best, counts, strict=True)]
    return Samples(tokens, logprobs, tops, finite)


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


def uniforms(seeds: Sequence[int], positions: np.ndarray) -> np.ndarray:
    """`uniform` of each seed (S,) at each of its positions (..., S)."""
    bits = _mix_all(_mix_all(np.array(seeds, np.uint64)) ^ positions.astype(np.uint64))
    return (bits >> np.uint64(12)) * 2.0**-52


def _mix_all(bits: np.ndarray) -> np.ndarray:
    """`_mix` of each."""
    bits = bits + np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


class Wishes:
    """How rows are sampled, once or several times at positions that follow: to the device in one transfer."""

    def __init__(self, draws: list[Draw], device: torch.device, times: int = 1) -> None:
        params = [draw.params for draw in draws]
        self.bends, self.most = any(map(bends, draws)), max((p.logprobs for p in params), default=0)
        hot = [row for row, p in enumerate(params) if p.temperature > 0]
        # A CPU need not draw the others: they are taken in two calls instead of twenty.
        spares = device.type != "cuda" and not ops.is_batch_invariant()
        self._hot = hot if spares else list(range(len(draws)))
        self._cold = [row for row, p in enumerate(params) if p.temperature == 0] if spares else []
        self._columns: list[Tensor] = []
        if self._hot:
            at_KS = np.arange(times)[:, None] + np.array([draw.position for draw in draws])
            self._columns = staging.send(
                [
                    np.array([p.temperature for p in params], np.float32),
                    np.array([p.top_k or 0 for p in params], np.int32),
                    np.array([p.top_p for p in params], np.float64),
                    np.array([p.min_p for p in params], np.float32),
                    *uniforms([draw.seed for draw in draws], at_KS),  # each aligned, as kernels expect
                ],
                device,
            )

    def choose(self, logits_SV: Tensor, scores_SV: Tensor | None = None, time: int = 0) -> ops.Sampled:
        """A token for each row by `ops.sample`, from the scores if there are any."""
        if not self._hot:
            return _take_best(logits_SV, scores_SV)
        columns = [*self._columns[:4], self._columns[4 + time]]
        drawn = ops.sample(logits_SV, *columns, scores_SV=scores_SV)
        if not self._cold:
            return drawn
        # By the same sums as where all rows are: a row's bits are its own.
        rows_S = torch.tensor(self._cold)
        best = _take_best(logits_SV[rows_S], None if scores_SV is None else scores_SV[rows_S])
        both = zip(drawn, best, strict=True)
        return ops.Sampled(*(all_S.index_copy(0, rows_S, some_S) for all_S, some_S in both))


def draw(
    logits_SV: Tensor,
    draws: list[Draw],
    history: History | None = None,
    allowed_SV: Tensor | None = None,
    *,
    wishes: Wishes | None = None,
    time: int = 0,
) -> Drawn:
    """One token for each row. Launches only, on CUDA. `allowed_SV` are the tokens that grammars leave;
    `wishes` may be there for several times."""
    wishes = wishes or Wishes(draws, logits_SV.device)
    scores_SV = _bend(logits_SV, draws, history) if wishes.bends else None
    if allowed_SV is not None:
        scores_SV = logits_SV.float() if scores_SV is None else scores_SV
        scores_SV = scores_SV.masked_fill(~allowed_SV, -math.inf)
    drawn = wishes.choose(logits_SV, scores_SV, time)
    tokens_S1, logprobs_S1 = (row.unsqueeze(1) for row in drawn)
    best, ids = logprobs_S1[:, :0], tokens_S1[:, :0]
    if wishes.most:
        best, ids = logits_SV.float().topk(wishes.most, dim=-1)
        best = best - (logits_SV.gather(1, tokens_S1).float() - logprobs_S1)  # less the log of the total
    return Drawn(tokens_S1, logprobs_S1, ids, best)


def bends(draw: Draw) -> bool:
    """Whether the logits are not what is drawn from."""
    return bool(draw.params.penalises or draw.params.logit_bias or draw.banned_ids)


def sample(logits_SV: Tensor, draws: list[Draw], history: History | None = None) -> list[Sample]:
    """One token for each row, on the host."""
    packed = draw(logits_SV, draws, history).pack()
    tokens, logprobs, tops, _ = read(packed.cpu(), [draw.params.logprobs for draw in draws])
    return [Sample(*row) for row in zip(tokens, logprobs, tops or [()] * len(tokens), strict=True)]


def choose(logits_SV: Tensor, draws: list[Draw], scores_SV: Tensor | None = None) -> ops.Sampled:
    """A token for each row by `ops.sample`, from the scores if there are any."""
    return Wishes(draws, logits_SV.device).choose(logits_SV, scores_SV)


def _take_best(logits_SV: Tensor, scores_SV: Tensor | None) -> ops.Sampled:
    logits_SV = logits_SV.float()
    scores_SV = logits_SV if scores_SV is None else scores_SV
    if (drawn := ops.greedy_step(logits_SV, scores_SV)) is not None:
        return drawn
    tokens_S1 = scores_SV.argmax(-1, keepdim=True)
    logprobs_S1 = logits_SV.gather(1, tokens_S1) - logits_SV.logsumexp(-1, keepdim=True)
    return ops.Sampled(tokens_S1.squeeze(1), logprobs_S1.squeeze(1))


def _bend(logits_SV: Tensor, draws: list[Draw], history: History | None) -> Tensor | None:
    """What the logits become, in float32, by penalties, biases and bans, in this order; None if they stay."""
    scores_SV = None
    if rows := [row for row, draw in enumerate(draws) if draw.params.penalises]:
        assert history is not None
        scores_SV = _penalise(logits_SV, draws, rows, history)
    shifts = [
        (row, token, shift)
        for row, draw in enumerate(draws)
        for token, shift in (*draw.params.logit_bias, *((banned, -math.inf) for banned in draw.banned_ids))
    ]
    if shifts:
        scores_SV = logits_SV.float() if scores_SV is None else scores_SV
        rows_X, ids_X, shifts_X = map(np.array, zip(*shifts, strict=True))
        index = staging.send([rows_X, ids_X, shifts_X.astype(np.float32)], logits_SV.device)
        scores_SV = scores_SV.index_put((index[0], index[1]), index[2], accumulate=True)
    return scores_SV


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
    scores_SV = ops.penalise(logits_SV[rows_S], history.ids(rows, max(positions)), *columns)
    return logits_SV.float().index_copy(0, rows_S, scores_SV)
