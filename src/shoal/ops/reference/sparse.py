"""Reference of sparse attention over latents: score positions, choose the best, attend to those alone.

Nothing loops over tokens: queries go in blocks whose gathered rows, or scores by head, fit `_AT_ONCE`
elements, and a block is a few batched products. With a gradient, a block is computed again in the backward
pass, so no gathered row is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shoal.ops.reference.narrow_rows import as_kept

_AT_ONCE = 1 << 24  # elements a block makes
LEAST = 1e-4  # of what is narrowed: a row of zeros has a scale all the same (V3.2's released code)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _blocks(rows: int, elements: int) -> Iterator[slice]:
    """Rows in blocks, each row making so many elements."""
    size = max(1, _AT_ONCE // max(1, elements))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _spans(cu_seqlens_S1: Tensor) -> Iterator[slice]:
    return (slice(start, end) for start, end in pairwise(cu_seqlens_S1.tolist()))


def _score(q_nJI: Tensor, weights_nJ: Tensor, k_NI: Tensor, visible_n: Tensor) -> Tensor:
    """Scores (n, N) of queries that see the first `visible` keys."""
    places_N = torch.arange(k_NI.shape[0], device=k_NI.device)
    blocks = [k_NI.new_empty(0, k_NI.shape[0])]
    for block in _blocks(q_nJI.shape[0], q_nJI.shape[1] * k_NI.shape[0]):
        # 1. Each head's products, cut at 0. 2. Their weighted sum. 3. The mask.
        heads_nJN = torch.matmul(q_nJI[block], k_NI.t()).relu()
        sum_nN = torch.matmul(weights_nJ[block].unsqueeze(1), heads_nJN).squeeze(1)
        blocks.append(sum_nN.masked_fill(places_N >= visible_n[block].unsqueeze(1), float("-inf")))
    return torch.cat(blocks)


def index_scores(
    q_TJI: Tensor, weights_TJ: Tensor, k_TI: Tensor, cu_seqlens_S1: Tensor, max_seqlen: int
) -> Tensor:
    wide = _wide(q_TJI.dtype)
    q_TJI, weights_TJ, k_TI = (x.to(wide) for x in (q_TJI, weights_TJ, k_TI))
    rows = [q_TJI.new_empty(0, max_seqlen)]
    for span in _spans(cu_seqlens_S1):
        length = span.stop - span.start
        visible_n = torch.arange(1, length + 1, device=q_TJI.device)
        scores_nn = _score(q_TJI[span], weights_TJ[span], k_TI[span], visible_n)
        rows.append(torch.nn.functional.pad(scores_nn, (0, max_seqlen - length), value=float("-inf")))
    return torch.cat(rows)


@torch.no_grad()
def paged_index_scores(
    q_TJI: Tensor,
    weights_TJ: Tensor,
    pages: Tensor,
    block_table_SB: Tensor,
    context_lens_S: Tensor,
    max_context_len: int,
    cu_seqlens_S1: Tensor,
    max_seqlen: int,
) -> Tensor:
    wide = _wide(q_TJI.dtype)
    q_TJI, weights_TJ = q_TJI.to(wide), weights_TJ.to(wide)
    # 1. Whole pages, side by side; what lies past a context is nobody's, and may be NaN.
    table_SB = block_table_SB[:, : -(-max_context_len // pages.shape[1])]
    keys = pages.index_select(0, table_SB.flatten())
    k_SNI = keys.view(table_SB.shape[0], -1, keys.shape[-1])[:, :max_context_len].to(wide)
    past_SN = torch.arange(k_SNI.shape[1], device=k_SNI.device) >= context_lens_S.unsqueeze(1)
    k_SNI = k_SNI.masked_fill(past_SN.unsqueeze(2), 0)
    # 2. One new token each: all sequences at once. Several: sequence by sequence.
    if max_seqlen == 1:
        heads_SJN = torch.matmul(q_TJI, k_SNI.transpose(1, 2)).relu()
        scores_TN = torch.matmul(weights_TJ.unsqueeze(1), heads_SJN).squeeze(1)
        scores_TN = scores_TN.masked_fill(past_SN, float("-inf"))
    else:
        rows = []
        for span, k_NI, length in zip(_spans(cu_seqlens_S1), k_SNI, context_lens_S.tolist(), strict=True):
            first = length - (span.stop - span.start) + 1
            visible_n = torch.arange(first, length + 1, device=q_TJI.device)
            rows.append(_score(q_TJI[span], weights_TJ[span], k_NI, visible_n))
        scores_TN = torch.cat(rows)
    missing = max_context_len - scores_TN.shape[1]
    return torch.nn.functional.pad(scores_TN, (0, missing), value=float("-inf")) if missing else scores_TN


@torch.no_grad()
def narrow_index(x: Tensor) -> tuple[Tensor, Tensor]:
    # 1. The Hadamard rotation: entry (i, j) is negative where i and j have an odd number of bits in common.
    size = x.shape[-1]
    bits_I = torch.arange(size, device=x.device)
    common_II = bits_I.unsqueeze(1) & bits_I
    for shift in (4, 2, 1):
        common_II = common_II ^ (common_II >> shift)
    turned = torch.matmul(x.float(), 1.0 - 2.0 * (common_II & 1)) * size**-0.5
    # 2. The least power of two by which no element passes 448 = 1.75 * 2^8: read off the largest one's bits.
    bits = turned.abs().amax(-1).clamp(min=LEAST).view(torch.int32)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).int()
    scale, inverse = ((at << 23).view(torch.float32) for at in (exponent, 254 - exponent))
    # 3. Rounded to nearest even.
    return (turned * inverse.unsqueeze(-1)).to(torch.float8_e4m3fn), scale


@torch.no_grad()
def write_index_keys(values: Tensor, scales: Tensor, slots_T: Tensor, k_TI: Tensor) -> None:
    narrow_TI, scale_T = narrow_index(k_TI)
    values.view(torch.uint8).flatten(0, 1).index_copy_(0, slots_T, narrow_TI.view(torch.uint8))
    scales.view(-1).index_copy_(0, slots_T, scale_T)


@torch.no_grad()
def narrow_index_scores(
    q_TJI: Tensor,
    scales_TJ: Tensor,
    weights_TJ: Tensor,
    values: Tensor,
    scales: Tensor,
    block_table_SB: Tensor,
    context_lens_S: Tensor,
    max_context_len: int,
    cu_seqlens_S1: Tensor,
    max_seqlen: int,
) -> Tensor:
    # The pages of these sequences alone, widened. A scale is positive: it may come before the cut at 0, or
    # after it, with the weights.
    table_SB = block_table_SB[:, : -(-max_context_len // values.shape[1])]
    taken = table_SB.flatten()
    keys = values.view(torch.uint8).index_select(0, taken).view(values.dtype).float()
    pages = keys * scales.index_select(0, taken).unsqueeze(-1)
    places_SB = torch.arange(len(taken), device=taken.device).view(table_SB.shape)
    where = places_SB, context_lens_S, max_context_len, cu_seqlens_S1, max_seqlen
    return paged_index_scores(q_TJI.float(), weights_TJ * scales_TJ, pages, *where)


@torch.no_grad()
def select_top(scores_TN: Tensor, top_k: int) -> Tensor:
    blocks = [torch.empty(0, top_k, dtype=torch.int64, device=scores_TN.device)]
    blocks += (_select(scores_TN[block], top_k) for block in _blocks(*scores_TN.shape))
    return torch.cat(blocks)


def _select(scores_TN: Tensor, top_k: int) -> Tensor:
    tokens, positions = scores_TN.shape
    scores_TN = scores_TN.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    # 1. The smallest score that is taken. 2. All above it, and of its equals the first, up to top_k.
    least_T1 = scores_TN.topk(top_k, dim=-1).values[:, -1:]
    above_TN, equal_TN = scores_TN > least_T1, scores_TN == least_T1
    room_T1 = top_k - above_TN.sum(-1, keepdim=True)
    taken_TN = above_TN | (equal_TN & (equal_TN.cumsum(-1) <= room_T1))
    # 3. Each goes to the place of its rank; what is not taken, to one place more.
    taken_TN &= scores_TN > float("-inf")
    rank_TN = (taken_TN.cumsum(-1) - 1).masked_fill(~taken_TN, top_k)
    columns_TN = torch.arange(positions, device=scores_TN.device).expand(tokens, -1)
    places_TX = columns_TN.new_full((tokens, top_k + 1), -1)
    return places_TX.scatter_(1, rank_TN, columns_TN)[:, :top_k]


@torch.no_grad()
def name_rows(places_TK: Tensor, cu_S1: Tensor, table_SB: Tensor | None, page: int) -> Tensor:
    lengths_S = cu_S1.diff()
    sequences_S = torch.arange(len(lengths_S), device=places_TK.device)
    sequence_T1 = sequences_S.repeat_interleave(lengths_S, output_size=places_TK.shape[0]).unsqueeze(1)
    if table_SB is None:
        rows_TK = cu_S1[sequence_T1].long() + places_TK
    else:
        page_TK = table_SB[sequence_T1, places_TK.clamp(min=0) // page].long()
        rows_TK = page_TK * page + places_TK % page
    return rows_TK.masked_fill(places_TK < 0, -1)


def sparse_latent_attention(
    q_THL: Tensor, rows_XL: Tensor, indices_TK: Tensor, latent_rank: int, scale: float
) -> Tensor:
    blocks = [q_THL.new_empty(0, q_THL.shape[1], latent_rank)]
    learns = torch.is_grad_enabled() and (q_THL.requires_grad or rows_XL.requires_grad)
    for block in _blocks(q_THL.shape[0], indices_TK.shape[1] * (rows_XL.shape[1] + q_THL.shape[1])):
        inputs = q_THL[block], rows_XL, indices_TK[block], latent_rank, scale
        attended = checkpoint(_attend, *inputs, use_reentrant=False) if learns else _attend(*inputs)
        assert isinstance(attended, Tensor)
        blocks.append(attended)
    return torch.cat(blocks)


def _attend(q_tHL: Tensor, rows_XL: Tensor, indices_tK: Tensor, latent_rank: int, scale: float) -> Tensor:
    wide, hidden_tK = _wide(q_tHL.dtype), indices_tK < 0
    # 1. Each token's rows, one key head for all queries. Where it names none there may be anything.
    rows_tKL = rows_XL.index_select(0, indices_tK.clamp(min=0).flatten())
    rows_tKL = as_kept(rows_tKL, latent_rank, wide).to(wide)
    rows_tKL = rows_tKL.view(*indices_tK.shape, rows_tKL.shape[-1]).masked_fill(hidden_tK.unsqueeze(-1), 0)
    # 2. Scores. 3. Mask and softmax. 4. Values.
    scores_tHK = torch.matmul(q_tHL.to(wide), rows_tKL.transpose(1, 2)) * scale
    weights_tHK = scores_tHK.masked_fill(hidden_tK.unsqueeze(1), float("-inf")).softmax(-1)
    return torch.matmul(weights_tHK, rows_tKL[..., :latent_rank]).to(q_tHL.dtype)


@torch.no_grad()
def attention_mass(
    q_THQ: Tensor,
    k_TGQ: Tensor,
    cu_seqlens_S1: Tensor,
    max_seqlen: int,
    scale: float,
    places_TK: Tensor | None,
) -> Tensor:
    wide, (_, heads, dim), groups = _wide(q_THQ.dtype), q_THQ.shape, k_TGQ.shape[1]
    mass_TN = q_THQ.new_zeros(q_THQ.shape[0], max_seqlen, dtype=wide)
    for span in _spans(cu_seqlens_S1):
        length = span.stop - span.start
        k_GQn = k_TGQ[span].to(wide).permute(1, 2, 0)
        for block in _blocks(length, heads * length):
            rows = slice(span.start + block.start, span.start + block.stop)
            # 1. Scores; heads that share a key head are one block of rows.
            q_GmQ = q_THQ[rows].to(wide).transpose(0, 1).reshape(groups, -1, dim)
            scores_Htn = torch.matmul(q_GmQ, k_GQn).view(heads, -1, length) * scale
            # 2. The positions that count.
            places_n = torch.arange(length, device=q_THQ.device)
            seen_tn = places_n <= places_n[block].unsqueeze(1)
            if places_TK is not None:
                places_tK = places_TK[rows]
                chosen_tX = torch.zeros_like(seen_tn[:, :1]).repeat(1, length + 1)
                chosen_tX.scatter_(1, places_tK.where(places_tK >= 0, length), True)
                seen_tn = seen_tn & chosen_tX[:, :length]
            # 3. Softmax, and the mean over heads.
            mass_tn = scores_Htn.masked_fill(~seen_tn, float("-inf")).softmax(-1).mean(0)
            mass_TN[rows, :length] = mass_tn
    return mass_TN
