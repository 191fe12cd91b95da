"""The processes of a run, as the Trainer sees them: this one's number and reading, sums, and what is where.

Micro-batches are shared among readers: a reader is one process, or several that work on the same batches. The
Trainer asks for nothing else of the others, and knows no mesh. The law: what a Team of one does is nothing,
at no cost. Who makes one of a mesh is the stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from shoal.batch import Batch
from shoal.checkpoint import native
from shoal.model.transformer import Output
from shoal.train.objective import Reduce, alone
from shoal.train.slot import Join, Local, join_none, whole

T = TypeVar("T")


class Stages(Protocol):
    """The blocks of one model on several processes, which all call the same (parallel/pipeline.py)."""

    @property
    def begins(self) -> bool:
        """Whether the first block is here."""
        ...

    def train(self, batches: Sequence[Batch], judge: Callable[[Output, Batch], Tensor]) -> None:
        """Forward and backward. `judge` says what of each part of the model is differentiated."""
        ...

    def forward(self, batch: Batch) -> Output | None:
        """What the model gives, where the last block is. Without gradients."""
        ...


@dataclass(frozen=True, eq=False)
class Team:
    reduce: Reduce = alone  # must leave its argument as it was
    local: Local = whole  # of parameters and gradients of a model that is cut
    peers: native.Peers = native.ALONE
    aside: native.Peers | None = None  # the same over a line of their own, for saves while steps go on
    join: Join = join_none  # what all have of a tensor that is cut as a parameter is
    # Which share of a step's micro-batches this process reads, of how many; None: one each.
    reading: tuple[int, int] | None = None
    stages: Stages | None = None  # of a model whose blocks are on several processes
    bring: Callable[[Batch, torch.device], Batch] = (
        Batch.to
    )  # to a device, of a batch what this process reads

    @property
    def rank(self) -> int:
        return self.peers.rank

    @property
    def ranks(self) -> int:
        return self.peers.ranks

    @property
    def place(self) -> tuple[int, int]:
        return self.reading or (self.rank, self.ranks)

    def norm(self, here: Mapping[str, Tensor]) -> Tensor:
        """Of a gradient of which this process has these parts, by parameter."""
        ours = [grad for name, grad in here.items() if name not in self.peers.copies]
        norm = torch.nn.utils.get_total_norm(ours)
        return norm if self.ranks == 1 else self.reduce(norm.float().square()).sqrt()

    def tally(self, here: Tensor) -> Tensor:
        """The sum over processes of what is counted in their micro-batches, each of these once."""
        return self.reduce(here if self.stages is None or self.stages.begins else torch.zeros_like(here))

    def any(self, here: bool, device: torch.device) -> bool:
        """Whether it is so in any process."""
        if self.ranks == 1:
            return here
        return bool(self.reduce(torch.tensor(int(here), device=device)))

    def mine(self, first: int, count: int) -> range:
        """Which of a run's batches `first` to `first + count` this reader takes. Readers together take what
        one alone would, so that their number may change between steps."""
        place, places = self.place
        return range(first + place, first + count, places)

    def share(self, items: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """Each reader's share of items, as many for each: where they do not come out even, an item that is
        another's, and False."""
        rest = iter(items)
        place, places = self.place
        while group := list(islice(rest, places)):
            mine = place < len(group)
            yield group[place if mine else 0], mine


ALONE = Team()
