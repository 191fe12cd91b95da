"""Attention over a paged cache on a GPU: latents (absorbed MLA), or keys and values (GQA, MHA).

    o_t = sum_{j <= t} softmax_j(scale q_t k_j) v_j,   k_j and v_j in pages

Two launches a call, `split` and `merge` (`cache_splits`); with the values of latents three, of one token two
(`cache_values`). Nothing waits for the device: how the positions are shared out is decided there, from the
lengths it holds, so lengths of 0 or far below `max_context_len` cost nothing.

Bound: bytes of the cache, read once, while a key head has 16 queries (30 FLOPs a byte); the matrix rate
from 128 on. On an H200 (2026-11-24 and 29) with 16 heads 10.5 and 21.9 us at batch 1 and 4k and 32k, 86% of
4.555 TB/s at batch 32 and 32k, 81% at 128 and 4k; GQA of 32 / 8 heads 87 to 99%. Of 128 heads `cache_turns`
makes the split on Hopper, 534 TFLOP/s of 797 at 32 and 32k, 434 at 128 and 4k. Batch-invariant mode costs
nothing to 25% from batch 32 on, and 2.2 to 10 times at batch 1. `cache_plan` holds the tiles.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from shoal.ops.triton.cache import are_rows
from shoal.ops.triton.cache_plan import UNIT_POSITIONS, Plan, choose_plan, pieces
from shoal.ops.triton.cache_splits import merge_kernel, split_kernel
from shoal.ops.triton.cache_turns import LATENT, ROPE, turns_kernel
from shoal.ops.triton.cache_values import MAX_PARTS, merge_values
from shoal.ops.triton.expert_plan import num_multiprocessors
from shoal.ops.triton.latent import latent_values, latent_values_refusal
from shoal.ops.triton.narrow_rows import NARROW
from shoal.ops.triton.quantise import lacks_e4m3

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_DIM, MAX_SEQUENCES = 512, 4096
MIN_PAD = 32  # sequences that a program counts at least: fewer kernels to warm up


def _refusal(
    q_THd: Tensor, pages: Tensor, table_SB: Tensor, groups: int, value_dim: int, rest: int
) -> str | None:
    if q_THd.dtype not in DTYPES:
        return f"queries are {q_THd.dtype}; the kernels take bfloat16, float16 and float32"
    if pages.dtype == NARROW and (reason := lacks_e4m3(pages)) is not None:
        return reason
    if pages.dtype not in (q_THd.dtype, NARROW):
        return f"queries are {q_THd.dtype} but the cache is {pages.dtype}; cast one side"
    if not are_rows(pages):
        return "the pages are no rows of one stride; the kernels do not copy a cache"
    if value_dim > MAX_DIM or rest > MAX_DIM:
        return f"rows of {value_dim} + {rest} elements; a program holds at most {MAX_DIM} of each"
    if q_THd.shape[1] % groups:
        return f"{q_THd.shape[1]} query heads over {groups} key heads; they must divide"
    if table_SB.shape[0] > MAX_SEQUENCES:
        return f"{table_SB.shape[0]} sequences; a program counts at most {MAX_SEQUENCES}"
    return None


def paged_attention_refusal(q_THQ: Tensor, pages: Tensor, table_SB: Tensor, *_: Any) -> str | None:
    """Why the kernels do not take this call; None if they do."""
    return _refusal(q_THQ, pages, table_SB, pages.shape[3], q_THQ.shape[2], 0)


def latent_attention_refusal(
    q_THL: Tensor,
    pages: Tensor,
    table_SB: Tensor,
    contexts_S: Tensor,
    longest: int,
    cu_S1: Tensor,
    most: int,
    rank: int,
    scale: float,
    values: tuple[Tensor, int] | None = None,
) -> str | None:
    """Why the kernels do not take this call; None if they do."""
    refused = None if values is None else latent_values_refusal(q_THL, *values)
    return refused or _refusal(q_THL, pages, table_SB, 1, rank, q_THL.shape[2] - rank)


def _hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def turns_refusal(q_THL: Tensor, pages: Tensor, rank: int) -> str | None:
    """Why `cache_turns` does not take latents that the others do; None if it does."""
    rest = q_THL.shape[2] - rank
    if not _hopper(q_THL.device):
        return f"{q_THL.device} is no Hopper"
    if q_THL.dtype != torch.bfloat16 or pages.dtype != torch.bfloat16:
        return f"queries are {q_THL.dtype} and the cache {pages.dtype}; it takes bfloat16"
    if (rank, rest) != (LATENT, ROPE):
        return f"rows of {rank} + {rest} elements; it takes {LATENT} + {ROPE}"
    if pages.stride(1) % 8 or pages.data_ptr() % 16:
        return f"rows are {pages.stride(1)} elements apart; it reads them 8 at a time"
    return None


def _choose(
    q_THd: Tensor, pages: Tensor, S: int, longest: int, most: int, rank: int, *, latent: bool, invariant: bool
) -> Plan:
    rep = q_THd.shape[1] // (1 if latent else pages.shape[3])
    rows, sequences, far = (rep, MAX_SEQUENCES, 1 << 30) if invariant else (most * rep, S, longest)
    return choose_plan(
        rows, sequences, far, rank, q_THd.dtype, latent=latent, narrow=pages.dtype == NARROW,
        hopper=_hopper(q_THd.device), turns=latent and turns_refusal(q_THd, pages, rank) is None,
    )  # fmt: skip


def choose_latent(
    q_THL: Tensor,
    pages: Tensor,
    table_SB: Tensor,
    contexts_S: Tensor,
    longest: int,
    cu_S1: Tensor,
    most: int,
    rank: int,
    scale: float,
    values: tuple[Tensor, int] | None = None,
    *,
    invariant: bool = False,
) -> tuple[str, str]:
    """Who runs `latent_attention` ("turns" or "splits"), and a word on why."""
    plan = _choose(q_THL, pages, table_SB.shape[0], longest, most, rank, latent=True, invariant=invariant)
    mode = "batch-invariant; " if invariant else ""
    if plan.turns:
        return "turns", f"{mode}{plan.bm} rows a program, two warpgroups on Hopper"
    reason = turns_refusal(q_THL, pages, rank) or f"{plan.bm} rows a program"
    return "splits", mode + reason


def _attend(
    q_THd: Tensor,
    pages: Tensor,
    table_SB: Tensor,
    contexts_S: Tensor,
    longest: int,
    cu_S1: Tensor,
    most: int,
    rank: int,
    scale: float,
    *,
    latent: bool,
    invariant: bool,
    plan: Plan | None,
    values: tuple[Tensor, int] | None = None,
) -> Tensor:
    T, H, dim = q_THd.shape
    S, page, groups = table_SB.shape[0], pages.shape[1], 1 if latent else pages.shape[3]
    out_THC = q_THd.new_empty(T, H, rank)
    if T == 0:
        return out_THC if values is None else q_THd.new_empty(T, H, values[1])
    rep, narrow = H // groups, pages.dtype == NARROW
    plan = plan or _choose(q_THd, pages, S, longest, most, rank, latent=latent, invariant=invariant)
    if plan.turns and (reason := turns_refusal(q_THd, pages, rank)) is not None:
        raise ValueError(f"{plan} does not take this call: {reason}")
    blocks = triton.cdiv(most * rep, plan.bm)
    lanes = blocks * groups
    column = triton.next_power_of_2(max(rank, 16))
    device = q_THd.device
    multiprocessors = num_multiprocessors(device.index if q_THd.is_cuda else None)
    tiles = triton.cdiv(max(longest, 1), plan.bn)
    programs = pieces(max(1, multiprocessors * plan.resident // lanes), S, tiles)
    unit, pdl = UNIT_POSITIONS // plan.bn, _hopper(device)
    # Pieces never outnumber tiles; one piece, or fixed ones that each hold a whole sequence, need no merge.
    slots = S * triton.cdiv(tiles, unit) if invariant else 2 * programs
    partial = torch.empty(slots * lanes * plan.bm * column, dtype=torch.float32, device=device)
    lse = torch.empty(slots * lanes * plan.bm, dtype=torch.float32, device=device)
    shared = {
        "H": H,
        "REP": rep,
        "RB": blocks,
        "C": rank,
        "BM": plan.bm,
        "BN": plan.bn,
        "S_PAD": max(MIN_PAD, triton.next_power_of_2(S)),
        "FIXED": invariant,
        "UNIT": unit,
    }
    arguments = (
        q_THd.contiguous(), pages, table_SB.contiguous(), contexts_S, cu_S1, out_THC, partial, lse,
        S, table_SB.shape[1], programs, scale * math.log2(math.e),
    )  # fmt: skip
    if plan.turns:
        turns_kernel[(programs * lanes,)](
            *arguments, R=dim - rank, ROW=pages.stride(1), PAGE=page,
            launch_pdl=pdl, num_warps=plan.warps, **shared,
        )  # fmt: skip
    else:
        split_kernel[(programs * lanes,)](
            *arguments,
            R=dim - rank,
            LATENT=latent,
            NARROW=narrow,
            ROW=pages.stride(1),
            PAGE=page,
            BC=column,
            BR=triton.next_power_of_2(max(dim - rank, 16)),
            QUARTERS=narrow and rank == column and rank >= 64,
            AHEAD=plan.ahead,
            ASM=q_THd.is_cuda and q_THd.dtype == torch.bfloat16 and pdl,
            PDL=pdl,
            launch_pdl=pdl,
            PRECISION="ieee" if q_THd.dtype == torch.float32 else "tf32",
            num_warps=plan.warps,
            num_stages=plan.stages,
            **shared,
        )
    if values is not None and T == S == 1 and not invariant and min(programs, tiles) <= MAX_PARTS:
        return merge_values(contexts_S, cu_S1, out_THC, partial, lse, programs, *values, shared)
    # How many parts are added at a time, hence the order of their sum, follows from these two.
    few, many = T * H <= 256 and not invariant, T * H > 1024 and not invariant
    heads = math.gcd(rep, 1 if few else 4 if T * H <= 1024 and not invariant else 16)
    # Of many rows most lie whole: as few programs as there are rows look for their sequence, and leave.
    width = min(column, 64 if few else 512 if many else 128)
    merge_kernel[(T * H // heads, column // width)](
        contexts_S,
        cu_S1,
        out_THC,
        partial,
        lse,
        S,
        programs,
        BC=column,
        HB=heads,
        VB=width,
        UB=64 if few else 1 if many else 32 // heads,
        PDL=pdl,
        launch_pdl=pdl,
        num_warps=8 if many else 4,
        **shared,
    )
    return out_THC if values is None else latent_values(out_THC, *values, invariant=invariant)


@torch.no_grad()
def latent_attention(
    q_THL: Tensor,
    pages: Tensor,
    table_SB: Tensor,
    contexts_S: Tensor,
    longest: int,
    cu_S1: Tensor,
    most: int,
    rank: int,
    scale: float,
    values: tuple[Tensor, int] | None = None,
    *,
    invariant: bool = False,
    plan: Plan | None = None,
) -> Tensor:
    """As `ops.api.latent_attention` says. `plan` overrides the choice of tiles."""
    where = (table_SB, contexts_S, longest, cu_S1, most)
    return _attend(
        q_THL, pages, *where, rank, scale, latent=True, invariant=invariant, plan=plan, values=values
    )


@torch.no_grad()
def paged_attention(
    q_THQ: Tensor,
    pages: Tensor,
    table_SB: Tensor,
    contexts_S: Tensor,
    longest: int,
    cu_S1: Tensor,
    most: int,
    scale: float,
    *,
    invariant: bool = False,
    plan: Plan | None = None,
) -> Tensor:
    """As `ops.api.paged_attention` says. `plan` overrides the choice of tiles."""
    where = (table_SB, contexts_S, longest, cu_S1, most)
    rank = q_THQ.shape[2]
    return _attend(q_THQ, pages, *where, rank, scale, latent=False, invariant=invariant, plan=plan)
