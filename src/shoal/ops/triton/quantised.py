"""Products with quantised weights on a GPU, for serving: which kernels run at which number of rows.

    few rows       narrow_streams, _linears FP8 and INT4, activations as they are: bound by the narrow bytes
    many, FP8      fp8_products             activations quantised too: bound by the FP8 matrix rate
    many, INT4     widened, then bfloat16   a layer's weights at a time: bound by the bfloat16 matrix rate

In batch-invariant mode the first serves every number. Plans depend on sizes alone. Tiles were chosen on an
H200 for V2-Lite; `benchmarks/kernels quantised` prints what they reach.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from shoal.ops.triton import experts, fp8, fp8_linear
from shoal.ops.triton.expert_plan import MAX_SCAN
from shoal.ops.triton.narrow_linears import MAX_WEIGHTS, choose_lanes, lanes_take, narrow_linears
from shoal.ops.triton.narrow_streams import narrow_product_kernel, narrow_swiglu_kernel
from shoal.ops.triton.permutation import Groups, group_by_expert, sum_choices
from shoal.ops.triton.quantise import lacks_e4m3

BLOCK = 128
FEW_A_EXPERT = 48  # rows an expert, on average, up to which weights stream
FEW_ROWS = 64  # of one matrix
FEW_FOR_8 = 4  # rows an expert, on average


@dataclass(frozen=True)
class Stream:
    """Programs of few rows: `bm` rows of x, `bn` of the weight."""

    bm: int
    bn: int
    stages: int
    warps: int = 4


@dataclass(frozen=True)
class Way:
    """Where the kernels run: by TMA, with instructions of NVIDIA's own, each launch set up early."""

    tma: bool
    asm: bool
    pdl: bool


def choose_stream(rows: int, *, exact: bool = False) -> Stream:
    """For `rows` rows of one weight; if not `exact`, on average."""
    for most, bm in ((12, 16), (32 if exact else 28, 32)):
        if rows <= most:
            return Stream(bm, 64, 4)
    return Stream(64, 64, 3)


def _way(x: Tensor, *values: Tensor) -> Way:
    # TMA wants 16-byte rows and bases; the interpreter knows no assembly.
    cuda = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] in (9, 10)
    fits = all(v.shape[-1] % 16 == 0 and v.data_ptr() % 16 == 0 for v in values)
    return Way(cuda and fits, cuda and x.dtype == torch.bfloat16, cuda)


def _describe(values: Tensor, bn: int, tma: bool) -> Tensor | TensorDescriptor:
    """(matrices, rows, columns), 16 bits at a time, in tiles of bn rows and one block of columns."""
    words = values.view(torch.int16)
    width = BLOCK // 4 if values.dtype == torch.uint8 else BLOCK // 2
    return TensorDescriptor.from_tensor(words, [1, bn, width]) if tma else words


def narrow_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up_values: Tensor,
    gate_up_scales: Tensor,
    down_values: Tensor,
    down_scales: Tensor,
    beside_TD: Tensor | None,
    stream: Stream,
    way: Way,
) -> Tensor:
    K, M = experts_TK.shape[1], experts_TK.numel()
    D, (E, _, width) = x_TD.shape[1], gate_up_values.shape[:3]
    scan, groups = M <= MAX_SCAN, None
    tiles, height = M, M
    where: tuple[Tensor | None, ...] = (None, None, None)
    if not scan:
        groups = group_by_expert(experts_TK, E, stream.bm, pdl=way.pdl)
        tiles, height, where = groups.max_tiles, groups.choices_P.shape[0], _places(groups)
    shared = {
        "E": E,
        "BM": stream.bm,
        "BN": stream.bn,
        "SCAN": MAX_SCAN if scan else 0,
        "INT4": gate_up_values.dtype == torch.uint8,
        "ASM": way.asm,
        "TMA": way.tma,
        "PDL": way.pdl,
        "num_warps": stream.warps,
        "num_stages": stream.stages,
    }
    h = x_TD.new_empty(height, width)
    narrow_swiglu_kernel[(triton.cdiv(width, stream.bn), tiles)](
        x_TD,
        _describe(gate_up_values.flatten(0, 1), stream.bn, way.tma),
        gate_up_scales,
        h,
        experts_TK,
        *where,
        M,
        K=K,
        D=D,
        F=width,
        launch_pdl=way.pdl and not scan,
        **shared,
    )
    y_MD = x_TD.new_empty(M, D)
    narrow_product_kernel[(triton.cdiv(D, stream.bn), tiles)](
        h,
        _describe(down_values, stream.bn, way.tma),
        down_scales,
        y_MD,
        experts_TK,
        *where,
        M,
        C=width,
        N=D,
        GROUPED=True,
        launch_pdl=way.pdl,
        **shared,
    )
    shared_STD = None if beside_TD is None else beside_TD.contiguous().unsqueeze(0)
    return sum_choices(y_MD, experts_TK, weights_TK, shared_STD=shared_STD, pdl=way.pdl)


def _places(groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
    return groups.choices_P, groups.experts_N, groups.first_tile_E1


def narrow_linear(x_MK: Tensor, values: Tensor, scales: Tensor, stream: Stream, way: Way) -> Tensor:
    M, C = x_MK.shape
    N = values.shape[0]
    out_MN = x_MK.new_empty(M, N)
    narrow_product_kernel[(triton.cdiv(N, stream.bn), triton.cdiv(M, stream.bm))](
        x_MK,
        _describe(values.unsqueeze(0), stream.bn, way.tma),
        scales,
        out_MN,
        None,
        None,
        None,
        None,
        M,
        E=1,
        C=C,
        N=N,
        BM=stream.bm,
        BN=stream.bn,
        GROUPED=False,
        SCAN=0,
        INT4=values.dtype == torch.uint8,
        ASM=way.asm,
        TMA=way.tma,
        PDL=False,
        num_warps=stream.warps,
        num_stages=stream.stages,
    )
    return out_MN


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
    (M, K), int4 = x_MK.shape, values[0].dtype == torch.uint8
    if M == 0:
        return tuple(x.new_empty(*x.shape[:-1], each.shape[0]) for each in values)
    if M <= FEW_ROWS or invariant:
        ys = _few_rows(x_MK, values, scales)
    elif int4:
        ys = tuple(F.linear(x_MK, widen(*w, K, x.dtype)) for w in zip(values, scales, strict=True))
    else:
        ys = tuple(fp8_linear.product_of_rows(x_MK, *w, x.dtype) for w in zip(values, scales, strict=True))
    return tuple(y.view(*x.shape[:-1], -1) for y in ys)


def _few_rows(x_MK: Tensor, values: tuple[Tensor, ...], scales: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    M, K = x_MK.shape
    if lanes_take(x_MK, values):
        columns = sum(each.shape[0] for each in values)
        lanes = choose_lanes(M, columns, K, int4=values[0].dtype == torch.uint8)
        if lanes is not None:
            return narrow_linears(x_MK, values, scales, lanes)
    stream = choose_stream(M, exact=True)
    if stream.bm == 16:  # one matrix has few tiles: twice as many programs
        stream = replace(stream, bn=32)
    way = _way(x_MK, *values)
    return tuple(narrow_linear(x_MK, *w, stream, way) for w in zip(values, scales, strict=True))


def quantised_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up_values: Tensor,
    gate_up_scales: Tensor,
    down_values: Tensor,
    down_scales: Tensor,
    beside_TD: Tensor | None = None,
    *,
    invariant: bool = False,
) -> Tensor:
    M, E = experts_TK.numel(), down_values.shape[0]
    if M == 0:
        return torch.zeros_like(x_TD)
    rows = (x_TD.contiguous(), experts_TK.contiguous(), weights_TK.contiguous())
    narrow = (gate_up_values, gate_up_scales, down_values, down_scales)
    if invariant or max(MAX_SCAN, FEW_A_EXPERT * E) >= M:
        average = 1 if M <= MAX_SCAN else triton.cdiv(M, E)
        stream = choose_stream(average)
        if MAX_SCAN < M and average <= FEW_FOR_8 and not invariant:  # summed by another instruction
            stream = replace(stream, bm=8)
        return narrow_mlp(*rows, *narrow, beside_TD, stream, _way(x_TD, gate_up_values, down_values))
    if gate_up_values.dtype == torch.uint8:
        gate_up = widen(gate_up_values, gate_up_scales, x_TD.shape[1], x_TD.dtype).flatten(1, 2)
        down = widen(down_values, down_scales, gate_up_values.shape[2], x_TD.dtype)
        y_TD = experts.grouped_mlp(*rows, gate_up, down)
    else:
        y_TD = fp8.layer(*rows, *narrow)[0]
    return y_TD if beside_TD is None else y_TD + beside_TD


def quantised_refusal(x: Tensor, *arguments: Tensor | None) -> str | None:
    """Why the kernels do not take this call; None if they do."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"x is {x.dtype}; the kernels take bfloat16 and float16"
    values = [t for t in arguments if t is not None and t.dtype in (torch.uint8, torch.float8_e4m3fn)]
    if not all(v.is_contiguous() for v in values):
        return "the quantised weights are not contiguous; the kernels do not copy weights"
    if odd := [v.shape[-1] for v in values if v.shape[-1] % 2]:
        return f"a quantised weight has {odd[0]} columns; the kernels read two at a time"
    return lacks_e4m3(x)


def linears_refusal(x: Tensor, values: tuple[Tensor, ...], scales: tuple[Tensor, ...]) -> str | None:
    """The same of linears."""
    if len(values) > MAX_WEIGHTS:
        return f"{len(values)} weights; a launch takes at most {MAX_WEIGHTS}"
    return quantised_refusal(x, *values)
