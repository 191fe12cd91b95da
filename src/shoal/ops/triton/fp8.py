"""Experts in FP8 on a GPU: which products run, in what order, and what the backward pass keeps.

    forward    quantise x and the weights, gate-up with SwiGLU (h leaves quantised), down
    backward   dh and dx by W^T, quantised; d[g u] leaves its kernel quantised too; dW from the bfloat16 rows

Weights in bfloat16 are quantised at each use, 3 bytes an element forward and 3 backward, unless the caller
has done it, 4 in one reading, and may do so once for all micro-batches of a step (`pairs`). The gradients of
the weights stay in bfloat16: there both operands would have to be quantised anew along the tokens, and what
others report is that this costs more than the products save. What else the backward pass keeps is what the
bfloat16 layer keeps (`experts`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as Copied
from triton.tools.tensor_descriptor import TensorDescriptor

from shoal.ops.triton import experts
from shoal.ops.triton.expert_plan import choose_plan, num_multiprocessors
from shoal.ops.triton.fp8_hopper import fp8_hopper_kernel
from shoal.ops.triton.fp8_products import fp8_product_kernel, fp8_swiglu_kernel
from shoal.ops.triton.permutation import Groups, gather_rows, group_by_expert, sum_choices
from shoal.ops.triton.quantise import (
    FP8,
    lacks_e4m3,
    quantise_blocks,
    quantise_rows,
    quantise_transposed,
)

Pairs = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # gate-up and down, each W and W^T, values and scales
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Fp8Tile:
    """A program: its rows and columns, warps, loads in flight, and how many share a multiprocessor."""

    bm: int
    bn: int
    warps: int
    stages: int
    group: int = 16
    programs: int = 1


PRODUCT = Fp8Tile(128, 128, 8, 4)
SWIGLU = Fp8Tile(128, 128, 8, 4)
PORTABLE = Fp8Tile(32, 64, 4, 2)  # for the interpreter


def _tile(x: Tensor, tile: Fp8Tile) -> Fp8Tile:
    return tile if x.is_cuda else PORTABLE


def _takes_tma(*tensors: Tensor) -> bool:
    return all(
        t.is_cuda
        and torch.cuda.get_device_capability(t.device)[0] in (9, 10)
        and t.shape[-1] % 16 == 0
        and t.data_ptr() % 16 == 0
        for t in tensors
    )


def _fits_hopper(dtype: torch.dtype, *tensors: Tensor) -> bool:
    """Whether `fp8_hopper` takes what lies by expert, its results in `dtype`."""
    hopper = _takes_tma(*tensors) and torch.cuda.get_device_capability(tensors[0].device)[0] == 9
    return hopper and dtype.itemsize == 2


def _grid(tile: Fp8Tile, tiles: int, device: torch.device) -> tuple[int]:
    return (min(max(1, tiles), tile.programs * num_multiprocessors(device.index)),)


def _on_hopper(
    a: Tensor,
    a_scales: Tensor,
    w: Tensor,
    w_scales: Tensor,
    out: Tensor,
    out_scales: Tensor | None,
    saved: Tensor | None,
    groups: Groups,
    top_k: int,
    dtype: torch.dtype,
    *,
    scatter: bool,
) -> None:
    """Both products: with scales of what leaves it is SwiGLU's, and `dtype` what its rows are rounded to."""
    layout, columns = gl.NVMMASharedLayout(128, 8, 2), w.shape[-2]
    gated = out_scales is not None
    tiles = groups.max_tiles * triton.cdiv(columns, 128 if gated else 256)
    fp8_hopper_kernel[(max(1, min(tiles, num_multiprocessors(a.device.index))),)](
        a if gated else Copied.from_tensor(a, [64, 128], layout),
        a_scales,
        Copied.from_tensor(w.flatten(0, -2), [128, 128], layout),
        w_scales,
        out,
        out_scales if gated else out,
        out.new_empty(0, dtype=dtype) if saved is None else saved,
        *experts_places(groups),
        E=groups.n_experts,
        K=top_k,
        C=a.shape[1],
        N=columns,
        GATED=gated,
        SCATTER=scatter,
        SAVE=saved is not None,
        num_warps=4,
    )


def product(
    a: Tensor,
    a_scales: Tensor,
    w: Tensor,
    w_scales: Tensor,
    dtype: torch.dtype,
    groups: Groups | None = None,
    *,
    choices: int | None = None,
    tile: Fp8Tile | None = None,
) -> Tensor:
    """a (P, C) times w_e^T, w (E, N, C): by slot, or given `choices`, by choice. No groups: w is (N, C).

    `tile` asks for `fp8_products`, where otherwise `fp8_hopper` may serve.
    """
    hopper = tile is None and groups is not None and _fits_hopper(dtype, a, w)
    tile = _tile(a, tile or PRODUCT)
    w = w if groups is not None else w.unsqueeze(0)
    E, N, C = w.shape
    rows = a.shape[0] if choices is None else choices
    bm = tile.bm if groups is None else groups.tile
    out = torch.empty(rows, N, dtype=dtype, device=a.device)
    if hopper and groups is not None and groups.tile == 128:
        _on_hopper(a, a_scales, w, w_scales, out, None, None, groups, 1, dtype, scatter=choices is not None)
        return out
    tma = _takes_tma(a, w)
    tiles = triton.cdiv(a.shape[0], bm) if groups is None else groups.max_tiles
    where = (None, None, None) if groups is None else experts_places(groups)
    fp8_product_kernel[_grid(tile, tiles * triton.cdiv(N, tile.bn), a.device)](
        TensorDescriptor.from_tensor(a, [bm, 128]) if tma else a,
        a_scales,
        TensorDescriptor.from_tensor(w, [1, tile.bn, 128]) if tma else w,
        w_scales,
        out,
        *where,
        a.shape[0],
        E=E,
        C=C,
        N=N,
        BM=bm,
        BN=tile.bn,
        GROUP=tile.group,
        TMA=tma,
        GROUPED=groups is not None,
        SCATTER=choices is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def experts_places(groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
    return groups.choices_P, groups.experts_N, groups.first_tile_E1


def swiglu(
    x: Tensor,
    x_scales: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor,
    groups: Groups,
    top_k: int,
    dtype: torch.dtype,
    *,
    save: bool,
    tile: Fp8Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """h (P, F) quantised, and the gate-up rows (P, 2F) if `save`. gate_up is (E, 2, F, D), `tile` as in
    `product`."""
    hopper = tile is None and groups.tile == 128 and _fits_hopper(dtype, x, gate_up)
    tile = _tile(x, tile or SWIGLU)
    E, _, F, D = gate_up.shape
    P, where = groups.choices_P.shape[0], {"device": x.device}
    f_blocks = triton.cdiv(F, 128)
    h = torch.empty(P, F, dtype=torch.float8_e4m3fn, **where)
    h_scales = torch.empty(P, f_blocks, dtype=torch.float32, **where)
    saved = torch.empty(P, 2 * F, dtype=dtype, **where) if save else None
    if hopper:
        rest = (groups, top_k, dtype)
        _on_hopper(x, x_scales, gate_up, gate_up_scales, h, h_scales, saved, *rest, scatter=False)
        return h, h_scales, saved
    tma = _takes_tma(x, gate_up)
    w = gate_up.flatten(0, 1)
    fp8_swiglu_kernel[_grid(tile, groups.max_tiles * f_blocks, x.device)](
        x,
        x_scales,
        TensorDescriptor.from_tensor(w, [1, 128, 128]) if tma else w,
        gate_up_scales,
        h,
        h_scales,
        saved,
        *experts_places(groups),
        E=E,
        K=top_k,
        D=D,
        F=F,
        BM=groups.tile,
        GROUP=tile.group,
        TMA=tma,
        SAVE=save,
        DTYPE=DTYPES[dtype],
        ROUND=not x.is_cuda,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return h, h_scales, saved


def gather_quantised(
    values_TD: Tensor, scales: Tensor, experts_TK: Tensor, groups: Groups
) -> tuple[Tensor, Tensor]:
    """Rows and their scales in slot order: K copies of what was quantised once, a byte an element."""
    values_PD = gather_rows(values_TD.view(torch.uint8), experts_TK, groups)
    return values_PD.view(values_TD.dtype), gather_rows(scales, experts_TK, groups)


def layer(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor,
    down: Tensor,
    down_scales: Tensor,
    *,
    save: bool = False,
) -> tuple[Tensor, Groups, Tensor | None]:
    """The forward pass over quantised experts: y, the groups, and the gate-up rows if `save`."""
    rows = _tile(x_TD, PRODUCT).bm
    groups = group_by_expert(experts_TK, down.shape[0], rows)
    x, x_scales = quantise_rows(x_TD)
    K, M, dtype = experts_TK.shape[1], experts_TK.numel(), x_TD.dtype
    *h, saved = swiglu(x, x_scales, gate_up, gate_up_scales, groups, K, dtype, save=save)
    y_MD = product(*h, down, down_scales, dtype, groups, choices=M)
    return sum_choices(y_MD, experts_TK, weights_TK), groups, saved


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        gate_up_E2FD: Tensor,
        down_EDF: Tensor,
        pairs: Pairs | None,
    ) -> Tensor:
        if pairs is None:
            pairs = quantise_blocks(gate_up_E2FD), quantise_blocks(down_EDF)
        (values, scales, *gate_up_t), (down, down_scales, *down_t) = pairs
        gate_up = (values.unflatten(1, (2, -1)), scales.unflatten(1, (2, -1)))
        rows = (x_TD, experts_TK, weights_TK)
        y_TD, groups, gate_up_P2F = layer(*rows, *gate_up, down, down_scales, save=True)
        ctx.save_for_backward(*rows, gate_up_E2FD, down_EDF, gate_up_P2F, *gate_up_t, *down_t)
        ctx.groups = groups
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, experts_TK, weights_TK, gate_up_E2FD, down_EDF, gate_up_P2F, *kept = ctx.saved_tensors
        needs_x, _, needs_weights, needs_gate_up, needs_down, _ = ctx.needs_input_grad
        groups, M, dtype = ctx.groups, experts_TK.numel(), x_TD.dtype
        tma = x_TD.is_cuda and experts.has_tma(x_TD.device) and experts.fits_tma(x_TD, gate_up_E2FD, down_EDF)
        plan = choose_plan(M, down_EDF.shape[0], x_TD.shape[1], dtype, tma=tma, training=True)
        dx_TD = dgate_up_E2FD = ddown_EDF = None
        # 1. dh in FP8; SwiGLU again, its gradient (quantised too), the gradient of the weights, and w h.
        dy_TD = dy_TD.contiguous()
        dy_PD = gather_rows(dy_TD, experts_TK, groups)
        rows = gather_quantised(*quantise_rows(dy_TD), experts_TK, groups)
        dh_PF = product(*rows, *(kept[2:] or quantise_transposed(down_EDF)), dtype, groups)
        narrow = _narrow_like(gate_up_P2F) if needs_x else None
        told = experts.swiglu_backward(dh_PF, gate_up_P2F, weights_TK, groups, narrow)
        dgate_up_P2F, h_PF, dweights_TK = told
        # 2. The weights' gradients as they are without FP8.
        if needs_down:
            ddown_EDF = experts.weight_product(dy_PD, h_PF, groups, plan.ddown, tma=tma)
        if needs_gate_up:
            x_PD = gather_rows(x_TD, experts_TK, groups)
            dgate_up_E2FD = experts.weight_product(dgate_up_P2F, x_PD, groups, plan.dgate_up, tma=tma)
        # 3. dx in FP8.
        if narrow is not None:
            gate_up_t = kept[:2] or quantise_transposed(gate_up_E2FD)
            dx_TD = sum_choices(product(*narrow, *gate_up_t, dtype, groups, choices=M), experts_TK, None)
        return dx_TD, None, dweights_TK if needs_weights else None, dgate_up_E2FD, ddown_EDF, None


def _narrow_like(x_PC: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the same rows, quantised."""
    P, C = x_PC.shape
    scales = torch.empty(P, C // 128, dtype=torch.float32, device=x_PC.device)
    return torch.empty_like(x_PC, dtype=FP8), scales


def grouped_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    pairs: Pairs | None = None,
) -> Tensor:
    if x_TD.shape[0] == 0:
        return experts.nothing(x_TD, weights_TK, gate_up_E2FD, down_EDF)
    rows = (x_TD.contiguous(), experts_TK.contiguous(), weights_TK.contiguous())
    return _GroupedMLP.apply(*rows, gate_up_E2FD, down_EDF, pairs)


def grouped_mlp_refusal(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    pairs: Pairs | None = None,
) -> str | None:
    width = down_EDF.shape[2]
    if width % 128:
        return (
            f"experts are {width} wide; the kernels want a multiple of 128, or a block would hold gate and up"
        )
    return lacks_e4m3(x_TD) or experts.grouped_mlp_refusal(
        x_TD, experts_TK, weights_TK, gate_up_E2FD, down_EDF
    )
