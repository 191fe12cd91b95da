"""Which tiles attention over the cache uses: a small measured table, and what fits any shape.

A plan depends on sizes the host knows (rows of a sequence, dims, dtype), never on lengths that live on the
device. In batch-invariant mode it depends on the model's shape alone, so that a token gives the same bits
when it is decoded, verified or part of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

UNIT_POSITIONS = 2048  # of a piece in batch-invariant mode


@dataclass(frozen=True)
class Plan:
    """A program: its rows and positions, whether positions are the tall side, warps, loads in flight; how
    many share the columns of a latent; whether rows in FP8 are read by words; a kernel for Hopper alone."""

    bm: int
    bn: int
    swap: bool
    warps: int
    stages: int
    resident: int = 1  # programs that share a multiprocessor
    halves: int = 1
    words: bool = False
    hopper: str = ""  # wide, turns


PORTABLE, _NARROW = Plan(16, 16, False, 4, 2), Plan(16, 64, False, 4, 2)

# Measured on an H200, 2026-11-24. Few sequences, or short ones that each get a multiprocessor: larger tiles,
# which end sooner (1k positions of 8, 32 and 128: 12.6, 24.5, 53.0 us against 15.0, 25.2, 58.7); many: two
# programs an SM (256: 88.7 against 101.8).
SHORT, EACH = 4096, 64
_LATENT_FEW, _LATENT_16 = Plan(16, 64, False, 8, 5), Plan(16, 32, False, 4, 5, resident=2)
_LATENT_64 = Plan(64, 64, False, 8, 2)
# In FP8 a tile is held twice, as bytes and widened. Not measured: sizes that leave room for both.
_NARROW_LATENT_16, _NARROW_LATENT_64 = Plan(16, 32, False, 4, 3), Plan(64, 32, False, 8, 2)
_NARROW_PAGED_16, _NARROW_PAGED_64 = Plan(16, 64, False, 4, 3), Plan(64, 64, False, 4, 2)
_PAGED_16, _PAGED_64 = Plan(16, 128, False, 4, 5), Plan(64, 64, False, 4, 3)


def choose_plan(
    rows: int,
    sequences: int,
    longest: int,
    dim: int,
    dtype: torch.dtype,
    *,
    latent: bool,
    narrow: bool,
    hopper: bool,
) -> Plan:
    """For at most `rows` queries that share a key, contexts up to `longest`; `dim` is that of a value."""
    if dtype == torch.float32 or not hopper or dim < 64:
        return PORTABLE if dim > 128 else _NARROW
    if narrow:
        few, many = (_NARROW_LATENT_16, _NARROW_LATENT_64) if latent else (_NARROW_PAGED_16, _NARROW_PAGED_64)
        return few if rows <= 16 else many
    if not latent:
        return _PAGED_16 if rows <= 16 else _PAGED_64
    if rows <= 16:
        short = longest <= SHORT and sequences <= EACH
        return _LATENT_FEW if sequences < 8 or short else _LATENT_16
    return _LATENT_64
