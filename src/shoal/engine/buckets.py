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
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.engine import burst, staging
from shoal.engine.spans import Inputs, Span, fill_table

Outputs = tuple[Tensor, ...]
Forward = Callable[[Inputs], Outputs]


class Bucket:
    """`size` sequences of `tokens` new tokens each, their contexts no longer than `contexts`."""

    def __init__(
        self,
        size: int,
        tokens: int,
        contexts: int,
        page_size: int,
        scratch: int,
        device: torch.device,
        small_pool: Any = None,  # of graphs that hold a few numbers a row
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
        self._small_pool = small_pool
        self._graph: torch.cuda.CUDAGraph | None = None
        self._onward: torch.cuda.CUDAGraph | None = None
        self._outputs: Outputs = ()

    def run(self, spans: list[Span], ends: list[int] | None, forward: Forward) -> Outputs:
        """The forward pass of these and padding. On CUDA the outputs are overwritten by the next run."""
        if self._graph is None and self.inputs.codes_T.is_cuda:
            forward(self.pad())  # whatever is done the first time only
            self.capture(forward)
        self._slab.fill(self._arrays(spans, ends))
        return self.again(forward)

    def again(self, forward: Forward) -> Outputs:
        """The same of what now stands in `inputs`."""
        if self._graph is None:
            return forward(self.inputs)
        self._graph.replay()
        return self._outputs

    def advance(self, tokens_S: Tensor | None) -> None:
        """`burst.advance`, by a graph from the second time on."""
        burst.hand(self.inputs, tokens_S)
        if self._onward is not None:
            self._onward.replay()
            return
        scratch = self._scratch * self.page_size
        burst.advance(self.inputs, self.page_size, scratch)
        if self.inputs.codes_T.is_cuda:
            onward = partial(burst.advance, self.inputs, self.page_size, scratch)
            self._onward, _ = _record(onward, self._small_pool)

    def pad(self) -> Inputs:
        """Padding alone."""
        self._slab.fill(self._arrays([]))
        return self.inputs

    def capture(self, forward: Forward, pool: Any = None) -> Any:
        """Record the graph, with padding alone, and name the pool its memory came from."""
        self.pad()
        self._graph, self._outputs = _record(partial(forward, self.inputs), pool)
        return self._graph.pool()

    def _arrays(self, spans: list[Span], ends: list[int] | None = None) -> list[np.ndarray]:
        size, tokens, page, used = self.size, self.tokens, self.page_size, len(spans)
        codes, starts = np.zeros((size, tokens), np.int64), np.zeros(size, np.int64)
        lasts = np.ones(size, np.int64)
        table = np.full((size, self._width), self._scratch, np.int32)
        if used:
            codes[:used] = [span.codes for span in spans]
            starts[:used] = [span.start for span in spans]
            lasts[:used] = starts[:used] + tokens if ends is None else ends
            fill_table(table, spans)
        positions = starts[:, None] + np.arange(tokens)
        slots = (
            np.take_along_axis(table, positions // page, axis=1).astype(np.int64) * page + positions % page
        )
        contexts = (starts + tokens).astype(np.int32)
        return [codes.ravel(), positions.ravel(), slots.ravel(), contexts, table, lasts]


def _record(what: Callable[[], Any], pool: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of what is launched, and what it gave. Nothing is computed."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Not by torch.cuda.graph, which gives all that is cached back to the system each time, for 60 ms.
    with torch.cuda.stream(_stream()):
        graph.capture_begin(pool or torch.cuda.graph_pool_handle())
        outputs = what()
        graph.capture_end()
    return graph, outputs


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
        self._small_pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
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
            place = self._page_size, self._scratch, self._device, self._small_pool
            self._made[key] = Bucket(*key, *place)
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
