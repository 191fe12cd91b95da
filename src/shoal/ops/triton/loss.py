"""Output head and cross-entropy in one: products by cuBLAS, softmax and its gradient in place between them.

    z = h W^T,  nll = lse(z) - z_target,  dz = w (softmax(z) - onehot),  dh = dz W,  dW = dz^T h

A chunk of tokens at a time, so that one buffer holds all logits there ever are (`chunk_of`); its dz takes
their place. dW adds up in float32 over the chunks (one chunk: none is kept), in the product's own epilogue.
Layout of the kernel: a program walks a row twice, once for the running maximum and sum, once, out of L2, to
replace each logit by its gradient. The softmax is float32 from the product's narrow logits; the token's
weight joins before the one rounding of dz. Backward scales what forward left.

Bound: the three products (T 16k, V 129k, D 2048: 26 TFLOP). The kernel moves each logit in and out once, 4 T
V bytes in all, and the sums of dW 8 V D bytes a chunk. Memory: 4 V D for the sums, 2 V D for dW, a chunk. On
an H200 (2026-11-24, chunks of 512 MB): 598 TFLOP/s and 2.2 GB there, where eager PyTorch takes 1.40 times as
long and 25.4 GB.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoal.ops.invariance import with_gradient_of
from shoal.ops.triton.likelihood import nll
from shoal.ops.triton.linears import linears
from shoal.ops.triton.norms import DTYPES

CHUNK_BYTES = 1 << 29  # of logits held at once, at least
MANY_BYTES = 1 << 31  # and at most, but for a larger W
ALIGNMENT = 64  # elements: every row of logits begins where vectors and cuBLAS want it


@triton.jit
def _softmax_kernel(
    logits_ptr,
    targets_ptr,
    weights_ptr,
    nll_ptr,
    stride,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    GRADIENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    # The target's logit, before anything takes its place. A target outside is not read, and shows as NaN.
    target = tl.load(targets_ptr + row)
    known = (target >= 0) & (target < V)
    wanted = tl.load(logits_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    # 1. The maximum and the sum of exponentials, together.
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for first in tl.range(0, V, BLOCK, num_stages=3):
        column = first + tl.arange(0, BLOCK)
        logit = tl.load(logits_ptr + column, mask=column < V, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(logit, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(logit - larger), 0)
        largest = larger
    lse = largest + tl.log(total)
    # 2. The loss.
    tl.store(nll_ptr + row, lse - wanted)
    # 3. The gradient, in place.
    if GRADIENT:
        weight = tl.load(weights_ptr + row).to(tl.float32)
        scale = weight / total
        for first in range(0, V, BLOCK):
            column = first + tl.arange(0, BLOCK)
            logit = tl.load(logits_ptr + column, mask=column < V, other=float("-inf")).to(tl.float32)
            dlogit = scale * tl.exp(logit - largest) - tl.where(column == target, weight, 0.0)
            tl.store(logits_ptr + column, dlogit.to(logits_ptr.dtype.element_ty), mask=column < V)


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size).to(tl.float32) * tl.load(factor_ptr).to(tl.float32)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=at < size)


def _scaled(grad: Tensor | None, factor: Tensor) -> Tensor | None:
    """grad * factor, the factor in float32 and the product rounded once."""
    if grad is None:
        return None
    out = torch.empty_like(grad)
    if grad.numel():
        _scale_kernel[(triton.cdiv(grad.numel(), 4096),)](grad, factor, out, grad.numel(), BLOCK=4096)
    return out


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, narrow matrices into float32."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        weights_T: Tensor,
        chunk: int,
        need_hidden: bool,
        need_weight: bool,
    ) -> tuple[Tensor, Tensor]:
        T, V = hidden_TD.shape[0], weight_VD.shape[0]
        gradient = need_hidden or need_weight
        nll_T = torch.empty(T, dtype=torch.float32, device=hidden_TD.device)
        dhidden_TD = torch.empty_like(hidden_TD) if need_hidden else None
        dweight_VD = None
        if need_weight and chunk < T:
            dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        width = triton.cdiv(V, ALIGNMENT) * ALIGNMENT
        buffer = torch.empty(min(chunk, T), width, dtype=hidden_TD.dtype, device=hidden_TD.device)
        for start in range(0, T, chunk):
            rows = slice(start, min(start + chunk, T))
            hidden_tD = hidden_TD[rows]
            logits_tV = buffer[: hidden_tD.shape[0], :V]
            torch.mm(hidden_tD, weight_VD.t(), out=logits_tV)
            _softmax_kernel[(hidden_tD.shape[0],)](
                logits_tV,
                targets_T[rows],
                weights_T[rows],
                nll_T[rows],
                width,
                V=V,
                BLOCK=min(8192, triton.next_power_of_2(V)),
                GRADIENT=gradient,
                num_warps=8,
            )
            if dhidden_TD is not None:
                torch.mm(logits_tV, weight_VD, out=dhidden_TD[rows])
            if dweight_VD is not None:
                _add_product(dweight_VD, logits_tV.t(), hidden_tD)
            elif need_weight:
                dweight_VD = torch.mm(logits_tV.t(), hidden_tD)
        del buffer
        if need_weight and dweight_VD is None:  # no tokens
            dweight_VD = torch.zeros_like(weight_VD)
        ctx.save_for_backward(dhidden_TD, None if dweight_VD is None else dweight_VD.to(weight_VD.dtype))
        ctx.mark_non_differentiable(nll_T)
        return torch.dot(nll_T, weights_T.float()), nll_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, dnll_T: Tensor) -> tuple[Tensor | None, ...]:
        return *(_scaled(grad, dtotal) for grad in ctx.saved_tensors), *(None,) * 5


def linear_cross_entropy_refusal(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, weights_T: Tensor
) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    if hidden_TD.dtype not in DTYPES:
        return f"hidden states are {hidden_TD.dtype}; the kernel takes bfloat16, float16 and float32"
    if weight_VD.dtype != hidden_TD.dtype:
        return f"hidden states are {hidden_TD.dtype} but the weight is {weight_VD.dtype}; cast one side"
    if weights_T.requires_grad:
        return "the weights of the tokens ask for a gradient; there is none for them"
    return None


def chunk_of(weight_bytes: int) -> int:
    """Bytes of logits held at once. A chunk reads and writes dW's sums, eight times V D bytes: as many of
    logits at least, where that is no more than MANY_BYTES, or than W."""
    return max(CHUNK_BYTES, weight_bytes, min(4 * weight_bytes, MANY_BYTES))


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    weights_T: Tensor,
    *,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and losses, as `ops.api.linear_cross_entropy` says; `chunk_bytes` of logits at once at most."""
    if chunk_bytes is None:
        chunk_bytes = chunk_of(weight_VD.numel() * weight_VD.element_size())
    row_bytes = max(1, weight_VD.shape[0]) * hidden_TD.element_size()
    chunk = max(1, chunk_bytes // row_bytes)
    chunk = max(chunk // 128 * 128, min(chunk, 128))  # whole tiles of the products
    need_hidden, need_weight = (torch.is_grad_enabled() and x.requires_grad for x in (hidden_TD, weight_VD))
    targets_T, weights_T = targets_T.contiguous(), weights_T.contiguous()
    return _LinearCrossEntropy.apply(
        hidden_TD, weight_VD, targets_T, weights_T, chunk, need_hidden, need_weight
    )


def fixed_linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    weights_T: Tensor,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """The same in batch-invariant form, with the gradient of the plain one: the engine's own head, a chunk at
    a time, then the log-probability that it gives what it draws."""
    chunk = max(1, chunk_bytes // (weight_VD.shape[0] * hidden_TD.element_size()))

    def plain(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T, chunk_bytes=chunk_bytes)

    def fixed(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
        pieces = zip(hidden_TD.split(chunk), targets_T.split(chunk), strict=True)
        head = ((weight_VD.contiguous(),), (None,))
        nll_T = torch.cat([nll(linears(h_tD, *head, invariant=True)[0], t_t) for h_tD, t_t in pieces])
        return torch.dot(nll_T, weights_T.float()), nll_T

    total, nll_T = with_gradient_of(plain, fixed, hidden_TD, weight_VD)
    return total, nll_T.detach()
