"""The merge of one token's latents, and the values that are made of them, in one launch.

    z = sum_u 2^(l_u - l) o_u,  l = log2 sum_u 2^l_u;   v = W_UV z    of each head

Of few short parts a head reads less than the launch between costs. Layout: a program makes BV of the V values
of one head. It merges all C elements again, as every program of its head does, and adds by threads: one row
fills no tensor core. Rows of W_UV, and how many parts there are, are read before the wait for these
(`launch`). Bound: the launch.

Parts lie where `cache_splits` and `cache_turns` put them for a batch of one sequence.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.ops.triton.cache_splits import count_tiles
from shoal.ops.triton.launch import programmatic, wait_for_previous

MAX_PARTS, AT_ONCE = 64, 32  # beyond, the merge costs more than the launch it saves; parts in flight


@triton.jit(do_not_specialize=["W", "RB"])
def _merge_values_kernel(
    contexts_ptr,
    cu_ptr,
    whole_ptr,  # (H, C): what lay in one piece
    partial_ptr,
    lse_ptr,
    kv_b_ptr,
    out_ptr,
    W,
    H: tl.constexpr,
    REP: tl.constexpr,
    RB,
    C: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    S_PAD: tl.constexpr,
    FIXED: tl.constexpr,
    UNIT: tl.constexpr,
    N: tl.constexpr,
    V: tl.constexpr,
    BC: tl.constexpr,
    BV: tl.constexpr,
    UB: tl.constexpr,
    PDL: tl.constexpr,
):
    pieces: tl.constexpr = (V + BV - 1) // BV
    head = tl.program_id(0) // pieces
    v = tl.program_id(0) % pieces * BV + tl.arange(0, BV)
    c = tl.arange(0, BC)
    at = (head * (N + V) + N + v).to(tl.int64)[:, None] * C + c[None, :]
    w = tl.load(kv_b_ptr + at, mask=(v < V)[:, None] & (c < C)[None, :], other=0.0)
    mine = tl.sum(count_tiles(cu_ptr, contexts_ptr, 1, head // BM * BM, S_PAD, REP, BM, BN), 0)
    piece = tl.maximum((mine + W - 1) // W, 1)
    parts = (mine + piece - 1) // piece
    wait_for_previous(PDL)
    whole = tl.load(whole_ptr + head * C + c, mask=(c < C) & (parts == 1), other=0.0).to(tl.float32)
    top, weight = float("-inf"), 0.0
    z = tl.zeros((BC,), tl.float32)
    for first in range(0, tl.where(parts > 1, parts, 0), UB):
        u = first + tl.arange(0, UB)
        slot = 2 * u * RB * BM + head
        lse = tl.load(lse_ptr + slot, mask=u < parts, other=float("-inf"))
        of_part = tl.load(
            partial_ptr + slot.to(tl.int64)[:, None] * BC + c[None, :], mask=(u < parts)[:, None], other=0.0
        )
        higher = tl.maximum(top, tl.max(lse, 0))
        ground = tl.where(higher == float("-inf"), 0.0, higher)
        share, fade = tl.exp2(lse - ground), tl.exp2(top - ground)
        weight = weight * fade + tl.sum(share, 0)
        z = z * fade + tl.sum(of_part * share[:, None], 0)
        top = higher
    z = z / tl.where(weight > 0, weight, 1.0) + whole
    z = z.to(out_ptr.dtype.element_ty).to(tl.float32)
    o = tl.sum(w.to(tl.float32) * z[None, :], 1)
    tl.store(out_ptr + head * V + v, o.to(out_ptr.dtype.element_ty), mask=v < V)


def merge_values(
    contexts_S: Tensor,
    cu_S1: Tensor,
    whole_THC: Tensor,
    partial: Tensor,
    lse: Tensor,
    programs: int,
    kv_b: Tensor,
    value_dim: int,
    shared: dict[str, Any],
) -> Tensor:
    """Values (1, H, V) of one token, whose latents lie in MAX_PARTS parts at most, of `programs` programs."""
    _, H, C = whole_THC.shape
    bv, pdl = min(16, triton.next_power_of_2(value_dim)), programmatic(kv_b.device)
    out_1HV = torch.empty(1, H, value_dim, dtype=kv_b.dtype, device=kv_b.device)
    _merge_values_kernel[(H * triton.cdiv(value_dim, bv),)](
        contexts_S,
        cu_S1,
        whole_THC,
        partial,
        lse,
        kv_b,
        out_1HV,
        programs,
        N=kv_b.shape[0] // H - value_dim,
        V=value_dim,
        BC=triton.next_power_of_2(max(C, 16)),
        BV=bv,
        UB=AT_ONCE,
        PDL=pdl,
        num_warps=8,
        launch_pdl=pdl,
        **shared,
    )
    return out_1HV
