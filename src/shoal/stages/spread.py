"""Spread: an engine over several processes, each of which loads its own part of the model.

Either one model is cut, and the first process has an engine that the others follow (parallel/tensor.py,
engine/team.py); or experts alone are shared out, and each has an engine of its own, in lockstep
(parallel/expert.py, engine/lockstep.py). How a part is loaded is handed in, and travels to the processes that
are started. The law: what cannot be spread is refused before any is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from shoal.checkpoint import hf
from shoal.checkpoint.shards import Progress
from shoal.checkpoint.source import open_source
from shoal.config.model import ModelConfig
from shoal.engine import Engine, EngineSettings
from shoal.engine.lockstep import Apart, Lockstep, Place
from shoal.engine.team import Team
from shoal.ops import api as ops
from shoal.parallel.expert import ExpertShare
from shoal.parallel.ranks import Ranks, start
from shoal.parallel.tensor import TensorShare, divide


@dataclass(frozen=True)
class Degrees:
    """Over how many processes a model is cut, and over how many its experts are shared out. One at a time."""

    tensor_parallel: int = 1
    data_parallel: int = 1
    expert_parallel: bool = False

    def __post_init__(self) -> None:
        for name in ("tensor_parallel", "data_parallel"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.tensor_parallel > 1 and self.data_parallel > 1:
            raise ValueError(
                f"tensor_parallel is {self.tensor_parallel} and data_parallel {self.data_parallel}, but a "
                f"model is cut or its experts are shared out, not both; set one of them to 1"
            )
        if self.data_parallel > 1 and not self.expert_parallel:
            raise ValueError(
                f"data_parallel is {self.data_parallel} without expert_parallel: those are replicas, which "
                f"deploy/ray_serve.py runs; set expert_parallel, or data_parallel to 1"
            )
        if self.expert_parallel and self.data_parallel == 1:
            raise ValueError(
                "expert_parallel is set, but data_parallel, over how many processes experts are shared out, "
                "is 1; raise it"
            )

    @property
    def ranks(self) -> int:
        return self.tensor_parallel * self.data_parallel


class Load(Protocol):
    """Makes the engine of one process. Picklable."""

    def __call__(
        self,
        settings: EngineSettings,
        progress: Progress | None,
        device: str,
        team: Team | None,
        share: hf.Share | None,
    ) -> Engine: ...


class Part(Protocol):
    """What each process makes of it."""

    def __call__(self, progress: Progress | None, ranks: Ranks) -> Engine | Place: ...


def open_spread(
    load: Load,
    folder: Path,
    degrees: Degrees,
    settings: EngineSettings,
    device: str,
    progress: Progress | None,
    quant: str | None,
) -> Engine | Lockstep:
    """The engine that stands for all. In torchrun's other processes it does not return."""
    config = open_source(folder).model.config
    part: Part
    if degrees.data_parallel > 1:
        check_shared(config, degrees.data_parallel, settings)
        # How many rows come is known on the host alone: no graphs.
        settings = replace(settings, buckets=(), lengths=())
        part = partial(_share_out, load, settings, config.moe.n_routed_experts if config.moe else 0)
    else:
        if quant is not None:
            raise ValueError(
                f"tensor_parallel is {degrees.tensor_parallel} and quant {quant}, but narrow weights are not "
                f"cut; leave one of them out"
            )
        divide(config, degrees.tensor_parallel)
        part = partial(_cut, load, settings)
    ranks = start(partial(_follow, part), degrees.ranks, device)
    try:
        made = part(progress, ranks)
        ranks.serve()
    except BaseException as error:
        failure = ranks.failure()
        ranks.close()
        if failure is None or not isinstance(error, RuntimeError):
            raise
        raise RuntimeError(failure) from error
    return Lockstep(made) if isinstance(made, Place) else made


def check_shared(config: ModelConfig, processes: int, settings: EngineSettings) -> None:
    """Refuse what engines in lockstep cannot do."""
    experts = config.moe.n_routed_experts if config.moe else 0
    if not experts or experts % processes:
        raise ValueError(
            f"data_parallel is {processes} with expert_parallel, but the model has "
            f"{experts or 'no'} experts; it must divide their number"
        )
    why = "engines that share experts out step together, and eagerly"
    if settings.speculate:
        raise ValueError(f"speculate is {settings.speculate}, but {why}; set it to 0, or data_parallel to 1")
    if settings.decode_steps > 1:
        raise ValueError(f"decode_steps is {settings.decode_steps}, but {why}; leave it at 1")
    for name in ("buckets", "lengths"):
        if sizes := getattr(settings, name):
            raise ValueError(f"{name} are {sizes}, but {why}; leave them out")
    if ops.is_batch_invariant():
        raise ValueError(
            f"data_parallel is {processes}, but sums over processes are not those of one; leave "
            f"SHOAL_BATCH_INVARIANT out"
        )


def _follow(part: Part, ranks: Ranks) -> None:
    made = part(None, ranks)
    (made if isinstance(made, Place) else made.runner).follow()


def _cut(load: Load, settings: EngineSettings, progress: Progress | None, ranks: Ranks) -> Engine:
    return load(settings, progress, str(ranks.device), ranks, TensorShare(ranks))


def _share_out(
    load: Load, settings: EngineSettings, experts: int, progress: Progress | None, ranks: Ranks
) -> Place:
    share = ExpertShare(ranks.group, experts)
    return Place(load(settings, progress, str(ranks.device), Apart(ranks), share), ranks)
