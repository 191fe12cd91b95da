"""Laws of the seam: the loop minimises what it is given, on the parameters it is told.

Its terms are the metrics of the run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shoal.batch import Batch
from shoal.config.run import BalanceConfig, OptimConfig, TrainConfig
from shoal.model.transformer import Transformer
from shoal.train.objective import Reduce, Share, Step, alone
from shoal.train.optim import Trainable
from shoal.train.team import Team
from shoal.train.trainer import Trainer
from tests.train import parts

SETTINGS = TrainConfig(
    steps=4,
    accumulation=2,
    checkpoint_every=2,
    optim=OptimConfig(lr=0.02),
    balance=BalanceConfig(bias_update_speed=0.01),
)
EXPERTS = "model.layers.1.mlp.experts.down_proj"


@dataclass(frozen=True, eq=False)
class Scored(Batch):
    """A batch that brings what its objective alone knows of."""

    rewards_T: Tensor | None = None


class Rewarded:
    """Minus the reward-weighted mean of the hidden states, over all tokens of the step."""

    def count(self, batches: Sequence[Batch]) -> Tensor:
        return torch.tensor([sum(batch.num_tokens for batch in batches)])

    def compute(self, model: Transformer, batch: Batch, step: Step) -> Share:
        assert isinstance(batch, Scored)
        assert batch.rewards_T is not None
        out = model(batch)
        total = -(batch.rewards_T @ out.hidden_TD.mean(-1)) / step.counts[0]
        seen = torch.tensor(batch.num_tokens / int(step.counts[0]))
        experts = tuple(routing.experts_TK for routing in out.routing)
        return Share(total, {"loss": total.detach(), "seen": seen}, experts)


def scored(index: int) -> Batch:
    pack = parts.batch(index, (5, 3 + index))
    rewards_T = torch.linspace(-1, 1, pack.num_tokens)
    return Scored(**vars(pack), rewards_T=rewards_T)


def train(
    folder: Path,
    *,
    settings: TrainConfig = SETTINGS,
    trainable: Trainable | None = None,
    reduce: Reduce = alone,
    dtype: torch.dtype = torch.float32,
) -> Transformer:
    run = Trainer(
        parts.model(dtype=dtype),
        parts.batch,
        settings,
        folder,
        generator=torch.Generator(),
        trainable=trainable,
        team=Team(reduce),
    )
    run.resume()
    run.run()
    return run.model


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_another_objective_is_minimised_and_its_terms_are_metrics(tmp_path: Path) -> None:
    model = parts.model()
    run = Trainer(model, scored, SETTINGS, tmp_path, generator=torch.Generator(), objective=Rewarded())
    run.run()
    told = lines(tmp_path)
    assert all(line["seen"] == pytest.approx(1.0) for line in told)  # the shares of a step add up to it
    assert told[-1]["loss"] < told[0]["loss"]
    assert "mtp" not in told[0]
    assert run.optimizer.adamw.steps == 4


def test_an_objective_names_its_loss_and_no_field_of_a_step(tmp_path: Path) -> None:
    class Renamed(Rewarded):
        def __init__(self, name: str) -> None:
            self.name = name

        def compute(self, model: Transformer, batch: Batch, step: Step) -> Share:
            share = super().compute(model, batch, step)
            names = {"loss": "regret"} if self.name == "loss" else {"seen": self.name}
            return replace(share, terms={names.get(n, n): t for n, t in share.terms.items()})

    for name, message in (("loss", "must be named 'loss'"), ("lr", "a term 'lr'")):
        run = Trainer(
            parts.model(),
            scored,
            SETTINGS,
            tmp_path / name,
            generator=torch.Generator(),
            objective=Renamed(name),
        )
        with pytest.raises(ValueError, match=message):
            run.run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_trainable_stays_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    """A vector whole, and two experts of a stack: their rows move, and nothing else does."""
    trainable = {"model.norm.weight": None, EXPERTS: torch.tensor([3, 11])}
    before = parts.model(dtype=dtype).state_dict()
    after = train(tmp_path, trainable=trainable, dtype=dtype).state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in moved if "correction_bias" not in name} == trainable.keys()
    rows = (before[EXPERTS] != after[EXPERTS]).flatten(1).any(1).nonzero().flatten()
    assert rows.tolist() == [3, 11]


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_rows_learn_as_they_would_in_the_whole(rule: str, tmp_path: Path) -> None:
    """Experts that learn alone take the very step they take when all of their stack does."""
    optim = replace(SETTINGS.optim, optimizer=rule, clip=1e9)  # type: ignore[arg-type]
    settings = replace(SETTINGS, steps=1, optim=optim)
    some = train(tmp_path / "some", settings=settings, trainable={EXPERTS: torch.tensor([3, 11])})
    stack = train(tmp_path / "all", settings=settings, trainable={EXPERTS: None})
    ours, theirs = (model.get_parameter(EXPERTS)[[3, 11]] for model in (some, stack))
    # One float32 step of size 0.02: the batched products of Muon sum in another order.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_run_of_a_few_parameters_saves_no_others_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    trainable = {"model.norm.weight": None, EXPERTS: torch.tensor([3, 11])}
    train(tmp_path / "whole", trainable=trainable)
    for steps in (1, 3, 4):
        train(tmp_path / "parts", settings=replace(SETTINGS, steps=steps), trainable=trainable)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000004"
    saved = load_file(checkpoint / "model.safetensors")
    assert {name for name in saved if "correction_bias" not in name} == trainable.keys()
    assert load_file(checkpoint / "optimizer.safetensors")[f"{EXPERTS}.exp_avg"].shape[0] == 2
    ours, theirs = (
        {
            name: tensor
            for stem in ("model", "optimizer")
            for name, tensor in load_file(
                tmp_path / run / "checkpoints" / "step-000004" / f"{stem}.safetensors"
            ).items()
        }
        for run in ("parts", "whole")
    )
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_parameter_that_is_not_there_cannot_be_trained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no parameter .*nrom"):
        train(tmp_path, trainable={"model.nrom.weight": None})


def test_a_reduce_joins_counts_terms_and_loads(tmp_path: Path) -> None:
    """Two processes that see the same: counts and loads double, each one's loss is half of the mean."""
    train(tmp_path / "one", settings=replace(SETTINGS, steps=1))
    train(tmp_path / "two", settings=replace(SETTINGS, steps=1), reduce=lambda tensor: 2 * tensor)
    (one,), (two,) = (
        [line for line in lines(tmp_path / run) if line["kind"] == "step"] for run in ("one", "two")
    )
    for name in ("loss", "mtp", "balance"):
        assert two[name] == pytest.approx(one[name], rel=1e-6)
    assert two["max_violation"] == one["max_violation"]
    assert two["grad_norm"] == pytest.approx(one["grad_norm"] / 2, rel=1e-5)  # the other half is the other's
