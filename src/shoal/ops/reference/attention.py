"""Reference of attention: causal over a pack in training, over a paged cache in serving.

Training goes sequence by sequence through PyTorch's own attention. Over the cache there are two shapes: one new token
for every sequence (decoding), done for all sequences at once, and several new tokens (a chunk of a prompt that looks
back), done sequence by sequence. Both forms of the cache, keys and values or one latent, share that code.

L below is the width of a cached row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _lengths(cu_seqlens_S1: Tensor) -> list[int]:
    return cu_seqlens_S1.diff().tolist()


def _repeat_heads(x_SGBd: Tensor, heads: int) -> Tensor:
    """Key-value heads, dim 1, repeated so that each query head has its own."""
    groups = x_SGBd.shape[1]
    return x_SGBd if groups == heads else x_SGBd.repeat_interleave(heads // groups, dim=1)


def attention(
    q_THQ: Tensor, k_TGQ: Tensor, v_TGV: Tensor, cu_seqlens_S1: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    heads, value_dim = q_THQ.shape[1], v_TGV.shape[2]
    # PyTorch's fused CPU kernel wants one head dim for q, k and v: zeros at the end of v change nothing.
    padding = q_THQ.shape[2] - value_dim
    v_TGQ = F.pad(v_TGV, (0, padding)) if padding > 0 else v_TGV
    lengths = _lengths(cu_seqlens_S1)
    outputs = []
    for q, k, v in zip(q_THQ.split(lengths), k_TGQ.split(lengths), v_TGQ.split(lengths), strict=True):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        k, v = _repeat_heads(k, heads), _repeat_heads(v, heads)
        outputs.append(
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[0].transpose(0, 1)
        )
    o_THQ = torch.cat(outputs) if len(outputs) != 1 else outputs[0]
    return o_THQ[..., :value_dim]


def write_cache(pages: Tensor, slots_T: Tensor, rows: Tensor) -> None:
    pages.flatten(0, 1).index_copy_(0, slots_T, rows)


def _gather_context(
    pages: Tensor, block_table_SB: Tensor, context_lens_S: Tensor, max_context_len: int
) -> Tensor:
    """The cached rows of each sequence, (S, max_context_len, ...). Past its end a sequence repeats its last row:
    those places are masked, and reading anything else could bring in another sequence's NaN."""
    position_SN = torch.arange(max_context_len, device=pages.device).minimum(context_lens_S.unsqueeze(1) - 1)
    page_SN = block_table_SB.gather(1, position_SN // pages.shape[1])
    return pages[page_SN, position_SN % pages.shape[1]]


def _attend(q_SHnd: Tensor, k_SGNd: Tensor, v_SGNv: Tensor, visible_Sn: Tensor, scale: float) -> Tensor:
    """Softmax attention of n queries over the first `visible` of N positions, heads of q sharing those of k."""
    heads, groups = q_SHnd.shape[1], k_SGNd.shape[1]
    q_SGmd = q_SHnd.reshape(q_SHnd.shape[0], groups, -1, q_SHnd.shape[3])  # m: the heads of a group, times n
    scores_SGmN = torch.matmul(q_SGmd, k_SGNd.transpose(-1, -2)).float().mul_(scale)
    hidden_SnN = torch.arange(k_SGNd.shape[2], device=q_SHnd.device) >= visible_Sn.unsqueeze(-1)
    scores_SHnN = scores_SGmN.view(q_SHnd.shape[0], heads, q_SHnd.shape[2], -1)
    scores_SHnN.masked_fill_(hidden_SnN.unsqueeze(1), float("-inf"))
    weights_SGmN = scores_SHnN.softmax(-1).to(v_SGNv.dtype).view_as(scores_SGmN)
    return torch.matmul(weights_SGmN, v_SGNv).view(*q_SHnd.shape[:3], -1)


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
    def keys_and_values(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of gathered rows (S, N, ...): keys (S, G, N, d) and values (S, G, N, v)."""
        if latent_rank is not None:
            return rows.unsqueeze(1), rows[..., :latent_rank].unsqueeze(1)
        return rows[:, :, 0].transpose(1, 2), rows[:, :, 1].transpose(1, 2)

    if max_seqlen == 1:
        rows = _gather_context(pages, block_table_SB, context_lens_S, max_context_len)
        return _attend(
            q_THd.unsqueeze(2), *keys_and_values(rows), context_lens_S.unsqueeze(1), scale
        ).squeeze(2)
    outputs = []
    for sequence, q_nHd in enumerate(q_THd.split(_lengths(cu_seqlens_S1))):
        here = slice(sequence, sequence + 1)
        length, new = int(context_lens_S[sequence]), q_nHd.shape[0]
        rows = _gather_context(pages, block_table_SB[here], context_lens_S[here], length)
        visible_1n = torch.arange(length - new + 1, length + 1, device=q_THd.device).unsqueeze(0)
        q_1Hnd = q_nHd.transpose(0, 1).unsqueeze(0)
        outputs.append(_attend(q_1Hnd, *keys_and_values(rows), visible_1n, scale)[0].transpose(0, 1))
    return torch.cat(outputs)


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
) -> Tensor:
    return _attend_cache(
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
