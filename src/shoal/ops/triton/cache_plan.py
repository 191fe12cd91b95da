"""Which tiles attention over the cache uses: a small measured table, and what fits any shape.

A plan depends on sizes the host knows (rows of a sequence, dims, dtype), never on lengths that live on the
device. In batch-invariant mode it depends on the model's shape alone, so that a token gives the same bits
when it is decoded, verified or part of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

UNIT_POSITIONS = 2048  # of a piece in batch-invariant mode
AS_A_PART = 8  # tiles that take as long as a part of a sequence to be written and merged


@dataclass(frozen=True)
class Plan:
    """A program: its rows and positions, warps, loads in flight. `turns`: that of `cache_turns`."""

    bm: int
    bn: int
    warps: int
    stages: int
    resident: int = 1  # programs that share a multiprocessor
    turns: bool = False
    ahead: int = 64  # positions that are asked for while the kernel before still runs


PORTABLE, _NARROW = Plan(16, 16, 4, 2), Plan(16, 64, 4, 2)

# Measured on an H200, 2026-11-24 and 29. Few sequences, or short ones that each get a multiprocessor: larger
# tiles, which end sooner (1k positions of 8, 32 and 128: 12.6, 24.5, 53.0 us against 15.0, 25.2, 58.7; 4k of
# 128: 163 against 172); many: two programs an SM (256 of 1k: 88.7 against 101.8; 32 of 32k: 307 against 318).
SHORT, EACH = 4096, 128
_LATENT_FEW, _LATENT_16 = Plan(16, 64, 8, 5), Plan(16, 32, 4, 5, resident=2)
_LATENT_64, TURNS = Plan(64, 64, 8, 2), Plan(64, 64, 4, 1, turns=True)
# In FP8 a tile is held twice, as bytes and widened.
_NARROW_LATENT_16, _NARROW_LATENT_64 = Plan(16, 32, 4, 5, resident=2), Plan(64, 64, 8, 4)
_NARROW_PAGED_16, _NARROW_PAGED_64 = Plan(16, 128, 4, 3), Plan(64, 64, 4, 2)
_PAGED_16, _PAGED_64 = Plan(16, 128, 4, 5), Plan(64, 64, 4, 3)


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
    turns: bool,
) -> Plan:
    """For at most `rows` queries that share a key, contexts up to `longest`; `dim` is that of a value.
    `turns`: `cache_turns` takes the call."""
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
    return TURNS if turns else _LATENT_64


def pieces(programs: int, sequences: int, tiles: int) -> int:
    """Into how many pieces the tiles of all sequences are cut: one a program, or a few fewer, where sequences
    of one length, `tiles` at most, then lie whole in their pieces, or pieces in their sequences."""
    if programs >= sequences:
        return programs - programs % sequences if sequences > programs // 20 else programs
    each = -(-sequences // programs)
    longer = each * tiles - sequences * tiles // programs
    return sequences // each if sequences % each == 0 and longer <= AS_A_PART else programs
