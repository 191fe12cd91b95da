"""Batches from a shard: documents laid end to end, cut to size, no token padded, lost or used twice.

A training batch is a pure function of (seed, step). Each epoch lays all documents out in an order of its own,
the epochs follow one another in one endless stream, and step s is tokens s*T to (s+1)*T of it. So a run
resumes, or jumps, with no state but the step, and processes may share one stream. Of several
sources, each is such a stream, and every batch takes its weight's share of each, to the token.

The law: attention never crosses from one document to another. A document that a batch's edge or `seq_len`
cuts goes on as a new sequence from position 0. Every token is predicted from the one before it in its
document, across cuts too; only the last of a document has nothing to predict, and weighs 0.

Shape letters: T tokens, S sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
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
    order: NDArray[np.uint32]  # the documents in order
    starts: Ints  # where every BLOCK-th of them starts in the epoch


BLOCK = 1024  # documents; so an epoch in memory takes 4 bytes a document, and there are two at most


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
        return self.stretch(step * self.tokens_per_batch, (step + 1) * self.tokens_per_batch)

    def stretch(self, start: int, stop: int) -> Batch:
        """Tokens `start` to `stop` of the endless stream."""
        total = self.shard.num_tokens
        epochs = range(start // total, -(-stop // total))
        spans = [self._spans(n, max(start - n * total, 0), min(stop - n * total, total)) for n in epochs]
        return _assemble(self.shard, _Spans(*map(np.concatenate, zip(*spans, strict=True))).cut(self.seq_len))

    def _spans(self, epoch: int, start: int, stop: int) -> _Spans:
        """Tokens `start` to `stop` of an epoch."""
        order, block_starts = self._epoch(epoch)
        block = int(np.searchsorted(block_starts, start, side="right")) - 1
        last_block = int(np.searchsorted(block_starts, stop, side="left"))
        documents = order[block * BLOCK : last_block * BLOCK]
        ends = block_starts[block] + np.cumsum(
            self.shard.offsets[documents + 1] - self.shard.offsets[documents]
        )
        inside = slice(
            np.searchsorted(ends, start, side="right"), np.searchsorted(ends, stop, side="left") + 1
        )
        documents, ends = documents[inside], ends[inside]
        starts = ends - (self.shard.offsets[documents + 1] - self.shard.offsets[documents])
        skipped = np.maximum(start - starts, 0)
        return _Spans(
            self.shard.offsets[documents] + skipped,
            np.minimum(ends, stop) - starts - skipped,
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
        ends = np.cumsum(np.diff(self.shard.offsets)[order])
        starts = np.concatenate([[0], ends[BLOCK - 1 : -1 : BLOCK]])
        return _Epoch(order.astype(np.uint32), starts)


@dataclass(frozen=True, eq=False)
class Mixture:
    """Several sources, each in a stream of its own: every batch has their tokens in proportion to `weights`.

    Before step s, source j has given floor(s*T*W_j) - floor(s*T*W_(j-1)) tokens, W the weights summed up to
    1: exact over any number of steps, and a function of the step alone. A small source comes again sooner.
    """

    shards: tuple[Shard, ...]
    weights: tuple[float, ...]
    tokens_per_batch: int
    seq_len: int
    seed: int

    def __post_init__(self) -> None:
        if not self.shards or len(self.shards) != len(self.weights):
            raise ValueError(f"{len(self.shards)} sources have {len(self.weights)} weights; give one to each")
        for n, share in enumerate(self._sums):
            least = share - (self._sums[n - 1] if n else 0)
            tokens = float(least * self.tokens_per_batch)
            if tokens < 2:
                raise ValueError(
                    f"source {n} has a weight of {self.weights[n]} and {tokens:.1f} tokens "
                    f"of a batch of {self.tokens_per_batch}; it needs 2: raise its weight or the batch"
                )
        if len({shard.vocab_size for shard in self.shards}) > 1:
            raise ValueError("the sources have several vocabularies; pack them with one tokenizer")
        assert self._packers

    @property
    def steps_per_epoch(self) -> float:
        """Steps until every source has been read once at least."""
        shares = np.diff([0.0, *map(float, self._sums)])
        sizes = [shard.num_tokens for shard in self.shards]
        return max(size / (share * self.tokens_per_batch) for size, share in zip(sizes, shares, strict=True))

    def batch(self, step: int) -> Batch:
        starts, stops = self._given(step), self._given(step + 1)
        parts = [
            packer.stretch(start, stop)
            for packer, start, stop in zip(self._packers, starts, stops, strict=True)
        ]
        return _join(parts)

    def _given(self, step: int) -> list[int]:
        """Tokens each source has given before `step`."""
        bounds = [0, *(math.floor(step * self.tokens_per_batch * total) for total in self._sums)]
        return [after - before for before, after in pairwise(bounds)]

    @cached_property
    def _sums(self) -> list[Fraction]:
        """The weights up to each source, of a whole of 1; as they were written, so no rounding adds up."""
        if not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"the weights are {self.weights}; each is positive and finite")
        sums = list(accumulate(Fraction(str(weight)) for weight in self.weights))
        return [part / sums[-1] for part in sums]

    @cached_property
    def _packers(self) -> list[Packer]:
        shares = [int(stop) for stop in self._given(1)]
        return [
            Packer(shard, max(share, self.seq_len), self.seq_len, self.seed)
            for shard, share in zip(self.shards, shares, strict=True)
        ]


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


def _join(parts: Sequence[Batch]) -> Batch:
    """The sequences of all, in order."""
    ends = accumulate((part.num_tokens for part in parts), initial=0)
    cu_S1 = [
        part.cu_seqlens_S1[n > 0 :] + end for n, (part, end) in enumerate(zip(parts, ends, strict=False))
    ]
    return Batch(
        ids_T=torch.cat([part.ids_T for part in parts]),
        positions_T=torch.cat([part.positions_T for part in parts]),
        cu_seqlens_S1=torch.cat(cu_S1),
        max_seqlen=max(part.max_seqlen for part in parts),
        targets_T=torch.cat([part.targets_T for part in parts if part.targets_T is not None]),
        weights_T=torch.cat([part.weights_T for part in parts if part.weights_T is not None]),
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
