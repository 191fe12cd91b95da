"""How a run of post-training is told: supervised tuning (SFTConfig) and reasoning RL (GRPOConfig).

Both start from a checkpoint, whose folder holds the tokenizer too. The law is run.py's: nothing written is
ignored. A policy's variant brings its paper's settings; what is written beside it changes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from shoal.config.policy import PUBLISHED, PolicyConfig
from shoal.config.require import require
from shoal.config.run import BalanceConfig, OptimConfig, Table, TrainConfig, build, load_table, to_table


def _refuse_balance_losses(train: TrainConfig, why: str) -> None:
    """What an objective does not compute must not be asked for."""
    for name, value in vars(train.balance).items():
        require(
            name in ("bias_update_speed", "bias_rule", "bias_share", "devices") or value == 0,
            f"train.balance.{name} is {value}; {why}: set it to 0",
        )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (model/lora.py) on every weight whose name ends in one of `targets`."""

    targets: tuple[str, ...]
    rank: int = 16
    alpha: float = 32.0

    def __post_init__(self) -> None:
        require(bool(self.targets), "targets names no weight; for example kv_b_proj, experts.down_proj")
        require(self.rank >= 1, f"rank is {self.rank}; it must be at least 1")
        require(self.alpha > 0, f"alpha is {self.alpha}; it must be above 0")


@dataclass(frozen=True)
class ExpertsConfig:
    """ESFT (model/esft.py): train only the experts that make up `share` of a layer's score on the data.

    They are scored on the first `batches` of it.
    """

    score: Literal["gate", "token"] = "token"
    share: float = 0.2
    batches: int = 32

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, f"share is {self.share}; it must be above 0 and at most 1")
        require(self.batches >= 1, f"batches is {self.batches}; it must be at least 1")


@dataclass(frozen=True)
class DistillConfig:
    """Distillation on logits (train/distill.py): the loss is with the `keep` best tokens of the checkpoint
    `teacher`, `soft` of it, and with the text, the rest. Teacher and student share a tokenizer."""

    teacher: str
    keep: int = 32
    soft: float = 1.0

    def __post_init__(self) -> None:
        require(self.keep >= 1, f"keep is {self.keep}; it must be at least 1")
        require(0 < self.soft <= 1, f"soft is {self.soft}; it must be above 0 and at most 1")


@dataclass(frozen=True)
class SFTConfig:
    """Supervised tuning of the checkpoint `model` on the conversations of `data` (JSON or JSON Lines).

    The layouts known are in stages/conversations.py. Without `validation`, `holdout_fraction` of `data` is
    held out. A micro-batch has at most `tokens_per_batch` tokens of whole conversations; those longer than
    `seq_len` are left out, and counted.
    """

    model: str
    data: tuple[str, ...]
    train: TrainConfig
    validation: tuple[str, ...] = ()
    holdout_fraction: float = 0.05
    tokens_per_batch: int = 4096
    seq_len: int = 2048
    samples: int = 3  # answers to held-out conversations that are shown at each evaluation
    lora: LoraConfig | None = None
    esft: ExpertsConfig | None = None
    distill: DistillConfig | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        require(
            self.lora is None or self.esft is None,
            "lora and esft are both there; adapters freeze the experts that esft would train: choose one",
        )
        if self.distill is not None:
            _refuse_balance_losses(self.train, "distillation has the teacher's loss alone")
        require(bool(self.data), "data names no file; give conversations to learn from")
        require(
            0 < self.holdout_fraction < 1,
            f"holdout_fraction is {self.holdout_fraction}; it must lie between 0 and 1",
        )
        require(
            2 <= self.seq_len <= self.tokens_per_batch,
            f"seq_len is {self.seq_len} and tokens_per_batch {self.tokens_per_batch}; a conversation has 2 "
            f"tokens at least, and a batch holds one",
        )
        require(self.samples >= 0, f"samples is {self.samples}; it cannot be negative")
        require(self.seed >= 0, f"seed is {self.seed}; it cannot be negative")


@dataclass(frozen=True)
class RolloutConfig:
    """What is sampled for a round of RL: `group` answers to each of `questions` questions.

    `replay` records the experts that each token was sent to and replays them in training (R3). With
    `keep_sampling`, what top-k and top-p let be drawn is kept as the policy's support (V3.2). `extra_rounds`
    more samplings replace groups whose rewards are all equal (DAPO's dynamic sampling; 0: they stay, and
    teach nothing). `batch_invariant` runs the whole stage in that mode: on a CPU, engine and trainer then
    give each token the same log-probability, bit for bit, at a price in speed (benchmarks/invariance.py). Up
    to `decode_steps` tokens of each answer are drawn before the engine looks at them: what it draws after an
    answer's end is lost, what it does between steps is shared. A step of the engine has at most
    `max_batch_tokens` tokens, of `max_sequences` answers.
    """

    questions: int = 32
    group: int = 16
    max_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    replay: bool = True
    keep_sampling: bool = False
    batch_invariant: bool = False
    extra_rounds: int = 0
    cache_bytes: int = 1 << 30
    max_sequences: int = 256
    max_batch_tokens: int = 2048
    decode_steps: int = 8

    def __post_init__(self) -> None:
        for name in (
            "questions",
            "max_tokens",
            "cache_bytes",
            "max_sequences",
            "max_batch_tokens",
            "decode_steps",
        ):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}; it must be at least 1")
        require(self.group >= 2, f"group is {self.group}; an answer is compared with others, so at least 2")
        require(self.temperature > 0, f"temperature is {self.temperature}; it must be above 0 to explore")
        require(0 < self.top_p <= 1, f"top_p is {self.top_p}; it must be above 0 and at most 1")
        for name in ("top_k", "extra_rounds"):
            value = getattr(self, name)
            require(value >= 0, f"{name} is {value}; it cannot be negative, and 0 turns it off")
        require(
            not self.keep_sampling or self.top_k > 0,
            "keep_sampling needs top_k: that many tokens are remembered at each position",
        )


@dataclass(frozen=True)
class AppraisalConfig:
    """A reward model (`shoal preference`) as a reward, for problems that list "preference" among theirs, or
    list none. `pointwise`: sigmoid of its value. `pairwise`: the chance that it prefers the answer to another
    of the group, on average."""

    model: str
    kind: Literal["pointwise", "pairwise"] = "pairwise"
    weight: float = 1.0

    def __post_init__(self) -> None:
        require(self.weight > 0, f"weight is {self.weight}; it must be above 0, or the part be left out")


@dataclass(frozen=True)
class GRPOConfig:
    """Reasoning RL from the checkpoint `model` on the `problems` (JSON Lines: "prompt" or "messages", and
    what the rewards read).

    `rewards` are "name" or "weight name", of stages/rewards.py or "module:function". A round of rollouts is
    used for `steps_per_round` optimizer steps. The reference policy becomes the present one every
    `refresh_every` steps (0: never). At an evaluation each of `held_out` is answered `pass_k` times.

    A problem may list the "rewards" that it is judged by, of those that are named here; without a list, by
    all. Held-out problems are judged by rules alone.

    With a `teacher`, a checkpoint with the same tokenizer, this is on-policy distillation: what a token is
    worth is not the reward, which is only reported, but by how much the teacher thinks it more likely.
    """

    model: str
    problems: tuple[str, ...]
    rewards: tuple[str, ...]
    train: TrainConfig
    held_out: tuple[str, ...] = ()
    teacher: str | None = None
    preference: AppraisalConfig | None = None
    rollout: RolloutConfig = RolloutConfig()
    policy: PolicyConfig = PUBLISHED["grpo"]
    steps_per_round: int = 1
    refresh_every: int = 0
    pass_k: int = 4
    correct_at: float = 1.0  # the reward from which an answer counts as right
    reward_seconds: float = 10.0
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        require(bool(self.problems), "problems names no file; give questions to answer")
        self.weights()
        for name in ("steps_per_round", "pass_k"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}; it must be at least 1")
        require(self.refresh_every >= 0, f"refresh_every is {self.refresh_every}; it cannot be negative")
        require(
            self.refresh_every % self.steps_per_round == 0,
            f"refresh_every is {self.refresh_every}, no multiple of steps_per_round {self.steps_per_round}: "
            f"the reference changes between rounds",
        )
        require(
            self.refresh_every == 0 or self.policy.kl_weight > 0,
            f"refresh_every is {self.refresh_every}, but policy.kl_weight is 0, which needs no reference",
        )
        require(
            self.teacher is None or (self.policy.kl_weight == 0 and self.rollout.extra_rounds == 0),
            f"with a teacher, policy.kl_weight ({self.policy.kl_weight}) and rollout.extra_rounds "
            f"({self.rollout.extra_rounds}) must be 0: nothing else is the reference, and no reward is asked",
        )
        answers = self.rollout.questions * self.rollout.group
        parts = self.steps_per_round * self.train.accumulation
        require(
            answers % parts == 0,
            f"a round has {answers} answers (rollout.questions times rollout.group), which steps_per_round "
            f"{self.steps_per_round} times train.accumulation {self.train.accumulation} does not divide",
        )
        plain = self.rollout.temperature == 1 and self.rollout.top_p == 1 and self.rollout.top_k == 0
        require(
            self.policy.importance_cap == 0 or plain,
            f"policy.importance_cap is {self.policy.importance_cap}, which compares what was sampled from; "
            f"the engine tells log-probabilities before temperature, top_p and top_k: set these to 1, 1, 0",
        )
        require(
            self.train.mtp_loss_weight == 0,
            f"train.mtp_loss_weight is {self.train.mtp_loss_weight}; RL does not train prediction modules: "
            f"set it to 0",
        )
        _refuse_balance_losses(self.train, "RL has the policy's loss alone")
        require(
            self.train.spike_deviations == 0 or self.train.spike_action == "skip",
            "train.spike_action is 'rollback', which goes on with other batches; those of RL follow from the "
            "weights: choose 'skip'",
        )
        require(self.reward_seconds > 0, f"reward_seconds is {self.reward_seconds}; it must be above 0")
        require(self.seed >= 0, f"seed is {self.seed}; it cannot be negative")

    def weights(self) -> dict[str, float]:
        """The rewards by name."""
        weights: dict[str, float] = {}
        for reward in self.rewards:
            *weight, name = reward.split()
            try:
                weights[name] = float(weight[0]) if weight else 1.0
            except ValueError:
                raise ValueError(f"reward {reward!r} does not read 'weight name', as '0.1 layout'") from None
        require(bool(weights), "rewards names none; an answer needs one to be told good from bad")
        return weights


@dataclass(frozen=True)
class RejectConfig:
    """Rejection sampling: `rollout.group` answers of the checkpoint `model` to each of the `problems`; of
    those whose reward is at least `correct_at`, the `keep` shortest different ones become demonstrations.

    `rollout.questions` problems are answered at a time, and written down before the next.
    """

    model: str
    problems: tuple[str, ...]
    rewards: tuple[str, ...]
    rollout: RolloutConfig = RolloutConfig()
    keep: int = 1
    correct_at: float = 1.0
    reward_seconds: float = 10.0
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        self.sampling()
        require(self.keep >= 1, f"keep is {self.keep}; it must be at least 1")

    def sampling(self) -> GRPOConfig:
        """The same as RL would sample, and judge."""
        return GRPOConfig(
            self.model,
            self.problems,
            self.rewards,
            RL_TRAIN,
            rollout=replace(self.rollout, replay=False, extra_rounds=0),
            correct_at=self.correct_at,
            reward_seconds=self.reward_seconds,
            seed=self.seed,
            dtype=self.dtype,
        )


@dataclass(frozen=True)
class PreferenceConfig:
    """A reward model: the checkpoint `model` learns which of two answers is the better (stages/preference).

    `pairwise` (Bradley-Terry): the better one's value is to be above the other's. `pointwise`: the better
    one's is to be above 0, the other's below. A micro-batch has at most `tokens_per_batch` tokens of whole
    pairs; pairs with an answer longer than `seq_len` are left out, and counted.
    """

    model: str
    pairs: tuple[str, ...]
    train: TrainConfig
    kind: Literal["pointwise", "pairwise"] = "pairwise"
    holdout_fraction: float = 0.1
    tokens_per_batch: int = 4096
    seq_len: int = 1024
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        require(bool(self.pairs), "pairs names no file; give answers to compare")
        _refuse_balance_losses(self.train, "a reward model has the preference's loss alone")
        require(
            0 < self.holdout_fraction < 1,
            f"holdout_fraction is {self.holdout_fraction}; it must lie between 0 and 1",
        )
        require(
            2 <= self.seq_len <= self.tokens_per_batch // 2,
            f"seq_len is {self.seq_len} and tokens_per_batch {self.tokens_per_batch}; a conversation has 2 "
            f"tokens at least, and a batch holds two",
        )
        require(self.seed >= 0, f"seed is {self.seed}; it cannot be negative")


# What RL wants of the loop where a recipe says nothing else: small constant steps, no balancing forces.
RL_TRAIN = TrainConfig(
    steps=100,
    mtp_loss_weight=0.0,
    optim=OptimConfig(lr=1e-6, weight_decay=0.0, schedule="constant"),
    balance=BalanceConfig(bias_update_speed=0.0, sequence_loss=0.0),
)


def load_sft(path: str | Path, overrides: Iterable[str] = ()) -> SFTConfig:
    return build(SFTConfig, *load_table(path, overrides))


def load_reject(path: str | Path, overrides: Iterable[str] = ()) -> RejectConfig:
    return build(RejectConfig, *load_table(path, overrides))


def load_preference(path: str | Path, overrides: Iterable[str] = ()) -> PreferenceConfig:
    """Under what is written: no balancing forces, and no prediction modules."""
    table, source = load_table(path, overrides)
    return build(PreferenceConfig, {**table, "train": _under(RL_TRAIN, table.get("train", {}))}, source)


def load_grpo(path: str | Path, overrides: Iterable[str] = ()) -> GRPOConfig:
    return grpo_from_table(*load_table(path, overrides))


def grpo_from_table(table: Table, source: str) -> GRPOConfig:
    """Under what is written: the variant's published settings, and RL's of the loop."""
    table = dict(table)
    policy: Any = table.get("policy", {})
    if isinstance(policy, dict):
        row = PUBLISHED.get(policy.get("variant", "grpo"), PolicyConfig())  # type: ignore[reportUnknownArgumentType]
        table["policy"] = {**to_table(row), **policy}
    table["train"] = _under(RL_TRAIN, table.get("train", {}))
    return build(GRPOConfig, table, source)


def _under(defaults: TrainConfig, written: Any) -> Any:
    """The loop's table, `defaults` where nothing is written."""
    if not isinstance(written, dict):
        return written  # which `build` will refuse
    table: Table = cast(Table, written)
    base = to_table(defaults)
    for part in ("optim", "balance"):
        inner = table.get(part, {})
        if isinstance(inner, dict):
            base[part] |= inner
    return {**base, **{key: value for key, value in table.items() if key not in ("optim", "balance")}}
