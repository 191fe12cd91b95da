"""Laws of the policy losses: each has the value and the gradient of the formula its paper prints.

The formulas are written out a second time here, answer by answer and token by token, on the full logits in
float64, and differentiated by autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.config.policy import PUBLISHED, PolicyConfig, Variant, published
from shoal.train import policy
from shoal.train.objective import Step
from shoal.train.policy import Policy, PolicyBatch
from tests.train import parts

PROMPT = 3
LENGTHS = (6, 1, 9, 4)  # sampled tokens of each answer; those of a prompt come before
REWARDS = (1.0, 0.0, 0.0, 0.5)
MAX_TOKENS = 9
V, D = 40, 12


class Case:
    """A group of answers over random hidden states, off policy enough that every clip binds somewhere."""

    def __init__(self, variant: Variant, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        rows = sum(PROMPT + length for length in LENGTHS)
        self.hidden = normal(rows, D).requires_grad_()
        self.head = (0.5 * normal(V, D)).requires_grad_()
        self.targets = torch.randint(0, V, (rows,), generator=generator)
        logp = policy.log_probs(self.hidden, self.head, self.targets)
        sampled = torch.zeros(rows)
        index, share, advantage = [], [], []
        values = policy.advantages(torch.tensor(REWARDS, dtype=torch.float64), variant)
        weights = policy.shares(LENGTHS, variant, MAX_TOKENS)
        for i, length in enumerate(LENGTHS):
            sampled[len(index) + PROMPT : len(index) + PROMPT + length] = 1
            index += [i] * (PROMPT + length)
            share += [0.0] * PROMPT + [weights[i]] * length
            advantage += [0.0] * PROMPT + [float(values[i])] * length
        self.answers = policy.Answers(
            share_T=torch.tensor(share, dtype=torch.float64),
            advantage_T=torch.tensor(advantage, dtype=torch.float64),
            old_T=(logp + 0.5 * normal(rows)) * sampled,
            sampled_T=(logp + 0.5 * normal(rows)) * sampled,
            reference_T=(logp + 0.5 * normal(rows)) * sampled,
            answer_T=torch.tensor(index),
            count=len(LENGTHS),
        )

    def tokens(self, i: int) -> list[int]:
        start = sum(PROMPT + length for length in LENGTHS[:i]) + PROMPT
        return list(range(start, start + LENGTHS[i]))


def grpo(case: Case, logp: Tensor, s: PolicyConfig) -> Tensor:
    """DeepSeekMath eq. 3 and 4, negated."""
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    A = (rewards - rewards.mean()) / rewards.std(correction=0)
    total = logp.new_zeros(())
    for i in range(len(LENGTHS)):
        for t in case.tokens(i):
            ratio = (logp[t] - case.answers.old_T[t]).exp()
            gain = torch.min(ratio * A[i], ratio.clamp(1 - s.clip_low, 1 + s.clip_high) * A[i])
            if s.importance_cap:
                mismatch = math.exp(float(case.answers.old_T[t] - case.answers.sampled_T[t]))
                gain = gain * min(mismatch, s.importance_cap)
            assert case.answers.reference_T is not None
            away = case.answers.reference_T[t] - logp[t]
            total = total - (gain - s.kl_weight * (away.exp() - away - 1)) / (len(LENGTHS) * LENGTHS[i])
    return total


def dr_grpo(case: Case, logp: Tensor, s: PolicyConfig) -> Tensor:
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    A, total = rewards - rewards.mean(), logp.new_zeros(())
    for i in range(len(LENGTHS)):
        for t in case.tokens(i):
            ratio = (logp[t] - case.answers.old_T[t]).exp()
            gain = torch.min(ratio * A[i], ratio.clamp(1 - s.clip_low, 1 + s.clip_high) * A[i])
            total = total - gain / (len(LENGTHS) * MAX_TOKENS)
    return total


def dapo(case: Case, logp: Tensor, s: PolicyConfig) -> Tensor:
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    A, total = (rewards - rewards.mean()) / rewards.std(correction=0), logp.new_zeros(())
    for i in range(len(LENGTHS)):
        for t in case.tokens(i):
            ratio = (logp[t] - case.answers.old_T[t]).exp()
            total = total - torch.min(ratio * A[i], ratio.clamp(1 - s.clip_low, 1 + s.clip_high) * A[i])
    return total / sum(LENGTHS)


def gspo(case: Case, logp: Tensor, s: PolicyConfig) -> Tensor:
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    A, total = (rewards - rewards.mean()) / rewards.std(correction=0), logp.new_zeros(())
    for i in range(len(LENGTHS)):
        of = case.tokens(i)
        likelihoods = logp[of].sum().exp() / case.answers.old_T[of].sum().exp()
        s_i = likelihoods ** (1 / LENGTHS[i])
        total = total - torch.min(s_i * A[i], s_i.clamp(1 - s.clip_low, 1 + s.clip_high) * A[i])
    return total / len(LENGTHS)


def v3_2(case: Case, logp: Tensor, s: PolicyConfig) -> Tensor:
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    A, total = rewards - rewards.mean(), logp.new_zeros(())
    for i in range(len(LENGTHS)):
        of = case.tokens(i)
        away = float((case.answers.sampled_T[of] - logp[of].detach()).mean())
        kept = 0.0 if A[i] < 0 and away > s.off_policy_limit else 1.0
        for t in of:
            ratio = (logp[t] - case.answers.old_T[t]).exp()
            gain = torch.min(ratio * A[i], ratio.clamp(1 - s.clip_low, 1 + s.clip_high) * A[i]) * kept
            assert case.answers.reference_T is not None
            from_ref = case.answers.reference_T[t] - logp[t]
            kl = ratio * (from_ref.exp() - from_ref - 1)
            total = total - (gain - s.kl_weight * kl) / (len(LENGTHS) * LENGTHS[i])
    return total


Literal = Callable[[Case, Tensor, PolicyConfig], Tensor]
CASES: list[tuple[PolicyConfig, Literal]] = [
    (PUBLISHED["grpo"], grpo),
    (published("grpo", importance_cap=1.1), grpo),
    (published("r1", kl_weight=0.3), grpo),
    (PUBLISHED["dr_grpo"], dr_grpo),
    (PUBLISHED["dapo"], dapo),
    (published("gspo", clip_low=0.05, clip_high=0.06), gspo),
    (PUBLISHED["gspo"], gspo),
    (published("v3.2", kl_weight=0.2, off_policy_limit=0.02), v3_2),
    (published("v3.2", kl_weight=0.2, off_policy_limit=9.0), v3_2),
]


@pytest.mark.parametrize(
    ("settings", "literal"), CASES, ids=[f"{s.variant}-{n}" for n, (s, _) in enumerate(CASES)]
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_variant_is_its_written_formula_in_value_and_gradient(
    settings: PolicyConfig, literal: Literal, seed: int
) -> None:
    case = Case(settings.variant, seed)
    if not settings.kl_weight:
        case.answers = replace(case.answers, reference_T=None)
    variant = policy.VARIANTS[settings.variant]
    ours, logp = policy.through_head(
        case.hidden,
        case.head,
        case.targets,
        lambda x: variant(torch.where(case.answers.share_T != 0, x, 0.0), case.answers, settings).value,
    )
    full = (case.hidden @ case.head.t()).log_softmax(-1).gather(1, case.targets.unsqueeze(1)).squeeze(1)
    written = literal(case, full, settings)
    torch.testing.assert_close(logp, full.detach(), rtol=1e-12, atol=1e-12)
    # Sums of 20 tokens over 40 logits in float64: some 1e3 roundings of 1e-16, of terms of order 1.
    torch.testing.assert_close(ours, written, rtol=1e-11, atol=1e-12)
    for x in (case.hidden, case.head):
        grads = [torch.autograd.grad(value, x, retain_graph=True)[0] for value in (ours, written)]
        assert grads[1].abs().max() > 0
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_the_off_policy_mask_and_every_clip_have_something_to_do() -> None:
    """The cases above are no use if no bound binds: each moves the value."""
    bounds: list[tuple[Variant, str]] = [("grpo", "clip_low"), ("grpo", "clip_high"), ("gspo", "clip_low")]
    for variant, bound in bounds:
        case = Case(variant)
        logp = policy.log_probs(case.hidden, case.head, case.targets)
        tight, loose = (
            policy.VARIANTS[variant](logp, case.answers, published(variant, **{bound: value})).value
            for value in (1e-3, 10.0)
        )
        assert tight != loose
    changed = []
    for seed in range(3):
        case = Case("v3.2", seed)
        logp = policy.log_probs(case.hidden, case.head, case.targets)
        limits = (0.02, 9.0)
        some, none = (
            policy.v3_2(logp, case.answers, published("v3.2", off_policy_limit=x)).value for x in limits
        )
        changed.append(bool(some != none))
    assert any(changed)


def test_on_policy_the_gradient_is_reinforce_with_a_baseline() -> None:
    """With pi = old the ratio is 1, and the slope of every token-level variant is minus share times A."""
    variants: list[Variant] = ["grpo", "dr_grpo", "dapo", "v3.2"]
    for variant in variants:
        case = Case(variant)
        logp = policy.log_probs(case.hidden, case.head, case.targets).requires_grad_()
        answers = replace(case.answers, old_T=logp.detach(), sampled_T=logp.detach(), reference_T=None)
        value = policy.VARIANTS[variant](logp, answers, PUBLISHED[variant]).value
        (slope,) = torch.autograd.grad(value, logp)
        torch.testing.assert_close(slope, -answers.share_T * answers.advantage_T, rtol=1e-12, atol=0)


def test_the_kl_term_of_v3_2_has_an_unbiased_gradient_and_that_of_grpo_has_not() -> None:
    """Over every outcome of one draw from old: the expectation of the term's gradient is the true KL's."""
    generator = torch.Generator().manual_seed(0)
    logits, old, ref = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    old, ref = old.log_softmax(0), ref.log_softmax(0)
    logp = logits.log_softmax(0)
    (truth,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    found: dict[Variant, Tensor] = {}
    variants: list[Variant] = ["grpo", "v3.2"]
    for variant in variants:
        answers = policy.Answers(
            share_T=old.exp(),  # each outcome once, weighed by its probability
            advantage_T=torch.zeros(6, dtype=torch.float64),
            old_T=old,
            sampled_T=old,
            reference_T=ref,
            answer_T=torch.zeros(6, dtype=torch.int64),
            count=1,
        )
        settings = published(variant, kl_weight=1.0)
        value = policy.VARIANTS[variant](logp, answers, settings).value
        (found[variant],) = torch.autograd.grad(value, logits, retain_graph=True)
    torch.testing.assert_close(found["v3.2"], truth, rtol=1e-10, atol=1e-12)
    assert (found["grpo"] - truth).abs().max() > 0.01


def test_advantages_of_equal_rewards_are_zero_and_of_others_sum_to_zero() -> None:
    for variant in PUBLISHED:
        assert policy.advantages(torch.full((5,), 0.1), variant).abs().max() < 1e-7
        assert abs(float(policy.advantages(torch.tensor(REWARDS), variant).sum())) < 1e-6
    spread = policy.advantages(torch.tensor(REWARDS), "grpo")
    assert float(spread.std(correction=0)) == pytest.approx(1, rel=1e-6)


def test_shares_make_the_means_that_the_papers_take() -> None:
    per_answer = policy.shares(LENGTHS, "grpo", MAX_TOKENS)
    assert sum(w * n for w, n in zip(per_answer, LENGTHS, strict=True)) == pytest.approx(1)
    assert policy.shares(LENGTHS, "dapo", MAX_TOKENS) == [1 / 20] * 4
    assert policy.shares(LENGTHS, "dr_grpo", MAX_TOKENS) == [1 / 36] * 4
    assert policy.shares((0, 5), "grpo", MAX_TOKENS)[1] == 1 / 10  # an empty answer counts, and adds nothing
    assert policy.shares((), "dapo", MAX_TOKENS) == []


def test_overlong_penalty_is_the_ramp_of_dapo() -> None:
    penalties = [policy.overlong_penalty(n, 20, 8) for n in (0, 12, 14, 16, 20, 30)]
    assert penalties == [0, 0, -0.25, -0.5, -1, -1]
    assert policy.overlong_penalty(30, 20, 0) == 0


def test_the_kept_tokens_alone_make_the_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, D, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(V, D, generator=generator, dtype=torch.float64).requires_grad_()
    kept = torch.rand(5, V, generator=generator).topk(4).indices
    kept[2, 2:] = -1
    targets = kept[:, 1]
    ours = policy.kept_log_probs(hidden, head, targets, kept)
    allowed = torch.zeros(5, V, dtype=torch.bool)
    for t in range(5):
        allowed[t, kept[t][kept[t] >= 0]] = True
    logits = (hidden @ head.t()).masked_fill(~allowed, float("-inf"))
    written = logits.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(ours, written, rtol=1e-12, atol=1e-12)
    for x in (hidden, head):
        grads = [torch.autograd.grad(value.sum(), x, retain_graph=True)[0] for value in (ours, written)]
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def as_policy(index: int, lengths: tuple[int, ...], total: int) -> PolicyBatch:
    """Random sequences as answers after prompts of two tokens, each token of the step weighing the same."""
    pack = parts.batch(index, lengths)
    assert pack.weights_T is not None
    generator = torch.Generator().manual_seed(index)
    sampled = pack.weights_T * (pack.positions_T >= 1)
    noise = [torch.rand(pack.num_tokens, generator=generator) * sampled for _ in range(4)]
    answer = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return PolicyBatch(
        **{**vars(pack), "weights_T": sampled / total},
        advantages_T=noise[0] - 0.5 * sampled,
        old_T=-4 * noise[1],
        sampled_T=-4 * noise[2],
        reference_T=-4 * noise[3],
        answers_T=answer,
    )


@pytest.mark.parametrize("variant", list(PUBLISHED))
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_micro_batches_add_up_to_the_step(variant: Variant, temperature: float) -> None:
    model, objective = parts.model(), Policy(PUBLISHED[variant], temperature=temperature)
    pieces = [as_policy(0, (5, 8), 20), as_policy(1, (9, 3, 4), 20)]
    joined: dict[str, Any] = {
        name: torch.cat([getattr(piece, name) for piece in pieces])
        for name in vars(pieces[0])
        if name.endswith("_T") and name != "answers_T"
    }
    whole = PolicyBatch(
        **joined,
        answers_T=torch.cat([pieces[0].answers_T, pieces[1].answers_T + 2]),  # type: ignore[operator]
        cu_seqlens_S1=torch.tensor([0, 5, 13, 22, 25, 29], dtype=torch.int32),
        max_seqlen=9,
    )
    results = []
    for batches in (pieces, [whole]):
        model.zero_grad()
        step = Step(0, 1, objective.count(batches))
        found = [objective.compute(model, batch, step) for batch in batches]
        sum(share.total for share in found).backward()  # type: ignore[union-attr]
        terms = {name: sum(float(share.terms[name]) for share in found) for name in found[0].terms}
        results.append(
            (terms, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
    (apart, grads_apart), (together, grads_together) = results
    # Float32 through a model of three layers, as in test_loss: some 1e3 roundings of 6e-8, random in sign.
    assert apart == pytest.approx(together, rel=1e-4, abs=1e-6)
    torch.testing.assert_close(grads_apart, grads_together, rtol=1e-4, atol=1e-6)


def test_a_setting_that_a_variant_does_not_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kl_weight is 0\.1; it must be 0 with variant 'gspo'"):
        published("gspo", kl_weight=0.1)
    with pytest.raises(ValueError, match=r"only 'v3\.2' drops answers by it"):
        published("dapo", off_policy_limit=0.1)
    with pytest.raises(ValueError, match="clip_low is 0; it must be above 0"):
        published("grpo", clip_low=0)
