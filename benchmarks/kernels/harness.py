"""How a kernel is timed, held against its limit and its peers, and written down.

A case names an op at a shape: what it must compute and move (hence its floor), ours, and the peers, each as
one call a set of inputs. Sets rotate so that what the floor counts as read is not still in the cache. Calls
run inside a CUDA graph, so the time is the GPU's; the figure is the median over replays. The floor is the
larger of FLOPs over the burst matrix rate and bytes over the read rate measured on an H200 (bf16 797
TFLOP/s, 4.555 TB/s).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

PEAK_FLOPS = {torch.bfloat16: 797e12, torch.float8_e4m3fn: 1512e12}
PEAK_BYTES = 4.555e12

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One row of a table. `calls` maps a name to one call a set of inputs; the first name is ours."""

    op: str
    shape: str
    flops: float
    bytes: float
    calls: dict[str, Sequence[Call]]
    target: str = ""
    note: str = ""
    dtype: torch.dtype = torch.bfloat16
    graph: bool = True

    @property
    def floor_us(self) -> float:
        return 1e6 * max(self.flops / PEAK_FLOPS[self.dtype], self.bytes / PEAK_BYTES)


@dataclass(frozen=True)
class Result:
    """The times of a case, in microseconds."""

    op: str
    shape: str
    target: str
    note: str
    floor_us: float
    flops: float
    bytes: float
    us: dict[str, float] = field(default_factory=dict)


def _captured(calls: Sequence[Call]) -> Callable[[], None]:
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _run_all(calls: Sequence[Call]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def time_us(calls: Sequence[Call], *, graph: bool = True, budget_ms: float = 100.0, most: int = 50) -> float:
    """Median microseconds of one call, over replays that each run every set once."""
    replay = _captured(calls) if graph else _run_all(calls)
    for _ in range(2):
        replay()
    times: list[float] = []
    spent = 0.0
    while len(times) < 3 or (spent < budget_ms and len(times) < most):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
        spent += times[-1]
    return 1e3 * statistics.median(times) / len(calls)


def measure(case: Case) -> Result:
    us = {name: time_us(calls, graph=case.graph) for name, calls in case.calls.items()}
    return Result(case.op, case.shape, case.target, case.note, case.floor_us, case.flops, case.bytes, us)


def _row(result: Result) -> str:
    (_, mine), *peers = result.us.items()
    others = ", ".join(f"{name} {us:.1f} ({us / mine:.2f} of ours)" for name, us in peers)
    cells = (
        result.op,
        result.shape,
        f"{mine:.1f}",
        f"{result.flops / mine / 1e6:.0f}" if result.flops else "",
        f"{result.bytes / mine / 1e6:.2f}",
        f"{result.floor_us / mine:.0%}",
        f"{mine / result.floor_us:.2f}",
        others,
        result.target,
        result.note,
    )
    return f"| {' | '.join(cells)} |"


def table(results: Sequence[Result]) -> str:
    """The results as a Markdown table."""
    head = "| op | shape | ours us | TFLOP/s | TB/s | of the limit | x floor | peers us | target | note |"
    return "\n".join((head, "|---" * 10 + "|", *(_row(result) for result in results)))


def write(results: Sequence[Result], path: Path, command: str) -> None:
    """Append the table to a Markdown file and each result to the .jsonl beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_name()
    head = f"\n## {device}, torch {torch.__version__}\n\n`{command}`\n\n"
    with path.open("a") as file:
        file.write(head + table(results) + "\n")
    with path.with_suffix(".jsonl").open("a") as file:
        for result in results:
            file.write(json.dumps({"device": device, "command": command, **vars(result)}) + "\n")
