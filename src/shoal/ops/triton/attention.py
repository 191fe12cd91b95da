"""Causal attention over a pack on a GPU, with gradients, and pieces of it that are merged: who runs it.

    cudnn   one dense call, PyTorch's   bf16 and fp16 on Hopper or data-centre Blackwell, the usual dims, and
                                        sequences of one length that is a multiple of 512
    flash   Triton, ours                ragged packs, odd dims or lengths, float32, other GPUs, and
                                        batch-invariant mode

cuDNN (aten's `_scaled_dot_product_cudnn_attention`) is at the limit on its shapes: on an H200 (2026-11-24,
dims 192 and 128, 16 heads) 454 TFLOP/s forward at 4k and 623 at 16k, 334 and 483 with the backward; ours 353
and 486, 237 and 339. But it plans each shape it has not met, for 50 to 150 ms, so it is asked for few.
On ragged packs, where ours reaches 404 and 295, PyTorch's way to cuDNN plans every call anew. Its backward
adds atomically unless `torch.use_deterministic_algorithms(True)`; ours never does. `choose` says who serves.

A piece (`attention_part`) also gives the log-sum-exp of its scores, by which `merge_attention` joins two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoal.ops.triton.flash import (
    delta_kernel,
    forward_kernel,
    keys_backward_kernel,
    queries_backward_kernel,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_DIM = 256
PLANNED = 512  # lengths that cuDNN is asked for are multiples of it: a plan takes it 50 to 150 ms
_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Tile:
    """Queries and keys of a program, its warps, loads in flight."""

    bm: int
    bn: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    """How the Triton kernels run one call."""

    forward: Tile
    keys: Tile
    queries: Tile


@dataclass(frozen=True)
class Rule:
    """Which keys of a pack a query sees: up to its own; the last `window`; blocks of `block` tokens every
    `stride` that are complete."""

    window: int = 0
    block: int = 1
    stride: int = 1

    @property
    def words(self) -> dict[str, int]:
        return {"WINDOW": self.window, "STRIDE": self.stride, "LAG": self.block - self.stride}


CAUSAL = Rule()
_PORTABLE = Tile(32, 32, 4, 2)
PORTABLE = Plan(_PORTABLE, _PORTABLE, _PORTABLE)
# Measured on an H200, 2026-11-24, dims 192 and 128.
HOPPER = Plan(Tile(128, 64, 8, 3), Tile(32, 64, 4, 2), Tile(128, 32, 8, 3))


def _plan(q_THQ: Tensor) -> Plan:
    fits = q_THQ.is_cuda and q_THQ.dtype != torch.float32 and q_THQ.shape[2] <= 192
    return HOPPER if fits and torch.cuda.get_device_capability(q_THQ.device)[0] == 9 else PORTABLE


def _dims(q_THQ: Tensor, v_TGV: Tensor) -> dict[str, Any]:
    """Head counts, and a key's dims as one power of two and the rest."""
    H, Q = q_THQ.shape[1:]
    G, V = v_TGV.shape[1:]
    first = 1 << (Q.bit_length() - 1)
    if first < 16:
        first = Q
    rest = Q - first
    return {
        "H": H,
        "G": G,
        "D1": first,
        "D2": rest,
        "V": V,
        "B1": triton.next_power_of_2(max(first, 16)),
        "B2": triton.next_power_of_2(max(rest, 16)),
        "BV": triton.next_power_of_2(max(V, 16)),
        "PRECISION": "ieee" if q_THQ.dtype == torch.float32 else "tf32",
    }


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    most: int,
    scale: float,
    plan: Plan,
    *,
    causal: bool,
    rule: Rule = CAUSAL,
) -> tuple[Tensor, Tensor]:
    T, H = q.shape[:2]
    o_THV, lse_TH = v.new_empty(T, H, v.shape[2]), q.new_empty(T, H, dtype=torch.float32)
    tile = plan.forward
    forward_kernel[(triton.cdiv(most, tile.bm), H, cu_q.shape[0] - 1)](
        q, k, v, o_THV, lse_TH, cu_q, cu_k, scale * _LOG2E, BM=tile.bm, BN=tile.bn, CAUSAL=causal,
        num_warps=tile.warps, num_stages=tile.stages, **_dims(q, v), **rule.words,
    )  # fmt: skip
    return o_THV, lse_TH


class _Flash(torch.autograd.Function):
    """o and, without gradient, lse of queries over keys of their own boundaries."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        most: int,
        most_keys: int,  # of a sequence, where a key stands for one token
        scale: float,
        plan: Plan,
        rule: Rule,
    ) -> tuple[Tensor, Tensor]:
        o_THV, lse_TH = _forward(q, k, v, cu_q, cu_k, most, scale, plan, causal=True, rule=rule)
        ctx.save_for_backward(q, k, v, o_THV, lse_TH, cu_q, cu_k)
        ctx.how = (most, most_keys, scale, plan, rule)
        ctx.mark_non_differentiable(lse_TH)
        return o_THV, lse_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_THV: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o_THV, lse_TH, cu_q, cu_k = ctx.saved_tensors
        most, most_keys, scale, plan, rule = ctx.how
        do_THV = do_THV.contiguous()
        dq = torch.empty_like(q)
        dk, dv = ((torch.zeros_like if rule.stride > 1 else torch.empty_like)(x) for x in (k, v))
        delta_TH = torch.empty_like(lse_TH)
        dims, S, rows = _dims(q, v), cu_q.shape[0] - 1, lse_TH.numel()
        delta_kernel[(triton.cdiv(rows, 16),)](
            o_THV, do_THV, delta_TH, rows, V=dims["V"], BV=dims["BV"], ROWS=16
        )
        tile = plan.keys
        keys_backward_kernel[(triton.cdiv(most_keys, tile.bn * rule.stride), dims["G"], S)](
            q, k, v, do_THV, lse_TH, delta_TH, dk, dv, cu_q, cu_k, scale * _LOG2E, BM=tile.bm, BN=tile.bn,
            num_warps=tile.warps, num_stages=tile.stages, **dims, **rule.words,
        )  # fmt: skip
        tile = plan.queries
        queries_backward_kernel[(triton.cdiv(most, tile.bm), dims["H"], S)](
            q, k, v, do_THV, lse_TH, delta_TH, dq, cu_q, cu_k, scale * _LOG2E, BM=tile.bm, BN=tile.bn,
            num_warps=tile.warps, num_stages=tile.stages, **dims, **rule.words,
        )  # fmt: skip
        return dq, dk, dv, *(None for _ in range(7))


def _cudnn_refusal(q_THQ: Tensor, k_TGQ: Tensor, v_TGV: Tensor) -> str | None:
    """Why cuDNN does not serve these tensors; None if it does."""
    Q, V = q_THQ.shape[2], v_TGV.shape[2]
    if not q_THQ.is_cuda or torch.cuda.get_device_capability(q_THQ.device)[0] not in (9, 10):
        return "cuDNN's fast kernels are for Hopper and data-centre Blackwell"
    if q_THQ.dtype == torch.float32:
        return "cuDNN takes bfloat16 and float16"
    if Q % 8 or V % 8 or V > 128 or (192 if V == 128 else 128) < Q:
        return f"cuDNN's backward takes dims up to 128, or 192 and 128; these are {Q} and {V}"
    if min(q_THQ.shape[0], k_TGQ.shape[0]) < 2:
        return "cuDNN takes no single token"
    if max(q_THQ.numel(), k_TGQ.numel()) >= 2**31:
        return f"{q_THQ.numel()} elements, and cuDNN is not trusted past 32 bits"
    return None


def choose(
    q_THQ: Tensor,
    k_TGQ: Tensor,
    v_TGV: Tensor,
    cu_S1: Tensor,
    most: int,
    scale: float,
    cu_keys_S1: Tensor | None = None,
    most_keys: int = 0,
    *,
    invariant: bool = False,
) -> tuple[str, str]:
    """Who runs `attention` ("cudnn" or "flash"), and a word on why."""
    if invariant:
        return "flash", "batch-invariant: a block's sums run in one order"
    if cu_keys_S1 is not None:
        return "flash", "queries are the last of more keys, and cuDNN's mask begins with the first of both"
    refusal = _cudnn_refusal(q_THQ, k_TGQ, v_TGV)
    if most < 2:
        refusal = "cuDNN takes no single token"
    if refusal is not None:
        return "flash", refusal
    if q_THQ.shape[0] != (cu_S1.shape[0] - 1) * most:
        return "flash", "the sequences are of several lengths, for which cuDNN would plan every call anew"
    if most % PLANNED:
        return "flash", f"their length {most} is no multiple of {PLANNED}: cuDNN would plan each one anew"
    return "cudnn", f"all sequences are of one length, a multiple of {PLANNED}"


def attention_refusal(q_THQ: Tensor, k_TGQ: Tensor, v_TGV: Tensor, *_: Any) -> str | None:
    """Why the kernels do not take this call; None if they do."""
    if q_THQ.dtype not in DTYPES:
        return f"q is {q_THQ.dtype}; the kernels take bfloat16, float16 and float32"
    if not q_THQ.dtype == k_TGQ.dtype == v_TGV.dtype:
        return f"q, k and v are {q_THQ.dtype}, {k_TGQ.dtype} and {v_TGV.dtype}; cast them to one"
    if q_THQ.shape[2] > MAX_DIM or v_TGV.shape[2] > MAX_DIM:
        return f"head dims {q_THQ.shape[2]} and {v_TGV.shape[2]}; the kernels take at most {MAX_DIM}"
    if q_THQ.shape[1] % k_TGQ.shape[1]:
        return f"{q_THQ.shape[1]} query heads over {k_TGQ.shape[1]} key heads; they must divide"
    return None


def _equal_cudnn(q: Tensor, k: Tensor, v: Tensor, most: int, scale: float, *, causal: bool) -> Any:
    """Sequences of `most` queries each, as one dense call: what aten returns, (S, H, n, V) first."""
    q, k, v = (x.unflatten(0, (q.shape[0] // most, -1)).transpose(1, 2) for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )


def attention(
    q_THQ: Tensor,
    k_TGQ: Tensor,
    v_TGV: Tensor,
    cu_S1: Tensor,
    most: int,
    scale: float,
    cu_keys_S1: Tensor | None = None,
    most_keys: int = 0,
    *,
    invariant: bool = False,
    plan: Plan | None = None,
) -> Tensor:
    """As `ops.api.attention` says. `plan` forces the Triton kernels and their tiles."""
    if q_THQ.shape[0] == 0:
        return q_THQ.new_empty(0, q_THQ.shape[1], v_TGV.shape[2]) + 0 * (
            q_THQ.sum() + k_TGQ.sum() + v_TGV.sum()
        )
    who, _ = choose(q_THQ, k_TGQ, v_TGV, cu_S1, most, scale, cu_keys_S1, invariant=invariant)
    if who == "cudnn" and plan is None:
        return _equal_cudnn(q_THQ, k_TGQ, v_TGV, most, scale, causal=True)[0].transpose(1, 2).flatten(0, 1)
    q, k, v = q_THQ.contiguous(), k_TGQ.contiguous(), v_TGV.contiguous()
    keys = (cu_S1, most) if cu_keys_S1 is None else (cu_keys_S1, most_keys)
    return _Flash.apply(q, k, v, cu_S1, keys[0], most, keys[1], scale, plan or _plan(q), CAUSAL)[0]


def window_attention(
    q_THQ: Tensor,
    k_TGQ: Tensor,
    v_TGV: Tensor,
    cu_S1: Tensor,
    most: int,
    scale: float,
    window: int,
    *,
    plan: Plan | None = None,
) -> Tensor:
    """`ops.api.attention` with a window."""
    if q_THQ.shape[0] == 0:
        return attention(q_THQ, k_TGQ, v_TGV, cu_S1, most, scale)
    q, k, v = q_THQ.contiguous(), k_TGQ.contiguous(), v_TGV.contiguous()
    return _Flash.apply(q, k, v, cu_S1, cu_S1, most, most, scale, plan or _plan(q), Rule(window))[0]


def compressed_attention(
    q_THQ: Tensor,
    k_MGQ: Tensor,
    v_MGV: Tensor,
    cu_S1: Tensor,
    cu_entries_S1: Tensor,
    most: int,
    block: int,
    stride: int,
    scale: float,
    *,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """As `ops.api.compressed_attention` says."""
    if q_THQ.shape[0] == 0:
        return attention(q_THQ, k_MGQ, v_MGV, cu_S1, most, scale), q_THQ.new_empty(0, q_THQ.shape[1]).float()
    q, k, v = q_THQ.contiguous(), k_MGQ.contiguous(), v_MGV.contiguous()
    rule = Rule(block=block, stride=stride)
    return _Flash.apply(q, k, v, cu_S1, cu_entries_S1, most, most, scale, plan or _plan(q), rule)


@torch.no_grad()
def attention_part(
    q_nHQ: Tensor, k_NGQ: Tensor, v_NGV: Tensor, scale: float, causal: bool, *, plan: Plan | None = None
) -> tuple[Tensor, Tensor]:
    """As `ops.api.attention_part` says. `plan` forces the Triton kernel and its tiles."""
    n, N = q_nHQ.shape[0], k_NGQ.shape[0]
    planned = n % PLANNED == N % PLANNED == 0 and (not causal or n == N)
    if n and plan is None and planned and _cudnn_refusal(q_nHQ, k_NGQ, v_NGV) is None:
        q, k, v = (x.unsqueeze(0).transpose(1, 2) for x in (q_nHQ, k_NGQ, v_NGV))
        found = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        return found[0][0].transpose(0, 1), found[1].view(-1, n).transpose(0, 1)
    tensors = (q_nHQ.contiguous(), k_NGQ.contiguous(), v_NGV.contiguous())
    if n == 0:
        return v_NGV.new_empty(0, q_nHQ.shape[1], v_NGV.shape[2]), q_nHQ.new_empty(0, q_nHQ.shape[1]).float()
    whole = (_whole(n, q_nHQ.device), _whole(N, q_nHQ.device))
    return _forward(*tensors, *whole, n, scale, plan or _plan(q_nHQ), causal=causal)


def _whole(size: int, device: torch.device) -> Tensor:
    """The bounds of one sequence, made on the device: for a copy from here the host would wait."""
    return torch.arange(2, dtype=torch.int32, device=device) * size


@triton.jit
def _merge_kernel(
    a_ptr,
    b_ptr,
    lse_a_ptr,
    lse_b_ptr,
    o_ptr,
    lse_ptr,
    rows,
    V: tl.constexpr,
    BV: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BV)
    there = row < rows
    lse_a = tl.load(lse_a_ptr + row, mask=there, other=0.0)
    lse_b = tl.load(lse_b_ptr + row, mask=there, other=0.0)
    top = tl.maximum(lse_a, lse_b)
    ground = tl.where(top == float("-inf"), 0.0, top)
    weight_a, weight_b = tl.exp(lse_a - ground), tl.exp(lse_b - ground)
    total = weight_a + weight_b
    total = tl.where(total > 0, total, 1.0)
    mask = there[:, None] & (column < V)[None, :]
    at = row[:, None] * V + column[None, :]
    a = tl.load(a_ptr + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + at, mask=mask, other=0.0).to(tl.float32)
    o = a * (weight_a / total)[:, None] + b * (weight_b / total)[:, None]
    tl.store(o_ptr + at, o.to(o_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + row, top + tl.log(total), mask=there)


@torch.no_grad()
def merge_attention(
    a_nHV: Tensor, lse_a_nH: Tensor, b_nHV: Tensor, lse_b_nH: Tensor
) -> tuple[Tensor, Tensor]:
    """As `ops.api.merge_attention` says."""
    a, b = a_nHV.contiguous(), b_nHV.contiguous()
    o, lse = (
        torch.empty_like(a, dtype=torch.float32),
        torch.empty_like(lse_a_nH, memory_format=torch.contiguous_format),
    )
    rows, V = lse.numel(), a.shape[-1]
    if rows:
        _merge_kernel[(triton.cdiv(rows, 8),)](
            a, b, lse_a_nH.contiguous(), lse_b_nH.contiguous(), o, lse, rows, V=V,
            BV=triton.next_power_of_2(V), ROWS=8,
        )  # fmt: skip
    return o, lse
