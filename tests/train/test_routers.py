"""Laws of training by the rules that are there to be compared with: they learn, and a replay of what was
recorded, which recompute does, changes nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.batch import Batch
from shoal.config.families import tiny
from shoal.config.run import BalanceConfig, OptimConfig, Recompute, TrainConfig
from shoal.train.metrics import StepReport
from shoal.train.recompute import recompute
from shoal.train.trainer import Trainer
from tests.train import parts

SETTINGS = TrainConfig(
    steps=8,
    checkpoint_every=0,
    optim=OptimConfig(lr=0.01, warmup_steps=1),
    balance=BalanceConfig(sequence_loss=0.01),
)


def _train(name: str, mode: Recompute, folder: Path) -> list[StepReport]:
    generator = torch.Generator().manual_seed(0)
    model = recompute(parts.model(replace(tiny(name), vocab_size=50)), mode, [generator])
    told: list[StepReport] = []

    def observe(event: object) -> None:
        if isinstance(event, StepReport):
            told.append(event)

    def batches(index: int) -> Batch:
        return parts.batch(index % 2)

    Trainer(model, batches, SETTINGS, folder, generator=generator, observe=observe).run()
    return told


@pytest.mark.parametrize("rule", ["hash", "expert-choice", "segments", "noisy"])
def test_a_rule_learns_and_recompute_changes_nothing(rule: str, tmp_path: Path) -> None:
    kept = _train(f"deepseek-moe-2b-{rule}", "none", tmp_path / "none")
    remade = _train(f"deepseek-moe-2b-{rule}", "full", tmp_path / "full")
    assert kept[-1].terms["loss"] < 0.9 * kept[0].terms["loss"]
    assert [step.terms for step in kept] == [step.terms for step in remade]
    if rule == "expert-choice":  # every expert takes as many tokens: even by construction
        assert all(violation == 0 for step in kept for violation in step.max_violation)
