"""Native sparse attention (arXiv 2502.11089, section 3): three gated branches over grouped queries.

    o = sum over c of sigmoid(g_c) Attention(q, K_c, V_c), each branch with keys and values of its own

c is compression: l keys, or values, become one by an MLP over them and their places, every d tokens;
selection: the blocks that compression scores highest for a group of heads; and a window. Open in the paper,
settled here: the gate is one linear map, the MLP one hidden layer of a head's width, shared by the groups;
keys are compressed before they are rotated, and rotated where their last token stands, at whose step they
are made.

The cache keeps four sets a token: what is compressed, selected and windowed, and in the row of the token
that completes a block the compressed one, zeros in others: a row depends on no later token, so prefixes are
shared. Shape letters: T tokens, D hidden, H query heads, G key-value heads, Q query dim, V value dim, M
compressed entries, K blocks chosen, X = Q + V, L tokens of a block that is compressed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.batch import Batch, KVView
from shoal.config.model import ModelConfig, NSAConfig
from shoal.model.layers import Linear
from shoal.model.rope import Angles
from shoal.ops import api as ops
from shoal.ops.api import Blocking

RAW, SELECTED, WINDOW, COMPRESSED = range(4)  # of a row of the cache


class Compressor(nn.Module):
    """Tokens of a block to one: x + position, laid end to end, through an MLP."""

    def __init__(self, tokens: int, dim: int, *, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(tokens, dim, device=device, dtype=dtype))
        self.up_proj = Linear(tokens * dim, dim, device=device, dtype=dtype)
        self.down_proj = Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x_MLGX: Tensor) -> Tensor:
        flat_MGX = (x_MLGX + self.position.unsqueeze(1)).transpose(1, 2).flatten(2)
        return self.down_proj(F.silu(self.up_proj(flat_MGX)))


class NSA(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        nsa: NSAConfig,
        layer: int,
        *,
        device: torch.device | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.nsa, self.layer = nsa, layer
        self.scale, self.interleaved = config.softmax_scale, config.rope.interleaved
        hidden, heads, groups = config.hidden_size, nsa.num_attention_heads, nsa.num_key_value_heads
        self.blocking = Blocking(
            nsa.compress_block,
            nsa.compress_stride,
            nsa.select_block,
            nsa.select_topk,
            nsa.select_first,
            nsa.select_local,
        )

        def linear(columns: int, rows: int) -> Linear:
            return Linear(columns, rows, device=device, dtype=dtype)

        self.q_proj = linear(hidden, heads * nsa.qk_head_dim)
        self.k_proj = linear(hidden, 3 * groups * nsa.qk_head_dim)  # compression's, selection's, the window's
        self.v_proj = linear(hidden, 3 * groups * nsa.v_head_dim)
        self.g_proj = linear(hidden, 3 * heads)
        self.o_proj = linear(heads * nsa.v_head_dim, hidden)
        self.k_compress = Compressor(nsa.compress_block, nsa.qk_head_dim, device=device, dtype=dtype)
        self.v_compress = Compressor(nsa.compress_block, nsa.v_head_dim, device=device, dtype=dtype)

    def forward(self, x_TD: Tensor, angles: Angles, batch: Batch) -> Tensor:
        nsa, kv = self.nsa, batch.kv
        groups, dims = nsa.num_key_value_heads, (nsa.qk_head_dim, nsa.v_head_dim)
        q_THQ = self._turn(self.q_proj(x_TD).unflatten(-1, (-1, dims[0])), angles)
        k_T3GQ = self.k_proj(x_TD).unflatten(-1, (3, groups, dims[0]))
        v_T3GV = self.v_proj(x_TD).unflatten(-1, (3, groups, dims[1]))
        raw_TGQ, turned_T2GQ = k_T3GQ.split((1, 2), dim=1)
        turned_TXQ = self._turn(turned_T2GQ.flatten(1, 2), angles)
        k_T3GQ = torch.cat((raw_TGQ, turned_TXQ.unflatten(1, (2, groups))), dim=1)
        if kv is not None:
            rows_T3GX = torch.cat((k_T3GQ, v_T3GV), dim=-1)
            ops.write_cache(kv.pages[self.layer], kv.slots_T, F.pad(rows_T3GX, (0, 0, 0, 0, 0, 1)))
            self._keep_compressed(angles, batch, kv)
        if kv is not None and kv.has_prefix:
            branches = self.cached(q_THQ, batch, kv)
        else:
            branches = self.packed(q_THQ, k_T3GQ, v_T3GV, angles, batch)
        gates_T3H1 = self.g_proj(x_TD).sigmoid().unflatten(-1, (3, -1, 1))
        o_THV = sum(gate_TH1 * o for gate_TH1, o in zip(gates_T3H1.unbind(1), branches, strict=True))
        assert isinstance(o_THV, Tensor)
        return self.o_proj(o_THV.flatten(1))

    def packed(
        self, q_THQ: Tensor, k_T3GQ: Tensor, v_T3GV: Tensor, angles: Angles, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The branches among the tokens of this batch alone."""
        nsa, where = self.nsa, (batch.cu_seqlens_S1, batch.max_seqlen)
        # 1. Compression. How many entries a sequence has is known on the device; no more than T / d in all.
        lengths_S = batch.cu_seqlens_S1.diff()
        counts_S = ((lengths_S - nsa.compress_block) // nsa.compress_stride + 1).clamp(min=0)
        cu_entries_S1 = F.pad(counts_S.cumsum(0), (1, 0)).int()
        last_M = self._last_rows(cu_entries_S1, batch)
        rows_ML = (last_M.unsqueeze(1) + self._back(last_M)).clamp(min=0)
        k_MGQ = self._turn(self.k_compress(k_T3GQ[:, RAW][rows_ML]), Angles(*(x[last_M] for x in angles)))
        v_MGV = self.v_compress(v_T3GV[:, RAW][rows_ML])
        o_THV, lse_TH = ops.compressed_attention(
            q_THQ,
            k_MGQ,
            v_MGV,
            batch.cu_seqlens_S1,
            cu_entries_S1,
            batch.max_seqlen,
            *self.blocking[:2],
            self.scale,
        )
        # 2. Selection. 3. The window.
        k_TGQ, v_TGV = k_T3GQ[:, SELECTED], v_T3GV[:, SELECTED]
        if batch.max_seqlen <= nsa.select_topk * nsa.select_block:  # all there is
            selected_THV = ops.attention(q_THQ, k_TGQ, v_TGV, *where, self.scale)
        else:
            blocks_TGK = ops.select_blocks(
                q_THQ,
                k_MGQ,
                lse_TH,
                batch.cu_seqlens_S1,
                cu_entries_S1,
                batch.max_seqlen,
                self.blocking,
                self.scale,
            )
            selected_THV = ops.block_attention(
                q_THQ, k_TGQ, v_TGV, blocks_TGK, *where, nsa.select_block, self.scale
            )
        window = (k_T3GQ[:, WINDOW], v_T3GV[:, WINDOW])
        if batch.max_seqlen <= nsa.sliding_window:
            windowed_THV = ops.attention(q_THQ, *window, *where, self.scale)
        else:
            windowed_THV = ops.window_attention(q_THQ, *window, *where, self.scale, nsa.sliding_window)
        return o_THV, selected_THV, windowed_THV

    def cached(self, q_THQ: Tensor, batch: Batch, kv: KVView) -> tuple[Tensor, Tensor, Tensor]:
        """The branches over the cache, this step's tokens included."""
        nsa, pages = self.nsa, kv.pages[self.layer]
        where = kv.block_table_SB, kv.context_lens_S, batch.cu_seqlens_S1, batch.max_seqlen
        positions_TG1 = batch.positions_T.view(-1, 1, 1).expand(-1, nsa.num_key_value_heads, 1)

        def read(set_: int, starts_TGK: Tensor, length: int, stride: int = 1) -> tuple[Tensor, Tensor]:
            return ops.paged_runs_attention(
                q_THQ, pages[:, :, set_], starts_TGK, length, stride, *where, self.scale
            )

        longest, first = kv.max_context_len, nsa.compress_block - 1
        entries = max(0, (longest - nsa.compress_block) // nsa.compress_stride + 1)
        o_THV, lse_TH = read(COMPRESSED, torch.full_like(positions_TG1, first), entries, nsa.compress_stride)
        if longest <= nsa.select_topk * nsa.select_block:
            starts_TGK, length = torch.zeros_like(positions_TG1), longest
        else:
            blocks_TGK = ops.paged_select_blocks(
                q_THQ,
                pages[:, :, COMPRESSED],
                lse_TH,
                *where[:2],
                longest,
                *where[2:],
                self.blocking,
                self.scale,
            )
            starts_TGK, length = blocks_TGK * nsa.select_block, nsa.select_block
        selected_THV, _ = read(SELECTED, starts_TGK, length)
        windowed_THV, _ = read(WINDOW, positions_TG1 - (nsa.sliding_window - 1), nsa.sliding_window)
        return o_THV, selected_THV, windowed_THV

    def _turn(self, x_THQ: Tensor, angles: Angles) -> Tensor:
        return ops.rope(x_THQ, *angles, interleaved=self.interleaved)

    def _back(self, like: Tensor) -> Tensor:
        """From the last token of a block to each of its tokens."""
        return torch.arange(1 - self.nsa.compress_block, 1, device=like.device)

    def _last_rows(self, cu_entries_S1: Tensor, batch: Batch) -> Tensor:
        """The row of a pack where each entry's block ends; past the entries, any."""
        nsa = self.nsa
        at_M = torch.arange(batch.num_tokens // nsa.compress_stride, device=cu_entries_S1.device)
        sequence_M = torch.searchsorted(cu_entries_S1[1:], at_M, right=True).clamp(
            max=batch.num_sequences - 1
        )
        entry_M = at_M - cu_entries_S1[sequence_M]
        rows_M = batch.cu_seqlens_S1[sequence_M] + entry_M * nsa.compress_stride + nsa.compress_block - 1
        return rows_M.clamp(max=batch.num_tokens - 1)

    @torch.no_grad()
    def _keep_compressed(self, angles: Angles, batch: Batch, kv: KVView) -> None:
        """Compress the blocks that end in this step, each into the row of its last token.

        How many there are the device knows; the host, at most how many. In place of those that are not there
        other tokens write zeros, which is what they have.
        """
        nsa, pages = self.nsa, kv.pages[self.layer]
        past_T = batch.positions_T + 1 - nsa.compress_block
        going_T = (past_T < 0) | (past_T % nsa.compress_stride != 0)
        last_M = torch.arange(batch.num_tokens, device=batch.ids_T.device)
        most = batch.num_tokens // nsa.compress_stride + batch.num_sequences
        if most < batch.num_tokens:
            last_M = going_T.int().argsort(stable=True)[:most]
        lengths_S = batch.cu_seqlens_S1.diff()
        sequences_S = torch.arange(len(lengths_S), device=lengths_S.device)
        sequence_M = sequences_S.repeat_interleave(lengths_S, output_size=batch.num_tokens)[last_M]
        places_ML = (batch.positions_T[last_M].unsqueeze(1) + self._back(last_M)).clamp(min=0)
        page_ML = kv.block_table_SB[sequence_M.unsqueeze(1), places_ML // kv.page_size].long()
        rows_MLGX = pages[:, :, RAW].flatten(0, 1)[page_ML * kv.page_size + places_ML % kv.page_size]
        raw_MLGQ, raw_MLGV = rows_MLGX.split((nsa.qk_head_dim, nsa.v_head_dim), dim=-1)
        k_MGQ = self._turn(self.k_compress(raw_MLGQ), Angles(*(x[last_M] for x in angles)))
        rows_MGX = torch.cat((k_MGQ, self.v_compress(raw_MLGV)), dim=-1)
        rows_MGX = rows_MGX.masked_fill(going_T[last_M].view(-1, 1, 1), 0)
        ops.write_cache(pages[:, :, COMPRESSED], kv.slots_T[last_M], rows_MGX)
