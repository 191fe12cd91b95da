"""Laws of the kernels of sparse attention over latents: each is its reference, on odd sizes and hostile
memory.

Scores and outputs are sums of some hundred products in float32, so they agree to TIGHT of their size. In half
precision both sides round the same inputs; the kernels round weights to half before the second product, which
is 2^-11 or 2^-8 of each term: LOOSE leaves four times that.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shoal.ops import api as ops
from shoal.ops import dispatch, quantised
from shoal.ops.reference.narrow_rows import narrow_rows, widen_rows
from shoal.ops.triton import index_scores, select, sparse
from shoal.ops.triton.cache_plan import PORTABLE, TURNS
from tests.ops.parts import DEVICE, GPU, HALF, runs_triton, scalars_in_arrays

pytestmark = [runs_triton, scalars_in_arrays]
TIGHT = 2e-5
LOOSE = 4 * (2**-8 if torch.bfloat16 == HALF else 2**-11)
DTYPES = [torch.float32, HALF]
E4M3 = torch.float8_e4m3fn


def _draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def _close(got: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert torch.equal(got == -math.inf, wanted == -math.inf)
    error = (got.float() - wanted.float()).nan_to_num().abs().max()
    assert error <= tolerance * wanted.float().nan_to_num(neginf=0.0).abs().max().clamp(min=1.0)


@pytest.mark.parametrize(
    ("columns", "top_k"), [(1, 1), (5, 3), (33, 7), (300, 300), (2500, 40), (20000, 2048)]
)
@pytest.mark.parametrize("ties", [False, True])
def test_select_top_is_its_reference(
    columns: int, top_k: int, ties: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 64 if GPU else 3
    scores_TN = _draw(rows, columns)
    if ties:
        scores_TN = scores_TN.mul(2).round()
    scores_TN[0, columns // 2 :] = -math.inf
    scores_TN[1, ::2] = math.inf
    scores_TN[2, : columns // 3] = math.nan
    scores_TN[2, columns // 3] = -0.0
    with dispatch.using("reference"):
        wanted_TK = ops.select_top(scores_TN, top_k)
    with dispatch.using("triton"):
        assert torch.equal(ops.select_top(scores_TN, top_k), wanted_TK)
    monkeypatch.setattr(select, "MANY", 1 if rows < select.MANY else rows + 1)  # the other way for long rows
    if columns > select.SHORT:
        assert torch.equal(select.select_top(scores_TN, top_k), wanted_TK)


@pytest.mark.parametrize("kind", ["tied", "flat", "rising", "short"])
def test_selection_does_not_see_its_chunks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rising scores the last chunks have all that is taken, of equal ones the first; where a row has one
    program, equal ones outgrow its list."""
    scores_TN = _draw(2, 131072 if GPU else 5000).mul(3)
    if kind == "short":
        scores_TN[0, 1000:] = -math.inf
        scores_TN[1, 5:] = -math.inf
    else:
        with_kind = {"tied": scores_TN.round(), "flat": scores_TN * 0, "rising": scores_TN.sort().values}
        scores_TN = with_kind[kind]
    with dispatch.using("reference"):
        wanted_TK = ops.select_top(scores_TN, 700)
    for chunk in (1024, 4096):
        assert torch.equal(select.select_top(scores_TN, 700, chunk=chunk), wanted_TK)
    for name, value in {"MANY": 1, "ROWS": 1, "CHUNK": 1024, "KEPT": 4096}.items():
        monkeypatch.setattr(select, name, value)
    assert torch.equal(select.select_top(scores_TN, 700), wanted_TK)


LENGTHS = (300, 1, 131) if GPU else (37, 1, 20)


@pytest.mark.parametrize("paged", [False, True])
def test_rows_are_named_by_sequence(paged: bool) -> None:
    size, cu = 8, torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0).int()
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    table_SB = order.view(3, 50).int().to(DEVICE)
    pick = torch.Generator().manual_seed(2)
    places_TK = torch.cat([torch.randint(-1, n, (n, 40), generator=pick) for n in LENGTHS]).to(DEVICE)
    rows_TK = []
    for side in ("reference", "triton"):
        with dispatch.using(side):
            rows_TK.append(ops.name_rows(places_TK, cu, table_SB if paged else None, size))
    first_T1 = cu[:-1].repeat_interleave(cu.diff()).unsqueeze(1)
    if not paged:
        assert torch.equal(rows_TK[0], (places_TK + first_T1).where(places_TK >= 0, places_TK))
    assert torch.equal(*rows_TK)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_a_pack_are_their_reference(dtype: torch.dtype, poison: None) -> None:
    tokens, cu = sum(LENGTHS), torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0).int()
    q, w, k = (
        _draw(tokens, 5, 24, dtype=dtype),
        _draw(tokens, 5, seed=1),
        _draw(tokens, 24, seed=2, dtype=dtype),
    )
    with dispatch.using("reference"):
        wanted_TN = ops.index_scores(q, w, k, cu, max(LENGTHS))
    with dispatch.using("triton"):
        _close(ops.index_scores(q, w, k, cu, max(LENGTHS)), wanted_TN, TIGHT * 10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("new", [(1, 1, 1), (5, 1, 3)])
def test_scores_over_pages_are_their_reference(
    new: tuple[int, ...], dtype: torch.dtype, poison: None
) -> None:
    """Keys lie in wider rows, pages are scrambled, and what is past a context is NaN."""
    size, width = 8, 60
    tokens, cu = sum(new), torch.tensor([0, *new], device=DEVICE).cumsum(0).int()
    pages = _draw(200, size, width, dtype=dtype)
    table_SB = (
        torch.randperm(200, generator=torch.Generator().manual_seed(1))[:150].view(3, 50).int().to(DEVICE)
    )
    contexts_S = torch.tensor(LENGTHS, device=DEVICE).int()
    for s, length in enumerate(LENGTHS):
        pages[table_SB[s, length // size].long(), length % size :] = math.nan
        pages[table_SB[s, length // size + 1 :].long()] = math.nan
    q, w = _draw(tokens, 5, 24, dtype=dtype), _draw(tokens, 5, seed=1)
    if LENGTHS[1] < new[1]:
        pytest.skip("a sequence has no more new tokens than positions")
    where = (pages[..., width - 24 :], table_SB, contexts_S, max(LENGTHS) + 3, cu, max(new))
    with dispatch.using("reference"):
        wanted_TN = ops.paged_index_scores(q, w, *where)
    with dispatch.using("triton"):
        _close(ops.paged_index_scores(q, w, *where), wanted_TN, TIGHT * 10)


@pytest.mark.parametrize("narrow", [False, True])
def test_tiles_within_a_page_score_as_others_do(narrow: bool, poison: None) -> None:
    """A page is a tile or several; a plan whose tile holds several pages looks each position up. Tiles of
    different sizes take different instructions: in FP8 these agree to 2^-11 on Hopper, as below."""
    size, new = 32, (5, 1, 3)
    lengths = (300, 64, 131) if GPU else (37, 64, 20)
    tokens, cu = sum(new), torch.tensor([0, *new], device=DEVICE).cumsum(0).int()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    table_SB, contexts_S = order[:30].view(3, 10).int(), torch.tensor(lengths, device=DEVICE).int()
    pages, q, w = _draw(40, size, 32, dtype=HALF), _draw(tokens, 5, 32, dtype=HALF), _draw(tokens, 5, seed=1)
    where = table_SB, contexts_S, max(lengths) + 3, cu, max(new)
    got = []
    for tile in (16, 32, 64):
        plan = index_scores.Plan(tile, 2, 4, 3)
        if narrow:
            inputs = *quantised.narrow_index(q), w, *quantised.narrow_index(pages)
            got.append(index_scores.narrow_index_scores(*inputs, *where, plan=plan))
        else:
            got.append(index_scores.paged_index_scores(q, w, pages, *where, plan=plan))
    assert (got[0] > -math.inf).any()
    for scores_TN in got[:2]:
        _close(scores_TN, got[2], 2**-11 if narrow and GPU else TIGHT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 128])
def test_narrow_rows_are_their_reference(size: int, dtype: torch.dtype, poison: None) -> None:
    """To the last bit but where the two sums of a turn fall on either side of a rounding: 1 in 200."""
    x = _draw(300 if GPU else 37, 3, size, dtype=dtype)
    x[0, 0] = 0
    with dispatch.using("reference"):
        wanted, wanted_by = quantised.narrow_index(x)
    with dispatch.using("triton"):
        got, by = quantised.narrow_index(x)
    assert torch.equal(by, wanted_by)
    assert (got.float() != wanted.float()).float().mean() <= 1 / 200
    assert ((got.float() - wanted.float()).abs() <= wanted.float().abs() * 2**-3 + 2**-9).all()


@pytest.mark.parametrize("new", [(1, 1, 1), (5, 1, 3)])
def test_narrow_scores_over_pages_are_their_reference(new: tuple[int, ...], poison: None) -> None:
    """Pages are scrambled, and what is past a context is NaN. What one side's kernels wrote, both score: a
    sum is right to a share of its products' sizes, 2^-11 of them in Hopper's FP8 tensor cores, which add in
    14 bits."""
    size, width, pages = 8, 16, 200
    tokens, cu = sum(new), torch.tensor([0, *new], device=DEVICE).cumsum(0).int()
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(1))
    table_SB = order[:150].view(3, 50).int().to(DEVICE)
    contexts_S = torch.tensor(LENGTHS, device=DEVICE).int()
    slots = [
        int(table_SB[s, n // size]) * size + n % size
        for s, length in enumerate(LENGTHS)
        for n in range(length)
    ]
    k, slots_T = _draw(sum(LENGTHS), width, dtype=HALF), torch.tensor(slots, device=DEVICE)
    q, w = _draw(tokens, 5, width, seed=1, dtype=HALF), _draw(tokens, 5, seed=2)
    values = torch.full((pages, size, width), 0x7F, dtype=torch.uint8, device=DEVICE)
    scales = torch.full((pages, size), math.nan, device=DEVICE)
    where = table_SB, contexts_S, max(LENGTHS) + 3, cu, max(new)
    with dispatch.using("triton"):
        quantised.write_index_keys(values.view(E4M3), scales, slots_T, k)
        q8, by = quantised.narrow_index(q)
        got_TN = quantised.narrow_index_scores(q8, by, w, values.view(E4M3), scales, *where)
        plain8, plain_by = quantised.narrow_index(k)
    written = values.flatten(0, 1)[slots_T].view(E4M3)
    assert torch.equal(written.float(), plain8.float())
    assert torch.equal(scales.flatten()[slots_T], plain_by)
    with dispatch.using("reference"):
        wanted_TN = quantised.narrow_index_scores(q8, by, w, values.view(E4M3), scales, *where)
        q8, values = (q8.view(torch.uint8) & 0x7F).view(E4M3), values & 0x7F
        size_TN = quantised.narrow_index_scores(q8, by, w.abs(), values.view(E4M3), scales, *where)
    assert torch.equal(got_TN == -math.inf, wanted_TN == -math.inf)
    kept_TN = wanted_TN != -math.inf
    assert kept_TN.any()
    off = (got_TN - wanted_TN)[kept_TN].abs()
    assert (off <= size_TN[kept_TN] * (2**-11 if GPU else 2**-19)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [None, 1, 3])
@pytest.mark.parametrize("heads", [3, 40])
def test_attention_over_named_rows_is_its_reference(
    heads: int, parts: int | None, dtype: torch.dtype, poison: None
) -> None:
    """Rows are parts of wider ones; what a token does not name is NaN."""
    tokens, rows, top_k, rank, rope = 3, 400, 70, 96, 16
    q_THL = _draw(tokens, heads, rank + rope, dtype=dtype)
    whole = _draw(rows, rank + rope + 8, seed=1, dtype=dtype)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(2))
    indices_TK = order[: tokens * top_k].view(tokens, top_k).to(DEVICE)
    indices_TK[0, 1:] = -1
    indices_TK[1, 50:] = -1
    whole[order[tokens * top_k :].to(DEVICE)] = math.nan
    rows_XL = whole[:, : rank + rope]
    with dispatch.using("reference"):
        wanted_THC = ops.sparse_latent_attention(q_THL, rows_XL, indices_TK, rank, 0.1)
    got_THC = sparse.sparse_latent_attention(q_THL, rows_XL, indices_TK, rank, 0.1, parts=parts)
    _close(got_THC, wanted_THC, TIGHT if dtype == torch.float32 else LOOSE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "rope"), [(96, 16), (160, 8), (20, 6)])
def test_attention_over_named_narrow_rows_is_its_reference(
    rank: int, rope: int, dtype: torch.dtype, poison: None
) -> None:
    """Rows of a cache in FP8. In float32 both sides widen the same bytes; in half the kernel rounds what it
    widens, which the reference does not: 2^-9 or 2^-12 of each term more, which LOOSE leaves."""
    tokens, rows, top_k = 3, 120, 30
    q_THL = _draw(tokens, 3, rank + rope, dtype=dtype)
    rows_XL = narrow_rows(_draw(rows, rank + rope, seed=1), rank)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(2))
    indices_TK = order[: tokens * top_k].view(tokens, top_k).to(DEVICE)
    indices_TK[0, 1:] = -1
    rows_XL[order[tokens * top_k :].to(DEVICE)] = 0x7F  # NaN in e4m3
    assert sparse.sparse_latent_attention_refusal(q_THL, rows_XL, indices_TK, rank, 0.1) is None
    with dispatch.using("reference"):
        wanted_THC = ops.sparse_latent_attention(q_THL, rows_XL, indices_TK, rank, 0.1)
        wide_XL = widen_rows(rows_XL, rank).to(q_THL.dtype)
        as_wide_THC = ops.sparse_latent_attention(q_THL, wide_XL, indices_TK, rank, 0.1)
    tolerance = TIGHT if dtype == torch.float32 else LOOSE
    _close(as_wide_THC, wanted_THC, tolerance)
    _close(sparse.sparse_latent_attention(q_THL, rows_XL, indices_TK, rank, 0.1), wanted_THC, tolerance)


@pytest.mark.parametrize("tokens", [1, 2, 33, 300] if GPU else [1, 2, 5])
def test_named_rows_are_pages_of_one(tokens: int, monkeypatch: pytest.MonkeyPatch, poison: None) -> None:
    """On Hopper V3.2's shape, in turns; rows are parts of wider ones, and what is not named is NaN."""
    heads, rank, rope, named, rows = (128, 512, 64, 700, 9000) if GPU else (4, 64, 16, 70, 400)
    dtype, plan = (HALF, TURNS) if GPU else (torch.float32, PORTABLE)
    q_THL, whole = (
        _draw(tokens, heads, rank + rope, dtype=dtype),
        _draw(rows, rank + rope + 128, seed=1, dtype=dtype),
    )
    order = torch.randperm(rows // 2, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    whole[rows // 2 :] = math.nan
    indices_TK = torch.stack([order.roll(13 * t)[:named] for t in range(tokens)])
    indices_TK[0, 1:] = -1
    indices_TK[-1, named // 3 :] = -1
    rows_XL = whole[:, : rank + rope]
    monkeypatch.setattr(sparse, "TOKENS", 128 if GPU else 2)
    with dispatch.using("reference"):
        wanted_THC = ops.sparse_latent_attention(q_THL, rows_XL, indices_TK, rank, 0.1)
    got_THC = sparse.attend_as_pages(q_THL, rows_XL, indices_TK, rank, 0.1, plan)
    _close(got_THC, wanted_THC, LOOSE if GPU else TIGHT)
    assert torch.isfinite(got_THC).all()


def test_in_batch_invariant_mode_a_token_does_not_see_its_batch() -> None:
    """Alone, a token's rows would be shared out among programs, and its sums be others."""
    q_THL, rows_XL = _draw(3, 4, 48, dtype=HALF), _draw(300, 48, seed=1, dtype=HALF)
    indices_TK = torch.arange(300, device=DEVICE).expand(3, -1)
    with dispatch.using("triton"), dispatch.batch_invariant():
        together = ops.sparse_latent_attention(q_THL, rows_XL, indices_TK, 32, 0.1)
        alone = [
            ops.sparse_latent_attention(q_THL[t : t + 1], rows_XL, indices_TK[:1], 32, 0.1) for t in range(3)
        ]
    assert torch.equal(together, torch.cat(alone))


def test_what_the_kernels_do_not_take_is_said() -> None:
    q, rows, none = torch.ones(2, 2, 48), torch.ones(4, 48, requires_grad=True), torch.zeros(2, 1).long()
    assert "no gradient" in str(sparse.sparse_latent_attention_refusal(q, rows, none, 32, 1.0))
    assert "learning" in str(
        index_scores.index_scores_refusal(q.requires_grad_(), torch.ones(2, 2), rows[:2], none[:, 0])
    )
