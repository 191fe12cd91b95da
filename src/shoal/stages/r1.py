"""R1 in small, top to bottom: a cold start by demonstrations, reasoning RL, and a control of equal compute.

A model of some million parameters is born, tuned on few worked solutions, and then left to find answers to
many problems of which it is told only whether they are right. The control goes on with the demonstrations
instead, for as much arithmetic. The law: what is claimed is measured on at least 500 problems that were held
out, for start, RL and control alike, and an interval stands beside each share.

    base/  a newborn    start/  after the demonstrations    rl/  after RL    control/  more demonstrations
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from shoal.checkpoint import hf
from shoal.config.model import MLAConfig, ModelConfig, MoEConfig, RopeConfig
from shoal.config.policy import published
from shoal.config.run import BalanceConfig, OptimConfig, TrainConfig
from shoal.config.tune import RL_TRAIN, GRPOConfig, RolloutConfig, SFTConfig
from shoal.data.atomic import write_atomically
from shoal.data.text import Tokenizer
from shoal.data.tokenizer import SMALLEST, train_tokenizer
from shoal.model.transformer import Transformer
from shoal.stages import grpo, sft, tasks
from shoal.stages.judge import Judge
from shoal.stages.rollout import Rollout
from shoal.train.metrics import Observer, Phase

MODEL = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=SMALLEST,  # a token a byte: digits are read one by one
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
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
        n_routed_experts=16,
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


@dataclass(frozen=True)
class Scale:
    """How much is done. `size` is the digits of an addition, or the numbers of a countdown."""

    task: str = "addition"
    size: int = 4
    demonstrations: int = 1500
    problems: int = 20_000
    held_out: int = 500
    start_steps: int = 300
    rl_steps: int = 120
    questions: int = 32
    group: int = 8
    max_tokens: int = 64

    def __post_init__(self) -> None:
        if self.task not in tasks.TASKS:
            raise ValueError(f"there is no task {self.task!r}; known are {', '.join(tasks.TASKS)}")
        for name, value in vars(self).items():
            if name != "task" and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")


LAPTOP = {
    "addition": Scale("addition", size=3, demonstrations=600, start_steps=130, max_tokens=48),
    "countdown": Scale("countdown", size=4, demonstrations=1500, start_steps=200, max_tokens=40),
}


def laptop(task: str, changes: Mapping[str, int]) -> Scale:
    """The scale of half an hour on two cores, some of it changed."""
    if task not in LAPTOP:
        raise ValueError(f"there is no task {task!r}; known are {', '.join(LAPTOP)}")
    return replace(LAPTOP[task], **changes)


@dataclass(frozen=True)
class Result:
    """The share of held-out problems answered right at once, and its 95% interval."""

    name: str
    accuracy: float
    low: float
    high: float
    length: float  # tokens of an answer, on average
    steps: int
    training_tokens: int  # as many tokens forward and backward as its arithmetic amounts to


def run(
    scale: Scale,
    folder: Path,
    seed: int = 0,
    *,
    device: torch.device | str = "cpu",
    observe: Observer = lambda event: None,
) -> list[Result] | None:
    """All of it, or what is left of it; None if it was interrupted."""
    # 1. Problems, and a model that knows nothing.
    files = write_problems(scale, folder, seed)
    base = make_base(folder / "base", seed)

    # 2. The cold start: few demonstrations.
    observe(Phase(f"cold start: {scale.demonstrations} worked solutions"))
    start = demonstrations(scale, base, files, scale.start_steps, seed)
    if sft.run(start, folder / "start", device=device, observe=observe).interrupted:
        return None

    # 3. Reasoning RL: many problems, told right or wrong.
    observe(Phase(f"RL: {scale.problems} problems, no solutions"))
    rl = reinforcement(scale, folder / "start" / "export", files, seed)
    if grpo.run(rl, folder / "rl", device=device, observe=observe).interrupted:
        return None

    # 4. The control: the arithmetic of RL, spent on the demonstrations.
    tokens = rl_tokens(folder / "rl")
    per_step = _tokens(folder / "start") / scale.start_steps
    steps = max(1, round(tokens / per_step))
    observe(Phase(f"control: {steps} more steps on the demonstrations, the arithmetic of RL"))
    control = demonstrations(scale, folder / "start" / "export", files, steps, seed + 1)
    if sft.run(control, folder / "control", device=device, observe=observe).interrupted:
        return None

    # 5. All three on what none has seen.
    observe(Phase(f"answering {scale.held_out} held-out problems"))
    done = {"start": (scale.start_steps, _tokens(folder / "start")), "rl": (scale.rl_steps, tokens)}
    done["control"] = (steps, _tokens(folder / "control"))
    results = [judge(name, folder / name / "export", rl, device, *amount) for name, amount in done.items()]
    _write(folder / "results.jsonl", map(vars, results))
    return results


def write_problems(scale: Scale, folder: Path, seed: int) -> dict[str, Path]:
    files = {name: folder / "data" / f"{name}.jsonl" for name in ("demonstrations", "problems", "held-out")}
    known = tasks.problems(scale.task, scale.size, seed, held_out=False)
    learned = list(islice(known, scale.demonstrations))
    asked = list(islice(known, scale.problems))
    held_out = list(islice(tasks.problems(scale.task, scale.size, seed, held_out=True), scale.held_out))
    if not asked or len(held_out) < scale.held_out:
        raise ValueError(
            f"{scale.task} of size {scale.size} has no more than {len(learned) + len(asked)} problems and "
            f"{len(held_out)} held out; raise its size, or ask for fewer"
        )
    _write(files["demonstrations"], map(tasks.demonstration, learned))
    _write(files["problems"], asked)
    _write(files["held-out"], held_out)
    return files


def make_base(folder: Path, seed: int) -> Path:
    if not (folder / "config.json").exists():
        tokenizer = train_tokenizer(["0123456789"], SMALLEST)
        tokenizer.save(folder.parent / "tokenizer")
        model = Transformer(MODEL)
        model.init_weights(torch.Generator().manual_seed(seed))
        hf.save(model, folder, tokenizer_files=sorted((folder.parent / "tokenizer").iterdir()))
    return folder


def demonstrations(scale: Scale, model: Path, files: Mapping[str, Path], steps: int, seed: int) -> SFTConfig:
    return SFTConfig(
        model=str(model),
        data=(str(files["demonstrations"]),),
        train=TrainConfig(
            steps=steps,
            evaluate_every=100,
            checkpoint_every=100,
            mtp_loss_weight=0.0,
            optim=OptimConfig("muon", lr=5e-3, warmup_steps=min(20, steps), schedule="linear"),
            balance=BalanceConfig(bias_update_speed=0.01),
        ),
        tokens_per_batch=4096,
        seq_len=256,
        samples=2,
        seed=seed,
    )


def reinforcement(scale: Scale, model: Path, files: Mapping[str, Path], seed: int) -> GRPOConfig:
    return GRPOConfig(
        model=str(model),
        problems=(str(files["problems"]),),
        held_out=(str(files["held-out"]),),
        rewards=(tasks.REWARDS[scale.task],),
        train=replace(
            RL_TRAIN,
            steps=scale.rl_steps,
            evaluate_every=max(1, scale.rl_steps // 4),
            checkpoint_every=25,
            optim=OptimConfig("muon", lr=5e-4, weight_decay=0.0, schedule="constant", warmup_steps=5)
            if scale.rl_steps > 5
            else RL_TRAIN.optim,
        ),
        rollout=RolloutConfig(
            questions=scale.questions,
            group=scale.group,
            max_tokens=scale.max_tokens,
            extra_rounds=2,
            max_sequences=scale.questions * scale.group,
            cache_bytes=1 << 28,
        ),
        policy=published("dapo"),
        pass_k=1,
        seed=seed,
    )


def rl_tokens(folder: Path) -> int:
    """What RL cost, in tokens of training: 6 FLOPs a parameter and token, of which 2 are the forward pass.

    A token went forward once when drawn, whether it was used or not; once more when looked back on, and then
    with its gradient. Evaluations are not training, and are left out on both sides.
    """
    rounds = (json.loads(line) for line in (folder / "rollouts.jsonl").read_text("utf-8").splitlines())
    drawn = sum(line["drawn"] for line in rounds)
    return round((2 * drawn + (2 + 6) * _tokens(folder)) / 6)


def _tokens(folder: Path) -> int:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return max(line["tokens"] for line in lines if line["kind"] == "step")


def judge(
    name: str, path: Path, config: GRPOConfig, device: torch.device | str, steps: int, tokens: int
) -> Result:
    model, tokenizer = hf.load(path, device=device), Tokenizer.load(path)
    questions = grpo.read_questions(config.held_out, tokenizer)
    with Judge(config.weights()) as judging:
        groups = Rollout(model, tokenizer, judging, config).evaluate(questions, 1, 0)
    right = sum(group[0].score.total >= config.correct_at for group in groups) / len(groups)
    length = sum(len(group[0].completion.ids) for group in groups) / len(groups)
    return Result(name, right, *grpo.wilson(right, len(groups)), length, steps, tokens)


def _write(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with write_atomically(file) as opened:
        opened.writelines(json.dumps(record).encode() + b"\n" for record in records)
