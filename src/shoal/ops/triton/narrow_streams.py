"""Products of few rows with quantised weights: each narrow byte is read once and widened in registers.

    h = silu(g) u, [g u] = x_t [gate up]_e^T    narrow_swiglu
    y = h w_e^T                                 narrow_product
    y_i = x w_i^T for up to three i             narrow_linears    one launch

A program multiplies BM rows with BN rows of the weight, GROUPS x 128 columns at a time, as that many products
at once, one a warp: what a warp reads of x and of the weight no other warp reads, both come by cp.async some
steps ahead, and mma.sync takes both from registers, so nothing is widened into shared memory and no warp
waits for another before the end, where the groups are added. (wgmma wants the narrow side in shared memory
and a wait for each product; it took 23 us for a linear of which the bytes are 1.)

e4m3 and the integers to 7 are exact in bfloat16, so a group of 128 columns is summed unscaled and exactly as
the tensor core sums, and its scale meets the sum: no second rounding of a weight. The activations are as they
came.

Narrow numbers are read in an order in which no bit changes lanes. Four e4m3 in 32 bits are four columns side
by side, and the instruction is given its columns so (x likewise). Four INT4 in 16 bits are columns 32 apart:
four products of 32 columns. On NVIDIA's own, INT4 becomes bfloat16 in three instructions for two: 0x43 above
a number n below 16 is 128 + n, less 136. e4m3 in five: the 7 bits of a magnitude, four places lower in 16,
are its bfloat16 times 2^-120, subnormal numbers too (the GPU's own conversion passes by float16 at a quarter
of the rate). Elsewhere both are arithmetic.

How the columns of a row are added depends on GROUPS and the number of warps, which follow from the shape of
the weight, and not on BM: so a row's result does not depend on its batch.

Bound: bytes, 1.002 a weight in FP8 and 0.516 in INT4, of 4.555 TB/s on an H200.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shoal.ops.triton.expert_streams import find_rows
from shoal.ops.triton.launch import wait_for_previous


@triton.jit
def _e4m3(packed, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Bytes as the e4m3 that they are."""
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t, m, up;
            mov.b32 up, 0x7b807b80;
            prmt.b32 t, $2, 0, 0x1404;
            shr.b32 m, t, 4;
            and.b32 m, m, 0x07f007f0;
            lop3.b32 m, t, 0x80008000, m, 0xea;
            mul.bf16x2 $0, m, up;
            prmt.b32 t, $2, 0, 0x3424;
            shr.b32 m, t, 4;
            and.b32 m, m, 0x07f007f0;
            lop3.b32 m, t, 0x80008000, m, 0xea;
            mul.bf16x2 $1, m, up;
            }""",
            "=r,=r,r",
            [packed],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    else:
        return packed.to(tl.float8e4nv, bitcast=True).to(DTYPE)


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
def _load_part(
    x_ptr,
    row,
    kept,
    group,
    START: tl.constexpr,
    C: tl.constexpr,
    BC: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """BC columns from START of groups of 128, of the rows `row` of x (., C): (GROUPS, BM, BC); zeros past C
    and where not kept."""
    c = group[:, None, None] * 128 + START + tl.arange(0, BC)[None, None, :]
    inside = kept[None, :, None]
    if C % (128 * GROUPS):
        inside = inside & (c < C)
    return tl.load(x_ptr + row.to(tl.int64)[None, :, None] * C + c, mask=inside, other=0.0)


@triton.jit
def _load_x(x_ptr, row, kept, group, C: tl.constexpr, INT4: tl.constexpr, GROUPS: tl.constexpr):
    """Groups of rows of x, for INT4 in four runs of 32 columns, else all in the first."""
    if INT4:
        return (
            _load_part(x_ptr, row, kept, group, 0, C, 32, GROUPS),
            _load_part(x_ptr, row, kept, group, 32, C, 32, GROUPS),
            _load_part(x_ptr, row, kept, group, 64, C, 32, GROUPS),
            _load_part(x_ptr, row, kept, group, 96, C, 32, GROUPS),
        )
    else:
        x = _load_part(x_ptr, row, kept, group, 0, C, 128, GROUPS)
        return x, x, x, x


@triton.jit
def _load_scale(
    scales_ptr, matrix, first, group, N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, INT4: tl.constexpr
):
    """Of groups of columns, of BN rows from `first`: (GROUPS, BN), or (GROUPS, 1)."""
    blocks: tl.constexpr = (C + 127) // 128
    if INT4:
        row = first + tl.arange(0, BN)
        at = matrix.to(tl.int64) * (blocks * N) + group[:, None] * N + row[None, :]
        inside = (group < blocks)[:, None] & (row < N)[None, :]
        return tl.load(scales_ptr + at, mask=inside, other=0.0).to(tl.float32)
    else:
        n_blocks: tl.constexpr = (N + 127) // 128
        at = (matrix * n_blocks + first // 128).to(tl.int64) * blocks + group
        return tl.load(scales_ptr + at, mask=group < blocks, other=0.0)[:, None]


@triton.jit
def _times(
    x,
    w_ptr,
    scale,
    matrix,
    first,
    group,
    N: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    DTYPE: tl.constexpr,
    INT4: tl.constexpr,
    ASM: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Groups of x times those of BN rows from `first` of matrix `matrix`: (GROUPS, BM, BN), scaled."""
    blocks: tl.constexpr = (C + 127) // 128
    width: tl.constexpr = blocks * 32 if INT4 else C
    each: tl.constexpr = 32 if INT4 else 128
    row = first + tl.arange(0, BN)
    c = group[:, None, None] * each + tl.arange(0, each)[None, None, :]
    inside = (row < N)[None, :, None]
    if width % (each * GROUPS):
        inside = inside & (c < width)
    w = w_ptr + matrix.to(tl.int64) * (N * width)
    packed = tl.load(w + row[None, :, None] * width + c, mask=inside, other=0)
    x0, x1, x2, x3 = x
    if INT4:
        part = tl.dot(x0, tl.permute(_int4(packed, 0, DTYPE, ASM), (0, 2, 1)))
        part = tl.dot(x1, tl.permute(_int4(packed, 1, DTYPE, ASM), (0, 2, 1)), part)
        part = tl.dot(x2, tl.permute(_int4(packed, 2, DTYPE, ASM), (0, 2, 1)), part)
        part = tl.dot(x3, tl.permute(_int4(packed, 3, DTYPE, ASM), (0, 2, 1)), part)
    else:
        part = tl.dot(x0, tl.permute(_e4m3(packed, DTYPE, ASM), (0, 2, 1)))
    return part * scale[:, None, :]


@triton.jit
def _product_tile(
    x_ptr,
    w_ptr,
    scales_ptr,
    out_ptr,
    matrix,
    row,
    kept,
    to,
    first,
    N: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GROUPS: tl.constexpr,
    INT4: tl.constexpr,
    ASM: tl.constexpr,
):
    """Rows `row` of x times BN rows from `first` of matrix `matrix`, to the rows `to` of out (., N)."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    group = tl.arange(0, GROUPS)
    y = tl.zeros((GROUPS, BM, BN), tl.float32)
    scale = _load_scale(scales_ptr, matrix, first, group, N, C, BN, INT4)
    for k in range(0, (C + 127) // 128, GROUPS):
        # Read a step ahead: the compiler fetches early what it multiplies, and only that.
        then = _load_scale(scales_ptr, matrix, first, k + GROUPS + group, N, C, BN, INT4)
        x = _load_x(x_ptr, row, kept, k + group, C, INT4, GROUPS)
        y += _times(x, w_ptr, scale, matrix, first, k + group, N, C, BN, dtype, INT4, ASM, GROUPS)
        scale = then
    column = first + tl.arange(0, BN)
    at = to.to(tl.int64)[:, None] * N + column[None, :]
    y = tl.sum(y, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, y, mask=kept[:, None] & (column < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def narrow_swiglu_kernel(
    x_ptr,
    w_ptr,
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
    GROUPS: tl.constexpr,
    SCAN: tl.constexpr,
    INT4: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """h (P or M, F) of x (T, D); w is (2 E, F, D) narrow, bytes or words of four INT4."""
    wait_for_previous(PDL)
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    first = tl.program_id(0) * BN
    expert, choice, row = find_rows(
        experts_ptr, choices_ptr, tile_experts_ptr, first_tile_ptr, M, tl.program_id(1), E, BM, SCAN
    )
    if expert >= 0:
        token, kept, group = choice // K, choice >= 0, tl.arange(0, GROUPS)
        gate = tl.zeros((GROUPS, BM, BN), tl.float32)
        up = tl.zeros((GROUPS, BM, BN), tl.float32)
        by_gate = _load_scale(scales_ptr, 2 * expert, first, group, F, D, BN, INT4)
        by_up = _load_scale(scales_ptr, 2 * expert + 1, first, group, F, D, BN, INT4)
        for k in range(0, (D + 127) // 128, GROUPS):
            then = k + GROUPS + group
            next_gate = _load_scale(scales_ptr, 2 * expert, first, then, F, D, BN, INT4)
            next_up = _load_scale(scales_ptr, 2 * expert + 1, first, then, F, D, BN, INT4)
            x = _load_x(x_ptr, token, kept, k + group, D, INT4, GROUPS)
            gate += _times(
                x, w_ptr, by_gate, 2 * expert, first, k + group, F, D, BN, dtype, INT4, ASM, GROUPS
            )
            up += _times(
                x, w_ptr, by_up, 2 * expert + 1, first, k + group, F, D, BN, dtype, INT4, ASM, GROUPS
            )
            by_gate, by_up = next_gate, next_up
        g = tl.sum(gate, 0).to(dtype).to(tl.float32)
        h = g * tl.sigmoid(g) * tl.sum(up, 0).to(dtype).to(tl.float32)
        column = first + tl.arange(0, BN)
        at = row.to(tl.int64)[:, None] * F + column[None, :]
        tl.store(h_ptr + at, h.to(dtype), mask=kept[:, None] & (column < F)[None, :])


@triton.jit(do_not_specialize=["M"])
def narrow_product_kernel(
    h_ptr,
    w_ptr,
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
    GROUPS: tl.constexpr,
    SCAN: tl.constexpr,
    INT4: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """h times w (E, N, C) narrow, by choice (M, N)."""
    wait_for_previous(PDL)
    expert, choice, row = find_rows(
        experts_ptr, choices_ptr, tile_experts_ptr, first_tile_ptr, M, tl.program_id(1), E, BM, SCAN
    )
    if expert >= 0:
        _product_tile(
            h_ptr, w_ptr, scales_ptr, out_ptr, expert, row, choice >= 0, choice, tl.program_id(0) * BN,
            N, C, BM, BN, GROUPS, INT4, ASM,
        )  # fmt: skip


@triton.jit
def _fetch_early(
    w_ptr,
    scales_ptr,
    first,
    N: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    INT4: tl.constexpr,
):
    """Ask for BN rows of the weight from `first`, and their scales, to come to L2."""
    blocks: tl.constexpr = (C + 127) // 128
    row = tl.minimum(first + tl.arange(0, BN), N - 1)
    width: tl.constexpr = blocks * 64 if INT4 else C  # bytes
    LINES: tl.constexpr = triton.next_power_of_2((width + 127) // 128)
    at = tl.minimum(tl.arange(0, LINES) * 128, width - 1)
    bytes_ = w_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    _prefetch(bytes_ + row[:, None] * width + at[None, :])
    if INT4:
        group = tl.minimum(tl.arange(0, triton.next_power_of_2(blocks)), blocks - 1)
        _prefetch(scales_ptr + group * N + tl.minimum(first, N - 1))


@triton.jit
def _prefetch(pointers):
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _linear_tile(
    x_ptr,
    w_ptr,
    scales_ptr,
    out_ptr,
    block,
    M,
    N: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GROUPS: tl.constexpr,
    INT4: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        _fetch_early(w_ptr, scales_ptr, block * BN, N, C, BN, INT4)
    wait_for_previous(PDL)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    _product_tile(
        x_ptr, w_ptr, scales_ptr, out_ptr, block * 0, row, row < M, row, block * BN,
        N, C, BM, BN, GROUPS, INT4, ASM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def narrow_linears_kernel(
    x_ptr,
    w0_ptr,
    w1_ptr,
    w2_ptr,
    s0_ptr,
    s1_ptr,
    s2_ptr,
    y0_ptr,
    y1_ptr,
    y2_ptr,
    M,
    N0: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
    C: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GROUPS: tl.constexpr,
    INT4: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
):
    """x (M, C) times each w (N, C) narrow; none where N is 0."""
    block = tl.program_id(0)
    P0: tl.constexpr = (N0 + BN - 1) // BN
    P1: tl.constexpr = (N1 + BN - 1) // BN
    if block < P0:
        _linear_tile(
            x_ptr, w0_ptr, s0_ptr, y0_ptr, block, M, N0, C, BM, BN, GROUPS, INT4, ASM, PDL, EARLY
        )  # fmt: skip
    if N1:  # noqa: SIM102
        if (block >= P0) & (block < P0 + P1):
            _linear_tile(
                x_ptr, w1_ptr, s1_ptr, y1_ptr, block - P0, M, N1, C, BM, BN, GROUPS, INT4, ASM, PDL, EARLY
            )  # fmt: skip
    if N2:  # noqa: SIM102
        if block >= P0 + P1:
            _linear_tile(
                x_ptr, w2_ptr, s2_ptr, y2_ptr, block - P0 - P1, M, N2, C, BM, BN, GROUPS, INT4, ASM, PDL,
                EARLY,
            )  # fmt: skip
