"""Real parts for the tests of the model: batches as the packer builds them, and as the engine's runner
does.

The cache is as hostile as the contract of KVView allows: pages are given out in scrambled order, page 0 to
nobody, and whatever was never written is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from shoal.batch import Batch, Chunk, KVView
from shoal.config.model import MLAConfig, ModelConfig

Ids = Sequence[int]


def draw_ids(vocab_size: int, length: int, seed: int = 0) -> list[int]:
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def fill(module: nn.Module, seed: int = 0, std: float = 0.2) -> None:
    """Random values for every parameter and buffer of the state, none of them special: norms about 1,
    biases of either sign."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        tensor.normal_(1.0 if "norm" in name else 0.0, std, generator=generator)


def boundaries(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def pack(*texts: Ids) -> Batch:
    """Whole texts end to end, as in training."""
    lengths = [len(text) for text in texts]
    return Batch(
        ids_T=torch.tensor([token for text in texts for token in text], dtype=torch.int64),
        positions_T=torch.cat([torch.arange(length) for length in (*lengths, 0)]),
        cu_seqlens_S1=boundaries(lengths),
        max_seqlen=max(lengths, default=0),
    )


class Cache:
    """Pages for a few sequences, and the batches that go on where each of them is."""

    def __init__(
        self,
        config: ModelConfig,
        sequences: int,
        *,
        page_size: int = 4,
        dtype: torch.dtype = torch.float32,
        narrow_index: bool = False,
    ) -> None:
        self.page_size, num_pages = page_size, 16 * sequences
        rows = (1 + num_pages, page_size)
        shape = (*rows, *config.attention.cache_shape)
        self.index_keys: tuple[tuple[Tensor, Tensor], ...] = ()
        if narrow_index:
            assert isinstance(config.attention, MLAConfig)
            assert config.attention.indexer is not None
            dim, shape = config.attention.indexer.index_head_dim, (*rows, config.attention.latent_dim)
            unwritten = torch.full((*rows, dim), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)  # NaN
            self.index_keys = tuple(
                (unwritten.clone(), torch.full(rows, math.nan)) for _ in range(config.num_cached_layers)
            )
        self.pages = tuple(torch.full(shape, math.nan, dtype=dtype) for _ in range(config.num_cached_layers))
        order = 1 + torch.randperm(num_pages, generator=torch.Generator().manual_seed(0))
        self.free = order.tolist()
        self.tables: list[list[int]] = [[] for _ in range(sequences)]
        self.lengths = [0] * sequences

    def feed(self, new: dict[int, Ids]) -> Batch:
        """A step with these new ids of these sequences."""
        starts = [self.lengths[s] for s in new]
        ends = [start + len(ids) for start, ids in zip(starts, new.values(), strict=True)]
        for s, end in zip(new, ends, strict=True):
            while len(self.tables[s]) * self.page_size < end:
                self.tables[s].append(self.free.pop())
            self.lengths[s] = end
        width = max(len(self.tables[s]) for s in new)
        lengths = [len(ids) for ids in new.values()]
        rows = boundaries(lengths).tolist()
        chunks = [
            Chunk(at, first, length, end)
            for at, (first, length, end) in enumerate(zip(rows, lengths, ends, strict=False))
            if length > 1
        ]
        kv = KVView(
            pages=self.pages,
            slots_T=torch.tensor(
                [
                    self._slot(s, at)
                    for s, start, end in zip(new, starts, ends, strict=True)
                    for at in range(start, end)
                ]
            ),
            block_table_SB=torch.tensor(
                [self.tables[s] + [0] * (width - len(self.tables[s])) for s in new], dtype=torch.int32
            ),
            context_lens_S=torch.tensor(ends, dtype=torch.int32),
            max_context_len=max(ends),
            has_prefix=any(starts),
            index_keys=self.index_keys,
            chunks=tuple(chunks),
        )
        return Batch(
            ids_T=torch.tensor([token for ids in new.values() for token in ids]),
            positions_T=torch.cat([torch.arange(*span) for span in zip(starts, ends, strict=True)]),
            cu_seqlens_S1=boundaries(lengths),
            max_seqlen=max(lengths),
            kv=kv,
        )

    def _slot(self, sequence: int, position: int) -> int:
        page, offset = divmod(position, self.page_size)
        return self.tables[sequence][page] * self.page_size + offset


def through_cache(
    cache: Cache,
    texts: Sequence[Ids],
    sizes: Sequence[Sequence[int]],
    forward: Callable[[Batch, dict[int, range]], Tensor],
) -> list[Tensor]:
    """Every row of every text, fed in chunks of its sizes and then token by token, all texts together.

    `forward` is given the batch of a step and the positions that it holds of each text.
    """
    spans = [_split(len(text), each) for text, each in zip(texts, sizes, strict=True)]
    rows: list[list[Tensor]] = [[] for _ in texts]
    for step in range(max(len(each) for each in spans)):
        now = {s: each[step] for s, each in enumerate(spans) if step < len(each)}
        batch = cache.feed({s: texts[s][span.start : span.stop] for s, span in now.items()})
        chunks = forward(batch, now).split([len(span) for span in now.values()])
        for s, chunk in zip(now, chunks, strict=True):
            rows[s].append(chunk)
    return [torch.cat(each) for each in rows]


def _split(length: int, sizes: Sequence[int]) -> list[range]:
    """Positions in chunks of these sizes; the rest one by one."""
    ends = list(accumulate(sizes))
    ends += range(sum(sizes) + 1, length + 1)
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
