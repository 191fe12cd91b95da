"""Products with quantised weights on a GPU, for serving: which kernels run at which number of rows.

    few rows       narrow_streams           FP8 and INT4, activations as they are: bound by the narrow bytes
    many, FP8      fp8_products             activations quantised too: bound by the FP8 matrix rate
    many, INT4     widened, then bfloat16   a layer's weights at a time: bound by the bfloat16 matrix rate

In batch-invariant mode the first serves every number. Plans depend on sizes alone. Tiles were chosen on an
H200 for V2-Lite; `benchmarks/kernels quantised` prints what they reach.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from shoal.ops.triton import experts, fp8, fp8_linear
from shoal.ops.triton.expert_plan import MAX_SCAN
from shoal.ops.triton.launch import programmatic
from shoal.ops.triton.narrow_streams import (
    narrow_linears_kernel,
    narrow_product_kernel,
    narrow_swiglu_kernel,
)
from shoal.ops.triton.permutation import Groups, group_by_expert, sum_choices
from shoal.ops.triton.quantise import lacks_e4m3

BLOCK = 128
FEW_A_EXPERT = 48  # rows an expert, on average, up to which weights stream
FEW_ROWS = 64  # of one matrix
MAX_WEIGHTS = 3  # of a launch


@dataclass(frozen=True)
class Stream:
    """Programs of few rows: `bm` rows of x, `bn` of the weight, `groups` of 128 columns a step.

    `groups` and `warps` say in which order a row is summed: they may depend on the weight's shape alone.
    """

    bm: int
    bn: int
    groups: int = 4
    warps: int = 4
    stages: int = 3
    early: bool = True  # of linears: ask for the weight while the kernel before still runs


def choose_stream(rows: int) -> Stream:
    """Of experts, for `rows` rows of one, on average."""
    return Stream(16, 32) if rows <= 12 else Stream(32, 16)


def choose_tiles(rows: int, columns: int) -> Stream:
    """Of linears: for `rows` rows, and `columns` of all the weights together."""
    return Stream(16 if rows <= 16 else 32, 32)


def _asm(x: Tensor) -> bool:
    # The interpreter knows no assembly, and this is for bfloat16.
    cuda = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] >= 9
    return cuda and x.dtype == torch.bfloat16


def _words(values: Tensor) -> Tensor:
    """As the kernels read them: e4m3 in bytes, INT4 in words of four."""
    return values.view(torch.int16 if values.dtype == torch.uint8 else torch.uint8)


def narrow_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up_values: Tensor,
    gate_up_scales: Tensor,
    down_values: Tensor,
    down_scales: Tensor,
    stream: Stream,
) -> Tensor:
    K, M = experts_TK.shape[1], experts_TK.numel()
    D, (E, _, width) = x_TD.shape[1], gate_up_values.shape[:3]
    scan, groups, pdl = M <= MAX_SCAN, None, programmatic(x_TD.device)
    tiles, height = M, M
    where: tuple[Tensor | None, ...] = (None, None, None)
    if not scan:
        groups = group_by_expert(experts_TK, E, stream.bm, pdl=pdl)
        tiles, height, where = groups.max_tiles, groups.choices_P.shape[0], _places(groups)
    shared = {
        "E": E,
        "BM": stream.bm,
        "BN": stream.bn,
        "GROUPS": stream.groups,
        "SCAN": MAX_SCAN if scan else 0,
        "INT4": gate_up_values.dtype == torch.uint8,
        "ASM": _asm(x_TD),
        "PDL": pdl,
        "num_warps": stream.warps,
        "num_stages": stream.stages,
    }
    h = x_TD.new_empty(height, width)
    narrow_swiglu_kernel[(triton.cdiv(width, stream.bn), tiles)](
        x_TD,
        _words(gate_up_values),
        gate_up_scales,
        h,
        experts_TK,
        *where,
        M,
        K=K,
        D=D,
        F=width,
        launch_pdl=pdl and not scan,
        **shared,
    )
    y_MD = x_TD.new_empty(M, D)
    narrow_product_kernel[(triton.cdiv(D, stream.bn), tiles)](
        h,
        _words(down_values),
        down_scales,
        y_MD,
        experts_TK,
        *where,
        M,
        C=width,
        N=D,
        launch_pdl=pdl,
        **shared,
    )
    return sum_choices(y_MD, experts_TK, weights_TK, pdl=pdl)


def _places(groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
    return groups.choices_P, groups.experts_N, groups.first_tile_E1


def narrow_linears(
    x_MC: Tensor, values: tuple[Tensor, ...], scales: tuple[Tensor, ...], stream: Stream
) -> tuple[Tensor, ...]:
    """x w^T of each, up to MAX_WEIGHTS, in one launch."""
    (M, C), sizes = x_MC.shape, [each.shape[0] for each in values]
    outs = tuple(x_MC.new_empty(M, size) for size in sizes)
    words, spare, pdl = tuple(map(_words, values)), MAX_WEIGHTS - len(values), programmatic(x_MC.device)
    n0, n1, n2 = *sizes, *(0,) * spare
    narrow_linears_kernel[sum(triton.cdiv(size, stream.bn) for size in sizes), triton.cdiv(M, stream.bm)](
        x_MC,
        *words,
        *words[:1] * spare,
        *scales,
        *scales[:1] * spare,
        *outs,
        *outs[:1] * spare,
        M,
        N0=n0,
        N1=n1,
        N2=n2,
        C=C,
        BM=stream.bm,
        BN=stream.bn,
        GROUPS=stream.groups,
        INT4=values[0].dtype == torch.uint8,
        ASM=_asm(x_MC),
        PDL=pdl,
        EARLY=pdl and stream.early,
        launch_pdl=pdl,
        num_warps=stream.warps,
        num_stages=stream.stages,
    )
    return outs


@triton.jit
def _widen_kernel(
    values_ptr, scales_ptr, out_ptr, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, INT4: tl.constexpr
):
    """Group program 0 of columns, rows program 1, matrix program 2: out (., N, K)."""
    blocks: tl.constexpr = (K + 127) // 128
    k, matrix = tl.program_id(0), tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = (row < N)[:, None]
    out = out_ptr + matrix * N * K + row.to(tl.int64)[:, None] * K
    if INT4:
        at = (matrix * N + row)[:, None] * (blocks * 32) + (k * 32 + tl.arange(0, 32))[None, :]
        packed = tl.load(values_ptr + at, mask=inside, other=0)
        scale = tl.load(scales_ptr + (matrix * blocks + k) * N + row, mask=row < N, other=0.0).to(tl.float32)
        for part in tl.static_range(4):
            value = (((packed >> 4 * part) & 15).to(tl.float32) - 8.0) * scale[:, None]
            c = k * 128 + part * 32 + tl.arange(0, 32)
            tl.store(out + c[None, :], value.to(out_ptr.dtype.element_ty), mask=inside & (c < K)[None, :])
    else:
        n_blocks: tl.constexpr = (N + 127) // 128
        c = k * 128 + tl.arange(0, 128)
        inside = inside & (c < K)[None, :]
        at = (matrix * N + row)[:, None] * K + c[None, :]
        value = tl.load(values_ptr + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scales_ptr + (matrix * n_blocks + tl.program_id(1) * BN // 128) * blocks + k)
        tl.store(out + c[None, :], (value * scale).to(out_ptr.dtype.element_ty), mask=inside)


def widen(values: Tensor, scales: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """What the weight stands for, in `dtype`."""
    int4 = values.dtype == torch.uint8
    *stack, N, _ = values.shape
    out = torch.empty(*stack, N, columns, dtype=dtype, device=values.device)
    if out.numel():
        grid = (triton.cdiv(columns, BLOCK), triton.cdiv(N, 64), out.numel() // (N * columns))
        words = values.view(torch.int16) if int4 else values
        _widen_kernel[grid](words, scales, out, N=N, K=columns, BN=64, INT4=int4)
    return out


def dequantise(values: Tensor, scales: Tensor, columns: int) -> Tensor:
    return widen(values, scales, columns, torch.float32)


def quantised_linears(
    x: Tensor, values: tuple[Tensor, ...], scales: tuple[Tensor, ...], *, invariant: bool = False
) -> tuple[Tensor, ...]:
    """x w^T of each, as `ops.quantised.quantised_linears` says."""
    x_MK = x.reshape(-1, x.shape[-1]).contiguous()
    M, int4 = x_MK.shape[0], values[0].dtype == torch.uint8
    if M == 0:
        return tuple(x.new_empty(*x.shape[:-1], each.shape[0]) for each in values)
    if M <= FEW_ROWS or invariant:
        stream = choose_tiles(M, sum(each.shape[0] for each in values))
        ys = narrow_linears(x_MK, values, scales, stream)
    elif int4:
        ys = tuple(F.linear(x_MK, widen(*w, x.shape[-1], x.dtype)) for w in zip(values, scales, strict=True))
    else:
        ys = tuple(fp8_linear.product_of_rows(x_MK, *w, x.dtype) for w in zip(values, scales, strict=True))
    return tuple(y.view(*x.shape[:-1], -1) for y in ys)


def quantised_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up_values: Tensor,
    gate_up_scales: Tensor,
    down_values: Tensor,
    down_scales: Tensor,
    *,
    invariant: bool = False,
) -> Tensor:
    M, E = experts_TK.numel(), down_values.shape[0]
    if M == 0:
        return torch.zeros_like(x_TD)
    rows = (x_TD.contiguous(), experts_TK.contiguous(), weights_TK.contiguous())
    narrow = (gate_up_values, gate_up_scales, down_values, down_scales)
    if invariant or max(MAX_SCAN, FEW_A_EXPERT * E) >= M:
        stream = choose_stream(1 if M <= MAX_SCAN else triton.cdiv(M, E))
        return narrow_mlp(*rows, *narrow, stream)
    if gate_up_values.dtype == torch.uint8:
        gate_up = widen(gate_up_values, gate_up_scales, x_TD.shape[1], x_TD.dtype).flatten(1, 2)
        down = widen(down_values, down_scales, gate_up_values.shape[2], x_TD.dtype)
        return experts.grouped_mlp(*rows, gate_up, down)
    return fp8.layer(*rows, *narrow)[0]


def quantised_refusal(x: Tensor, *weights: Tensor) -> str | None:
    """Why the kernels do not take this call; None if they do."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"x is {x.dtype}; the kernels take bfloat16 and float16"
    values = [t for t in weights if t.dtype in (torch.uint8, torch.float8_e4m3fn)]
    if not all(v.is_contiguous() for v in values):
        return "the quantised weights are not contiguous; the kernels do not copy weights"
    return lacks_e4m3(x)


def linears_refusal(x: Tensor, values: tuple[Tensor, ...], scales: tuple[Tensor, ...]) -> str | None:
    """The same of linears."""
    if len(values) > MAX_WEIGHTS:
        return f"{len(values)} weights; a launch takes at most {MAX_WEIGHTS}"
    return quantised_refusal(x, *values)
