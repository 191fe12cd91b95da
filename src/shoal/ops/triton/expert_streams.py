"""Products over grouped rows, for few rows: the weights of the chosen experts stream past a handful of rows.

    h = silu(g) u, [g u]^T = [gate up]_e x_t^T        swiglu_stream
    y^T = down_e h^T                                  stream

With M rows spread over E experts and M / E of a few dozen at most, every byte of the chosen experts must be
read once and little else matters. So the weight is the tall operand: its BN x BK block goes by TMA to shared
memory and from there into the tensor core (A of wgmma), and the rows, padded to BM of 16 to 64, are its
narrow side (B), which costs no more than the load it hides behind. Programs are small, two or more to an SM,
so that the loads of one cover the start and the end of another. The grid is (columns, tiles of rows): the
tiles of one expert come together.

Bound: bytes. On an H200 (2026-11-22) the whole layer reaches, of 4.555 TB/s on the chosen experts, 73% at 1
token and 82 to 93% from 2 to 256 for V2-Lite, and 90 to 96% from 1 to 128 for a slice of V3. At 1 token it
is the launches that cost: 8 of 31 us.

SHARED: the shared experts of the layer ride along. They are one dense MLP, S times as wide as a routed
expert, which every token takes: S more experts whose tiles come first. Each writes its part of the sum over
the S F hidden elements in float32, and `sum_choices` adds the parts. Whoever chose has read x, so these tiles
need not wait for the choice: they do so only before they write, where memory may have been somebody's.

SCAN: up to MAX_SCAN choices need no permutation. The program of choice c reads all choices, and the first of
each BM choices of an expert takes them all; the others leave at once. One launch less. Rows of h are then in
choice order. Those of one token are of different experts: each program has its own, and reads no other
(SCAN 1).
"""

from __future__ import annotations

import triton
import triton.language as tl

from shoal.ops.triton.expert_products import load_choices, load_weight
from shoal.ops.triton.launch import let_next_in, wait, wait_for_previous

MAX_SCAN = 64


@triton.jit
def _claim(experts_ptr, mine, M, BM: tl.constexpr, SCAN: tl.constexpr):
    """The expert of choice `mine` and the choices (BM, -1 beyond) it leads; expert -1 if it leads none."""
    at = tl.arange(0, SCAN)
    expert = tl.load(experts_ptr + mine, cache_modifier=".cg").to(tl.int32)
    same = tl.load(experts_ptr + at, mask=at < M, other=-1, cache_modifier=".cg").to(tl.int32) == expert
    rank = tl.cumsum(same.to(tl.int32), 0) - 1
    ahead = tl.sum((same & (at < mine)).to(tl.int32), 0)
    hit = same[None, :] & (rank[None, :] == ahead + tl.arange(0, BM)[:, None])
    choice = tl.max(tl.where(hit, at[None, :], -1), 1)
    return tl.where(ahead % BM == 0, expert, -1), choice


@triton.jit
def find_rows(
    experts_ptr,
    choices_ptr,
    tile_experts_ptr,
    first_tile_ptr,
    M,
    tile,
    E: tl.constexpr,
    BM: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Expert (-1: nothing to do), choices and rows of h of a tile. Past the L1, for who has not waited."""
    if SCAN == 1:
        expert = tl.load(experts_ptr + tile, cache_modifier=".cg").to(tl.int32)
        choice = tl.where(tl.arange(0, BM) == 0, tile, -1)
        row = choice
    elif SCAN:
        expert, choice = _claim(experts_ptr, tile, M, BM, SCAN)
        row = choice
    else:
        # Past the last tile nothing was written, but no load waits to know where that is.
        exists = tile < tl.load(first_tile_ptr + E, cache_modifier=".cg")
        expert = tl.load(tile_experts_ptr + tile, cache_modifier=".cg")
        row = tile * BM + tl.arange(0, BM)
        choice = tl.load(choices_ptr + row, cache_modifier=".cg")
        expert, choice = tl.where(exists, expert, -1), tl.where(exists, choice, -1)
    return expert, choice, row


@triton.jit
def _swiglu_tile(
    x_ptr,
    gate_w,
    up_w,
    h_ptr,
    expert,
    token,
    kept,
    row,
    gate_row,
    up_row,
    first,
    h_stride: tl.constexpr,
    ROWS: tl.constexpr,  # of the matrices
    D: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    LATE: tl.constexpr,  # to wait for the kernel before as late as this writes
    PRECISION: tl.constexpr,
):
    """Columns `first` to `first` + BN of h, for the tokens of a tile."""
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    gate = tl.zeros((BN, BM), tl.float32)
    up = tl.zeros((BN, BM), tl.float32)
    for k in range(0, D, BK):
        x = load_choices(x_ptr, token, kept, k, D, BK).T
        gate = tl.dot(
            load_weight(gate_w, expert, gate_row + first, k, ROWS, D, BN, BK, TMA),
            x,
            gate,
            input_precision=PRECISION,
        )
        up = tl.dot(
            load_weight(up_w, expert, up_row + first, k, ROWS, D, BN, BK, TMA),
            x,
            up,
            input_precision=PRECISION,
        )
    wait(LATE)
    gate = gate.to(dtype).to(tl.float32)
    h = gate * tl.sigmoid(gate) * up.to(dtype).to(tl.float32)
    column = first + tl.arange(0, BN)
    at = row.to(tl.int64)[None, :] * h_stride + column[:, None]
    tl.store(h_ptr + at, h.to(dtype), mask=kept[None, :] & (column < F)[:, None])


@triton.jit(do_not_specialize=["M", "T"])
def swiglu_stream_kernel(
    x_ptr,
    w,
    shared_gate,
    shared_up,
    h_ptr,
    shared_h_ptr,
    experts_ptr,
    choices_ptr,
    tile_experts_ptr,
    first_tile_ptr,
    M,
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SCAN: tl.constexpr,
    SHARED: tl.constexpr,  # how many times a routed expert the shared ones are; 0: there are none here
    TMA: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first = tl.program_id(0) * BN
    tile = tl.program_id(1)
    mine = True
    if SHARED:
        ahead = (T + BM - 1) // BM * SHARED
        mine = tile >= ahead
        if not mine:
            let_next_in(PDL)
            token = tile // SHARED * BM + tl.arange(0, BM)
            start = tile % SHARED * F
            _swiglu_tile(
                x_ptr, shared_gate, shared_up, shared_h_ptr + start, tl.program_id(0) * 0, token, token < T,
                token, start, start, first, SHARED * F, SHARED * F, D, F, BM, BN, BK, TMA, PDL, PRECISION,
            )  # fmt: skip
        tile -= ahead
    if mine:
        wait_for_previous(PDL)
        expert, choice, row = find_rows(
            experts_ptr, choices_ptr, tile_experts_ptr, first_tile_ptr, M, tile, E, BM, SCAN
        )
        if expert >= 0:
            _swiglu_tile(
                x_ptr, w, w, h_ptr, expert, choice // K, choice >= 0, row, 0, F, first,
                F, 2 * F, D, F, BM, BN, BK, TMA, False, PRECISION,
            )  # fmt: skip


@triton.jit
def _down_tile(
    h_ptr,
    w,
    y_ptr,
    expert,
    row,
    kept,
    to,
    first,
    start,  # of the sum, in a row of h and of the matrix
    h_stride: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Columns `first` to `first` + BN of y, rows `to`."""
    y = tl.zeros((BN, BM), tl.float32)
    for k in range(0, F, BK):
        h = load_choices(h_ptr + start, row, kept, k, h_stride, BK).T
        y = tl.dot(
            load_weight(w, expert, first, start + k, D, h_stride, BN, BK, TMA),
            h,
            y,
            input_precision=PRECISION,
        )
    column = first + tl.arange(0, BN)
    at = to.to(tl.int64)[None, :] * D + column[:, None]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=kept[None, :] & (column < D)[:, None])


@triton.jit(do_not_specialize=["M", "T"])
def stream_kernel(
    h_ptr,
    shared_h_ptr,
    w,
    shared_down,
    y_ptr,
    shared_y_ptr,
    experts_ptr,
    choices_ptr,
    tile_experts_ptr,
    first_tile_ptr,
    M,
    T,
    E: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SCAN: tl.constexpr,
    SHARED: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first = tl.program_id(0) * BN
    tile = tl.program_id(1)
    mine = True
    if SHARED:
        ahead = (T + BM - 1) // BM * SHARED
        mine = tile >= ahead
    else:
        ahead = 0
    # Where choices stand is older than the kernel before: `swiglu_stream_kernel` reads it, too.
    place = tl.where(mine, tile - ahead, 0)
    expert, choice, row = find_rows(
        experts_ptr, choices_ptr, tile_experts_ptr, first_tile_ptr, M, place, E, BM, SCAN
    )
    wait_for_previous(PDL)
    if SHARED:  # noqa: SIM102
        if not mine:
            token, part = tile // SHARED * BM + tl.arange(0, BM), tile % SHARED
            _down_tile(
                shared_h_ptr, shared_down, shared_y_ptr, tl.program_id(0) * 0, token, token < T,
                part * T + token, first, part * F, SHARED * F, D, F, BM, BN, BK, TMA, PRECISION,
            )  # fmt: skip
    if mine & (expert >= 0):
        _down_tile(
            h_ptr, w, y_ptr, expert, row, choice >= 0, choice, first, tl.program_id(0) * 0,
            F, D, F, BM, BN, BK, TMA, PRECISION,
        )  # fmt: skip
