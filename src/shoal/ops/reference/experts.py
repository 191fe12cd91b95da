"""Reference of the routed experts: rows sorted by expert, then one pair of products an expert.

With e = experts[t,k] and w = weights[t,k], the layer is y_t = sum_k w down_e(silu(gate_e x_t) * up_e x_t).
The backward pass is written out because it needs less than autograd would keep: the inputs, and the gate-up
rows from which SwiGLU is computed again. This is also the CPU implementation, so no loop runs over tokens and
no weight is copied.

Shape letters: M = T * K rows, one for each choice of an expert, sorted by expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoal.ops.reference.layers import add_rms_norm, swiglu

FEW_TOKENS = 64  # up to which calls cost more than arithmetic


def sort_rows(experts_TK: Tensor, n_experts: int) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """The choices in order of expert, dropped ones first, and for each expert with rows (expert, start,
    end).
    """
    flat_M = experts_TK.flatten()
    order_M = flat_M.argsort(stable=True)
    counts = torch.bincount(flat_M + 1, minlength=n_experts + 1).tolist()
    spans, start = [], counts[0]
    for expert, count in enumerate(counts[1:]):
        if count:
            spans.append((expert, start, start + count))
        start += count
    return order_M, spans


def sum_choices(rows_MD: Tensor, order_M: Tensor, weights_TK: Tensor) -> Tensor:
    """For each token, the weighted sum of its K rows, wherever the sort has put them."""
    place_TK = torch.empty_like(order_M).index_copy_(
        0, order_M, torch.arange(order_M.numel(), device=order_M.device)
    )
    if rows_MD.dtype in (torch.float32, torch.float64) and not rows_MD.is_cuda:
        # One pass over memory: gather, weigh and add.
        weights_TK = weights_TK.to(rows_MD.dtype)
        return F.embedding_bag(
            place_TK.view_as(weights_TK), rows_MD, mode="sum", per_sample_weights=weights_TK
        )
    rows_TKD = rows_MD.float().index_select(0, place_TK).view(*weights_TK.shape, rows_MD.shape[1])
    return torch.bmm(weights_TK.float().unsqueeze(1), rows_TKD).squeeze(1).to(rows_MD.dtype)


@torch.no_grad()
def sum_rows(rows_MD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    return sum_choices(rows_MD, torch.arange(len(rows_MD), device=rows_MD.device), weights_TK)


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        # 1. Sort the choices by expert.
        order_M, spans = sort_rows(experts_TK, gate_up_E2FD.shape[0])
        token_M = order_M // experts_TK.shape[1]
        gate_up_M2F = x_TD.new_empty(order_M.shape[0], gate_up_E2FD.shape[1])
        y_MD = x_TD.new_empty(order_M.shape[0], x_TD.shape[1])
        y_MD[: spans[0][1] if spans else None].zero_()
        # 2. Gate-up, SwiGLU and down of each expert.
        for expert, start, end in spans:
            x = x_TD.index_select(0, token_M[start:end])
            gate_up = torch.mm(x, gate_up_E2FD[expert].t(), out=gate_up_M2F[start:end])
            gate, up = gate_up.chunk(2, dim=-1)
            torch.mm(F.silu(gate).mul_(up), down_EDF[expert].t(), out=y_MD[start:end])
        ctx.save_for_backward(x_TD, order_M, weights_TK, gate_up_M2F, gate_up_E2FD, down_EDF)
        ctx.spans = spans
        # 3. Back to token order, weighted and summed.
        return sum_choices(y_MD, order_M, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, order_M, weights_TK, gate_up_M2F, gate_up_E2FD, down_EDF = ctx.saved_tensors
        token_M = order_M // weights_TK.shape[1]
        weights_M1 = weights_TK.flatten()[order_M].unsqueeze(1).to(x_TD.dtype)
        dx_MD = x_TD.new_empty(order_M.shape[0], x_TD.shape[1])
        dx_MD[: ctx.spans[0][1] if ctx.spans else None].zero_()
        dweights_M = weights_TK.new_zeros(order_M.shape[0])
        busy = {expert for expert, _, _ in ctx.spans}
        dgate_up_E2FD, ddown_EDF = torch.empty_like(gate_up_E2FD), torch.empty_like(down_EDF)
        for expert in range(gate_up_E2FD.shape[0]):
            if expert not in busy:
                dgate_up_E2FD[expert].zero_()
                ddown_EDF[expert].zero_()
        for expert, start, end in ctx.spans:
            rows = slice(start, end)
            x, dy = x_TD.index_select(0, token_M[rows]), dy_TD.index_select(0, token_M[rows])
            # 1. SwiGLU again: h = silu(g) u.
            gate, up = gate_up_M2F[rows].chunk(2, dim=-1)
            sigmoid = gate.sigmoid()
            silu = gate * sigmoid
            hidden = silu * up
            # 2. y = w (h W_down^T): the weight's gradient needs <dy, h W_down^T> = <dy W_down, h>.
            dhidden = torch.mm(dy, down_EDF[expert])
            dweights_M[rows] = (dhidden * hidden).sum(-1, dtype=dweights_M.dtype)
            weight = weights_M1[rows]
            torch.mm(dy.t(), hidden.mul_(weight), out=ddown_EDF[expert])
            dhidden.mul_(weight)
            # 3. d silu(g) = s (1 + g (1 - s)) = s + silu(g) (1 - s).
            dgate_up = torch.empty_like(gate_up_M2F[rows])
            dgate, dup = dgate_up.chunk(2, dim=-1)
            torch.mul(dhidden, silu, out=dup)
            torch.mul(dhidden.mul_(up), torch.addcmul(sigmoid + silu, silu, sigmoid, value=-1), out=dgate)
            # 4. Through the first product.
            torch.mm(dgate_up.t(), x, out=dgate_up_E2FD[expert])
            torch.mm(dgate_up, gate_up_E2FD[expert], out=dx_MD[rows])
        dx_TD = sum_choices(dx_MD, order_M, torch.ones_like(weights_TK))
        dweights_TK = torch.empty_like(dweights_M).index_copy_(0, order_M, dweights_M).view_as(weights_TK)
        return dx_TD, None, dweights_TK, dgate_up_E2FD, ddown_EDF


def _one_token(
    x_1D: Tensor, experts_1K: Tensor, weights_1K: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """The same for one token, where calls cost more than arithmetic: nothing to sort, one SwiGLU for all
    experts.
    """
    chosen = [(k, expert) for k, expert in enumerate(experts_1K[0].tolist()) if expert >= 0]
    x_D = x_1D[0]
    gate_up_K2F = x_1D.new_zeros(experts_1K.shape[1], gate_up_E2FD.shape[1])
    for k, expert in chosen:
        torch.mv(gate_up_E2FD[expert], x_D, out=gate_up_K2F[k])
    gate, up = gate_up_K2F.chunk(2, dim=-1)
    hidden_KF = F.silu(gate).mul_(up)
    y_KD = x_1D.new_zeros(experts_1K.shape[1], x_1D.shape[1])
    for k, expert in chosen:
        torch.mv(down_EDF[expert], hidden_KF[k], out=y_KD[k])
    wide = torch.promote_types(x_1D.dtype, torch.float32)
    return torch.mm(weights_1K.to(wide), y_KD.to(wide)).to(x_1D.dtype)


def _few_tokens(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """The same for a step of decoding: the loop over experts is torch's own, dropped choices come last."""
    n_experts, top_k = gate_up_E2FD.shape[0], experts_TK.shape[1]
    flat_M = experts_TK.flatten()
    flat_M = flat_M.where(flat_M >= 0, n_experts)
    order_M = flat_M.argsort(stable=True)
    ends_E = flat_M.bincount(minlength=n_experts + 1).cumsum(0)[:n_experts].int()
    x_MD = x_TD.index_select(0, order_M // top_k)
    gate, up = F.grouped_mm(x_MD, gate_up_E2FD.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
    y_MD = F.grouped_mm(F.silu(gate).mul_(up), down_EDF.transpose(1, 2), offs=ends_E)
    y_MD[ends_E[-1] :].zero_()
    return sum_choices(y_MD, order_M, weights_TK)


def _takes_grouped_mm(x_TD: Tensor, *weights: Tensor) -> bool:
    """What torch's kernel asks for: its dtypes, and rows of whole 16 bytes."""
    return x_TD.dtype in (torch.float32, torch.bfloat16) and all(
        weight.shape[2] * weight.itemsize % 16 == 0 for weight in weights
    )


def grouped_mlp(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    if not torch.is_grad_enabled():
        if x_TD.shape[0] == 1:
            return _one_token(x_TD, experts_TK, weights_TK, gate_up_E2FD, down_EDF)
        if x_TD.shape[0] <= FEW_TOKENS and _takes_grouped_mm(x_TD, gate_up_E2FD, down_EDF):
            return _few_tokens(x_TD, experts_TK, weights_TK, gate_up_E2FD, down_EDF)
    return _GroupedMLP.apply(x_TD, experts_TK, weights_TK, gate_up_E2FD, down_EDF)


def mixture(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    gate_GD: Tensor,
    up_GD: Tensor,
    down_DG: Tensor,
) -> Tensor:
    routed_TD = grouped_mlp(x_TD, experts_TK, weights_TK, gate_up_E2FD, down_EDF)
    return routed_TD + F.linear(swiglu(F.linear(x_TD, gate_GD), F.linear(x_TD, up_GD)), down_DG)


def close(rows_MD: Tensor, experts_TK: Tensor, weights_TK: Tensor, dense_STD: Tensor) -> Tensor:
    dense_TD = dense_STD.sum(0, dtype=torch.promote_types(dense_STD.dtype, torch.float32)).to(rows_MD.dtype)
    kept_MD = rows_MD.masked_fill(experts_TK.reshape(-1, 1) < 0, 0)
    return sum_rows(kept_MD, experts_TK, weights_TK) + dense_TD


def add_sum_rms_norm(
    x_TD: Tensor,
    rows_MD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    dense_STD: Tensor,
    weight_D: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return add_rms_norm(x_TD, close(rows_MD, experts_TK, weights_TK, dense_STD), weight_D, eps)
