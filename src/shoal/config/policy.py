"""How reasoning RL weighs what was sampled: the published variants of GRPO as rows, changed field by field.

A row says what its paper prints; where a paper leaves a number open, the row has the one that open code uses,
and says so. What the variants compute is train/policy.py. The law is run.py's: nothing written is ignored, so
a setting that the chosen variant does not read is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Variant = Literal["grpo", "r1", "dr_grpo", "dapo", "gspo", "v3.2"]


@dataclass(frozen=True)
class PolicyConfig:
    """`clip_low` and `clip_high` bound the ratio of new to old probability to [1 - low, 1 + high].

    `kl_weight` (beta) holds the policy to the reference. `importance_cap` truncates the correction for an
    engine whose probabilities are not the trainer's (0: no correction). `off_policy_limit` (delta, V3.2)
    drops bad answers that the policy has moved away from by more nats a token. `overlong_buffer` (DAPO) is
    how many tokens before the length limit the penalty begins (0: none).
    """

    variant: Variant = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.04
    importance_cap: float = 0.0
    off_policy_limit: float = 0.0
    overlong_buffer: int = 0

    def __post_init__(self) -> None:
        rules = (
            ("clip_low", self.clip_low > 0, "above 0; 1 or more never binds"),
            ("clip_high", self.clip_high > 0, "above 0"),
            ("kl_weight", self.kl_weight >= 0, "at least 0, where 0 needs no reference policy"),
            ("importance_cap", self.importance_cap >= 0, "at least 0, where 0 corrects nothing"),
            ("overlong_buffer", self.overlong_buffer >= 0, "at least 0, where 0 is no penalty"),
            ("off_policy_limit", self.off_policy_limit >= 0, "at least 0, where 0 drops nothing"),
            (
                "off_policy_limit",
                self.off_policy_limit == 0 or self.variant == "v3.2",
                f"0 with variant {self.variant!r}; only 'v3.2' drops answers by it",
            ),
            (
                "kl_weight",
                self.kl_weight == 0 or self.variant != "gspo",
                "0 with variant 'gspo', whose objective has no such term",
            ),
            (
                "importance_cap",
                self.importance_cap == 0 or self.variant != "gspo",
                "0 with variant 'gspo', whose ratio is of whole answers",
            ),
        )
        for name, valid, rule in rules:
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {rule}")


# DeepSeekMath, arXiv 2402.03300, section 4.2: beta 0.04. It prints no epsilon; 0.2 is PPO's.
# R1, arXiv 2501.12948 and its journal version: beta 0.001, epsilon 10 (the lower bound never binds).
# Dr. GRPO, arXiv 2503.20783: no standard deviation, no division by an answer's length, no KL.
# DAPO, arXiv 2503.14476, section 3: 0.2 and 0.28, mean over all tokens, no KL; 4,096 of 20,480 tokens ramp.
# GSPO, arXiv 2507.18071, section 5: 3e-4 and 4e-4, on the ratio of whole answers to the power of 1 / length.
# V3.2, arXiv 2512.02556, section 3.1: no standard deviation, unbiased KL, off-policy mask. It prints neither
# beta nor delta nor epsilon; these are ours.
PUBLISHED: dict[Variant, PolicyConfig] = {
    "grpo": PolicyConfig(),
    "r1": PolicyConfig("r1", clip_low=10.0, clip_high=10.0, kl_weight=0.001),
    "dr_grpo": PolicyConfig("dr_grpo", kl_weight=0.0),
    "dapo": PolicyConfig("dapo", clip_low=0.2, clip_high=0.28, kl_weight=0.0),
    "gspo": PolicyConfig("gspo", clip_low=3e-4, clip_high=4e-4, kl_weight=0.0),
    "v3.2": PolicyConfig("v3.2", kl_weight=0.001, off_policy_limit=0.1),
}


def published(variant: Variant, **changes: float) -> PolicyConfig:
    """The paper's settings of a variant, some of them changed."""
    return replace(PUBLISHED[variant], **changes)
