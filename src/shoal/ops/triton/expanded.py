"""MLA's expanded form: keys of all heads, each its own part and the rotated one that all share.

    k_h = [W_UK c | rope(k)],  v_h = W_UV c       of [W_UK c | W_UV c] of each head, as one product left it

Values are left where they are. Backward gives each head's own gradients side by side again, as that product
wants them, and the sum of what is shared, where slices and concatenations would move them three times.
Layout: a program has a token, and up to HEADS of its heads at once. Bound: bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoal.ops.triton.launch import programmatic, wait_for_previous
from shoal.ops.triton.rotary import side_by_side

HEADS = 16


@triton.jit
def _join_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    a_token_stride,
    a_head_stride,
    b_stride,
    H: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    n, r = tl.arange(0, BN)[None, :], tl.arange(0, BR)[None, :]
    mine = (head < H) & (n < N)
    own = tl.load(a_ptr + token * a_token_stride + head * a_head_stride + n, mask=mine)
    both = tl.load(b_ptr + token * b_stride + r, mask=r < R)
    out = out_ptr + (token * H + head) * (N + R)
    tl.store(out + n, own, mask=mine)
    tl.store(out + N + r, tl.broadcast_to(both, (HEADS, BR)), mask=(head < H) & (r < R))


@triton.jit
def _part_kernel(
    dk_ptr,
    dv_ptr,
    dkv_ptr,
    dshared_ptr,
    dk_token_stride,
    dk_head_stride,
    dv_token_stride,
    dv_head_stride,
    H: tl.constexpr,
    N: tl.constexpr,
    V: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    BN: tl.constexpr,
    BV: tl.constexpr,
    BR: tl.constexpr,
):
    """The other way: what heads have of their own side by side, what they share added up."""
    token = tl.program_id(0).to(tl.int64)
    n, v, r = tl.arange(0, BN)[None, :], tl.arange(0, BV)[None, :], tl.arange(0, BR)[None, :]
    total = tl.zeros((BR,), tl.float32)
    for first in range(0, H, HEADS):
        head = first + tl.arange(0, HEADS)[:, None]
        there = head < H
        dk = dk_ptr + token * dk_token_stride + head * dk_head_stride
        dv = dv_ptr + token * dv_token_stride + head * dv_head_stride
        dkv = dkv_ptr + (token * H + head) * (N + V)
        tl.store(dkv + n, tl.load(dk + n, mask=there & (n < N)), mask=there & (n < N))
        tl.store(dkv + N + v, tl.load(dv + v, mask=there & (v < V)), mask=there & (v < V))
        total += tl.sum(tl.load(dk + N + r, mask=there & (r < R), other=0.0).to(tl.float32), 0)
    r = tl.arange(0, BR)
    tl.store(dshared_ptr + token * R + r, total.to(dshared_ptr.dtype.element_ty), mask=r < R)


def _join(own_THN: Tensor, shared_TR: Tensor) -> Tensor:
    (T, H, N), R = own_THN.shape, shared_TR.shape[1]
    out_THX = own_THN.new_empty(T, H, N + R)
    if T:
        pdl, heads = programmatic(own_THN.device), min(HEADS, triton.next_power_of_2(H))
        _join_kernel[(T, triton.cdiv(H, heads))](
            own_THN,
            shared_TR,
            out_THX,
            own_THN.stride(0),
            own_THN.stride(1),
            shared_TR.stride(0),
            H=H,
            N=N,
            R=R,
            HEADS=heads,
            BN=triton.next_power_of_2(N),
            BR=triton.next_power_of_2(R),
            PDL=pdl,
            launch_pdl=pdl,
        )
    return out_THX


class _KeysAndValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kv_THX: Tensor, shared_TR: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
        N = kv_THX.shape[2] - value_dim
        ctx.shared = shared_TR.shape[1]
        return _join(kv_THX[..., :N], shared_TR), kv_THX[..., N:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dk_THQ: Tensor, dv_THV: Tensor) -> tuple[Tensor, Tensor, None]:
        dk_THQ, dv_THV = side_by_side(dk_THQ), side_by_side(dv_THV)
        (T, H, Q), V = dk_THQ.shape, dv_THV.shape[2]
        R = ctx.shared
        N = Q - R
        dkv_THX, dshared_TR = dk_THQ.new_empty(T, H, N + V), dk_THQ.new_empty(T, R)
        if T:
            _part_kernel[(T,)](
                dk_THQ,
                dv_THV,
                dkv_THX,
                dshared_TR,
                *dk_THQ.stride()[:2],
                *dv_THV.stride()[:2],
                H=H,
                N=N,
                V=V,
                R=R,
                HEADS=min(HEADS, triton.next_power_of_2(H)),
                BN=triton.next_power_of_2(N),
                BV=triton.next_power_of_2(V),
                BR=triton.next_power_of_2(R),
            )
        return dkv_THX, dshared_TR, None


def keys_and_values_refusal(kv_THX: Tensor, shared_TR: Tensor, value_dim: int) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    if kv_THX.dtype != shared_TR.dtype:
        return f"the heads are {kv_THX.dtype} but what they share is {shared_TR.dtype}; cast one side"
    if kv_THX.stride(-1) != 1 or shared_TR.stride(-1) != 1:
        return "the elements of a row are not side by side; make them contiguous"
    return None


def keys_and_values(kv_THX: Tensor, shared_TR: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    """As `ops.api.keys_and_values` says."""
    if torch.is_grad_enabled() and (kv_THX.requires_grad or shared_TR.requires_grad):
        return _KeysAndValues.apply(kv_THX, shared_TR, value_dim)
    N = kv_THX.shape[2] - value_dim
    return _join(kv_THX[..., :N], shared_TR), kv_THX[..., N:]
