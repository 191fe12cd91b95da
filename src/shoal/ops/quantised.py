"""The door to quantised arithmetic: FP8 and INT4, for training and for serving, as `api` is to the rest.

Its laws are api's: a typed function an op, whose docstring is the contract; `dispatch` picks the reference or
a kernel. A quantised weight is two tensors, and stands for the numbers `dequantise` makes of it.

Shape letters as in api; N rows and K columns of a weight, n and k the same in blocks of 128, rounded up, G
groups of 128 columns, rounded up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.ops.dispatch import call

BLOCK = 128  # columns of a group, rows and columns of a block
FP8 = torch.float8_e4m3fn


class Fp8Weight(NamedTuple):
    """e4m3 and a scale for each 128 x 128: as DeepSeek-V3 is published. Leading dimensions stack matrices."""

    values: Tensor  # (..., N, K) float8_e4m3fn
    scales: Tensor  # (..., n, k) float32, which multiply


class Fp8Pair(NamedTuple):
    """A weight and its transpose: what the products of a forward and of a backward pass read."""

    values: Tensor  # (..., N, K) float8_e4m3fn
    scales: Tensor  # (..., n, k) float32
    values_t: Tensor  # (..., K, N)
    scales_t: Tensor  # (..., k, n)


class Int4Weight(NamedTuple):
    """-7 to 7, and a scale for each 128 columns of a row.

    Bytes 2i and 2i + 1 of a group's 64 are columns i, i + 32, i + 64 and i + 96, low half first, each plus 8.
    """

    values: Tensor  # (..., N, 64 G) uint8
    scales: Tensor  # (..., G, N) bfloat16: the scales of a group lie together


Weight = Fp8Weight | Int4Weight


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 of x's shape, and a float32 scale for each 128 of its last dimension: (..., k).

    s = amax / 448; a value is x times the float32 inverse of s, rounded to nearest even. A block of zeros has
    a scale that is not 0. No gradient.
    """
    return call("quantise_rows", x)


def quantise_blocks(weight: Tensor) -> Fp8Weight:
    """The same for each 128 x 128 of the last two dimensions."""
    return Fp8Weight(*call("quantise_blocks", weight))


def quantise_groups(weight: Tensor) -> Int4Weight:
    """INT4 of a weight (..., N, K). s = amax / 7, rounded to bfloat16 before it divides."""
    return Int4Weight(*call("quantise_groups", weight))


def dequantise(weight: Weight, columns: int) -> Tensor:
    """Float32 (..., N, K), K = `columns`: each value times its scale."""
    return call("dequantise", weight.values, weight.scales, columns)


def quantised_linears(x: Tensor, weights: Sequence[Weight]) -> tuple[Tensor, ...]:
    """x W^T in x's dtype of each weight, of one kind, for serving: x (..., K), W one matrix. Sums in float32.
    No gradient.

    Kernels for few rows read x as it is. For FP8 and many rows they may read it as `quantise_rows` has it,
    each element off by 2^-4 of itself at most; never in batch-invariant mode, and never in the reference.
    """
    for weight in weights:
        _check(x, weight)
    values, scales = zip(*weights, strict=True)
    return call("quantised_linears", x, values, scales)


def quantised_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up: Weight,
    down: Weight,
    beside_TD: Tensor | None = None,
) -> Tensor:
    """`api.grouped_mlp` of quantised experts, for serving; plus `beside_TD`, if that is given. No gradient.

    `gate_up` stands for (E, 2, F, D): gate and up are matrices of their own, so no block holds rows of both.
    `down` stands for (E, D, F). Activations as in `quantised_linears`, h = silu(g) u among them.
    """
    _check(x_TD, gate_up)
    return call("quantised_mlp", x_TD, experts_TK, weights_TK, *gate_up, *down, beside_TD)


def quantised_sum(rows_MD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The last step of `quantised_mlp`: `api.sum_choices`, but in batch-invariant mode as outside of it."""
    return call("quantised_sum", rows_MD, experts_TK, weights_TK)


def fp8_pair(*weights: Tensor) -> Fp8Pair:
    """A weight (..., N, K) and its transpose, as `quantise_blocks` has them, in one reading. Several of the
    same K are one below the other, each from a row of blocks of its own on, zeros between. No gradient."""
    return Fp8Pair(*call("fp8_pair", *(weight.detach() for weight in weights)))


def fp8_linears(x: Tensor, weights: tuple[Tensor, ...], pair: Fp8Pair | None = None) -> tuple[Tensor, ...]:
    """x W^T of each weight (N_i, K) in FP8, for training (DeepSeek-V3, section 3.3), quantised as met.

    y = rows(x) blocks(W)^T and dx = rows(dy) blocks(W), where rows and blocks are what the two quantisers
    make; dW = dy^T x of the numbers as they came. Differentiable in x and the weights. `pair` is the weights'
    `fp8_pair`, where the caller has it: the same numbers, if the weights have not changed since.
    """
    return call("fp8_linears", x, weights, pair)


def fp8_grouped_mlp(
    x_TD: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    pairs: tuple[Fp8Pair, Fp8Pair] | None = None,
) -> Tensor:
    """`api.grouped_mlp` whose products are `fp8_linears`', gate and up quantised apart. `pairs` are, as
    `pair` there, `fp8_pair(gate, up)` and `fp8_pair(down)` of all experts. Differentiable as it is.
    """
    return call("fp8_grouped_mlp", x_TD, experts_TK, weights_TK, gate_up_E2FD, down_EDF, pairs)


def narrow_index(x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries or keys of a lightning indexer in FP8 (DeepSeek-V3.2's released code): e4m3 of x's shape (...,
    I), and a float32 scale for each row.

    Rows are turned by the Hadamard matrix of I, a power of two up to 128, times I^-1/2: it spreads what is
    large in one element over all, and changes no product of two rows that are both turned. The scale is the
    least power of two by which no element passes 448. No gradient.
    """
    check_index(x.shape[-1])
    return call("narrow_index", x)


def write_index_keys(values: Tensor, scales: Tensor, slots_T: Tensor, k_TI: Tensor) -> None:
    """Keys as `narrow_index` has them, into the slots of a cache: values (P, page_size, I), scales (P,
    page_size)."""
    check_index(k_TI.shape[-1])
    call("write_index_keys", values, scales, slots_T, k_TI)


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
    """`api.paged_index_scores` of narrow queries, with their scales, over narrow keys. No gradient."""
    return call(
        "narrow_index_scores",
        q_TJI,
        scales_TJ,
        weights_TJ,
        values,
        scales,
        block_table_SB,
        context_lens_S,
        max_context_len,
        cu_seqlens_S1,
        max_seqlen,
    )


def check_index(dim: int) -> None:
    """ValueError unless keys of so many elements can be narrowed."""
    if dim > BLOCK or dim & (dim - 1):
        raise ValueError(
            f"the indexer's keys have {dim} elements; in FP8 they are turned by a Hadamard matrix and share "
            f"one scale, so they must be a power of two, at most {BLOCK}: keep them wide"
        )


def _check(x: Tensor, weight: Weight) -> None:
    columns = weight.values.shape[-1] * (2 if isinstance(weight, Int4Weight) else 1)
    wanted = -(-x.shape[-1] // BLOCK) * BLOCK if isinstance(weight, Int4Weight) else x.shape[-1]
    if columns != wanted:
        raise ValueError(
            f"x has {x.shape[-1]} columns, and the quantised weight {columns}; quantise the weight that is "
            f"to be multiplied with x"
        )
