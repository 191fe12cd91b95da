"""Laws of the indexers' training: they learn what attention reads, and nothing else learns from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.config.model import IndexerConfig, MLAConfig
from shoal.config.run import OptimConfig, TrainConfig
from shoal.model.transformer import Transformer
from shoal.train.indexer import LearnIndexers, divergence, indexers
from shoal.train.loss import NextToken
from shoal.train.objective import Step
from shoal.train.trainer import Trainer
from tests.train import parts

SPARSE = replace(
    parts.config(),
    attention=MLAConfig(2, 16, 8, 8, 8, q_lora_rank=12, indexer=IndexerConfig(8, 8, 5)),
    num_nextn_predict_layers=0,
)
STAGES = {"dense": LearnIndexers(), "sparse": LearnIndexers(NextToken(0, mtp_weight=0.0))}


def _step(objective: LearnIndexers, *indices: int) -> Step:
    return Step(0, 1, objective.count([parts.batch(index) for index in indices]))


def test_the_divergence_is_the_textbook_sum() -> None:
    inf = float("inf")
    scores_TN = torch.tensor([[0.0, -inf, -inf], [0.5, -1.0, -inf], [1.0, 2.0, 0.0]], requires_grad=True)
    mass_TN = torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.0, 0.5, 0.5]])
    wanted = 0.0
    for scores_N, mass_N in zip(scores_TN.tolist(), mass_TN.tolist(), strict=True):
        powers = [torch.tensor(score).exp().item() for score in scores_N]
        wanted += sum(
            p * torch.tensor(p * sum(powers) / e).log().item()
            for p, e in zip(mass_N, powers, strict=True)
            if p > 0
        )
    total = divergence(scores_TN, mass_TN)
    assert total.item() == pytest.approx(wanted, rel=1e-5)
    (slope_TN,) = torch.autograd.grad(total, scores_TN)
    # d KL / d score = softmax - mass
    assert torch.allclose(slope_TN, scores_TN.softmax(-1) - mass_TN, atol=1e-6)
    assert divergence(mass_TN[1:2, :2].log(), mass_TN[1:2, :2]).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_only_indexers_learn_from_the_divergence_and_they_from_nothing_else(stage: str) -> None:
    objective, batch, model = STAGES[stage], parts.batch(0), parts.model(SPARSE)
    step = _step(objective, 0)
    objective.compute(model, batch, step).total.backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    wanted = dict.fromkeys(got)
    if objective.base is not None:
        alone = parts.model(SPARSE)
        objective.base.compute(alone, batch, replace(step, counts=step.counts[1:])).total.backward()
        wanted = {name: p.grad for name, p in alone.named_parameters()}
    for name, grad in got.items():
        if ".indexer." in name:
            assert grad is not None, name
            assert grad.abs().max() > 0, name
            assert wanted[name] is None
        elif wanted[name] is None:
            assert grad is None, name
        else:
            assert torch.equal(grad, wanted[name]), name  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", STAGES)
def test_shares_add_up(stage: str) -> None:
    objective, model = STAGES[stage], parts.model(SPARSE)
    both = _step(objective, 0, 1)
    parted = [objective.compute(model, parts.batch(index), both) for index in (0, 1)]
    alone = [objective.compute(model, parts.batch(index), _step(objective, index)) for index in (0, 1)]
    # Both batches have as many tokens.
    wanted = sum(share.terms["indexer"] for share in alone) / 2
    assert torch.allclose(sum(share.terms["indexer"] for share in parted), wanted, rtol=1e-5)  # type: ignore[arg-type]


def _train(folder: Path, model: Transformer, objective: LearnIndexers, steps: int) -> list[float]:
    told: list[float] = []
    run = Trainer(
        model,
        lambda index: parts.batch(index % 2),
        TrainConfig(steps=steps, checkpoint_every=0, optim=OptimConfig(lr=0.01, warmup_steps=1)),
        folder,
        generator=torch.Generator(),
        objective=objective,
        trainable=indexers(model) if objective.base is None else None,
        observe=lambda event: told.append(getattr(event, "terms", {}).get("indexer", float("nan"))),
    )
    run.run()
    return [value for value in told if value == value]


def test_warm_up_brings_the_choice_to_where_attention_goes(tmp_path: Path) -> None:
    model = parts.model(SPARSE)
    before = {name: p.clone() for name, p in model.named_parameters()}
    told = _train(tmp_path / "dense", model, STAGES["dense"], 30)
    assert told[-1] < 0.7 * told[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == indexers(model).keys()
    model.requires_grad_(True)
    told = _train(tmp_path / "sparse", model, STAGES["sparse"], 4)  # and then all learn together
    assert all(value < 1 for value in told)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == before.keys()


def test_a_model_without_indexers_is_refused() -> None:
    with pytest.raises(ValueError, match="no layer has an indexer"):
        indexers(parts.model())
