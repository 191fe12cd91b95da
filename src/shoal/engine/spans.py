"""Span: tokens of one sequence that go through the model in a step. Inputs: those of a step, laid end to end.

The law: everything that a step needs of the host goes to the device in one transfer.
"""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

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


class Span(NamedTuple):
    """Tokens of one sequence that go through the model: the next of a pick, or those of a draft."""

    pages: list[int]
    start: int  # the position of the first
    codes: list[int]  # ids, or places of `tokens`
    num_drawn: int  # of how many, from the last, the next token is wanted


def lay_out(spans: list[Span], lasts: list[int] | None, page_size: int, device: torch.device) -> Inputs:
    """Spans laid end to end, on the device in one transfer; `lasts` are the ends of a burst."""
    starts = np.array([span.start for span in spans])
    lengths = np.array([len(span.codes) for span in spans])
    ends = starts + lengths
    bounds = np.concatenate(([0], lengths.cumsum()))
    total, longest = int(bounds[-1]), int(max(lasts) if lasts else ends.max())
    codes = np.array([code for span in spans for code in span.codes], np.int64)
    table = np.zeros((len(spans), -(-longest // page_size)), np.int32)
    fill_table(table, spans)
    rows = np.arange(total)
    positions = rows - np.repeat(bounds[:-1] - starts, lengths)
    pages = table[np.repeat(np.arange(len(spans)), lengths), positions // page_size]
    slots = pages.astype(np.int64) * page_size + positions % page_size
    (last,) = (rows >= np.repeat(bounds[1:] - [span.num_drawn for span in spans], lengths)).nonzero()
    placed = staging.send(
        [
            codes,
            positions,
            slots,
            last,
            bounds.astype(np.int32),
            ends.astype(np.int32),
            table,
            *([np.array(lasts)] if lasts else []),
        ],
        device,
    )
    codes_T, positions_T, slots_T, last_M, cu_seqlens_S1, contexts_S, table_SB, *ends_S = placed
    return Inputs(
        codes_T=codes_T,
        positions_T=positions_T,
        slots_T=slots_T,
        last_M=None if len(last) == total else last_M,  # every row, when all are decodes
        cu_seqlens_S1=cu_seqlens_S1,
        contexts_S=contexts_S,
        table_SB=table_SB,
        max_seqlen=int(lengths.max()),
        max_context_len=longest,
        has_prefix=any(span.start for span in spans),
        chunks=tuple(
            Chunk(at, int(bounds[at]), int(new), int(ends[at])) for at, new in enumerate(lengths) if new > 1
        ),
        ends_S=ends_S[0] if ends_S else None,
    )


def fill_table(table_SB: np.ndarray, spans: list[Span]) -> None:
    """The pages of each in its row, as many as there is room for."""
    width = table_SB.shape[1]
    rows = [span.pages[:width] for span in spans]
    counts = np.array([len(row) for row in rows])
    inside = np.arange(width) < counts[:, None]
    table_SB[: len(rows)][inside] = list(chain.from_iterable(rows))
