"""What each stage of R1 in small is told: scales, and the recipe of every stage as a function of the scale.

`recipes/r1` has the same stages as files, with the published settings, for real checkpoints; here they are
made for a model that is born and taught in minutes. The law: a recipe depends on the scale, the folder and
the seed alone, so a pipeline that was stopped finds its own runs again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from shoal.checkpoint import hf
from shoal.config.model import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig
from shoal.config.policy import published
from shoal.config.run import BalanceConfig, OptimConfig, TrainConfig
from shoal.config.tune import (
    RL_TRAIN,
    AppraisalConfig,
    DistillConfig,
    GRPOConfig,
    PreferenceConfig,
    RejectConfig,
    RolloutConfig,
    SFTConfig,
)
from shoal.data.atomic import write_atomically
from shoal.data.tokenizer import SMALLEST, train_tokenizer
from shoal.model.transformer import Transformer
from shoal.stages import tasks
from shoal.stages.reject import KEPT

MODEL = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=SMALLEST,  # a token a byte: digits are read one by one
    hidden_size=96,
    intermediate_size=192,
    num_hidden_layers=3,
    attention=MLAConfig(
        num_attention_heads=4,
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
    ),
    rope=RopeConfig(theta=10000.0, interleaved=True),
    moe=MoEConfig(
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        n_shared_experts=1,
        first_k_dense_replace=1,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    ),
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=1,
    initializer_range=0.02,
    dtype="float32",
)
STUDENT = ModelConfig(
    model_type="qwen2",
    vocab_size=SMALLEST,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=3,
    attention=GQAConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=32, qkv_bias=True),
    rope=RopeConfig(theta=10000.0),
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=1,
    initializer_range=0.02,
    dtype="float32",
)


@dataclass(frozen=True)
class Scale:
    """How much is done. `size` is the digits of an addition, or the numbers of a countdown; `slips` how often
    the demonstrator gets a step wrong."""

    task: str = "addition"
    size: int = 3
    slips: float = 0.6
    demonstrations: int = 4000
    problems: int = 20_000
    held_out: int = 500
    start_steps: int = 220
    rl_steps: int = 24
    rl_rate: float = 1e-4
    questions: int = 32
    group: int = 8
    max_tokens: int = 48
    kept: int = 2000  # problems that are answered for rejection sampling
    greetings: int = 2000
    tuned_steps: int = 300
    pairs: int = 1000
    taste_steps: int = 40
    final_steps: int = 20
    student_steps: int = 300
    width: int = 1  # of the models, times the laptop's
    tokens_per_batch: int = 4096
    at_once: int = 256  # answers that are sampled beside one another
    max_batch_tokens: int = 2048  # as in RolloutConfig, and so is
    decode_steps: int = 8

    def __post_init__(self) -> None:
        if self.task not in ("addition", "countdown"):
            raise ValueError(f"there is no task {self.task!r}; known are addition, countdown")
        if not 0 <= self.slips < 1:
            raise ValueError(f"slips is {self.slips}; it is a chance, from 0 to below 1")
        for name, value in vars(self).items():
            if name not in ("task", "slips") and value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0")


SCALES = {
    "laptop": {
        "addition": Scale(),
        "countdown": Scale("countdown", size=4, slips=0.3, max_tokens=40),
    },
    "one-gpu": {
        "addition": Scale(
            size=6, demonstrations=20_000, problems=100_000, held_out=2000, start_steps=600, rl_steps=100,
            questions=64, group=16, max_tokens=96, kept=8000, greetings=4000, tuned_steps=600,
            final_steps=40, student_steps=600, width=4, tokens_per_batch=32_768,
            at_once=1024, max_batch_tokens=32_768, decode_steps=32,
        ),
        "countdown": Scale(
            "countdown", size=5, slips=0.3, demonstrations=20_000, problems=100_000, held_out=2000,
            start_steps=600, rl_steps=100, questions=64, group=16, width=4, tokens_per_batch=32_768,
            at_once=1024, max_batch_tokens=32_768, decode_steps=32,
        ),
    },
}  # fmt: skip


def scale_of(name: str, task: str, changes: Mapping[str, Any]) -> Scale:
    """A named scale, some of it changed."""
    if name not in SCALES:
        raise ValueError(f"there is no scale {name!r}; known are {', '.join(SCALES)}")
    if task not in SCALES[name]:
        raise ValueError(f"there is no task {task!r}; known are {', '.join(SCALES[name])}")
    return replace(SCALES[name][task], **changes)


@dataclass(frozen=True)
class Recipes:
    """The recipes of the pipeline in `folder`."""

    scale: Scale
    folder: Path
    seed: int

    @property
    def files(self) -> dict[str, Path]:
        """All that is learned from and asked."""
        known = ("demonstrations", "problems", "held-out")
        greetings = ("greetings", "introductions", "pairs", "scenarios")
        names = (*known, *greetings, "to-keep", "tuning")
        return {name: self.folder / "data" / f"{name}.jsonl" for name in names}

    # What is learned from, and what learns.

    def write_problems(self) -> None:
        scale, files = self.scale, self.files
        sums = self._problems(scale.task, scale.size, held_out=False, slips=scale.slips)
        learned = list(islice(sums, scale.demonstrations))
        asked = list(islice(sums, scale.problems))
        held_out = list(islice(self._problems(scale.task, scale.size, held_out=True), scale.held_out))
        if not asked or len(held_out) < scale.held_out:
            raise ValueError(
                f"{scale.task} of size {scale.size} has no more than {len(learned) + len(asked)} problems "
                f"and {len(held_out)} held out; raise its size, or ask for fewer"
            )
        _write(files["demonstrations"], map(tasks.demonstration, learned))
        _write(files["problems"], asked)
        _write(files["to-keep"], asked[: scale.kept])
        _write(files["held-out"], _by_rule(held_out, scale.task))

        # Two introductions in three are answered curtly: so will the tuned model, until it is rewarded.
        met = self._problems("greeting", 3, held_out=False, slips=0.67)
        greeted, introduced = list(islice(met, scale.greetings)), list(islice(met, scale.greetings))
        strangers = islice(self._problems("greeting", 3, held_out=True), scale.held_out)
        rng = random.Random(f"taste {self.seed}")
        _write(files["greetings"], map(tasks.demonstration, greeted))
        _write(files["introductions"], _by_rule(strangers, "greeting"))
        _write(files["pairs"], (tasks.pair(problem, rng) for problem in introduced[: scale.pairs]))
        both = zip(_by_rule(asked, scale.task), introduced, strict=False)
        _write(files["scenarios"], (problem for one_of_each in both for problem in one_of_each))

    def write_tuning(self) -> int:
        """What rejection sampling kept, and greetings, in one file; how many they are."""
        files = (self.folder / "kept" / KEPT, self.files["greetings"])
        lines = [line for file in files for line in file.read_text("utf-8").splitlines()]
        _write(self.files["tuning"], map(json.loads, lines))
        return len(lines)

    def make_base(self) -> None:
        self._make("base", MODEL)

    def make_student(self) -> None:
        self._make("student-base", STUDENT)

    # The stages.

    def cold_start(self) -> SFTConfig:
        return self._sft(self.folder / "base", "demonstrations", self.scale.start_steps, self.seed)

    def reasoning(self) -> GRPOConfig:
        """DAPO's loss on policy: one step a round, no reference; AdamW, for Muon's steps are too large."""
        scale = self.scale
        return GRPOConfig(
            model=self._export("start"),
            problems=(str(self.files["problems"]),),
            held_out=(str(self.files["held-out"]),),
            rewards=(tasks.REWARDS[scale.task],),
            train=replace(
                RL_TRAIN,
                steps=scale.rl_steps,
                evaluate_every=max(1, scale.rl_steps // 3),
                checkpoint_every=10,
                optim=OptimConfig(
                    lr=scale.rl_rate,
                    weight_decay=0.0,
                    schedule="linear",
                    warmup_steps=min(3, scale.rl_steps),
                ),
            ),
            rollout=self._sampling(scale.questions, scale.group),
            policy=published("dapo"),
            pass_k=1,
            seed=self.seed,
        )

    def control(self, steps: int) -> SFTConfig:
        return self._sft(self._export("start"), "demonstrations", steps, self.seed + 1)

    def rejection(self) -> RejectConfig:
        """The first problems of RL again, a few answers each."""
        return RejectConfig(
            model=self._export("rl"),
            problems=(str(self.files["to-keep"]),),
            rewards=(tasks.REWARDS[self.scale.task],),
            rollout=self._sampling(4 * self.scale.questions, 2),
            seed=self.seed,
        )

    def tuning(self) -> SFTConfig:
        return self._sft(self.folder / "base", "tuning", self.scale.tuned_steps, self.seed)

    def taste(self) -> PreferenceConfig:
        return PreferenceConfig(
            model=self._export("tuned"),
            pairs=(str(self.files["pairs"]),),
            train=replace(
                RL_TRAIN, steps=self.scale.taste_steps, optim=OptimConfig(lr=3e-4, weight_decay=0.0)
            ),
            tokens_per_batch=self.scale.tokens_per_batch,
            seq_len=256,
            seed=self.seed,
        )

    def all_scenarios(self) -> GRPOConfig:
        plain = self.reasoning()
        return replace(
            plain,
            model=self._export("tuned"),
            problems=(str(self.files["scenarios"]),),
            preference=AppraisalConfig(self._export("taste"), "pairwise"),
            train=replace(plain.train, steps=self.scale.final_steps, evaluate_every=0),
        )

    def distillation(self) -> SFTConfig:
        plain = self._sft(self.folder / "student-base", "tuning", self.scale.student_steps, self.seed)
        return replace(
            plain,
            train=replace(plain.train, balance=RL_TRAIN.balance),
            distill=DistillConfig(self._export("final"), keep=16),
        )

    def _sampling(self, questions: int, group: int) -> RolloutConfig:
        scale = self.scale
        return RolloutConfig(
            questions=questions,
            group=group,
            max_tokens=scale.max_tokens,
            max_sequences=min(scale.at_once, questions * group),
            cache_bytes=1 << 28,
            max_batch_tokens=scale.max_batch_tokens,
            decode_steps=scale.decode_steps,
        )

    def _sft(self, model: Path | str, data: str, steps: int, seed: int) -> SFTConfig:
        return SFTConfig(
            model=str(model),
            data=(str(self.files[data]),),
            train=TrainConfig(
                steps=steps,
                evaluate_every=100,
                checkpoint_every=100,
                mtp_loss_weight=0.0,
                optim=OptimConfig("muon", lr=5e-3, warmup_steps=min(20, steps), schedule="linear"),
                balance=BalanceConfig(bias_update_speed=0.01),
            ),
            tokens_per_batch=self.scale.tokens_per_batch,
            seq_len=256,
            samples=2,
            seed=seed,
        )

    def _export(self, name: str) -> str:
        return str(self.folder / name / "export")

    def _problems(self, task: str, size: int, *, held_out: bool, slips: float = 0.0) -> Any:
        return tasks.problems(task, size, self.seed, held_out=held_out, slips=slips)

    def _make(self, name: str, config: ModelConfig) -> None:
        folder = self.folder / name
        if (folder / "config.json").exists():
            return
        width = self.scale.width
        config = replace(
            config,
            hidden_size=config.hidden_size * width,
            intermediate_size=config.intermediate_size * width,
            moe=None if config.moe is None else replace(config.moe, n_routed_experts=8 * width),
        )
        tokenizer = train_tokenizer(["0123456789"], SMALLEST)
        tokenizer.save(self.folder / "tokenizer")
        model = Transformer(config)
        model.init_weights(torch.Generator().manual_seed(self.seed))
        hf.save(model, folder, tokenizer_files=sorted((self.folder / "tokenizer").iterdir()))


def _by_rule(problems: Iterable[tasks.Problem], task: str) -> Iterator[tasks.Problem]:
    """Problems that are judged by the rule of their task, whatever else there is."""
    return ({**problem, "rewards": [tasks.REWARDS[task]]} for problem in problems)


def _write(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with write_atomically(file) as opened:
        opened.writelines(json.dumps(record).encode() + b"\n" for record in records)
