"""Rollouts: groups of answers from the very model that is being trained.

An Engine over the Transformer in training samples `group` answers to each question; the judge scores them.
The trainer then runs the same tokens (round_batches.py), to have the log-probabilities it starts from, and to
say how far the two sides are apart.

The law: a rollout is a function of the weights, the questions and a seed. Nothing is copied: the engine is
told that the weights have changed, and reads them.

Shape letters: T tokens, L layers that route, K experts per token.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from shoal.config.tune import GRPOConfig
from shoal.data.text import Tokenizer
from shoal.engine import Completion, Engine, EngineSettings, SamplingParams
from shoal.engine.sampling import hash_pair
from shoal.model.transformer import Output, Transformer
from shoal.stages.appraise import PREFERENCE, Appraiser
from shoal.stages.judge import Judge, Score, chosen
from shoal.train import policy
from shoal.train.policy import PolicyBatch


@dataclass(frozen=True)
class Question:
    ids: tuple[int, ...]  # the prompt
    problem: Mapping[str, Any]  # what the rewards read


@dataclass(frozen=True, eq=False)
class Answer:
    """One answer, as it was drawn."""

    question: Question
    completion: Completion


@dataclass(frozen=True, eq=False)
class Episode(Answer):
    """One answer that was judged."""

    text: str
    score: Score
    reward: float  # the score's total, less what an over-long answer costs
    advantage: float = 0.0

    @property
    def overlong(self) -> bool:
        return self.completion.finish != "stop"

    @property
    def empty(self) -> bool:
        return len(self.completion.ids) < 2 and not self.overlong  # nothing but the end


@dataclass(frozen=True)
class Gap:
    """How far engine and trainer are apart on the same tokens."""

    mean: float  # of |log p - log p|, in nats
    most: float
    routing: float  # share of router choices that differ where the trainer chooses for itself
    replayed: float  # the same where it replays the engine's: 0, or the replay is broken


class Rollout:
    """Samples from `model` and scores, by rules and by the `appraiser` where a problem asks for preference.
    What is drawn need not be scored at once: a trainer's device can work meanwhile.

    The model is in `eval` mode while it samples, and left as it was.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        judge: Judge,
        config: GRPOConfig,
        appraiser: Appraiser | None = None,
    ) -> None:
        self.model, self.tokenizer, self.judge, self.config = model, tokenizer, judge, config
        self.appraiser = appraiser
        settings = config.rollout
        self.records = settings.replay and model.config.moe is not None
        self.engine = Engine(
            model,
            EngineSettings(
                cache_bytes=settings.cache_bytes,
                max_sequences=settings.max_sequences,
                max_batch_tokens=max(settings.max_batch_tokens, settings.max_sequences),
                decode_steps=settings.decode_steps,
            ),
        )
        self.hand_over_seconds = 0.0  # between the trainer's last step and the engine's first

    def warm_up(self, tell: Callable[[str], None] = lambda what: None) -> None:
        """Do now what rounds would do the first time they meet a size: on CUDA graphs are recorded. `tell` is
        told what begins."""
        training = self.model.training
        self.model.eval()
        self.engine.warm_up(tell)
        self.model.train(training)

    def hand_over(self) -> None:
        """The trainer's weights to the engine, which reads them where they are and forgets older prefixes."""
        start = time.perf_counter()
        self.model.eval()
        self.engine.forget_prefixes()
        self.hand_over_seconds = time.perf_counter() - start

    def sample(self, questions: Sequence[Question], seed: int) -> list[list[Episode]]:
        """A group of answers to each question, with advantages."""
        return self.weigh(self.draw(questions, seed))

    def draw(self, questions: Sequence[Question], seed: int) -> list[list[Answer]]:
        """A group of answers to each question."""
        settings = self.config.rollout
        params = SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k or None,
            max_tokens=settings.max_tokens,
            logprobs=settings.top_k if settings.keep_sampling else 0,
            routing=self.records,
        )
        return self._answer(questions, settings.group, params, seed)

    def weigh(self, groups: Sequence[Sequence[Answer]]) -> list[list[Episode]]:
        """The groups with scores and advantages."""
        return [self._weigh(self._appraise(group)) for group in self._judge(groups)]

    def _appraise(self, group: list[Episode]) -> list[Episode]:
        """The group with what the reward model thinks of it, where that counts."""
        preference, problem = self.config.preference, group[0].question.problem
        if self.appraiser is None or preference is None or not chosen(problem, [PREFERENCE]):
            return group
        values = self.appraiser.compare(
            [[*episode.question.ids, *episode.completion.ids] for episode in group], preference.kind
        )
        return [
            replace(
                episode,
                score=replace(
                    episode.score,
                    total=episode.score.total + preference.weight * value,
                    parts={**episode.score.parts, PREFERENCE: value},
                ),
                reward=episode.reward + preference.weight * value,
            )
            for episode, value in zip(group, values, strict=True)
        ]

    def _weigh(self, group: list[Episode]) -> list[Episode]:
        rewards = torch.tensor([episode.reward for episode in group], dtype=torch.float64)
        values = policy.advantages(rewards, self.config.policy.variant).tolist()
        return [replace(episode, advantage=value) for episode, value in zip(group, values, strict=True)]

    def _answer(
        self, questions: Sequence[Question], count: int, params: SamplingParams, seed: int
    ) -> list[list[Answer]]:
        asked = [question for question in questions for _ in range(count)]
        each = [params.seeded(hash_pair(seed, n)) for n in range(len(asked))]
        training = self.model.training
        try:
            self.hand_over()
            completions = self.engine.generate([list(question.ids) for question in asked], each)
        finally:
            self.model.train(training)
        if bad := sum(completion.finish == "error" for completion in completions):
            raise FloatingPointError(f"{bad} of {len(asked)} answers ended in logits that are not numbers")
        answers = [Answer(*pair) for pair in zip(asked, completions, strict=True)]
        return [answers[start : start + count] for start in range(0, len(answers), count)]

    def _judge(self, groups: Sequence[Sequence[Answer]]) -> list[list[Episode]]:
        answers = [answer for group in groups for answer in group]
        texts = [self.tokenizer.decode(each.completion.ids, skip_special=True) for each in answers]
        scores = self.judge.score(texts, [each.question.problem for each in answers])
        limit, buffer = self.config.rollout.max_tokens, self.config.policy.overlong_buffer
        judged = (
            Episode(
                each.question,
                each.completion,
                text,
                score,
                score.total + policy.overlong_penalty(len(each.completion.ids), limit, buffer),
            )
            for each, text, score in zip(answers, texts, scores, strict=True)
        )
        return [[next(judged) for _ in group] for group in groups]

    def evaluate(
        self, questions: Sequence[Question], count: int, seed: int, temperature: float | None = None
    ) -> list[list[Episode]]:
        """`count` answers to each question, judged by rules alone: for pass@k at temperature 1, unless it is
        given; a single one is the most probable."""
        if temperature is None:
            temperature = 0.0 if count == 1 else 1.0
        params = SamplingParams(temperature=temperature, max_tokens=self.config.rollout.max_tokens)
        return self._judge(self._answer(questions, count, params, seed))


def are_judged(groups: Sequence[Sequence[Answer]]) -> TypeGuard[Sequence[Sequence[Episode]]]:
    return all(isinstance(answer, Episode) for group in groups for answer in group)


def is_flat(group: Iterable[Episode]) -> bool:
    """Whether a group teaches nothing: all its rewards are equal."""
    rewards = [episode.reward for episode in group]
    return max(rewards) - min(rewards) < 1e-6


def count(groups: Sequence[Sequence[Episode]]) -> dict[str, float]:
    """What happened in a rollout, for its record."""
    episodes = [episode for group in groups for episode in group]
    lengths = [len(episode.completion.ids) for episode in episodes]
    told: dict[str, float] = {
        "reward": sum(episode.reward for episode in episodes) / len(episodes),
        "length": sum(lengths) / len(lengths),
        "longest": max(lengths),
        "answers": len(episodes),
        "equal_groups": sum(is_flat(group) for group in groups) / len(groups),
        "empty": sum(episode.empty for episode in episodes),
        "overlong": sum(episode.overlong for episode in episodes),
    }
    for name in dict.fromkeys(name for episode in episodes for name in episode.score.parts):
        values = [episode.score.parts[name] for episode in episodes if name in episode.score.parts]
        told[f"reward/{name}"] = sum(values) / len(values)
    faults = Counter(fault for episode in episodes for fault in episode.score.faults.values())
    return told | {f"fault/{fault}": number for fault, number in sorted(faults.items())}


@torch.no_grad()
def look_back(
    model: Transformer,
    batch: PolicyBatch,
    temperature: float,
    reference: Transformer | None,
    known: Output | None = None,
) -> PolicyBatch:
    """The batch with the log-probabilities that the trainer, and the reference, give its answers. `known` as
    in `measure_gap`."""
    out: Output = model(batch) if known is None else known
    old_T = _log_probs(model, out.hidden_TD / temperature, batch)
    # The reference routes as it likes: the record is of the policy's experts, not of its.
    reference_T = (
        None if reference is None else answer_log_probs(reference, replace(batch, routing=None), temperature)
    )
    return replace(batch, old_T=old_T, reference_T=reference_T)


def follow_teacher(batch: PolicyBatch) -> PolicyBatch:
    """On-policy distillation: each token is worth log teacher - log policy.

    Its expectation under the policy is minus KL(policy || teacher) at that place, so the policy gradient of
    it is that of the reverse KL, token by token (the form of V4's last stage, arXiv 2606.19348, and of GKD,
    arXiv 2306.13649, with lambda 1; sampled, where they may sum over the vocabulary).
    """
    assert batch.reference_T is not None and batch.old_T is not None
    return replace(batch, advantages_T=batch.reference_T - batch.old_T)


def answer_log_probs(model: Transformer, batch: PolicyBatch, temperature: float) -> Tensor:
    """(T,): log-probability of each sampled token, 0 at the others."""
    return _log_probs(model, model(batch).hidden_TD / temperature, batch)


def _log_probs(model: Transformer, hidden_TD: Tensor, batch: PolicyBatch) -> Tensor:
    assert batch.targets_T is not None and batch.weights_T is not None
    if batch.kept_TK is None:
        logp_T = policy.log_probs(hidden_TD, model.head_weight(), batch.targets_T)
    else:
        logp_T = policy.kept_log_probs(hidden_TD, model.head_weight(), batch.targets_T, batch.kept_TK)
    return torch.where(batch.weights_T != 0, logp_T, 0.0)


@torch.no_grad()
def measure_gap(model: Transformer, batch: PolicyBatch, known: Output | None = None) -> Gap:
    """Engine against trainer, at temperature 1 and over all tokens, which is what the engine reports.
    `known` is what the model gives, where that is there already."""
    assert batch.sampled_T is not None and batch.weights_T is not None
    out: Output = model(batch) if known is None else known
    ours_T = _log_probs(model, out.hidden_TD, replace(batch, kept_TK=None))
    gap_T = torch.where(batch.weights_T != 0, ours_T - batch.sampled_T, 0.0).abs()
    told = [gap_T.sum() / batch.weights_T.count_nonzero(), gap_T.max()]
    if batch.routing is not None:
        own = model(replace(batch, routing=None))
        told += [_differing(own, batch.routing), _differing(out, batch.routing)]
    mean, most, *routing = torch.stack(told).tolist()
    return Gap(mean, most, *(routing or (0.0, 0.0)))


def _differing(output: Output, record_TLK: Tensor) -> Tensor:
    """The share of choices that are not on record."""
    chosen_TLK = torch.stack([layer.experts_TK for layer in output.routing], 1)
    same_TLK = (chosen_TLK.unsqueeze(-1) == record_TLK.unsqueeze(-2)).any(-1)
    return 1 - same_TLK.float().mean()
