"""Reference of attention: causal over a pack in training, over a paged cache in serving.

Training goes sequence by sequence through PyTorch's own attention. Over the cache there are two shapes: one
new token for every sequence (decoding), done for all sequences at once, and several new tokens (a chunk of a
prompt that looks back), done sequence by sequence. Both forms of the cache, keys and values or one latent,
share that code.

L below is the width of a cached row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.ops.reference.cache import latent_values
from shoal.ops.reference.narrow_rows import as_kept


def _lengths(cu_seqlens_S1: Tensor) -> list[int]:
    return cu_seqlens_S1.diff().tolist()


def _repeat_heads(x_SGBd: Tensor, heads: int) -> Tensor:
    """Key-value heads, dim 1, repeated so that each query head has its own."""
    groups = x_SGBd.shape[1]
    return x_SGBd if groups == heads else x_SGBd.repeat_interleave(heads // groups, dim=1)


def attention(
    q_THQ: Tensor,
    k_TGQ: Tensor,
    v_TGV: Tensor,
    cu_seqlens_S1: Tensor,
    max_seqlen: int,
    scale: float,
    cu_keys_S1: Tensor | None = None,
    max_keys: int = 0,
) -> Tensor:
    heads, value_dim = q_THQ.shape[1], v_TGV.shape[2]
    # PyTorch's fused CPU kernel wants one head dim for q, k and v: zeros at the end of v change nothing.
    padding = q_THQ.shape[2] - value_dim
    v_TGQ = F.pad(v_TGV, (0, padding)) if padding > 0 else v_TGV
    lengths = _lengths(cu_seqlens_S1) or [0]  # no sequence is one without tokens
    seen = lengths if cu_keys_S1 is None else _lengths(cu_keys_S1) or [0]
    outputs = []
    for q, k, v in zip(q_THQ.split(lengths), k_TGQ.split(seen), v_TGQ.split(seen), strict=True):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        k, v = _repeat_heads(k, heads), _repeat_heads(v, heads)
        n, N = q.shape[2], k.shape[2]
        # PyTorch's own mask lets query i see i + 1 keys.
        mask_nN = None if n == N else torch.ones(n, N, dtype=torch.bool, device=q.device).tril(N - n)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask_nN, is_causal=mask_nN is None, scale=scale
            )[0].transpose(0, 1)
        )
    o_THQ = torch.cat(outputs) if len(outputs) != 1 else outputs[0]
    return o_THQ[..., :value_dim]


def window_attention(
    q_THQ: Tensor,
    k_TGQ: Tensor,
    v_TGV: Tensor,
    cu_seqlens_S1: Tensor,
    max_seqlen: int,
    scale: float,
    window: int,
) -> Tensor:
    """Tokens in blocks of a window: each sees its own block and the one before."""
    heads, outputs = q_THQ.shape[1], [q_THQ.new_empty(0, q_THQ.shape[1], v_TGV.shape[2])]
    lengths = _lengths(cu_seqlens_S1)
    for q, k, v in zip(q_THQ.split(lengths), k_TGQ.split(lengths), v_TGV.split(lengths), strict=True):
        for start in range(0, q.shape[0], window):
            rows, keys = slice(start, start + window), slice(max(0, start - window), start + window)
            q_1HnQ, k_1GNQ, v_1GNV = (x.transpose(0, 1).unsqueeze(0) for x in (q[rows], k[keys], v[keys]))
            back_nN = torch.arange(start, start + q_1HnQ.shape[2], device=q.device).unsqueeze(1)
            back_nN = back_nN - torch.arange(keys.start, keys.start + k_1GNQ.shape[2], device=q.device)
            seen_nN = (back_nN >= 0) & (back_nN < window)
            k_1HNQ, v_1HNV = _repeat_heads(k_1GNQ, heads), _repeat_heads(v_1GNV, heads)
            o_1HnV = F.scaled_dot_product_attention(q_1HnQ, k_1HNQ, v_1HNV, attn_mask=seen_nN, scale=scale)
            outputs.append(o_1HnV[0].transpose(0, 1))
    return torch.cat(outputs)


@torch.no_grad()
def attention_part(
    q_nHQ: Tensor, k_NGQ: Tensor, v_NGV: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    n, heads = q_nHQ.shape[:2]
    N = k_NGQ.shape[0]
    wide = torch.promote_types(q_nHQ.dtype, torch.float32)
    q_HnQ, k_GNQ, v_GNV = (x.transpose(0, 1).to(wide) for x in (q_nHQ, k_NGQ, v_NGV))
    k_HNQ, v_HNV = (x.repeat_interleave(heads // x.shape[0], dim=0) for x in (k_GNQ, v_GNV))
    # 1. Scores, 2. mask, 3. their log-sum-exp, 4. values.
    scores_HnN = torch.matmul(q_HnQ, k_HNQ.transpose(-1, -2)).mul_(scale)
    if causal:
        hidden_nN = torch.ones(n, N, dtype=torch.bool, device=q_nHQ.device).triu(N - n + 1)
        scores_HnN.masked_fill_(hidden_nN, float("-inf"))
    lse_Hn = scores_HnN.logsumexp(-1)
    weights_HnN = (scores_HnN - lse_Hn.unsqueeze(-1)).exp().nan_to_num(0.0)
    o_HnV = torch.matmul(weights_HnN, v_HNV)
    return o_HnV.transpose(0, 1).to(q_nHQ.dtype), lse_Hn.transpose(0, 1)


@torch.no_grad()
def merge_attention(
    a_nHV: Tensor, lse_a_nH: Tensor, b_nHV: Tensor, lse_b_nH: Tensor
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(a_nHV.dtype, torch.float32)
    lse_nH = torch.logaddexp(lse_a_nH, lse_b_nH)
    share_a, share_b = ((lse - lse_nH).exp().nan_to_num(0.0).unsqueeze(-1) for lse in (lse_a_nH, lse_b_nH))
    return a_nHV.to(wide) * share_a + b_nHV.to(wide) * share_b, lse_nH


@torch.no_grad()
def write_cache(pages: Tensor, slots_T: Tensor, rows: Tensor) -> None:
    # A view, never a copy: what cannot be seen as one row of slots is refused.
    pages.view(-1, *pages.shape[2:]).index_copy_(0, slots_T, rows)


@torch.no_grad()
def read_cache(
    pages: Tensor, table_B: Tensor, first: int, last: int, numbers: int, dtype: torch.dtype
) -> Tensor:
    size = pages.shape[1]
    begin, end = first // size, -(-last // size)
    rows = pages.index_select(0, table_B[begin:end]).flatten(0, 1)
    return as_kept(rows[first - begin * size : last - begin * size], numbers, dtype)


@torch.no_grad()
def _attend_cache(
    q_THd: Tensor,
    pages: Tensor,
    block_table_SB: Tensor,
    context_lens_S: Tensor,
    max_context_len: int,
    cu_seqlens_S1: Tensor,
    max_seqlen: int,
    scale: float,
    latent_rank: int | None,
) -> Tensor:
    if max_seqlen == 1:
        if not q_THd.is_cuda:  # no wait, and a bound may be far above: the padded step of the engine
            max_context_len = int(context_lens_S.max())
        visible_S1 = context_lens_S.unsqueeze(1)
        if context_lens_S.shape[0] == 1:
            max_context_len = int(context_lens_S)  # it may be an upper bound
        q_SH1d = q_THd.unsqueeze(2)
        return _attend(
            q_SH1d, pages, block_table_SB, visible_S1, max_context_len, scale, latent_rank
        ).squeeze(2)
    outputs = []
    queries = q_THd.split(_lengths(cu_seqlens_S1))
    for q_nHd, table_B, length in zip(queries, block_table_SB, context_lens_S.tolist(), strict=True):
        first = length - q_nHd.shape[0] + 1
        visible_1n = torch.arange(first, length + 1, device=q_THd.device).unsqueeze(0)
        q_1Hnd = q_nHd.transpose(0, 1).unsqueeze(0)
        o_1Hnv = _attend(q_1Hnd, pages, table_B.unsqueeze(0), visible_1n, length, scale, latent_rank)
        outputs.append(o_1Hnv[0].transpose(0, 1))
    return torch.cat(outputs)


def _attend(
    q_SHnd: Tensor,
    pages: Tensor,
    table_SB: Tensor,
    visible_Sn: Tensor,
    longest: int,
    scale: float,
    latent_rank: int | None,
) -> Tensor:
    """Attention of n queries a sequence over the first `visible` of `longest` positions: (S, H, n, v)."""
    sequences, heads, new, _ = q_SHnd.shape
    wide = torch.promote_types(q_SHnd.dtype, torch.float32)
    if not q_SHnd.numel() or not longest:  # nobody asks, or there is nothing to see
        return q_SHnd.new_zeros(
            sequences, heads, new, q_SHnd.shape[3] if latent_rank is None else latent_rank
        )
    # 1. Whole pages, side by side, up to the longest context.
    table_SB = table_SB[:, : -(-longest // pages.shape[1])]
    rows_SN = pages.index_select(0, table_SB.flatten()).view(sequences, -1, *pages.shape[2:])[:, :longest]
    rows_SN = as_kept(rows_SN, latent_rank or q_SHnd.shape[3], q_SHnd.dtype).to(wide)
    hidden_SnN = None  # one query of one sequence sees all there is
    if sequences > 1 or new > 1 or q_SHnd.is_cuda:
        hidden_SnN = torch.arange(longest, device=q_SHnd.device) >= visible_Sn.unsqueeze(-1)
    if hidden_SnN is not None and (sequences > 1 or q_SHnd.is_cuda):
        # Past its end a sequence has what others left there, and even a NaN of theirs must not reach it.
        rows_SN.masked_fill_(hidden_SnN[:, -1].view(sequences, -1, *(1 for _ in pages.shape[2:])), 0)
    if latent_rank is not None:
        k_SGNd, v_SGNv = rows_SN.unsqueeze(1), rows_SN[..., :latent_rank].unsqueeze(1)
    else:
        k_SGNd, v_SGNv = rows_SN[:, :, 0].transpose(1, 2), rows_SN[:, :, 1].transpose(1, 2)
    # 2. Scores; the query heads that share a key head are one block of rows. 3. Mask, 4. softmax, 5. values.
    q_SGmd = q_SHnd.to(wide).reshape(sequences, k_SGNd.shape[1], -1, q_SHnd.shape[3])
    scores_SGmN = torch.matmul(q_SGmd, k_SGNd.transpose(-1, -2)).mul_(scale)
    if hidden_SnN is not None:
        # Not -inf: who sees nothing then weighs rows that are all zero.
        least = torch.finfo(wide).min
        scores_SGmN.view(sequences, heads, new, -1).masked_fill_(hidden_SnN.unsqueeze(1), least)
    return torch.matmul(scores_SGmN.softmax(-1), v_SGNv).view(sequences, heads, new, -1).to(q_SHnd.dtype)


def paged_attention(
    q_THQ: Tensor,
    pages: Tensor,
    block_table_SB: Tensor,
    context_lens_S: Tensor,
    max_context_len: int,
    cu_seqlens_S1: Tensor,
    max_seqlen: int,
    scale: float,
) -> Tensor:
    return _attend_cache(
        q_THQ, pages, block_table_SB, context_lens_S, max_context_len, cu_seqlens_S1, max_seqlen, scale, None
    )


def latent_attention(
    q_THL: Tensor,
    pages: Tensor,
    block_table_SB: Tensor,
    context_lens_S: Tensor,
    max_context_len: int,
    cu_seqlens_S1: Tensor,
    max_seqlen: int,
    latent_rank: int,
    scale: float,
    values: tuple[Tensor, int] | None = None,
) -> Tensor:
    o_THC = _attend_cache(
        q_THL,
        pages,
        block_table_SB,
        context_lens_S,
        max_context_len,
        cu_seqlens_S1,
        max_seqlen,
        scale,
        latent_rank,
    )
    return o_THC if values is None else latent_values(o_THC, *values)
