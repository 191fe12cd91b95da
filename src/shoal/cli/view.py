"""What a person sees while a command works: bars, tables, one-line reports.

Everything here goes to standard error, so that standard output holds results alone and can be piped. On a
terminal the lines move; elsewhere a line is printed now and then, so that a log shows progress too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from shoal.train.metrics import CheckpointReport, EvaluationReport, Event, Phase, SpikeReport, StepReport

console = Console(stderr=True, highlight=False)
COMMAND = os.environ.get("SHOAL_COMMAND", "shoal")  # how the user called us: a clone has ./shoal
LOG_EVERY_SECONDS = 10.0  # between lines of progress where there is no terminal


def say(text: str) -> None:
    console.print(text, markup=False)


class LoadProgress(Protocol):
    def __call__(self, done: int, total: int, num_bytes: int) -> None: ...


@contextmanager
def loading(what: str) -> Iterator[LoadProgress]:
    """A bar for tensors read or written, shown once it has taken two seconds."""
    if not console.is_terminal:
        yield lambda done, total, num_bytes: None
        return
    start = time.monotonic()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[gigabytes]:.2f} GB"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as progress:
        task: TaskID | None = None

        def report(done: int, total: int, num_bytes: int) -> None:
            nonlocal task
            if task is None and time.monotonic() - start > 2.0:
                task = progress.add_task(what, total=total, gigabytes=0.0)
            if task is not None:
                progress.update(task, completed=done, total=total, gigabytes=num_bytes / 1e9)

        yield report


class TrainingView:
    """An observer of a Trainer. On a terminal: a bar, the numbers of the step, and where the experts' tokens
    go; evaluations, checkpoints and spikes as lines above. Elsewhere a line now and then.
    """

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._live = Live(console=console, transient=True, refresh_per_second=4)
        self._task: TaskID | None = None
        self._printed = time.monotonic()

    def __enter__(self) -> TrainingView:
        if console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if console.is_terminal:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case StepReport():
                self._step(event)
            case EvaluationReport():
                by_domain = "".join(f"  {name} {value:.3f}" for name, value in event.domains.items())
                told = f"{event.bits_per_byte:.3f} bits per byte of held-out text"
                say(f"  step {event.step}: {told}{by_domain}")
            case SpikeReport():
                did = "left out" if event.action == "skip" else f"rolled back to step {event.step - 1}"
                say(f"  step {event.step}: loss leapt to {event.loss:.3f}, above {event.limit:.3f}: {did}")
            case Phase():
                say(event.text)
            case CheckpointReport():
                say(f"  step {event.step}: saved {event.path.name} in {event.seconds:.1f} s")

    def _step(self, event: StepReport) -> None:
        if console.is_terminal:
            if self._task is None:
                self._task = self._progress.add_task("", total=event.steps, completed=event.step - 1)
            self._progress.update(self._task, completed=event.step, total=event.steps)
            parts = [self._progress, Text(numbers(event)), *heat_map(event.expert_load, console.width)]
            self._live.update(Group(*parts))
        elif event.step in (1, event.steps) or time.monotonic() - self._printed > LOG_EVERY_SECONDS:
            self._printed = time.monotonic()
            say(f"  step {event.step}/{event.steps}  {numbers(event)}")


def numbers(event: StepReport) -> str:
    """The step in one line.

    MFU is of the device's dense bfloat16 peak, by the FLOPs of config/cost.py: active parameters and causal
    attention, nothing recomputed.
    """
    told = f"loss {event.loss:.3f}  {event.tokens_per_second:,.0f} tokens/s  lr {event.lr:.1e}"
    told += f"  gradient {event.grad_norm:.2f}"
    if event.mfu is not None:
        told += f"  {event.flops_per_second / 1e12:.0f} TFLOP/s  MFU {event.mfu:.1%}"
    if event.peak_bytes:
        told += f"  {event.peak_bytes / (1 << 30):.1f} GiB"
    if event.max_violation:
        told += f"  MaxVio {sum(event.max_violation) / len(event.max_violation):.2f}"
    return told


def heat_map(load_LE: Sequence[Sequence[int]], width: int) -> list[Text]:
    """A row a layer, a cell an expert: green at the mean load, blue below, red from twice on. What the width
    cannot hold is added up, neighbours together."""
    rows = []
    for layer, load_E in enumerate(load_LE):
        per_cell = -(-len(load_E) // max(1, min(len(load_E), width - 8)))
        mean = sum(load_E) / len(load_E) or 1.0
        row = Text(f"{layer:>5}  ", style="dim")
        for start in range(0, len(load_E), per_cell):
            cell = load_E[start : start + per_cell]
            ratio = min(2.0, sum(cell) / len(cell) / mean)
            red, blue = max(0.0, ratio - 1), max(0.0, 1 - ratio)
            green = 1 - max(red, blue)
            row.append("█", style=f"rgb({round(255 * red)},{round(200 * green)},{round(255 * blue)})")
        rows.append(row)
    return rows
