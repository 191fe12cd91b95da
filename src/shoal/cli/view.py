"""What a person sees while a command works: bars, tables, one-line reports.

Everything here goes to standard error, so that standard output holds results alone and can be piped. On a
terminal the lines move; elsewhere a line is printed now and then, so that a log shows progress too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

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
    """An observer of a Trainer: a bar with loss, speed, time left and expert balance; evaluations as
    lines.
    """

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task: TaskID | None = None
        self._printed = time.monotonic()

    def __enter__(self) -> TrainingView:
        if console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if console.is_terminal:
            self._progress.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case StepReport():
                self._step(event)
            case EvaluationReport():
                say(f"  step {event.step}: {event.bits_per_byte:.3f} bits per byte of held-out text")
            case SpikeReport():
                did = "left out" if event.action == "skip" else f"rolled back to step {event.step - 1}"
                say(f"  step {event.step}: loss leapt to {event.loss:.3f}, above {event.limit:.3f}: {did}")
            case Phase():
                say(event.text)
            case CheckpointReport():
                say(f"  step {event.step}: saved {event.path.name} in {event.seconds:.1f} s")

    def _step(self, event: StepReport) -> None:
        state = f"loss {event.loss:.3f}  {event.tokens_per_second:,.0f} tokens/s  lr {event.lr:.1e}"
        if event.max_violation:
            mean = sum(event.max_violation) / len(event.max_violation)
            state += f"  MaxVio {mean:.2f}"
        if console.is_terminal:
            if self._task is None:
                self._task = self._progress.add_task(
                    "", total=event.steps, completed=event.step - 1, state=""
                )
            self._progress.update(self._task, completed=event.step, state=state)
        elif event.step in (1, event.steps) or time.monotonic() - self._printed > LOG_EVERY_SECONDS:
            self._printed = time.monotonic()
            say(f"  step {event.step}/{event.steps}  {state}")
