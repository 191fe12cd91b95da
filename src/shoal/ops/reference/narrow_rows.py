"""Reference of a cache in FP8: how a row is narrowed, laid out in bytes, and widened again.

    N numbers in e4m3 | a float32 scale for each 128 of them | what stands behind, in bfloat16

A latent row is its C numbers and behind them the rotated key, which carries positions and stays wide: 656
bytes for 512 and 64, the field's layout (FlashMLA's, vLLM's fp8_ds_mla). Keys and values are one such row a
head, with nothing behind. The scales are those of DeepSeek's activations (`quantised.quantise_rows`): made of
the token alone, so nothing is calibrated, and what a position holds depends on no other.

Pages of uint8 are narrow, all others wide; that is how every op over the cache knows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.ops.reference.quantised import BLOCK, quantise_rows

NARROW = torch.uint8


def narrow_rows(rows: Tensor, numbers: int) -> Tensor:
    """Bytes (..., L) of rows (..., `numbers` + what stands behind)."""
    # 1. e4m3 and scales, 2. the rest as it is, 3. all as bytes.
    values, scales = quantise_rows(rows[..., :numbers])
    behind = rows[..., numbers:].to(torch.bfloat16)
    return torch.cat([part.contiguous().view(NARROW) for part in (values, scales, behind)], dim=-1)


def widen_rows(kept: Tensor, numbers: int) -> Tensor:
    """What narrow rows stand for, in float32."""
    groups = -(-numbers // BLOCK)
    values, scales, behind = kept.split((numbers, 4 * groups, kept.shape[-1] - numbers - 4 * groups), dim=-1)
    scales = scales.contiguous().view(torch.float32).repeat_interleave(BLOCK, -1)[..., :numbers]
    wide = values.view(torch.float8_e4m3fn).float() * scales
    return torch.cat((wide, behind.contiguous().view(torch.bfloat16).float()), dim=-1)


def keep_rows(pages: Tensor, slots_T: Tensor, rows: Tensor, numbers: int) -> Tensor:
    """Write rows at their slots, and give them back as the cache has them."""
    # A view, never a copy: what cannot be seen as one row of slots is refused.
    slots = pages.view(-1, *pages.shape[2:])
    if pages.dtype != NARROW:
        slots.index_copy_(0, slots_T, rows)
        return rows
    kept = narrow_rows(rows, numbers)
    slots.index_copy_(0, slots_T, kept)
    return widen_rows(kept, numbers).to(rows.dtype)


def as_kept(rows: Tensor, numbers: int, dtype: torch.dtype) -> Tensor:
    """Rows taken from pages: narrow ones in `dtype`, others as they are."""
    return widen_rows(rows, numbers).to(dtype) if rows.dtype == NARROW else rows
