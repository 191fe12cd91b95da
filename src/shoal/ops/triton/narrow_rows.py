"""Rows of a cache in FP8: what the kernels over it share to write them and to read them, and `read_cache`.

    numbers in e4m3 | a float32 scale for each 128 of them | what stands behind, in bfloat16        of bytes

A program that writes holds whole rows, so their scales are maxima in registers; one that reads widens a tile
as it comes, and multiplies in the dtype of the queries: half the bytes of a wide cache, the same products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.ops.triton.quantise import lacks_e4m3, scale_of, to_e4m3

NARROW = torch.uint8
MAX_HEAD = 128  # numbers of a head that are written: one scale


@triton.jit
def store_narrow(at, x, inside, N: tl.constexpr, BLOCK: tl.constexpr, ROUND: tl.constexpr):
    """Keep N numbers of rows x (ROWS, BLOCK), zeros past N, at the bytes `at` (ROWS, 1); what they stand for
    now, in float32."""
    GROUP: tl.constexpr = BLOCK // ((BLOCK + 127) // 128)
    groups: tl.constexpr = (N + 127) // 128
    x = tl.reshape(x, (x.shape[0], BLOCK // GROUP, GROUP))
    scale, inverse = scale_of(tl.max(tl.abs(x), 2))
    q = to_e4m3(x * inverse[:, :, None], ROUND)
    column, group = tl.arange(0, BLOCK)[None, :], tl.arange(0, BLOCK // GROUP)[None, :]
    flat = tl.reshape(q.to(tl.uint8, bitcast=True), (x.shape[0], BLOCK))
    tl.store(at + column, flat, mask=inside & (column < N))
    scales = (at + N).to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(scales + group, scale, mask=inside & (group < groups))
    return tl.reshape(q.to(tl.float32) * scale[:, :, None], (x.shape[0], BLOCK))


@triton.jit
def load_narrow(at, inside, N: tl.constexpr, BLOCK: tl.constexpr):
    """The N numbers of the rows at the bytes `at` (ROWS, 1), (ROWS, BLOCK) in float32; zeros past N and where
    not `inside` (ROWS, 1)."""
    GROUP: tl.constexpr = BLOCK // ((BLOCK + 127) // 128)
    groups: tl.constexpr = (N + 127) // 128
    column, group = tl.arange(0, BLOCK)[None, :], tl.arange(0, BLOCK // GROUP)[None, :]
    mask = inside
    if N != BLOCK:
        mask = inside & (column < N)
    q = tl.load(at + column, mask=mask, other=0)
    scales = (at + N).to(tl.pointer_type(tl.float32), bitcast=True)
    scale = tl.load(scales + group, mask=inside & (group < groups), other=0.0)
    wide = q.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    wide = tl.reshape(wide, (q.shape[0], BLOCK // GROUP, GROUP)) * scale[:, :, None]
    return tl.reshape(wide, (q.shape[0], BLOCK))


_BYTE = tl.constexpr(
    tuple(
        f"""{{
        .reg .b32 t, m, up;
        mov.b32 up, 0x7b807b80;
        prmt.b32 t, $1, $2, {m << 4 | 4 + m << 12};
        shr.b32 m, t, 4;
        and.b32 m, m, 0x07f007f0;
        lop3.b32 m, t, 0x80008000, m, 0xea;
        mul.bf16x2 m, m, up;
        mul.bf16x2 t, m, $4;
        fma.rn.bf16x2 $0, m, $3, t;
        }}"""
        for m in range(4)
    )
)


@triton.jit
def _quarter(words, scale, PLACE: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Byte PLACE of each word as e4m3, times its scale, in DTYPE."""
    if ASM:
        high = scale.to(tl.bfloat16)
        low = (scale - high.to(tl.float32)).to(tl.bfloat16)
        return tl.inline_asm_elementwise(
            _BYTE[PLACE], "=r,r,r,r,r", [words, high, low], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        byte = ((words >> 8 * PLACE) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        return (byte.to(tl.float32) * scale).to(DTYPE)


@triton.jit
def load_quarters(at, inside, N: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """N numbers, a power of two from 64 on, of the rows at the bytes `at` (ROWS, 1): four tensors (ROWS,
    N // 4) in DTYPE, columns 0, 4, 8 ..., then 1, 5, 9 ... A row is read in words of four numbers, and none
    moves to another place; zeros where not `inside` (ROWS, 1)."""
    groups: tl.constexpr = (N + 127) // 128
    words = tl.load(
        at.to(tl.pointer_type(tl.int32), bitcast=True) + tl.arange(0, N // 4)[None, :], mask=inside, other=0
    )
    scales = (at + N).to(tl.pointer_type(tl.float32), bitcast=True)
    scale = tl.load(scales + tl.arange(0, groups)[None, :], mask=inside, other=0.0)
    scale = tl.broadcast_to(scale[:, :, None], (words.shape[0], groups, N // 4 // groups))
    scale = tl.reshape(scale, (words.shape[0], N // 4))
    return (
        _quarter(words, scale, 0, DTYPE, ASM),
        _quarter(words, scale, 1, DTYPE, ASM),
        _quarter(words, scale, 2, DTYPE, ASM),
        _quarter(words, scale, 3, DTYPE, ASM),
    )


@triton.jit
def behind_narrow(at, N: tl.constexpr):
    """Where the bfloat16 numbers behind N narrow ones begin."""
    return (at + N + 4 * ((N + 127) // 128)).to(tl.pointer_type(tl.bfloat16), bitcast=True)


@triton.jit(do_not_specialize=["first", "count"])
def _read_kernel(
    pages_ptr,
    table_ptr,
    out_ptr,
    first,
    count,
    slot_stride,
    N: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BR: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < count)[:, None]
    position = first + row
    page = tl.load(table_ptr + position // PAGE, mask=row < count, other=0).to(tl.int64)
    at = pages_ptr + (page * PAGE + position % PAGE)[:, None] * slot_stride
    to = out_ptr + row.to(tl.int64)[:, None] * (N + R)
    column, rest = tl.arange(0, BLOCK)[None, :], tl.arange(0, BR)[None, :]
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(to + column, load_narrow(at, inside, N, BLOCK).to(dtype), mask=inside & (column < N))
    if R:
        behind = tl.load(behind_narrow(at, N) + rest, mask=inside & (rest < R), other=0.0)
        tl.store(to + N + rest, behind.to(tl.float32).to(dtype), mask=inside & (rest < R))


def read_cache_refusal(
    pages: Tensor, table_B: Tensor, first: int, last: int, numbers: int, dtype: torch.dtype
) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    if pages.dtype != NARROW:
        return f"the pages are {pages.dtype}; PyTorch's own gather reads those"
    if pages.dim() != 3 or not pages.is_contiguous():
        return "the pages are not latent rows in order; the kernel reads those"
    return lacks_e4m3(pages)


@torch.no_grad()
def read_cache(
    pages: Tensor, table_B: Tensor, first: int, last: int, numbers: int, dtype: torch.dtype
) -> Tensor:
    """Latent rows widened, as `ops.api.read_cache` says."""
    rest = (pages.shape[2] - numbers - 4 * triton.cdiv(numbers, 128)) // 2
    out_NL = torch.empty(last - first, numbers + rest, dtype=dtype, device=pages.device)
    rows = 16
    if last > first:
        _read_kernel[(triton.cdiv(last - first, rows),)](
            pages,
            table_B.contiguous(),
            out_NL,
            first,
            last - first,
            pages.stride(1),
            N=numbers,
            R=rest,
            PAGE=pages.shape[1],
            ROWS=rows,
            BLOCK=triton.next_power_of_2(numbers),
            BR=triton.next_power_of_2(max(rest, 1)),
        )
    return out_NL
