"""Laws of sparse attention: every op is its formula, token by token, whatever lies out of sight.

In float64 products of some tens of terms are good to 1e-14 of their size; EXACT leaves a hundred times that.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shoal.ops import api as ops
from shoal.ops import quantised

EXACT = 1e-12
LENGTHS = (5, 1, 9)


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _cu(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _literal_score(q_JI: Tensor, weights_J: Tensor, k_I: Tensor) -> float:
    total = 0.0
    for q_I, weight in zip(q_JI, weights_J, strict=True):
        total += float(weight) * max(0.0, sum(float(a) * float(b) for a, b in zip(q_I, k_I, strict=True)))
    return total


def test_index_scores_are_the_sum_over_heads() -> None:
    tokens, cu = sum(LENGTHS), _cu(LENGTHS)
    q, w, k = _draw(tokens, 3, 4), _draw(tokens, 3, seed=1), _draw(tokens, 4, seed=2)
    scores_TN = ops.index_scores(q, w, k, cu, max(LENGTHS))
    assert scores_TN.shape == (tokens, 9)
    for start, length in zip(cu.tolist(), LENGTHS, strict=False):
        for t in range(length):
            for n in range(9):
                got = float(scores_TN[start + t, n])
                wanted = _literal_score(q[start + t], w[start + t], k[start + n]) if n <= t else -math.inf
                assert got == pytest.approx(wanted, abs=EXACT)


def test_index_scores_have_gradients() -> None:
    cu = _cu((3, 2))
    inputs = [x.requires_grad_() for x in (_draw(5, 2, 3), _draw(5, 2, seed=1), _draw(5, 3, seed=2))]

    def visible(q: Tensor, w: Tensor, k: Tensor) -> Tensor:
        scores_TN = ops.index_scores(q, w, k, cu, 3)
        return scores_TN[scores_TN > -math.inf]

    assert torch.autograd.gradcheck(visible, inputs)


@pytest.mark.parametrize("new", [(1, 1, 1), (3, 1, 4), (5, 1, 9)], ids=["decode", "chunks", "whole"])
def test_paged_scores_are_those_of_the_pack(new: tuple[int, ...]) -> None:
    """Keys are a part of wider rows, pages are scrambled, and what was never written is NaN."""
    cu, tokens, size = _cu(LENGTHS), sum(LENGTHS), 4
    q, w, k = _draw(tokens, 3, 4), _draw(tokens, 3, seed=1), _draw(tokens, 4, seed=2)
    pages = torch.full((9, size, 6), math.nan, dtype=torch.float64)
    tables = torch.tensor([[7, 2, 0], [5, 0, 0], [1, 8, 3]], dtype=torch.int32)
    for s, (start, length) in enumerate(zip(cu.tolist(), LENGTHS, strict=False)):
        for n in range(length):
            pages[tables[s, n // size], n % size, 2:] = k[start + n]
    ends = cu[1:].tolist()
    rows = torch.tensor([t for end, n in zip(ends, new, strict=True) for t in range(end - n, end)])
    contexts = torch.tensor(LENGTHS, dtype=torch.int32)
    got_TN = ops.paged_index_scores(
        q[rows], w[rows], pages[..., 2:], tables, contexts, 11, _cu(new), max(new)
    )
    assert got_TN.shape == (len(rows), 11)  # the bound, which is above every context
    wanted_TN = ops.index_scores(q, w, k, cu, 11)[rows]
    assert torch.equal(got_TN == -math.inf, wanted_TN == -math.inf)
    assert (got_TN - wanted_TN).nan_to_num().abs().max() <= EXACT


def test_select_top_takes_the_best_and_of_equals_the_first() -> None:
    inf = math.inf
    scores_TN = torch.tensor(
        [
            [0.0, 3.0, 1.0, 2.0, -inf],
            [1.0, 1.0, 1.0, 1.0, 1.0],
            [0.0, 5.0, 0.0, 0.0, 7.0],
            [2.0, -inf, -inf, -inf, -inf],
            [-1.0, math.nan, -2.0, -3.0, -inf],
            [-0.0, 0.0, -1.0, inf, -inf],
        ]
    )
    wanted = [[1, 2, 3], [0, 1, 2], [0, 1, 4], [0, -1, -1], [0, 2, 3], [0, 1, 3]]
    assert ops.select_top(scores_TN, 3).tolist() == wanted
    assert ops.select_top(scores_TN[:, :2], 3).tolist()[0] == [0, 1]
    with pytest.raises(ValueError, match="top_k is 0"):
        ops.select_top(scores_TN, 0)


@pytest.mark.parametrize("top_k", [1, 4, 31])
def test_select_top_is_a_stable_sort_and_does_not_see_the_width(top_k: int) -> None:
    scores_TN = _draw(40, 31).mul(3).round()  # many ties
    scores_TN.masked_fill_(torch.arange(31) > torch.arange(40).unsqueeze(1), -math.inf)
    places_TK = ops.select_top(scores_TN, top_k)
    order_TN = scores_TN.sort(stable=True, descending=True).indices[:, :top_k]
    for t in range(40):
        kept = [n for n in order_TN[t].tolist() if scores_TN[t, n] > -math.inf]
        assert places_TK[t].tolist() == sorted(kept) + [-1] * (top_k - len(kept))
    wider_TN = torch.cat((scores_TN, torch.full((40, 8), -math.inf, dtype=torch.float64)), 1)
    assert torch.equal(ops.select_top(wider_TN, top_k), places_TK)


def _hadamard(size: int) -> Tensor:
    """By doubling (Sylvester), another way than the op's."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix * size**-0.5


@pytest.mark.parametrize("size", [4, 32, 128])
def test_narrow_rows_are_turned_scaled_by_a_power_of_two_and_rounded(size: int) -> None:
    x = _draw(40, 3, size) * 10 ** _draw(40, 3, 1, seed=1)
    x[0, 0], x[0, 1] = 0.0, 447 * _hadamard(size)[1]  # a row that turns to 447 and zeros
    values, scales = quantised.narrow_index(x.float())
    assert values.dtype == torch.float8_e4m3fn
    turned = x @ _hadamard(size)
    assert float(scales[0, 1]) == 1.0
    assert (scales.log2() == scales.log2().round()).all()
    most = turned.abs().amax(-1)
    assert (most / scales <= 448 * (1 + 1e-6)).all()
    assert ((most < 1e-4) | (most / scales > 224 * (1 - 1e-6))).all()  # the least that does
    # Half a step of 3 bits, or of 2^-9 below 2^-6; 1e-5 of the largest is what float32 adds.
    bound = torch.maximum(turned.abs() * 2**-4, scales.unsqueeze(-1) * 2**-10) + 1e-5 * most.unsqueeze(-1)
    assert ((values.double() * scales.unsqueeze(-1) - turned).abs() <= bound).all()


@pytest.mark.parametrize("new", [(1, 1, 1), (3, 1, 4), (5, 1, 9)], ids=["decode", "chunks", "whole"])
def test_narrow_scores_are_those_of_what_the_narrow_numbers_stand_for(new: tuple[int, ...]) -> None:
    """Pages are scrambled, and what was never written is NaN."""
    cu, tokens, size = _cu(LENGTHS), sum(LENGTHS), 4
    q, w, k = (
        _draw(tokens, 3, 16).float(),
        _draw(tokens, 3, seed=1).float(),
        _draw(tokens, 16, seed=2).float(),
    )
    values = torch.full((9, size, 16), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    scales = torch.full((9, size), math.nan)
    tables = torch.tensor([[7, 2, 0], [5, 0, 0], [1, 8, 3]], dtype=torch.int32)
    slots = [
        int(tables[s, n // size]) * size + n % size for s, length in enumerate(LENGTHS) for n in range(length)
    ]
    quantised.write_index_keys(values, scales, torch.tensor(slots), k)
    ends = cu[1:].tolist()
    rows = torch.tensor([t for end, n in zip(ends, new, strict=True) for t in range(end - n, end)])
    contexts = torch.tensor(LENGTHS, dtype=torch.int32)
    narrow, by = quantised.narrow_index(q[rows])
    got_TN = quantised.narrow_index_scores(
        narrow, by, w[rows], values, scales, tables, contexts, 11, _cu(new), max(new)
    )
    (q8, q_by), (k8, k_by) = quantised.narrow_index(q), quantised.narrow_index(k)
    wide = q8.double() * q_by.unsqueeze(-1), w.double(), k8.double() * k_by.unsqueeze(-1)
    wanted_TN = ops.index_scores(*wide, cu, 11)[rows]
    assert torch.equal(got_TN == -math.inf, wanted_TN == -math.inf)
    assert (got_TN - wanted_TN).nan_to_num().abs().max() <= 1e-5 * wanted_TN.nan_to_num(neginf=0).abs().max()


def test_keys_that_no_hadamard_matrix_turns_are_refused() -> None:
    for size in (24, 256):
        with pytest.raises(ValueError, match=f"{size} elements.*power of two, at most 128"):
            quantised.narrow_index(torch.ones(2, size))


INDICES = torch.tensor([[0, -1, -1], [3, 1, -1], [5, 0, 2], [4, 5, 6]])


def test_sparse_latent_attention_is_the_textbook_sum() -> None:
    """Rows are a part of wider ones, and a row that nobody names is NaN."""
    q_THL, wide_XL = _draw(4, 2, 5), _draw(8, 7, seed=1)
    wide_XL[7] = math.nan
    o_THC = ops.sparse_latent_attention(q_THL, wide_XL[:, :5], INDICES, 3, 0.7)
    assert o_THC.shape == (4, 2, 3)
    for t in range(4):
        named = [x for x in INDICES[t].tolist() if x >= 0]
        for h in range(2):
            weight = [math.exp(0.7 * float(q_THL[t, h] @ wide_XL[x, :5])) for x in named]
            wanted_C = sum(w * wide_XL[x, :3] for w, x in zip(weight, named, strict=True)) / sum(weight)
            assert (o_THC[t, h] - wanted_C).abs().max() <= EXACT


def test_no_index_touches_no_row() -> None:
    """-1 is not row 0, which may be a page of nobody's."""
    q_THL, rows_XL = _draw(2, 2, 5), _draw(3, 5, seed=1)
    rows_XL[0] = math.nan
    o_THC = ops.sparse_latent_attention(q_THL, rows_XL, torch.tensor([[1, -1], [2, 1]]), 3, 0.7)
    assert o_THC.isfinite().all()


def test_sparse_latent_attention_has_gradients() -> None:
    q_THL, rows_XL = _draw(4, 2, 5).requires_grad_(), _draw(7, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q, rows: ops.sparse_latent_attention(q, rows, INDICES, 3, 0.7), (q_THL, rows_XL)
    )


def test_blocks_of_queries_are_the_whole() -> None:
    """300 tokens of 256 rows of 256 are more than a block holds."""
    q_THL, rows_XL = _draw(300, 2, 256).float(), _draw(300, 256, seed=1).float()
    indices_TK = torch.arange(256).repeat(300, 1)
    o_THC = ops.sparse_latent_attention(q_THL, rows_XL, indices_TK, 8, 0.05)
    scores_THX = torch.einsum("thl,xl->thx", q_THL, rows_XL[:256]) * 0.05
    wanted_THC = scores_THX.softmax(-1) @ rows_XL[:256, :8]
    assert (o_THC - wanted_THC).abs().max() <= 1e-5  # 256 terms of size 1, each good to 2^-24


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("top_k", [None, 2])
def test_attention_mass_is_the_mean_softmax(groups: int, top_k: int | None) -> None:
    tokens, cu = sum(LENGTHS), _cu(LENGTHS)
    q_THQ, k_TGQ = _draw(tokens, 4, 6), _draw(tokens, groups, 6, seed=1)
    places_TK = None
    if top_k is not None:
        visible_TN = ops.index_scores(_draw(tokens, 3, 4), _draw(tokens, 3), _draw(tokens, 4), cu, 9)
        places_TK = ops.select_top(visible_TN, top_k)
    mass_TN = ops.attention_mass(q_THQ, k_TGQ, cu, 9, 0.4, places_TK)
    assert (mass_TN.sum(-1) - 1).abs().max() <= EXACT
    for start, length in zip(cu.tolist(), LENGTHS, strict=False):
        for t in range(length):
            read = range(t + 1) if places_TK is None else [n for n in places_TK[start + t].tolist() if n >= 0]
            wanted_N = torch.zeros(9, dtype=torch.float64)
            for h in range(4):
                key = h * groups // 4
                weight = {n: math.exp(0.4 * float(q_THQ[start + t, h] @ k_TGQ[start + n, key])) for n in read}
                for n in read:
                    wanted_N[n] += weight[n] / sum(weight.values()) / 4
            assert (mass_TN[start + t] - wanted_N).abs().max() <= EXACT


def test_nothing_is_no_trouble() -> None:
    empty, cu = torch.zeros(0, 2, 5), torch.zeros(1, dtype=torch.int32)
    assert ops.index_scores(empty, torch.zeros(0, 2), torch.zeros(0, 5), cu, 0).shape == (0, 0)
    none_TK = torch.zeros(0, 3, dtype=torch.int64)
    assert ops.sparse_latent_attention(empty, torch.zeros(4, 5), none_TK, 3, 1.0).shape == (0, 2, 3)
