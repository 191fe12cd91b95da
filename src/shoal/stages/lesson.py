"""The quickstart's second half, top to bottom: the model that writes learns to add, thinking before it says.

First it is tuned on demonstrations by somebody who forgets three carries in five, so that it has the form
and the demonstrator's habits; then it is told right or wrong, and no more. It is the loop of stages/r1,
shorter, on the model at hand: its tokenizer joins digits, so they are written apart. The law: the shares are
of 500 sums that no stage was shown, for each model the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from shoal.checkpoint import hf
from shoal.config.policy import published
from shoal.config.run import BalanceConfig, OptimConfig, TrainConfig
from shoal.config.tune import RL_TRAIN, GRPOConfig, RolloutConfig, SFTConfig
from shoal.data.atomic import write_atomically
from shoal.data.text import Tokenizer
from shoal.stages import grpo, sft, tasks
from shoal.stages.judge import Judge
from shoal.stages.rollout import Rollout
from shoal.train.metrics import Observer, Phase

DIGITS, SLIPS = 2, 0.6
DEMONSTRATIONS, PROBLEMS, HELD_OUT = 2500, 4000, 500


@dataclass(frozen=True)
class Mark:
    """What a model does with the held-out sums: the share right, and its 95% interval."""

    name: str
    right: float
    low: float
    high: float


@dataclass(frozen=True)
class Lesson:
    marks: tuple[Mark, ...]  # before, after SFT, after RL
    asked: str
    thought: str
    said: str
    answer: str  # what it should be
    export: Path


def run(
    export: Path,
    folder: Path,
    observe: Observer,
    *,
    sft_steps: int = 200,
    rl_steps: int = 36,
    held_out: int = HELD_OUT,
) -> Lesson | None:
    """Teach the checkpoint `export`, in `folder`; None if it was interrupted. Started again it goes on."""
    # 1. The sums.
    files = write_sums(folder / "data", held_out)

    # 2. Supervised tuning.
    observe(
        Phase(f"tuning on {DEMONSTRATIONS} sums, worked by somebody who forgets {SLIPS:.0%} of the carries")
    )
    tuning = demonstrations(export, files["demonstrations"], sft_steps)
    if not _is_done(folder / "sft") and sft.run(tuning, folder / "sft", observe=observe).interrupted:
        return None

    # 3. GRPO.
    observe(Phase(f"reinforcement on {PROBLEMS} sums: right or wrong, and no solutions"))
    rewarded = reinforcement(folder / "sft" / "export", files, rl_steps)
    if not _is_done(folder / "rl") and grpo.run(rewarded, folder / "rl", observe=observe).interrupted:
        return None

    # 4. What each of the three makes of sums it has not seen.
    observe(Phase(f"asking all three models {held_out} other sums"))
    paths = {
        "pretrained": export,
        "after SFT": folder / "sft" / "export",
        "after GRPO": folder / "rl" / "export",
    }
    asked = {name: ask(path, rewarded) for name, path in paths.items()}
    marks = []
    for name, answers in asked.items():
        share = sum(right for right, _ in answers) / len(answers)
        marks.append(Mark(name, share, *grpo.wilson(share, len(answers))))

    # 5. One of them in full: the first sum that the last model gets right and the one before it did not.
    problems = [json.loads(line) for line in files["held-out"].read_text("utf-8").splitlines()]
    gained = [
        number
        for number, ((now, _), (then, _)) in enumerate(
            zip(asked["after GRPO"], asked["after SFT"], strict=True)
        )
        if now and not then
    ]
    shown = gained[0] if gained else 0
    thought, _, said = asked["after GRPO"][shown][1].rpartition("</think>")
    return Lesson(
        tuple(marks),
        problems[shown]["messages"][0]["content"],
        thought.removeprefix("<think>"),
        said,
        str(problems[shown]["answer"]),
        paths["after GRPO"],
    )


def write_sums(folder: Path, asked: int = HELD_OUT) -> dict[str, Path]:
    files = {name: folder / f"{name}.jsonl" for name in ("demonstrations", "problems", "held-out")}
    sums = tasks.problems("addition", DIGITS, 0, held_out=False, slips=SLIPS)
    learned = map(tasks.demonstration, map(tasks.spell, islice(sums, DEMONSTRATIONS)))
    _write(files["demonstrations"], learned)
    _write(files["problems"], map(tasks.spell, islice(sums, PROBLEMS)))
    held_out = islice(tasks.problems("addition", DIGITS, 0, held_out=True), asked)
    _write(files["held-out"], map(tasks.spell, held_out))
    return files


def demonstrations(model: Path, data: Path, steps: int) -> SFTConfig:
    return SFTConfig(
        model=str(model),
        data=(str(data),),
        train=TrainConfig(
            steps=steps,
            evaluate_every=0,
            checkpoint_every=50,
            mtp_loss_weight=0.0,
            optim=OptimConfig("muon", lr=5e-3, warmup_steps=min(10, steps), schedule="linear"),
            balance=BalanceConfig(bias_update_speed=0.01),
        ),
        tokens_per_batch=2048,
        seq_len=128,
        samples=2,
    )


def reinforcement(model: Path, files: Mapping[str, Path], steps: int) -> GRPOConfig:
    optim = OptimConfig(lr=1e-4, weight_decay=0.0, schedule="linear", warmup_steps=min(3, steps))
    return GRPOConfig(
        model=str(model),
        problems=(str(files["problems"]),),
        held_out=(str(files["held-out"]),),
        rewards=("spelled",),
        train=replace(RL_TRAIN, steps=steps, evaluate_every=0, checkpoint_every=10, optim=optim),
        rollout=RolloutConfig(questions=24, group=8, max_tokens=48, max_sequences=192, cache_bytes=1 << 27),
        policy=published("dapo"),
        pass_k=1,
    )


def ask(path: Path, config: GRPOConfig) -> list[tuple[bool, str]]:
    """Whether each of the held-out sums is answered right, and what was said; the most probable answers."""
    model, tokenizer = hf.load(path, mtp=False), Tokenizer.load(path)
    questions = grpo.read_questions(config.held_out, tokenizer)
    with Judge(config.weights()) as judge:
        groups = Rollout(model, tokenizer, judge, config).evaluate(questions, 1, 0)
    return [(group[0].score.total >= config.correct_at, group[0].text) for group in groups]


def _is_done(folder: Path) -> bool:
    return (folder / "export").exists()


def _write(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with write_atomically(file) as opened:
        opened.writelines(json.dumps(record).encode() + b"\n" for record in records)
