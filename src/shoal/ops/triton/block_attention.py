"""Attention over the blocks that each token names, with gradients.

    dq_t = scale sum_{n in blocks of t} ds_tn k_n                 queries: a program is a token and a group
    dk_n = scale sum_{t that chose n} ds_tn q_t, dv alike         keys: a block, and a part of its list

Forward (`runs`) and dq walk a token's own list. For dk and dv the lists are turned round: a stable sort of
all choices by block gives each block its tokens in order, cut into items of at most ITEM tokens so that the
first block, which everyone reads, is no tail; items are added up in order, nothing atomically.

Bound: the matrix rate for the 16 rows of a group. benchmarks/kernels/blocks.py holds all three branches
together against full attention.
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

from shoal.ops.triton.block_rows import dims, head_refusal, load_rows, sequence_of, store_rows
from shoal.ops.triton.flash import delta_kernel
from shoal.ops.triton.runs import Plan, attend_runs, choose_plan

ITEM = 2048  # tokens of a program that makes dk and dv
_LOG2E = math.log2(math.e)


@triton.jit
def queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    blocks_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    cu_ptr,
    S,
    K,
    TILES,
    scale,  # times log2(e)
    SIZE: tl.constexpr,
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
    """dq of the heads of a group, over the blocks that they read."""
    REP: tl.constexpr = H // G
    group = tl.program_id(0) % G
    token = tl.program_id(0) // G
    first = tl.load(cu_ptr + sequence_of(cu_ptr, token, S, S_PAD))
    position = token - first
    r = tl.arange(0, BM)
    kept = r < REP
    row = token * H + group * REP + r
    q = load_rows(q_ptr, row, kept, D1 + D2, 0, D1, B1)
    if D2:
        q_rest = load_rows(q_ptr, row, kept, D1 + D2, D1, D2, B2)
    do = load_rows(do_ptr, row, kept, V, 0, V, BV)
    lse = tl.load(lse_ptr + row, mask=kept, other=0.0) * 1.4426950408889634
    delta = tl.load(delta_ptr + row, mask=kept, other=0.0)
    dq = tl.zeros((BM, B1), tl.float32)
    dq_rest = tl.zeros((BM, B2), tl.float32)
    blocks_ptr += (token.to(tl.int64) * G + group) * K
    for tile in range(K * TILES):
        offset = tile % TILES * BN + tl.arange(0, BN)
        place = (tl.load(blocks_ptr + tile // TILES) * SIZE).to(tl.int32) + offset
        there = (place >= 0) & (place <= position) & (offset < SIZE)
        at = (first + place) * G + group
        k = load_rows(k_ptr, at, there, D1 + D2, 0, D1, B1)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        if D2:
            k_rest = load_rows(k_ptr, at, there, D1 + D2, D1, D2, B2)
            scores = tl.dot(q_rest, k_rest.T, scores, input_precision=PRECISION)
        v = load_rows(v_ptr, at, there, V, 0, V, BV)
        p = tl.where(there[None, :], tl.exp2(scores * scale - lse[:, None]), 0.0)
        dp = tl.dot(do, v.T, input_precision=PRECISION)
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        if D2:
            dq_rest = tl.dot(ds, k_rest, dq_rest, input_precision=PRECISION)
    nat = scale * 0.6931471805599453
    store_rows(dq_ptr, row, kept, D1 + D2, dq * nat, 0, D1, B1)
    if D2:
        store_rows(dq_ptr + D1, row, kept, D1 + D2, dq_rest * nat, 0, D2, B2)


@triton.jit
def keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    list_ptr,
    bounds_ptr,
    items_ptr,
    first_ptr,
    partial_ptr,
    cu_ptr,
    cu_blocks_ptr,
    S,
    CHOICES,  # groups times choices: a place in the lists over it is a token
    BLOCKS,  # of all sequences
    scale,  # times log2(e)
    SIZE: tl.constexpr,
    ITEM: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    V: tl.constexpr,
    B1: tl.constexpr,
    B2: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,  # heads of a group, padded
    BT: tl.constexpr,  # tokens
    BK: tl.constexpr,  # keys of a block, padded
    S_PAD: tl.constexpr,
):
    """dk and dv of one block and group over an item of its list, in float32."""
    REP: tl.constexpr = H // G
    item = tl.program_id(0)
    which = tl.load(items_ptr + item)  # group, then block; past the last one: none
    if which < G * BLOCKS:
        group, block = which // BLOCKS, which % BLOCKS
        s = sequence_of(cu_blocks_ptr, block, S, S_PAD)
        first = tl.load(cu_ptr + s)
        n = tl.load(cu_ptr + s + 1) - first
        j = tl.arange(0, BK)
        place = (block - tl.load(cu_blocks_ptr + s)) * SIZE + j
        there = (place < n) & (j < SIZE)
        at = (first + place) * G + group
        k = load_rows(k_ptr, at, there, D1 + D2, 0, D1, B1)
        if D2:
            k_rest = load_rows(k_ptr, at, there, D1 + D2, D1, D2, B2)
        v = load_rows(v_ptr, at, there, V, 0, V, BV)
        dk = tl.zeros((BK, B1), tl.float32)
        dk_rest = tl.zeros((BK, B2), tl.float32)
        dv = tl.zeros((BK, BV), tl.float32)
        begin = tl.load(bounds_ptr + which) + (item - tl.load(first_ptr + which)) * ITEM
        end = tl.minimum(tl.load(bounds_ptr + which + 1), begin + ITEM)
        m = tl.arange(0, BT * BR)
        r = m % BR
        for start in range(begin, end, BT):
            here = start + m // BR
            listed = (here < end) & (r < REP)
            token = (tl.load(list_ptr + here, mask=listed, other=0) // CHOICES).to(tl.int32)
            row = token * H + group * REP + r
            q = load_rows(q_ptr, row, listed, D1 + D2, 0, D1, B1)
            do = load_rows(do_ptr, row, listed, V, 0, V, BV)
            lse = tl.load(lse_ptr + row, mask=listed, other=0.0) * 1.4426950408889634
            delta = tl.load(delta_ptr + row, mask=listed, other=0.0)
            scores = tl.dot(k, q.T, input_precision=PRECISION)
            if D2:
                q_rest = load_rows(q_ptr, row, listed, D1 + D2, D1, D2, B2)
                scores = tl.dot(k_rest, q_rest.T, scores, input_precision=PRECISION)
            sees = there[:, None] & listed[None, :] & (place[:, None] <= (token - first)[None, :])
            p = tl.where(sees, tl.exp2(scores * scale - lse[None, :]), 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            dp = tl.dot(v, do.T, input_precision=PRECISION)
            ds = (p * (dp - delta[None, :])).to(q.dtype)
            dk = tl.dot(ds, q, dk, input_precision=PRECISION)
            if D2:
                dk_rest = tl.dot(ds, q_rest, dk_rest, input_precision=PRECISION)
        nat = scale * 0.6931471805599453
        to, kept = item * BK + j, j < SIZE
        store_rows(partial_ptr, to, kept, D1 + D2 + V, dk * nat, 0, D1, B1)
        if D2:
            store_rows(partial_ptr + D1, to, kept, D1 + D2 + V, dk_rest * nat, 0, D2, B2)
        store_rows(partial_ptr + D1 + D2, to, kept, D1 + D2 + V, dv, 0, V, BV)


@triton.jit
def sum_kernel(
    partial_ptr,
    bounds_ptr,
    first_ptr,
    dk_ptr,
    dv_ptr,
    cu_ptr,
    cu_blocks_ptr,
    S,
    BLOCKS,
    SIZE: tl.constexpr,
    ITEM: tl.constexpr,
    G: tl.constexpr,
    Q: tl.constexpr,
    V: tl.constexpr,
    BX: tl.constexpr,
    BK: tl.constexpr,
    S_PAD: tl.constexpr,
):
    """Add the items of a block and group, in order: (rows, Q) of dk and (rows, V) of dv."""
    which = tl.program_id(0)
    group, block = which // BLOCKS, which % BLOCKS
    s = sequence_of(cu_blocks_ptr, block, S, S_PAD)
    if s < S:
        first = tl.load(cu_ptr + s)
        n = tl.load(cu_ptr + s + 1) - first
        j, x = tl.arange(0, BK), tl.program_id(1) * BX + tl.arange(0, BX)
        place = (block - tl.load(cu_blocks_ptr + s)) * SIZE + j
        kept = (place < n) & (j < SIZE)
        mask = kept[:, None] & (x < Q + V)[None, :]
        item = tl.load(first_ptr + which).to(tl.int64)
        count = (tl.load(bounds_ptr + which + 1) - tl.load(bounds_ptr + which) + ITEM - 1) // ITEM
        total = tl.zeros((BK, BX), tl.float32)
        for part in range(count):
            at = (item + part) * BK + j
            total += tl.load(partial_ptr + at[:, None] * (Q + V) + x[None, :], mask=mask, other=0.0)
        at = ((first + place) * G + group).to(tl.int64)[:, None]
        total = total.to(dk_ptr.dtype.element_ty)
        tl.store(dk_ptr + at * Q + x[None, :], total, mask=mask & (x < Q)[None, :])
        tl.store(dv_ptr + at * V + x[None, :] - Q, total, mask=mask & (x >= Q)[None, :])


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        blocks_TGK: Tensor,
        cu_S1: Tensor,
        most: int,
        block: int,
        scale: float,
        plan: Plan,
    ) -> Tensor:
        G, Q, V = *k.shape[1:], v.shape[2]
        o_THV, lse_TH = attend_runs(
            q, k, v, (G * Q, Q, G * V, V), blocks_TGK, block, block, 1, cu_S1, cu_S1, cu_S1, 1, scale,
            plan.runs, paged=False, parts=1,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, blocks_TGK, o_THV, lse_TH, cu_S1)
        ctx.how = (block, scale, plan)
        return o_THV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_THV: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, blocks_TGK, o_THV, lse_TH, cu_S1 = ctx.saved_tensors
        block, scale, plan = ctx.how
        (T, H, Q), (_, G, K), V = q.shape, blocks_TGK.shape, v.shape[2]
        do_THV, dq = do_THV.contiguous(), torch.empty_like(q)
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        words, S, rows = dims(H, G, Q, V, q.dtype), cu_S1.shape[0] - 1, lse_TH.numel()
        pad, log2 = triton.next_power_of_2(max(S, 1)), scale * _LOG2E
        delta_TH = torch.empty_like(lse_TH)
        delta_kernel[(triton.cdiv(rows, 16),)](o_THV, do_THV, delta_TH, rows, V=V, BV=words["BV"], ROWS=16)
        tile, rep = plan.queries, triton.next_power_of_2(H // G)
        queries_kernel[(T * G,)](
            q, k, v, blocks_TGK, do_THV, lse_TH, delta_TH, dq, cu_S1, S, K, triton.cdiv(block, tile.bn), log2,
            SIZE=block, BM=max(16, rep), BN=tile.bn, S_PAD=pad, num_warps=tile.warps, num_stages=tile.stages,
            **words,
        )  # fmt: skip
        lists = _turned(blocks_TGK, cu_S1, block)
        tile, size = plan.keys, triton.next_power_of_2(max(block, 16))
        items = lists.items.shape[0]
        partial = torch.empty(items, size, Q + V, dtype=torch.float32, device=q.device)
        keys_kernel[(items,)](
            q, k, v, do_THV, lse_TH, delta_TH, lists.order, lists.bounds, lists.items, lists.first, partial,
            cu_S1, lists.cu_blocks, S, G * K, lists.blocks, log2, SIZE=block, ITEM=ITEM, BR=rep,
            BT=max(1, tile.bn // rep), BK=size, S_PAD=pad, num_warps=tile.warps,
            num_stages=tile.stages, **words,
        )  # fmt: skip
        sum_kernel[(G * lists.blocks, triton.cdiv(Q + V, 64))](
            partial, lists.bounds, lists.first, dk, dv, cu_S1, lists.cu_blocks, S, lists.blocks, SIZE=block,
            ITEM=ITEM, G=G, Q=Q, V=V, BX=64, BK=size, S_PAD=pad,
        )  # fmt: skip
        return dq, dk, dv, *(None for _ in range(6))


@dataclass(frozen=True)
class _Lists:
    """Who chose each block of each group: (group, block) is `which`, blocks of all sequences end to end."""

    order: Tensor  # places of choices (T, G, K), by which, then token
    bounds: Tensor  # of each which in it
    first: Tensor  # its first item
    items: Tensor  # the which of each item; one more than there are past the last
    cu_blocks: Tensor  # of sequences
    blocks: int


def _turned(blocks_TGK: Tensor, cu_S1: Tensor, block: int) -> _Lists:
    T, G, K = blocks_TGK.shape
    device, lengths_S = cu_S1.device, cu_S1.diff()
    blocks = T // block + len(lengths_S)  # at most
    cu_blocks = torch.nn.functional.pad(((lengths_S + block - 1) // block).cumsum(0), (1, 0)).int()
    sequence_T = torch.arange(len(lengths_S), device=device).repeat_interleave(lengths_S, output_size=T)
    which = blocks_TGK + cu_blocks[sequence_T].view(-1, 1, 1)
    which = which + torch.arange(G, device=device).view(1, -1, 1) * blocks
    which = which.masked_fill(blocks_TGK < 0, G * blocks).int().flatten()
    sorted_, order = which.sort(stable=True)
    every = torch.arange(G * blocks + 1, device=device, dtype=torch.int32)
    bounds = torch.searchsorted(sorted_, every).int()
    ends = ((bounds.diff() + ITEM - 1) // ITEM).cumsum(0)
    most = G * blocks + T * G * K // ITEM
    items = torch.searchsorted(ends, torch.arange(most, device=device), right=True).int()
    first = torch.nn.functional.pad(ends, (1, 0))[:-1].int()
    return _Lists(order, bounds, first, items, cu_blocks, blocks)


def block_attention_refusal(q_THQ: Tensor, k_TGQ: Tensor, v_TGV: Tensor, *_: Any) -> str | None:
    """Why the kernels do not take this call; None if they do."""
    if v_TGV.dtype != q_THQ.dtype:
        return f"q is {q_THQ.dtype} and v {v_TGV.dtype}; cast one"
    return head_refusal(q_THQ, k_TGQ, k_TGQ.shape[1], v_TGV.shape[2])


def block_attention(
    q_THQ: Tensor,
    k_TGQ: Tensor,
    v_TGV: Tensor,
    blocks_TGK: Tensor,
    cu_S1: Tensor,
    most: int,
    block: int,
    scale: float,
    *,
    plan: Plan | None = None,
) -> Tensor:
    """As `ops.api.block_attention` says. `plan` forces the tiles."""
    q, k, v = q_THQ.contiguous(), k_TGQ.contiguous(), v_TGV.contiguous()
    if not q.shape[0]:
        return q.new_empty(0, q.shape[1], v.shape[2]) + 0 * (q.sum() + k.sum() + v.sum())
    where = blocks_TGK.contiguous(), cu_S1, most, block, scale
    return _BlockAttention.apply(q, k, v, *where, plan or choose_plan(q))
