"""Laws of attention: over a pack it is the textbook sum, and over a paged cache it is the same sum again.

The textbook sum is written out query by query, head by head. Caches are hostile: pages lie in scrambled
order, and whatever was never written, page 0 included, is NaN. In float64 both sides round to 2^-53 over
sums of a few hundred terms: within 1e-12 of the scale, gradients included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from shoal.ops import api as ops

pytestmark = pytest.mark.usefixtures("poison")

EXACT = 1e-12
SCALE = 0.3
PACKS = {
    "one token": [1],
    "one sequence": [63],
    "long": [257],
    "several": [5, 1, 17, 2],
    "an empty one between": [3, 0, 4],
    "no token": [0],
    "no sequence": [],
}
# Query heads, key-value heads, query dim, value dim.
HEADS = {
    "multi": (3, 3, 4, 4),
    "grouped": (6, 2, 5, 5),
    "narrow value": (2, 2, 6, 4),
    "wide value": (4, 1, 3, 5),
}


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _attend(q_Q: Tensor, k_NQ: Tensor, v_NV: Tensor, scale: float) -> Tensor:
    """One query over the N positions it sees."""
    weights_N = (scale * (k_NQ @ q_Q)).exp()
    return weights_N @ v_NV / weights_N.sum()


def _assert_close(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    if wanted.numel():
        assert (got - wanted).abs().max() <= EXACT * wanted.abs().max()


# --------------------------------------------------------------------------------------------------
# Over a pack


def _pack(lengths: list[int], heads: str) -> tuple[Tensor, Tensor, Tensor]:
    H, G, Q, V = HEADS[heads]
    tokens = sum(lengths)
    return _random(tokens, H, Q, seed=0), _random(tokens, G, Q, seed=1), _random(tokens, G, V, seed=2)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("pack", PACKS)
def test_attention_is_the_textbook_sum(pack: str, heads: str) -> None:
    lengths = PACKS[pack]
    q_THQ, k_TGQ, v_TGV = _pack(lengths, heads)
    H, G, _, V = HEADS[heads]
    wanted_THV = torch.empty(sum(lengths), H, V, dtype=torch.float64)
    start = 0
    for length in lengths:
        for t in range(start, start + length):
            for h in range(H):
                seen, g = slice(start, t + 1), h * G // H
                wanted_THV[t, h] = _attend(q_THQ[t, h], k_TGQ[seen, g], v_TGV[seen, g], SCALE)
        start += length
    got_THV = ops.attention(q_THQ, k_TGQ, v_TGV, _boundaries(lengths), max(lengths, default=0), SCALE)
    _assert_close(got_THV, wanted_THV)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("pack", ["one token", "several", "an empty one between", "no token", "no sequence"])
def test_attention_gradients(pack: str, heads: str) -> None:
    lengths = PACKS[pack]
    inputs = tuple(tensor.requires_grad_() for tensor in _pack(lengths, heads))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, _boundaries(lengths), max(lengths, default=0), SCALE)

    assert gradcheck(run, inputs, fast_mode=True)


TAILS = {"all": [5, 1, 17, 2], "some": [2, 1, 9, 0], "one": [0, 0, 1, 0], "none": [0, 0, 0, 0]}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("tail", TAILS)
def test_the_last_tokens_of_a_sequence_see_what_they_see_in_the_whole(tail: str, heads: str) -> None:
    lengths, new = PACKS["several"], TAILS[tail]
    q_THQ, k_TGQ, v_TGV = inputs = [x.requires_grad_() for x in _pack(lengths, heads)]
    keys = _boundaries(lengths), max(lengths)
    ends = [sum(lengths[: s + 1]) for s in range(len(lengths))]
    rows_T = torch.tensor([t for n, end in zip(new, ends, strict=True) for t in range(end - n, end)]).long()
    wanted_THV = ops.attention(q_THQ, k_TGQ, v_TGV, *keys, SCALE)[rows_T]
    got_THV = ops.attention(q_THQ[rows_T], k_TGQ, v_TGV, _boundaries(new), max(new), SCALE, *keys)
    _assert_close(got_THV, wanted_THV)
    # And so for the gradients, of which nobody is left without one.
    weights_THV = _random(*wanted_THV.shape, seed=3)
    wanted = torch.autograd.grad((wanted_THV * weights_THV).sum(), inputs)
    for got, want in zip(torch.autograd.grad((got_THV * weights_THV).sum(), inputs), wanted, strict=True):
        _assert_close(got, want)


# --------------------------------------------------------------------------------------------------
# Over a cache


@dataclass(frozen=True, eq=False)
class Cache:
    """Sequences of random rows in scrambled pages, and the same rows laid out in the open."""

    pages: Tensor
    rows: list[Tensor]  # of each sequence, in order
    block_table_SB: Tensor
    context_lens_S: Tensor

    @property
    def where(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """The arguments that both cached ops begin with after the queries."""
        return self.pages, self.block_table_SB, self.context_lens_S, int(self.context_lens_S.max())


def _cache(contexts: list[int], page_size: int, row: tuple[int, ...]) -> Cache:
    rows = [_random(length, *row, seed=10 + s) for s, length in enumerate(contexts)]
    counts = [-(-length // page_size) for length in contexts]
    spare = 5
    pages = torch.full((1 + sum(counts) + spare, page_size, *row), math.nan, dtype=torch.float64)
    order = 1 + torch.randperm(sum(counts) + spare, generator=torch.Generator().manual_seed(0))
    table_SB = torch.zeros(len(contexts), max(counts), dtype=torch.int32)
    taken = 0
    for s, count in enumerate(counts):
        table_SB[s, :count] = order[taken : taken + count]
        taken += count
        slots = [int(table_SB[s, at // page_size]) * page_size + at % page_size for at in range(contexts[s])]
        ops.write_cache(pages, torch.tensor(slots), rows[s])
    return Cache(pages, rows, table_SB, torch.tensor(contexts, dtype=torch.int32))


# New tokens of each sequence, and how many positions it then has.
STEPS = {
    "decode": ([1, 1, 1, 1], [1, 7, 23, 64]),
    "verify drafts": ([3, 3, 3], [3, 16, 33]),
    "ragged": ([1, 5, 17, 2], [9, 5, 40, 18]),
    "one chunk": ([63], [257]),
}
CACHED = pytest.mark.parametrize("page_size", [1, 4, 16])


@CACHED
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("heads", ["multi", "grouped"])
def test_paged_attention_is_the_textbook_sum(heads: str, step: str, page_size: int) -> None:
    H, G, Q, _ = HEADS[heads]
    new, contexts = STEPS[step]
    cache = _cache(contexts, page_size, (2, G, Q))
    q_THQ = _random(sum(new), H, Q, seed=0)
    wanted = []
    for s, rows in enumerate(cache.rows):
        for seen in range(contexts[s] - new[s] + 1, contexts[s] + 1):
            q_HQ = q_THQ[len(wanted)]
            groups = [h * G // H for h in range(H)]
            wanted.append(
                torch.stack(
                    [
                        _attend(q_HQ[h], rows[:seen, 0, g], rows[:seen, 1, g], SCALE)
                        for h, g in enumerate(groups)
                    ]
                )
            )
    got_THQ = ops.paged_attention(q_THQ, *cache.where, _boundaries(new), max(new), SCALE)
    _assert_close(got_THQ, torch.stack(wanted))


@CACHED
@pytest.mark.parametrize("step", STEPS)
def test_latent_attention_is_the_textbook_sum(step: str, page_size: int) -> None:
    heads, rank, rope = 3, 6, 2
    new, contexts = STEPS[step]
    cache = _cache(contexts, page_size, (rank + rope,))
    q_THL = _random(sum(new), heads, rank + rope, seed=0)
    wanted = []
    for s, rows in enumerate(cache.rows):
        for seen in range(contexts[s] - new[s] + 1, contexts[s] + 1):
            q_HL = q_THL[len(wanted)]
            wanted.append(torch.stack([_attend(q_L, rows[:seen], rows[:seen, :rank], SCALE) for q_L in q_HL]))
    got_THC = ops.latent_attention(q_THL, *cache.where, _boundaries(new), max(new), rank, SCALE)
    _assert_close(got_THC, torch.stack(wanted))


@pytest.mark.parametrize("latent", [True, False])
def test_decoding_is_a_chunk_of_one(latent: bool) -> None:
    """One token for every sequence takes a path of its own; a longer `max_seqlen` takes the chunk's."""
    new, contexts = STEPS["decode"]
    cache = _cache(contexts, 4, (8,) if latent else (2, 2, 8))
    q_THQ = _random(len(new), 6, 8, seed=0)

    def run(max_seqlen: int) -> Tensor:
        if latent:
            return ops.latent_attention(q_THQ, *cache.where, _boundaries(new), max_seqlen, 6, SCALE)
        return ops.paged_attention(q_THQ, *cache.where, _boundaries(new), max_seqlen, SCALE)

    _assert_close(run(1), run(2))


@pytest.mark.parametrize("new", [1, 3])
def test_an_empty_place_gets_zeros_and_a_longest_context_may_be_a_bound(new: int) -> None:
    contexts = [5, 7, 3]
    cache = _cache(contexts, 4, (8,))
    q_THL = _random(3 * new, 6, 8, seed=0)
    table, lengths = cache.block_table_SB, torch.tensor([5, 0, 3], dtype=torch.int32)
    cu = _boundaries([new] * 3)
    got = ops.latent_attention(q_THL, cache.pages, table, lengths, 8, cu, new, 6, SCALE)
    assert not got[new : 2 * new].any()
    for s in (0, 2):
        alone = (cache.pages, table[s : s + 1], lengths[s : s + 1])
        rows = slice(s * new, (s + 1) * new)
        for longest in (contexts[s], 8):
            one = ops.latent_attention(q_THL[rows], *alone, longest, _boundaries([new]), new, 6, SCALE)
            _assert_close(got[rows], one)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", HEADS)
def test_parts_are_the_textbook_sum_and_merge_to_it(heads: str, causal: bool) -> None:
    n, N, cut = 5, 12, 6
    q, k, v = _pack([N], heads)
    q = q[:n]
    H, G, _, V = HEADS[heads]
    got, lse = ops.attention_part(q, k, v, SCALE, causal)
    wanted = torch.empty(n, H, V, dtype=torch.float64)
    for t in range(n):
        for h in range(H):
            seen, g = slice(N - n + t + 1 if causal else N), h * G // H
            wanted[t, h] = _attend(q[t, h], k[seen, g], v[seen, g], SCALE)
            assert lse[t, h].item() == pytest.approx(
                (SCALE * (k[seen, g] @ q[t, h])).exp().sum().log().item()
            )
    _assert_close(got, wanted)
    left = ops.attention_part(q, k[:cut], v[:cut], SCALE, False)
    right = ops.attention_part(q, k[cut:], v[cut:], SCALE, causal)
    merged, total = ops.merge_attention(*left, *right)
    _assert_close(merged, wanted)
    _assert_close(total, lse)


@pytest.mark.parametrize(("first", "last"), [(0, 1), (3, 9), (4, 8), (0, 23), (5, 5)])
def test_read_cache_gives_positions_in_order(first: int, last: int) -> None:
    cache = _cache([7, 23], 4, (3,))
    got = ops.read_cache(cache.pages, cache.block_table_SB[1], first, last, 0, torch.float64)
    assert torch.equal(got, cache.rows[1][first:last])


def test_narrow_attention_rounds_twice() -> None:
    """Softmax weights and the result, each by at most 2^-8 of itself, independently: 1.5 * 2^-8 together."""
    lengths = PACKS["several"]
    wide = _pack(lengths, "narrow value")
    narrow = tuple((4 * tensor).bfloat16() for tensor in wide)
    got, exact = (
        ops.attention(q, k, v, _boundaries(lengths), max(lengths), SCALE)
        for q, k, v in (narrow, tuple(tensor.double() for tensor in narrow))
    )
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).norm() <= 1.5 * 2.0**-8 * exact.norm()


@pytest.mark.parametrize("step", ["decode", "ragged"])
def test_scores_of_narrow_inputs_are_not_rounded(step: str) -> None:
    """Scores reach 20 here. Rounded to bfloat16 they, and so the weights, would be off by 8%; kept in
    float32, the one rounding left is the result's, at most 2^-8 of it."""
    new, contexts = STEPS[step]
    cache = _cache(contexts, 4, (2, 2, 8))
    q_THQ = (10 * _random(sum(new), 6, 8, seed=0)).bfloat16()
    pages = cache.pages.bfloat16()

    def run(dtype: torch.dtype) -> Tensor:
        where = (pages.to(dtype), *cache.where[1:])
        return ops.paged_attention(q_THQ.to(dtype), *where, _boundaries(new), max(new), SCALE)

    exact = run(torch.float64)
    got = run(torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).norm() <= 2.0**-8 * exact.norm()


def test_cached_attention_has_no_gradient() -> None:
    cache = _cache([9, 6], 4, (2, 2, 8))
    q_THQ = _random(2, 6, 8, seed=0).requires_grad_()
    assert not ops.paged_attention(q_THQ, *cache.where, _boundaries([1, 1]), 1, SCALE).requires_grad
    assert not ops.paged_attention(q_THQ, *cache.where, _boundaries([1, 1]), 2, SCALE).requires_grad


# --------------------------------------------------------------------------------------------------
# Writing to a cache


@pytest.mark.parametrize("row", [(3,), (2, 2, 3)])
@pytest.mark.parametrize("tokens", [0, 1, 10])
def test_write_cache_keeps_each_row_at_its_slot_and_touches_no_other(
    tokens: int, row: tuple[int, ...]
) -> None:
    pages = torch.full((4, 5, *row), math.nan, dtype=torch.float64)
    slots_T = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:tokens]
    rows = _random(tokens, *row, seed=1)
    ops.write_cache(pages, slots_T, rows)
    wanted = torch.full_like(pages, math.nan)
    for slot, kept in zip(slots_T.tolist(), rows, strict=True):
        wanted[slot // 5, slot % 5] = kept
    assert torch.equal(pages.nan_to_num(123.0), wanted.nan_to_num(123.0))


def test_write_cache_remembers_no_graph() -> None:
    pages = torch.zeros(2, 2, 3)
    ops.write_cache(pages, torch.tensor([1]), torch.ones(1, 3, requires_grad=True) * 2)
    assert not pages.requires_grad
    assert pages[0, 1].tolist() == [2, 2, 2]


def test_write_cache_never_writes_to_a_copy() -> None:
    """Slots that do not lie one stride apart have no flat view: a copy would take the rows and be thrown
    away."""
    pages = torch.zeros(4, 4, 3)[:, :3]
    with pytest.raises(RuntimeError, match="view"):
        ops.write_cache(pages, torch.tensor([1]), torch.ones(1, 3))
