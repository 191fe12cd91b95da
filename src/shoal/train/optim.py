"""The optimizer: which rule moves which parameter, at what rate, with what kept of it.

AdamW takes all, or with `muon` what is no matrix, and embedding and head. The law: weights are updated in
float32, and autograd is told that they were written to, which a fused kernel does not do. Where the model's
are narrower a float32 master is kept here, or stochastic rounding stands for it (`master = "bfloat16"`);
moments are kept as told (`moments`).

The step inside backward takes a parameter as soon as its gradient is whole and drops the gradient there, so
that never more than a few exist: 29 GiB less for V2-Lite. The global norm is not known then. A gradient is
clipped by the larger of the last step's norm and its own, whose share of the global norm it is at least: in
steady training that is global clipping, one step late; in a spike no parameter passes more than `clip`.
Clipping each parameter alone would turn the direction of every step; the late norm alone lets a spike in.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from shoal.config.run import OptimConfig
from shoal.train.adamw import AdamW
from shoal.train.muon import Muon
from shoal.train.slot import Join, Local, Slot, join_none, whole

Trainable = Mapping[str, Tensor | None]  # a parameter's name -> the rows that learn (int64), None for all


def learning_rate(step: int, settings: OptimConfig, steps: int) -> float:
    """The rate of update number `step`, counted from 0, of a run of `steps`."""
    warmup = settings.warmup_steps
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    match settings.schedule:
        case "constant":
            return settings.lr
        case "linear":
            return settings.lr * (1 - progress)
        case "cosine":
            wave = (1 + math.cos(math.pi * progress)) / 2
            return settings.lr * (settings.floor + (1 - settings.floor) * wave)
        case "multi_step":
            # Milestones are shares of the whole run, warm-up included; in integers, so that 80% is exact.
            return settings.lr * 0.316 ** sum(10 * step >= tenths * steps for tenths in (8, 9))


class Optimizer:
    """Updates a model's parameters from their gradients, and names its state for a checkpoint.

    `trainable` names the parameters that learn, each whole (None) or in some rows of its first dimension,
    which are experts where they are stacked. Without it, all that want a gradient do. Nothing is kept for
    the rest.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimConfig,
        trainable: Trainable | None = None,
        local: Local = whole,  # of a model that is cut over processes
        join: Join = join_none,
    ) -> None:
        # named_parameters gives a tied parameter once.
        parameters = dict(model.named_parameters())
        if trainable is None:
            trainable = {name: None for name, p in parameters.items() if p.requires_grad}
        if strangers := trainable.keys() - parameters.keys():
            raise ValueError(f"the model has no parameter {min(strangers)!r} to train")
        self.settings = settings
        self.parameters = {name: p for name, p in parameters.items() if name in trainable}
        self.slots = {
            name: Slot.of(
                name, p, trainable[name], master=settings.master == "float32", local=local, join=join
            )
            for name, p in self.parameters.items()
        }
        muon = {
            name
            for name, slot in self.slots.items()
            if settings.optimizer == "muon" and slot.is_matrix and not _is_embedding(name)
        }
        self.muon = Muon((slot for name, slot in self.slots.items() if name in muon), settings)
        self.adamw = AdamW((slot for name, slot in self.slots.items() if name not in muon), settings)
        device = next(iter(self.parameters.values())).device
        self.last_norm = torch.zeros((), device=device)  # of the gradient, in the last step inside backward
        self._norms: dict[str, Tensor] = {}  # of this step's gradients so far, as they came
        self._lr: float | None = None  # while a step inside backward is open

    # After backward

    def gradients(self) -> dict[str, Tensor]:
        """Of what learns, to be measured and clipped in place. Rows that do not learn are zeroed."""
        for slot in self.slots.values():
            if slot.rows is not None and (grad := slot.source.grad) is not None:
                kept = grad.index_select(0, slot.rows)
                grad.zero_().index_copy_(0, slot.rows, kept)
        grads = ((name, slot, slot.source.grad) for name, slot in self.slots.items())
        return {name: slot.local(grad) for name, slot, grad in grads if grad is not None}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        self.adamw.steps += 1
        for rule, update in ((self.adamw, self.adamw.update), (self.muon, self._update_muon)):
            if slots := [slot for slot in rule.slots.values() if slot.source.grad is not None]:
                update(slots, lr)
                increment_version(slot.source for slot in slots)

    def zero_grad(self) -> None:
        for p in self.parameters.values():
            p.grad = None

    # Inside backward

    def attach(self) -> None:
        """Make every backward pass within `inside_backward` a step."""
        # A hook is held by its tensor, out of the collector's sight: held strongly, none would ever be freed.
        held = weakref.ref(self)

        def take(name: str) -> None:
            if (optimizer := held()) is not None:
                optimizer._take(name)

        for name, p in self.parameters.items():
            p.register_post_accumulate_grad_hook(lambda _, name=name: take(name))

    @contextmanager
    def inside_backward(self, lr: float) -> Iterator[None]:
        """One backward pass, and with it one step. Afterwards `norms` tells what passed."""
        self.adamw.steps += 1
        self._norms.clear()
        self._lr = lr
        try:
            yield
        finally:
            self._lr = None

    @torch.no_grad()
    def _take(self, name: str) -> None:
        if self._lr is None:
            return
        slot = self.slots[name]
        assert name not in self._norms, f"{name} has a second gradient in one step inside backward"
        # Widened as it is read: vector_norm would make a float32 copy first.
        (norm,) = torch._foreach_norm([slot.gradient()], dtype=torch.float32)
        self._norms[name] = norm
        factor = (self.settings.clip / torch.maximum(norm, self.last_norm)).clamp(max=1.0)
        if name in self.muon.slots:
            self._update_muon([slot], self._lr, factor)
        else:
            self.adamw.update([slot], self._lr, factor)
        increment_version(slot.source)
        slot.source.grad = None

    def call_off(self) -> None:
        """No gradient came, and the step did not happen."""
        assert not self._norms
        self.adamw.steps -= 1

    def close_step(self) -> Tensor:
        """The norm of all gradients of the step inside backward. The next one clips by it."""
        norm = torch.linalg.vector_norm(torch.stack(list(self._norms.values())))
        self.last_norm.copy_(norm)
        return norm

    def first_nonfinite(self) -> str | None:
        """Whose gradient in the step inside backward was the first, from the loss back, not to be finite."""
        return next((name for name, norm in self._norms.items() if not norm.isfinite()), None)

    # Both

    def _update_muon(self, slots: Sequence[Slot], lr: float, factor: Tensor | None = None) -> None:
        self.muon.update(slots, lr, self.adamw.steps, factor)

    def state(self) -> dict[str, Tensor]:
        """Every tensor a checkpoint must keep, by name. They are the live ones: loading copies into them."""
        masters = {f"{name}.master": s.master for name, s in self.slots.items() if s.master is not None}
        late = {"last_norm": self.last_norm} if self.settings.in_backward else {}
        return {**late, **masters, **self.adamw.state(), **self.muon.state()}


def _is_embedding(name: str) -> bool:
    return name.endswith(("embed_tokens.weight", "lm_head.weight"))
