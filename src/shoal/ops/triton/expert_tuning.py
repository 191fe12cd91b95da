"""Tuning `grouped_mlp`'s forward pass on the GPU at hand: which tiles for which bucket of choices.

A candidate compiles once and is then timed on every bucket it may serve, so most of the time goes to
compiling, and the order of candidates is that of their odds. The heuristic goes first: what is kept is never
slower than it. At the end of the budget what was found is kept. Inputs are random: a card runs faster on
zeros.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from shoal.ops.triton import expert_plan, experts, plans
from shoal.ops.triton.expert_plan import MAX_SCAN, Plan, Tile

GAIN = 0.98  # a candidate must be this much faster than the heuristic to take its place
ROWS_OF_A_STREAM = 64  # a program of the streaming kernels holds at most these


@dataclass(frozen=True)
class Shape:
    """Experts as a model has them."""

    n_experts: int
    top_k: int
    hidden: int
    inner: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return expert_plan.shape_name(self.n_experts, self.hidden, self.inner, self.dtype)


@dataclass(frozen=True)
class Finding:
    """The fastest plan of a bucket, and how the heuristic's did beside it, in microseconds."""

    bucket: int
    plan: Plan
    us: float
    heuristic_us: float


Observe = Callable[[int, int, float], None]  # candidates done, of how many, seconds left


def _streams() -> Iterator[tuple[int, Tile, Tile]]:
    yield 16, Tile(16, 64, 128, 4, 3), Tile(16, 64, 128, 4, 5)
    yield 32, Tile(32, 64, 64, 4, 5), Tile(32, 128, 64, 4, 5)
    yield 64, Tile(64, 64, 128, 4, 4), Tile(64, 128, 64, 4, 3)
    yield 16, Tile(16, 64, 128, 4, 4), Tile(16, 128, 128, 4, 3)
    yield 32, Tile(32, 64, 128, 4, 4), Tile(32, 128, 128, 4, 3)
    yield 64, Tile(64, 64, 64, 4, 5), Tile(64, 128, 64, 4, 4)
    yield 32, Tile(32, 128, 64, 8, 4), Tile(32, 128, 64, 8, 4)
    yield 64, Tile(64, 128, 64, 8, 4), Tile(64, 128, 64, 8, 4)


def _tiles() -> Iterator[tuple[int, Tile, Tile]]:
    gate_up, down = Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 4, flatten=True)
    yield 128, gate_up, down
    yield 128, replace(gate_up, persistent=False), down
    yield 64, Tile(64, 128, 64, 4, 4), Tile(64, 256, 64, 8, 4, flatten=True)
    yield 64, Tile(64, 256, 64, 8, 3), Tile(64, 128, 128, 4, 3, flatten=True)
    yield 128, replace(gate_up, group=8), replace(down, group=8)


def candidates(bucket: int, shape: Shape) -> Iterator[Plan]:
    """Plans that may serve a bucket, the heuristic's first."""
    heuristic = expert_plan.choose_plan(
        bucket, shape.n_experts, shape.hidden, shape.dtype, tma=True, training=False
    )
    yield heuristic
    share = bucket / shape.n_experts
    kind = "scan" if bucket <= MAX_SCAN else "stream"
    ways: list[tuple[str, tuple[int, Tile, Tile]]] = []
    if share <= 4 * ROWS_OF_A_STREAM:
        # More than twice the rows of an expert is padding; fewer than a fourth reads its weights four times.
        ways += [(kind, way) for way in _streams() if way[0] <= max(16, 4 * share) and share <= 4 * way[0]]
    if bucket > MAX_SCAN and share >= 24:
        ways += [("tiles", way) for way in _tiles()]
    for kind, (rows, gate_up, down) in ways:
        plan = replace(heuristic, kind=kind, rows=rows, gate_up=gate_up, down=down)
        if plan != heuristic:
            yield plan


def _time_us(run: Callable[[], object], seconds: float = 0.01) -> float:
    """Median of a call inside a CUDA graph, so that the host's time is not in it."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < 1e6 * seconds and len(times) < 30):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


def _weights(shape: Shape, device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    E, D, F = shape.n_experts, shape.hidden, shape.inner
    need, (free, _) = 3 * E * D * F * shape.dtype.itemsize, torch.cuda.mem_get_info(device)
    if need > 0.9 * free:
        raise ValueError(
            f"tuning {shape.name} needs {need / 1e9:.1f} GB of weights and {free / 1e9:.1f} GB of {device} "
            "are free; name a smaller model, or the experts that one GPU will hold"
        )
    on = {"device": device, "dtype": shape.dtype, "generator": generator}
    return torch.randn(E, 2 * F, D, **on) / D**0.5, torch.randn(E, D, F, **on) / F**0.5


def _inputs(
    shape: Shape, bucket: int, device: torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = max(1, bucket // shape.top_k)
    return (
        torch.randn(tokens, shape.hidden, device=device, dtype=shape.dtype, generator=generator),
        torch.rand(tokens, shape.n_experts, device=device, generator=generator).topk(shape.top_k).indices,
        torch.rand(tokens, shape.top_k, device=device, generator=generator),
    )


def tune(shape: Shape, device: torch.device, budget: float, observe: Observe) -> list[Finding]:
    """Time candidates until `budget` seconds are over: the heuristic on every bucket, then one by one."""
    start = time.monotonic()
    generator = torch.Generator(device).manual_seed(0)
    matrices = _weights(shape, device, generator)
    inputs = {bucket: _inputs(shape, bucket, device, generator) for bucket in expert_plan.BUCKETS}
    ways = {bucket: list(candidates(bucket, shape)) for bucket in expert_plan.BUCKETS}
    first = [(each[0], [bucket]) for bucket, each in ways.items()]
    later: dict[Plan, list[int]] = {}
    for rank in range(1, max(map(len, ways.values()))):
        for bucket, each in ways.items():
            for plan in each[rank : rank + 1]:
                later.setdefault(plan, []).append(bucket)
    queue = [*first, *later.items()]
    best: dict[int, Finding] = {}
    for done, (plan, buckets) in enumerate(queue):
        left = budget - (time.monotonic() - start)
        observe(done, len(queue), max(0.0, left))
        if left <= 0:
            break
        for bucket in buckets:
            try:
                us = _time_us(partial(experts.grouped_mlp, *inputs[bucket], *matrices, plan=plan))
            except OutOfResources:  # this GPU's shared memory cannot hold its tiles
                break
            known = best.setdefault(bucket, Finding(bucket, plan, us, us))
            if us < min(known.us, GAIN * known.heuristic_us):
                best[bucket] = replace(known, plan=plan, us=us)
    observe(len(queue), len(queue), 0.0)
    return [best[bucket] for bucket in sorted(best)]


def keep(findings: list[Finding], shape: Shape, device: torch.device) -> Path:
    """Add findings to the user's table of this machine, and return its path."""
    buckets = {
        str(found.bucket): expert_plan.plan_fields(found.plan) | {"us": round(found.us, 1)}
        for found in findings
    }
    path = plans.write(plans.user_folder(), plans.this_machine(device.index), {shape.name: buckets})
    plans.tables.cache_clear()
    expert_plan.find_plan.cache_clear()
    return path


def measure(shape: Shape, device: torch.device) -> list[Finding]:
    """The plans that serve this GPU now, bucket by bucket, beside the heuristic's time."""
    generator = torch.Generator(device).manual_seed(0)
    matrices = _weights(shape, device, generator)
    found = []
    for bucket in expert_plan.BUCKETS:
        sizes = (bucket, shape.n_experts, shape.hidden, shape.inner, shape.dtype)
        plan, heuristic = expert_plan.find_plan(device.index, *sizes), next(candidates(bucket, shape))
        inputs = _inputs(shape, bucket, device, generator)
        us, heuristic_us = (
            _time_us(partial(experts.grouped_mlp, *inputs, *matrices, plan=each))
            for each in (plan, heuristic)
        )
        found.append(Finding(bucket, plan, us, heuristic_us))
    return found
