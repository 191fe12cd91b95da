"""Batch: the one struct that travels from whoever has tokens to the model.

Tokens of all sequences lie on one flat axis, without padding, in training and in serving. Two hands build a
Batch: `data/pack` (training; `stages` add weights and recorded routing) and `engine/runner` (serving; adds
`kv`); `parallel/context` cuts one into parts. It is frozen, and the model reads nothing else: caches travel
inside it, so attention asks nobody.

Shape letters: T tokens, S sequences, N keys, P pages, L layers that route, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Rows of T tokens, the batch of those tokens, and where to put it, if that matters -> (T, D).
Attend = Callable[..., Tensor]
Between = Callable[[Attend, tuple[Tensor, ...]], Tensor]  # the same, asked for with the rows alone


@dataclass(frozen=True)
class Chunk:
    """A sequence with several new tokens in this step, in numbers the host knows."""

    sequence: int  # of the batch
    first: int  # its first row
    new: int  # rows
    context: int  # positions after this step


@dataclass(frozen=True, eq=False)
class KVView:
    """Where this step's tokens go in the paged cache, and what each sequence can look back on.

    A page holds `page_size` consecutive positions of one sequence, in every layer at the same page number.
    """

    # By layer: (P, page_size, *attention.cache_shape), or in FP8 uint8 (P, page_size, *cost.fp8_cache_shape).
    # Written by attention.
    pages: tuple[Tensor, ...]
    slots_T: Tensor  # int64: page * page_size + offset, where each new token is kept
    block_table_SB: Tensor  # int32: the pages of each sequence in order; rows padded with 0
    context_lens_S: Tensor  # int32: positions of each sequence after this step, new tokens included
    max_context_len: int  # none of them is larger; on the host
    has_prefix: bool  # some sequence looks back on positions that are not in this step
    # Where an indexer's keys are narrow, and not in the rows of `pages`, by layer: (P, page_size, I) e4m3 and
    # their scales, (P, page_size) float32. Written by the indexer.
    index_keys: tuple[tuple[Tensor, Tensor], ...] = ()
    chunks: tuple[Chunk, ...] = ()  # in order; one left out is served all the same, as a decode is
    # Where a step goes in pieces (engine/pieces.py), whose rows are padded and whose lengths are not here:
    # asks for attention between them.
    between: Between | None = None

    @property
    def page_size(self) -> int:
        return self.pages[0].shape[1]


@dataclass(frozen=True, eq=False)
class Stretch:
    """Some rows of a part of a pack: a stretch of each sequence, which may be empty, and what it looks back
    on. Of n queries of a sequence over N keys, query i sees the first N - n + i + 1."""

    rows: slice
    cu_seqlens_S1: Tensor  # int32: the boundaries of the stretches, as in a Batch
    max_seqlen: int
    keys_N: Tensor | None  # int64: its keys, of those that the part gathers; None is all
    cu_keys_S1: Tensor  # int32: and their boundaries
    max_keys: int


@dataclass(frozen=True, eq=False)
class Part:
    """Says of a Batch that its tokens are some of a pack's, and that the others are elsewhere.

    What is said of whole sequences (how long they are, how loaded their experts) is said of the pack.
    """

    pack: Batch  # all of it, but for what the model computes
    rows_T: Tensor  # int64: which of the pack's rows are here
    sequence_T: Tensor  # int64: and in which of its sequences
    stretches: tuple[Stretch, ...]  # one after the other, all rows that are here
    gather: Callable[[Tensor], Tensor]  # (T, X) here -> all that the stretches look back on; differentiable
    reduce: Callable[[Tensor], Tensor]  # the sum over the pack's parts

    def of(self, pack: Batch) -> Batch:
        """The batch of these rows of a pack, or of another with the same sequences."""
        tensors = {name: value for name, value in vars(pack).items() if isinstance(value, Tensor)}
        del tensors["cu_seqlens_S1"]
        return replace(
            pack,
            **{name: value.index_select(0, self.rows_T) for name, value in tensors.items()},
            part=replace(self, pack=pack),
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """One step's worth of tokens: S sequences laid end to end."""

    ids_T: Tensor  # int64
    positions_T: Tensor  # int64: 0 at the start of each document; in serving, where the cache continues
    cu_seqlens_S1: Tensor  # int32: sequence s is rows cu[s] to cu[s+1]
    max_seqlen: int  # the longest of them, on the host
    targets_T: Tensor | None = None  # int64: the token that follows each, valid ids everywhere
    weights_T: Tensor | None = None  # float32: 0 where a target does not count
    kv: KVView | None = None  # None in training
    last_S: Tensor | None = None  # int64: rows whose logits are wanted; None means every row
    routing: Tensor | None = None  # (T, L, K) int: recorded expert choices to replay, instead of the router's
    part: Part | None = None  # None: it is whole. Boundaries are those of the pack that it is a part of

    @property
    def num_tokens(self) -> int:
        return self.ids_T.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens_S1.shape[0] - 1

    def attended(self, attend: Attend, *rows: Tensor) -> Tensor:
        """`attend` of rows and this batch, here or between the pieces of a step."""
        between = None if self.kv is None else self.kv.between
        return attend(*rows, self, None) if between is None else between(attend, rows)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, itself where it is there already. One with a cache stays with it."""
        if self.ids_T.device == device:
            return self
        assert self.part is None, "a part is cut where it is used"
        if self.kv is not None:
            raise ValueError(f"the batch reads a cache on {self.ids_T.device}; it cannot go to {device}")
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})
