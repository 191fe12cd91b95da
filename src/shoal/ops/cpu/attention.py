"""Attention steps of a few rows on a CPU: checks, scratch memory, and the call of `kernels/attention.py`.

Bound by the weights' way from the caches: for the quickstart's model (192 wide, 80 a cached row) 17 us at one
row and 85 us at eight on one core (LOG.md), for some 45 calls into PyTorch. Contracts in `ops/api.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shoal.ops.cpu.limits import address, count_parts, refusal
from shoal.ops.cpu.load import run

_OUTSIDE = {1: "a slot is outside of the cache", 2: "a context is longer than its pages", 3: "no such page"}


def _check(status: int) -> None:
    if status:
        raise IndexError(f"attention over a paged cache: {_OUTSIDE[status]}")


def _indices_refusal(slots_T: Tensor, *tables: Tensor) -> str | None:
    if slots_T.dtype is not torch.int64 or not slots_T.is_contiguous():
        return f"slots are {slots_T.dtype}; the kernels are for int64 in order"
    for table in tables:
        if table.dtype is not torch.int32 or not table.is_contiguous():
            return f"tables of the cache are {table.dtype}; the kernels are for int32 in order"
    return None


def _read(weights: Any) -> int:
    return sum(weight.numel() for weight in weights if weight is not None)


def latent_refusal(
    x_TD: Tensor,
    norm_D: Tensor,
    norm_eps: float,
    weights: Any,
    latent_eps: float,
    head_dims: tuple[int, int, int, int],
    cos_TR2: Tensor,
    sin_TR2: Tensor,
    pages: Tensor,
    slots_T: Tensor,
    table_SB: Tensor,
    lens_S: Tensor,
    longest: int,
    cu_seqlens_S1: Tensor,
    scale: float,
    interleaved: bool,
) -> str | None:
    biases = (weights.kv_a_bias, weights.o_bias_D) + (
        (weights.q_a_bias_L,) if weights.q_a_LD is not None else ()
    )
    if len({bias is None for bias in biases}) > 1:
        return "some projections have a bias and others have none"
    tensors = (norm_D, *weights, cos_TR2, sin_TR2, pages)
    return refusal(x_TD, tensors, _read(weights)) or _indices_refusal(
        slots_T, table_SB, lens_S, cu_seqlens_S1
    )


def latent_step(
    x_TD: Tensor,
    norm_D: Tensor,
    norm_eps: float,
    weights: Any,
    latent_eps: float,
    head_dims: tuple[int, int, int, int],
    cos_TR2: Tensor,
    sin_TR2: Tensor,
    pages: Tensor,
    slots_T: Tensor,
    table_SB: Tensor,
    lens_S: Tensor,
    longest: int,
    cu_seqlens_S1: Tensor,
    scale: float,
    interleaved: bool,
) -> Tensor:
    (tokens, hidden), (heads, nope, rope, value) = x_TD.shape, head_dims
    (sequences, width), (num_pages, page_size, row) = table_SB.shape, pages.shape
    query_rank, rank = 0 if weights.q_a_LD is None else weights.q_a_LD.shape[0], row - rope
    parts = count_parts(tokens, _read(weights))
    of_token = heads * (nope + rope + value) + row + query_rank + parts * max(hidden, query_rank)
    scratch = x_TD.new_empty(tokens * of_token + heads * (row + longest + rank))
    out_TD = torch.empty_like(x_TD)
    _check(
        run(
            *("latent_step", parts),
            *(x_TD.data_ptr(), tokens, hidden, norm_D.data_ptr(), norm_eps),
            *map(address, weights),
            *(weights.kv_a_bias is not None, latent_eps),
            *(cos_TR2.data_ptr(), sin_TR2.data_ptr(), interleaved),
            *(pages.data_ptr(), num_pages, page_size, slots_T.data_ptr()),
            *(table_SB.data_ptr(), lens_S.data_ptr(), cu_seqlens_S1.data_ptr(), sequences, width, longest),
            *(query_rank, heads, nope, rope, value, rank),
            *(scale, scratch.data_ptr(), out_TD.data_ptr()),
        )
    )
    return out_TD


def grouped_refusal(
    x_TD: Tensor,
    norm_D: Tensor,
    norm_eps: float,
    weights: Any,
    cos_TQ2: Tensor,
    sin_TQ2: Tensor,
    pages: Tensor,
    slots_T: Tensor,
    table_SB: Tensor,
    lens_S: Tensor,
    longest: int,
    cu_seqlens_S1: Tensor,
    scale: float,
    interleaved: bool,
) -> str | None:
    tensors = (norm_D, *weights, cos_TQ2, sin_TQ2, pages)
    return refusal(x_TD, tensors, _read(weights)) or _indices_refusal(
        slots_T, table_SB, lens_S, cu_seqlens_S1
    )


def grouped_step(
    x_TD: Tensor,
    norm_D: Tensor,
    norm_eps: float,
    weights: Any,
    cos_TQ2: Tensor,
    sin_TQ2: Tensor,
    pages: Tensor,
    slots_T: Tensor,
    table_SB: Tensor,
    lens_S: Tensor,
    longest: int,
    cu_seqlens_S1: Tensor,
    scale: float,
    interleaved: bool,
) -> Tensor:
    (tokens, hidden), (sequences, width) = x_TD.shape, table_SB.shape
    num_pages, page_size, _, groups, dim = pages.shape
    heads = weights.q.shape[0] // dim
    normed = 0 if weights.q_norm is None else 1 if weights.q_norm.numel() == dim else 2
    parts = count_parts(tokens, _read(weights))
    of_token = parts * hidden + 2 * heads * dim + 2 * groups * dim
    scratch = x_TD.new_empty(tokens * of_token + heads * longest)
    out_TD = torch.empty_like(x_TD)
    _check(
        run(
            *("grouped_step", parts),
            *(x_TD.data_ptr(), tokens, hidden, norm_D.data_ptr(), norm_eps),
            *map(address, weights[:6]),
            weights.q_bias is not None,
            *map(address, weights[6:8]),
            weights.o_bias_D is not None,
            *map(address, weights[8:]),
            *(normed, norm_eps),
            *(cos_TQ2.data_ptr(), sin_TQ2.data_ptr(), interleaved),
            *(pages.data_ptr(), num_pages, page_size, slots_T.data_ptr()),
            *(table_SB.data_ptr(), lens_S.data_ptr(), cu_seqlens_S1.data_ptr(), sequences, width, longest),
            *(heads, groups, dim),
            *(scale, scratch.data_ptr(), out_TD.data_ptr()),
        )
    )
    return out_TD
