"""The update rules and the learning rate: AdamW in DeepSeek's groups, Muon as Moonlight scales it.

AdamW is torch's own, fused into one pass over memory. DeepSeek's papers give one weight decay of 0.1 and name
no exception; here it falls on all matrices, embedding and head included, and on no vector (norms, biases).

Muon (arXiv 2502.16982) replaces the momentum of a matrix by the nearest orthogonal one, times
0.2 sqrt(max(A, B)): entries then have the size of AdamW's updates, so both share learning rate and decay. It
takes every matrix but embedding and head, the router's gate too, as in Moonlight and V4. Each expert is a
matrix of its own, and so are its gate and up projections; equal shapes of all layers run as one batch.

The law: weights are updated in float32; where the model's are narrower, a float32 master is kept here.
Shape letters: N matrices, A rows, B columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from shoal.config.run import OptimConfig

Trainable = Mapping[str, Tensor | None]  # a parameter's name -> the rows that learn (int64), None for all

_BATCH_ELEMENTS = 1 << 24  # of Muon's matrices orthogonalised together: 64 MiB of float32


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

    def __init__(self, model: nn.Module, settings: OptimConfig, trainable: Trainable | None = None) -> None:
        # named_parameters gives a tied parameter once.
        parameters = dict(model.named_parameters())
        if trainable is None:
            trainable = {name: None for name, p in parameters.items() if p.requires_grad}
        if strangers := trainable.keys() - parameters.keys():
            raise ValueError(f"the model has no parameter {min(strangers)!r} to train")
        self.parameters = {name: p for name, p in parameters.items() if name in trainable}
        self.rows = {
            name: rows.to(self.parameters[name].device)
            for name, rows in trainable.items()
            if rows is not None
        }
        self.masters = {name: self._master(name, p.detach()) for name, p in self.parameters.items()}
        muon = {
            name: p
            for name, p in self.masters.items()
            if settings.optimizer == "muon" and p.ndim >= 2 and not _is_embedding(name)
        }
        self.muon = Muon(muon, settings.weight_decay)
        self.adamw = AdamW({name: p for name, p in self.masters.items() if name not in muon}, settings)

    def _master(self, name: str, p: Tensor) -> Tensor:
        if (rows := self.rows.get(name)) is not None:
            return p.index_select(0, rows).float()
        return self.parameters[name] if p.dtype == torch.float32 else p.float()

    def gradients(self) -> list[Tensor]:
        """Of what learns, to be measured and clipped in place. Rows that do not learn are zeroed."""
        for name, rows in self.rows.items():
            if (grad := self.parameters[name].grad) is not None:
                kept = grad.index_select(0, rows)
                grad.zero_().index_copy_(0, rows, kept)
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for name, p, master in self._copied():
            rows = self.rows.get(name)
            grad = p.grad if p.grad is None or rows is None else p.grad.index_select(0, rows)
            master.grad = None if grad is None else grad.float()
        self.adamw.step(lr)
        self.muon.step(lr)
        for name, p, master in self._copied():
            if (rows := self.rows.get(name)) is None:
                p.copy_(master)
            else:
                p.index_copy_(0, rows, master.to(p.dtype))
            master.grad = None

    def zero_grad(self) -> None:
        for p in self.parameters.values():
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Every tensor a checkpoint must keep, by name. They are the live ones: loading copies into them."""
        masters = {name: p for name, p in self.masters.items() if p is not self.parameters[name]}
        return {
            "step": self.adamw.steps,
            **{f"{name}.master": tensor for name, tensor in masters.items()},
            **{f"{name}.exp_avg": tensor for name, tensor in self.adamw.exp_avg.items()},
            **{f"{name}.exp_avg_sq": tensor for name, tensor in self.adamw.exp_avg_sq.items()},
            **{f"{name}.momentum": tensor for name, tensor in self.muon.momenta.items()},
        }

    def _copied(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each parameter whose master is a tensor of its own, with it."""
        for name, p in self.parameters.items():
            if (master := self.masters[name]) is not p:
                yield name, p, master


def _is_embedding(name: str) -> bool:
    return name.endswith(("embed_tokens.weight", "lm_head.weight"))


class AdamW:
    """torch's fused AdamW without torch.optim, which imports the compiler: seconds at every start."""

    def __init__(self, parameters: Mapping[str, Tensor], settings: OptimConfig) -> None:
        self.parameters = dict(parameters)
        self.settings = settings
        self.exp_avg = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        # One count for all: a parameter is in every step of a run or in none.
        self.steps = torch.zeros((), device=next((p.device for p in self.parameters.values()), None))

    @torch.no_grad()
    def step(self, lr: float) -> None:
        self.steps += 1
        grads = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        for decays in (True, False):
            names = [name for name in grads if (self.parameters[name].ndim >= 2) == decays]
            if names:
                torch._fused_adamw_(
                    [self.parameters[name] for name in names],
                    [grads[name] for name in names],
                    [self.exp_avg[name] for name in names],
                    [self.exp_avg_sq[name] for name in names],
                    [],
                    [self.steps] * len(names),
                    lr=lr,
                    beta1=self.settings.betas[0],
                    beta2=self.settings.betas[1],
                    weight_decay=self.settings.weight_decay if decays else 0.0,
                    eps=self.settings.eps,
                    amsgrad=False,
                    maximize=False,
                )


class Muon:
    """M = 0.95 M + G; W -= lr (0.2 sqrt(max(A, B)) orthogonalise(G + 0.95 M) + decay W), for each matrix."""

    MOMENTUM = 0.95

    def __init__(self, parameters: Mapping[str, Tensor], weight_decay: float) -> None:
        self.parameters = dict(parameters)
        self.weight_decay = weight_decay
        self.momenta = {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        grads = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        if not grads:
            return
        parameters, momenta = [self.parameters[n] for n in grads], [self.momenta[n] for n in grads]
        torch._foreach_mul_(momenta, self.MOMENTUM)
        torch._foreach_add_(momenta, list(grads.values()))
        updates = torch._foreach_add(list(grads.values()), momenta, alpha=self.MOMENTUM)
        torch._foreach_mul_(parameters, 1 - lr * self.weight_decay)
        pairs = zip(map(matrices, grads, parameters), map(matrices, grads, updates), strict=True)
        for batch in _batches(list(pairs)):
            targets, steps = zip(*batch, strict=True)
            step_NAB = orthogonalise(torch.cat(steps))
            scale = -lr * 0.2 * math.sqrt(max(step_NAB.shape[1:]))
            torch._foreach_add_(targets, step_NAB.split([len(target) for target in targets]), alpha=scale)


def matrices(name: str, tensor: Tensor) -> Tensor:
    """The independent matrices (N, A, B) that a parameter stacks: experts, and gate and up of each."""
    rows = tensor.shape[-2] // 2 if name.endswith("gate_up_proj") else tensor.shape[-2]
    return tensor.view(-1, rows, tensor.shape[-1])


def _batches(pairs: list[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Pairs whose matrices have one shape, together up to a bound on memory."""
    shapes: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
    for pair in pairs:
        shapes.setdefault(tuple(pair[0].shape[1:]), []).append(pair)
    for batch in shapes.values():
        start, elements = 0, 0
        for i, (target, _) in enumerate(batch):
            if elements and elements + target.numel() > _BATCH_ELEMENTS:
                yield batch[start:i]
                start, elements = i, 0
            elements += target.numel()
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
