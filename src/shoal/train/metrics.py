"""What a run reports: events for whoever watches, and metrics.jsonl for whoever reads later.

The law: a line of metrics.jsonl is what happened at a step, and but for its "timing" it depends on the run
alone. So the file of a run that was killed and resumed equals that of one that was not: what was written
after the checkpoint is cut off when resuming, and written again. A line is flushed as it is made.

Events are frozen and carry plain numbers; rendering them is the CLI's business.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Self


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. `terms` are the objective's, before their weights; "loss" is one of them."""

    step: int  # steps done, this one included
    steps: int  # of the whole run
    terms: Mapping[str, float]
    lr: float
    grad_norm: float  # before clipping
    tokens: int  # since the run began
    max_violation: tuple[float, ...]  # MaxVio of each layer that routes, prediction modules last
    seconds: float  # this step alone
    tokens_per_second: float
    # What config/cost.py counts for a forward and backward pass: active parameters, causal attention within
    # each sequence. Recomputed work and the optimizer's are not in it.
    flops_per_second: float = 0.0
    mfu: float | None = None  # that, of the device's dense bfloat16 peak, where it is known
    peak_bytes: int = 0  # of the device's memory since the run began; 0 on a CPU
    expert_load: tuple[tuple[int, ...], ...] = ()  # (L, E), for whoever watches; too long for a line a step

    @property
    def loss(self) -> float:
        return self.terms["loss"]


@dataclass(frozen=True)
class EvaluationReport:
    """Held-out text after a step, and the experts' loads of that training step, by layer."""

    step: int
    loss: float  # nats per token
    bits_per_byte: float  # of all held-out text
    expert_load: tuple[tuple[int, ...], ...]
    seconds: float
    domains: Mapping[str, float] = field(default_factory=dict)  # bits per byte of each text that has a name


@dataclass(frozen=True)
class SpikeReport:
    """A loss that leapt, and what was done: the step was left out, or the run rolled back to just before
    `step`."""

    step: int
    loss: float
    limit: float  # above it a loss is a spike
    action: Literal["skip", "rollback"]


@dataclass(frozen=True)
class CheckpointReport:
    step: int
    path: Path
    seconds: float


@dataclass(frozen=True)
class Phase:
    """What is done now, beside steps, that takes a while."""

    text: str


Event = StepReport | EvaluationReport | SpikeReport | CheckpointReport | Phase
Observer = Callable[[Event], None]

_TIMING = ("seconds", "tokens_per_second", "flops_per_second", "mfu", "peak_bytes")
_KINDS: dict[type, str] = {StepReport: "step", EvaluationReport: "evaluation", SpikeReport: "spike"}


def to_line(event: StepReport | EvaluationReport | SpikeReport) -> dict[str, Any]:
    """An event as a line of metrics.jsonl: `kind`, its fields, each term by its name, and its `timing`."""
    fields: dict[str, Any] = {}
    for name, value in vars(event).items():
        if name == "terms":
            fields |= value
        elif name not in _TIMING and not (isinstance(event, StepReport) and name == "expert_load"):
            fields[name] = value
    if isinstance(event, StepReport) and (taken := event.terms.keys() & vars(event).keys()):
        raise ValueError(f"the objective names a term {min(taken)!r}, which a step has already; rename it")
    known = {name: vars(event).get(name) for name in _TIMING}
    timing = {name: round(value, 6) for name, value in known.items() if value}
    return {"kind": _KINDS[type(event)], **fields, **({"timing": timing} if timing else {})}


class MetricsLog:
    """metrics.jsonl, opened to go on after `step`: later lines, and one cut short by a kill, are dropped.

    Without a path, lines go nowhere: one process of several writes.
    """

    def __init__(self, path: Path | None, step: int) -> None:
        self.path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._open(step)

    def _open(self, step: int) -> IO[bytes] | None:
        if self.path is None:
            return None
        kept = [line for line in _whole_lines(self.path) if json.loads(line)["step"] <= step]
        temporary = self.path.with_name(f".{self.path.name}.new")
        with temporary.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        return self.path.open("ab")

    def rewind(self, step: int) -> None:
        """Drop what was written after `step`."""
        self.close()
        self._file = self._open(step)

    def write(self, line: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()

    def sync(self) -> None:
        """Have it on the disk before a checkpoint is: resuming from that will not write it again."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _whole_lines(path: Path) -> list[bytes]:
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith(b"\n")]


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """The loss of a whole text as bits for each of its bytes: comparable across tokenizers, and to gzip."""
    return nats / num_bytes / math.log(2)
