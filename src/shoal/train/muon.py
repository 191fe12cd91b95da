"""Muon as Moonlight scales it (arXiv 2502.16982): the momentum of a matrix, made orthogonal, times
0.2 sqrt(max(A, B)).

Entries then have the size of AdamW's updates, so both rules share learning rate and decay. It takes every
matrix but embedding and head, the router's gate too, as in Moonlight and V4. The law: each expert is a matrix
of its own, and so are its gate and up projections; equal shapes run as one batch.

Shape letters: N matrices, A rows, B columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from shoal.config.run import OptimConfig
from shoal.ops import api as ops
from shoal.train.adamw import BLOCK
from shoal.train.slot import Slot

_BATCH_ELEMENTS = 1 << 24  # of matrices orthogonalised together: 64 MiB of float32


class Muon:
    """M = 0.95 M + G; W -= lr (0.2 sqrt(max(A, B)) orthogonalise(G + 0.95 M) + decay W), for each matrix."""

    MOMENTUM = 0.95

    def __init__(self, slots: Iterable[Slot], settings: OptimConfig) -> None:
        self.slots = {slot.name: slot for slot in slots}
        self.weight_decay = settings.weight_decay
        dtype = getattr(torch, settings.moments)
        self.momenta = {n: torch.zeros_like(slot.target, dtype=dtype) for n, slot in self.slots.items()}
        self.scales = {
            name: torch.zeros(-(-slot.target.numel() // BLOCK), device=slot.target.device)
            for name, slot in self.slots.items()
            if settings.moments == "int8"
        }

    def update(self, slots: Sequence[Slot], lr: float, step: Tensor, factor: Tensor | None = None) -> None:
        """A step of these by their gradients times `factor`, a gradient of 0 where that is not finite.

        `step` counts updates: the bits of stochastic rounding come from it.
        """
        grads = {slot.name: slot.gradient().float() for slot in slots}
        if factor is not None:
            grads = {name: torch.where(factor.isfinite(), grad * factor, 0.0) for name, grad in grads.items()}
        updates = {slot.name: self._momentum(slot, grads[slot.name], step) for slot in slots}
        wide = {slot.name: slot.target.float() for slot in slots}
        torch._foreach_mul_(list(wide.values()), 1 - lr * self.weight_decay)
        # Of a matrix that is cut over processes each makes the whole orthogonal, and takes its rows of it.
        # A stack is cut between its matrices.
        joined = {
            slot.name: slot.join(slot.source, updates[slot.name])
            if slot.source.ndim == 2
            else (updates[slot.name], 0)
            for slot in slots
        }
        stacks = [(name, matrices(name, update)) for name, (update, _) in joined.items()]
        for batch in _batches(stacks):
            names, steps = zip(*batch, strict=True)
            step_NAB = orthogonalise(torch.cat(steps))
            scale = -lr * 0.2 * math.sqrt(max(step_NAB.shape[1:]))
            ours = []
            for name, step_nAB in zip(names, step_NAB.split([len(part) for part in steps]), strict=True):
                whole, first = joined[name]
                ours.append(step_nAB.reshape(whole.shape)[first : first + len(wide[name])])
            torch._foreach_add_([wide[name] for name in names], ours, alpha=scale)
        for slot in slots:
            if slot.target.dtype != torch.float32:
                ops.narrow_store(slot.target, None, wide[slot.name], slot.key, step)
            slot.follow()

    def _momentum(self, slot: Slot, grad: Tensor, step: Tensor) -> Tensor:
        """Move the momentum of a parameter, and return what is to be made orthogonal."""
        kept, scale = self.momenta[slot.name], self.scales.get(slot.name)
        if kept.dtype == torch.float32:
            kept.mul_(self.MOMENTUM).add_(grad)
            return grad.add(kept, alpha=self.MOMENTUM)
        momentum = ops.narrow_load(kept, scale).mul_(self.MOMENTUM).add_(grad)
        # Bits of its own: the weight's are drawn by the name's key.
        ops.narrow_store(kept, scale, momentum, slot.key ^ 1, step)
        return momentum.mul_(self.MOMENTUM).add_(grad)

    def state(self) -> dict[str, Tensor]:
        return {
            **{f"{name}.momentum": tensor for name, tensor in self.momenta.items()},
            **{f"{name}.momentum.scale": tensor for name, tensor in self.scales.items()},
        }


def matrices(name: str, tensor: Tensor) -> Tensor:
    """The independent matrices (N, A, B) that a parameter stacks: experts, and gate and up of each."""
    rows = tensor.shape[-2] // 2 if name.endswith("gate_up_proj") else tensor.shape[-2]
    return tensor.reshape(tensor.numel() // (rows * tensor.shape[-1]), rows, tensor.shape[-1])


def _batches(stacks: list[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    """Parameters whose matrices have one shape, together up to a bound on memory."""
    shapes: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
    for stack in stacks:
        shapes.setdefault(tuple(stack[1].shape[1:]), []).append(stack)
    for batch in shapes.values():
        start, elements = 0, 0
        for i, (_, step) in enumerate(batch):
            if elements and elements + step.numel() > _BATCH_ELEMENTS:
                yield batch[start:i]
                start, elements = i, 0
            elements += step.numel()
        yield batch[start:]


def orthogonalise(x_NAB: Tensor) -> Tensor:
    """Five Newton-Schulz steps on each matrix: singular values go to near 1 (0.67 to 1.21), vectors stay.

    One step is X <- a X + (b XX^T + c (XX^T)^2) X, on the side with fewer rows. In bfloat16 on a GPU, whose
    rounding is below what five steps leave; in float32 on a CPU, which has no fast bfloat16.
    """
    tall = x_NAB.shape[1] > x_NAB.shape[2]
    x = x_NAB.mT if tall else x_NAB
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    x = x.bfloat16() if x.is_cuda else x
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(5):
        gram = torch.bmm(x, x.mT)
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return (x.mT if tall else x).to(x_NAB.dtype)
