"""Attention of a training pack in the form that serves: over a cache, here one of the pack's own rows.

In batch-invariant mode engine and trainer must add up the same numbers in the same order. Both then call the
same ops on a paged cache: the engine on the one that it keeps, the trainer on one that is laid out for the
call. The gradient is that of the pack's ordinary attention.

Its one law: what a token gets here, it got when it was decoded, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.batch import Batch

PAGE_SIZE = 64


@dataclass(frozen=True, eq=False)
class Laid:
    """Pages of one layer, as in KVView, for sequences that are whole in this step."""

    pages: Tensor  # (P, PAGE_SIZE, ...), zeros
    slots_T: Tensor  # int64
    block_table_SB: Tensor  # int32
    context_lens_S: Tensor  # int32


def lay_out(batch: Batch, row_shape: tuple[int, ...], like: Tensor) -> Laid:
    """Empty pages for every sequence of a pack, rows of `row_shape` in the dtype and on the device of
    `like`."""
    lengths_S = batch.cu_seqlens_S1.diff().long()
    counts_S = (lengths_S + PAGE_SIZE - 1) // PAGE_SIZE
    first_S = counts_S.cumsum(0) - counts_S  # each sequence's first page; a page past all of them is nobody's
    width = -(-batch.max_seqlen // PAGE_SIZE)
    table_SB = first_S.unsqueeze(1) + torch.arange(width, device=like.device)
    rows_T = torch.arange(batch.num_tokens, device=like.device)
    skipped_S = first_S * PAGE_SIZE - batch.cu_seqlens_S1[:-1]
    slots_T = rows_T + skipped_S.repeat_interleave(lengths_S, output_size=batch.num_tokens)
    num_pages = batch.num_tokens // PAGE_SIZE + batch.num_sequences  # at least the sum of the counts
    return Laid(
        pages=torch.zeros(num_pages, PAGE_SIZE, *row_shape, dtype=like.dtype, device=like.device),
        slots_T=slots_T,
        block_table_SB=table_SB.clamp(max=num_pages - 1).int(),
        context_lens_S=lengths_S.int(),
    )
