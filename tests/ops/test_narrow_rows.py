"""Laws of a cache in FP8: what a row stands for is near what was written, and every op has it so.

e4m3 has three bits behind the leading one, so a number is off by 2^-4 of itself at most, or by 2^-10 of the
448 that its group's largest became where it is subnormal; the scale is float32. bfloat16 is off by 2^-9.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shoal.config.cost import fp8_cache_shape
from shoal.config.families import family, tiny
from shoal.ops import api as ops
from shoal.ops import dispatch
from shoal.ops.reference.narrow_rows import narrow_rows, widen_rows

SHAPES = [(512, 64), (128, 0), (32, 8), (20, 6), (300, 2)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Rows some of which are a thousand times the others, as keys are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    return x * 10 ** torch.randint(-2, 2, (*shape[:-1], 1), generator=generator)


@pytest.mark.parametrize(("numbers", "rest"), SHAPES)
def test_a_row_is_near_what_was_written(numbers: int, rest: int) -> None:
    rows = draw(7, 3, numbers + rest)
    kept = narrow_rows(rows, numbers)
    assert kept.shape == (7, 3, numbers + 4 * -(-numbers // 128) + 2 * rest)
    wide = widen_rows(kept, numbers)
    for group in range(0, numbers, 128):
        part = slice(group, min(group + 128, numbers))
        top = rows[..., part].abs().amax(-1, keepdim=True)
        bound = 2.0**-4 * rows[..., part].abs() + top * (2.0**-10 / 448 + 2.0**-20)
        assert ((wide[..., part] - rows[..., part]).abs() <= bound).all()
        assert torch.allclose(wide[..., part].abs().amax(-1, keepdim=True), top)  # the largest is kept
    assert torch.equal(wide[..., numbers:], rows[..., numbers:].bfloat16().float())


def test_rows_in_fp8_are_fixed_points_and_zeros_stay_zeros() -> None:
    rows = widen_rows(narrow_rows(draw(5, 72), 64), 64)
    assert torch.equal(widen_rows(narrow_rows(rows, 64), 64), rows)
    assert not widen_rows(narrow_rows(torch.zeros(2, 72), 64), 64).any()


def test_the_published_bytes() -> None:
    """656 bytes for V3's 1,152, as FlashMLA has them; Llama's keys and values of 128 take 3% for scales."""
    assert fp8_cache_shape(family("deepseek-v3").config) == (656,)
    assert fp8_cache_shape(family("llama-3-8b").config) == (2, 8, 132)


def test_sparse_attention_is_refused_where_its_keys_lie_in_the_rows() -> None:
    with pytest.raises(ValueError, match="sparse attention reads it as it is; leave cache_dtype"):
        fp8_cache_shape(tiny("nsa-27b"))
    with pytest.raises(ValueError, match=r"wide keys .* lie in its rows; ask for index_keys"):
        fp8_cache_shape(tiny("deepseek-v3.2"))
    assert fp8_cache_shape(family("deepseek-v3.2").config, "fp8") == (656,)


def _angles(tokens: int, pairs: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(tokens).unsqueeze(1) * torch.linspace(0.1, 1, pairs)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("invariant", [False, True])
def test_latents_are_written_returned_and_read_alike(invariant: bool) -> None:
    """What is returned is what is read, and attention over narrow pages is that over wide ones of the same
    numbers, bit for bit."""
    tokens, heads, rank, rope = 11, 3, 140, 8
    q_THR, kv_TL = draw(tokens, heads, rope), draw(tokens, rank + rope, seed=1)
    pages = torch.full((5, 4, rank + 8 + 2 * rope), 255, dtype=torch.uint8)  # NaN where nothing is written
    table_SB = torch.tensor([[3, 1, 2]], dtype=torch.int32)
    slots_T = (table_SB[0, torch.arange(tokens) // 4] * 4 + torch.arange(tokens) % 4).long()
    with dispatch.batch_invariant(invariant):
        _, rows_TL = ops.write_latent_cache(
            *(q_THR, kv_TL, torch.ones(rank), 1e-6, *_angles(tokens, rope // 2), pages, slots_T),
            interleaved=True,
        )
        assert torch.equal(ops.read_cache(pages, table_SB[0], 0, tokens, rank, torch.float32), rows_TL)
        wide = torch.full((5, 4, rank + rope), torch.nan)
        ops.write_cache(wide, slots_T, rows_TL)
        where = table_SB, torch.tensor([tokens], dtype=torch.int32), tokens
        for new in (1, 4):
            cu_S1 = torch.tensor([0, new], dtype=torch.int32)
            q_nHL = draw(new, heads, rank + rope, seed=2)
            call = (*where, cu_S1, new, rank, 0.1)
            assert torch.equal(
                ops.latent_attention(q_nHL, pages, *call), ops.latent_attention(q_nHL, wide, *call)
            )


@pytest.mark.parametrize("invariant", [False, True])
def test_keys_and_values_are_written_returned_and_read_alike(invariant: bool) -> None:
    tokens, heads, groups, dim = 9, 4, 2, 12
    q_THQ, k_TGQ, v_TGQ = (draw(tokens, each, dim, seed=each) for each in (heads, groups, groups))
    pages = torch.full((5, 4, 2, groups, dim + 4), 255, dtype=torch.uint8)
    table_SB = torch.tensor([[3, 1, 2]], dtype=torch.int32)
    slots_T = (table_SB[0, torch.arange(tokens) // 4] * 4 + torch.arange(tokens) % 4).long()
    with dispatch.batch_invariant(invariant):
        q_THQ, k_TGQ, v_TGQ = ops.write_kv_cache(
            q_THQ, k_TGQ, v_TGQ, *_angles(tokens, dim // 2), pages, slots_T, interleaved=False
        )
        rows = ops.read_cache(pages, table_SB[0], 0, tokens, dim, torch.float32)
        assert torch.equal(rows, torch.stack((k_TGQ, v_TGQ), 1))
        wide = torch.full((5, 4, 2, groups, dim), torch.nan)
        ops.write_cache(wide, slots_T, rows)
        call = table_SB, torch.tensor([tokens], dtype=torch.int32), tokens
        for new in (1, 4):
            cu_S1 = torch.tensor([0, new], dtype=torch.int32)
            rest = (*call, cu_S1, new, 0.3)
            got = ops.paged_attention(q_THQ[:new], pages, *rest)
            assert torch.equal(got, ops.paged_attention(q_THQ[:new], wide, *rest))
