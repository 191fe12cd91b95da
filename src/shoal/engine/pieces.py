"""Pieces: steps that read prompts, padded to a few fixed lengths, so that CUDA graphs can replay all of them
but attention.

An eager step has some forty launches a layer: of 27 layers it waits 40 ms for the host, in which an H200
reads 4,000 tokens. Attention's launches depend on lengths of chunks and contexts; all else sees rows, and
their number alone. So the forward pass is recorded as graphs that end where attention begins. A step replays
a graph, attends with the rows that are its own, its output projected to where the next graph reads it, and
replays that. Rows past them are padding: they write to the scratch page, and of attention they get what was
there before.

Graphs of all lengths share a pool, in which what one layer computes lies where the one before had it. What
attention is given is therefore remembered by address, not held: it is good until the next graph runs.

The law: padding changes no row's results. On a CPU the same padded step runs without graphs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from shoal.batch import Attend, Batch, Between
from shoal.config.model import GQAConfig, MLAConfig, ModelConfig
from shoal.engine.settings import EngineSettings
from shoal.engine.team import Alone, Team
from shoal.model.offloaded import offloaded
from shoal.model.transformer import Transformer

Forward = Callable[[Tensor, Between], Tensor]  # ids, positions and slots (3, T) -> hidden (T, D)
MOST = 4096  # tokens: longer steps take longer than their launches


@dataclass(eq=False)
class Recording:
    """A step of one length. Call i of attention comes between graphs i and i + 1."""

    graphs: list[torch.cuda.CUDAGraph] = field(default_factory=list)
    calls: list[tuple[Attend, tuple[Tensor, ...]]] = field(default_factory=list)


class Pieces:
    """`lengths` are those to which steps are padded, () for none; `scratch` the slot that padding writes."""

    def __init__(
        self,
        lengths: tuple[int, ...],
        config: ModelConfig,
        scratch: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.lengths, self._on_cuda = tuple(sorted(lengths)), device.type == "cuda"
        longest = max(lengths, default=0)
        self._pad_31 = torch.tensor([[0], [0], [scratch]], device=device)
        self._rows = {length: self._pad_31.repeat(1, length) for length in self.lengths}
        self._attended_TD = torch.zeros(longest, config.hidden_size, dtype=dtype, device=device)
        self._hidden_TD = torch.zeros(longest, config.hidden_size, dtype=dtype, device=device)
        self._made: dict[int, Recording] = {}
        self._pool: Any = None

    def find(self, tokens: int) -> int | None:
        """The least length that holds so many."""
        return next((length for length in self.lengths if length >= tokens), None)

    def run(self, batch: Batch, length: int, forward: Forward) -> Tensor:
        """The hidden states of a batch's tokens. The next run overwrites them."""
        used, kv = batch.num_tokens, batch.kv
        assert kv is not None
        if self._on_cuda and length not in self._made:
            self.pad(length, forward)
            self.capture((length,), forward)
        rows_3T = torch.stack((batch.ids_T, batch.positions_T, kv.slots_T))
        torch.cat((rows_3T, self._pad_31.expand(3, length - used)), dim=1, out=self._rows[length])

        def attend(what: Attend, rows: tuple[Tensor, ...]) -> Tensor:
            what(*(each[:used] for each in rows), batch, self._attended_TD[:used])
            return self._attended_TD[:length]

        if not self._on_cuda:
            return forward(self._rows[length], attend)[:used]
        recording = self._made[length]
        for graph, call in zip(recording.graphs, (*recording.calls, None), strict=True):
            graph.replay()
            if call is not None:
                attend(*call)
        return self._hidden_TD[:used]

    def capture(self, lengths: tuple[int, ...], forward: Forward) -> None:
        """Record these lengths, the largest first: the others then fit into its memory."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize()
        gc.collect()  # now, not in a recording
        with torch.cuda.stream(torch.cuda.Stream()):
            for length in sorted(lengths, reverse=True):
                self._made[length] = self._record(length, forward)
        torch.cuda.synchronize()

    def pad(self, length: int, forward: Forward) -> None:
        """A step of padding alone, eagerly and without attention: what is done the first time only."""
        forward(self._rows[length], lambda *_: self._attended_TD[:length])

    def _record(self, length: int, forward: Forward) -> Recording:
        made = Recording()

        def begin() -> None:
            made.graphs.append(torch.cuda.CUDAGraph())
            made.graphs[-1].capture_begin(pool=self._pool)

        def between(what: Attend, rows: tuple[Tensor, ...]) -> Tensor:
            made.graphs[-1].capture_end()
            made.calls.append((what, tuple(map(_where, rows))))
            begin()
            return self._attended_TD[:length]

        begin()
        self._hidden_TD[:length] = forward(self._rows[length], between)
        made.graphs[-1].capture_end()
        return made


class _Memory:
    """Bytes of a device that are somebody else's, by the protocol in which libraries hand them over."""

    def __init__(self, at: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (at, False),
            "version": 3,
        }


def _where(tensor: Tensor) -> Tensor:
    """The same elements, without keeping their memory from being used again."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    elements = 1 + sum((size - 1) * stride for size, stride in steps)
    memory = _Memory(tensor.data_ptr(), elements * tensor.element_size())
    flat = torch.as_tensor(memory, device=tensor.device).view(tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride())


def choose_lengths(model: Transformer, settings: EngineSettings, team: Team) -> tuple[int, ...]:
    """Those of the settings, which may be refused, or else those that pay."""
    why = why_not(model) if isinstance(team, Alone) else "the processes of a team meet eagerly"
    if settings.lengths is None:
        return default_lengths(settings.max_batch_tokens) if model.head_weight().is_cuda and not why else ()
    if settings.lengths and why:
        raise ValueError(f"lengths are {settings.lengths}, but {why}; leave them out")
    return settings.lengths


def why_not(model: Transformer) -> str | None:
    """Why a model's steps cannot go in pieces, if so."""
    attention = model.config.attention
    if any(offloaded(model)):
        return "a graph never waits for the router's choice, and so cannot fetch offloaded experts"
    if isinstance(attention, GQAConfig) or (isinstance(attention, MLAConfig) and attention.indexer is None):
        return None
    return "sparse attention computes more than attention from the lengths of a step"


def default_lengths(most: int) -> tuple[int, ...]:
    """From 64 on, each an eighth to a quarter more than the one before, up to `most`, or MOST."""
    most, lengths = min(most, MOST), [64]
    while lengths[-1] < most:
        lengths.append(lengths[-1] + max(64, 2 ** (lengths[-1].bit_length() - 3)))
    return (*(length for length in lengths if length < most), most)
