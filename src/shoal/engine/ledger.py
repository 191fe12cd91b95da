"""Ledger: what serving takes of a device's memory, before any of it is taken.

Weights, what the largest step holds at once, graphs, and the rest for the cache: so many pages, which are so
many tokens, or so many requests of the longest context. What does not fit is reduced, and `notes` says what
and how to have it otherwise; a device too small for anything is told the setting and a value that fits.

What a step holds is summed tensor by tensor from the shapes of the model, in the widest of its layers, scores
of an indexer over the longest context among them. It is an upper bound by a little: PyTorch frees as it goes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import partial

import torch

from shoal.config.cost import forward_bytes, step_bytes
from shoal.config.model import ModelConfig
from shoal.engine.buckets import default_contexts
from shoal.engine.cache import count_page_bytes
from shoal.engine.records import count_record_bytes
from shoal.engine.settings import EngineSettings
from shoal.engine.team import Team
from shoal.model.offloaded import host_bytes, rounds_bytes
from shoal.model.quantised import scratch_bytes
from shoal.model.transformer import Transformer

_GIB = 2**30
SMALL_BYTES = 2**21  # PyTorch's least piece of memory: what stands between the steps of bursts is less
WORKSPACE_BYTES = 2**25  # of cuBLAS's on a stream (Hopper): for eager steps, and for the capture of graphs


@dataclass(frozen=True)
class Ledger:
    """In bytes. The last page of `cache` is the one that takes what padding writes."""

    limit: int  # what may be used of the device
    weights: int
    activations: int  # at the largest step
    graphs: int
    page: int  # one page in all layers, records included
    page_size: int
    num_pages: int
    longest: int  # positions of the longest request that is served
    notes: tuple[str, ...] = ()
    host: int = 0  # of host memory: offloaded experts

    @property
    def cache(self) -> int:
        return (self.num_pages + 1) * self.page

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.graphs + self.cache

    def __str__(self) -> str:
        tokens = self.num_pages * self.page_size
        rows = [
            f"weights      {self.weights / _GIB:9.2f} GiB",
            f"activations  {self.activations / _GIB:9.2f} GiB at the largest step",
            f"graphs       {self.graphs / _GIB:9.2f} GiB",
            f"cache        {self.cache / _GIB:9.2f} GiB = {tokens:,} tokens = "
            f"{tokens // self.longest:,} requests of {self.longest:,}",
            f"together     {self.total / _GIB:9.2f} GiB of {self.limit / _GIB:.2f}",
            *([f"host memory  {self.host / _GIB:9.2f} GiB of experts"] if self.host else []),
            *self.notes,
        ]
        return "\n".join(rows)


def draw_up(
    config: ModelConfig,
    *,
    limit: int,
    weights: int,
    dtype_bytes: int,
    page: int,
    page_size: int,
    num_pages: int | None,
    max_batch_tokens: int,
    max_sequences: int,
    graph_sizes: tuple[int, ...] = (),
    graphs_a_size: int = 1,
    longest_graph: int = 0,
    scratch: int = 0,
) -> Ledger:
    """The ledger of an engine with these settings: as many pages as fit, if `num_pages` does not say.

    `scratch` is what a step holds beside its activations. ValueError if the limit holds no cache at all, or
    less than the pages asked for.
    """
    notes: list[str] = []
    context = config.max_position_embeddings
    if num_pages is not None:
        context = min(context, num_pages * page_size)
    drawn = min(max_batch_tokens, max_sequences)
    activations = step_bytes(
        config,
        max_batch_tokens,
        drawn,
        dtype_bytes,
        context=context,
        in_pieces=longest_graph >= max_batch_tokens,
    )
    activations += scratch + (WORKSPACE_BYTES if graph_sizes else 0)
    graphs = 0
    if graph_sizes:
        widest, kept = max(graph_sizes), config.hidden_size * dtype_bytes  # each graph's results, a row
        # Logits are written where they stay, so that a step in a graph holds none besides.
        graphs = graphs_a_size * sum(graph_sizes) * kept + config.vocab_size * widest * dtype_bytes
        graphs += forward_bytes(config, widest, 0, dtype_bytes, context=context) + WORKSPACE_BYTES
    graphs += pieces_bytes(config, longest_graph, dtype_bytes)
    fixed = weights + activations + graphs
    affordable = (limit - fixed) // page - 1
    usable = max_sequences * -(-config.max_position_embeddings // page_size)
    if affordable < (num_pages or 1):
        wanted = fixed + ((num_pages or 1) + 1) * page
        raise ValueError(
            f"serving takes {wanted / _GIB:.2f} GiB (weights {weights / _GIB:.2f}, activations "
            f"{activations / _GIB:.2f}, graphs {graphs / _GIB:.2f}), but {limit / _GIB:.2f} GiB may be used; "
            + _remedy(config, limit - fixed + activations - 2 * page, affordable, max_sequences, dtype_bytes)
        )
    pages = min(affordable, usable) if num_pages is None else num_pages
    longest = min(config.max_position_embeddings, pages * page_size)
    if longest < config.max_position_embeddings:
        missing = -(-config.max_position_embeddings // page_size) - pages
        notes.append(
            f"the context is cut from {config.max_position_embeddings:,} to {longest:,} tokens: the cache "
            f"holds no more; {missing * page / _GIB:.2f} GiB more would hold it whole"
        )
    return Ledger(limit, weights, activations, graphs, page, page_size, pages, longest, tuple(notes))


def pieces_bytes(config: ModelConfig, longest: int, dtype_bytes: int) -> int:
    """Of steps recorded in pieces (pieces.py): the longest one, what attention gives it, and its results."""
    if not longest:
        return 0
    kept = longest * 2 * config.hidden_size * dtype_bytes
    return kept + forward_bytes(config, longest, 0, dtype_bytes) + WORKSPACE_BYTES


def _remedy(config: ModelConfig, room: int, affordable: int, max_sequences: int, dtype_bytes: int) -> str:
    """The one setting to change, and a value that fits. `room` is what a step may hold beside one page."""
    if affordable >= 1:
        return f"lower num_pages to {affordable}, or leave it out"
    tokens = 1 << 20
    while tokens and step_bytes(config, tokens, min(tokens, max_sequences), dtype_bytes) > room:
        tokens //= 2
    if not tokens:
        return "take a smaller model, or a device with more memory"
    if tokens < max_sequences:
        return f"lower max_batch_tokens and max_sequences to {tokens}"
    return f"lower max_batch_tokens to {tokens}"


def of_engine(
    model: Transformer,
    settings: EngineSettings,
    graph_sizes: tuple[int, ...],
    team: Team | None = None,
    longest_graph: int = 0,
) -> Ledger:
    """The ledger of an engine for a model that is already where it will run; of a team, that of the first,
    with no more pages than fit on each."""
    config, head = model.config, model.head_weight()
    size = settings.page_size
    page = count_page_bytes(
        config,
        size,
        head.dtype,
        mtp=settings.speculate > 0,
        index_keys=settings.index_keys,
        cache_dtype=settings.cache_dtype,
    )
    cache_bytes, num_pages = settings.cache_bytes, settings.num_pages
    if cache_bytes is None and not head.is_cuda:
        cache_bytes = 1 << 30
    if num_pages is None and cache_bytes is not None:
        if cache_bytes < page:
            raise ValueError(
                f"cache_bytes is {cache_bytes}, but a page of {size} positions takes {page}; raise it, or "
                f"lower page_size"
            )
        usable = settings.max_sequences * -(-config.max_position_embeddings // size)
        num_pages = min(cache_bytes // page, usable)
    host = host_bytes(model)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) - host
    if head.is_cuda:
        free, total = torch.cuda.mem_get_info(head.device)
        limit = min(int(settings.memory * total), free + torch.cuda.memory_reserved(head.device))
    else:
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    draft = partial(
        draw_up,
        config,
        limit=limit,
        weights=weights,
        dtype_bytes=head.dtype.itemsize,
        page=page + size * count_record_bytes(config, weights=settings.record_weights),
        page_size=size,
        max_batch_tokens=settings.max_batch_tokens * (1 if team is None else team.crowd),
        max_sequences=settings.max_sequences,
        graph_sizes=graph_sizes,
        longest_graph=longest_graph,
        graphs_a_size=len(default_contexts(config.max_position_embeddings)) * (1 + (settings.speculate > 0)),
        scratch=scratch_bytes(model, head.dtype.itemsize)
        + rounds_bytes(model, settings.max_batch_tokens)
        + (SMALL_BYTES if settings.decode_steps > 1 and graph_sizes else 0),
    )
    ledger = draft(num_pages=num_pages)
    least = ledger.num_pages if team is None else team.least(ledger.num_pages)
    ledger = ledger if least == ledger.num_pages else draft(num_pages=least)
    return replace(ledger, host=host)
