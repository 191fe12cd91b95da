"""What trains on several processes, said once: each feature as a recipe, and the degrees it is asked for on.

`table` is the matrix of docs/how-to/train-on-several.md. Whether a recipe is refused the code says; that one
which is not gives the run of one process is what `train` is for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from shoal.config.model import ModelConfig
from shoal.config.run import BalanceConfig, DataConfig, OptimConfig, ParallelConfig, RunConfig
from shoal.config.sparsify import SparsifyConfig, Stage
from shoal.train.fp8 import multiply_in_fp8
from shoal.train.indexer import LearnIndexers
from shoal.train.loss import NextToken
from shoal.train.metrics import Event, StepReport
from shoal.train.recompute import recompute
from shoal.train.team import Team
from shoal.train.trainer import Trainer
from tests.parallel import work
from tests.train import parts

DEGREES = {
    "`data` (FSDP2)": ParallelConfig(data=2),
    "`expert`": ParallelConfig(expert=2),
    "`pipeline`, 1F1B": ParallelConfig(pipeline=2),
    "`pipeline`, DualPipeV": ParallelConfig(pipeline=2, schedule="dualpipev"),
    "`context`": ParallelConfig(context=2),
}
PAIRS = {
    "`data`, `expert`": ParallelConfig(data=2, expert=2),
    "`data`, `pipeline`": ParallelConfig(data=2, pipeline=2, schedule="dualpipev"),
    "`data`, `context`": ParallelConfig(data=2, context=2),
    "`expert`, `pipeline`": ParallelConfig(expert=2, pipeline=2),
    "`expert`, `context`": ParallelConfig(expert=2, context=2),
}
WARM_UP, SPARSE = "DSA, warm-up", "DSA, sparse stage"
TOGETHER = ("prediction modules (MTP)", "NSA", SPARSE, "FP8 products", "recompute", "Muon")  # on pairs
TRAIN = replace(work.TRAIN, steps=2, accumulation=8, checkpoint_every=0)
PLAIN = work.deep(num_nextn_predict_layers=0)

Recipe = Callable[[ParallelConfig], RunConfig]


def recipe(model: ModelConfig = PLAIN, precision: str = "dtype", **changes: Any) -> Recipe:
    def of(parallel: ParallelConfig) -> RunConfig:
        train = replace(TRAIN, **changes)
        data = DataConfig(tokens_per_batch=32, seq_len=32)
        return RunConfig(model, train, data, precision=precision, parallel=parallel)  # type: ignore[arg-type]

    return of


def sparsify(stage: Stage) -> Recipe:
    def of(parallel: ParallelConfig) -> RunConfig:
        config = recipe(five(work.indexed()))(parallel)
        SparsifyConfig("its folder", stage, config.train, config.data, parallel=parallel)
        return config

    return of


def five(model: ModelConfig) -> ModelConfig:
    """As many blocks as stages of a V want, and no prediction module."""
    return replace(model, num_hidden_layers=5, num_nextn_predict_layers=0)


def limited() -> ModelConfig:
    assert PLAIN.moe is not None
    return replace(PLAIN, moe=replace(PLAIN.moe, norm_topk_prob=False, capacity_factor=1.0))


def moving(**changes: Any) -> OptimConfig:
    return replace(TRAIN.optim, **changes)


FEATURES: dict[str, Recipe] = {
    "MLA, routed experts, loss-free bias, sequence-wise loss": recipe(),
    "prediction modules (MTP)": recipe(work.deep()),
    "V2's, Switch's and GShard's losses, z-loss": recipe(
        balance=BalanceConfig(
            sequence_loss=0.1,
            device_loss=0.2,
            communication_loss=0.3,
            devices=4,
            switch_loss=0.4,
            gshard_loss=0.5,
            z_loss=1e-3,
        )
    ),
    "quantile balancing": recipe(balance=replace(TRAIN.balance, bias_rule="quantile")),
    "expert choice": recipe(five(work.routed("expert_choice"))),
    "capacity": recipe(limited()),
    "grouped-query attention": recipe(five(work.grouped())),
    "NSA": recipe(five(work.native_sparse())),
    WARM_UP: sparsify("warm-up"),
    SPARSE: sparsify("sparse"),
    "FP8 products": recipe(precision="fp8"),
    "recompute": recipe(recompute="full"),
    "Muon": recipe(optim=moving(optimizer="muon")),
    "8-bit moments": recipe(optim=moving(moments="int8")),
    "optimizer inside backward": recipe(accumulation=1, optim=moving(in_backward=True)),
}


def is_refused(feature: str, parallel: ParallelConfig) -> str | None:
    """What the user is told, if the recipe is refused."""
    try:
        FEATURES[feature](parallel)
    except ValueError as error:
        return str(error)
    return None


def table() -> list[str]:
    head = ["", *DEGREES]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for feature in FEATURES:
        cells = ["no" if is_refused(feature, degrees) else "=" for degrees in DEGREES.values()]
        rows.append("| " + " | ".join([feature, *cells]) + " |")
    return rows


def train(
    feature: str, parallel: ParallelConfig | None, folder: Path, device: str = "cpu"
) -> list[tuple[float, float]]:
    """Two steps: the loss and the gradient's norm of each. What is learned is in the folder's checkpoint."""
    config = FEATURES[feature](parallel or ParallelConfig())
    model = recompute(parts.model(config.model).to(device), config.train.recompute)
    if config.precision == "fp8":
        multiply_in_fp8(model, "step")  # stricter than recipes: nothing stale may come of it
    team = Team() if parallel is None else work.spread(parallel, model)
    told: list[Event] = []
    base = NextToken.of(config.model, config.train)
    trainer = Trainer(
        model,
        parts.batch,
        config.train,
        folder,
        generator=torch.Generator(),
        team=team,
        objective=LearnIndexers(base) if feature == SPARSE else base,
        observe=told.append,
    )
    trainer.run()
    return [(each.terms["loss"], each.grad_norm) for each in told if isinstance(each, StepReport)]


Jobs = list[tuple[ParallelConfig, list[str]]]


def train_all(jobs: Jobs, folder: Path, device: str = "cpu") -> None:
    """What the processes do: what each is told is in its folder, its first process's losses beside it."""
    for number, (parallel, features) in enumerate(jobs):
        for index, feature in enumerate(features):
            try:
                train(feature, parallel, folder / str(number) / str(index), device)
            except ValueError as error:
                raise ValueError(f"{feature} on {parallel}: {error}") from error
