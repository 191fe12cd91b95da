"""Layers whose weights are quantised, and `quantise`, which puts them in place of those of a model.

`quantise` is f(model, scheme) -> model. On the meta device it changes shapes alone, and a checkpoint then
fills them (`checkpoint/hf.py`: FP8 as published is taken as it is, all else is quantised as it is read); a
model with weights is quantised where it is. The law: what reads a weight itself keeps it wide. That is the
embedding, the head and the norms, the router and its indexer, `kv_b_proj`, whose halves the absorbed form of
attention multiplies with, and the join of a prediction module. Nothing here learns: gradients end at it.

Names are the model's own; scales stand beside them with DeepSeek's suffix. Shape letters: E experts, N rows
and K columns, D hidden, F expert hidden; scales as in ops/quantised.py.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from shoal.model.dsa import Indexer
from shoal.model.layers import MLP, Linear, add_biases
from shoal.model.moe import Experts, LocalDispatcher, MoE
from shoal.model.transformer import Transformer
from shoal.ops import quantised as ops

Scheme = Literal["fp8", "int4"]
SCALE_SUFFIX = "_scale_inv"  # of the name of a scale; despite it, it multiplies
KEPT = ("lm_head", "kv_b_proj", "eh_proj")


def empty(shape: tuple[int, ...], scheme: Scheme, device: torch.device) -> ops.Weight:
    """A weight (..., N, K) without values."""
    *stack, rows, columns = shape
    groups = -(-columns // ops.BLOCK)
    if scheme == "fp8":
        down = -(-rows // ops.BLOCK)
        return ops.Fp8Weight(
            torch.empty(shape, dtype=ops.FP8, device=device),
            torch.empty(*stack, down, groups, dtype=torch.float32, device=device),
        )
    return ops.Int4Weight(
        torch.empty(*stack, rows, groups * ops.BLOCK // 2, dtype=torch.uint8, device=device),
        torch.empty(*stack, groups, rows, dtype=torch.bfloat16, device=device),
    )


def narrow(weight: Tensor, scheme: Scheme) -> ops.Weight:
    """A weight quantised, where it is."""
    if weight.is_meta:
        return empty(tuple(weight.shape), scheme, weight.device)
    return ops.quantise_blocks(weight) if scheme == "fp8" else ops.quantise_groups(weight)


class _Quantised(nn.Module):
    """Keeps weights under their own names, and their scales beside them."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.scheme: Scheme = scheme
        self.kind = ops.Fp8Weight if scheme == "fp8" else ops.Int4Weight

    def keep(self, name: str, weight: ops.Weight) -> None:
        self.register_parameter(name, nn.Parameter(weight.values, requires_grad=False))
        self.register_parameter(name + SCALE_SUFFIX, nn.Parameter(weight.scales, requires_grad=False))

    def kept(self, name: str) -> ops.Weight:
        return self.kind(self.get_parameter(name), self.get_parameter(name + SCALE_SUFFIX))


def _joint(x: Tensor, linears: tuple[QuantisedLinear, ...]) -> tuple[Tensor, ...]:
    return add_biases(ops.quantised_linears(x, [linear.kept("weight") for linear in linears]), linears)


class QuantisedLinear(_Quantised):
    joint = staticmethod(_joint)  # all of a model are quantised by one scheme

    def __init__(self, linear: Linear, scheme: Scheme) -> None:
        super().__init__(scheme)
        self.keep("weight", narrow(linear.weight.detach(), scheme))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.get_parameter("weight"), self.bias)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As `Linear.product`, beside one that is not narrow. `weight` is its own, whose scales are here."""
        (y,) = ops.quantised_linears(x, [self.kind(weight, self.get_parameter("weight" + SCALE_SUFFIX))])
        return y if bias is None else y + bias


class QuantisedExperts(_Quantised):
    """As `Experts`, but gate and up lie apart: `gate_up_proj` is (E, 2, F, D), so no block holds both."""

    def __init__(self, experts: Experts, scheme: Scheme) -> None:
        super().__init__(scheme)
        gate_up_E2FD = experts.gate_up_proj.detach().unflatten(1, (2, -1))
        self.keep("gate_up_proj", narrow(gate_up_E2FD, scheme))
        self.keep("down_proj", narrow(experts.down_proj.detach(), scheme))

    add_up = staticmethod(ops.quantised_sum)  # of the product's rows, one a choice

    def forward(
        self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, shared: MLP | None = None
    ) -> Tensor:
        """As `Experts.forward`: what the shared experts make is added by the last step of the product."""
        matrices, beside_TD = (self.kept("gate_up_proj"), self.kept("down_proj")), None
        if shared is not None:
            beside_TD = shared(x_TD)
        return ops.quantised_mlp(x_TD, experts_TK, weights_TK, *matrices, beside_TD)

    def takes(self, shared: MLP) -> bool:
        return True


def quantise(model: Transformer, scheme: Scheme) -> Transformer:
    """The model with its experts and linears quantised, one at a time: a wide weight is let go as it is done.

    ValueError for a model that is quantised already, adapted, or spread over processes.
    """
    if is_quantised(model):
        raise ValueError("this model's weights are quantised already; load it anew to quantise it otherwise")
    kept: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, Indexer):
            kept.update(module.modules())
    for name, module in list(model.named_modules()):
        *path, last = name.split(".")
        if module in kept or last in KEPT:
            continue
        if isinstance(module, MoE) and not isinstance(module.dispatcher, LocalDispatcher):
            raise ValueError(
                "this model's experts are spread over processes; quantise it before, or serve on one"
            )
        if type(module) is Linear:
            new: nn.Module = QuantisedLinear(module, scheme)
        elif type(module) is Experts:
            new = QuantisedExperts(module, scheme)
        elif isinstance(module, Linear | Experts):
            raise ValueError(f"{name} carries an adapter; merge it before quantising")
        else:
            continue
        setattr(model.get_submodule(".".join(path)), last, new)
    return model


def check_quant(scheme: str | None) -> Scheme | None:
    """A scheme as a person wrote it."""
    for known in get_args(Scheme):
        if scheme == known:
            return known
    if scheme is not None:
        raise ValueError(f"quant is {scheme!r}; it must be fp8 or int4")
    return None


def is_quantised(model: nn.Module) -> bool:
    return any(isinstance(module, _Quantised) for module in model.modules())


def scratch_bytes(model: nn.Module, itemsize: int) -> int:
    """What a step of many rows holds beside its activations: INT4 weights widened, of one layer at a time."""
    widths = [
        2 * (module.kept(name).values.numel()) * itemsize
        for module in model.modules()
        if isinstance(module, _Quantised) and module.scheme == "int4"
        for name in ("weight", "gate_up_proj", "down_proj")
        if name in module._parameters
    ]
    return 2 * max(widths, default=0)  # gate-up, and down beside it
