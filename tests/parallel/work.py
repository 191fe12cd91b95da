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
from shoal.checkpoint import native
from shoal.config.model import ModelConfig
from shoal.config.policy import PolicyConfig
from shoal.config.run import BalanceConfig, OptimConfig, ParallelConfig, Recompute, TrainConfig
from shoal.model.transformer import Output, Transformer
from shoal.parallel.expert import ExpertDispatcher
from shoal.parallel.mesh import make_mesh
from shoal.parallel.pipeline import Pipeline, keep_stages
from shoal.parallel.shard import copies, join, local, rows, shard
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


def on_gpu(batch: Batch) -> Batch:
    tensors = {name: value.cuda() for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **tensors)


def spread(degrees: ParallelConfig, model: Transformer) -> Team:
    """The model over all processes, in place, and what the Trainer is told of them."""
    mesh = make_mesh(degrees, model.head_weight().device)
    shard(keep_stages(model, mesh), mesh)
    peers = native.Peers(mesh.rank, mesh.ranks, mesh.gather, rows(model, mesh), copies(model, mesh))
    return Team(
        mesh.reduce,
        local,
        peers,
        replace(peers, gather=mesh.gather_aside),
        join,
        reading=(mesh.replicas.get_local_rank(), degrees.readers),
        stages=Pipeline(model, mesh) if degrees.pipeline > 1 else None,
    )


def share_of(batches: int, team: Team) -> list[Batch]:
    place, places = team.place
    return [parts.batch(index) for index in range(place, batches, places)]


def losses_and_gradients(
    batches: list[Batch], model: Transformer, team: Team, mtp_weight: float = 0.3
) -> tuple[float, dict[str, Tensor]]:
    """Of one step, and each gradient, of which here are the team's rows."""
    objective = NextToken(model.config.num_nextn_predict_layers, mtp_weight=mtp_weight, balance_weight=1e-2)
    step = Step(0, 1, team.tally(objective.count(batches)))
    totals: list[Tensor] = []

    def judge(out: Output, batch: Batch) -> Tensor:
        totals.append(objective.judge(model, out, batch, step).total)
        return totals[-1]

    if team.stages is None:
        for batch in batches:
            judge(model(batch), batch).backward()
    else:
        team.stages.train(batches, judge)
    grads = {name: local(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return team.reduce(torch.stack([total.detach() for total in totals]).sum()).item(), grads


def every_gradient(degrees: list[tuple[int, int]], device: str = "cpu") -> dict[tuple[int, int], Any]:
    """For each pair of degrees: the loss, and for each parameter its rows here and their gradient."""
    found = {}
    for data, expert in degrees:
        model = parts.model().to(device)
        team = spread(ParallelConfig(data, expert), model)
        mine = share_of(BATCHES, team)
        mine = [on_gpu(batch) for batch in mine] if device == "cuda" else mine
        loss, grads = losses_and_gradients(mine, model, team)
        found[data, expert] = (loss, {name: (team.peers.rows[name], grad) for name, grad in grads.items()})
    return found


# Models and ways to run them that a degree must not change: what is told of each, and how it is made.
VARIANTS: dict[str, Callable[[], Transformer]] = {
    "selective": lambda: recompute(parts.model(), "selective"),
    "full": lambda: recompute(parts.model(), "full"),
    "hash": lambda: parts.model(routed("hash")),
    "expert_choice": lambda: parts.model(routed("expert_choice")),
    "segments": lambda: parts.model(routed("segments")),
}


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


def gradients_of_variants(degrees: ParallelConfig) -> dict[str, Any]:
    """Of each variant: the loss, and for each parameter its rows here and their gradient."""
    found = {}
    for name, make in VARIANTS.items():
        model = make()
        team = spread(degrees, model)
        mine = share_of(BATCHES, team)
        loss, grads = losses_and_gradients(mine, model, team)
        found[name] = (loss, {name: (team.peers.rows[name], grad) for name, grad in grads.items()})
    return found


MUON = replace(
    TRAIN,
    optim=replace(TRAIN.optim, optimizer="muon"),
    balance=replace(TRAIN.balance, bias_rule="quantile"),
    checkpoint_every=0,
)


def train(
    degrees: ParallelConfig | None, folder: Path, steps: int = TRAIN.steps, settings: TrainConfig = TRAIN
) -> dict[str, Tensor]:
    """A run, or the rest of it: the biases of its routers here."""
    model = parts.model()
    team = Team() if degrees is None else spread(degrees, model)
    trainer = Trainer(
        model, parts.batch, replace(settings, steps=steps), folder, generator=torch.Generator(), team=team
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
        mine = share_of(batches, team)
        mine = [on_gpu(batch) for batch in mine] if device == "cuda" else mine
        loss, grads = losses_and_gradients(mine, model, team)
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
