"""The lightning indexer of DeepSeek sparse attention (V3.2, arXiv 2512.02556, section 2.1).

A small scorer beside latent attention: a few heads of queries made of the query latent, one key a token, and
a weight a head. The `index_topk` best positions of a token are all that its attention reads, the same for all
heads. Where a context is no longer than that, everything is read and nothing is scored.

Its key is cached after the token's latent, in the same row. Rotated are the first R elements, in halves (i, i
+ R/2), whatever the attention's own convention. Where the cache keeps keys in FP8, queries are narrowed too,
as V3.2 serves; elsewhere, as in transformers, nothing is, nor turned by a Hadamard matrix before, which
changes no product.

The choice has no gradient. The indexer learns from a `Teacher` alone, and from inputs that are cut off from
the model. Shape letters: T tokens, N positions, K positions read, J index heads, I index head dim, D hidden.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from shoal.batch import Batch, KVView
from shoal.config.model import IndexerConfig, MLAConfig, ModelConfig
from shoal.model.layers import Linear
from shoal.model.rope import Angles
from shoal.ops import api as ops
from shoal.ops import quantised

KEY_NORM_EPS = 1e-6  # of the released code, whatever rms_norm_eps says


class Selection(NamedTuple):
    """What a token's attention reads; None, everything."""

    rows_TK: Tensor | None  # int64: rows of the pack, or slots of the cache; -1 for none
    places_TK: Tensor | None  # int64: the same as positions of the sequence
    scores_TN: Tensor | None = None  # float32, differentiable: only where there is a teacher


class Teacher(Protocol):
    """Whom the indexers of a model learn from."""

    dense: bool  # attention reads everything, whatever the indexer would choose

    def observe(self, scores_TN: Tensor, mass_TN: Tensor) -> None:
        """Told by each layer: its scores (-inf where attention did not read), and where attention went."""
        ...


class Indexer(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        mla: MLAConfig,
        indexer: IndexerConfig,
        layer: int,
        *,
        device: torch.device | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        assert mla.q_lora_rank is not None
        heads, dim = indexer.index_n_heads, indexer.index_head_dim
        self.heads, self.top_k, self.layer = heads, indexer.index_topk, layer
        self.rope_dim, self.latent_dim = mla.qk_rope_head_dim, mla.latent_dim
        self.scale = (heads * dim) ** -0.5
        self.teacher: Teacher | None = None
        self.wq_b = Linear(mla.q_lora_rank, heads * dim, device=device, dtype=dtype)
        self.wk = Linear(config.hidden_size, dim, device=device, dtype=dtype)
        self.k_norm = nn.LayerNorm(dim, eps=KEY_NORM_EPS, device=device, dtype=dtype)
        self.weights_proj = Linear(config.hidden_size, heads, device=device, dtype=dtype)

    def forward(self, x_TD: Tensor, low_TX: Tensor, angles: Angles, batch: Batch) -> Selection:
        """What each token reads, by the layer's input and its query latent. Keeps the keys in the cache."""
        with torch.set_grad_enabled(self.teacher is not None):
            return self._select(x_TD.detach(), low_TX.detach(), angles, batch)

    def _select(self, x_TD: Tensor, low_TX: Tensor, angles: Angles, batch: Batch) -> Selection:
        kv, teacher = batch.kv, self.teacher
        longest = batch.max_seqlen if kv is None or not kv.has_prefix else kv.max_context_len
        whole = longest <= self.top_k or (teacher is not None and teacher.dense)
        if whole and teacher is None and kv is None:
            return Selection(None, None)
        # 1. The keys, which later tokens will need whether or not these do.
        k_TI = self._turn(self.k_norm(self.wk(x_TD)).unsqueeze(1), angles).squeeze(1)
        narrow = kv is not None and bool(kv.index_keys)
        if kv is not None and narrow:
            quantised.write_index_keys(*kv.index_keys[self.layer], kv.slots_T, k_TI)
        elif kv is not None:
            ops.write_cache(self._pages(kv), kv.slots_T, k_TI)
        if whole and teacher is None:
            return Selection(None, None)
        # 2. Scores, their two scales taken into the weights.
        q_TJI = self._turn(self.wq_b(low_TX).unflatten(-1, (self.heads, -1)), angles)
        weights_TJ = ops.gate_logits(x_TD, self.weights_proj.weight) * self.scale
        if kv is not None and narrow:
            q_TJI, scales_TJ = quantised.narrow_index(q_TJI)
            scores_TN = quantised.narrow_index_scores(
                q_TJI,
                scales_TJ,
                weights_TJ,
                *kv.index_keys[self.layer],
                kv.block_table_SB,
                kv.context_lens_S,
                kv.max_context_len,
                batch.cu_seqlens_S1,
                batch.max_seqlen,
            )
        elif kv is None or not kv.has_prefix:
            scores_TN = ops.index_scores(q_TJI, weights_TJ, k_TI, batch.cu_seqlens_S1, batch.max_seqlen)
        else:
            scores_TN = ops.paged_index_scores(
                q_TJI,
                weights_TJ,
                self._pages(kv),
                kv.block_table_SB,
                kv.context_lens_S,
                kv.max_context_len,
                batch.cu_seqlens_S1,
                batch.max_seqlen,
            )
        # 3. The best.
        if whole:
            return Selection(None, None, scores_TN)
        places_TK = ops.select_top(scores_TN.detach(), self.top_k)
        taught_TN = None if teacher is None else _only(scores_TN, places_TK)
        table_SB, page_size = (None, 1) if kv is None else (kv.block_table_SB, kv.page_size)
        rows_TK = ops.name_rows(places_TK, batch.cu_seqlens_S1, table_SB, page_size)
        return Selection(rows_TK, places_TK, taught_TN)

    def _turn(self, x_TJI: Tensor, angles: Angles) -> Tensor:
        rope_TJR, rest_TJX = x_TJI.split((self.rope_dim, x_TJI.shape[-1] - self.rope_dim), dim=-1)
        return torch.cat((ops.rope(rope_TJR, *angles, interleaved=False), rest_TJX), dim=-1)

    def _pages(self, kv: KVView) -> Tensor:
        return kv.pages[self.layer][..., self.latent_dim :]


def _only(scores_TN: Tensor, places_TK: Tensor) -> Tensor:
    """The scores of these places; -inf for the rest."""
    rest_TN = torch.ones_like(scores_TN, dtype=torch.bool)
    # Unused places stand after the first ones; they point at the first again, which every token sees.
    rest_TN.scatter_(1, places_TK.where(places_TK >= 0, places_TK[:, :1]), False)
    return scores_TN.masked_fill(rest_TN, float("-inf"))
