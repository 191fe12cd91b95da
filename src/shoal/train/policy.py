"""What reasoning RL minimises: GRPO and its successors, one function a variant.

A variant is a formula of the log-probabilities of the sampled tokens, T numbers. It is written here on those,
as its paper prints it, and autograd differentiates it there. The slope it finds for each token is a weight of
`ops.linear_cross_entropy`, whose gradient is what the chain rule asks for next; so T x V logits never exist,
and no kernel knows of RL (`through_head`).

The law: `share_T` is what a token weighs in the mean of the whole optimizer step, known before the model
runs. So how a step is cut into micro-batches changes rounding only. A prompt's tokens have share 0.

With pi the policy, old the one that sampled, ref the reference, A the advantage:
  ratio = pi / old,   k3 = ref / pi - log(ref / pi) - 1   (Schulman 2020: unbiased under pi, never negative)

Shape letters: T tokens, S answers, D hidden, V vocabulary, K tokens that could be drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.batch import Batch
from shoal.config.policy import PolicyConfig, Variant
from shoal.model.transformer import Transformer
from shoal.ops import api as ops
from shoal.train.objective import Share, Step


@dataclass(frozen=True, eq=False)
class PolicyBatch(Batch):
    """Answers with their prompts, a sequence each; `weights_T` is the share. Made by stages/rollout."""

    # 0 where a token was not sampled:
    advantages_T: Tensor | None = None  # float32: the answer's, at each of its tokens
    old_T: Tensor | None = None  # float32: log-probabilities by the trainer, before the first step on them
    sampled_T: Tensor | None = None  # float32: log-probabilities that the engine drew by
    reference_T: Tensor | None = None  # float32: by the reference; None where nothing is held to it
    answers_T: Tensor | None = None  # int64: which answer of the batch a token belongs to
    kept_TK: Tensor | None = None  # int64: the tokens that could be drawn, -1 past them; None: all could


@dataclass(frozen=True, eq=False)
class Answers:
    """What a variant reads of one micro-batch, beside the policy's log-probabilities."""

    share_T: Tensor
    advantage_T: Tensor
    old_T: Tensor
    sampled_T: Tensor
    reference_T: Tensor | None
    answer_T: Tensor
    count: int  # answers, S

    def means(self, x_T: Tensor) -> Tensor:
        """(T,): at each token, the mean of x over the sampled tokens of its answer."""
        sampled_T = (self.share_T != 0).to(x_T.dtype)
        total_2S = x_T.new_zeros(2, self.count).index_add(
            1, self.answer_T, torch.stack([torch.where(sampled_T > 0, x_T, 0.0), sampled_T])
        )
        return (total_2S[0] / total_2S[1].clamp(min=1))[self.answer_T]


class PolicyLoss(NamedTuple):
    value: Tensor  # this micro-batch's share of the step's loss
    ratio_T: Tensor  # what was clipped
    kl_T: Tensor | None  # k3


def advantages(rewards_G: Tensor, variant: Variant) -> Tensor:
    """How much better than its group each answer is; 0 where all are equal.

    A = (r - mean) / std (DeepSeekMath 4.1.2; population std, and a group of equal rewards teaches nothing).
    Dr. GRPO and V3.2 leave the std out: it weighs questions that are nearly always, or never, solved more.
    """
    centred_G = rewards_G - rewards_G.mean()
    if variant in ("dr_grpo", "v3.2"):
        return centred_G
    std = rewards_G.std(correction=0)
    return torch.where(std > 1e-6, centred_G / std.clamp(min=1e-6), 0.0)


def shares(lengths: Sequence[int], variant: Variant, max_tokens: int) -> list[float]:
    """What a token of each answer of a step weighs; an answer without tokens weighs nothing.

    A mean over answers of the mean over tokens, 1 / (N |o|); for Dr. GRPO 1 / (N max_tokens), the same for
    every answer; for DAPO 1 / (all tokens).
    """
    answers, tokens = max(len(lengths), 1), max(sum(lengths), 1)
    if variant == "dapo":
        return [1 / tokens] * len(lengths)
    if variant == "dr_grpo":
        return [1 / (answers * max_tokens)] * len(lengths)
    return [1 / (answers * max(length, 1)) for length in lengths]


def overlong_penalty(length: int, max_tokens: int, buffer: int) -> float:
    """DAPO eq. 13: 0 up to max - buffer, then linear to -1 at max, and -1 beyond."""
    return 0.0 if buffer == 0 else -min(1.0, max(0.0, (length - (max_tokens - buffer)) / buffer))


# The variants. Each takes log pi of the sampled tokens (T,), differentiable, and returns what to minimise.


def grpo(logp_T: Tensor, answers: Answers, settings: PolicyConfig) -> PolicyLoss:
    """DeepSeekMath, arXiv 2402.03300, eq. 3 with outcome supervision, and eq. 4:

    J = 1/G sum_i 1/|o_i| sum_t min(ratio A, clip(ratio, 1 - low, 1 + high) A) - beta k3.

    R1 (arXiv 2501.12948, eq. 1) prints ratios of whole outputs; this token form is what is run, with R1's
    numbers (config.policy.PUBLISHED).
    """
    ratio_T = (logp_T - answers.old_T).exp()
    gain_T = _clipped(ratio_T, answers.advantage_T, settings) * _importance(answers, settings)
    kl_T = _k3(logp_T, answers)
    if kl_T is not None:
        gain_T = gain_T - settings.kl_weight * kl_T
    return PolicyLoss(-_mean(gain_T, answers), ratio_T, kl_T)


def dr_grpo(logp_T: Tensor, answers: Answers, settings: PolicyConfig) -> PolicyLoss:
    """Dr. GRPO, arXiv 2503.20783, section 3.2: GRPO's clipped term without the std in A and without 1/|o_i|.

    J = 1/G sum_i 1/L sum_t min(ratio A, clip(ratio) A), A = r - mean, L = the length limit, a constant. The
    difference from `grpo` is in `advantages` and `shares`.
    """
    return grpo(logp_T, answers, settings)


def dapo(logp_T: Tensor, answers: Answers, settings: PolicyConfig) -> PolicyLoss:
    """DAPO, arXiv 2503.14476, eq. 8: J = 1/(sum_i |o_i|) sum_i sum_t min(ratio A, clip(ratio, 1 - low,
    1 + high) A), high above low so that rare tokens may grow.

    The mean is in `shares`, the overlong penalty in the reward; groups of equal rewards are sampled again by
    stages/rollout.
    """
    return grpo(logp_T, answers, settings)


def gspo(logp_T: Tensor, answers: Answers, settings: PolicyConfig) -> PolicyLoss:
    """GSPO, arXiv 2507.18071, eq. 5-7: J = 1/G sum_i min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i) with
    s_i = (pi(o_i) / old(o_i))^(1/|o_i|) = exp(1/|o_i| sum_t log ratio)."""
    ratio_T = answers.means(logp_T - answers.old_T).exp()  # the same at each token of an answer
    gain_T = _clipped(ratio_T, answers.advantage_T, settings)
    return PolicyLoss(-_mean(gain_T, answers), ratio_T, None)


def v3_2(logp_T: Tensor, answers: Answers, settings: PolicyConfig) -> PolicyLoss:
    """DeepSeek-V3.2, arXiv 2512.02556, section 3.1:

    J = 1/G sum_i 1/|o_i| sum_t min(ratio A, clip(ratio) A) M_i - beta ratio k3, with A = r - mean, and
    M_i = 0 where A < 0 and 1/|o_i| sum_t log(sampled / pi) > delta, else 1.

    ratio k3 has an unbiased gradient under `old`, which k3 alone has not. `sampled` is what the engine
    returned, so the mask sees stale weights and a differing engine alike; it takes no gradient. Replay of
    the experts and of the sampling support are the batch's `routing` and `kept_TK`.
    """
    ratio_T = (logp_T - answers.old_T).exp()
    gain_T = _clipped(ratio_T, answers.advantage_T, settings) * _importance(answers, settings)
    if settings.off_policy_limit:
        drift_T = answers.means(answers.sampled_T - logp_T.detach())
        gain_T = gain_T.masked_fill((answers.advantage_T < 0) & (drift_T > settings.off_policy_limit), 0.0)
    kl_T = _k3(logp_T, answers)
    if kl_T is not None:
        gain_T = gain_T - settings.kl_weight * ratio_T * kl_T
    return PolicyLoss(-_mean(gain_T, answers), ratio_T, kl_T)


VARIANTS: dict[Variant, Callable[[Tensor, Answers, PolicyConfig], PolicyLoss]] = {
    "grpo": grpo,
    "r1": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "v3.2": v3_2,
}


def _clipped(ratio_T: Tensor, advantage_T: Tensor, settings: PolicyConfig) -> Tensor:
    bounded_T = ratio_T.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    return torch.minimum(ratio_T * advantage_T, bounded_T * advantage_T)


def _importance(answers: Answers, settings: PolicyConfig) -> Tensor | float:
    """Truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training"): min(old / sampled, cap), for an engine that is not quite the trainer."""
    if not settings.importance_cap:
        return 1.0
    return (answers.old_T - answers.sampled_T).exp().clamp(max=settings.importance_cap)


def _k3(logp_T: Tensor, answers: Answers) -> Tensor | None:
    if answers.reference_T is None:
        return None
    difference_T = answers.reference_T - logp_T
    return difference_T.exp() - difference_T - 1


def _mean(x_T: Tensor, answers: Answers) -> Tensor:
    return torch.where(answers.share_T != 0, x_T * answers.share_T, 0.0).sum()


# From the formula to the model.


def through_head(
    hidden_TD: Tensor,
    head_VD: Tensor,
    targets_T: Tensor,
    formula: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """The value of a formula of the targets' log-probabilities, differentiable in hidden and head; and those.

    1. Log-probabilities without a gradient: one product with the head. 2. The formula's slope at each. 3. The
    cross-entropy weighted by minus the slope has, by the chain rule, the formula's gradient. The price over
    cross-entropy is the first product.
    """
    logp_T = log_probs(hidden_TD, head_VD, targets_T).requires_grad_()
    with torch.enable_grad():
        value = formula(logp_T)
        (slope_T,) = torch.autograd.grad(value, logp_T)
    total = ops.linear_cross_entropy(hidden_TD, head_VD, targets_T, -slope_T).total
    return value.detach() + (total - total.detach()), logp_T.detach()


@torch.no_grad()
def log_probs(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Log-probability of each target, without a gradient."""
    weights_T = torch.ones(len(targets_T), device=hidden_TD.device)
    return -ops.linear_cross_entropy(hidden_TD.detach(), head_VD.detach(), targets_T, weights_T).nll_T


def kept_log_probs(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, kept_TK: Tensor) -> Tensor:
    """Log-probability of each target among the tokens that could be drawn (V3.2's keep-sampling-mask).

    Differentiable. Only those K rows of the head are read, gathered for each token: T x K x D elements.
    """
    rows_TKD = head_VD[kept_TK.clamp(min=0)]
    logits_TK = torch.einsum("td,tkd->tk", hidden_TD, rows_TKD).to(
        torch.promote_types(hidden_TD.dtype, torch.float32)
    )
    logits_TK = logits_TK.masked_fill(kept_TK < 0, float("-inf"))
    is_target_TK = kept_TK == targets_T.unsqueeze(1)
    target_T = torch.where(is_target_TK, logits_TK, 0.0).sum(-1)
    return target_T - logits_TK.logsumexp(-1)


class Policy:
    """The objective of RL over PolicyBatches. Its terms: `loss`; and means over the sampled tokens: `kl`,
    `clip_share`, `entropy` (of -log p of what was sampled: unbiased on policy), `drift` (of log old / pi).

    `temperature` is the one of sampling: the policy is softmax(logits / temperature). Prediction modules are
    not run, and do not learn.
    """

    def __init__(self, settings: PolicyConfig, *, temperature: float = 1.0) -> None:
        self.settings = settings
        self.temperature = temperature

    def count(self, batches: Sequence[Batch]) -> Tensor:
        """Tokens that were sampled: (1,) int64."""
        counted = [batch.weights_T.count_nonzero() for batch in batches if batch.weights_T is not None]
        return torch.stack(counted).sum(0, keepdim=True)

    def compute(self, model: Transformer, batch: Batch, step: Step) -> Share:
        assert isinstance(batch, PolicyBatch) and batch.targets_T is not None
        out = model(batch)
        hidden_TD, head_VD = out.hidden_TD / self.temperature, model.head_weight()
        answers, variant = _answers(batch), VARIANTS[self.settings.variant]
        told: list[PolicyLoss] = []

        def formula(logp_T: Tensor) -> Tensor:
            # Rows that were not sampled have no part in it, and no old or reference probability: all are 0.
            logp_T = torch.where(answers.share_T != 0, logp_T, 0.0)
            told.append(variant(logp_T, answers, self.settings))
            return told[0].value

        if batch.kept_TK is None:
            total, logp_T = through_head(hidden_TD, head_VD, batch.targets_T, formula)
        else:
            logp_T = kept_log_probs(hidden_TD, head_VD, batch.targets_T, batch.kept_TK)
            total, logp_T = formula(logp_T), logp_T.detach()
        terms = self._terms(total.detach(), logp_T, told[0], answers, step)
        return Share(total, terms, tuple(layer.experts_TK for layer in out.routing))

    def _terms(
        self, total: Tensor, logp_T: Tensor, loss: PolicyLoss, answers: Answers, step: Step
    ) -> dict[str, Tensor]:
        tokens, sampled_T = step.counts[0].clamp(min=1), answers.share_T != 0

        def mean(x_T: Tensor) -> Tensor:
            return torch.where(sampled_T, x_T.detach(), 0.0).sum() / tokens

        better_T = answers.advantage_T > 0
        clipped_T = (better_T & (loss.ratio_T > 1 + self.settings.clip_high)) | (
            (answers.advantage_T < 0) & (loss.ratio_T < 1 - self.settings.clip_low)
        )
        return {
            "loss": total,
            "kl": total.new_zeros(()) if loss.kl_T is None else mean(loss.kl_T),
            "clip_share": mean(clipped_T.to(logp_T.dtype)),
            "entropy": mean(-logp_T),
            "drift": mean(answers.old_T - logp_T),
        }


def _answers(batch: PolicyBatch) -> Answers:
    assert batch.weights_T is not None and batch.advantages_T is not None and batch.answers_T is not None
    assert batch.old_T is not None and batch.sampled_T is not None
    return Answers(
        batch.weights_T,
        batch.advantages_T,
        batch.old_T,
        batch.sampled_T,
        batch.reference_T,
        batch.answers_T,
        batch.num_sequences,
    )
