"""Reference of native sparse attention (arXiv 2502.11089, section 3): compressed keys, selected blocks, runs.

Positions count from 0: compressed entry j stands for tokens j d to j d + l - 1 and is seen from the last of
them on; selection block j is tokens j l' to (j + 1) l' - 1. Queries go in blocks that make `_AT_ONCE`
elements; with a gradient, a block is computed again in the backward pass.

Further letters: n queries of a block, M compressed entries, Z selection blocks, X elements of a cached row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shoal.ops.reference.sparse import select_top

_AT_ONCE = 1 << 24  # elements a block makes


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _blocks(rows: int, elements: int) -> Iterator[slice]:
    size = max(1, _AT_ONCE // max(1, elements))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _spans(cu_S1: Tensor) -> Iterator[slice]:
    return (slice(start, end) for start, end in pairwise(cu_S1.tolist()))


def _run(attend: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor | float) -> tuple[Tensor, Tensor]:
    """By way of a checkpoint where something learns."""
    learns = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
    if not learns:
        return attend(*inputs)
    found = checkpoint(attend, *inputs, use_reentrant=False)
    assert isinstance(found, tuple)
    o, lse = found
    return o, lse


def _softmax(scores: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Weights over what is seen and their log-sum-exp; 0 and -inf where that is nothing."""
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = scores.logsumexp(-1)
    ground = lse.masked_fill(lse == float("-inf"), 0.0)
    return (scores - ground.unsqueeze(-1)).exp(), lse


def _entries_seen(positions_n: Tensor, block: int, stride: int) -> Tensor:
    """How many compressed entries are complete at each position."""
    return ((positions_n + 1 - block + stride) // stride).clamp(min=0)


def _compressed(
    q_nHQ: Tensor, k_MGQ: Tensor, v_MGV: Tensor, seen_n: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    wide, groups = _wide(q_nHQ.dtype), k_MGQ.shape[1]
    # 1. The heads of a group are rows of one product. 2. Scores. 3. Softmax over what is complete. 4. Values.
    q_GnrQ = q_nHQ.to(wide).unflatten(1, (groups, -1)).transpose(0, 1)
    scores_GnrM = torch.matmul(q_GnrQ, k_MGQ.to(wide).permute(1, 2, 0).unsqueeze(1)) * scale
    seen_nM = torch.arange(k_MGQ.shape[0], device=seen_n.device) < seen_n.unsqueeze(1)
    weights_GnrM, lse_Gnr = _softmax(scores_GnrM, seen_nM.unsqueeze(1))
    o_GnrV = torch.matmul(weights_GnrM, v_MGV.to(wide).transpose(0, 1).unsqueeze(1))
    return o_GnrV.transpose(0, 1).flatten(1, 2).to(q_nHQ.dtype), lse_Gnr.transpose(0, 1).flatten(1)


def compressed_attention(
    q_THQ: Tensor,
    k_MGQ: Tensor,
    v_MGV: Tensor,
    cu_seqlens_S1: Tensor,
    cu_entries_S1: Tensor,
    max_seqlen: int,
    block: int,
    stride: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    heads = q_THQ.shape[1]
    o, lse = (
        [q_THQ.new_empty(0, heads, v_MGV.shape[2])],
        [q_THQ.new_empty(0, heads, dtype=_wide(q_THQ.dtype))],
    )
    for span, entries in zip(_spans(cu_seqlens_S1), _spans(cu_entries_S1), strict=True):
        length, k, v = span.stop - span.start, k_MGQ[entries], v_MGV[entries]
        seen_n = _entries_seen(torch.arange(length, device=q_THQ.device), block, stride)
        for part in _blocks(length, heads * k.shape[0]):
            o_nHV, lse_nH = _run(_compressed, q_THQ[span][part], k, v, seen_n[part], scale)
            o.append(o_nHV)
            lse.append(lse_nH)
    return torch.cat(o), torch.cat(lse).detach()


def _select(
    q_nHQ: Tensor,
    k_MGQ: Tensor,
    lse_nH: Tensor,
    positions_n: Tensor,
    width: int,
    blocking: tuple[int, int, int, int, int, int],
    scale: float,
) -> Tensor:
    """Blocks (n, G, K) of queries at these positions, among the first `width` blocks."""
    length, stride, size, top_k, first, local = blocking
    wide, (entries, groups, _) = _wide(q_nHQ.dtype), k_MGQ.shape
    # 1. The probabilities of compressed attention (eq. 8), summed over the heads of a group (eq. 10).
    q_nGrQ = q_nHQ.to(wide).unflatten(1, (groups, -1))
    scores_nGrM = torch.einsum("ngrq,mgq->ngrm", q_nGrQ, k_MGQ.to(wide)) * scale
    seen_nM = torch.arange(entries, device=q_nHQ.device) < _entries_seen(
        positions_n, length, stride
    ).unsqueeze(1)
    ground_nGr = lse_nH.nan_to_num(neginf=0.0).unflatten(1, (groups, -1))
    mass_nGrM = (scores_nGrM - ground_nGr.unsqueeze(-1)).exp()
    mass_nGM = mass_nGrM.masked_fill(~seen_nM[:, None, None], 0.0).sum(2)
    # 2. Blocks from entries (eq. 9): p_slc[j] = sum over m < l'/d and n < l/d of p_cmp[(l'/d) j - m - n].
    #    Blocks and entries there count from 1, which makes it the overlap of both in strides.
    ratio, left = size // stride, length // stride - 1
    mass_nGM = F.pad(mass_nGM, (left, max(0, width * ratio - entries)))
    value_nGZ = mass_nGM.new_zeros(*mass_nGM.shape[:2], width)
    for m in range(ratio):
        for n in range(length // stride):
            value_nGZ += mass_nGM[..., left + ratio - 1 - m - n :: ratio][..., :width]
    # 3. The first and the local ones always; none that begins later. 4. The best, shared by the group.
    own_n1, places_Z = (positions_n // size).unsqueeze(1), torch.arange(width, device=q_nHQ.device)
    forced_nZ = (places_Z < first) | (places_Z > own_n1 - local)
    value_nGZ = value_nGZ.masked_fill(forced_nZ.unsqueeze(1), float("inf"))
    value_nGZ = value_nGZ.masked_fill((places_Z > own_n1).unsqueeze(1), float("-inf"))
    return select_top(value_nGZ.flatten(0, 1), min(top_k, width)).unflatten(0, (-1, groups))


@torch.no_grad()
def select_blocks(
    q_THQ: Tensor,
    k_MGQ: Tensor,
    lse_TH: Tensor,
    cu_seqlens_S1: Tensor,
    cu_entries_S1: Tensor,
    max_seqlen: int,
    blocking: tuple[int, int, int, int, int, int],
    scale: float,
) -> Tensor:
    width = -(-max_seqlen // blocking[2])
    chosen = [torch.empty(0, k_MGQ.shape[1], min(blocking[3], width), dtype=torch.int64, device=q_THQ.device)]
    for span, entries in zip(_spans(cu_seqlens_S1), _spans(cu_entries_S1), strict=True):
        positions_n, k = torch.arange(span.stop - span.start, device=q_THQ.device), k_MGQ[entries]
        for part in _blocks(len(positions_n), q_THQ.shape[1] * max(1, k.shape[0])):
            q, lse = q_THQ[span][part], lse_TH[span][part]
            chosen.append(_select(q, k, lse, positions_n[part], width, blocking, scale))
    return torch.cat(chosen)


def _attend_rows(
    q_nHQ: Tensor, k_XGQ: Tensor, v_XGV: Tensor, rows_nGK: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Over the rows that each query names for each group; -1 names none."""
    wide, groups = _wide(q_nHQ.dtype), k_XGQ.shape[1]
    heads_G = torch.arange(groups, device=q_nHQ.device).unsqueeze(1)
    seen_nGK, rows_nGK = rows_nGK >= 0, rows_nGK.clamp(min=0)
    # 1. Each query's rows; where it names none there may be anything. 2. Scores. 3. Softmax. 4. Values.
    k_nGKQ, v_nGKV = (
        x[rows_nGK, heads_G].to(wide).masked_fill(~seen_nGK.unsqueeze(-1), 0) for x in (k_XGQ, v_XGV)
    )
    q_nGrQ = q_nHQ.to(wide).unflatten(1, (groups, -1))
    scores_nGrK = torch.matmul(q_nGrQ, k_nGKQ.transpose(-1, -2)) * scale
    weights_nGrK, lse_nGr = _softmax(scores_nGrK, seen_nGK.unsqueeze(2))
    return torch.matmul(weights_nGrK, v_nGKV).flatten(1, 2).to(q_nHQ.dtype), lse_nGr.flatten(1)


def block_attention(
    q_THQ: Tensor,
    k_TGQ: Tensor,
    v_TGV: Tensor,
    blocks_TGK: Tensor,
    cu_seqlens_S1: Tensor,
    max_seqlen: int,
    block: int,
    scale: float,
) -> Tensor:
    outputs = [q_THQ.new_empty(0, q_THQ.shape[1], v_TGV.shape[2])]
    keys = blocks_TGK.shape[2] * block
    offsets = torch.arange(block, device=q_THQ.device)
    for span in _spans(cu_seqlens_S1):
        positions_n = torch.arange(span.stop - span.start, device=q_THQ.device)
        for part in _blocks(len(positions_n), keys * (k_TGQ.shape[1] * (k_TGQ.shape[2] + v_TGV.shape[2]))):
            chosen_nGK = blocks_TGK[span][part]
            rows_nGK = (chosen_nGK.unsqueeze(-1) * block + offsets).flatten(2)
            unseen = (rows_nGK < 0) | (rows_nGK > positions_n[part].view(-1, 1, 1))
            inputs = q_THQ[span][part], k_TGQ[span], v_TGV[span], rows_nGK.masked_fill(unseen, -1), scale
            outputs.append(_run(_attend_rows, *inputs)[0])
    return torch.cat(outputs)


def _places(cu_seqlens_S1: Tensor, context_lens_S: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Of each new token its sequence and its position; -1 in a sequence without positions."""
    lengths_S = cu_seqlens_S1.diff()
    at_S = torch.arange(len(lengths_S), device=lengths_S.device)
    at_T = at_S.repeat_interleave(lengths_S, output_size=tokens)
    first_T = (context_lens_S - cu_seqlens_S1[1:])[at_T].long()
    return at_T, first_T + torch.arange(tokens, device=at_T.device)


@torch.no_grad()
def paged_runs_attention(
    q_THQ: Tensor,
    pages: Tensor,
    starts_TGK: Tensor,
    length: int,
    stride: int,
    block_table_SB: Tensor,
    context_lens_S: Tensor,
    cu_seqlens_S1: Tensor,
    max_seqlen: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    tokens, page, dim = q_THQ.shape[0], pages.shape[1], q_THQ.shape[2]
    at_T, positions_T = _places(cu_seqlens_S1, context_lens_S, tokens)
    rows_XGX = pages.flatten(0, 1)
    offsets = torch.arange(length, device=q_THQ.device) * stride
    o, lse = [q_THQ.new_empty(0, q_THQ.shape[1], pages.shape[3] - dim)], []
    for part in _blocks(tokens, starts_TGK.shape[2] * length * pages.shape[2] * pages.shape[3]):
        # 1. Positions of the runs; those before the text and after the token are none. 2. Their slots.
        places_nGK = (starts_TGK[part].unsqueeze(-1) + offsets).flatten(2)
        unseen = (places_nGK < 0) | (places_nGK > positions_T[part].view(-1, 1, 1))
        places_nGK = places_nGK.masked_fill(unseen, 0)
        slots_nGK = (
            block_table_SB[at_T[part].view(-1, 1, 1), places_nGK // page].long() * page + places_nGK % page
        )
        # 3. Attention over them.
        found = _attend_rows(
            q_THQ[part], rows_XGX[..., :dim], rows_XGX[..., dim:], slots_nGK.masked_fill(unseen, -1), scale
        )
        o.append(found[0])
        lse.append(found[1])
    return torch.cat(o), torch.cat(lse) if lse else q_THQ.new_empty(
        0, q_THQ.shape[1], dtype=_wide(q_THQ.dtype)
    )


@torch.no_grad()
def paged_select_blocks(
    q_THQ: Tensor,
    pages: Tensor,
    lse_TH: Tensor,
    block_table_SB: Tensor,
    context_lens_S: Tensor,
    max_context_len: int,
    cu_seqlens_S1: Tensor,
    max_seqlen: int,
    blocking: tuple[int, int, int, int, int, int],
    scale: float,
) -> Tensor:
    length, stride, size, top_k = blocking[:4]
    page, width = pages.shape[1], -(-max_context_len // size)
    chosen = [torch.empty(0, pages.shape[2], min(top_k, width), dtype=torch.int64, device=q_THQ.device)]
    rows_XGQ = pages.flatten(0, 1)[..., : q_THQ.shape[2]]
    spans = zip(_spans(cu_seqlens_S1), block_table_SB, context_lens_S.tolist(), strict=True)
    for span, table_B, context in spans:
        # 1. The entries of the sequence, each in the slot of the token that completed it. 2. As in a pack.
        entries = max(0, (context - length) // stride + 1)
        places_M = torch.arange(entries, device=q_THQ.device) * stride + length - 1
        k_MGQ = rows_XGQ[table_B[places_M // page].long() * page + places_M % page]
        positions_n = torch.arange(context - (span.stop - span.start), context, device=q_THQ.device)
        for part in _blocks(len(positions_n), q_THQ.shape[1] * max(1, k_MGQ.shape[0])):
            q, lse = q_THQ[span][part], lse_TH[span][part]
            chosen.append(_select(q, k_MGQ, lse, positions_n[part], width, blocking, scale))
    return torch.cat(chosen)
