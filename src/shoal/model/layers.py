"""The plain layers: Embedding, Linear, RMSNorm, the dense SwiGLU.

`Linear` exists because its product is a seam: a transform swaps `product` for an FP8 or an INT4 one and
nothing else of the model changes. Parameters are made empty; `Transformer.init_weights` or a checkpoint fills
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.ops import api as ops
from shoal.ops.api import OpenSum

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # (x, weight, bias) -> x W^T + b
Joint = Callable[[Tensor, Any], tuple[Tensor, ...]]  # (x, linears) -> what each makes of x


@runtime_checkable
class JointProduct(Protocol):
    """A product that several linears of the same rows may share."""

    def together(self, x: Tensor, linears: Any) -> tuple[Tensor, ...]: ...


class Embedding(nn.Module):
    def __init__(self, rows: int, dim: int, *, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim, device=device, dtype=dtype))

    def forward(self, ids_T: Tensor) -> Tensor:
        return F.embedding(ids_T, self.weight)


class Linear(nn.Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        device: torch.device | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.product: Product = F.linear

    @property
    def joint(self) -> Joint | None:
        """What makes such products of the same rows in one op; None: each makes its own."""
        if self.product is F.linear:
            return _plain
        return self.product.together if isinstance(self.product, JointProduct) else None

    def forward(self, x: Tensor) -> Tensor:
        return together(x, self)[0]


def _plain(x: Tensor, linears: tuple[Linear, ...]) -> tuple[Tensor, ...]:
    weights = tuple(linear.weight for linear in linears)
    return ops.linears(x, weights, tuple(linear.bias for linear in linears))


def add_biases(ys: Iterable[Tensor], linears: Iterable[Any]) -> tuple[Tensor, ...]:
    """What linears made without their biases, with them."""
    return tuple(y if each.bias is None else y + each.bias for y, each in zip(ys, linears, strict=True))


def together(x: Tensor, *linears: Linear) -> tuple[Tensor, ...]:
    """What each makes of the same rows, in one op if one makes them all."""
    joint = linears[0].joint
    if joint is not None and all(linear.joint == joint for linear in linears):
        return joint(x, linears)
    return tuple(linear.product(x, linear.weight, linear.bias) for linear in linears)


def lay_together(*linears: Linear, device: torch.device | str) -> None:
    """Give weights that have no memory yet a common one, each its rows of it: few rows of x then meet them in
    one product (`ops.linears`)."""
    weights = [linear.weight for linear in linears]
    if all(type(weight) is nn.Parameter and weight.is_meta for weight in weights):
        rows = [len(weight) for weight in weights]
        whole = torch.empty(sum(rows), weights[0].shape[1], dtype=weights[0].dtype, device=device)
        for linear, part in zip(linears, whole.split(rows), strict=True):
            linear.weight = nn.Parameter(part, requires_grad=linear.weight.requires_grad)


def project(linear: nn.Module, x_TD: Tensor, out: Tensor | None) -> Tensor:
    """linear(x), written to `out` where that is given, which has no gradient."""
    if out is None:
        return linear(x_TD)
    if type(linear) is Linear and linear.product is F.linear and linear.bias is None:  # noqa: SIM102
        if not ops.is_batch_invariant():
            return torch.mm(x_TD, linear.weight.t(), out=out)
    return out.copy_(linear(x_TD))


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float, *, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, y: Tensor | OpenSum) -> tuple[Tensor, Tensor]:
        """x + y, and its norm, in one pass."""
        if isinstance(y, OpenSum):
            return ops.add_sum_rms_norm(x, y, self.weight, self.eps)
        return ops.add_rms_norm(x, y, self.weight, self.eps)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)): the feed-forward of dense layers and of shared experts."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, device: torch.device | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, device=device, dtype=dtype)
        self.up_proj = Linear(hidden_size, intermediate_size, device=device, dtype=dtype)
        self.down_proj = Linear(intermediate_size, hidden_size, device=device, dtype=dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(ops.swiglu(*together(x_TD, self.gate_proj, self.up_proj)))

    def matrices(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Gate, up and down, if their products are the plain one without a bias."""
        linears = (self.gate_proj, self.up_proj, self.down_proj)
        if any(linear.product is not F.linear or linear.bias is not None for linear in linears):
            return None
        return self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
