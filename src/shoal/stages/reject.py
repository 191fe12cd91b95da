"""Rejection sampling, top to bottom: a checkpoint answers problems, and what is right becomes data.

R1's third stage (arXiv 2501.12948, section 2.3.3): the model that RL left is asked, only right answers are
kept, and another model is tuned on them. The law: what is kept is a function of the weights, the recipe and
the seed; a run that was stopped goes on with the next problems, and ends with the same file.

    config.toml   the resolved recipe     kept.jsonl    conversations, for stages/sft
    parts/        what is done so far     counts.json   how many of how many
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from shoal.config.tune import RejectConfig
from shoal.data.atomic import write_atomically
from shoal.data.text import Tokenizer
from shoal.engine.sampling import hash_pair
from shoal.stages.claim import claim
from shoal.stages.grpo import load_model, read_questions
from shoal.stages.judge import Judge
from shoal.stages.rollout import Episode, Rollout
from shoal.train.metrics import Observer, Phase

KEPT = "kept.jsonl"


@dataclass(frozen=True)
class Kept:
    problems: int
    solved: int  # of them, with a right answer at least
    answers: int
    right: int
    kept: int  # conversations in the file


def run(
    config: RejectConfig,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    observe: Observer = lambda event: None,
) -> Kept:
    """Run a recipe in a folder, or go on with what is there."""
    # 1. The recipe; with it the folder is this run's.
    claim(folder, config)

    # 2. The problems, so many at a time; those answered before are not answered again.
    tokenizer = Tokenizer.load(config.model)
    questions = read_questions(config.problems, tokenizer)
    size = config.rollout.questions
    starts = range(0, len(questions), size)
    left = [start for start in starts if not _part(folder, start).exists()]
    if left:
        model = load_model(config.model, config.dtype, device)
        with Judge(config.sampling().weights(), config.reward_seconds) as judge:
            sampler = Rollout(model, tokenizer, judge, config.sampling())
            for start in left:
                asked = questions[start : start + size]
                groups = sampler.sample(asked, hash_pair(config.seed, start))
                kept = [choose(group, config, tokenizer) for group in groups]
                right = [sum(e.score.total >= config.correct_at for e in group) for group in groups]
                done = {"right": right, "answers": [len(group) for group in groups], "kept": kept}
                with write_atomically(_part(folder, start)) as file:
                    file.write(json.dumps(done, ensure_ascii=False).encode())
                told = min(start + size, len(questions))
                observe(Phase(f"  {told} of {len(questions)} problems, {sum(map(len, kept))} answers kept"))

    # 3. All of it in one file.
    parts = [json.loads(_part(folder, start).read_text("utf-8")) for start in starts]
    conversations = [conversation for part in parts for kept in part["kept"] for conversation in kept]
    with write_atomically(folder / KEPT) as file:
        file.writelines(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in conversations)
    counts = Kept(
        problems=len(questions),
        solved=sum(number > 0 for part in parts for number in part["right"]),
        answers=sum(number for part in parts for number in part["answers"]),
        right=sum(number for part in parts for number in part["right"]),
        kept=len(conversations),
    )
    with write_atomically(folder / "counts.json") as file:
        file.write(json.dumps(asdict(counts)).encode())
    return counts


def choose(group: Sequence[Episode], config: RejectConfig, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The conversations that a group is worth: right, whole, different, the shortest first."""
    ranked = sorted(_right(group, config), key=lambda episode: len(episode.completion.ids))
    texts = dict.fromkeys(episode.text for episode in ranked)
    question = group[0].question
    asked = question.problem.get("messages") or [{"role": "user", "content": question.problem["prompt"]}]
    # What the template has opened for the model belongs to what it said.
    opened = "<think>\n" if tokenizer.decode(list(question.ids)).rstrip().endswith("<think>") else ""
    return [
        {"messages": [*asked, {"role": "assistant", "content": opened + text}]}
        for text in list(texts)[: config.keep]
    ]


def _right(group: Sequence[Episode], config: RejectConfig) -> Iterator[Episode]:
    for episode in group:
        if episode.score.total >= config.correct_at and not episode.overlong and not episode.empty:
            yield episode


def _part(folder: Path, start: int) -> Path:
    return folder / "parts" / f"from-{start:07d}.json"
