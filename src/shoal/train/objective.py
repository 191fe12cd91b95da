"""What a step minimises, as a part the Trainer is given: pretraining, SFT and GRPO each hand in their own.

An Objective is asked twice a step. `count` looks at all micro-batches and says what the step's means are
taken over; `compute` runs the model on one of them and gives its share. The law: shares add up. The sum of
`total` over micro-batches, and over ranks, is the loss of the step, and so it is with each named term, so how
a step is cut changes rounding only. A term becomes a metric of its name; "loss" is always there.

A Batch may carry more than its fields: a frozen dataclass that extends it with tensors (advantages, old
log-probabilities) is moved to the device whole and reaches the objective as it was made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from shoal.batch import Batch
from shoal.model.transformer import Output, Transformer

Reduce = Callable[[Tensor], Tensor]  # a sum over the processes of a run


def alone(tensor: Tensor) -> Tensor:
    """The Reduce of a run of one process."""
    return tensor


@dataclass(frozen=True, eq=False)
class Step:
    """Where in the run a micro-batch stands."""

    number: int  # optimizer steps done before this one
    steps: int  # of the whole run
    counts: Tensor  # what `count` gave, added up over the ranks


@dataclass(frozen=True, eq=False)
class Share:
    """One micro-batch's share of a step."""

    total: Tensor  # float32 scalar: what is differentiated
    terms: Mapping[
        str, Tensor
    ]  # float32 scalars without gradient: the same names in each micro-batch, "loss" among them
    # The routing record of the micro-batch, a tensor for each layer that routed, prediction modules last.
    experts: tuple[Tensor, ...] = ()  # (T, K): loads to balance and to show
    scores: tuple[Tensor, ...] = ()  # (T, E): what quantile balancing solves its biases from
    before: int = 0  # layers that route before the first of these, where a part of the model ran


class Objective(Protocol):
    def count(self, batches: Sequence[Batch]) -> Tensor:
        """What this process's micro-batches of a step count, as a vector that adds up over processes."""
        ...

    def compute(self, model: Transformer, batch: Batch, step: Step) -> Share: ...


@runtime_checkable
class StagedObjective(Objective, Protocol):
    """One that can judge a model part by part, as processes that each have some of its layers must."""

    def judge(self, model: Transformer, out: Output, batch: Batch, step: Step) -> Share:
        """The share of the part that gave `out`. Its terms have the same names as those of all others."""
        ...
