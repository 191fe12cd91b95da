"""The mesh: which process of a run does what, by the degrees of a recipe.

One DeviceMesh of four axes, (pipeline, data, context, expert). The pipeline axis cuts the blocks
(pipeline.py), and the context axis every sequence (context.py): their places read the same micro-batches. On
the two others every process reads micro-batches of its own: the expert axis cuts the experts, not the data.
What is no expert is sharded over all but the pipeline axis, the replicas of a place in it; an expert lives on
one place of the expert axis and is sharded over data and context (shard.py, expert.py).

The law: the degrees are no part of what a run computes. Sums go over all processes, so a step of n processes
is the step of one, up to rounding. Started by torchrun, which sets RANK, WORLD_SIZE and LOCAL_RANK.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shoal.config.run import ParallelConfig
from shoal.parallel.meeting import meet


@dataclass(frozen=True, eq=False)
class Mesh:
    """The processes of a run, and this one among them."""

    degrees: ParallelConfig
    device: torch.device  # of this process
    devices: DeviceMesh  # (pipeline, data, context, expert)
    whole: DeviceMesh  # all processes on one axis
    replicas: DeviceMesh  # of those that have the same blocks, on one axis
    holders: DeviceMesh  # and of these, those that have the same experts
    aside: dist.ProcessGroup  # all of them on gloo, for a thread beside the steps

    @property
    def rank(self) -> int:
        return self.whole.get_local_rank()

    @property
    def ranks(self) -> int:
        return self.whole.size()

    @property
    def reader(self) -> int:
        """Which of the `degrees.readers` this process is, with others of its context or pipeline."""
        data, expert = (self.devices.get_local_rank(axis) for axis in ("data", "expert"))
        return data * self.degrees.expert + expert

    def reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all processes; the tensor itself is left as it was."""
        total = tensor.detach().clone()
        dist.all_reduce(total, group=self.whole.get_group())
        return total

    def gather(self, value: Any) -> list[Any]:
        """A small object of each process, by rank, for each: it is pickled, so it comes from this run alone.

        It is also where processes wait for one another.
        """
        return self._gather(value, self.whole.get_group())

    def gather_aside(self, value: Any) -> list[Any]:
        """The same, for a thread beside the steps: what the two send cannot be taken for each other's."""
        return self._gather(value, self.aside)

    def _gather(self, value: Any, group: dist.ProcessGroup) -> list[Any]:
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value, group=group)
        return values


def started_with(environment: Mapping[str, str]) -> int:
    """How many processes torchrun started; 1 without it."""
    return int(environment.get("WORLD_SIZE", "1"))


@contextmanager
def open_mesh(degrees: ParallelConfig, device: str) -> Iterator[Mesh | None]:
    """The mesh of the processes that torchrun started, while it is open; None of a process alone.

    `device` is cpu, or cuda: then each process takes the GPU of its number on its machine.
    """
    ranks = started_with(os.environ)
    if ranks != degrees.ranks:
        raise ValueError(
            f"{ranks} {'process was' if ranks == 1 else 'processes were'} started, but parallel."
            f"{degrees.told} is {degrees.ranks}; start with torchrun --nproc-per-node {degrees.ranks}, or "
            f"--set parallel.data={max(1, ranks * degrees.data // degrees.ranks)}"
        )
    if ranks == 1:
        yield None
        return
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    store = meet(os.environ)
    if store is None:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=store, rank=int(os.environ["RANK"]), world_size=ranks)
    try:
        yield make_mesh(degrees, place)
    finally:
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End a process of several, at once, with all its work done.

    Python taken down in the usual order meets threads of gloo that still let go of tensors, and aborts now
    and then: torchrun would take a run that ended well for one that failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def make_mesh(degrees: ParallelConfig, device: torch.device) -> Mesh:
    """The mesh of a process group that is there."""
    axes = ("pipeline", "data", "context", "expert")
    shape = tuple(getattr(degrees, axis) for axis in axes)
    devices = init_device_mesh(device.type, shape, mesh_dim_names=axes)
    aside = dist.new_group(backend="gloo")
    assert isinstance(aside, dist.ProcessGroup)
    replicas = devices["data", "context", "expert"]._flatten("replicas")
    holders = devices["data", "context"]._flatten("holders")
    return Mesh(degrees, device, devices, devices._flatten("whole"), replicas, holders, aside)
