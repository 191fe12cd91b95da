"""The routed experts on a GPU: which products run, in what order, and what the backward pass keeps.

    y_t = sum_k w_tk down_e(silu(gate_e x_t) * up_e x_t)

Forward: group the choices by expert (`permutation`), gate-up with SwiGLU, down, then the weighted sum of
each token's K rows. The rows of x are gathered as they are read; the 2F-wide gate-up rows are written for
training alone, and they are all it keeps beside its inputs: K * 2F values a token (V2-Lite in bf16: 34 KB).
Backward computes SwiGLU again.

    few rows an expert (decoding)   expert_streams    bound by bytes: the chosen experts, once
    many rows                       expert_products   bound by the matrix rate

No step waits for the device, and no sum depends on the order in which programs run. `expert_plan` holds the
tiles.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from shoal.ops.invariance import with_gradient_of
from shoal.ops.triton.expert_gradients import Halves, weight_gradient, weight_gradient_refusal
from shoal.ops.triton.expert_plan import (
    MAX_SCAN,
    Plan,
    Tile,
    choose_plan,
    find_plan,
    num_multiprocessors,
    num_programs,
    wider,
)
from shoal.ops.triton.expert_products import (
    product_kernel,
    swiglu_backward_kernel,
    swiglu_product_kernel,
    weight_product_kernel,
)
from shoal.ops.triton.expert_streams import stream_kernel, swiglu_stream_kernel
from shoal.ops.triton.linears import linears
from shoal.ops.triton.permutation import Groups, close, gather_rows, group_by_expert, sum_choices
from shoal.ops.triton.swiglu import swiglu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_RIDING = 4  # tiles of tokens up to which the shared experts share the routed ones' launches


def _describe(tensor: Tensor, block: list[int], tma: bool) -> Tensor | TensorDescriptor:
    """What a kernel loads blocks from: a TMA descriptor, or the tensor where there is no TMA."""
    return TensorDescriptor.from_tensor(tensor, block) if tma else tensor


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _programs(tile: Tile, tiles: int, columns: int, device: torch.device) -> tuple[int]:
    return (num_programs(tile, tiles, columns, num_multiprocessors(device.index)),)


def _persistent(tile: Tile, tma: bool) -> dict[str, Any]:
    return {
        "BN": tile.bn,
        "BK": tile.bk,
        "GROUP": tile.group,
        "TMA": tma,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def swiglu_product(
    x_TD: Tensor,
    gate_up_E2FD: Tensor,
    groups: Groups,
    top_k: int,
    tile: Tile,
    *,
    tma: bool,
    pdl: bool,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """h (P, F), and the gate-up rows (P, 2F) if `save`."""
    E, two_F, D = gate_up_E2FD.shape
    F, P = two_F // 2, groups.choices_P.shape[0]
    h_PF = x_TD.new_empty(P, F)
    gate_up_P2F = x_TD.new_empty(P, two_F) if save else None
    block = [groups.tile, 1, tile.bn // 2]
    swiglu_product_kernel[_programs(tile, groups.max_tiles, F, x_TD.device)](
        x_TD,
        _describe(gate_up_E2FD.view(E, 2, F, D), [1, 2, tile.bn, tile.bk], tma),
        _describe(h_PF.view(P, 1, F), block, tma),
        None if gate_up_P2F is None else _describe(gate_up_P2F.view(P, 2, F), block, tma),
        groups.choices_P,
        groups.experts_N,
        groups.first_tile_E1,
        E=E,
        K=top_k,
        D=D,
        F=F,
        BM=groups.tile,
        SAVE=save,
        PDL=pdl,
        PRECISION=_precision(x_TD),
        launch_pdl=pdl,
        **_persistent(tile, tma),
    )
    return h_PF, gate_up_P2F


def product(
    a_PC: Tensor,
    w: Tensor,
    groups: Groups,
    tile: Tile,
    *,
    choices: int | None,
    transposed: bool,
    tma: bool,
    pdl: bool = False,
) -> Tensor:
    """a times w_e^T, w (E, N, C), or w_e, w (E, C, N): by slot (P, N), or given `choices`, by choice (M, N).

    Rows of dropped choices, and slots past the last tile, are not written.
    """
    C = a_PC.shape[1]
    N = w.shape[1] if transposed else w.shape[2]
    out = a_PC.new_empty(a_PC.shape[0] if choices is None else choices, N)
    block = [1, tile.bn, tile.bk] if transposed else [1, tile.bk, tile.bn]
    product_kernel[_programs(tile, groups.max_tiles, N, a_PC.device)](
        _describe(a_PC, [groups.tile, tile.bk], tma),
        _describe(w, block, tma),
        out,
        groups.choices_P,
        groups.experts_N,
        groups.first_tile_E1,
        E=w.shape[0],
        C=C,
        N=N,
        TRANSPOSED=transposed,
        SCATTER=choices is not None,
        BM=groups.tile,
        FLATTEN=tile.flatten,
        PDL=pdl,
        PRECISION=_precision(a_PC),
        launch_pdl=pdl,
        **_persistent(tile, tma),
    )
    return out


def swiglu_backward(
    dh_PF: Tensor,
    gate_up_P2F: Tensor,
    weights_TK: Tensor,
    groups: Groups,
    narrow: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dgate_up (P, 2F), the weighted h (P, F) in place of dh, and the gradient of the weights (T, K).

    Into `narrow` goes dgate_up as `quantise_rows` has it: F is then a multiple of 128.
    """
    P, F = dh_PF.shape
    dgate_up_P2F = torch.empty_like(gate_up_P2F)
    dweights_TK = torch.zeros_like(weights_TK, dtype=torch.float32)
    swiglu_backward_kernel[(P,)](
        dh_PF,
        gate_up_P2F,
        weights_TK,
        dgate_up_P2F,
        dweights_TK,
        groups.choices_P,
        groups.first_tile_E1,
        *(narrow or (None, None)),
        E=groups.n_experts,
        F=F,
        TILE=groups.tile,
        BLOCK=min(1024, triton.next_power_of_2(F)),
        NARROW=narrow is not None,
        ROUND=not dh_PF.is_cuda,
    )
    return dgate_up_P2F, dh_PF, dweights_TK.to(weights_TK.dtype)


def weight_product(left_PR: Tensor, right_PC: Tensor, groups: Groups, tile: Tile, *, tma: bool) -> Tensor:
    """left^T right over the rows of each expert: (E, R, C)."""
    halves = Halves(tile.bm // 2, tile.bn)
    if tma and weight_gradient_refusal(left_PR, right_PC, groups, halves) is None:
        return weight_gradient(left_PR, right_PC, groups, halves)
    R, C, E = left_PR.shape[1], right_PC.shape[1], groups.n_experts
    out_ERC = left_PR.new_empty(E, R, C)
    weight_product_kernel[_programs(tile, E * triton.cdiv(R, tile.bm), C, left_PR.device)](
        _describe(left_PR, [tile.bk, tile.bm], tma),
        _describe(right_PC, [tile.bk, tile.bn], tma),
        out_ERC,
        groups.first_tile_E1,
        E=E,
        R=R,
        C=C,
        TILE=groups.tile,
        BM=tile.bm,
        PRECISION=_precision(left_PR),
        **_persistent(tile, tma),
    )
    return out_ERC


def _tiles_of(groups: Groups | None, choices: int) -> tuple[int, int, tuple[Tensor | None, ...]]:
    """Most tiles, rows of h, where choices stand. Without groups each choice counts as a tile."""
    if groups is None:
        return choices, choices, (None, None, None)
    where = (groups.choices_P, groups.experts_N, groups.first_tile_E1)
    return groups.max_tiles, groups.choices_P.shape[0], where


def _scanned(groups: Groups | None, tokens: int) -> int:
    """How many choices a program reads to find its rows; 1: a token's own, all of different experts."""
    return 0 if groups is not None else 1 if tokens == 1 else MAX_SCAN


Shared = tuple[Tensor, Tensor, Tensor]  # gate (S F, D), up (S F, D) and down (D, S F) of the shared experts


def swiglu_stream(
    x_TD: Tensor,
    experts_TK: Tensor,
    gate_up_E2FD: Tensor,
    groups: Groups | None,
    tile: Tile,
    shared: Shared | None = None,
    *,
    tma: bool,
    pdl: bool,
) -> tuple[Tensor, Tensor | None]:
    """h in slots (P, F), or without groups in choices (M, F); and that of the shared experts (T, S F)."""
    E, two_F, D = gate_up_E2FD.shape
    M, F, T = experts_TK.numel(), two_F // 2, x_TD.shape[0]
    tiles, height, where = _tiles_of(groups, M)
    block, (gate, up, _) = [1, tile.bn, tile.bk], shared or (gate_up_E2FD[0],) * 3
    times = gate.shape[0] // F if shared else 0
    h = x_TD.new_empty(height, F)
    shared_h = x_TD.new_empty(T, times * F) if shared else None
    swiglu_stream_kernel[(triton.cdiv(F, tile.bn), tiles + times * triton.cdiv(T, tile.bm))](
        x_TD,
        _describe(gate_up_E2FD, block, tma),
        _describe(gate.unsqueeze(0), block, tma),
        _describe(up.unsqueeze(0), block, tma),
        h,
        h if shared_h is None else shared_h,
        experts_TK,
        *where,
        M,
        T,
        E=E,
        K=experts_TK.shape[1],
        D=D,
        F=F,
        BM=tile.bm,
        BN=tile.bn,
        BK=tile.bk,
        SCAN=_scanned(groups, T),
        SHARED=times,
        TMA=tma,
        PDL=pdl,
        PRECISION=_precision(x_TD),
        num_warps=tile.warps,
        num_stages=tile.stages,
        launch_pdl=pdl,
    )
    return h, shared_h


def stream(
    h: Tensor,
    experts_TK: Tensor,
    down_EDF: Tensor,
    groups: Groups | None,
    tile: Tile,
    shared_h: Tensor | None = None,
    shared_down: Tensor | None = None,
    *,
    tma: bool,
    pdl: bool,
) -> tuple[Tensor, Tensor | None]:
    """The rows of the choices (M, D), those of dropped ones not written; S parts of the shared experts' sum
    (S, T, D) in float32."""
    E, D, F = down_EDF.shape
    M, T = experts_TK.numel(), experts_TK.shape[0]
    tiles, _, where = _tiles_of(groups, M)
    block, times, parts = [1, tile.bn, tile.bk], 0, None
    y_MD = h.new_empty(M, D)
    if shared_down is not None:
        times = shared_down.shape[1] // F
        parts = torch.empty(times, T, D, dtype=torch.float32, device=h.device)
    stream_kernel[(triton.cdiv(D, tile.bn), tiles + times * triton.cdiv(T, tile.bm))](
        h,
        h if shared_h is None else shared_h,
        _describe(down_EDF, block, tma),
        _describe(down_EDF if shared_down is None else shared_down.unsqueeze(0), block, tma),
        y_MD,
        y_MD if parts is None else parts,
        experts_TK,
        *where,
        M,
        T,
        E=E,
        D=D,
        F=F,
        BM=tile.bm,
        BN=tile.bn,
        BK=tile.bk,
        SCAN=_scanned(groups, T),
        SHARED=times,
        TMA=tma,
        PDL=pdl,
        PRECISION=_precision(h),
        num_warps=tile.warps,
        num_stages=tile.stages,
        launch_pdl=pdl,
    )
    return y_MD, parts


def _rows(
    x_TD: Tensor,
    experts_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    plan: Plan,
    save: bool,
    shared: Shared | None = None,
) -> tuple[Tensor, Tensor | None, Groups | None, Tensor | None]:
    """The rows of the choices, parts of `shared` ones that ride along, and what backward wants."""
    groups = gate_up_P2F = parts = None
    how = {"tma": plan.tma, "pdl": plan.pdl}
    if plan.kind != "scan":
        groups = group_by_expert(experts_TK, gate_up_E2FD.shape[0], plan.rows, pdl=plan.pdl)
    if plan.kind == "tiles":
        assert groups is not None and shared is None
        M, K = experts_TK.numel(), experts_TK.shape[1]
        h_PF, gate_up_P2F = swiglu_product(x_TD, gate_up_E2FD, groups, K, plan.gate_up, save=save, **how)
        y_MD = product(h_PF, down_EDF, groups, plan.down, choices=M, transposed=True, **how)
    else:
        h, shared_h = swiglu_stream(x_TD, experts_TK, gate_up_E2FD, groups, plan.gate_up, shared, **how)
        down = None if shared is None else shared[2]
        y_MD, parts = stream(h, experts_TK, down_EDF, groups, plan.down, shared_h, down, **how)
    return y_MD, parts, groups, gate_up_P2F


def _forward(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    plan: Plan,
    save: bool,
) -> tuple[Tensor, Groups | None, Tensor | None]:
    """y, and what backward wants."""
    y_MD, _, *saved = _rows(x_TD, experts_TK, gate_up_E2FD, down_EDF, plan, save)
    return sum_choices(y_MD, experts_TK, weights_TK, pdl=plan.pdl), *saved


class _GroupedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        gate_up_E2FD: Tensor,
        down_EDF: Tensor,
        plan: Plan,
    ) -> Tensor:
        y_TD, groups, gate_up_P2F = _forward(
            x_TD, experts_TK, weights_TK, gate_up_E2FD, down_EDF, plan, save=True
        )
        ctx.save_for_backward(x_TD, experts_TK, weights_TK, gate_up_E2FD, down_EDF, gate_up_P2F)
        ctx.groups, ctx.plan = groups, plan
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, experts_TK, weights_TK, gate_up_E2FD, down_EDF, gate_up_P2F = ctx.saved_tensors
        groups, plan = ctx.groups, ctx.plan
        needs_x, _, needs_weights, needs_gate_up, needs_down, _ = ctx.needs_input_grad
        M = experts_TK.numel()
        dx_TD = dgate_up_E2FD = ddown_EDF = None
        # 1. dh, and SwiGLU again: its gradient, the gradient of the weights, and w h.
        dy_PD = gather_rows(dy_TD.contiguous(), experts_TK, groups)
        dh_PF = product(dy_PD, down_EDF, groups, plan.dh, choices=None, transposed=False, tma=plan.tma)
        dgate_up_P2F, h_PF, dweights_TK = swiglu_backward(dh_PF, gate_up_P2F, weights_TK, groups)
        # 2. Down: dy^T (w h).
        if needs_down:
            ddown_EDF = weight_product(dy_PD, h_PF, groups, plan.ddown, tma=plan.tma)
        # 3. Gate-up: dgu^T x, and dgu W for the rows.
        if needs_gate_up:
            x_PD = gather_rows(x_TD, experts_TK, groups)
            dgate_up_E2FD = weight_product(dgate_up_P2F, x_PD, groups, plan.dgate_up, tma=plan.tma)
        if needs_x:
            dx_MD = product(
                dgate_up_P2F, gate_up_E2FD, groups, plan.dx, choices=M, transposed=False, tma=plan.tma
            )
            dx_TD = sum_choices(dx_MD, experts_TK, None)
        return dx_TD, None, dweights_TK if needs_weights else None, dgate_up_E2FD, ddown_EDF, None


def has_tma(device: torch.device) -> bool:
    """Hopper and data-centre Blackwell: TMA, and shared memory for the tiles of `expert_plan`."""
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def fits_tma(*tensors: Tensor) -> bool:
    """TMA wants 16-byte rows and bases."""
    return all(t.shape[-1] * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in tensors)


def grouped_mlp_refusal(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> str | None:
    """Why the kernels do not take this call; None if they do."""
    if x_TD.dtype not in DTYPES:
        return f"x is {x_TD.dtype}; the kernels take bfloat16, float16 and float32"
    if not x_TD.dtype == gate_up_E2FD.dtype == down_EDF.dtype:
        return (
            f"x is {x_TD.dtype} but the experts are {gate_up_E2FD.dtype} and {down_EDF.dtype}; cast one side"
        )
    if not (gate_up_E2FD.is_contiguous() and down_EDF.is_contiguous()):
        return "the experts' matrices are not contiguous; the kernels do not copy weights"
    if experts_TK.numel() >= 2**31:
        return f"{experts_TK.numel()} choices; the kernels count them in 32 bits"
    return None


def grouped_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    *,
    plan: Plan | None = None,
) -> Tensor:
    """The layer, as `ops.api.grouped_mlp` says. `plan` overrides the choice of kernels and tiles."""
    if x_TD.shape[0] == 0:
        return nothing(x_TD, weights_TK, gate_up_E2FD, down_EDF)
    inputs = (x_TD.contiguous(), experts_TK.contiguous(), weights_TK.contiguous(), gate_up_E2FD, down_EDF)
    training = _learns(*inputs)
    plan = plan or _plan(*inputs, training=training)
    if training:
        return _GroupedMLP.apply(*inputs, plan)
    return _forward(*inputs, plan, save=False)[0]


def _learns(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _plan(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    *,
    training: bool,
) -> Plan:
    tma = x_TD.is_cuda and has_tma(x_TD.device) and fits_tma(x_TD, gate_up_E2FD, down_EDF)
    (E, D, F), M = down_EDF.shape, experts_TK.numel()
    if tma and not training:
        return find_plan(x_TD.device.index, M, E, D, F, x_TD.dtype)
    return choose_plan(M, E, D, x_TD.dtype, tma=tma, training=training)


def mixture_refusal(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    gate_GD: Tensor,
    up_GD: Tensor,
    down_DG: Tensor,
) -> str | None:
    """Why the kernels do not take this call; None if they do."""
    if any(weight.dtype != x_TD.dtype for weight in (gate_GD, up_GD, down_DG)):
        return f"x is {x_TD.dtype} but the shared experts are {gate_GD.dtype}; cast one side"
    if not all(weight.is_contiguous() for weight in (gate_GD, up_GD, down_DG)):
        return "the shared experts' matrices are not contiguous; the kernels do not copy weights"
    return grouped_mlp_refusal(x_TD, experts_TK, weights_TK, gate_up_E2FD, down_EDF)


def open_mixture(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    gate_GD: Tensor,
    up_GD: Tensor,
    down_DG: Tensor,
    *,
    invariant: bool = False,
    plan: Plan | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `close` takes, or where a gradient is asked for the sum of it: routed and shared experts, as
    `ops.api.open_mixture` says, together where the rows are few."""
    shared = (gate_GD, up_GD, down_DG)
    inputs = (x_TD.contiguous(), experts_TK.contiguous(), weights_TK.contiguous(), gate_up_E2FD, down_EDF)
    serves = x_TD.shape[0] > 0 and not _learns(*inputs, *shared)
    x_TD, experts_TK, weights_TK, *stacks = inputs
    if serves:
        ways = (plan,) if plan is not None else wider(_plan(*inputs, training=False))
        plan, sizes = ways[0], (x_TD.shape[0], down_EDF.shape[2], shared)
        riding = None if invariant else next((way for way in ways if _rides(way, *sizes)), None)
        if riding is not None:
            y_MD, dense_STD, *_ = _rows(x_TD, experts_TK, *stacks, riding, save=False, shared=shared)
            assert dense_STD is not None
            return y_MD, experts_TK, weights_TK, dense_STD
    gate_TG, up_TG = linears(x_TD, (gate_GD, up_GD), (None, None), invariant=invariant)
    (dense_TD,) = linears(swiglu(gate_TG, up_TG), (down_DG,), (None,), invariant=invariant)
    if serves and plan is not None:
        y_MD = _rows(x_TD, experts_TK, *stacks, plan, save=False)[0]
        return y_MD, experts_TK, weights_TK, dense_TD.unsqueeze(0)
    return grouped_mlp(*inputs, plan=plan) + dense_TD


def mixture(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    *matrices: Tensor,
    invariant: bool = False,
    plan: Plan | None = None,
) -> Tensor:
    """Routed and shared experts, as `ops.api.mixture` says."""
    made = open_mixture(x_TD, experts_TK, weights_TK, *matrices, invariant=invariant, plan=plan)
    return made if isinstance(made, Tensor) else close(*made)


def fixed_mixture(
    x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, *matrices: Tensor, plan: Plan | None = None
) -> Tensor:
    """The same in batch-invariant form, with the gradient of the plain one."""

    def plain(x_TD: Tensor, weights_TK: Tensor, *matrices: Tensor) -> Tensor:
        return mixture(x_TD, experts_TK, weights_TK, *matrices, plan=plan)

    def fixed(x_TD: Tensor, weights_TK: Tensor, *matrices: Tensor) -> Tensor:
        return mixture(x_TD, experts_TK, weights_TK, *matrices, invariant=True, plan=plan)

    return with_gradient_of(plain, fixed, x_TD, weights_TK, *matrices)


def _rides(plan: Plan, tokens: int, inner: int, shared: Shared) -> bool:
    """Whether the shared experts go in the launches of the routed ones: while few tiles hold all tokens,
    since each of these reads the shared matrices again."""
    if plan.kind == "tiles" or tokens > MAX_RIDING * plan.rows:
        return False
    fits = shared[0].shape[0] % inner == 0 and inner % plan.down.bk == 0
    return fits and (not plan.tma or fits_tma(*shared))


def nothing(x_TD: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor) -> Tensor:
    """No tokens: nothing to launch, but every input still has a gradient of zeros."""
    return x_TD + 0 * (weights_TK.sum() + gate_up_E2FD[:0].sum() + down_EDF[:0].sum()).to(x_TD.dtype)
