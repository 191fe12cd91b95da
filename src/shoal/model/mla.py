"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), in its forms.

Keys and values of all heads are projections of one normalised latent of C elements, plus one rotated key of R
elements that the heads share. Only those C + R elements are cached. With W_UK and W_UV the two halves of
`kv_b_proj` for a head:

- expanded: k = [W_UK c | k_rope], v = W_UV c, then ordinary attention. Fewest FLOPs when many tokens are new.
- absorbed: q~ = W_UK^T q_nope attends to the latents themselves, o = W_UV (sum of weighted latents). The
  cache is read as it is, so a decoded token costs C + R elements of traffic for each position instead of H (N
  + R + V).
- selected: with an indexer (dsa.py), absorbed, over the rows that it picks.
Batch-invariant mode absorbs all without one (served.py). The softmax scale is of N + R dims, times YaRN's.

Shape letters: T tokens, D hidden, H heads, N no-rope head dim, R rope dim, C latent rank, V value dim.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from shoal.batch import Batch, Chunk, KVView
from shoal.config.model import MLAConfig, ModelConfig
from shoal.model.dsa import Indexer, Selection
from shoal.model.layers import Linear, RMSNorm, lay_together, project, together
from shoal.model.part import attend_part
from shoal.model.rope import Angles
from shoal.model.served import lay_out
from shoal.ops import api as ops

MIN_CHUNK = 32  # tokens: below, a sequence on its own costs more in launches than it saves in FLOPs
PIECE_KEYS = (
    2**18
)  # cached positions times heads that are expanded at once: 168 MB of keys and values in bf16
LATENT_NORM_EPS = 1e-6  # of the two latent norms, in the released code whatever rms_norm_eps says


class MLA(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        mla: MLAConfig,
        layer: int,
        *,
        device: torch.device | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.mla, self.layer = mla, layer
        self.scale, self.interleaved = config.softmax_scale, config.rope.interleaved
        hidden, heads, bias = config.hidden_size, mla.num_attention_heads, mla.attention_bias

        def linear(rows: int, columns: int, *, bias: bool = False) -> Linear:
            return Linear(rows, columns, bias=bias, device=device, dtype=dtype)

        def norm(dim: int) -> RMSNorm:
            return RMSNorm(dim, LATENT_NORM_EPS, device=device, dtype=dtype)

        if mla.q_lora_rank is None:
            self.q_proj = linear(hidden, heads * mla.qk_head_dim)
        else:
            self.q_a_proj = linear(hidden, mla.q_lora_rank, bias=bias)
            self.q_a_layernorm = norm(mla.q_lora_rank)
            self.q_b_proj = linear(mla.q_lora_rank, heads * mla.qk_head_dim)
        self.kv_a_proj_with_mqa = linear(hidden, mla.kv_lora_rank + mla.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = norm(mla.kv_lora_rank)
        self.kv_b_proj = linear(mla.kv_lora_rank, heads * (mla.qk_nope_head_dim + mla.v_head_dim))
        self.o_proj = linear(heads * mla.v_head_dim, hidden, bias=bias)
        self.indexer = None
        if mla.indexer is not None:
            self.indexer = Indexer(config, mla, mla.indexer, layer, device=device, dtype=dtype)

    def forward(self, x_TD: Tensor, angles: Angles, batch: Batch) -> Tensor:
        mla, turn = self.mla, {"interleaved": self.interleaved}
        low_TX, q_TX, kv_TL = self._project(x_TD)
        q_THQ = q_TX.unflatten(-1, (mla.num_attention_heads, -1))
        if batch.kv is not None and self._absorbs(batch.kv):
            norm, pages = self.kv_a_layernorm, self._pages(batch.kv)
            q_THL = ops.latent_queries(
                q_THQ,
                kv_TL,
                norm.weight,
                norm.eps,
                *angles,
                self.kv_b_proj.weight,
                pages,
                batch.kv.slots_T,
                **turn,
            )
            return self.o_proj(self.absorbed(q_THL, batch).flatten(1))
        if batch.kv is None and self.indexer is None and ops.is_batch_invariant():
            return self.o_proj(self._as_served(q_THQ, kv_TL, angles, batch).flatten(1))
        parts = (mla.qk_nope_head_dim, mla.qk_rope_head_dim)
        q_nope_THN, q_rope_THR = q_THQ.split(parts, dim=-1)
        latent_TC, k_rope_TR = kv_TL.split((mla.kv_lora_rank, mla.qk_rope_head_dim), dim=-1)
        if batch.kv is None:
            latent_TC = self.kv_a_layernorm(latent_TC)
            q_THQ = ops.rope(q_THQ, *angles, **turn)
            q_nope_THN, q_rope_THR = q_THQ.split(parts, dim=-1)
            k_rope_TR = ops.rope(k_rope_TR.unsqueeze(1), *angles, **turn).squeeze(1)
        else:
            norm, pages = self.kv_a_layernorm, self._pages(batch.kv)
            q_rope_THR, rows_TL = ops.write_latent_cache(
                q_rope_THR, kv_TL, norm.weight, norm.eps, *angles, pages, batch.kv.slots_T, **turn
            )
            latent_TC, k_rope_TR = rows_TL.split((mla.kv_lora_rank, mla.qk_rope_head_dim), dim=-1)
        chosen = None if self.indexer is None else self.indexer(x_TD, low_TX, angles, batch)
        if chosen is not None and chosen.scores_TN is not None:
            self._teach(chosen, q_nope_THN, q_rope_THR, latent_TC, k_rope_TR, batch)
        if chosen is not None and chosen.rows_TK is not None:
            rows_TL = torch.cat((latent_TC, k_rope_TR), dim=-1)
            rows_XL = rows_TL if batch.kv is None else self._pages(batch.kv).flatten(0, 1)
            o_THV = self.selected(q_nope_THN, q_rope_THR, rows_XL, chosen.rows_TK)
            return self.o_proj(o_THV.flatten(1))
        return batch.attended(self._attend, q_THQ, latent_TC, k_rope_TR)

    def _attend(
        self, q_THQ: Tensor, latent_TC: Tensor, k_rope_TR: Tensor, batch: Batch, out: Tensor | None
    ) -> Tensor:
        looks_back = batch.kv is not None and batch.kv.has_prefix
        attend = self.cached if looks_back else self.expanded
        return project(self.o_proj, attend(q_THQ, latent_TC, k_rope_TR, batch).flatten(1), out)

    def expands(self, chunk: Chunk) -> bool:
        """Whether a chunk of n new tokens over p cached ones costs fewer FLOPs expanded than absorbed.

        For a head 2 p C (N + V) make keys and values of the cached latents again, and 2 (N + R + V) go to
        each pair of query and key; absorbed a pair takes 2 (2 C + R). A chunk has n (p + n / 2) pairs. So it
        pays where n (2 p + n) (2 C - N - V) > 2 p C (N + V): for V2 and V3, from 171 tokens on after a long
        context.
        """
        mla, new, prefix = self.mla, chunk.new, chunk.context - chunk.new
        made = mla.qk_nope_head_dim + mla.v_head_dim
        saved = new * (2 * prefix + new) * (2 * mla.kv_lora_rank - made)
        return new >= MIN_CHUNK and saved > 2 * prefix * mla.kv_lora_rank * made

    def _absorbs(self, kv: KVView) -> bool:
        """Whether all that this step brings meets the latents as they are."""
        if self.indexer is not None or kv.between is not None:
            return False
        return ops.is_batch_invariant() or (kv.has_prefix and not any(map(self.expands, kv.chunks)))

    def cached(self, q_THQ: Tensor, latent_TC: Tensor, k_rope_TR: Tensor, batch: Batch) -> Tensor:
        """Attention over the cache: long chunks expanded, each on its own, all between them absorbed."""
        assert batch.kv is not None
        chunks = [chunk for chunk in batch.kv.chunks if self.expands(chunk)]
        parts: list[Tensor] = []
        row = sequence = 0
        end = Chunk(batch.num_sequences, batch.num_tokens, 0, 0)
        for chunk in (*chunks, end):
            rows = slice(row, chunk.first)
            if row < chunk.first:
                between = _between(batch, sequence, chunk.sequence, row)
                halves = (self.mla.qk_nope_head_dim, self.mla.qk_rope_head_dim)
                q_THL = self._absorb(*q_THQ[rows].split(halves, dim=-1))
                parts.append(self.absorbed(q_THL, between))
            rows = slice(chunk.first, chunk.first + chunk.new)
            if chunk.new:
                parts.append(self.chunk(q_THQ[rows], latent_TC[rows], k_rope_TR[rows], chunk, batch))
            row, sequence = rows.stop, chunk.sequence + 1
        return torch.cat(parts)

    def _expand(self, latent_TC: Tensor, k_rope_TR: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of every head, made of latents."""
        mla = self.mla
        kv_THX = self.kv_b_proj(latent_TC).unflatten(-1, (mla.num_attention_heads, -1))
        return ops.keys_and_values(kv_THX, k_rope_TR, mla.v_head_dim)

    def chunk(
        self, q_nHQ: Tensor, latent_nC: Tensor, k_rope_nR: Tensor, chunk: Chunk, batch: Batch
    ) -> Tensor:
        """Attention of one sequence's new tokens over themselves and what is cached of it, expanded."""
        mla, kv = self.mla, batch.kv
        assert kv is not None
        o_nHV, lse_nH = ops.attention_part(q_nHQ, *self._expand(latent_nC, k_rope_nR), self.scale, True)
        prefix, step = chunk.context - chunk.new, max(1, PIECE_KEYS // mla.num_attention_heads)
        for first in range(0, prefix, step):
            last = min(first + step, prefix)
            table_B, kept = kv.block_table_SB[chunk.sequence], (mla.kv_lora_rank, q_nHQ.dtype)
            rows_NL = ops.read_cache(self._pages(kv), table_B, first, last, *kept)
            latent_NC, k_rope_NR = rows_NL.split((mla.kv_lora_rank, mla.qk_rope_head_dim), dim=-1)
            k_NHQ, v_NHV = self._expand(latent_NC, k_rope_NR)
            part = ops.attention_part(q_nHQ, k_NHQ, v_NHV, self.scale, False)
            o_nHV, lse_nH = ops.merge_attention(o_nHV, lse_nH, *part)
        return o_nHV.to(q_nHQ.dtype)

    def _project(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What queries are projected from, they, and the latents."""
        if self.mla.q_lora_rank is None:
            q_TX, kv_TL = together(x_TD, self.q_proj, self.kv_a_proj_with_mqa)
            return x_TD, q_TX, kv_TL
        low_TX, kv_TL = together(x_TD, self.q_a_proj, self.kv_a_proj_with_mqa)
        low_TX = self.q_a_layernorm(low_TX)
        return low_TX, self.q_b_proj(low_TX), kv_TL

    def lay(self, device: torch.device | str) -> None:
        """Memory for the weights that `_project` reads at once."""
        first = self.q_proj if self.mla.q_lora_rank is None else self.q_a_proj
        if type(first) is type(self.kv_a_proj_with_mqa) is Linear and first.bias is None:
            lay_together(first, self.kv_a_proj_with_mqa, device=device)

    def _pages(self, kv: KVView) -> Tensor:
        """The latent rows of the cache; after them, in the same row, comes a wide key of the indexer."""
        pages = kv.pages[self.layer]
        wide_keys = self.indexer is not None and not kv.index_keys
        return pages[..., : self.mla.latent_dim] if wide_keys else pages

    def expanded(self, q_THQ: Tensor, latent_TC: Tensor, k_rope_TR: Tensor, batch: Batch) -> Tensor:
        """Attention among the tokens of this batch, or of the pack that it is a part of, alone, keys and
        values made for every head. Latents are what is gathered: a few hundred elements a token."""
        if batch.part is not None:
            rows_NL = batch.part.gather(torch.cat((latent_TC, k_rope_TR), dim=-1))
            k_NHQ, v_NHV = self._expand(
                *rows_NL.split((self.mla.kv_lora_rank, self.mla.qk_rope_head_dim), dim=-1)
            )
            return attend_part(q_THQ, k_NHQ, v_NHV, batch.part, self.scale)
        k_THQ, v_THV = self._expand(latent_TC, k_rope_TR)
        return ops.attention(q_THQ, k_THQ, v_THV, batch.cu_seqlens_S1, batch.max_seqlen, self.scale)

    def absorbed(self, q_THL: Tensor, batch: Batch) -> Tensor:
        """Attention over the cached latents, this step's tokens included, of queries that meet them."""
        mla, kv = self.mla, batch.kv
        assert kv is not None
        return ops.latent_attention(
            q_THL,
            self._pages(kv),
            kv.block_table_SB,
            kv.context_lens_S,
            kv.max_context_len,
            batch.cu_seqlens_S1,
            batch.max_seqlen,
            mla.kv_lora_rank,
            self.scale,
            (self.kv_b_proj.weight, mla.v_head_dim),
        )

    def selected(self, q_nope_THN: Tensor, q_rope_THR: Tensor, rows_XL: Tensor, rows_TK: Tensor) -> Tensor:
        """Attention over the latents at `rows_TK` of all that there are."""
        q_THL = self._absorb(q_nope_THN, q_rope_THR)
        return self._values(
            ops.sparse_latent_attention(q_THL, rows_XL, rows_TK, self.mla.kv_lora_rank, self.scale)
        )

    def _as_served(self, q_THQ: Tensor, kv_TL: Tensor, angles: Angles, batch: Batch) -> Tensor:
        """Attention of a pack in absorbed form, by the ops of the engine, with the expanded form's
        gradient."""
        mla, eps, turn = self.mla, self.kv_a_layernorm.eps, {"interleaved": self.interleaved}
        where = batch.cu_seqlens_S1, batch.max_seqlen

        def served(q_THQ: Tensor, kv_TL: Tensor, norm_C: Tensor, kv_b: Tensor) -> Tensor:
            laid = lay_out(batch, (mla.latent_dim,), kv_TL)
            rows = laid.pages, laid.slots_T
            q_THL = ops.latent_queries(q_THQ, kv_TL, norm_C, eps, *angles, kv_b, *rows, **turn)
            tables = laid.block_table_SB, laid.context_lens_S, batch.max_seqlen
            last = mla.kv_lora_rank, self.scale
            o_THC = ops.latent_attention(q_THL, laid.pages, *tables, *where, *last)
            return ops.latent_values(o_THC, kv_b, mla.v_head_dim)

        def plain(q_THQ: Tensor, kv_TL: Tensor, norm_C: Tensor, kv_b: Tensor) -> Tensor:
            latent_TC, k_rope_TR = kv_TL.split((mla.kv_lora_rank, mla.qk_rope_head_dim), dim=-1)
            q_THQ = ops.rope(q_THQ, *angles, **turn)
            k_rope_TR = ops.rope(k_rope_TR.unsqueeze(1), *angles, **turn).squeeze(1)
            (kv_TX,) = ops.linears(ops.rms_norm(latent_TC, norm_C, eps), (kv_b,), (None,))
            kv_THX = kv_TX.unflatten(-1, (mla.num_attention_heads, -1))
            keys = ops.keys_and_values(kv_THX, k_rope_TR, mla.v_head_dim)
            return ops.attention(q_THQ, *keys, *where, self.scale)

        weights = self.kv_a_layernorm.weight, self.kv_b_proj.weight
        return ops.with_gradient_of(plain, served, q_THQ, kv_TL, *weights)

    def _absorb(self, q_nope_THN: Tensor, q_rope_THR: Tensor) -> Tensor:
        """Queries that meet latents (T, H, C + R)."""
        kv_b_HXC = self.kv_b_proj.weight.unflatten(0, (self.mla.num_attention_heads, -1))
        w_uk_HNC = kv_b_HXC[:, : self.mla.qk_nope_head_dim]
        q_latent_THC = torch.bmm(q_nope_THN.transpose(0, 1), w_uk_HNC).transpose(0, 1)
        return torch.cat((q_latent_THC, q_rope_THR), dim=-1)

    def _values(self, o_THC: Tensor) -> Tensor:
        return ops.latent_values(o_THC, self.kv_b_proj.weight, self.mla.v_head_dim)

    @torch.no_grad()
    def _teach(
        self,
        chosen: Selection,
        q_nope_THN: Tensor,
        q_rope_THR: Tensor,
        latent_TC: Tensor,
        k_rope_TR: Tensor,
        batch: Batch,
    ) -> None:
        """Show the indexer's teacher how attention spreads over what it reads."""
        assert self.indexer is not None and self.indexer.teacher is not None and chosen.scores_TN is not None
        q_THL = self._absorb(q_nope_THN, q_rope_THR)
        k_T1L = torch.cat((latent_TC, k_rope_TR), dim=-1).unsqueeze(1)
        mass_TN = ops.attention_mass(
            q_THL, k_T1L, batch.cu_seqlens_S1, batch.max_seqlen, self.scale, chosen.places_TK
        )
        with torch.enable_grad():
            self.indexer.teacher.observe(chosen.scores_TN, mass_TN)


def _between(batch: Batch, first: int, last: int, row: int) -> Batch:
    """The sequences `first` to `last` of a batch, which begin at `row`, as a batch for attention."""
    kv = batch.kv
    assert kv is not None
    boundaries = batch.cu_seqlens_S1[first : last + 1]
    return replace(
        batch,
        cu_seqlens_S1=boundaries - row if row else boundaries,
        max_seqlen=max((c.new for c in kv.chunks if first <= c.sequence < last), default=1),
        kv=replace(
            kv, block_table_SB=kv.block_table_SB[first:last], context_lens_S=kv.context_lens_S[first:last]
        ),
    )
