"""Low-rank adapters (LoRA, arXiv 2106.09685): W + alpha/r B A, where W stays and A and B learn.

`add_lora` is f(model, settings) -> model. The weight itself becomes the sum (a torch parametrization), so
whatever reads it sees it: a Linear, the absorbed form of latent attention in the engine, a stack of experts,
each with an A and a B of its own. Nothing else of the model knows. The law: B starts at zero, so the model is
the one it was; `merge_lora` leaves the sum as a plain weight, and the model has its old names again.

The sum is made anew at each use: r / T of the product's own cost for T tokens, so merge before serving.

Shape letters: E experts, O outputs, I inputs, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from shoal.model.layers import Linear
from shoal.model.moe import Experts
from shoal.model.transformer import Transformer

STACKED = ("gate_up_proj", "down_proj")  # of Experts


class LowRank(nn.Module):
    """What is added to a weight (O, I), or to each of a stack (E, O, I)."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        *stack, rows, columns = weight.shape
        a = torch.empty(*stack, rank, columns, device=weight.device, dtype=weight.dtype)
        # Kaiming's uniform with a = sqrt(5), as the LoRA authors' code and PEFT have it.
        bound = 1 / math.sqrt(columns)
        self.lora_A = nn.Parameter(a.uniform_(-bound, bound, generator=generator))
        self.lora_B = nn.Parameter(torch.zeros(*stack, rows, rank, device=weight.device, dtype=weight.dtype))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.lora_B @ self.lora_A)


def add_lora(
    model: Transformer, targets: Sequence[str], rank: int, alpha: float, generator: torch.Generator
) -> Transformer:
    """Adapters on every weight whose name ends in one of `targets` ("q_proj", "experts.gate_up_proj").

    All other parameters are frozen.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1")
    found: dict[str, int] = dict.fromkeys(targets, 0)
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        for tensor in _adaptable(module):
            whole = name if tensor == "weight" else f"{name}.{tensor}"
            target = next((target for target in targets if f".{whole}".endswith(f".{target}")), None)
            if target is not None:
                found[target] += 1
                adapter = LowRank(getattr(module, tensor), rank, alpha, generator)
                parametrize.register_parametrization(module, tensor, adapter)
    if missing := [target for target, count in found.items() if not count]:
        raise ValueError(f"this model has no weight {missing[0]!r} to adapt; see its names with `shoal plan`")
    return model


def _adaptable(module: nn.Module) -> Sequence[str]:
    return ("weight",) if isinstance(module, Linear) else STACKED if isinstance(module, Experts) else ()


def adapters(model: Transformer) -> dict[str, LowRank]:
    """By the name of what they adapt: a Linear's, or that of a stack of experts."""
    found: dict[str, LowRank] = {}
    for name, module in model.named_modules():
        if isinstance(module, LowRank):
            owner, _, rest = name.partition(".parametrizations.")
            tensor = rest.partition(".")[0]
            found[owner if tensor == "weight" else f"{owner}.{tensor}"] = module
    return found


def merge_lora(model: Transformer) -> Transformer:
    """The sums as plain weights, the adapters gone."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for tensor in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, tensor, leave_parametrized=True)
    return model.requires_grad_(True)
