"""Reference of the routed experts: rows sorted by expert, then one pair of products an expert.

With e = experts[t,k] and w = weights[t,k], the layer is y_t = sum_k w down_e(silu(gate_e x_t) * up_e x_t). The backward
pass is written out because it needs less than autograd would keep: the inputs, and the gate-up rows from which
SwiGLU is computed again. This is also the CPU implementation, so no loop runs over tokens and no weight is copied.

Shape letters: M = T * K rows, one for each choice of an expert, sorted by expert.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def _sort_rows(experts_TK: Tensor, n_experts: int) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """The choices in order of expert, dropped ones first, and for each expert with rows (expert, start, end)."""
    flat_M = experts_TK.flatten()
    order_M = flat_M.argsort(stable=True)
    counts = torch.bincount(flat_M + 1, minlength=n_experts + 1).tolist()
    spans, start = [], counts[0]
    for expert, count in enumerate(counts[1:]):
        if count:
            spans.append((expert, start, start + count))
        start += count
    return order_M, spans


def _sum_choices(rows_MD: Tensor, weights_TK: Tensor, dtype: torch.dtype) -> Tensor:
    """Weigh the K rows of each token and add them, in at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    rows_TKD = rows_MD.view(*weights_TK.shape, -1).to(wide)
    return torch.bmm(weights_TK.to(wide).unsqueeze(1), rows_TKD).squeeze(1).to(dtype)


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        top_k = experts_TK.shape[1]
        # 1. Sort the rows by expert.
        order_M, spans = _sort_rows(experts_TK, gate_up_E2FD.shape[0])
        x_MD = x_TD.index_select(0, order_M // top_k)
        gate_up_M2F = x_MD.new_empty(x_MD.shape[0], gate_up_E2FD.shape[1])
        y_MD = torch.zeros_like(x_MD)
        # 2. Gate-up, SwiGLU and down of each expert.
        for expert, start, end in spans:
            gate_up = torch.mm(x_MD[start:end], gate_up_E2FD[expert].t(), out=gate_up_M2F[start:end])
            gate, up = gate_up.chunk(2, dim=-1)
            torch.mm(F.silu(gate).mul_(up), down_EDF[expert].t(), out=y_MD[start:end])
        # 3. Back to token order, weighted and summed.
        choices_MD = torch.empty_like(y_MD).index_copy_(0, order_M, y_MD)
        ctx.save_for_backward(x_TD, order_M, weights_TK, gate_up_M2F, gate_up_E2FD, down_EDF)
        ctx.spans = spans
        return _sum_choices(choices_MD, weights_TK, x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, order_M, weights_TK, gate_up_M2F, gate_up_E2FD, down_EDF = ctx.saved_tensors
        token_M = order_M // weights_TK.shape[1]
        x_MD, dy_MD = x_TD.index_select(0, token_M), dy_TD.index_select(0, token_M)
        weights_M1 = weights_TK.flatten()[order_M].unsqueeze(1).to(x_TD.dtype)
        dx_MD = torch.zeros_like(x_MD)
        dweights_M = torch.zeros(order_M.shape[0], dtype=weights_TK.dtype, device=x_TD.device)
        dgate_up_E2FD = torch.zeros_like(gate_up_E2FD)
        ddown_EDF = torch.zeros_like(down_EDF)
        for expert, start, end in ctx.spans:
            rows = slice(start, end)
            # 1. SwiGLU again: h = silu(g) u.
            gate, up = gate_up_M2F[rows].chunk(2, dim=-1)
            sigmoid = gate.sigmoid()
            silu = gate * sigmoid
            hidden = silu * up
            # 2. y = w (h W_down^T): the weight's gradient needs <dy, h W_down^T> = <dy W_down, h>.
            dhidden = torch.mm(dy_MD[rows], down_EDF[expert])
            dweights_M[rows] = (dhidden * hidden).sum(-1, dtype=dweights_M.dtype)
            weight = weights_M1[rows]
            torch.mm(dy_MD[rows].t(), hidden.mul_(weight), out=ddown_EDF[expert])
            dhidden.mul_(weight)
            # 3. d silu(g) = s (1 + g (1 - s)).
            dgate = dhidden * up * (sigmoid + silu * (1 - sigmoid))
            dgate_up = torch.cat((dgate, dhidden.mul_(silu)), dim=-1)
            # 4. Through the first product.
            torch.mm(dgate_up.t(), x_MD[rows], out=dgate_up_E2FD[expert])
            torch.mm(dgate_up, gate_up_E2FD[expert], out=dx_MD[rows])
        dx_TD = _sum_choices(
            torch.empty_like(dx_MD).index_copy_(0, order_M, dx_MD), torch.ones_like(weights_TK), x_TD.dtype
        )
        dweights_TK = torch.empty_like(dweights_M).index_copy_(0, order_M, dweights_M).view_as(weights_TK)
        return dx_TD, None, dweights_TK, dgate_up_E2FD, ddown_EDF


def grouped_mlp(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    return _GroupedMLP.apply(x_TD, experts_TK, weights_TK, gate_up_E2FD, down_EDF)
