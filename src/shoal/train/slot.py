"""A parameter as an update rule sees it: what moves, by which gradient, and what follows.

Four cases. A float32 parameter moves itself. A narrower one follows a float32 master, or, where none is
wanted, moves itself by stochastic rounding. Of a stack of which only some rows learn, those have a float32
master and nothing is kept of the rest. Vectors always have a master: they weigh nothing. Of a parameter that
is cut over processes, a rule sees the rows that are here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

Local = Callable[[Tensor], Tensor]  # what of a tensor is on this process, over the same memory
# Of a parameter, and of what is here of something as large: the whole of that, and at which row ours begin.
Join = Callable[[Tensor, Tensor], tuple[Tensor, int]]


def whole(tensor: Tensor) -> Tensor:
    """The Local of a run of one process."""
    return tensor


def join_none(_: Tensor, local: Tensor) -> tuple[Tensor, int]:
    """The Join of a run of one process."""
    return local, 0


@dataclass(frozen=True, eq=False)
class Slot:
    name: str
    source: Tensor  # the model's parameter, which gets the gradient
    local: Local
    master: Tensor | None  # float32
    rows: Tensor | None  # int64: those of dimension 0 that learn; None is all
    join: Join = join_none

    @staticmethod
    def of(
        name: str,
        parameter: Tensor,
        rows: Tensor | None,
        *,
        master: bool,
        local: Local = whole,
        join: Join = join_none,
    ) -> Slot:
        """`master`: whether a narrow matrix has a float32 one."""
        p = local(parameter).detach()
        if rows is not None:
            rows = rows.to(p.device)
            return Slot(name, parameter, local, p.index_select(0, rows).float(), rows, join)
        kept = p.dtype != torch.float32 and (master or p.ndim < 2)
        return Slot(name, parameter, local, p.float() if kept else None, None, join)

    @property
    def parameter(self) -> Tensor:
        """The part of it that is here."""
        return self.local(self.source)

    @property
    def target(self) -> Tensor:
        """What the rule moves."""
        return self.parameter if self.master is None else self.master

    @property
    def is_matrix(self) -> bool:
        return self.source.ndim >= 2

    @property
    def key(self) -> int:
        """What the random bits of its rounding are drawn by: 31 bits of its name."""
        return crc32(self.name.encode()) & 0x7FFFFFFF

    def gradient(self) -> Tensor:
        """Of what learns, in the dtype it came in."""
        assert self.source.grad is not None, f"{self.name} has no gradient"
        grad = self.local(self.source.grad)
        return grad if self.rows is None else grad.index_select(0, self.rows)

    def follow(self) -> None:
        """Give the parameter what its master has become."""
        if self.rows is not None:
            assert self.master is not None
            self.parameter.index_copy_(0, self.rows, self.master.to(self.parameter.dtype))
        elif self.master is not None:
            self.parameter.copy_(self.master)
