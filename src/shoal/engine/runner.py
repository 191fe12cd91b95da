"""Runner: from the scheduler's picks to logits, by one call of the model.

It owns the cache: for each layer a tensor of pages, the same page number for a sequence in all of them. It
turns the picks into a Batch with its KVView, everything the step needs in two transfers to the device, and
calls the very `Transformer` that was trained. What a page holds past the end of its sequence is never read,
so pages are not cleared.

Shape letters: T tokens of the step, S sequences, B pages of a sequence, P pages, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shoal.batch import Batch, KVView
from shoal.config.model import ModelConfig
from shoal.engine.scheduler import Pick
from shoal.model.transformer import Transformer
from shoal.ops import api as ops

_ALIGNMENT = 4  # elements: every row of a transfer begins on 16 bytes, as a freshly made tensor would


def count_page_bytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page in all layers."""
    return config.num_cached_layers * page_size * math.prod(config.attention.cache_shape) * dtype.itemsize


class Runner:
    def __init__(self, model: Transformer, num_pages: int, page_size: int) -> None:
        head = model.head_weight()
        shape = (num_pages, page_size, *model.config.attention.cache_shape)
        self.model, self.page_size, self.device = model, page_size, head.device
        self.pages = tuple(
            torch.empty(shape, dtype=head.dtype, device=head.device)
            for _ in range(model.config.num_cached_layers)
        )

    @torch.inference_mode()
    def run(self, picks: list[Pick]) -> Tensor:
        """Logits (S, V) for the picks that sample, in their order."""
        batch = self._batch(picks)
        return self.model.logits(self._forward(batch), batch)

    @torch.inference_mode()
    def score(self, pick: Pick, targets: list[int]) -> list[float]:
        """Log-probability of the token that follows each of the picked ones."""
        hidden_TD = self._forward(self._batch([pick]))
        targets_T = torch.tensor(targets, device=self.device)
        weights_T = torch.ones(len(targets), device=self.device)
        loss = ops.linear_cross_entropy(hidden_TD, self.model.head_weight(), targets_T, weights_T)
        return loss.nll_T.neg().tolist()

    def _forward(self, batch: Batch) -> Tensor:
        if self.model.training:
            raise ValueError(
                "the model is in training mode, where experts may drop tokens; call model.eval() first"
            )
        return self.model(batch).hidden_TD

    def _batch(self, picks: list[Pick]) -> Batch:
        # 1. Lay the picked tokens end to end.
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        last: list[int] = []
        boundaries = [0]
        contexts: list[int] = []
        size = self.page_size
        for pick in picks:
            sequence, start = pick.sequence, pick.sequence.num_computed
            end = start + pick.num_new
            ids += sequence.ids[start:end]
            positions += range(start, end)
            slots += [sequence.pages[at // size] * size + at % size for at in range(start, end)]
            boundaries.append(len(ids))
            contexts.append(end)
            if pick.samples:
                last.append(len(ids) - 1)
        # 2. The pages that hold them and what came before.
        longest = max(contexts)
        width = -(-longest // size)
        table: list[int] = []
        for pick in picks:
            pages = pick.sequence.pages[:width]
            table += pages + [0] * (width - len(pages))
        # 3. Over to the device.
        ids_T, positions_T, slots_T, last_S = self._place([ids, positions, slots, last], torch.int64)
        cu_seqlens_S1, context_lens_S, table_SB = self._place([boundaries, contexts, table], torch.int32)
        kv = KVView(
            pages=self.pages,
            slots_T=slots_T,
            block_table_SB=table_SB.view(len(picks), width),
            context_lens_S=context_lens_S,
            max_context_len=longest,
            has_prefix=any(pick.sequence.num_computed for pick in picks),
        )
        return Batch(
            ids_T=ids_T,
            positions_T=positions_T,
            cu_seqlens_S1=cu_seqlens_S1,
            max_seqlen=max(pick.num_new for pick in picks),
            kv=kv,
            last_S=None if len(last) == len(ids) else last_S,  # every row, when all are decodes
        )

    def _place(self, rows: list[list[int]], dtype: torch.dtype) -> list[Tensor]:
        """Rows of integers on the device, in one transfer."""
        flat: list[int] = []
        spans: list[slice] = []
        for row in rows:
            spans.append(slice(len(flat), len(flat) + len(row)))
            flat += row
            flat += [0] * (-len(row) % _ALIGNMENT)
        placed = torch.tensor(flat, dtype=dtype, device=self.device)
        return [placed[span] for span in spans]
