"""Which implementation of an op runs: one table, one override, one `explain()`.

The reference serves every device; a Triton kernel is chosen on CUDA where one exists and takes the call.
`using` forces one side for a block of code (tests compare the two with it), and the environment variable
SHOAL_OPS does so for a whole process. Only this file names `ops.reference` or `ops.triton`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, get_args

from torch import Tensor

from shoal.ops.reference import attention, experts, layers, loss, routing

Side = Literal["auto", "reference", "triton"]

REFERENCE: dict[str, Callable[..., Any]] = {
    "rms_norm": layers.rms_norm,
    "swiglu": layers.swiglu,
    "rope": layers.rope,
    "route": routing.route,
    "limit_capacity": routing.limit_capacity,
    "grouped_mlp": experts.grouped_mlp,
    "attention": attention.attention,
    "write_cache": attention.write_cache,
    "paged_attention": attention.paged_attention,
    "latent_attention": attention.latent_attention,
    "linear_cross_entropy": loss.linear_cross_entropy,
}
TRITON: dict[str, Callable[..., Any]] = {}


def _checked(side: str, where: str) -> Side:
    for known in get_args(Side):
        if side == known:
            return known
    raise ValueError(f"{where} is {side!r}; set it to auto, reference or triton")


_default_side = _checked(os.environ.get("SHOAL_OPS", "auto"), "SHOAL_OPS")
_side: ContextVar[Side] = ContextVar("side", default=_default_side)


@contextmanager
def using(side: Side) -> Iterator[None]:
    """Take every op from one side within the block."""
    token = _side.set(_checked(side, "side"))
    try:
        yield
    finally:
        _side.reset(token)


def choose(op: str, x: Tensor) -> Callable[..., Any]:
    """The implementation of `op` for a call whose first tensor is `x`."""
    side = _side.get()
    if side == "triton" and op not in TRITON:
        raise ValueError(
            f"SHOAL_OPS=triton, but {op} has no Triton kernel; kernels exist for {sorted(TRITON)}"
        )
    if op in TRITON and (side == "triton" or (side == "auto" and x.is_cuda)):
        return TRITON[op]
    return REFERENCE[op]


def explain() -> str:
    """A table of every op and the side that would serve it on a CPU and on a GPU."""
    rows = [f"{op:22} cpu: reference   cuda: {'triton' if op in TRITON else 'reference'}" for op in REFERENCE]
    return "\n".join((f"side: {_side.get()}", *rows))
