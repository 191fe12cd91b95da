"""Rollouts: groups of answers from the very model that is being trained, and the batches they become.

An Engine over the Transformer in training samples `group` answers to each question; the judge scores them;
each answer with its prompt becomes one sequence of a PolicyBatch, with its advantage, the engine's
log-probabilities and the experts that its tokens were sent to. The trainer then runs the same tokens, to have
the log-probabilities it starts from, and to say how far the two sides are apart.

The law: a rollout is a function of the weights, the questions and a seed. Nothing is copied: the engine is
told that the weights have changed, and reads them.

Shape letters: T tokens, L layers that route, K experts per token.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from shoal.batch import Batch
from shoal.config.tune import GRPOConfig, RolloutConfig
from shoal.data.text import Tokenizer
from shoal.engine import Completion, Engine, EngineSettings, SamplingParams
from shoal.engine.sampling import hash_pair
from shoal.model.transformer import Transformer
from shoal.stages.appraise import PREFERENCE, Appraiser
from shoal.stages.judge import Judge, Score, chosen
from shoal.train import policy
from shoal.train.policy import PolicyBatch


@dataclass(frozen=True)
class Question:
    ids: tuple[int, ...]  # the prompt
    problem: Mapping[str, Any]  # what the rewards read


@dataclass(frozen=True, eq=False)
class Episode:
    """One answer."""

    question: Question
    completion: Completion
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
                max_batch_tokens=max(2048, settings.max_sequences),
            ),
        )
        self.hand_over_seconds = 0.0  # between the trainer's last step and the engine's first

    def hand_over(self) -> None:
        """The trainer's weights to the engine, which reads them where they are and forgets older prefixes."""
        start = time.perf_counter()
        self.model.eval()
        self.engine.forget_prefixes()
        self.hand_over_seconds = time.perf_counter() - start

    def sample(self, questions: Sequence[Question], seed: int) -> list[list[Episode]]:
        """A group of answers to each question, with advantages."""
        settings = self.config.rollout
        params = SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k or None,
            max_tokens=settings.max_tokens,
            logprobs=settings.top_k if settings.keep_sampling else 0,
            routing=self.records,
        )
        answers = self._answer(questions, settings.group, params, seed)
        return [self._weigh(self._appraise(group)) for group in answers]

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
    ) -> list[list[Episode]]:
        asked = [question for question in questions for _ in range(count)]
        each = [replace(params, seed=hash_pair(seed, n)) for n in range(len(asked))]
        training = self.model.training
        try:
            self.hand_over()
            completions = self.engine.generate([list(question.ids) for question in asked], each)
        finally:
            self.model.train(training)
        if bad := sum(completion.finish == "error" for completion in completions):
            raise FloatingPointError(f"{bad} of {len(asked)} answers ended in logits that are not numbers")
        texts = [self.tokenizer.decode(completion.ids, skip_special=True) for completion in completions]
        scores = self.judge.score(texts, [question.problem for question in asked])
        limit, buffer = self.config.rollout.max_tokens, self.config.policy.overlong_buffer
        episodes = [
            Episode(
                question,
                completion,
                text,
                score,
                score.total + policy.overlong_penalty(len(completion.ids), limit, buffer),
            )
            for question, completion, text, score in zip(asked, completions, texts, scores, strict=True)
        ]
        return [episodes[start : start + count] for start in range(0, len(episodes), count)]

    def evaluate(
        self, questions: Sequence[Question], count: int, seed: int, temperature: float | None = None
    ) -> list[list[Episode]]:
        """`count` answers to each question, judged by rules alone: for pass@k at temperature 1, unless it is
        given; a single one is the most probable."""
        if temperature is None:
            temperature = 0.0 if count == 1 else 1.0
        params = SamplingParams(temperature=temperature, max_tokens=self.config.rollout.max_tokens)
        return self._answer(questions, count, params, seed)


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


def to_batch(
    episodes: Sequence[Episode], shares: Sequence[float], settings: RolloutConfig, device: torch.device
) -> PolicyBatch:
    """Answers laid end to end. The last token of each is predicted and never read, so it has no row."""
    ids: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    values: list[float] = []
    sampled: list[float] = []
    bounds = [0]
    kept: list[list[int]] = []
    for episode, share in zip(episodes, shares, strict=True):
        prompt, answer = list(episode.question.ids), list(episode.completion.ids)
        before = len(prompt) - 1  # rows that predict a token of the prompt
        ids += (prompt + answer)[:-1]
        targets += (prompt + answer)[1:]
        weights += [0.0] * before + [share] * len(answer)
        values += [0.0] * before + [episode.advantage] * len(answer)
        sampled += [0.0] * before + list(episode.completion.logprobs)
        bounds.append(len(ids))
        if settings.keep_sampling:
            kept += [[target] for target in prompt[1:]]
            tops = zip(answer, episode.completion.tops, strict=True)
            kept += [_support(token, top, settings) for token, top in tops]
    lengths = torch.tensor(bounds).diff()
    routing = [episode.completion.routing for episode in episodes]
    return PolicyBatch(
        ids_T=torch.tensor(ids, device=device),
        positions_T=torch.cat([torch.arange(n) for n in lengths.tolist()]).to(device),
        cu_seqlens_S1=torch.tensor(bounds, dtype=torch.int32, device=device),
        max_seqlen=int(lengths.max()),
        targets_T=torch.tensor(targets, device=device),
        weights_T=torch.tensor(weights, device=device),
        routing=None
        if any(record is None for record in routing)
        else torch.cat([record for record in routing if record is not None]).long().to(device),
        advantages_T=torch.tensor(values, device=device),
        sampled_T=torch.tensor(sampled, device=device),
        answers_T=torch.arange(len(episodes)).repeat_interleave(lengths).to(device),
        kept_TK=_pad(kept, device) if settings.keep_sampling else None,
    )


def _support(token: int, top: Sequence[tuple[int, float]], settings: RolloutConfig) -> list[int]:
    """What could be drawn of what top-k left, `top`: the fewest that reach top_p. `token` is one of them."""
    logprobs = torch.tensor([logprob for _, logprob in top], dtype=torch.float64)
    probs = (logprobs / settings.temperature).softmax(0)
    needed = int((probs.cumsum(0) - probs < settings.top_p).sum())
    return list(dict.fromkeys([*(candidate for candidate, _ in top[:needed]), token]))


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], device=device)


@torch.no_grad()
def look_back(
    model: Transformer, batch: PolicyBatch, temperature: float, reference: Transformer | None
) -> PolicyBatch:
    """The batch with the log-probabilities that the trainer, and the reference, give its answers."""
    old_T = answer_log_probs(model, batch, temperature)
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
    assert batch.targets_T is not None and batch.weights_T is not None
    hidden_TD = model(batch).hidden_TD / temperature
    if batch.kept_TK is None:
        logp_T = policy.log_probs(hidden_TD, model.head_weight(), batch.targets_T)
    else:
        logp_T = policy.kept_log_probs(hidden_TD, model.head_weight(), batch.targets_T, batch.kept_TK)
    return torch.where(batch.weights_T != 0, logp_T, 0.0)


@torch.no_grad()
def measure_gap(model: Transformer, batch: PolicyBatch) -> Gap:
    """Engine against trainer, at temperature 1 and over all tokens, which is what the engine reports."""
    assert batch.sampled_T is not None and batch.weights_T is not None
    plain = replace(batch, kept_TK=None)
    sampled_T = batch.weights_T != 0
    ours_T = answer_log_probs(model, plain, 1.0)
    gap_T = (ours_T - batch.sampled_T)[sampled_T].abs()
    routing = replayed = 0.0
    if batch.routing is not None:
        routing = _differing(model(replace(plain, routing=None)), batch.routing)
        replayed = _differing(model(plain), batch.routing)
    return Gap(float(gap_T.mean()), float(gap_T.max()), routing, replayed)


def _differing(output: Any, record_TLK: Tensor) -> float:
    chosen_TLK = torch.stack([layer.experts_TK for layer in output.routing], 1)
    same_TLK = (chosen_TLK.unsqueeze(-1) == record_TLK.unsqueeze(-2)).any(-1)
    return 1 - float(same_TLK.float().mean())


def batches_of(
    groups: Sequence[Sequence[Episode]], config: GRPOConfig, order: torch.Generator, device: torch.device
) -> list[list[PolicyBatch]]:
    """A round as micro-batches of optimizer steps: [step][micro-batch]. Answers are dealt to steps at random,
    and to the micro-batches of a step by length, so that these are of like size."""
    episodes = [episode for group in groups for episode in group]
    shuffled = [episodes[i] for i in torch.randperm(len(episodes), generator=order).tolist()]
    per_step = len(shuffled) // config.steps_per_round
    steps: list[list[PolicyBatch]] = []
    for first in range(0, len(shuffled), per_step):
        ours = shuffled[first : first + per_step]
        lengths = [len(episode.completion.ids) for episode in ours]
        shares = policy.shares(lengths, config.policy.variant, config.rollout.max_tokens)
        ranked = sorted(range(len(ours)), key=lambda i: lengths[i])
        parts = config.train.accumulation
        steps.append(
            [
                to_batch(
                    [ours[i] for i in ranked[part::parts]],
                    [shares[i] for i in ranked[part::parts]],
                    config.rollout,
                    device,
                )
                for part in range(parts)
            ]
        )
    return steps


def as_tensors(batch: Batch) -> dict[str, Tensor]:
    """A batch as what safetensors can hold; `max_seqlen` follows from the rest."""
    return {name: value.contiguous() for name, value in vars(batch).items() if isinstance(value, Tensor)}


def from_tensors(tensors: Mapping[str, Tensor]) -> PolicyBatch:
    longest = int(tensors["cu_seqlens_S1"].diff().max())
    return PolicyBatch(**tensors, max_seqlen=longest)  # type: ignore[arg-type]
