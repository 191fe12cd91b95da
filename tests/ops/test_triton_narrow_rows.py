"""Laws of the kernels over a cache in FP8: the bytes are the reference's, and attention is that over wide
pages of the numbers that they stand for.

Of the rotated key the interpreter truncates to bfloat16 where a GPU rounds: there it is off by 2^-7.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shoal.ops.reference.narrow_rows import narrow_rows, widen_rows
from shoal.ops.triton import cache, cache_attention, latent
from shoal.ops.triton import narrow_rows as kernels
from shoal.ops.triton.cache_plan import Plan
from tests.ops.parts import DEVICE, GPU, HALF, runs_triton, scalars_in_arrays
from tests.ops.test_triton_cache_attention import STEPS, Call, Step, _assert_close, _call, _wanted

pytestmark = [runs_triton, pytest.mark.usefixtures("poison"), scalars_in_arrays]
LATENTS = ((512, 64), (256, 64)) if GPU else ((160, 8), (20, 6))
WORDS = [(3, 64, 8), (3, 256, 8), (20, 512, 64)] if GPU else [(3, 256, 8)]
BY_WORDS = Plan(16, 32, 4, 3)
TOKENS = (1, 63) if GPU else (1, 5)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def angles(tokens: int, pairs: int) -> tuple[Tensor, Tensor]:
    angle = draw(tokens, pairs, dtype=torch.float32, seed=9)
    return angle.cos(), angle.sin()


def slots(tokens: int) -> Tensor:
    return torch.randperm(5 * 16, generator=torch.Generator().manual_seed(3))[:tokens].to(DEVICE)


def assert_rows(pages: Tensor, slots_T: Tensor, wide_TL: Tensor, numbers: int) -> Tensor:
    """The bytes at the slots are those of these rows, and no other slot is touched; what they stand for."""
    flat = pages.flatten(0, 1)
    kept, wanted = flat[slots_T], narrow_rows(wide_TL, numbers)
    head = numbers + 4 * -(-numbers // 128)
    assert torch.equal(kept[..., :head], wanted[..., :head])
    ours, theirs = widen_rows(kept, numbers), widen_rows(wanted, numbers)
    assert torch.allclose(ours, theirs, rtol=0 if GPU else 2.0**-7, atol=0)
    untouched = torch.ones(len(flat), dtype=torch.bool, device=DEVICE)
    untouched[slots_T] = False
    assert (flat[untouched] == 7).all()
    return ours


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("rank", "rope"), LATENTS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_latent_rows(tokens: int, rank: int, rope: int, interleaved: bool, dtype: torch.dtype) -> None:
    """Of both kernels that write them, and as they are returned: the wide kernel's rows, narrowed."""
    q_THR, kv_TL = draw(tokens, 3, rope, dtype=dtype), draw(tokens, rank + rope, dtype=dtype, seed=1)
    norm_C, slots_T = draw(rank, dtype=dtype, seed=2), slots(tokens)
    pages = torch.full((5, 16, rank + 4 * -(-rank // 128) + 2 * rope), 7, dtype=torch.uint8, device=DEVICE)
    wide = torch.zeros(5, 16, rank + rope, dtype=dtype, device=DEVICE)
    head = (q_THR, kv_TL, norm_C, 1e-6, *angles(tokens, rope // 2))
    assert cache.write_latent_cache_refusal(*head, pages, slots_T, interleaved) is None
    q_wide, rows_TL = cache.write_latent_cache(q_THR.clone(), *head[1:], wide, slots_T, interleaved)
    q_narrow, kept_TL = cache.write_latent_cache(q_THR.clone(), *head[1:], pages, slots_T, interleaved)
    assert torch.equal(q_wide, q_narrow)
    stands_for = assert_rows(pages, slots_T, rows_TL, rank)
    assert torch.equal(kept_TL, stands_for.to(dtype))
    # And as a decoding step writes them.
    absorbed = (draw(tokens, 3, 16 + rope, dtype=dtype), *head[1:], draw(3 * 32, rank, dtype=dtype, seed=4))
    again = torch.full_like(pages, 7)
    assert latent.latent_queries_refusal(*absorbed, again, slots_T, interleaved) is None
    got = latent.latent_queries(*absorbed, again, slots_T, interleaved)
    assert torch.equal(again, pages)
    assert torch.equal(got, latent.latent_queries(*absorbed, wide, slots_T, interleaved))


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("heads", "groups", "dim"), [(32, 4, 128), (24, 24, 64)] if GPU else [(6, 2, 12)])
@pytest.mark.parametrize("tokens", TOKENS)
def test_keys_and_values(
    tokens: int, heads: int, groups: int, dim: int, interleaved: bool, dtype: torch.dtype
) -> None:
    q_THQ = draw(tokens, heads, dim, dtype=dtype)
    k_TGQ, v_TGQ = draw(tokens, 2, groups, dim, dtype=dtype, seed=1).unbind(1)
    slots_T, where = slots(tokens), angles(tokens, dim // 2)
    pages = torch.full((5, 16, 2, groups, dim + 4), 7, dtype=torch.uint8, device=DEVICE)
    wide = torch.zeros(5, 16, 2, groups, dim, dtype=dtype, device=DEVICE)
    head = (q_THQ, k_TGQ, v_TGQ, *where)
    assert cache.write_kv_cache_refusal(*head, pages, slots_T, interleaved) is None
    turned_THQ, turned_TGQ, _ = cache.write_kv_cache(*head, wide, slots_T, interleaved)
    ours_THQ, kept_k, kept_v = cache.write_kv_cache(*head, pages, slots_T, interleaved)
    assert torch.equal(turned_THQ, ours_THQ)
    stands_for = assert_rows(pages, slots_T, torch.stack((turned_TGQ, v_TGQ), 1), dim)
    assert torch.equal(torch.stack((kept_k, kept_v), 1), stands_for.to(dtype))


def narrow(call: Call, numbers: int) -> tuple[Call, Call]:
    """The same call over pages in FP8, and over wide ones of the numbers that they stand for."""
    written = call.pages.isfinite().all(-1)
    kept = narrow_rows(call.pages.float(), numbers)
    kept[~written] = 255  # NaN, scale and all
    wide = widen_rows(kept, numbers).to(call.q.dtype)
    return call._replace(pages=kept), call._replace(pages=wide)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(
    ("dims", "dtype"),
    [((16, 512, 64), HALF), ((128, 512, 64), HALF), ((16, 512, 64), torch.float32)]
    if GPU
    else [((3, 160, 8), HALF), ((2, 20, 6), torch.float32)],
    ids=str,
)
def test_latent_attention(name: str, dims: tuple[int, int, int], dtype: torch.dtype) -> None:
    step, (heads, rank, rope) = STEPS[name], dims
    ours, wide = narrow(_call(step, heads, (rank + rope,), 16 if GPU else 4, dtype), rank)
    scale = (rank + rope) ** -0.5
    assert cache_attention.latent_attention_refusal(*ours, rank, scale) is None
    wanted = _wanted(wide, step, scale, rank)
    for invariant in (False, True):
        got = cache_attention.latent_attention(*ours, rank, scale, invariant=invariant)
        _assert_close(got, wanted, dtype)
        same = cache_attention.latent_attention(*wide, rank, scale, invariant=invariant)
        assert GPU or torch.equal(got, same)  # by the same tiles, which a GPU has others of


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("shape", ((16, 4, 128), (8, 8, 64), (12, 4, 80)) if GPU else ((4, 2, 12),), ids=str)
def test_paged_attention(name: str, shape: tuple[int, int, int]) -> None:
    step, (heads, groups, dim) = STEPS[name], shape
    ours, wide = narrow(_call(step, heads, (2, groups, dim), 16 if GPU else 4, HALF), dim)
    assert cache_attention.paged_attention_refusal(*ours, dim**-0.5) is None
    wanted = _wanted(wide, step, dim**-0.5)
    for invariant in (False, True):
        _assert_close(cache_attention.paged_attention(*ours, dim**-0.5, invariant=invariant), wanted, HALF)


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize(("heads", "rank", "rope"), WORDS)
def test_latents_read_by_words(heads: int, rank: int, rope: int, dtype: torch.dtype) -> None:
    """A power of two from 64 on: four columns a word, two groups with a scale each."""
    step = STEPS["a chunk beside decodes"]
    ours, wide = narrow(_call(step, heads, (rank + rope,), 4, dtype), rank)
    wanted = _wanted(wide, step, 0.1, rank)
    for invariant in (False, True):
        got = cache_attention.latent_attention(*ours, rank, 0.1, invariant=invariant, plan=BY_WORDS)
        _assert_close(got, wanted, dtype)


def test_keys_and_values_read_by_words() -> None:
    step = STEPS["a chunk beside decodes"]
    ours, wide = narrow(_call(step, 4, (2, 2, 64), 4, HALF), 64)
    got = cache_attention.paged_attention(*ours, 0.2, plan=BY_WORDS)
    _assert_close(got, _wanted(wide, step, 0.2), HALF)


@pytest.mark.parametrize(("rank", "rope"), LATENTS)
@pytest.mark.parametrize(("first", "last"), [(0, 0), (0, 50), (3, 47)])
def test_read_cache(rank: int, rope: int, first: int, last: int) -> None:
    ours, wide = narrow(_call(Step([1], [50]), 2, (rank + rope,), 16, torch.float32), rank)
    where = ours.table_SB[0], first, last, rank, torch.float32
    assert kernels.read_cache_refusal(ours.pages, *where) is None
    got = kernels.read_cache(ours.pages, *where)
    positions = torch.arange(first, last, device=DEVICE)
    assert torch.equal(got, wide.pages[ours.table_SB[0, positions // 16].long(), positions % 16])


def test_refusals_name_the_value() -> None:
    q_THQ, k_TGQ = draw(1, 2, 256, dtype=HALF), draw(1, 2, 256, dtype=HALF)
    pages = torch.zeros(1, 4, 2, 2, 264, dtype=torch.uint8, device=DEVICE)
    told = cache.write_kv_cache_refusal(q_THQ, k_TGQ, k_TGQ, *angles(1, 128), pages, slots(1), True)
    assert "heads of 256 in FP8" in str(told)
    assert "float32" in str(kernels.read_cache_refusal(torch.zeros(1, 4, 8), q_THQ, 0, 1, 8, HALF))
