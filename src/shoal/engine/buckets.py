"""Buckets: steps of nothing but decodes, padded to a few fixed shapes, so that a CUDA graph can replay them.

A graph repeats the very launches it has seen, with no work on the host: at batch 1 that work costs several
times the arithmetic. It asks for fixed sizes and fixed places in memory. A bucket is such a size: its inputs
lie in one slab, the rows that no sequence fills are padding, which writes to the scratch page, attends to
itself and is dropped. On a CPU the same padded step runs without a graph.

The law: a row's results do not depend on whether it was padded, nor on the bucket it was padded to.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shoal.batch import Chunk
from shoal.engine import staging


class Inputs(NamedTuple):
    """All that a step reads but the cache: on the device, but for what is an int, a bool or a Chunk."""

    codes_T: Tensor  # int64: an id, or -1 - its place in the table of tokens
    positions_T: Tensor  # int64
    slots_T: Tensor  # int64
    last_M: Tensor | None  # int64: rows to draw from; None for all
    cu_seqlens_S1: Tensor  # int32
    contexts_S: Tensor  # int32
    table_SB: Tensor  # int32
    max_seqlen: int
    max_context_len: int
    has_prefix: bool
    chunks: tuple[Chunk, ...] = ()  # a bucket has none: a graph holds no lengths
    ends_S: Tensor | None = None  # int64: where later steps of a burst end (burst.py)


class Row(NamedTuple):
    """A decoding sequence's next tokens: its last one, and drafts to verify."""

    codes: list[int]
    start: int
    pages: list[int]
    end: int = 0  # of a burst: the position after the last that it computes


Outputs = tuple[Tensor, ...]
Forward = Callable[[Inputs], Outputs]


class Bucket:
    """`size` sequences of `tokens` new tokens each, their contexts no longer than `contexts`."""

    def __init__(
        self, size: int, tokens: int, contexts: int, page_size: int, scratch: int, device: torch.device
    ) -> None:
        self.size, self.tokens, self.page_size, self._scratch = size, tokens, page_size, scratch
        self._width = -(-contexts // page_size)
        self._slab = staging.Slab(self._arrays([]), device)
        codes_T, positions_T, slots_T, contexts_S, table_SB, ends_S = self._slab.arrays
        self.inputs = Inputs(
            codes_T=codes_T,
            positions_T=positions_T,
            slots_T=slots_T,
            last_M=None,
            cu_seqlens_S1=torch.arange(size + 1, dtype=torch.int32, device=device) * tokens,
            contexts_S=contexts_S,
            table_SB=table_SB,
            max_seqlen=tokens,
            max_context_len=contexts,
            has_prefix=True,
            ends_S=ends_S,
        )
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: Outputs = ()

    def run(self, rows: list[Row], forward: Forward) -> Outputs:
        """The forward pass of these rows and padding. On CUDA the outputs are overwritten by the next run."""
        if self._graph is None and self.inputs.codes_T.is_cuda:
            forward(self.pad())  # whatever is done the first time only
            self.capture(forward)
        self._slab.fill(self._arrays(rows))
        return self.again(forward)

    def again(self, forward: Forward) -> Outputs:
        """The same of what now stands in `inputs`."""
        if self._graph is None:
            return forward(self.inputs)
        self._graph.replay()
        return self._outputs

    def pad(self) -> Inputs:
        """Padding alone."""
        self._slab.fill(self._arrays([]))
        return self.inputs

    def capture(self, forward: Forward, pool: Any = None) -> Any:
        """Record the graph, with padding alone, and name the pool its memory came from."""
        self.pad()
        torch.cuda.synchronize(self.inputs.codes_T.device)
        graph = torch.cuda.CUDAGraph()
        # Not by torch.cuda.graph, which gives all that is cached back to the system each time, for 60 ms.
        with torch.cuda.stream(_stream()):
            graph.capture_begin(pool or torch.cuda.graph_pool_handle())
            self._outputs = forward(self.inputs)
            graph.capture_end()
        self._graph = graph
        return graph.pool()

    def _arrays(self, rows: list[Row]) -> list[np.ndarray]:
        size, tokens, page = self.size, self.tokens, self.page_size
        codes = np.zeros((size, tokens), np.int64)
        starts = np.zeros(size, np.int64)
        table = np.full((size, self._width), self._scratch, np.int32)
        ends = np.ones(size, np.int64)
        for place, (new, start, pages, end) in enumerate(rows):
            codes[place], starts[place], ends[place] = new, start, end
            table[place, : len(pages)] = pages[: self._width]
        positions = starts[:, None] + np.arange(tokens)
        slots = (
            np.take_along_axis(table, positions // page, axis=1).astype(np.int64) * page + positions % page
        )
        contexts = (starts + tokens).astype(np.int32)
        return [codes.ravel(), positions.ravel(), slots.ravel(), contexts, table, ends]


@cache
def _stream() -> torch.cuda.Stream:
    """Of all recordings: graphs that share a pool share it."""
    return torch.cuda.Stream()


class Buckets:
    """All the shapes: every size with every bound of the context."""

    def __init__(
        self,
        sizes: tuple[int, ...],
        contexts: tuple[int, ...],
        page_size: int,
        scratch: int,
        device: torch.device,
    ) -> None:
        self.sizes, self.contexts = tuple(sorted(sizes)), tuple(sorted(contexts))
        self._page_size, self._scratch, self._device = page_size, scratch, device
        self._made: dict[tuple[int, int, int], Bucket] = {}

    def find(self, size: int, tokens: int, context: int) -> Bucket | None:
        """The smallest that holds so many sequences of so many new tokens, with so long a context."""
        sizes = [bound for bound in self.sizes if bound >= size]
        contexts = [bound for bound in self.contexts if bound >= context]
        return self._get(sizes[0], tokens, contexts[0]) if sizes and contexts else None

    def capture(self, forward: Forward, tokens: int) -> None:
        """Every graph there is, the largest first: the others then fit into its memory."""
        pool = None
        gc.collect()  # now, not in a recording
        for size in reversed(self.sizes):
            for context in reversed(self.contexts):
                pool = self._get(size, tokens, context).capture(forward, pool)

    def shapes(self, tokens: int) -> Iterator[Inputs]:
        """The inputs of all graphs, as padding alone."""
        return (self._get(size, tokens, context).pad() for size in self.sizes for context in self.contexts)

    def _get(self, size: int, tokens: int, context: int) -> Bucket:
        key = size, tokens, context
        if key not in self._made:
            self._made[key] = Bucket(*key, self._page_size, self._scratch, self._device)
        return self._made[key]


def default_sizes(most: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then steps of an eighth or less up to a multiple of 8 at `most`."""
    sizes = [1, 2, 4, 8]
    while sizes[-1] < most:
        last = sizes[-1]
        sizes.append(last + (8 if last < 64 else 16 if last < 128 else 32))
    return (*(size for size in sizes if size < most), most)


def default_contexts(longest: int) -> tuple[int, ...]:
    """Bounds of the context, each an eighth of the next: a short one has a small block table to send."""
    contexts = [longest]
    while contexts[0] > 8192:
        contexts.insert(0, contexts[0] // 8)
    return tuple(contexts)
