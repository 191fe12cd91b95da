"""What the processes of these tests do. Each function runs in every one of them, with a process group that is
there; what it returns on each comes back to the test.

The ranks meet over a file, so no port is needed.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.batch import Batch
from shoal.config.model import GQAConfig, IndexerConfig, MLAConfig, ModelConfig, NSAConfig
from shoal.config.policy import PolicyConfig
from shoal.config.run import BalanceConfig, OptimConfig, ParallelConfig, Recompute, TrainConfig
from shoal.model.transformer import Output, Transformer
from shoal.parallel.expert import ExpertDispatcher
from shoal.parallel.mesh import make_mesh
from shoal.parallel.shard import local
from shoal.stages.team import make_team
from shoal.train.auxiliary import Auxiliary
from shoal.train.indexer import LearnIndexers
from shoal.train.loss import NextToken
from shoal.train.objective import Step
from shoal.train.policy import Policy
from shoal.train.recompute import recompute
from shoal.train.team import Team
from shoal.train.trainer import Evaluation, Trainer
from tests.train import parts

BATCHES = 8
# No two parameters would move apart by rounding alone where Adam divides by a root near 0.
TRAIN = TrainConfig(
    steps=4,
    accumulation=4,
    checkpoint_every=2,
    keep=9,
    optim=OptimConfig(lr=1e-3, eps=1e-3, schedule="constant"),
    balance=BalanceConfig(sequence_loss=1e-2),
)


NCCL = "cpu:gloo,cuda:nccl"


def launch(
    work: Callable[..., Any], ranks: int, folder: Path, *args: Any, backend: str = "gloo"
) -> list[Any]:
    """What `work(*args)` returns in each of so many processes."""
    folder.mkdir(parents=True, exist_ok=True)
    # Forked from a server that has read torch and this file once, and has run nothing yet.
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(
        _enter, (work, ranks, folder, backend, args), nprocs=ranks, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _enter(
    rank: int, work: Callable[..., Any], ranks: int, folder: Path, backend: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    if backend == NCCL:
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=ranks)
    torch.save(work(*args), folder / f"{rank}.pt")
    dist.destroy_process_group()


def spread(degrees: ParallelConfig, model: Transformer) -> Team:
    """The model over all processes, in place, and what the Trainer is told of them."""
    return make_team(model, make_mesh(degrees, model.head_weight().device))


def share_of(
    count: int, team: Team, batches: Callable[[int], Batch] = parts.batch, device: str = "cpu"
) -> list[Batch]:
    return [team.bring(batches(index), torch.device(device)) for index in team.mine(0, count)]


USUAL = Auxiliary({"sequence": 1e-2})


def losses_and_gradients(
    batches: list[Batch],
    model: Transformer,
    team: Team,
    mtp_weight: float = 0.3,
    auxiliary: Auxiliary = USUAL,
    teaches: bool = False,
) -> tuple[float, dict[str, Tensor]]:
    """Of one step, and each gradient, of which here are the team's rows. `teaches`: indexers learn, too."""
    modules = model.config.num_nextn_predict_layers
    objective: Any = NextToken(modules, mtp_weight=mtp_weight, auxiliary=auxiliary)
    objective = LearnIndexers(objective) if teaches else objective
    step = Step(0, 1, team.tally(objective.count(batches)))
    totals: list[Tensor] = []

    def judge(out: Output, batch: Batch) -> Tensor:
        totals.append(objective.judge(model, out, batch, step).total)
        return totals[-1]

    if team.stages is None:
        for batch in batches:
            totals.append(objective.compute(model, batch, step).total)
            totals[-1].backward()
    else:
        team.stages.train(batches, judge)
    grads = {name: local(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return team.reduce(torch.stack([total.detach() for total in totals]).sum()).item(), grads


def every_gradient(every: list[ParallelConfig], device: str = "cpu") -> dict[ParallelConfig, Any]:
    """For each mesh: the loss, and for each parameter its rows here and their gradient."""
    found = {}
    for degrees in every:
        model = parts.model().to(device)
        team = spread(degrees, model)
        loss, grads = losses_and_gradients(share_of(BATCHES, team, device=device), model, team)
        found[degrees] = (loss, {name: (team.peers.rows[name], grad) for name, grad in grads.items()})
    return found


# Models and ways to run them that a degree must not change: what is told of each, and how it is made.
VARIANTS: dict[str, Callable[[], Transformer]] = {
    "selective": lambda: recompute(parts.model(), "selective"),
    "full": lambda: recompute(parts.model(), "full"),
    "hash": lambda: parts.model(routed("hash")),
    "expert_choice": lambda: parts.model(routed("expert_choice")),
    "segments": lambda: parts.model(routed("segments")),
    "grouped": lambda: parts.model(grouped()),
    "two ahead": lambda: parts.model(parts.config(num_nextn_predict_layers=2)),
    "every loss": parts.model,
    "nothing here": parts.model,
    "taught": lambda: parts.model(indexed()),
    "native sparse": lambda: parts.model(native_sparse()),
}
TEACHES = {"taught"}
# Of those that want other losses or other batches than the rest.
EVERY_LOSS = {"sequence": 0.1, "device": 0.2, "communication": 0.3, "switch": 0.4, "gshard": 0.5, "z": 1e-3}
LOSSES = {"every loss": Auxiliary(EVERY_LOSS, devices=4, limit=2)}
BATCH = {"nothing here": lambda index: parts.batch(index, (1,) if index % 2 else (1, 1, 9))}


def routed(method: str) -> ModelConfig:
    """The small model with another router: softmax, no bias; segments are 4 of each of 4 experts."""
    v3 = parts.config()
    assert v3.moe is not None
    groups = (v3.moe.n_group, v3.moe.topk_group) if method == "segments" else (1, 1)
    moe = replace(
        v3.moe,
        topk_method=method,
        num_experts_per_tok=4,
        scoring_func="softmax",
        norm_topk_prob=False,
        n_group=groups[0],
        topk_group=groups[1],
    )
    return replace(v3, moe=moe)


def grouped() -> ModelConfig:
    """The small model with grouped-query attention, its keys normalised."""
    return parts.config(attention=GQAConfig(4, 2, 8, qk_norm="head"))


def indexed() -> ModelConfig:
    """The small model with indexers: of up to 20 positions a token reads 5."""
    return parts.config(
        model_type="deepseek_v32",
        attention=MLAConfig(2, 16, 8, 8, 8, q_lora_rank=12, indexer=IndexerConfig(4, 16, 5)),
    )


def native_sparse() -> ModelConfig:
    """The small model with native sparse attention: blocks of 4, of up to 5 a token reads 4."""
    return parts.config(model_type="nsa", attention=NSAConfig(4, 2, 8, 8, 4, 2, 4, 4, sliding_window=6))


def gradients_of_variants(degrees: ParallelConfig, names: list[str]) -> dict[str, Any]:
    """Of each variant: the loss, and for each parameter its rows here and their gradient."""
    found = {}
    for name in names:
        model = VARIANTS[name]()
        team = spread(degrees, model)
        batches = share_of(BATCHES, team, BATCH.get(name, parts.batch))
        loss, grads = losses_and_gradients(
            batches, model, team, auxiliary=LOSSES.get(name, USUAL), teaches=name in TEACHES
        )
        found[name] = (loss, {name: (team.peers.rows[name], grad) for name, grad in grads.items()})
    return found


MUON = replace(
    TRAIN,
    optim=replace(TRAIN.optim, optimizer="muon"),
    balance=replace(TRAIN.balance, bias_rule="quantile"),
    checkpoint_every=0,
)


# Its last batch is smaller than a team of readers, and than a reader of several processes.
HELD_OUT = Evaluation(
    lambda: iter([parts.batch(100), parts.batch(101, (30,)), parts.batch(102, (1, 2))]), num_bytes=100
)


def train(
    degrees: ParallelConfig | None, folder: Path, steps: int = TRAIN.steps, settings: TrainConfig = TRAIN
) -> dict[str, Tensor]:
    """A run, or the rest of it: the biases of its routers here."""
    model = parts.model()
    team = Team() if degrees is None else spread(degrees, model)
    trainer = Trainer(
        model,
        parts.batch,
        replace(settings, steps=steps),
        folder,
        generator=torch.Generator(),
        team=team,
        evaluation=HELD_OUT,
    )
    trainer.resume()
    trainer.run()
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "bias" in name}


def runs(degrees: ParallelConfig, folder: Path) -> dict[str, Tensor]:
    """One run straight through, and one in two halves."""
    biases = train(degrees, folder / "whole")
    train(degrees, folder / "parts", steps=2)
    train(degrees, folder / "parts")
    return biases


def goes_on(degrees: ParallelConfig, folder: Path) -> None:
    train(degrees, folder)


def dispatches(cases: list[tuple[Tensor, Tensor, Tensor]], each: int) -> list[Any]:
    """Of each rank's case: its tokens sent to experts that double, then combined, and how rows travelled."""
    dispatcher = ExpertDispatcher(dist.group.WORLD, each)  # type: ignore[arg-type]
    x_TD, experts_TK, weights_TK = (tensor.clone() for tensor in cases[dist.get_rank()])
    x_TD.requires_grad_()
    weights_TK.requires_grad_()
    x_ND, experts_NK, weights_NK, plan = dispatcher.dispatch(x_TD, experts_TK, weights_TK)
    here_N1 = (weights_NK * (experts_NK >= 0)).sum(1, keepdim=True)
    y_TD = dispatcher.combine(x_ND * here_N1, plan)
    y_TD.square().sum().backward()
    return [y_TD.detach(), x_TD.grad, weights_TK.grad, plan.sent, plan.received, experts_NK]


def deep(**changes: object) -> ModelConfig:
    """Five blocks and a prediction module: stages of 3 and 2 blocks, or of 2, 1, 1 and 1."""
    return parts.config(num_hidden_layers=5, **changes)


def train_deep(degrees: ParallelConfig | None, folder: Path, steps: int, settings: TrainConfig) -> None:
    """A run of the deep model, or the rest of it, that is judged by texts of unlike lengths."""
    model = parts.model(deep())
    held_out = [parts.batch(100), parts.batch(101, (9, 3)), parts.batch(102)]
    trainer = Trainer(
        model,
        parts.batch,
        replace(settings, steps=steps),
        folder,
        generator=torch.Generator(),
        team=Team() if degrees is None else spread(degrees, model),
        evaluation=Evaluation(lambda: held_out, 100),
    )
    trainer.resume()
    trainer.run()


def train_all(runs: list[tuple[ParallelConfig, Path, int, TrainConfig]]) -> None:
    for run in runs:
        train_deep(*run)


def gradients_of_stages(
    runs: list[tuple[ParallelConfig, ModelConfig, Recompute]], batches: int, device: str
) -> list[Any]:
    """Of each run: the loss, and for each parameter its rows here and their gradient."""
    found = []
    for degrees, config, mode in runs:
        model = recompute(parts.model(config).to(device), mode)
        team = spread(degrees, model)
        loss, grads = losses_and_gradients(share_of(batches, team, device=device), model, team)
        found.append((loss, {name: (team.peers.rows[name], grad) for name, grad in grads.items()}))
    return found


def refusals(degrees: ParallelConfig, folder: Path) -> list[str]:
    """What stages say to micro-batches of unlike lengths, and to an objective that judges no parts."""
    model = parts.model(deep())
    team = spread(degrees, model)
    uneven = [parts.batch(0), parts.batch(1, (9, 3)), parts.batch(2), parts.batch(3)]
    told = []
    try:
        losses_and_gradients(uneven, model, team)
    except ValueError as error:
        told.append(str(error))
    try:
        Trainer(
            model,
            parts.batch,
            TRAIN,
            folder,
            generator=torch.Generator(),
            team=team,
            objective=Policy(PolicyConfig()),
        )
    except ValueError as error:
        told.append(str(error))
    return told
