"""Activation recompute: what a block keeps for its backward pass, against computing it twice.

- `none` keeps all. At 16k tokens a V2-Lite layer keeps some 1.5 GiB.
- `selective` makes the attention half again (norm, projections, attention): some 0.5 GiB a layer for an
  eighth of the step's arithmetic. Experts are never run twice; their op makes SwiGLU again by itself.
- `full` keeps a block's input alone, 128 MiB, for a third more arithmetic. Of a prediction module it makes
  the attention half alone: cut over processes (FSDP2), the backward pass must meet its experts first outside
  a second pass, which ends with a call that drops all gathered weights otherwise.

The law: gradients are those of `none`, bit for bit where the ops are deterministic. A router is never asked
twice: the second pass replays the choices that the first one recorded, so a near-tie that rounds the other
way cannot send a token elsewhere. What draws noise draws the same again: its generators are rewound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoal.batch import Batch
from shoal.config.run import Recompute
from shoal.model.rope import Angles
from shoal.model.transformer import Added, Block, PredictionModule, Transformer
from shoal.ops.api import OpenSum, Routing

# (inputs, recorded choices or None) -> outputs, and the routing where there is one
Run = Callable[[tuple[Tensor | None, ...], Tensor | None], tuple[tuple[Tensor, ...], Routing | None]]


def recompute(model: Transformer, mode: Recompute, generators: Sequence[torch.Generator] = ()) -> Transformer:
    """The model, set to keep what `mode` says. `generators` are those its blocks draw from."""
    moe = model.config.moe
    drops = moe is not None and (moe.capacity_factor is not None or moe.random_second)
    if mode != "none" and moe is not None and drops and moe.norm_topk_prob:
        raise ValueError(
            f"train.recompute is {mode!r}, but with dropped choices and normalised weights a replayed choice "
            f"would weigh more than the first one did; set train.recompute or the capacity to none, and "
            f"random_second to false"
        )
    if mode != "none":
        for _, block in model.model.blocks():
            block.call = Remaking(mode, generators)
    return model


class Remaking:
    """Runs blocks and forgets what is inside them."""

    def __init__(self, mode: Recompute, generators: Sequence[torch.Generator]) -> None:
        self.mode = mode
        self.generators = generators

    def __call__(
        self,
        block: Block,
        x_TD: Tensor,
        y_TD: Added | None,
        angles: Angles,
        batch: Batch,
        replay_TK: Tensor | None,
    ) -> tuple[Tensor, Tensor, Routing | None]:
        if not torch.is_grad_enabled():
            return block.run(x_TD, y_TD, angles, batch, replay_TK)
        assert not isinstance(y_TD, OpenSum), "nothing that learns is left open"

        def whole(stream: Any, replay_TK: Tensor | None) -> tuple[tuple[Tensor, ...], Routing | None]:
            x_TD, y_TD = stream
            x_TD, y_TD, routing = block.run(x_TD, y_TD, angles, batch, replay_TK)
            return (x_TD, y_TD), routing

        def attention(stream: Any, _: Tensor | None) -> tuple[tuple[Tensor, ...], None]:
            x_TD, y_TD = stream
            return block.attend(x_TD, y_TD, angles, batch), None

        if self.mode == "full" and not isinstance(block, PredictionModule):
            (x_TD, y_TD), routing = self._remade(whole, (x_TD, y_TD), replay_TK)
            return x_TD, y_TD, routing
        (x_TD, normal_TD), _ = self._remade(attention, (x_TD, y_TD), None)
        return x_TD, *block.feed_forward(normal_TD, replay_TK)

    def _remade(
        self, run: Run, stream: tuple[Tensor, Tensor | None], replay_TK: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], Routing | None]:
        # Parameters get their gradients in the second pass: autograd must go there even if the stream wants
        # none.
        anchor = torch.zeros((), requires_grad=True)
        x_TD, y_TD, *routing = _Remade.apply(run, replay_TK, self.generators, anchor, *stream)
        return (x_TD, y_TD), Routing(*routing) if routing else None


class _Remade(torch.autograd.Function):
    """`run`, keeping its inputs and the choices it recorded."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Run,
        replay_TK: Tensor | None,
        generators: Sequence[torch.Generator],
        anchor: Tensor,
        x_TD: Tensor,
        y_TD: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.run, ctx.generators = run, generators
        ctx.states = [generator.get_state() for generator in generators]
        # As in the second pass: ops may take another way where no gradient is wanted, and round otherwise.
        with torch.enable_grad():
            outputs, routing = run(_fresh(x_TD, y_TD), replay_TK)
        ctx.save_for_backward(x_TD, y_TD, None if routing is None else routing.experts_TK)
        ctx.set_materialize_grads(False)
        told = [output.detach() for output in outputs]
        if routing is not None:
            ctx.mark_non_differentiable(routing.experts_TK)
            told += [routing.experts_TK, *(part.detach() for part in routing[1:] if part is not None)]
        return tuple(told)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x_TD, y_TD, recorded_TK = ctx.saved_tensors
        stream = _fresh(x_TD, y_TD)
        after = [generator.get_state() for generator in ctx.generators]
        for generator, state in zip(ctx.generators, ctx.states, strict=True):
            generator.set_state(state)
        with torch.enable_grad():
            outputs, routing = ctx.run(stream, recorded_TK)
        for generator, state in zip(ctx.generators, after, strict=True):
            generator.set_state(state)
        outputs = (*outputs, *(part for part in routing or () if part is not None))
        told = {output: grad for output, grad in zip(outputs, grads, strict=True) if grad is not None}
        # Into the leaves, as it comes: a parameter that is gathered for this block alone is another tensor
        # than the one that was there in the first pass.
        torch.autograd.backward(list(told), list(told.values()))
        return (None, None, None, None, *(None if tensor is None else tensor.grad for tensor in stream))


def _fresh(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Leaves of a graph of their own."""
    return tuple(None if t is None else t.detach().requires_grad_(t.requires_grad) for t in tensors)
