"""Batches from a shard: documents laid end to end, cut to size, no token padded, lost or used twice.

A training batch is a pure function of (seed, step). Each epoch lays all documents out in an order of its own,
the epochs follow one another in one endless stream, and step s is tokens s*T to (s+1)*T of it. So a run
resumes, or jumps, with no state but the step, and n ranks share one stream: rank r takes batch(n * step + r).

The law: attention never crosses from one document to another. A document that a batch's edge or `seq_len`
cuts goes on as a new sequence from position 0. Every token is predicted from the one before it in its
document, across cuts too; only the last of a document has nothing to predict, and weighs 0.

Shape letters: T tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.batch import Batch
from shoal.data.shard import Shard

Ints = NDArray[np.int64]


class _Spans(NamedTuple):
    """Stretches of a shard's tokens, each within one document."""

    starts_S: Ints
    lengths_S: Ints
    document_ends_S: Ints

    def cut(self, seq_len: int) -> _Spans:
        """The same tokens in spans of at most `seq_len`."""
        pieces_S = -(-self.lengths_S // seq_len)
        first_S = np.cumsum(pieces_S) - pieces_S
        shift = seq_len * (np.arange(pieces_S.sum()) - np.repeat(first_S, pieces_S))
        lengths = np.minimum(np.repeat(self.lengths_S, pieces_S) - shift, seq_len)
        return _Spans(
            np.repeat(self.starts_S, pieces_S) + shift, lengths, np.repeat(self.document_ends_S, pieces_S)
        )


class _Epoch(NamedTuple):
    order: Ints  # the documents in order
    starts: Ints  # where each starts in the epoch, and last where all end


@dataclass(frozen=True, eq=False)
class Packer:
    """Every batch has `tokens_per_batch` tokens, in sequences of at most `seq_len`."""

    shard: Shard
    tokens_per_batch: int
    seq_len: int
    seed: int

    def __post_init__(self) -> None:
        _check_lengths(self.tokens_per_batch, self.seq_len)
        if self.shard.num_tokens < self.tokens_per_batch:
            raise ValueError(
                f"the text has {self.shard.num_tokens} tokens, less than a batch of {self.tokens_per_batch}; "
                "give more text or a smaller tokens_per_batch"
            )
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed is {self.seed}; it must be between 0 and 2^64 - 1")

    @property
    def steps_per_epoch(self) -> float:
        return self.shard.num_tokens / self.tokens_per_batch

    def batch(self, step: int) -> Batch:
        epoch, start = divmod(step * self.tokens_per_batch, self.shard.num_tokens)
        stop = start + self.tokens_per_batch
        spans = self._spans(epoch, start, min(stop, self.shard.num_tokens))
        if stop > self.shard.num_tokens:
            rest = self._spans(epoch + 1, 0, stop - self.shard.num_tokens)
            spans = _Spans(*map(np.concatenate, zip(spans, rest, strict=True)))
        return _assemble(self.shard, spans.cut(self.seq_len))

    def _spans(self, epoch: int, start: int, stop: int) -> _Spans:
        """Tokens `start` to `stop` of an epoch."""
        order, starts = self._epoch(epoch)
        first = np.searchsorted(starts, start, side="right") - 1
        last = np.searchsorted(starts, stop, side="left")
        skipped = np.maximum(start - starts[first:last], 0)
        ends = np.minimum(starts[first + 1 : last + 1], stop)
        documents = order[first:last]
        return _Spans(
            self.shard.offsets[documents] + skipped,
            ends - starts[first:last] - skipped,
            self.shard.offsets[documents + 1],
        )

    @cached_property
    def _epoch(self) -> Callable[[int], _Epoch]:
        """A batch touches two epochs at most, and the next one mostly the same."""
        return lru_cache(maxsize=2)(self._lay_out)

    def _lay_out(self, epoch: int) -> _Epoch:
        # Sorting raw counter-based numbers, and not a library's shuffle, keeps the order over versions of
        # numpy.
        key = np.array([self.seed, epoch], np.uint64)
        order = np.argsort(np.random.Philox(key=key).random_raw(self.shard.num_documents), kind="stable")
        lengths = np.diff(self.shard.offsets)[order]
        return _Epoch(order, np.concatenate([[0], np.cumsum(lengths)]))


def evaluation_batches(shard: Shard, tokens_per_batch: int, seq_len: int) -> Iterator[Batch]:
    """The whole shard once, in order, in batches of at most `tokens_per_batch` tokens.

    Documents are cut by `seq_len` alone, so the loss does not depend on the size of the batches. The text
    these tokens stand for has `shard.num_bytes` bytes.
    """
    _check_lengths(tokens_per_batch, seq_len)
    spans = _Spans(shard.offsets[:-1], np.diff(shard.offsets), shard.offsets[1:]).cut(seq_len)
    ends = np.cumsum(spans.lengths_S)
    first = 0
    while first < len(ends):
        limit = tokens_per_batch + (ends[first - 1] if first else 0)
        last = int(np.searchsorted(ends, limit, side="right"))
        yield _assemble(shard, _Spans(*(column[first:last] for column in spans)))
        first = last


def _check_lengths(tokens_per_batch: int, seq_len: int) -> None:
    if not 2 <= seq_len <= tokens_per_batch:
        raise ValueError(
            f"seq_len is {seq_len} and tokens_per_batch {tokens_per_batch}; a sequence has 2 tokens "
            "at least, and a batch holds one"
        )


def _assemble(shard: Shard, spans: _Spans) -> Batch:
    """One sequence a span."""
    cu_S1 = np.concatenate([[0], np.cumsum(spans.lengths_S)])
    positions_T = np.arange(cu_S1[-1]) - np.repeat(cu_S1[:-1], spans.lengths_S)
    source_T = positions_T + np.repeat(spans.starts_S, spans.lengths_S)
    has_next_T = source_T + 1 < np.repeat(spans.document_ends_S, spans.lengths_S)
    ids_T = shard.tokens[source_T].astype(np.int64)
    targets_T = shard.tokens[source_T + has_next_T].astype(np.int64)
    return Batch(
        ids_T=torch.from_numpy(ids_T),
        positions_T=torch.from_numpy(positions_T),
        cu_seqlens_S1=torch.from_numpy(cu_S1.astype(np.int32)),
        max_seqlen=int(spans.lengths_S.max()),
        targets_T=torch.from_numpy(targets_T),
        weights_T=torch.from_numpy(has_next_T.astype(np.float32)),
    )
