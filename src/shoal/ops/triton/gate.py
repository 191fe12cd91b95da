"""The router's product: logits in float32 from narrow tokens and weights, as the tensor cores add them.

    l_te = sum over chunks of (sum within a chunk of x_td w_ed)

Products of bfloat16 are exact in float32, so casting x and the weight up first, as the plain form does, buys
nothing but two launches and three times the bytes. Layout: experts are the tall operand, 64 or 128 to a
program, tokens the narrow one. The sum runs over chunks of CHUNK dims, each from zero, added in their order:
so few tokens may have a program for each chunk (D 7168 and 256 experts: 224 programs) and a second launch
that adds, many tokens have one program that does both, and a row's logits are the same bits in either.

Bound: bytes. At one token the weight is read once (V3: 3.7 MB); at many, x. On an H200 (2026-11-24): 4 to 5
us at 1 to 8 tokens, 4 (V2-Lite) and 12 (V3) at 256; at 16k 66 and 37% of 4.555 TB/s, a tenth of the time of
the float32 product.

Where one row's residual sum and norm come before, the programs of its chunks make those too, each by itself:
one launch for two.

Backward: a float32 gradient is three bfloat16 numbers, high, middle and low, and the products with the narrow
operands are one cuBLAS product each of three times the depth, or height: as exact as float32, at the tensor
cores' rate.

Float32 tokens have a product as it is, whose sums depend on how many rows there are: in batch-invariant mode,
and only there, they are taken too, by `linears`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoal.ops.invariance import is_batch_invariant
from shoal.ops.triton.launch import programmatic, wait_for_previous
from shoal.ops.triton.linears import fixed_linears
from shoal.ops.triton.norms import rows_of

DTYPES = (torch.bfloat16, torch.float16)
CHUNK = 128
MAX_SPLIT = 512  # tokens up to which each chunk has a program of its own


@triton.jit
def _weights(weight_ptr, expert, first, E: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr):
    """Both halves of a chunk of the weights (experts, CHUNK / 2)."""
    column = first + tl.arange(0, CHUNK // 2)
    at, kept = weight_ptr + expert[:, None] * D, (expert < E)[:, None]
    low = tl.load(at + column[None, :], mask=kept & (column < D)[None, :], other=0.0)
    column += CHUNK // 2
    return low, tl.load(at + column[None, :], mask=kept & (column < D)[None, :], other=0.0)


@triton.jit
def _chunk(low, high, x_ptr, token, first, T, x_stride, D: tl.constexpr, CHUNK: tl.constexpr):
    """The partial logits (experts, tokens) of one chunk, from zero.

    Two products, because a compiler may make one and the sum it goes into a single chain of additions.
    """
    column = first + tl.arange(0, CHUNK // 2)
    at, kept = x_ptr + token[:, None] * x_stride, (token < T)[:, None]
    x = tl.load(at + column[None, :], mask=kept & (column < D)[None, :], other=0.0)
    part = tl.dot(low, x.T, tl.zeros((low.shape[0], token.shape[0]), tl.float32))
    column += CHUNK // 2
    x = tl.load(at + column[None, :], mask=kept & (column < D)[None, :], other=0.0)
    return tl.dot(high, x.T, part)


@triton.jit(do_not_specialize=["T"])
def _split_kernel(
    x_ptr,
    weight_ptr,
    parts_ptr,
    T,
    x_stride,
    E: tl.constexpr,
    D: tl.constexpr,
    BE: tl.constexpr,
    BT: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    expert, first = tl.program_id(0) * BE + tl.arange(0, BE), tl.program_id(2) * CHUNK
    token = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    low, high = _weights(weight_ptr, expert, first, E, D, CHUNK)
    wait_for_previous(PDL)
    part = _chunk(low, high, x_ptr, token, first, T, x_stride, D, CHUNK)
    at = (tl.program_id(2) * T + token)[None, :] * E + expert[:, None]
    tl.store(parts_ptr + at, part, mask=(expert < E)[:, None] & (token < T)[None, :])


@triton.jit(do_not_specialize=["size"])
def _add_kernel(parts_ptr, out_ptr, size, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_previous(PDL)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for chunk in tl.static_range(CHUNKS):
        total += tl.load(parts_ptr + chunk * size + at, mask=at < size, other=0.0)
    tl.store(out_ptr + at, total, mask=at < size)


@triton.jit(do_not_specialize=["T"])
def _whole_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    T,
    x_stride,
    E: tl.constexpr,
    D: tl.constexpr,
    BE: tl.constexpr,
    BT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    expert = tl.program_id(0) * BE + tl.arange(0, BE)
    token = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    total = tl.zeros((BE, BT), tl.float32)
    for first in range(0, D, CHUNK):
        low, high = _weights(weight_ptr, expert, first, E, D, CHUNK)
        total += _chunk(low, high, x_ptr, token, first, T, x_stride, D, CHUNK)
    at = token[None, :] * E + expert[:, None]
    tl.store(out_ptr + at, total, mask=(expert < E)[:, None] & (token < T)[None, :])


def _logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    (T, D), E = x_TD.shape, weight_ED.shape[0]
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    out_TE = torch.empty(T, E, dtype=torch.float32, device=x_TD.device)
    if not T:
        return out_TE
    if T > MAX_SPLIT:
        experts, tokens = (64, 64) if E <= 64 else (128, 64)
        _whole_kernel[(triton.cdiv(E, experts), triton.cdiv(T, tokens))](
            x_TD,
            weight_ED,
            out_TE,
            T,
            x_TD.stride(0),
            E=E,
            D=D,
            BE=experts,
            BT=tokens,
            CHUNK=CHUNK,
            num_warps=4,
            num_stages=4,
        )
        return out_TE
    parts = gate_parts(x_TD, weight_ED)
    assert parts is not None
    pdl = programmatic(x_TD.device)
    _add_kernel[(triton.cdiv(T * E, 128),)](
        parts, out_TE, T * E, CHUNKS=len(parts), BLOCK=128, PDL=pdl, num_warps=4, launch_pdl=pdl
    )
    return out_TE


def gate_parts(x_TD: Tensor, weight_ED: Tensor) -> Tensor | None:
    """The partial logits of each chunk (chunks, T, E), to be added in their order; None for many tokens."""
    (T, D), E = x_TD.shape, weight_ED.shape[0]
    if not 0 < T <= MAX_SPLIT:
        return None
    x_TD = x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()
    chunks, tokens = triton.cdiv(D, CHUNK), 16 if T <= 16 else 64
    # In training FSDP2 may write the weight right before, and this kernel reads it before its wait.
    pdl = programmatic(x_TD.device) and not torch.is_grad_enabled()
    parts = torch.empty(chunks, T, E, dtype=torch.float32, device=x_TD.device)
    _split_kernel[(triton.cdiv(E, 64), triton.cdiv(T, tokens), chunks)](
        x_TD,
        weight_ED,
        parts,
        T,
        x_TD.stride(0),
        E=E,
        D=D,
        BE=64,
        BT=tokens,
        CHUNK=CHUNK,
        PDL=pdl,
        launch_pdl=pdl,
    )
    return parts


@triton.jit(do_not_specialize=["eps"])
def _norm_parts_kernel(
    x_ptr,
    y_ptr,
    norm_ptr,
    weight_ptr,
    sum_ptr,
    normal_ptr,
    parts_ptr,
    eps,
    E: tl.constexpr,
    D: tl.constexpr,
    BE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """x + y of one row, its norm, and the partial logits of chunk p. Every program sees the whole row."""
    dtype: tl.constexpr = normal_ptr.dtype.element_ty
    expert = tl.program_id(1) * BE + tl.arange(0, BE)
    column = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = column < D
    there = (expert < E)[:, None] & inside[None, :]
    weight = tl.load(weight_ptr + expert[:, None] * D + column[None, :], mask=there, other=0.0)
    norm = tl.load(norm_ptr + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    d = tl.arange(0, BLOCK)
    whole = tl.load(x_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    whole = (whole + tl.load(y_ptr + d, mask=d < D, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    x = tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32)
    x = (x + tl.load(y_ptr + column, mask=inside, other=0.0).to(tl.float32)).to(dtype)
    inverse = 1.0 / tl.sqrt_rn(tl.sum(whole * whole, 0) / D + eps)
    normal = (x.to(tl.float32) * inverse).to(dtype).to(tl.float32)
    normal = (normal * norm).to(dtype)
    if tl.program_id(1) == 0:
        tl.store(sum_ptr + column, x, mask=inside)
        tl.store(normal_ptr + column, normal, mask=inside)
    part = tl.sum(weight.to(tl.float32) * normal.to(tl.float32)[None, :], 1)
    tl.store(parts_ptr + tl.program_id(0) * E + expert, part, mask=expert < E)


def norm_parts(
    x_1D: Tensor, y_1D: Tensor, norm_D: Tensor, eps: float, weight_ED: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one row x + y, its norm, and what `gate_parts` gives for that."""
    E, D = weight_ED.shape
    chunks, pdl = triton.cdiv(D, CHUNK), programmatic(x_1D.device)
    sum_1D, normal_1D = (torch.empty(1, D, dtype=x_1D.dtype, device=x_1D.device) for _ in range(2))
    parts = torch.empty(chunks, 1, E, dtype=torch.float32, device=x_1D.device)
    _norm_parts_kernel[(chunks, triton.cdiv(E, 64))](
        rows_of(x_1D),
        rows_of(y_1D),
        norm_D,
        weight_ED,
        sum_1D,
        normal_1D,
        parts,
        eps,
        E=E,
        D=D,
        BE=64,
        BLOCK=triton.next_power_of_2(D),
        CHUNK=CHUNK,
        PDL=pdl,
        num_warps=8,
        launch_pdl=pdl,
    )
    return sum_1D, normal_1D, parts


@triton.jit
def _thirds_kernel(x_ptr, out_ptr, size, E: tl.constexpr, BLOCK: tl.constexpr):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(x_ptr + at, mask=at < size, other=0.0)
    to = at // E * (3 * E) + at % E
    for third in tl.static_range(3):
        part = rest.to(dtype)
        tl.store(out_ptr + to + third * E, part, mask=at < size)
        rest -= part.to(tl.float32)


def split_in_three(x_TE: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, 3 E) of `dtype`: high, middle and low parts, whose sum is the float32 `x_TE` to 2^-24 of it."""
    T, E = x_TE.shape
    thirds_TX = torch.empty(T, 3 * E, dtype=dtype, device=x_TE.device)
    if x_TE.numel():
        _thirds_kernel[(triton.cdiv(x_TE.numel(), 1024),)](
            x_TE.contiguous(), thirds_TX, x_TE.numel(), E=E, BLOCK=1024
        )
    return thirds_TX


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b of narrow matrices, kept in float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a.float(), b.float())


class _GateLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return _logits(x_TD, weight_ED)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits_TE: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_ED = ctx.saved_tensors
        E, D = weight_ED.shape
        thirds_TX = split_in_three(dlogits_TE, x_TD.dtype)
        dx_TD = dweight_ED = None
        if ctx.needs_input_grad[0]:
            dx_TD = torch.mm(thirds_TX, weight_ED.repeat(3, 1))
        if ctx.needs_input_grad[1]:
            dweight_ED = _wide_product(thirds_TX.t(), x_TD).view(3, E, D).sum(0).to(weight_ED.dtype)
        return dx_TD, dweight_ED


def gate_logits_refusal(x_TD: Tensor, weight_ED: Tensor) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    if x_TD.dtype not in DTYPES and not (x_TD.dtype == torch.float32 and is_batch_invariant()):
        return (
            f"x is {x_TD.dtype}; the kernel takes bfloat16 and float16, and float32 is one product as it is"
        )
    if weight_ED.dtype != x_TD.dtype:
        return f"x is {x_TD.dtype} but the weight is {weight_ED.dtype}; cast one side"
    if not weight_ED.is_contiguous():
        return "the weight is not contiguous; the kernel does not copy weights"
    return None


def gate_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """The logits, as `ops.api.gate_logits` says."""
    if x_TD.dtype == torch.float32:
        return fixed_linears(x_TD, (weight_ED,), (None,))[0]
    if torch.is_grad_enabled() and (x_TD.requires_grad or weight_ED.requires_grad):
        return _GateLogits.apply(x_TD, weight_ED)
    return _logits(x_TD, weight_ED)
