"""A reward model, top to bottom: a checkpoint and pairs of answers become a judge of taste.

Pairs are JSON or JSON Lines: "messages" or "prompt", with "chosen" and "rejected"; or "instruction" with an
"output" that lists answers, the best first, each of which is then compared with the best. The law: no prompt
is on both sides; how many held-out pairs are told apart, before and after, is in judged.json. The folder and
its resume are those of stages/pretrain; export/ is a checkpoint like any other (stages/appraise reads it).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.batch import Batch
from shoal.checkpoint import hf
from shoal.config.run import to_table
from shoal.config.tune import PreferenceConfig
from shoal.data.atomic import write_atomically
from shoal.data.conversations import read_records
from shoal.data.text import Tokenizer
from shoal.model.transformer import Transformer
from shoal.stages.appraise import Appraiser, pack_whole
from shoal.stages.claim import claim
from shoal.stages.grpo import load_model, tokenizer_files, wilson
from shoal.train.metrics import Observer, Phase
from shoal.train.preference import Preference
from shoal.train.trainer import Outcome, Trainer


@dataclass(frozen=True)
class Pair:
    """Two answers as tokens, each behind its prompt."""

    better: tuple[int, ...]
    worse: tuple[int, ...]

    @property
    def longest(self) -> int:
        return max(len(self.better), len(self.worse))


@dataclass(frozen=True)
class Judged:
    """The share of held-out pairs told apart, and its 95% interval."""

    step: int
    pairs: int
    right: float
    low: float
    high: float


def run(
    config: PreferenceConfig,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    observe: Observer = lambda event: None,
) -> Outcome:
    """Run a recipe in a folder, or go on with the run that is there."""
    # 1. The recipe; with it the folder is this run's.
    claim(folder, config)

    # 2. The pairs, and the model. Its prediction modules are left behind.
    tokenizer = Tokenizer.load(config.model)
    train, held_out = read_pairs(config, tokenizer, observe)
    model = load_model(config.model, config.dtype, device)
    token = tokenizer.pad_id
    packer = PairPacker(train, config.tokens_per_batch, config.seed, torch.device(device))

    # 3. The loop, from the last checkpoint or the start.
    trainer = Trainer(
        model,
        packer.batch,
        config.train,
        folder,
        generator=torch.Generator(device).manual_seed(config.seed),
        objective=Preference(config.kind, token),
        recipe=to_table(config),
        observe=observe,
    )
    if not trainer.resume():
        judge(model, token, held_out, 0, folder, observe)
    outcome = trainer.run()

    # 4. What it is worth, and the checkpoint that rewards.
    if not outcome.interrupted:
        judge(model, token, held_out, outcome.step, folder, observe)
        hf.save(model, folder / "export", tokenizer_files=tokenizer_files(config.model), overwrite=True)
    return outcome


def judge(
    model: Transformer, token: int, pairs: Sequence[Pair], step: int, folder: Path, observe: Observer
) -> Judged | None:
    """Tell held-out pairs apart, and write down how often that was right. The model is left in training."""
    if not pairs:
        return None
    learning = [parameter.requires_grad for parameter in model.parameters()]
    values_S = Appraiser(model, token).values([text for pair in pairs for text in (pair.better, pair.worse)])
    model.train()
    for parameter, learns in zip(model.parameters(), learning, strict=True):
        parameter.requires_grad_(learns)
    better_P, worse_P = values_S.view(-1, 2).unbind(1)
    right = float((better_P > worse_P).double().mean())
    judged = Judged(step, len(pairs), right, *wilson(right, len(pairs)))
    file = folder / "judged.json"
    before = [line for line in json.loads(file.read_text()) if line["step"] < step] if file.exists() else []
    with write_atomically(file) as opened:
        opened.write(json.dumps([*before, asdict(judged)], indent=1).encode())
    observe(
        Phase(
            f"  step {step}: {right:.1%} of {len(pairs)} held-out pairs are told apart "
            f"({judged.low:.1%} to {judged.high:.1%})"
        )
    )
    return judged


@dataclass(frozen=True, eq=False)
class PairPacker:
    """Batches of whole pairs; batch i is a function of (seed, i): each epoch has an order of its own."""

    pairs: Sequence[Pair]
    tokens_per_batch: int
    seed: int
    device: torch.device

    def batch(self, index: int) -> Batch:
        epoch = 0
        while index >= len(bins := self._lay_out(epoch)):
            index, epoch = index - len(bins), epoch + 1
        texts = [text for i in bins[index] for text in (self.pairs[i].better, self.pairs[i].worse)]
        return pack_whole(texts, self.device)

    def _lay_out(self, epoch: int) -> list[list[int]]:
        key = np.array([self.seed, epoch], np.uint64)
        order = np.argsort(np.random.Philox(key=key).random_raw(len(self.pairs)), kind="stable").tolist()
        bins: list[list[int]] = [[]]
        tokens = 0
        for i in order:
            size = len(self.pairs[i].better) + len(self.pairs[i].worse)
            if bins[-1] and tokens + size > self.tokens_per_batch:
                bins.append([])
                tokens = 0
            bins[-1].append(i)
            tokens += size
        return bins


def read_pairs(
    config: PreferenceConfig, tokenizer: Tokenizer, observe: Observer
) -> tuple[list[Pair], list[Pair]]:
    """Those to train on, and those held out by a hash of the prompt. ValueError where none is left."""
    sides: tuple[list[Pair], list[Pair]] = [], []
    long = 0
    for where, record in read_records(config.pairs):
        messages, answers = _answers(record, where)
        texts = [_render(messages, answer, tokenizer) for answer in answers]
        digest = hashlib.sha256(json.dumps(messages, ensure_ascii=False).encode()).digest()
        side = sides[int.from_bytes(digest[:8], "big") / 2**64 < config.holdout_fraction]
        for worse in texts[1:]:
            pair = Pair(texts[0], worse)
            if pair.longest > config.seq_len:
                long += 1
            elif pair.better != pair.worse:
                side.append(pair)
    if long:
        observe(Phase(f"{long} pairs have an answer longer than seq_len {config.seq_len}: left out"))
    if not sides[0]:
        raise ValueError(
            f"no two answers to compare in {', '.join(config.pairs)} are within seq_len {config.seq_len}"
        )
    return sides


def _answers(record: Any, where: str) -> tuple[Sequence[Mapping[str, Any]], list[str]]:
    """What was asked, and the answers, the best first."""
    if isinstance(record, dict):
        told: dict[str, Any] = record  # type: ignore[reportUnknownVariableType]
        answers = told.get("output")
        if "chosen" in told and "rejected" in told:
            answers = [told["chosen"], told["rejected"]]
        if isinstance(answers, list) and all(isinstance(answer, str) for answer in answers):  # type: ignore[reportUnknownVariableType]
            if "messages" in told:
                return told["messages"], answers  # type: ignore[reportUnknownVariableType]
            if isinstance(asked := told.get("prompt", told.get("instruction")), str):
                asked = "\n\n".join(part for part in (asked, told.get("input", "")) if part)
                history = [
                    {"role": role, "content": text}
                    for turn in told.get("history") or []
                    for role, text in zip(("user", "assistant"), turn, strict=True)
                ]
                return [*history, {"role": "user", "content": asked}], answers  # type: ignore[reportUnknownVariableType]
    raise ValueError(
        f"{where} has no answers to compare: 'chosen' and 'rejected', or a list 'output', the best first, "
        f"beside 'messages', 'prompt' or 'instruction'"
    )


def _render(messages: Sequence[Mapping[str, Any]], answer: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    said = [*messages, {"role": "assistant", "content": answer}]
    return tuple(tokenizer.chat(said, add_generation_prompt=False))
