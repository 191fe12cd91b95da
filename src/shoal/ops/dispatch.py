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
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

from torch import Tensor

from shoal.ops.reference import adamw, attention, experts, layers, loss, narrow, routing

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
    "adamw": adamw.adamw,
    "narrow_load": narrow.narrow_load,
    "narrow_store": narrow.narrow_store,
}


@dataclass(frozen=True)
class Kernel:
    """A Triton implementation, and why it would not take a call (None: it takes it)."""

    run: Callable[..., Any]
    refusal: Callable[..., str | None]


@cache
def kernels() -> dict[str, Kernel]:
    """The Triton side. Imported when first needed: Triton is on Linux only, and takes a second to import."""
    from shoal.ops.triton import adamw, experts, routing

    return {
        "route": Kernel(routing.route, routing.route_refusal),
        "limit_capacity": Kernel(routing.limit_capacity, lambda *_: None),
        "adamw": Kernel(adamw.adamw, adamw.adamw_refusal),
        "grouped_mlp": Kernel(experts.grouped_mlp, experts.grouped_mlp_refusal),
    }


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


def call(op: str, x: Tensor, *arguments: Any) -> Any:
    """Run `op` on the side that serves this call; `x`, its first tensor, says on which device."""
    side = _side.get()
    if side == "triton" or (side == "auto" and x.is_cuda):
        kernel = kernels().get(op)
        reason = "it has no Triton kernel" if kernel is None else kernel.refusal(x, *arguments)
        if kernel is not None and reason is None:
            return kernel.run(x, *arguments)
        if side == "triton":
            raise ValueError(f"{op}: {reason}; use the side auto or reference")
    return REFERENCE[op](x, *arguments)


def explain(op: str, x: Tensor, *arguments: Any) -> str:
    """Which side would serve this call, and why."""
    side = _side.get()
    if side == "reference":
        return f"{op}: reference, as asked for"
    if side == "auto" and not x.is_cuda:
        return f"{op}: reference, since the tensors are on {x.device}"
    kernel = kernels().get(op)
    reason = "there is no Triton kernel" if kernel is None else kernel.refusal(x, *arguments)
    if reason is None:
        return f"{op}: triton"
    return f"{op}: {'refused' if side == 'triton' else 'reference'}, since {reason}"
