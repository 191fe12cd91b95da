"""Products of a few rows with one or several weights, one launch: what decoding does between its other ops.

    y_i = x W_i^T + b_i     for each i

With few rows every byte of the weights is read once, and what is left to lose is launches: a product of 8 MB
takes 2 us of the memory bus, and a second kernel that adds the pieces of the first costs as much again. So
weights that read the same rows share a launch, no sum is split, and a program is small enough that even 2048
columns make one for each multiprocessor. The rows are the narrow side, padded to BT.

Bound: bytes of the weights; on an H200 (2026-11-24) 3072 and 576 columns of 2048 take 5.8 us at 1 and 8 rows
and 7.5 at 64, of which the bytes are 3.3; cuBLAS takes 12.4. Sums run over D in one order, in steps of BK, so
a row's result depends on how many rows there are by the instruction alone (16, 32 or 64 rows high);
batch-invariant mode takes 16 always, also where a gradient is asked for, and then differentiates cuBLAS's
product (`fixed_linears`). Many rows are cuBLAS's, up to MAX_AS_ONE in one product where weights lie side by
side: 3072 and 576 columns 7.4 us at 128 rows and 9.7 at 256 (12.6 and 13.6; 85 and 87 at 4,096).

One row needs no tensor core. What it needs is its weights, and these nobody writes: they are asked for before
the wait for the kernel before (`launch`), while that one leaves the bus idle. A warp has whole columns of the
result, the row's elements are read by the threads that hold what they meet, and only the end is a sum over
lanes. Programs are so small that all of them are there at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoal.ops.invariance import with_gradient_of
from shoal.ops.triton.launch import bring_near, programmatic, wait_for_previous
from shoal.ops.triton.norms import DTYPES

MAX_ROWS, MAX_WEIGHTS = 64, 3
MAX_AS_ONE = 512  # rows for which a product with weights side by side is quicker than one with each
MIN_STEP = 64  # of the sum
PIECE = 256  # of a row, which a warp reads at once
ROW_COLUMNS, EARLY = 4, 8  # of a program for one row: columns, a warp each, and pieces read before the wait


@triton.jit
def _tile(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    block,
    T,
    x_stride,
    N: tl.constexpr,
    D: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    column = block * BN + tl.arange(0, BN)
    inside = column < N
    rows = weight_ptr + column.to(tl.int64)[:, None] * D
    if tl.program_id(1) == 0:
        bring_near(tl.where(inside[:, None], rows, weight_ptr), D, BK, PDL)
    wait_for_previous(PDL)
    token = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    kept = token < T
    total = tl.zeros((BT, BN), tl.float32)
    for k in range(0, D, BK):
        at = k + tl.arange(0, BK)
        if D % BK:
            x = tl.load(
                x_ptr + token[:, None] * x_stride + at[None, :],
                mask=kept[:, None] & (at < D)[None, :],
                other=0.0,
            )
            w = tl.load(rows + at[None, :], mask=inside[:, None] & (at < D)[None, :], other=0.0)
        else:
            x = tl.load(x_ptr + token[:, None] * x_stride + at[None, :], mask=kept[:, None], other=0.0)
            w = tl.load(rows + at[None, :], mask=inside[:, None], other=0.0)
        total = tl.dot(x, w.T, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out_ptr + token[:, None] * N + column[None, :],
        total.to(out_ptr.dtype.element_ty),
        mask=kept[:, None] & inside[None, :],
    )


@triton.jit(do_not_specialize=["T"])
def _linears_kernel(
    x_ptr,
    w0_ptr,
    w1_ptr,
    w2_ptr,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    y0_ptr,
    y1_ptr,
    y2_ptr,
    T,
    x_stride,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    D: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.program_id(0)
    P0: tl.constexpr = (N0 + BN - 1) // BN
    P1: tl.constexpr = (N1 + BN - 1) // BN
    if block < P0:
        _tile(
            x_ptr, w0_ptr, b0_ptr, y0_ptr, block, T, x_stride,
            N0, D, BT, BN, BK, HAS_BIAS, PDL, PRECISION,
        )  # fmt: skip
    if N1:  # noqa: SIM102
        if (block >= P0) & (block < P0 + P1):
            _tile(
                x_ptr, w1_ptr, b1_ptr, y1_ptr, block - P0, T, x_stride,
                N1, D, BT, BN, BK, HAS_BIAS, PDL, PRECISION,
            )  # fmt: skip
    if N2:  # noqa: SIM102
        if block >= P0 + P1:
            _tile(
                x_ptr, w2_ptr, b2_ptr, y2_ptr, block - P0 - P1, T, x_stride,
                N2, D, BT, BN, BK, HAS_BIAS, PDL, PRECISION,
            )  # fmt: skip


@triton.jit
def _piece_of_row(x_ptr, at, D: tl.constexpr, BN: tl.constexpr, PIECE: tl.constexpr):
    """A row's elements `at` (1, PIECE), BN times: each thread reads what meets its weights."""
    at = tl.broadcast_to(at, (BN, PIECE))
    return tl.load(x_ptr + at, mask=at < D, other=0.0).to(tl.float32)


@triton.jit
def _dot_row(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    block,
    N: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    EARLY: tl.constexpr,
    PIECE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """BN columns for one row. Weights, or the first EARLY of each, are on their way before the wait.

    A warp has whole rows of the weight, so that what its threads have is added up once.
    """
    column, k = block * BN + tl.arange(0, BN), tl.arange(0, PIECE)[None, :]
    inside = (column < N)[:, None]
    rows = weight_ptr + column.to(tl.int64)[:, None] * D
    early = ()
    for piece in tl.static_range(EARLY):
        at = piece * PIECE + k
        w = tl.load(rows + at, mask=inside & (at < D) if D % PIECE else inside, other=0.0)
        early = early + (w,)  # noqa: RUF005 (Triton has no *)
    wait_for_previous(PDL)
    total = tl.zeros((BN, PIECE), tl.float32)
    for piece in tl.static_range(EARLY):
        total += early[piece].to(tl.float32) * _piece_of_row(x_ptr, piece * PIECE + k, D, BN, PIECE)
    for first in range(EARLY * PIECE, D, PIECE):
        at = first + k
        late = tl.load(rows + at, mask=inside & (at < D), other=0.0)
        total += late.to(tl.float32) * _piece_of_row(x_ptr, at, D, BN, PIECE)
    y = tl.sum(total, 1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + column, y.to(out_ptr.dtype.element_ty), mask=column < N)


@triton.jit
def _row_kernel(
    x_ptr,
    w0_ptr,
    w1_ptr,
    w2_ptr,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    y0_ptr,
    y1_ptr,
    y2_ptr,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    D: tl.constexpr,
    BN: tl.constexpr,
    EARLY: tl.constexpr,
    PIECE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    block = tl.program_id(0)
    P0: tl.constexpr = (N0 + BN - 1) // BN
    P1: tl.constexpr = (N1 + BN - 1) // BN
    if block < P0:
        _dot_row(x_ptr, w0_ptr, b0_ptr, y0_ptr, block, N0, D, BN, EARLY, PIECE, HAS_BIAS, PDL)
    if N1:  # noqa: SIM102
        if (block >= P0) & (block < P0 + P1):
            _dot_row(x_ptr, w1_ptr, b1_ptr, y1_ptr, block - P0, N1, D, BN, EARLY, PIECE, HAS_BIAS, PDL)
    if N2:  # noqa: SIM102
        if block >= P0 + P1:
            _dot_row(x_ptr, w2_ptr, b2_ptr, y2_ptr, block - P0 - P1, N2, D, BN, EARLY, PIECE, HAS_BIAS, PDL)


def tiles(rows: int, columns: int, depth: int, *, invariant: bool) -> dict[str, int]:
    """Of a program: as few columns as give each multiprocessor of a large GPU one, 16 at least."""
    bt = 16 if rows <= 16 or invariant else 32 if rows <= 32 else 64
    bn = 16
    while bn < 64 and columns // (2 * bn) >= 100:
        bn *= 2
    step = min(256 if bn <= 32 and bt <= 32 else 128, max(MIN_STEP, triton.next_power_of_2(depth)))
    return {"BT": bt, "BN": bn, "BK": step, "num_warps": 2 if bn == 16 and bt == 16 else 4, "num_stages": 4}


def _learns(x_TD: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]) -> bool:
    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x_TD, *weights, *biases)
    )


class _Joint(torch.autograd.Function):
    """Several products of the same rows, whose gradient is one sum: each product adds to the one before."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_TD, *weights)
        return tuple(F.linear(x_TD, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, *weights = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad
        dx_TD = None
        if needs_x:
            dx_TD = dys[0] @ weights[0]
            for dy, weight in zip(dys[1:], weights[1:], strict=True):
                dx_TD.addmm_(dy, weight)
        pairs = zip(dys, needs, strict=True)
        return dx_TD, *(dy.t() @ x_TD if wanted else None for dy, wanted in pairs)


def _as_one(x_TD: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]) -> Tensor | None:
    """Weights that lie side by side, as one, where that is quicker and no gradient is asked for."""
    if len(weights) < 2 or x_TD.shape[0] > MAX_AS_ONE or any(bias is not None for bias in biases):
        return None
    ends = [weight.data_ptr() + weight.nbytes for weight in weights]
    joint = [weight.data_ptr() for weight in weights[1:]] == ends[:-1]
    storages = {weight.untyped_storage().data_ptr() for weight in weights}
    if not joint or len(storages) > 1 or _learns(x_TD, weights, biases):
        return None
    rows = sum(len(weight) for weight in weights)
    return weights[0].as_strided((rows, x_TD.shape[1]), (x_TD.shape[1], 1))


def linears_refusal(
    x_TD: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]
) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    if x_TD.dtype not in DTYPES:
        return f"x is {x_TD.dtype}; the kernel takes bfloat16, float16 and float32"
    if x_TD.dim() != 2:
        return f"x has {x_TD.dim()} dimensions; the kernel takes rows"
    if len(weights) > MAX_WEIGHTS:
        return f"{len(weights)} weights; a launch takes at most {MAX_WEIGHTS}"
    for weight in weights:
        if weight.dtype != x_TD.dtype:
            return f"x is {x_TD.dtype} but a weight is {weight.dtype}; cast one side"
        if not weight.is_contiguous():
            return "a weight is not contiguous; the kernel does not copy weights"
    if len({bias is None for bias in biases}) > 1:
        return "some weights have a bias and some have none; a launch takes one kind"
    return None


def choose(
    x_TD: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], *, invariant: bool
) -> tuple[str, str]:
    """What serves this call, and why."""
    if invariant:
        return "few rows", "batch-invariant"
    if _learns(x_TD, weights, biases):
        return "cublas", "a gradient is asked for"
    if x_TD.shape[0] > MAX_ROWS:
        return "cublas", f"{x_TD.shape[0]} rows, more than {MAX_ROWS}"
    return "one row" if x_TD.shape[0] == 1 else "few rows", f"{x_TD.shape[0]} rows"


def linears(
    x_TD: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    *,
    invariant: bool = False,
) -> tuple[Tensor, ...]:
    """x W^T + b of each, as `ops.api.linears` says."""
    name, _ = choose(x_TD, weights, biases, invariant=invariant)
    if name == "cublas" and len(weights) > 1 and biases[0] is None and _learns(x_TD, weights, ()):
        return _Joint.apply(x_TD, *weights)
    if name == "cublas":
        if (whole := _as_one(x_TD, weights, biases)) is not None:
            return F.linear(x_TD, whole).split([len(weight) for weight in weights], 1)
        return tuple(F.linear(x_TD, w, b) for w, b in zip(weights, biases, strict=True))
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    (T, D), sizes = x_TD.shape, [weight.shape[0] for weight in weights]
    outs = tuple(x_TD.new_empty(T, size) for size in sizes)
    if not T:
        return outs
    spare, pdl = MAX_WEIGHTS - len(weights), programmatic(x_TD.device)
    first_w, first_b, first_y = weights[0], biases[0], outs[0]
    n0, n1, n2 = *sizes, *(0,) * spare
    tensors = (
        x_TD, *weights, *(first_w,) * spare, *biases, *(first_b,) * spare, *outs, *(first_y,) * spare,
    )  # fmt: skip
    how = {"N0": n0, "N1": n1, "N2": n2, "D": D, "HAS_BIAS": first_b is not None, "PDL": pdl}
    if name == "one row":
        early = min(EARLY, triton.cdiv(D, PIECE))
        _row_kernel[(sum(triton.cdiv(size, ROW_COLUMNS) for size in sizes),)](
            *tensors, BN=ROW_COLUMNS, EARLY=early, PIECE=PIECE, num_warps=ROW_COLUMNS, launch_pdl=pdl, **how
        )
        return outs
    shape: dict[str, Any] = tiles(T, sum(sizes), D, invariant=invariant)
    grid = (sum(triton.cdiv(size, shape["BN"]) for size in sizes), triton.cdiv(T, shape["BT"]))
    precision = "ieee" if x_TD.dtype == torch.float32 else "tf32"
    _linears_kernel[grid](
        *tensors, T, x_TD.stride(0), PRECISION=precision, launch_pdl=pdl, **how, **shape
    )  # fmt: skip
    return outs


def fixed_linears(
    x_TD: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]
) -> tuple[Tensor, ...]:
    """The same in batch-invariant form, with the gradient of the plain one."""

    def plain(x_TD: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return linears(x_TD, rest[: len(weights)], rest[len(weights) :])

    def fixed(x_TD: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return linears(x_TD, rest[: len(weights)], rest[len(weights) :], invariant=True)

    return with_gradient_of(plain, fixed, x_TD, *weights, *biases)
