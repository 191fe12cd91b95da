"""Tiles that attention over a cache reads: rows of pages, as they lie or in FP8, and queries to match.

A tile is BN positions of one sequence, found by its block table; past `limit` nothing is read, and zeros
stand there. Rows in FP8 are widened as they are read (`narrow_rows`): whole, or by words as four tensors of
every fourth column, which the queries then come in as well.
"""

from __future__ import annotations

import triton
import triton.language as tl

from shoal.ops.triton.narrow_rows import behind_narrow, load_narrow, load_quarters


@triton.jit
def find_rows(table_ptr, tile, kept, ROW: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr):
    """From the beginning of the pages to BN rows (BN, 1)."""
    position = tile * BN + tl.arange(0, BN)
    if PAGE % BN == 0:
        page = tl.load(table_ptr + tile // (PAGE // BN)).to(tl.int64)
        at = page * (PAGE * ROW) + (tile % (PAGE // BN) * BN + tl.arange(0, BN))[:, None] * ROW
    else:
        page = tl.load(table_ptr + position // PAGE, mask=kept, other=0).to(tl.int64)
        at = (page * PAGE + position % PAGE)[:, None] * ROW
    return at


@triton.jit
def find_narrow_rows(base, table_ptr, tile, kept, ROW: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr):
    """Pointers to BN rows of bytes (BN, 1). Rows that are no multiple of 16 bytes are aligned to 4, as their
    scales are, which must be said: the compiler takes the alignment of all from the first."""
    at = base + find_rows(table_ptr, tile, kept, ROW, PAGE, BN)
    if ROW % 16 != 0:
        at = tl.multiple_of(at, (1, 4))
    return at


@triton.jit
def load_tile(
    base,
    table_ptr,
    tile,
    limit,
    first: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW: tl.constexpr,
    PAGE: tl.constexpr,
    BN: tl.constexpr,
):
    """BN cached rows, WIDTH elements from `first` on, (BN, BLOCK); zeros past `limit` and past WIDTH."""
    kept = tile * BN + tl.arange(0, BN) < limit
    at = find_rows(table_ptr, tile, kept, ROW, PAGE, BN)
    column = tl.arange(0, BLOCK)
    mask = kept[:, None]
    if WIDTH != BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(base + first + at + column[None, :], mask=mask, other=0.0)


@triton.jit
def load_narrow_tile(
    base,
    table_ptr,
    tile,
    limit,
    first: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW: tl.constexpr,
    PAGE: tl.constexpr,
    BN: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The same of rows in FP8, from byte `first` on, widened to DTYPE."""
    kept = tile * BN + tl.arange(0, BN) < limit
    at = first + find_narrow_rows(base, table_ptr, tile, kept, ROW, PAGE, BN)
    return load_narrow(at, kept[:, None], WIDTH, BLOCK).to(DTYPE)


@triton.jit
def load_quarters_tile(
    base,
    table_ptr,
    tile,
    limit,
    first: tl.constexpr,
    WIDTH: tl.constexpr,
    ROW: tl.constexpr,
    PAGE: tl.constexpr,
    BN: tl.constexpr,
    DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):
    """The same as four tensors (BN, WIDTH // 4) of every fourth column."""
    kept = tile * BN + tl.arange(0, BN) < limit
    at = first + find_narrow_rows(base, table_ptr, tile, kept, ROW, PAGE, BN)
    return load_quarters(at, kept[:, None], WIDTH, DTYPE, ASM)


@triton.jit
def load_query_quarter(
    q_ptr, token, head, kept, place: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr, DIM: tl.constexpr
):
    column = place + 4 * tl.arange(0, WIDTH // 4)
    at = (token.to(tl.int64) * H + head) * DIM
    return tl.load(q_ptr + at[:, None] + column[None, :], mask=kept[:, None], other=0.0)


@triton.jit
def load_behind_tile(
    base,
    table_ptr,
    tile,
    limit,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    BR: tl.constexpr,
    ROW: tl.constexpr,
    PAGE: tl.constexpr,
    BN: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The R bfloat16 elements behind WIDTH narrow ones (BN, BR) in DTYPE."""
    kept = tile * BN + tl.arange(0, BN) < limit
    at = behind_narrow(find_narrow_rows(base, table_ptr, tile, kept, ROW, PAGE, BN), WIDTH)
    column = tl.arange(0, BR)[None, :]
    return tl.load(at + column, mask=kept[:, None] & (column < R), other=0.0).to(tl.float32).to(DTYPE)
