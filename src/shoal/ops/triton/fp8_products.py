"""FP8 products: rows in 1 x 128 times weights in 128 x 128, grouped by expert or one matrix.

    h = silu(g) u, [g u] = x_t [gate up]_e^T    fp8_swiglu     h leaves quantised, 1 x 128: a tile is a block
    y = a w_e^T                                 fp8_product    the backward pass hands in W^T as the weight

    acc += (sum over 128 columns of q_a q_w) * s_a s_w

Layout: slots, tiles and choices as in `expert_products`; scales beside their values, (P, k) and (E, n, k).
Both operands lie along the reduction, as the tensor core wants e4m3. Tiling: persistent programs, 128 x 128.

Each block of 128 columns is a product of its own, begun at zero: the tensor core adds e4m3 products with 14
bits or so, and what leaves it after 128 is added in float32, scaled. That is the promotion of DeepSeek-V3
(section 3.3.2), by scale and precision at once. It costs 128 multiply-adds a clock and a half of registers:
a tile's sum twice. The next block's scales are read ahead, since they are no operand that the compiler would
fetch early.

Bound: the matrix rate, 1,512 TFLOP/s on an H200. On Hopper `fp8_hopper` has 1.3 to 1.5 times the speed where
it fits, and gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shoal.ops.triton.expert_products import load_choices, load_rows, load_weight, walk
from shoal.ops.triton.quantise import scale_of, to_e4m3


@triton.jit
def fp8_product_kernel(
    a,
    a_scales_ptr,
    w,
    w_scales_ptr,
    out_ptr,
    choices_ptr,
    tile_experts_ptr,
    first_tile_ptr,
    rows,
    E: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    GROUPED: tl.constexpr,
    SCATTER: tl.constexpr,
):
    """a (P, C) times w_e (E, N, C), out by slot, or by choice if SCATTER. Not GROUPED: one matrix, `rows`
    rows.
    """
    c_blocks: tl.constexpr = (C + 127) // 128
    n_blocks: tl.constexpr = (N + 127) // 128
    num_n: tl.constexpr = (N + BN - 1) // BN
    num_m = tl.load(first_tile_ptr + E) if GROUPED else tl.cdiv(rows, BM)
    for tile in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        m, n = walk(tile, num_m, num_n, GROUP)
        expert = tl.load(tile_experts_ptr + m) if GROUPED else 0
        slot = m * BM + tl.arange(0, BM)
        there = slot < num_m * BM if GROUPED else slot < rows
        a_scale = a_scales_ptr + slot.to(tl.int64) * c_blocks
        w_scale = w_scales_ptr + (expert * n_blocks + n * BN // 128).to(tl.int64) * c_blocks
        scale = tl.load(a_scale, mask=there, other=0.0) * tl.load(w_scale)
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(c_blocks):
            if TMA:
                block = a.load([m * BM, k * 128])
            elif GROUPED:
                block = load_rows(a, m * BM, k * 128, C, BM, 128, TMA)
            else:
                block = load_choices(a, slot, there, k * 128, C, 128)
            weight = load_weight(w, expert + 0 * m, n * BN, k * 128, N, C, BN, 128, TMA)
            part = tl.dot(block, weight.T)
            acc += part * scale[:, None]
            more = k + 1 < c_blocks
            next_scale = tl.load(a_scale + k + 1, mask=there & more, other=0.0)
            scale = next_scale * tl.load(w_scale + k + 1, mask=more, other=0.0)
        row = tl.load(choices_ptr + slot) if SCATTER else slot
        kept = row >= 0 if SCATTER else there
        c = n * BN + tl.arange(0, BN)
        at = row.to(tl.int64)[:, None] * N + c[None, :]
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=kept[:, None] & (c < N)[None, :])


@triton.jit
def fp8_swiglu_kernel(
    x_ptr,
    x_scales_ptr,
    w,
    w_scales_ptr,
    h_ptr,
    h_scales_ptr,
    gate_up_ptr,
    choices_ptr,
    tile_experts_ptr,
    first_tile_ptr,
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    SAVE: tl.constexpr,
    DTYPE: tl.constexpr,
    ROUND: tl.constexpr,
):
    """h (P, F) and its scales (P, f) of x (T, D), 128 columns a tile; gate_up (P, 2, F) too if SAVE.

    w is (E, 2 F, D), by TMA (2 E, F, D). g and u are cast to DTYPE first, as the backward pass reads them.
    """
    d_blocks: tl.constexpr = (D + 127) // 128
    f_blocks: tl.constexpr = (F + 127) // 128
    num_m = tl.load(first_tile_ptr + E)
    for tile in range(tl.program_id(0), num_m * f_blocks, tl.num_programs(0)):
        m, n = walk(tile, num_m, f_blocks, GROUP)
        expert = tl.load(tile_experts_ptr + m)
        slot = m * BM + tl.arange(0, BM)
        choice = tl.load(choices_ptr + slot)
        token, kept = choice // K, choice >= 0
        x_scale = x_scales_ptr + token.to(tl.int64) * d_blocks
        gate_scale = w_scales_ptr + (expert * 2 * f_blocks + n).to(tl.int64) * d_blocks
        up_scale = gate_scale + f_blocks * d_blocks
        row_scale = tl.load(x_scale, mask=kept, other=0.0)
        by_gate, by_up = tl.load(gate_scale), tl.load(up_scale)
        gate = tl.zeros((BM, 128), tl.float32)
        up = tl.zeros((BM, 128), tl.float32)
        for k in range(d_blocks):
            x = load_choices(x_ptr, token, kept, k * 128, D, 128)
            w_gate = load_weight(w, 2 * expert, n * 128, k * 128, F, D, 128, 128, TMA)
            w_up = load_weight(w, 2 * expert + 1, n * 128, k * 128, F, D, 128, 128, TMA)
            part = tl.dot(x, w_gate.T)
            gate += part * (row_scale * by_gate)[:, None]
            part = tl.dot(x, w_up.T)
            up += part * (row_scale * by_up)[:, None]
            more = k + 1 < d_blocks
            row_scale = tl.load(x_scale + k + 1, mask=kept & more, other=0.0)
            by_gate = tl.load(gate_scale + k + 1, mask=more, other=0.0)
            by_up = tl.load(up_scale + k + 1, mask=more, other=0.0)
        c = n * 128 + tl.arange(0, 128)
        inside = (c < F)[None, :]
        if SAVE:
            at = slot.to(tl.int64)[:, None] * (2 * F) + c[None, :]
            tl.store(gate_up_ptr + at, gate.to(DTYPE), mask=inside)
            tl.store(gate_up_ptr + at + F, up.to(DTYPE), mask=inside)
        gate = gate.to(DTYPE).to(tl.float32)
        h = gate * tl.sigmoid(gate) * up.to(DTYPE).to(tl.float32)
        scale, inverse = scale_of(tl.max(tl.abs(h), 1))
        at = slot.to(tl.int64)[:, None] * F + c[None, :]
        tl.store(h_ptr + at, to_e4m3(h * inverse[:, None], ROUND), mask=inside)
        tl.store(h_scales_ptr + slot.to(tl.int64) * f_blocks + n, scale)
