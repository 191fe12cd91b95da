"""Products of few rows with quantised weights: each narrow byte is read once and widened in registers.

    h = silu(g) u, [g u]^T = [gate up]_e x_t^T    narrow_swiglu
    y^T = w_e h^T                                 narrow_product    grouped, or one matrix

As in `expert_streams` the weight is the tall operand, the A of wgmma, which may come from registers: a tile
of BN x 128 goes by TMA to shared memory, from there to registers, becomes bfloat16, and is multiplied there.
e4m3 and the integers to 7 are exact in bfloat16, so a block of 128 columns is summed unscaled and exactly as
the tensor core sums, and its scale meets the sum: BN x BM multiplications instead of BN x 128, and no second
rounding of a weight. The activations are as they came.

Weights are read 16 bits at a time, as wide as the operand that they become, so no byte is moved to another
place: two e4m3 are an even and an odd column, four INT4 are columns 32 apart, and x is split to match. On
NVIDIA's own two such become bfloat16 in three instructions. INT4: 0x43 above a number n below 16 is 128 + n,
less 136. FP8: the 7 bits of a magnitude, four places lower in 16, are its bfloat16 times 2^-120, subnormal
numbers too (the GPU's own conversion passes by float16 at a quarter of the rate, and bound the kernel).
Elsewhere both are arithmetic.

Every plan adds the blocks of a row in one order, so a row's result does not depend on its batch.

Bound: bytes, 1.002 a weight in FP8 and 0.516 in INT4, of 4.555 TB/s on an H200.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shoal.ops.triton.expert_products import load_weight
from shoal.ops.triton.expert_streams import find_rows
from shoal.ops.triton.launch import wait_for_previous


@triton.jit
def _e4m3(packed, ODD: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The even or the odd one of two e4m3 in 16 bits."""
    if ASM and ODD:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t, up;
            mov.b32 up, 0x7b807b80;
            shr.b32 t, $1, 4;
            and.b32 t, t, 0x07f007f0;
            lop3.b32 t, $1, 0x80008000, t, 0xea;
            mul.bf16x2 $0, t, up;
            }""",
            "=r,r",
            [packed],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    elif ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 s, t, up;
            mov.b32 up, 0x7b807b80;
            shl.b32 s, $1, 8;
            shl.b32 t, $1, 4;
            and.b32 t, t, 0x07f007f0;
            lop3.b32 t, s, 0x80008000, t, 0xea;
            mul.bf16x2 $0, t, up;
            }""",
            "=r,r",
            [packed],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        byte = (packed >> 8 if ODD else packed) & 255
        return byte.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(DTYPE)


_FOUR_BITS = tl.constexpr(
    tuple(
        f"""{{
        .reg .b32 t, eight;
        mov.b32 eight, 0x43084308;
        shr.b32 t, $1, {shift};
        lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea;
        sub.bf16x2 $0, t, eight;
        }}"""
        for shift in (0, 4, 8, 12)
    )
)


@triton.jit
def _int4(packed, PLACE: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Number PLACE of the four in 16 bits, less 8."""
    if ASM:
        return tl.inline_asm_elementwise(
            _FOUR_BITS[PLACE], "=r,r", [packed], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        return (((packed >> 4 * PLACE) & 15).to(tl.float32) - 8.0).to(DTYPE)


@triton.jit
def _load_part(a, row, kept, column, C: tl.constexpr, BC: tl.constexpr):
    """The rows `row` of a (., C), BC columns of a block from `column`; zeros past C and where not kept."""
    c = column + tl.arange(0, BC)
    inside = kept[:, None]
    if C % 128:
        inside = inside & (c < C)[None, :]
    return tl.load(a + row.to(tl.int64)[:, None] * C + c[None, :], mask=inside, other=0)


@triton.jit
def _load_block(a_ptr, row, kept, k, C: tl.constexpr, INT4: tl.constexpr):
    """Block k of rows of x, as `_narrow_block` wants it: for INT4 four runs of 32 columns, else pairs of
    columns in 32 bits (C even), all in the first.
    """
    if INT4:
        return (
            _load_part(a_ptr, row, kept, k * 128, C, 32),
            _load_part(a_ptr, row, kept, k * 128 + 32, C, 32),
            _load_part(a_ptr, row, kept, k * 128 + 64, C, 32),
            _load_part(a_ptr, row, kept, k * 128 + 96, C, 32),
        )
    else:
        pairs = a_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        c = k * 64 + tl.arange(0, 64)
        inside = kept[:, None]
        if C % 128:
            inside = inside & (c < C // 2)[None, :]
        both = tl.load(pairs + row.to(tl.int64)[:, None] * (C // 2) + c[None, :], mask=inside, other=0)
        return both, both, both, both


@triton.jit
def _load_scale(
    scales_ptr, matrix, first, k, N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, INT4: tl.constexpr
):
    """Of BN rows from `first` in block k of columns: one number, or one a row."""
    blocks: tl.constexpr = (C + 127) // 128
    if INT4:
        row = first + tl.arange(0, BN)
        at = (matrix * blocks + k).to(tl.int64) * N + row
        return tl.load(scales_ptr + at, mask=row < N, other=0.0).to(tl.float32)[:, None]
    else:
        n_blocks: tl.constexpr = (N + 127) // 128
        return tl.load(scales_ptr + (matrix * n_blocks + first // 128).to(tl.int64) * blocks + k)


@triton.jit
def _narrow_block(
    w,
    scale,
    matrix,
    first,
    k,
    x,
    N: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    DTYPE: tl.constexpr,
    INT4: tl.constexpr,
    ASM: tl.constexpr,
    TMA: tl.constexpr,
):
    """Block k of the rows from `first` of matrix `matrix`, times rows of x: (BN, BM), scaled."""
    x0, x1, x2, x3 = x
    if INT4:
        words: tl.constexpr = (C + 127) // 128 * 32
        packed = load_weight(w, matrix, first, k * 32, N, words, BN, 32, TMA)
        part = tl.dot(_int4(packed, 0, DTYPE, ASM), x0.T)
        part = tl.dot(_int4(packed, 1, DTYPE, ASM), x1.T, part)
        part = tl.dot(_int4(packed, 2, DTYPE, ASM), x2.T, part)
        part = tl.dot(_int4(packed, 3, DTYPE, ASM), x3.T, part)
    else:
        packed = load_weight(w, matrix, first, k * 64, N, C // 2, BN, 64, TMA)
        even = (x0 & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
        odd = (x0 >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        part = tl.dot(_e4m3(packed, False, DTYPE, ASM), even.T)
        part = tl.dot(_e4m3(packed, True, DTYPE, ASM), odd.T, part)
    return part * scale


@triton.jit(do_not_specialize=["M"])
def narrow_swiglu_kernel(
    x_ptr,
    w,
    scales_ptr,
    h_ptr,
    experts_ptr,
    choices_ptr,
    tile_experts_ptr,
    first_tile_ptr,
    M,
    E: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SCAN: tl.constexpr,
    INT4: tl.constexpr,
    ASM: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """h (P or M, F) of x (T, D); w is (2 E, F, D) narrow, 16 bits a number."""
    wait_for_previous(PDL)
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    blocks: tl.constexpr = (D + 127) // 128
    first = tl.program_id(0) * BN
    expert, choice, row = find_rows(
        experts_ptr, choices_ptr, tile_experts_ptr, first_tile_ptr, M, tl.program_id(1), E, BM, SCAN
    )
    if expert >= 0:
        token, kept = choice // K, choice >= 0
        gate = tl.zeros((BN, BM), tl.float32)
        up = tl.zeros((BN, BM), tl.float32)
        x = _load_block(x_ptr, token, kept, 0, D, INT4)
        by_gate = _load_scale(scales_ptr, 2 * expert, first, 0, F, D, BN, INT4)
        by_up = _load_scale(scales_ptr, 2 * expert + 1, first, 0, F, D, BN, INT4)
        for k in range(blocks):
            # What is no stream is read a block ahead: the compiler fetches the weights early, and only them.
            then = tl.minimum(k + 1, blocks - 1)
            next_x = _load_block(x_ptr, token, kept, then, D, INT4)
            next_gate = _load_scale(scales_ptr, 2 * expert, first, then, F, D, BN, INT4)
            next_up = _load_scale(scales_ptr, 2 * expert + 1, first, then, F, D, BN, INT4)
            gate += _narrow_block(w, by_gate, 2 * expert, first, k, x, F, D, BN, dtype, INT4, ASM, TMA)
            up += _narrow_block(w, by_up, 2 * expert + 1, first, k, x, F, D, BN, dtype, INT4, ASM, TMA)
            x, by_gate, by_up = next_x, next_gate, next_up
        gate = gate.to(dtype).to(tl.float32)
        h = gate * tl.sigmoid(gate) * up.to(dtype).to(tl.float32)
        column = first + tl.arange(0, BN)
        at = row.to(tl.int64)[None, :] * F + column[:, None]
        tl.store(h_ptr + at, h.to(dtype), mask=kept[None, :] & (column < F)[:, None])


@triton.jit(do_not_specialize=["M"])
def narrow_product_kernel(
    a_ptr,
    w,
    scales_ptr,
    out_ptr,
    experts_ptr,
    choices_ptr,
    tile_experts_ptr,
    first_tile_ptr,
    M,
    E: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GROUPED: tl.constexpr,
    SCAN: tl.constexpr,
    INT4: tl.constexpr,
    ASM: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """a times w (E, N, C) narrow, 16 bits a number, by choice (M, N); not GROUPED: M rows and one matrix."""
    wait_for_previous(PDL)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    blocks: tl.constexpr = (C + 127) // 128
    first = tl.program_id(0) * BN
    if GROUPED:
        expert, choice, row = find_rows(
            experts_ptr, choices_ptr, tile_experts_ptr, first_tile_ptr, M, tl.program_id(1), E, BM, SCAN
        )
    else:
        expert = tl.program_id(1) * 0
        row = tl.program_id(1) * BM + tl.arange(0, BM)
        choice = tl.where(row < M, row, -1)
    if expert >= 0:
        kept = choice >= 0
        y = tl.zeros((BN, BM), tl.float32)
        x = _load_block(a_ptr, row, kept, 0, C, INT4)
        scale = _load_scale(scales_ptr, expert, first, 0, N, C, BN, INT4)
        for k in range(blocks):
            then = tl.minimum(k + 1, blocks - 1)
            next_x = _load_block(a_ptr, row, kept, then, C, INT4)
            next_scale = _load_scale(scales_ptr, expert, first, then, N, C, BN, INT4)
            y += _narrow_block(w, scale, expert, first, k, x, N, C, BN, dtype, INT4, ASM, TMA)
            x, scale = next_x, next_scale
        column = first + tl.arange(0, BN)
        at = choice.to(tl.int64)[None, :] * N + column[:, None]
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=kept[None, :] & (column < N)[:, None])
