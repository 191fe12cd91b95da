"""The processes of a run, as the Trainer sees them: this one's number, sums, and what is where.

The Trainer asks for nothing else of the others, and knows no mesh. The law: what a Team of one does is
nothing, at no cost. Who makes one of a mesh is the stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from shoal.checkpoint import native
from shoal.train.objective import Reduce, alone
from shoal.train.slot import Join, Local, join_none, whole

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Team:
    reduce: Reduce = alone  # must leave its argument as it was
    local: Local = whole  # of parameters and gradients of a model that is cut
    peers: native.Peers = native.ALONE
    aside: native.Peers | None = None  # the same over a line of their own, for saves while steps go on
    join: Join = join_none  # what all have of a tensor that is cut as a parameter is

    @property
    def rank(self) -> int:
        return self.peers.rank

    @property
    def ranks(self) -> int:
        return self.peers.ranks

    def norm(self, local: Tensor) -> Tensor:
        """Of all processes' elements, from the norm of this one's."""
        return local if self.ranks == 1 else self.reduce(local.float().square()).sqrt()

    def any(self, here: bool, device: torch.device) -> bool:
        """Whether it is so in any process."""
        if self.ranks == 1:
            return here
        return bool(self.reduce(torch.tensor(int(here), device=device)))

    def share(self, items: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """Each process's share of items, as many for each: where they do not come out even, an item that is
        another's, and False."""
        rest = iter(items)
        while group := list(islice(rest, self.ranks)):
            mine = self.rank < len(group)
            yield group[self.rank if mine else 0], mine


ALONE = Team()
