"""Batch-invariant mode: whether it is on, and how an op of that mode has a gradient.

In the mode a row's result is the same, bit for bit, whatever else is in the batch, and the trainer reads a
text as the engine wrote it. Only forward passes need that. A gradient need not be invariant, and is taken of
the plain form on the same inputs: the two agree to rounding, and one form of each gradient is enough.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _switch(name: str) -> bool:
    """An environment variable that is 0 or 1; unset is 0."""
    value = os.environ.get(name, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{name} is {value!r}; set it to 0 or 1")
    return value == "1"


_default = _switch("SHOAL_BATCH_INVARIANT")
_invariant: ContextVar[bool] = ContextVar("invariant", default=_default)


@contextmanager
def batch_invariant(on: bool = True) -> Iterator[None]:
    """Within the block a row's result does not depend on its batch, where an op has such a form."""
    token = _invariant.set(on)
    try:
        yield
    finally:
        _invariant.reset(token)


def is_batch_invariant() -> bool:
    return _invariant.get()


class _Form(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, fixed: Callable[..., Any], plain: Callable[..., Any], *inputs: Tensor | None
    ) -> Any:
        ctx.plain = plain
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        return fixed(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        inputs = [
            x if x is None else x.detach().requires_grad_(need)
            for x, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad(), batch_invariant(False):
            results = ctx.plain(*inputs)
            results = (results,) if isinstance(results, Tensor) else results
            # Of one number: told the outputs' gradients, `autograd.grad` imports sympy, which takes seconds.
            totals = [
                (result * grad).sum()
                for result, grad in zip(results, grads, strict=True)
                if grad is not None and result.requires_grad
            ]
            wanted = [x for x in inputs if x is not None and x.requires_grad]
            found = torch.autograd.grad(torch.stack(totals).sum(), wanted, allow_unused=True)
        rest = iter(found)
        return None, None, *(next(rest) if need else None for need in needed)


def with_gradient_of(plain: Callable[..., Any], fixed: Callable[..., Any], *inputs: Tensor | None) -> Any:
    """fixed(*inputs), whose gradient is that of plain(*inputs), outside of the mode; both give as many
    tensors."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return _Form.apply(fixed, plain, *inputs)
    return fixed(*inputs)
