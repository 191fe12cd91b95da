"""The batches of a round: answers dealt to optimizer steps and micro-batches, and laid end to end.

An answer with its prompt is one sequence of a PolicyBatch, with the engine's log-probabilities and the
experts that its tokens were sent to. What it is worth comes later (`give_advantages`): the trainer's device
may look back at a round that is still being judged.

The law: a batch is a function of its answers and the recipe.

Shape letters: T tokens, S answers of a batch, A sampled tokens of all, K tokens that could be drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from shoal.batch import Batch
from shoal.config.tune import GRPOConfig, RolloutConfig
from shoal.engine import Completion
from shoal.stages.rollout import Answer
from shoal.train import policy
from shoal.train.policy import PolicyBatch


def deal(answers: Sequence[Answer], config: GRPOConfig, order: torch.Generator) -> list[list[list[int]]]:
    """The numbers of the answers of a round in its micro-batches: [step][micro-batch].

    They are dealt to optimizer steps at random, and to the micro-batches of a step by length, so that these
    are of like size.
    """
    lengths = [len(answer.completion.ids) for answer in answers]
    shuffled = torch.randperm(len(answers), generator=order).tolist()
    per_step, parts = len(shuffled) // config.steps_per_round, config.train.accumulation
    dealt = []
    for first in range(0, len(shuffled), per_step):
        ranked = sorted(shuffled[first : first + per_step], key=lambda i: lengths[i])
        dealt.append([ranked[part::parts] for part in range(parts)])
    return dealt


def batches_of(
    answers: Sequence[Answer], dealt: list[list[list[int]]], config: GRPOConfig, device: torch.device
) -> list[list[PolicyBatch]]:
    """The answers of a round as they were dealt."""
    steps: list[list[PolicyBatch]] = []
    for parts in dealt:
        ours = [i for part in parts for i in part]
        lengths = [len(answers[i].completion.ids) for i in ours]
        shares = policy.shares(lengths, config.policy.variant, config.rollout.max_tokens)
        share_of = dict(zip(ours, shares, strict=True))
        steps.append(
            [
                to_batch([answers[i] for i in part], [share_of[i] for i in part], config.rollout, device)
                for part in parts
            ]
        )
    return steps


def to_batch(
    given: Sequence[Answer], shares: Sequence[float], settings: RolloutConfig, device: torch.device
) -> PolicyBatch:
    """Answers laid end to end, without what they are worth. The last token of each is predicted and never
    read, so it has no row."""
    answers = [answer.completion for answer in given]
    prompt_S = np.array([len(answer.question.ids) for answer in given])
    answer_S = np.array([len(answer.ids) for answer in answers])
    # 1. All tokens of all; each is read but the last of a sequence, and predicted but the first.
    texts = [ids for answer in given for ids in (answer.question.ids, answer.completion.ids)]
    tokens, ends_S = _flat(texts, np.int64), (prompt_S + answer_S).cumsum()
    rows_S = prompt_S + answer_S - 1
    bounds_S1 = np.concatenate(([0], rows_S.cumsum()))
    ids_T = np.delete(tokens, ends_S - 1)
    targets_T = np.delete(tokens, ends_S - prompt_S - answer_S)
    positions_T = np.arange(len(ids_T)) - bounds_S1[:-1].repeat(rows_S)
    # 2. What is said of answers alone is 0 at the rows that predict a prompt.
    drawn_T = positions_T >= (prompt_S - 1).repeat(rows_S)
    sampled_T = np.zeros(len(ids_T))
    sampled_T[drawn_T] = _flat([answer.logprobs for answer in answers], np.float64)

    def place(array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(array).to(dtype).to(device)

    routing = [answer.routing for answer in answers if answer.routing is not None]
    return PolicyBatch(
        ids_T=place(ids_T, torch.int64),
        positions_T=place(positions_T, torch.int64),
        cu_seqlens_S1=place(bounds_S1, torch.int32),
        max_seqlen=int(rows_S.max()),
        targets_T=place(targets_T, torch.int64),
        weights_T=place(np.where(drawn_T, np.array(shares).repeat(rows_S), 0.0), torch.float32),
        routing=torch.cat(routing).to(device).long() if len(routing) == len(answers) else None,
        sampled_T=place(sampled_T, torch.float32),
        answers_T=place(np.arange(len(given)).repeat(rows_S), torch.int64),
        kept_TK=place(_support(answers, targets_T, drawn_T, settings), torch.int64)
        if settings.keep_sampling
        else None,
    )


def give_advantages(batch: PolicyBatch, advantages: Sequence[float]) -> PolicyBatch:
    """The batch with what each of its answers is worth, at each of its tokens."""
    assert batch.weights_T is not None
    worth_S = torch.tensor(advantages, dtype=torch.float32).to(batch.weights_T.device)
    return replace(batch, advantages_T=torch.where(batch.weights_T != 0, worth_S[batch.answers_T], 0.0))


def _flat(rows: Sequence[Sequence[float]], dtype: type) -> np.ndarray:
    return np.fromiter(chain.from_iterable(rows), dtype, sum(map(len, rows)))


def _support(
    answers: Sequence[Completion], targets_T: np.ndarray, drawn_T: np.ndarray, settings: RolloutConfig
) -> np.ndarray:
    """(T, K): what could be drawn of what top-k left, the fewest that reach top_p, then what was drawn, if it
    is none of them; -1 past those. Of a prompt its token alone."""
    best_AK2 = np.array([top for answer in answers for top in answer.tops])
    ids_AK, logprobs_AK = best_AK2[..., 0].astype(np.int64), torch.from_numpy(best_AK2[..., 1])
    probs_AK = (logprobs_AK / settings.temperature).softmax(-1)
    inside_AK = (probs_AK.cumsum(-1) - probs_AK < settings.top_p).numpy()
    known_A = (inside_AK & (ids_AK == targets_T[drawn_T][:, None])).any(-1)
    kept_TK = np.full((len(targets_T), ids_AK.shape[1] + 1), -1)
    kept_TK[drawn_T, :-1] = np.where(inside_AK, ids_AK, -1)
    kept_TK[:, -1] = targets_T
    kept_TK[np.flatnonzero(drawn_T)[known_A], -1] = -1
    kept_TK = np.take_along_axis(kept_TK, (kept_TK < 0).argsort(-1, kind="stable"), -1)
    return kept_TK[:, : (kept_TK >= 0).sum(-1).max()]


def as_tensors(batch: Batch) -> dict[str, Tensor]:
    """A batch as what safetensors can hold; `max_seqlen` follows from the rest."""
    return {name: value.contiguous() for name, value in vars(batch).items() if isinstance(value, Tensor)}


def from_tensors(tensors: Mapping[str, Tensor]) -> PolicyBatch:
    longest = int(tensors["cu_seqlens_S1"].diff().max())
    return PolicyBatch(**tensors, max_seqlen=longest)  # type: ignore[arg-type]
