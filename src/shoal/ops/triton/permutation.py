"""The permutation of the routed experts: choices grouped by expert, without a word from the host.

Each expert's choices take whole tiles of `tile` slots, in token order, so the place of a choice depends on
nothing but the choices (no atomics) and a tile is one expert's. Slots left over in an expert's last tile
hold -1. The host knows only an upper bound on the number of tiles; the device counts them.

    slots    | e0 e0 e0 -1 | e2 e2 e2 e2 | e2 -1 -1 -1 |        tile = 4, expert 1 has no rows
    experts        0             2             2                first_tile = 0 1 1 3

Up to 2048 choices it is one launch, where a program an expert counts all choices, then keeps its own by a
prefix sum. Above, three launches: a histogram of each segment, the start of each expert in each, and
placement by segment and expert, which reads E * M choices from L2. `gather_rows` reads each row once and
writes it K times (in order of slots it would read it K times, and x is larger than L2); `sum_choices` reads
the K rows of a token and writes one. Both are bound by bytes. On an H200 (2026-11-22) grouping takes 2 to 4
us up to 1024 choices, 6 at 2048, and 23 at 98k for 64 experts, 80 at 131k for 256.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.ops.triton.launch import programmatic, wait_for_previous

ONE_LAUNCH = ((128, 1), (512, 4), (1024, 4), (2048, 8))  # choices a program holds, and its warps
MIN_SEGMENT, MAX_SEGMENTS = 1024, 32
AT_ONCE = tl.constexpr(8)


@dataclass(frozen=True, eq=False)
class Groups:
    """Where each choice stands. A choice is t * K + k; there are at most P slots, in N tiles."""

    choices_P: Tensor  # int32: the choice in each slot, -1 in padding; undefined past the last tile
    slots_M: Tensor  # int32: the slot of each choice; undefined if it was dropped
    experts_N: Tensor  # int32: the expert of each tile
    first_tile_E1: Tensor  # int32: the first tile of each expert, then the number of tiles
    tile: int  # slots of a tile

    @property
    def max_tiles(self) -> int:
        return self.experts_N.shape[0]

    @property
    def n_experts(self) -> int:
        return self.first_tile_E1.shape[0] - 1


@triton.jit
def _histogram(expert, E: tl.constexpr, E_PAD: tl.constexpr):
    return tl.histogram(tl.maximum(expert, 0), E_PAD, mask=(expert >= 0) & (expert < E))


@triton.jit
def _write_tiles(
    choices_ptr,
    tile_experts_ptr,
    first_tile_ptr,
    counts,
    mine,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    TILE: tl.constexpr,
):
    """Claim the tiles of expert `mine`, clear their padding, and return its first slot."""
    expert = tl.arange(0, E_PAD)
    first_tile = tl.sum(tl.where(expert < mine, (counts + TILE - 1) // TILE, 0))
    count = tl.sum(tl.where(expert == mine, counts, 0))
    tiles = (count + TILE - 1) // TILE
    tl.store(first_tile_ptr + mine, first_tile)
    if mine == E - 1:
        tl.store(first_tile_ptr + E, first_tile + tiles)
    for tile in range(tiles):
        tl.store(tile_experts_ptr + first_tile + tile, mine)
    rest = count + tl.arange(0, TILE)
    nothing = tl.full((TILE,), -1, tl.int32)
    tl.store(choices_ptr + first_tile * TILE + rest, nothing, mask=rest < tiles * TILE)
    return first_tile * TILE


@triton.jit(do_not_specialize=["M"])
def _group_kernel(
    experts_ptr,
    choices_ptr,
    slots_ptr,
    tile_experts_ptr,
    first_tile_ptr,
    M,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program e counts the choices of every expert and places those of e; all of them fit one BLOCK."""
    wait_for_previous(PDL)
    mine, at = tl.program_id(0), tl.arange(0, BLOCK)
    expert = tl.load(experts_ptr + at, mask=at < M, other=-1).to(tl.int32)
    counts = _histogram(expert, E, E_PAD)
    start = _write_tiles(choices_ptr, tile_experts_ptr, first_tile_ptr, counts, mine, E, E_PAD, TILE)
    chosen = expert == mine
    slot = start + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(choices_ptr + slot, at, mask=chosen)
    tl.store(slots_ptr + at, slot, mask=chosen)


@triton.jit(do_not_specialize=["M", "size"])
def _count_kernel(
    experts_ptr,
    counts_ptr,
    M,
    size,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    segment = tl.program_id(0)
    last = tl.minimum((segment + 1) * size, M)
    counts = tl.zeros((E_PAD,), tl.int32)
    for block in range(segment * size, last, BLOCK):
        at = block + tl.arange(0, BLOCK)
        counts += _histogram(tl.load(experts_ptr + at, mask=at < last, other=-1).to(tl.int32), E, E_PAD)
    tl.store(counts_ptr + segment * E_PAD + tl.arange(0, E_PAD), counts)


@triton.jit(do_not_specialize=["segments"])
def _start_kernel(
    counts_ptr,
    starts_ptr,
    choices_ptr,
    tile_experts_ptr,
    first_tile_ptr,
    segments,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    TILE: tl.constexpr,
    MAX_SEGMENTS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    mine = tl.program_id(0)
    segment, expert = tl.arange(0, MAX_SEGMENTS), tl.arange(0, E_PAD)
    at = segment[:, None] * E_PAD + expert[None, :]
    counts = tl.load(counts_ptr + at, mask=(segment < segments)[:, None], other=0)
    start = _write_tiles(
        choices_ptr, tile_experts_ptr, first_tile_ptr, tl.sum(counts, 0), mine, E, E_PAD, TILE
    )
    ours = tl.sum(tl.where((expert == mine)[None, :], counts, 0), 1)
    tl.store(starts_ptr + segment * E_PAD + mine, start + tl.cumsum(ours, 0) - ours)


@triton.jit(do_not_specialize=["M", "size"])
def _place_kernel(
    experts_ptr,
    starts_ptr,
    choices_ptr,
    slots_ptr,
    M,
    size,
    E_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    mine, segment = tl.program_id(0), tl.program_id(1)
    start = tl.load(starts_ptr + segment * E_PAD + mine)
    last = tl.minimum((segment + 1) * size, M)
    for block in range(segment * size, last, BLOCK):
        at = block + tl.arange(0, BLOCK)
        chosen = tl.load(experts_ptr + at, mask=at < last, other=-1) == mine
        slot = start + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(choices_ptr + slot, at, mask=chosen)
        tl.store(slots_ptr + at, slot, mask=chosen)
        start += tl.sum(chosen.to(tl.int32), 0)


def group_by_expert(experts_TK: Tensor, n_experts: int, tile: int, *, pdl: bool = False) -> Groups:
    """Tiles of `tile` slots, each of one expert. Choices of -1 stand nowhere.

    `pdl`: each launch is set up while the one before it runs (`launch`).
    """
    M, device = experts_TK.numel(), experts_TK.device
    max_tiles = max(1, min(M, M // tile + n_experts))
    sizes = (max_tiles * tile, M, max_tiles, n_experts + 1)
    groups = Groups(*(torch.empty(size, dtype=torch.int32, device=device) for size in sizes), tile=tile)
    tiles = (groups.experts_N, groups.first_tile_E1)
    shape = {"E": n_experts, "E_PAD": max(32, triton.next_power_of_2(n_experts)), "PDL": pdl}
    fitting = [(block, warps) for block, warps in ONE_LAUNCH if block >= M]
    if fitting:
        block, warps = fitting[0]
        _group_kernel[(n_experts,)](
            experts_TK,
            groups.choices_P,
            groups.slots_M,
            *tiles,
            M,
            TILE=tile,
            BLOCK=block,
            num_warps=warps,
            launch_pdl=pdl,
            **shape,
        )
        return groups
    size = max(MIN_SEGMENT, triton.next_power_of_2(triton.cdiv(M, MAX_SEGMENTS)))
    segments = triton.cdiv(M, size)
    counts, starts = torch.empty(2, MAX_SEGMENTS * shape["E_PAD"], dtype=torch.int32, device=device)
    _count_kernel[(segments,)](experts_TK, counts, M, size, BLOCK=MIN_SEGMENT, launch_pdl=pdl, **shape)
    _start_kernel[(n_experts,)](
        counts,
        starts,
        groups.choices_P,
        *tiles,
        segments,
        TILE=tile,
        MAX_SEGMENTS=MAX_SEGMENTS,
        launch_pdl=pdl,
        **shape,
    )
    _place_kernel[(n_experts, segments)](
        experts_TK,
        starts,
        groups.choices_P,
        groups.slots_M,
        M,
        size,
        E_PAD=shape["E_PAD"],
        BLOCK=MIN_SEGMENT,
        PDL=pdl,
        launch_pdl=pdl,
    )
    return groups


@triton.jit(do_not_specialize=["T"])
def _gather_kernel(
    x_ptr,
    out_ptr,
    experts_ptr,
    slots_ptr,
    choices_ptr,
    first_tile_ptr,
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program t < T copies row t to its K slots; program T + n clears the padding of tile n."""
    column = tl.arange(0, BLOCK)
    if tl.program_id(0) < T:
        token = tl.program_id(0).to(tl.int64)
        x = tl.load(x_ptr + token * D + column, mask=column < D, other=0.0)
        for k in tl.static_range(K):
            kept = tl.load(experts_ptr + token * K + k) >= 0
            slot = tl.load(slots_ptr + token * K + k).to(tl.int64)
            tl.store(out_ptr + slot * D + column, x, mask=(column < D) & kept)
    else:
        tile = (tl.program_id(0) - T).to(tl.int64)
        if tile < tl.load(first_tile_ptr + E):
            slot = tile * TILE + tl.arange(0, TILE)
            padding = tl.load(choices_ptr + slot) < 0
            if tl.max(padding.to(tl.int32), 0) > 0:
                for first in range(0, D, 128):
                    c = first + tl.arange(0, 128)
                    zeros = tl.zeros((TILE, 128), out_ptr.dtype.element_ty)
                    at = slot[:, None] * D + c[None, :]
                    tl.store(out_ptr + at, zeros, mask=padding[:, None] & (c < D)[None, :])


def gather_rows(x_TD: Tensor, experts_TK: Tensor, groups: Groups) -> Tensor:
    """The rows of the tokens in slot order (P, D), zeros in padding."""
    T, D = x_TD.shape
    out_PD = x_TD.new_empty(groups.choices_P.shape[0], D)
    _gather_kernel[(T + groups.max_tiles,)](
        x_TD,
        out_PD,
        experts_TK,
        groups.slots_M,
        groups.choices_P,
        groups.first_tile_E1,
        T,
        E=groups.n_experts,
        K=experts_TK.shape[1],
        D=D,
        TILE=groups.tile,
        BLOCK=triton.next_power_of_2(D),
        num_warps=8 if D > 2048 else 4,
    )
    return out_PD


@triton.jit
def sum_row(
    rows_ptr,
    experts_ptr,
    weights_ptr,
    shared_ptr,
    token,
    T,
    column,
    inside,
    dtype: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Columns of tokens' choices, weighted and added, in float32 and not cast where nothing is SHARED.

    Up to AT_ONCE choices and parts are on their way together: a compiler that saves registers would else wait
    for some before it asks for the next.
    """
    total = tl.where(inside, 0.0, 0.0)
    dense = tl.where(inside, 0.0, 0.0)
    for first in tl.static_range(0, max(K, SHARED), AT_ONCE):
        rows = ()
        for k in tl.static_range(first, min(first + AT_ONCE, K)):
            at = (token * K + k) * D + column
            rows = rows + (tl.load(rows_ptr + at, mask=inside, other=0.0),)  # noqa: RUF005
        parts = ()
        for part in tl.static_range(first, min(first + AT_ONCE, SHARED)):
            at = (part * T + token) * D + column
            parts = parts + (tl.load(shared_ptr + at, mask=inside, other=0.0),)  # noqa: RUF005
        tl.debug_barrier()
        for k in tl.static_range(first, min(first + AT_ONCE, K)):
            choice = token * K + k
            row = rows[k - first].to(tl.float32)
            if WEIGHTED:
                row *= tl.load(weights_ptr + choice, mask=token < T, other=0.0)
            # The row of a dropped choice was never written; no load waits to know which it is.
            total += tl.where(tl.load(experts_ptr + choice, mask=token < T, other=-1) >= 0, row, 0.0)
        for part in tl.static_range(first, min(first + AT_ONCE, SHARED)):
            dense += parts[part - first].to(tl.float32)
    if SHARED:  # what the layer adds is a row of the output's dtype, and so is what it is added to
        total = total.to(dtype).to(tl.float32) + dense.to(dtype).to(tl.float32)
    return total


@triton.jit
def _sum_kernel(
    rows_ptr,
    experts_ptr,
    weights_ptr,
    out_ptr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PDL: tl.constexpr,
    shared_ptr=None,
    SHARED: tl.constexpr = 0,
):
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = sum_row(
        rows_ptr, experts_ptr, weights_ptr, shared_ptr, token, tl.num_programs(0), column, column < D,
        out_ptr.dtype.element_ty, K, D, WEIGHTED, SHARED,
    )  # fmt: skip
    tl.store(out_ptr + token * D + column, total, mask=column < D)


def sum_choices(
    rows_MD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor | None,
    *,
    shared_STD: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """The K rows of each token, weighted if weights are given, added in float32 and cast once: (T, D).

    With `shared_STD` their sum over S, added in float32 and cast, is then added. Rows of dropped choices
    count nothing. The order of the sum is k = 0, 1, ..., whatever the batch.
    """
    T, K = experts_TK.shape
    D = rows_MD.shape[1]
    out_TD = rows_MD.new_empty(T, D)
    block = min(1024, triton.next_power_of_2(D))
    _sum_kernel[(T, triton.cdiv(D, block))](
        rows_MD,
        experts_TK,
        weights_TK,
        out_TD,
        K=K,
        D=D,
        BLOCK=block,
        WEIGHTED=weights_TK is not None,
        PDL=pdl,
        shared_ptr=shared_STD,
        SHARED=0 if shared_STD is None else shared_STD.shape[0],
        launch_pdl=pdl,
    )
    return out_TD


def close(rows_MD: Tensor, experts_TK: Tensor, weights_TK: Tensor, dense_STD: Tensor) -> Tensor:
    """The rows that a mixture left open, as `ops.api.close` says."""
    pdl = programmatic(rows_MD.device)
    return sum_choices(rows_MD, experts_TK, weights_TK, shared_STD=dense_STD, pdl=pdl)
