"""RMSNorm, alone or with the residual add before it: one launch forward, one and a sum backward.

    s = x + y,  r = 1 / sqrt(mean(s^2) + eps),  n = cast(s r) w
    ds = ds' + r (w dn) - s r^3 mean(w dn s),  dw = sum over rows of dn cast(s r)

Layout: a program holds ROWS whole rows in registers, padded to BLOCK columns, so each is read once and
written once; how many, and how many warps, depends on D alone, hence a row's sum runs in one order whatever
the batch. Rows may lie apart (a latent is a slice of a wider product). Backward computes r again, which saves
keeping it, and each program walks its share of the rows with a private dw; the shares are added in their
order.

Bound: bytes. Alone forward moves 2 D elements a row; fused 4 D, where the two apart move 5 D; backward 3 D
and 4 D. On an H200 (2026-11-24) at 16k rows forward reaches 82 to 90% of 4.555 TB/s, forward with backward
63%, as torch.compile's; up to 256 rows it is the launch, 5 us in a graph.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoal.ops.triton.expert_plan import num_multiprocessors
from shoal.ops.triton.launch import bring_near, programmatic, wait_for_previous
from shoal.ops.triton.permutation import sum_row

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_DIM = 16384  # a row of 32 warps with 16 elements to a thread; twice as many spill


@triton.jit
def normalise(wide, eps, D: tl.constexpr, dtype: tl.constexpr):
    """Rows of float32, and what they are multiplied by: cast(s r) in float32, and r (ROWS, 1)."""
    inverse = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 1, keep_dims=True) / D + eps)
    return (wide * inverse).to(dtype).to(tl.float32), inverse


@triton.jit(do_not_specialize=["N", "eps"])
def _norm_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    N,
    x_stride,
    y_stride,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
    PDL: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < N) & (column < D)
    if tl.program_id(0) == 0:  # no further: FSDP2 writes it right before (`launch`)
        bring_near(weight_ptr + tl.arange(0, 1)[:, None], D, BLOCK, PDL)
    wait_for_previous(PDL)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(y_ptr + row * y_stride + column, mask=inside, other=0.0).to(tl.float32)
        x = x.to(dtype).to(tl.float32)
        tl.store(sum_ptr + row * D + column, x.to(dtype), mask=inside)
    normal, _ = normalise(x, eps, D, dtype)
    tl.store(out_ptr + row * D + column, (normal * weight).to(dtype), mask=inside)


@triton.jit(do_not_specialize=["N", "eps"])
def _sum_norm_kernel(
    x_ptr,
    rows_ptr,
    experts_ptr,
    weights_ptr,
    dense_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    N,
    x_stride,
    eps,
    K: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """`_norm_kernel`, whose y is first added up of what a mixture left: in its layout, so the same bits."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < N) & (column < D)
    if tl.program_id(0) == 0:  # no further: FSDP2 writes it right before (`launch`)
        bring_near(weight_ptr + tl.arange(0, 1)[:, None], D, BLOCK, PDL)
    wait_for_previous(PDL)
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    y = sum_row(rows_ptr, experts_ptr, weights_ptr, dense_ptr, row, N, column, inside, dtype, K, D, True, S)
    x = (x + y.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    tl.store(sum_ptr + row * D + column, x.to(dtype), mask=inside)
    normal, _ = normalise(x, eps, D, dtype)
    tl.store(out_ptr + row * D + column, (normal * weight).to(dtype), mask=inside)


@triton.jit(do_not_specialize=["N", "eps", "share"])
def _norm_backward_kernel(
    dnormal_ptr,
    dsum_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    dweight_ptr,
    N,
    share,
    x_stride,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_DSUM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program p walks rows p * share to (p + 1) * share and writes its own dw."""
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    last = tl.minimum((tl.program_id(0) + 1) * share, N)
    for first in tl.range(tl.program_id(0) * share, last, ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS).to(tl.int64)[:, None]
        inside = (row < N) & (column < D)
        x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        dnormal = tl.load(dnormal_ptr + row * D + column, mask=inside, other=0.0).to(tl.float32)
        normal, inverse = normalise(x, eps, D, dtype)
        dweight += tl.sum(dnormal * normal, 0)
        dnormal *= weight
        along = tl.sum(dnormal * x, 1, keep_dims=True) / D * inverse * inverse
        dx = (dnormal - x * along) * inverse
        if HAS_DSUM:
            dx += tl.load(dsum_ptr + row * D + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * D + column, dx.to(dtype), mask=inside)
    at = tl.program_id(0).to(tl.int64) * D + tl.arange(0, BLOCK)
    tl.store(dweight_ptr + at, dweight, mask=tl.arange(0, BLOCK) < D)


def _shape(dim: int) -> dict[str, int]:
    """Of a program: 512 to 1024 elements to a warp, up to 16 warps."""
    block = triton.next_power_of_2(dim)
    rows = max(1, 1024 // block)
    warps = 32 if block > 8192 else max(1, min(16, rows * block // 512))
    return {"D": dim, "BLOCK": block, "ROWS": rows, "num_warps": warps}


def rows_of(x: Tensor) -> Tensor:
    """(N, D), a view if the rows lie evenly, elements of a row side by side."""
    x_ND = x.reshape(-1, x.shape[-1])
    return x_ND if x_ND.stride(1) == 1 else x_ND.contiguous()


def _forward(x: Tensor, y: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor | None, Tensor]:
    x_ND, y_ND = rows_of(x), None if y is None else rows_of(y)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if y is None else torch.empty_like(out)
    shape, N, pdl = _shape(x.shape[-1]), x_ND.shape[0], programmatic(x.device)
    if N:
        _norm_kernel[(triton.cdiv(N, shape["ROWS"]),)](
            x_ND,
            y_ND,
            weight_D,
            total,
            out,
            N,
            x_ND.stride(0),
            0 if y_ND is None else y_ND.stride(0),
            eps,
            ADD=y is not None,
            PDL=pdl,
            launch_pdl=pdl,
            **shape,
        )
    return total, out


def _backward(
    dnormal: Tensor, dsum: Tensor | None, x: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x_ND = rows_of(x)
    N, D = x_ND.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shape = _shape(D)
    programs = min(triton.cdiv(N, shape["ROWS"]), 2 * num_multiprocessors(x.device.index))
    dweight_PD = torch.empty(programs, D, dtype=torch.float32, device=x.device)
    if N:
        share = triton.cdiv(triton.cdiv(N, programs), shape["ROWS"]) * shape["ROWS"]
        _norm_backward_kernel[(programs,)](
            dnormal.contiguous(),
            None if dsum is None else dsum.contiguous(),
            x_ND,
            weight_D,
            dx,
            dweight_PD,
            N,
            share,
            x_ND.stride(0),
            eps,
            HAS_DSUM=dsum is not None,
            STAGES=3
            if shape["ROWS"] * shape["BLOCK"] * x.element_size() <= 32768
            else 1,  # three rows, twice
            **shape,
        )
    return dx, dweight_PD.sum(0).to(weight_D.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight_D)
        ctx.eps = eps
        return _forward(x, None, weight_D, eps)[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnormal: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(dnormal, None, *ctx.saved_tensors, ctx.eps), None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, out = _forward(x, y, weight_D, eps)
        assert total is not None
        ctx.save_for_backward(total, weight_D)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsum: Tensor | None, dnormal: Tensor | None) -> tuple[Tensor | None, ...]:
        if dnormal is None:
            return dsum, dsum, None, None
        dx, dweight_D = _backward(dnormal, dsum, *ctx.saved_tensors, ctx.eps)
        return dx, dx, dweight_D, None


def rms_norm_refusal(x: Tensor, weight_D: Tensor, eps: float) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}; the kernel takes bfloat16, float16 and float32"
    if weight_D.dtype != x.dtype:
        return f"x is {x.dtype} but the weight is {weight_D.dtype}; cast one side"
    if x.shape[-1] > MAX_DIM:
        return f"rows of {x.shape[-1]}; a program holds a row of at most {MAX_DIM}"
    return None


def add_rms_norm_refusal(x: Tensor, y: Tensor, weight_D: Tensor, eps: float) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return f"x is {tuple(x.shape)} {x.dtype} but y is {tuple(y.shape)} {y.dtype}; the kernel adds equals"
    return rms_norm_refusal(x, weight_D, eps)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The normalised rows, as `ops.api.rms_norm` says."""
    if torch.is_grad_enabled() and (x.requires_grad or weight_D.requires_grad):
        return _RMSNorm.apply(x, weight_D, eps)
    return _forward(x, None, weight_D, eps)[1]


def add_rms_norm(x: Tensor, y: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum and its normalised rows, as `ops.api.add_rms_norm` says."""
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad or weight_D.requires_grad):
        return _AddRMSNorm.apply(x, y, weight_D, eps)
    total, out = _forward(x, y, weight_D, eps)
    assert total is not None
    return total, out


def add_sum_rms_norm_refusal(
    x_TD: Tensor,
    rows_MD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    dense_STD: Tensor,
    weight_D: Tensor,
    eps: float,
) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    if x_TD.dtype != rows_MD.dtype:
        return f"x is {x_TD.dtype} but the rows are {rows_MD.dtype}; the kernel adds equals"
    return rms_norm_refusal(x_TD, weight_D, eps)


@torch.no_grad()
def add_sum_rms_norm(
    x_TD: Tensor,
    rows_MD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    dense_STD: Tensor,
    weight_D: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The sum and its normalised rows, as `ops.api.add_sum_rms_norm` says."""
    x_TD, shape, pdl = rows_of(x_TD), _shape(x_TD.shape[1]), programmatic(x_TD.device)
    total_TD, out_TD = (torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device) for _ in range(2))
    if (T := len(x_TD)) > 0:
        _sum_norm_kernel[(triton.cdiv(T, shape["ROWS"]),)](
            x_TD,
            rows_MD,
            experts_TK,
            weights_TK,
            dense_STD,
            weight_D,
            total_TD,
            out_TD,
            T,
            x_TD.stride(0),
            eps,
            K=experts_TK.shape[1],
            S=dense_STD.shape[0],
            PDL=pdl,
            launch_pdl=pdl,
            **shape,
        )
    return total_TD, out_TD
