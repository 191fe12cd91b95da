"""AdamW in DeepSeek's groups: weight decay on all matrices, embedding and head included, and on no vector.

DeepSeek's papers give one decay of 0.1 and name no exception; norms and biases are left alone here. Where all
is float32 the update is torch's own, fused over the list; where something is narrow it is `ops.adamw`, one
pass over memory for each parameter. The law: one count serves all, since a parameter is in every step of a
run or in none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from shoal.config.run import OptimConfig
from shoal.ops import api as ops
from shoal.ops.api import Moments
from shoal.train.slot import Slot

BLOCK = 256  # elements that share a scale where moments have 8 bits


class AdamW:
    def __init__(self, slots: Iterable[Slot], settings: OptimConfig) -> None:
        self.slots = {slot.name: slot for slot in slots}
        self.settings = settings
        self.moments = {name: _zeros(slot, settings.moments) for name, slot in self.slots.items()}
        device = next((slot.target.device for slot in self.slots.values()), None)
        self.steps = torch.zeros((), device=device)

    def update(self, slots: Sequence[Slot], lr: float, factor: Tensor | None = None) -> None:
        """A step of these by their gradients times `factor`; none where that is not finite."""
        plain = [slot for slot in slots if self._is_plain(slot)]
        for decays in (True, False):
            if some := [slot for slot in plain if slot.is_matrix == decays]:
                self._update_plain(some, lr, factor)
        for slot in slots:
            if not self._is_plain(slot):
                self._update_narrow(slot, lr, factor)

    def _is_plain(self, slot: Slot) -> bool:
        """All is float32, or widens at little cost."""
        return slot.target.dtype == self.moments[slot.name].first.dtype == torch.float32 and (
            slot.parameter.dtype == torch.float32 or not slot.parameter.is_cuda
        )

    def _decay(self, slot: Slot) -> float:
        return self.settings.weight_decay if slot.is_matrix else 0.0

    def _update_plain(self, slots: Sequence[Slot], lr: float, factor: Tensor | None) -> None:
        grads = [slot.gradient().float() for slot in slots]
        if factor is not None:
            grads = torch._foreach_mul(grads, factor)
        torch._fused_adamw_(
            [slot.target for slot in slots],
            list(grads),
            [self.moments[slot.name].first for slot in slots],
            [self.moments[slot.name].second for slot in slots],
            [],
            [self.steps] * len(slots),
            lr=lr,
            beta1=self.settings.betas[0],
            beta2=self.settings.betas[1],
            weight_decay=self._decay(slots[0]),
            eps=self.settings.eps,
            amsgrad=False,
            maximize=False,
            found_inf=None if factor is None else (~factor.isfinite()).float(),
        )
        for slot in slots:
            slot.follow()

    def _update_narrow(self, slot: Slot, lr: float, factor: Tensor | None) -> None:
        fused = slot.master is not None and slot.rows is None  # the op moves master and parameter at once
        ops.adamw(
            slot.parameter if fused else slot.target,
            slot.gradient().contiguous(),
            self.moments[slot.name],
            slot.master if fused else None,
            factor,
            self.steps,
            lr=lr,
            betas=self.settings.betas,
            eps=self.settings.eps,
            weight_decay=self._decay(slot),
            key=slot.key,
        )
        if not fused:
            slot.follow()

    def state(self) -> dict[str, Tensor]:
        state = {"step": self.steps}
        for name, moments in self.moments.items():
            named = zip(("exp_avg", "exp_avg_sq", "exp_avg.scale", "exp_avg_sq.scale"), moments, strict=True)
            state |= {f"{name}.{field}": tensor for field, tensor in named if tensor is not None}
        return state


def _zeros(slot: Slot, kind: str) -> Moments:
    """Moments of 0. Those of a vector are float32 always: they weigh nothing."""
    target = slot.target
    if kind != "int8" or not slot.is_matrix:
        dtype = getattr(torch, kind) if slot.is_matrix else torch.float32
        return Moments(torch.zeros_like(target, dtype=dtype), torch.zeros_like(target, dtype=dtype))
    scales = [torch.zeros(-(-target.numel() // BLOCK), device=target.device) for _ in range(2)]
    first = torch.zeros_like(target, dtype=torch.int8)
    return Moments(first, torch.full_like(target, 255, dtype=torch.uint8), *scales)
