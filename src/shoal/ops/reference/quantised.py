"""Reference of quantised arithmetic: how numbers are narrowed, and products of what was narrowed.

FP8 (DeepSeek-V3, arXiv 2412.19437, section 3.3): e4m3 with a float32 scale for each 128 elements of a row of
activations and each 128 x 128 block of a weight, s = amax / 448, x = s q. INT4: a bfloat16 scale for each 128
elements of a weight's row, symmetric, -7 to 7. Edges may be ragged. A product here is that of the numbers
that the narrow ones stand for, in float32; kernels sum 128 products, scale, and add.

Shape letters: T tokens, N rows and K columns of a weight, n and k the same in blocks of 128, G groups of 128
columns, M rows sorted by expert, D hidden, F expert hidden, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoal.ops.reference.experts import sort_rows, sum_choices

BLOCK = 128
E4M3_MAX = 448.0
INT4_MAX = 7.0
LEAST = 2.0**-100  # of an amax: a block of zeros has a scale all the same


def _cut(x: Tensor, dim: int) -> Tensor:
    """`dim` (negative) as blocks of 128, zeros past the edge: (..., blocks, 128, ...)."""
    rest = -x.shape[dim] % BLOCK
    if rest:
        x = F.pad(x, [0, 0] * (-1 - dim) + [0, rest])
    return x.unflatten(dim, (-1, BLOCK))


def _scale_of(amax: Tensor) -> Tensor:
    # Divided by a tensor: by a number, CUDA multiplies with the inverse, which rounds otherwise.
    return amax.clamp(min=LEAST) / torch.full_like(amax, E4M3_MAX)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    # 1. The largest of each 128, and the scale by which it becomes 448.
    blocks = _cut(x.float(), -1)
    scales = _scale_of(blocks.abs().amax(-1))
    # 2. Times the inverse, rounded to nearest even.
    values = (blocks * (1 / scales).unsqueeze(-1)).to(torch.float8_e4m3fn)
    return values.flatten(-2)[..., : x.shape[-1]].contiguous(), scales


def quantise_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape[-2:]
    blocks = _cut(_cut(weight.float(), -1), -3)  # (..., n, 128, k, 128)
    scales = _scale_of(blocks.abs().amax((-3, -1)))
    values = (blocks * (1 / scales)[..., :, None, :, None]).to(torch.float8_e4m3fn)
    return values.flatten(-2).flatten(-3, -2)[..., :rows, :columns].contiguous(), scales


def quantise_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    groups = _cut(weight.float(), -1)  # (..., N, G, 128)
    # 1. The scale as it is kept: rounded before the values are divided by it.
    scales = (groups.abs().amax(-1).clamp(min=LEAST) / INT4_MAX).bfloat16()
    steps = (groups / scales.float().unsqueeze(-1)).round().clamp(-INT4_MAX, INT4_MAX)
    # 2. Stored as 1 to 15. Two bytes have columns i and i + 32 of their group, then i + 64 and i + 96.
    first, second, third, fourth = (steps + 8).to(torch.uint8).chunk(4, dim=-1)
    values = torch.stack((first | second << 4, third | fourth << 4), dim=-1)
    return values.flatten(-3), scales.transpose(-1, -2).contiguous()


def dequantise(values: Tensor, scales: Tensor, columns: int) -> Tensor:
    if values.dtype == torch.uint8:
        low, high = values.unflatten(-1, (-1, BLOCK // 4, 2)).unbind(-1)
        steps = torch.cat((low & 15, low >> 4, high & 15, high >> 4), dim=-1).float() - 8
        return (steps * scales.transpose(-1, -2).float().unsqueeze(-1)).flatten(-2)[..., :columns]
    wide = scales.repeat_interleave(BLOCK, -1)[..., :columns]
    return values.float() * wide.repeat_interleave(BLOCK, -2)[..., : values.shape[-2], :]


def _dequantise_rows(x: Tensor) -> Tensor:
    """What `quantise_rows` makes of x, in float32."""
    values, scales = quantise_rows(x)
    return values.float() * scales.repeat_interleave(BLOCK, -1)[..., : x.shape[-1]]


def quantised_linear(x: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    return F.linear(x.float(), dequantise(values, scales, x.shape[-1])).to(x.dtype)


def quantised_linears(
    x: Tensor, values: tuple[Tensor, ...], scales: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    return tuple(quantised_linear(x, *weight) for weight in zip(values, scales, strict=True))


def quantised_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up_values: Tensor,
    gate_up_scales: Tensor,
    down_values: Tensor,
    down_scales: Tensor,
    beside_TD: Tensor | None = None,
) -> Tensor:
    # 1. Sort the choices by expert.
    order_M, spans = sort_rows(experts_TK, down_values.shape[0])
    token_M = order_M // experts_TK.shape[1]
    y_MD = x_TD.new_zeros(order_M.shape[0], x_TD.shape[1])
    # 2. Gate-up, SwiGLU and down of each expert, whose matrices live while its rows are computed.
    for expert, start, end in spans:
        x = x_TD.index_select(0, token_M[start:end])
        gate, up = (
            quantised_linear(x, gate_up_values[expert, half], gate_up_scales[expert, half]) for half in (0, 1)
        )
        hidden = F.silu(gate.float()).mul_(up).to(x.dtype)
        y_MD[start:end] = quantised_linear(hidden, down_values[expert], down_scales[expert])
    # 3. Back to token order, weighted and summed.
    y_TD = sum_choices(y_MD, order_M, weights_TK)
    return y_TD if beside_TD is None else y_TD + beside_TD


def fp8_pair(*weights: Tensor) -> tuple[Tensor, ...]:
    weight = weights[0]
    if len(weights) > 1:
        weight = torch.cat([F.pad(w, (0, 0, 0, -w.shape[-2] % BLOCK)) for w in weights], -2)
    values, scales = quantise_blocks(weight)
    return values, scales, values.mT.contiguous(), scales.mT.contiguous()


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, narrow_NK: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_NK, narrow_NK)
        return F.linear(_dequantise_rows(x), narrow_NK).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_NK, narrow_NK = ctx.saved_tensors
        dx = dweight_NK = None
        if ctx.needs_input_grad[0]:
            dx = (_dequantise_rows(dy) @ narrow_NK).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dweight_NK = (dy.flatten(0, -2).mT @ x.flatten(0, -2)).to(weight_NK.dtype)
        return dx, dweight_NK, None


Pair = tuple[Tensor, ...]  # of `fp8_pair`


def fp8_linears(x: Tensor, weights: tuple[Tensor, ...], pair: Pair | None = None) -> tuple[Tensor, ...]:
    with torch.no_grad():
        values, scales, *_ = fp8_pair(*weights) if pair is None else pair
        narrow = dequantise(values, scales, x.shape[-1])
    told, first = [], 0
    for weight in weights:
        told.append(_Fp8Linear.apply(x, weight, narrow[first : first + len(weight)]))
        first += -(-len(weight) // BLOCK) * BLOCK
    return tuple(told)


def fp8_grouped_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    pairs: tuple[Pair, Pair] | None = None,
) -> Tensor:
    order_M, spans = sort_rows(experts_TK, gate_up_E2FD.shape[0])
    token_M = order_M // experts_TK.shape[1]
    gate_ups, downs = gate_up_E2FD.unbind(), down_EDF.unbind()
    dropped = spans[0][1] if spans else order_M.shape[0]
    parts = [x_TD.new_zeros(dropped, x_TD.shape[1])]
    for expert, start, end in spans:
        x = x_TD.index_select(0, token_M[start:end])
        both, down = (None, None) if pairs is None else (tuple(t[expert] for t in pair) for pair in pairs)
        gate, up = fp8_linears(x, gate_ups[expert].chunk(2), both)
        parts.append(*fp8_linears(F.silu(gate) * up, (downs[expert],), down))
    return sum_choices(torch.cat(parts), order_M, weights_TK)
