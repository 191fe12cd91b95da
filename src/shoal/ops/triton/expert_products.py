"""Products over grouped rows, for many rows: gate-up with SwiGLU, the plain product, weight gradients.

    forward   h = silu(g) u, [g u] = x_t [gate up]_e^T    swiglu_product   rows of x gathered as they are read
              y = h down_e^T                              product          rows go to their choices
    backward  dh = dy down_e,  dx = d[g u] [gate up]_e    product          W as it lies (NN)
              d[g u], w h, <dh, h> from dh                swiglu_backward  elementwise, bound by bytes
              dW_e = left^T right over the rows of e      weight_product

Layout: rows stand in slots (`permutation`); a tile of slots is one expert's. Weights are K-major, as stored.
Tiling: persistent programs, one an SM, walk tiles of 128 x 256 in groups that share A and W through L2. The
gate's and the up's columns of a tile are one product, 2 x 128 wide, whose halves meet in registers: two
products of 128 columns take 1.25 times as long. Weights come by TMA, gathered rows by cp.async.

Bound: the matrix rate, 797 TFLOP/s in a burst and 666 under sustained load on an H200 (2026-11-22). At 16k
tokens the gate-up product runs at 680 to 700 in a burst and 590 to 670 sustained, the down product at 650 to
680 and 600 to 625; the layer forward at 560 to 625, with its backward at 520 to 610. What is missing: L2
feeds a 128 x 256 tile 48 KB for each 4.2 MFLOP, which at the full rate would be 9 TB/s, and rows are padded
to 128.

g and u are cast to x's dtype before SwiGLU, since the backward pass reads them so. Without TMA (float32, odd
sizes, other GPUs, the interpreter) the same kernels load through plain pointers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shoal.ops.triton.launch import wait_for_previous
from shoal.ops.triton.quantise import store_narrow


@triton.jit
def walk(tile, num_m, num_n, GROUP: tl.constexpr):
    """Position of a tile: GROUP tiles down, then the next column, so that neighbours share their operands."""
    width = GROUP * num_n
    first = tile // width * GROUP
    height = tl.minimum(num_m - first, GROUP)
    within = tile % width
    return first + within % height, within // height


@triton.jit
def load_weight(
    w,
    expert,
    row,
    column,
    R: tl.constexpr,
    C: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    TMA: tl.constexpr,
):
    """The BR x BC block of matrix `expert` of w (E, R, C) at (row, column), zeros past its edges."""
    if TMA:
        block = w.load([expert, row, column]).reshape(BR, BC)
    else:
        r, c = row + tl.arange(0, BR), column + tl.arange(0, BC)
        at = expert.to(tl.int64) * R * C + r.to(tl.int64)[:, None] * C + c[None, :]
        block = tl.load(w + at, mask=(r < R)[:, None] & (c < C)[None, :], other=0.0)
    return block


@triton.jit
def load_rows(a, slot, column, C: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, TMA: tl.constexpr):
    """The BR x BC block of a (P, C) at (slot, column), zeros past C."""
    if TMA:
        block = a.load([slot, column])
    else:
        r, c = slot + tl.arange(0, BR), column + tl.arange(0, BC)
        block = tl.load(a + r.to(tl.int64)[:, None] * C + c[None, :], mask=(c < C)[None, :], other=0.0)
    return block


@triton.jit
def load_choices(a, row, kept, column, C: tl.constexpr, BC: tl.constexpr):
    """The rows `row` of a (., C), columns from `column`; zeros past C and where not kept."""
    c = column + tl.arange(0, BC)
    inside = kept[:, None]
    if C % BC:
        inside = inside & (c < C)[None, :]
    return tl.load(a + row.to(tl.int64)[:, None] * C + c[None, :], mask=inside, other=0.0)


@triton.jit
def store_part(
    out,
    slot,
    part: tl.constexpr,
    column,
    value,
    PARTS: tl.constexpr,
    C: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    TMA: tl.constexpr,
):
    """Write a BR x BC block to part `part` of out (P, PARTS, C) at (slot, column), nothing past C."""
    if TMA:
        out.store([slot, part, column], value.reshape(BR, 1, BC))
    else:
        r, c = tl.arange(0, BR), tl.arange(0, BC)
        start = out + slot.to(tl.int64) * (PARTS * C) + part * C + column
        tl.store(start + r[:, None] * (PARTS * C) + c[None, :], value, mask=(column + c < C)[None, :])


@triton.jit
def _store_swiglu(
    gate,
    up,
    h,
    gate_up,
    slot,
    column,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
    SAVE: tl.constexpr,
):
    dtype: tl.constexpr = h.dtype if TMA else h.dtype.element_ty
    gate, up = gate.to(dtype), up.to(dtype)
    if SAVE:
        store_part(gate_up, slot, 0, column, gate, 2, F, BM, BN, TMA)
        store_part(gate_up, slot, 1, column, up, 2, F, BM, BN, TMA)
    gate = gate.to(tl.float32)
    rows = gate * tl.sigmoid(gate) * up.to(tl.float32)
    store_part(h, slot, 0, column, rows.to(dtype), 1, F, BM, BN, TMA)


@triton.jit
def _halves(block, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right BN columns of a BM x 2 BN block; no data moves."""
    return tl.split(tl.permute(tl.reshape(block, (BM, 2, BN)), (0, 2, 1)))


@triton.jit
def swiglu_product_kernel(
    x_ptr,
    w,
    h,
    gate_up,
    choices_ptr,
    tile_experts_ptr,
    first_tile_ptr,
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    SAVE: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h (P, F) of x (T, D), BN columns a tile; gate_up (P, 2, F) too if SAVE. By TMA, w is (E, 2, F, D)."""
    wait_for_previous(PDL)
    half: tl.constexpr = BN // 2
    num_m = tl.load(first_tile_ptr + E)
    num_n: tl.constexpr = (F + BN - 1) // BN
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        m, n = walk(tile, num_m, num_n, GROUP)
        slot, column = m * BM, n * BN
        expert = tl.load(tile_experts_ptr + m)
        choice = tl.load(choices_ptr + slot + tl.arange(0, BM))
        token, kept = choice // K, choice >= 0
        if TMA:
            both = tl.zeros((BM, 2 * BN), tl.float32)
            for k in range(0, D, BK):
                x = load_choices(x_ptr, token, kept, k, D, BK)
                w_both = w.load([expert, 0, column, k]).reshape(2 * BN, BK)
                both = tl.dot(x, w_both.T, both, input_precision=PRECISION)
            gate, up = _halves(both, BM, BN)
        else:
            gate = tl.zeros((BM, BN), tl.float32)
            up = tl.zeros((BM, BN), tl.float32)
            for k in range(0, D, BK):
                x = load_choices(x_ptr, token, kept, k, D, BK)
                w_gate = load_weight(w, expert, column, k, 2 * F, D, BN, BK, TMA)
                w_up = load_weight(w, expert, F + column, k, 2 * F, D, BN, BK, TMA)
                gate = tl.dot(x, w_gate.T, gate, input_precision=PRECISION)
                up = tl.dot(x, w_up.T, up, input_precision=PRECISION)
        # Half of the columns at a time leaves shared memory for one more stage of loads.
        gate_0, gate_1 = _halves(gate, BM, half)
        up_0, up_1 = _halves(up, BM, half)
        _store_swiglu(gate_0, up_0, h, gate_up, slot, column, F, BM, half, TMA, SAVE)
        _store_swiglu(gate_1, up_1, h, gate_up, slot, column + half, F, BM, half, TMA, SAVE)


@triton.jit
def product_kernel(
    a,
    w,
    out_ptr,
    choices_ptr,
    tile_experts_ptr,
    first_tile_ptr,
    E: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SCATTER: tl.constexpr,
    FLATTEN: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a (P, C) times w_e: w (E, N, C) if TRANSPOSED, else (E, C, N). Out by slot, or by choice if SCATTER."""
    wait_for_previous(PDL)
    num_m = tl.load(first_tile_ptr + E)
    num_n: tl.constexpr = (N + BN - 1) // BN
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=FLATTEN):
        m, n = walk(tile, num_m, num_n, GROUP)
        expert = tl.load(tile_experts_ptr + m)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, C, BK):
            rows = load_rows(a, m * BM, k, C, BM, BK, TMA)
            if TRANSPOSED:
                block = load_weight(w, expert, n * BN, k, N, C, BN, BK, TMA).T
            else:
                block = load_weight(w, expert, k, n * BN, C, N, BK, BN, TMA)
            acc = tl.dot(rows, block, acc, input_precision=PRECISION)
        row = m * BM + tl.arange(0, BM)
        if SCATTER:
            row = tl.load(choices_ptr + row)
        c = n * BN + tl.arange(0, BN)
        at = row.to(tl.int64)[:, None] * N + c[None, :]
        inside = (row >= 0)[:, None] & (c < N)[None, :]
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    dh_ptr,
    gate_up_ptr,
    weights_ptr,
    dgate_up_ptr,
    dots_ptr,
    choices_ptr,
    first_tile_ptr,
    values_ptr,
    scales_ptr,
    E: tl.constexpr,
    F: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    NARROW: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Program p takes slot p: dgate_up (P, 2F), w h in place of dh (P, F), and <dh, h> of its choice.

    NARROW: dgate_up in e4m3 too, with its scales (P, 2f).
    """
    dtype: tl.constexpr = dh_ptr.dtype.element_ty
    slot = tl.program_id(0).to(tl.int64)
    if slot < tl.load(first_tile_ptr + E) * TILE:
        choice = tl.load(choices_ptr + slot)
        weight = tl.load(weights_ptr + choice, mask=choice >= 0, other=0.0)
        dot = tl.zeros((BLOCK,), tl.float32)
        for first in tl.static_range(0, F, BLOCK):
            column = first + tl.arange(0, BLOCK)
            inside = column < F
            dh = tl.load(dh_ptr + slot * F + column, mask=inside, other=0.0).to(tl.float32)
            gate = tl.load(gate_up_ptr + slot * (2 * F) + column, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(gate_up_ptr + slot * (2 * F) + F + column, mask=inside, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            h = silu * up
            dot += dh * h
            tl.store(dh_ptr + slot * F + column, (h * weight).to(dtype), mask=inside)
            dh = dh * weight
            # d silu(g) = s (1 + g (1 - s))
            dgate = (dh * up * (sigmoid + silu * (1.0 - sigmoid))).to(dtype)
            dup = (dh * silu).to(dtype)
            tl.store(dgate_up_ptr + slot * (2 * F) + column, dgate, mask=inside)
            tl.store(dgate_up_ptr + slot * (2 * F) + F + column, dup, mask=inside)
            if NARROW:
                values, scales = values_ptr + slot * (2 * F), scales_ptr + slot * (F // 64)
                store_narrow(dgate, values, scales, first, F, BLOCK, ROUND)
                store_narrow(dup, values + F, scales + F // 128, first, F, BLOCK, ROUND)
        tl.store(dots_ptr + choice, tl.sum(dot, 0), mask=choice >= 0)


@triton.jit
def weight_product_kernel(
    left,
    right,
    out_ptr,
    first_tile_ptr,
    E: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    TILE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out_e = left^T right over the slots of e: left (P, R), right (P, C), out (E, R, C)."""
    num_m: tl.constexpr = (R + BM - 1) // BM
    num_n: tl.constexpr = (C + BN - 1) // BN
    for tile in range(tl.program_id(0), E * num_m * num_n, tl.num_programs(0)):
        expert = tile // (num_m * num_n)
        m, n = walk(tile % (num_m * num_n), num_m, num_n, GROUP)
        first = tl.load(first_tile_ptr + expert) * TILE
        last = tl.load(first_tile_ptr + expert + 1) * TILE
        acc = tl.zeros((BM, BN), tl.float32)
        for slot in range(first, last, BK):
            rows = load_rows(left, slot, m * BM, R, BK, BM, TMA)
            columns = load_rows(right, slot, n * BN, C, BK, BN, TMA)
            acc = tl.dot(rows.T, columns, acc, input_precision=PRECISION)
        r, c = m * BM + tl.arange(0, BM), n * BN + tl.arange(0, BN)
        at = expert.to(tl.int64) * R * C + r.to(tl.int64)[:, None] * C + c[None, :]
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(r < R)[:, None] & (c < C)[None, :])
