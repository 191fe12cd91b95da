"""Grouped-query attention, as in Llama, Qwen, Mixtral, OLMoE and the DeepSeek models before V2.

Multi-head attention is the case of equal head counts. Biases and the two kinds of query-key norm are fields.

Shape letters: T tokens, D hidden, H query heads, G key-value heads, Q head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shoal.batch import Batch
from shoal.config.model import GQAConfig, ModelConfig
from shoal.model.layers import Linear, RMSNorm, project, together
from shoal.model.part import attend_part
from shoal.model.rope import Angles
from shoal.model.served import lay_out
from shoal.ops import api as ops


class GQA(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        gqa: GQAConfig,
        layer: int,
        *,
        device: torch.device | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.gqa, self.layer = gqa, layer
        self.scale, self.interleaved = config.softmax_scale, config.rope.interleaved
        query_dim, key_dim = gqa.num_attention_heads * gqa.head_dim, gqa.num_key_value_heads * gqa.head_dim

        def linear(rows: int, columns: int, bias: bool) -> Linear:
            return Linear(rows, columns, bias=bias, device=device, dtype=dtype)

        self.q_proj = linear(config.hidden_size, query_dim, gqa.qkv_bias)
        self.k_proj = linear(config.hidden_size, key_dim, gqa.qkv_bias)
        self.v_proj = linear(config.hidden_size, key_dim, gqa.qkv_bias)
        self.o_proj = linear(query_dim, config.hidden_size, gqa.o_bias)
        self.q_norm = self.k_norm = None
        if gqa.qk_norm is not None:
            dims = (gqa.head_dim, gqa.head_dim) if gqa.qk_norm == "head" else (query_dim, key_dim)
            self.q_norm, self.k_norm = (
                RMSNorm(dim, config.rms_norm_eps, device=device, dtype=dtype) for dim in dims
            )

    def _heads(self, x_TX: Tensor, norm: RMSNorm | None) -> Tensor:
        """Split into heads, normalised before (over all of them) or after (over each)."""
        if norm is not None and self.gqa.qk_norm == "all":
            x_TX = norm(x_TX)
        x_THQ = x_TX.unflatten(-1, (-1, self.gqa.head_dim))
        return norm(x_THQ) if norm is not None and self.gqa.qk_norm == "head" else x_THQ

    def forward(self, x_TD: Tensor, angles: Angles, batch: Batch) -> Tensor:
        q_TX, k_TX, v_TX = together(x_TD, self.q_proj, self.k_proj, self.v_proj)
        q_THQ, k_TGQ = self._heads(q_TX, self.q_norm), self._heads(k_TX, self.k_norm)
        v_TGQ = self._heads(v_TX, None)
        kv, turn = batch.kv, {"interleaved": self.interleaved}
        if kv is None and ops.is_batch_invariant():
            return self.o_proj(self._as_served(q_THQ, k_TGQ, v_TGQ, angles, batch).flatten(1))
        if kv is None:
            q_THQ, k_TGQ = ops.rope(q_THQ, *angles, **turn), ops.rope(k_TGQ, *angles, **turn)
        else:
            q_THQ, k_TGQ, v_TGQ = ops.write_kv_cache(
                q_THQ, k_TGQ, v_TGQ, *angles, kv.pages[self.layer], kv.slots_T, **turn
            )
        return batch.attended(self._attend, q_THQ, k_TGQ, v_TGQ)

    def _attend(
        self, q_THQ: Tensor, k_TGQ: Tensor, v_TGQ: Tensor, batch: Batch, out: Tensor | None
    ) -> Tensor:
        kv = batch.kv
        if kv is not None and (kv.has_prefix or ops.is_batch_invariant()):
            o_THQ = ops.paged_attention(
                q_THQ,
                kv.pages[self.layer],
                kv.block_table_SB,
                kv.context_lens_S,
                kv.max_context_len,
                batch.cu_seqlens_S1,
                batch.max_seqlen,
                self.scale,
            )
        elif batch.part is not None:
            kv_NX = batch.part.gather(torch.cat((k_TGQ.flatten(1), v_TGQ.flatten(1)), dim=-1))
            k_NGQ, v_NGQ = kv_NX.unflatten(-1, (2, -1, self.gqa.head_dim)).unbind(1)
            o_THQ = attend_part(q_THQ, k_NGQ, v_NGQ, batch.part, self.scale)
        else:
            o_THQ = ops.attention(q_THQ, k_TGQ, v_TGQ, batch.cu_seqlens_S1, batch.max_seqlen, self.scale)
        return project(self.o_proj, o_THQ.flatten(1), out)

    def _as_served(self, q_THQ: Tensor, k_TGQ: Tensor, v_TGQ: Tensor, angles: Angles, batch: Batch) -> Tensor:
        """Attention of a pack by the ops of the engine, with the gradient of the pack's own."""
        turn, where = {"interleaved": self.interleaved}, (batch.cu_seqlens_S1, batch.max_seqlen, self.scale)

        def served(q_THQ: Tensor, k_TGQ: Tensor, v_TGQ: Tensor) -> Tensor:
            laid = lay_out(batch, (2, *k_TGQ.shape[1:]), k_TGQ)
            q_THQ, *_ = ops.write_kv_cache(q_THQ, k_TGQ, v_TGQ, *angles, laid.pages, laid.slots_T, **turn)
            tables = laid.block_table_SB, laid.context_lens_S, batch.max_seqlen
            return ops.paged_attention(q_THQ, laid.pages, *tables, *where)

        def plain(q_THQ: Tensor, k_TGQ: Tensor, v_TGQ: Tensor) -> Tensor:
            q_THQ, k_TGQ = ops.rope(q_THQ, *angles, **turn), ops.rope(k_TGQ, *angles, **turn)
            return ops.attention(q_THQ, k_TGQ, v_TGQ, *where)

        return ops.with_gradient_of(plain, served, q_THQ, k_TGQ, v_TGQ)
