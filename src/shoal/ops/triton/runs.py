"""Attention of a token over runs of positions, by group: chosen blocks, a window, every d-th; forward.

    o_t = sum_{n in runs of t} p_tn v_n     a program is a token and a group, or part of its runs

A run is `length` positions from a start, every `stride`-th; in a pack, or over the pages of a cache. Where
tokens are few a token's runs are shared out and joined (`sparse.join`).

Bound: the matrix rate for 16 rows; when decoding, the bytes of the rows. On an H200 (2026-11-24) the selected
branch of the paper's shape at 16k takes 5.2 ms forward, 132 TFLOP/s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.ops.triton.block_rows import dims, head_refusal, load_rows, sequence_of, store_rows
from shoal.ops.triton.cache import are_rows
from shoal.ops.triton.sparse import join

_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Tile:
    """Keys of a step, warps, loads in flight."""

    bn: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Plan:
    runs: Tile
    queries: Tile
    keys: Tile  # its `bn` is rows of queries; keys are a block


PORTABLE = Plan(Tile(16, 4, 2), Tile(16, 4, 2), Tile(16, 4, 2))
# Measured on an H200, 2026-11-24, the paper's shape at 16k.
HOPPER = Plan(Tile(64, 4, 2), Tile(64, 2, 2), Tile(32, 4, 2))


def choose_plan(q_THQ: Tensor) -> Plan:
    half = q_THQ.is_cuda and q_THQ.dtype != torch.float32 and q_THQ.shape[2] <= 192
    return HOPPER if half and torch.cuda.get_device_capability(q_THQ.device)[0] == 9 else PORTABLE


@triton.jit
def runs_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    starts_ptr,
    o_ptr,
    lse_ptr,
    cu_ptr,
    table_ptr,
    contexts_ptr,
    S,
    B,
    T,
    K,
    LENGTH,
    TILES,  # of a run
    PART,  # tiles of a program
    k_row,
    k_group,
    v_row,
    v_group,
    scale,  # times log2(e)
    UNIT: tl.constexpr,  # what a start counts
    STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    PAGED: tl.constexpr,
    SPLIT: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    V: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    S_PAD: tl.constexpr,
):
    REP: tl.constexpr = H // G
    group = tl.program_id(0) % G
    token = tl.program_id(0) // G
    part = tl.program_id(1)
    s = sequence_of(cu_ptr, token, S, S_PAD)
    first = tl.load(cu_ptr + s)
    position = token - first
    if PAGED:
        position += tl.load(contexts_ptr + s) - (tl.load(cu_ptr + s + 1) - first)
    r = tl.arange(0, BM)
    kept = r < REP
    row = token * H + group * REP + r
    q = load_rows(q_ptr, row, kept, D1 + D2, 0, D1, B1)
    if D2:
        q_rest = load_rows(q_ptr, row, kept, D1 + D2, D1, D2, B2)
    k_ptr += group * k_group
    v_ptr += group * v_group
    starts_ptr += (token.to(tl.int64) * G + group) * K
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    o = tl.zeros((BM, BV), tl.float32)
    for tile in range(part * PART, tl.minimum(K * TILES, part * PART + PART)):
        offset = tile % TILES * BN + tl.arange(0, BN)
        place = (tl.load(starts_ptr + tile // TILES) * UNIT).to(tl.int32) + offset * STRIDE
        there = (place >= 0) & (place <= position) & (offset < LENGTH)
        if PAGED:
            page = tl.load(table_ptr + s.to(tl.int64) * B + place // PAGE, mask=there, other=0).to(tl.int64)
            at = page * PAGE + place % PAGE
        else:
            at = (first + place).to(tl.int64)
        k = load_rows(k_ptr, at, there, k_row, 0, D1, B1)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        if D2:
            k_rest = load_rows(k_ptr, at, there, k_row, D1, D2, B2)
            scores = tl.dot(q_rest, k_rest.T, scores, input_precision=PRECISION)
        scores = tl.where(there[None, :], scores * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        ground = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores - ground[:, None])
        fade = tl.exp2(top - ground)
        total = total * fade + tl.sum(p, 1)
        v = load_rows(v_ptr, at, there, v_row, 0, V, BV)
        o = tl.dot(p.to(v.dtype), v, o * fade[:, None], input_precision=PRECISION)
        top = higher
    total = tl.where(total > 0, total, 1.0)
    lse = top + tl.log2(total)
    if SPLIT:
        row = part * T * H + row
    else:
        lse = lse * 0.6931471805599453
    store_rows(o_ptr, row, kept, V, o / total[:, None], 0, V, BV)
    tl.store(lse_ptr + row, lse, mask=kept)


def attend_runs(
    q_THQ: Tensor,
    k: Tensor,
    v: Tensor,
    strides: tuple[int, int, int, int],
    starts_TGK: Tensor,
    length: int,
    unit: int,
    stride: int,
    cu_S1: Tensor,
    table_SB: Tensor,
    contexts_S: Tensor,
    page: int,
    scale: float,
    tile: Tile,
    *,
    paged: bool,
    parts: int | None,
) -> tuple[Tensor, Tensor]:
    (T, H, Q), (_, G, K), V = q_THQ.shape, starts_TGK.shape, v.shape[-1]
    o_THV = q_THQ.new_empty(T, H, V)
    lse_TH = torch.empty(T, H, dtype=torch.float32, device=q_THQ.device)
    if not T:
        return o_THV, lse_TH
    tiles, S = triton.cdiv(length, tile.bn), cu_S1.shape[0] - 1
    if parts is None:  # enough programs for every multiprocessor, and two tiles at least for a program
        parts = max(1, min(264 // (T * G), triton.cdiv(K * tiles, 2)))
    part = max(1, triton.cdiv(K * tiles, parts))
    parts = max(1, triton.cdiv(K * tiles, part))
    into = o_THV, lse_TH
    if parts > 1:
        into = tuple(
            torch.empty(parts, *shape, dtype=torch.float32, device=q_THQ.device)
            for shape in ((T, H, V), (T, H))
        )
    runs_kernel[(T * G, parts)](
        q_THQ.contiguous(), k, v, starts_TGK.contiguous(), *into, cu_S1, table_SB, contexts_S, S,
        table_SB.shape[-1], T, K, length, tiles, part, *strides, scale * _LOG2E, UNIT=unit, STRIDE=stride,
        PAGE=page, PAGED=paged, SPLIT=parts > 1, BM=max(16, triton.next_power_of_2(H // G)), BN=tile.bn,
        S_PAD=triton.next_power_of_2(max(S, 1)), num_warps=tile.warps, num_stages=tile.stages,
        **dims(H, G, Q, V, q_THQ.dtype),
    )  # fmt: skip
    if parts > 1:
        join(*into, o_THV, lse_TH)
    return o_THV, lse_TH


def paged_runs_attention_refusal(q_THQ: Tensor, pages: Tensor, *_: Any) -> str | None:
    """Why the kernels do not take this call; None if they do."""
    if not are_rows(pages):
        return "the pages are no rows of one stride; the kernels do not copy a cache"
    return head_refusal(q_THQ, pages, pages.shape[2], pages.shape[3] - q_THQ.shape[2])


@torch.no_grad()
def paged_runs_attention(
    q_THQ: Tensor,
    pages: Tensor,
    starts_TGK: Tensor,
    length: int,
    stride: int,
    table_SB: Tensor,
    contexts_S: Tensor,
    cu_S1: Tensor,
    most: int,
    scale: float,
    *,
    parts: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `ops.api.paged_runs_attention` says. `parts` overrides in how many a token's runs are shared out."""
    row, group = pages.stride(1), pages.stride(2)
    return attend_runs(
        q_THQ, pages, pages[..., q_THQ.shape[2] :], (row, group, row, group), starts_TGK, length, 1,
        stride, cu_S1,
        table_SB.contiguous(), contexts_S, pages.shape[1], scale, choose_plan(q_THQ).runs,
        paged=True, parts=parts,
    )  # fmt: skip
