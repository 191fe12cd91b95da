"""Laws of the small kernels (norms, SwiGLU, RoPE, cache writes): equal to the references, values and
gradients.

The reference runs in float64. With u the unit roundoff of the dtype (2^-8 in bfloat16), a result passes at
most three roundings (the sum of a residual, the normal before its weight or silu before up, the result), each
at most u of its size, and each moves what follows by as much: 4 u of an element's size, where a sum of
terms (dx of a norm) counts the largest. Sums of n float32 terms add sqrt(n) 2^-23, and the approximate
exponential and square root some 2^-21.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.ops.reference import attention as reference_attention
from shoal.ops.reference import cache as reference_cache
from shoal.ops.reference import layers as reference
from shoal.ops.triton import cache, expanded, linears, norms, rotary, swiglu
from tests.ops.parts import DEVICE, GPU, HALF, on_gpu, runs_triton, scalars_in_arrays

DTYPES = (HALF, torch.float32)
ROWS = (0, 1, 63, 257) if GPU else (0, 1, 7)
EPS = 1e-5
pytestmark = [
    runs_triton,
    pytest.mark.usefixtures("poison"),
    scalars_in_arrays,
]


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def _assert_close(got: Tensor, wanted: Tensor, dtype: torch.dtype, terms: int = 1) -> None:
    """Relative to the row's largest element: what a rounding of any of its terms can move."""
    assert got.shape == wanted.shape
    if not wanted.numel():
        return
    limit = 4 * torch.finfo(dtype).eps / 2 + terms**0.5 * 2.0**-23 + 2.0**-20
    scale = wanted.abs().amax(-1, keepdim=True).clamp(min=1.0)
    error = ((got.double() - wanted).abs() / scale).max()
    assert error <= limit, f"error {error:.2e}, limit {limit:.2e}"


def _gradients(
    op: Callable[..., Any], inputs: Sequence[Tensor], *rest: Any, which: Sequence[int] = (0,)
) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and the gradients of the inputs for one random gradient of the results named by `which`."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = op(*leaves, *rest)
    outs = list(out) if isinstance(out, tuple) else [out]
    given = [_random(*x.shape, seed=7 + i).to(HALF).to(x.dtype) for i, x in enumerate(outs)]
    torch.autograd.backward([outs[i] for i in which], [given[i] for i in which])
    return [x.detach() for x in outs], [leaf.grad for leaf in leaves if leaf.grad is not None]


def _assert_equals_reference(
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    inputs: Sequence[Tensor],
    *rest: Any,
    which: Sequence[int] = (0,),
) -> None:
    dtype = inputs[0].dtype
    got = _gradients(ours, inputs, *rest, which=which)
    wanted = _gradients(theirs, [x.double() for x in inputs], *rest, which=which)
    for mine, other in zip(got, wanted, strict=True):
        assert len(mine) == len(other)
        for x, y in zip(mine, other, strict=True):
            assert x.dtype == dtype
            _assert_close(x, y, dtype, terms=max(inputs[0].shape[0], inputs[0].shape[-1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [5, 63, 512, 1408, 7168] if GPU else [5, 40])
@pytest.mark.parametrize("rows", ROWS)
def test_rms_norm(rows: int, dim: int, dtype: torch.dtype) -> None:
    inputs = (_random(rows, dim, dtype=dtype), _random(dim, seed=1, dtype=dtype))
    _assert_equals_reference(norms.rms_norm, reference.rms_norm, inputs, EPS)


@pytest.mark.parametrize("which", [(0, 1), (0,), (1,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [63, 2048] if GPU else [40])
@pytest.mark.parametrize("rows", ROWS)
def test_add_rms_norm(rows: int, dim: int, dtype: torch.dtype, which: Sequence[int]) -> None:
    """Gradients through the sum, through the norm, and through both."""
    inputs = (
        _random(rows, dim, dtype=dtype),
        _random(rows, dim, seed=1, dtype=dtype),
        _random(dim, seed=2, dtype=dtype),
    )
    _assert_equals_reference(norms.add_rms_norm, reference.add_rms_norm, inputs, EPS, which=which)


def test_the_residual_is_rounded_before_it_is_normalised() -> None:
    """As in two ops: the sum that is kept is the sum that is normalised, and the cast comes before the
    weight.
    """
    x, y, weight_D = (_random(33, 40, seed=seed, dtype=HALF) for seed in range(3))
    weight_D = weight_D[0]
    total, normal = norms.add_rms_norm(x, y, weight_D, EPS)
    assert torch.equal(total, x + y)
    assert torch.equal(normal, norms.rms_norm(x + y, weight_D, EPS))
    # Almost every element is the reference's bit for bit; a few lie on the edge of a rounding.
    assert (normal != reference.rms_norm(x + y, weight_D, EPS)).float().mean() < 0.01


def test_a_slice_of_a_wider_row_is_normalised_where_it_is() -> None:
    wide = _random(9, 3, 64, dtype=torch.float32)
    weight_D = _random(40, seed=1)
    assert torch.equal(
        norms.rms_norm(wide[:, 0, :40], weight_D, EPS),
        norms.rms_norm(wide[:, 0, :40].contiguous(), weight_D, EPS),
    )
    assert torch.equal(
        norms.rms_norm(wide[..., 8:48], weight_D, EPS),
        norms.rms_norm(wide[..., 8:48].contiguous(), weight_D, EPS),
    )


@pytest.mark.parametrize("dim", [512, 2048, 7168] if GPU else [40])
def test_a_row_depends_on_itself_alone(dim: int) -> None:
    x, y = _random(130, dim, dtype=HALF), _random(130, dim, seed=1, dtype=HALF)
    weight_D = _random(dim, seed=2, dtype=HALF)
    whole = (norms.rms_norm(x, weight_D, EPS), *norms.add_rms_norm(x, y, weight_D, EPS), swiglu.swiglu(x, y))
    for row in (0, 77, 129):
        one = slice(row, row + 1)
        alone = (
            norms.rms_norm(x[one], weight_D, EPS),
            *norms.add_rms_norm(x[one], y[one], weight_D, EPS),
            swiglu.swiglu(x[one], y[one]),
        )
        for ours, theirs in zip(alone, whole, strict=True):
            assert torch.equal(ours, theirs[one])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 1408, 10944] if GPU else [1, 70])
@pytest.mark.parametrize("rows", ROWS)
def test_swiglu(rows: int, dim: int, dtype: torch.dtype) -> None:
    inputs = (2 * _random(rows, dim, dtype=dtype), _random(rows, dim, seed=1, dtype=dtype))
    _assert_equals_reference(swiglu.swiglu, reference.swiglu, inputs)


def test_swiglu_takes_the_halves_of_one_product() -> None:
    gate, up = _random(5, 140, dtype=HALF).chunk(2, dim=-1)
    assert torch.equal(swiglu.swiglu(gate, up), swiglu.swiglu(gate.contiguous(), up.contiguous()))


def _angles(tokens: int, pairs: int) -> tuple[Tensor, Tensor]:
    angles_TR2 = 10 * _random(tokens, pairs, seed=2)
    return angles_TR2.cos(), angles_TR2.sin()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 3, 20])
@pytest.mark.parametrize("rows", ROWS)
def test_keys_and_values(rows: int, heads: int, dtype: torch.dtype) -> None:
    kv_THX = _random(rows, heads, 50, dtype=dtype)[..., 3:]
    shared_TR = _random(rows, 23, dtype=dtype, seed=1)[:, 7:17]
    _assert_equals_reference(
        lambda kv, shared: expanded.keys_and_values(kv, shared, 24),
        lambda kv, shared: reference_cache.keys_and_values(kv, shared, 24),
        (kv_THX, shared_TR),
        which=(0, 1),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_linears_of_the_same_rows_have_one_gradient(rows: int, dtype: torch.dtype) -> None:
    x_TD, weights = _random(rows, 40, dtype=dtype), [_random(n, 40, dtype=dtype, seed=n) for n in (24, 8)]
    _assert_equals_reference(
        lambda x, *weights: linears.linears(x, weights, (None, None)),
        lambda x, *weights: reference.linears(x, weights, (None, None)),
        (x_TD, *weights),
        which=(0, 1),
    )


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "dim"), [(1, 2), (3, 6), (17, 64), (128, 64), (32, 128)][: 5 if GPU else 2]
)
@pytest.mark.parametrize("rows", ROWS)
def test_rope(rows: int, heads: int, dim: int, dtype: torch.dtype, interleaved: bool) -> None:
    wide_THX, angles = _random(rows, heads, dim + 3, dtype=dtype), _angles(rows, dim // 2)
    part_THR = wide_THX[..., 3:]  # behind other dims, as the rotated part of a query is
    for x in (part_THR, wide_THX[..., 1:]):  # alone, and with two that are left as they are
        _assert_equals_reference(
            lambda x: rotary.rope(x, *angles, interleaved),
            lambda x: reference.rope(x, *angles, interleaved),
            (x,),
        )
    assert torch.equal(
        rotary.rope(part_THR, *angles, interleaved), rotary.rope(part_THR.contiguous(), *angles, interleaved)
    )


def _slots(rows: int, pages: int, size: int) -> Tensor:
    order = torch.randperm(pages * size, generator=torch.Generator().manual_seed(3))
    return order[:rows].to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("heads", "rank", "dim"), [(16, 512, 64), (128, 256, 64)] if GPU else [(3, 20, 6)])
@pytest.mark.parametrize("rows", ROWS)
def test_write_latent_cache(
    rows: int, heads: int, rank: int, dim: int, interleaved: bool, dtype: torch.dtype
) -> None:
    """Against the three ops apart, on the same side: the same bits, in the pages and beside them. A row is
    the first part of a wider one, whose rest is left alone."""
    q_THR = _random(rows, heads, dim + 8, dtype=dtype)[..., 8:]
    kv_TL, weight_C = _random(rows, rank + dim, seed=1, dtype=dtype), _random(rank, seed=2, dtype=dtype)
    angles, slots_T = _angles(rows, dim // 2), _slots(rows, 20, 16)
    as_given_THR = q_THR.clone()
    whole = torch.full((20, 16, rank + dim + 24), 7.0, dtype=dtype, device=DEVICE)
    pages, untouched = whole[..., : rank + dim], whole.clone()
    wanted = untouched[..., : rank + dim]
    turned_THR, rows_TL = cache.write_latent_cache(
        q_THR, kv_TL, weight_C, EPS, *angles, pages, slots_T, interleaved
    )
    key_T1R = rotary.rope(kv_TL[:, None, rank:], *angles, interleaved)
    latent_TC = reference.rms_norm(kv_TL[:, :rank].double(), weight_C.double(), EPS)
    assert torch.equal(turned_THR, rotary.rope(as_given_THR, *angles, interleaved))
    assert turned_THR.data_ptr() == q_THR.data_ptr()  # where they lay
    assert torch.equal(rows_TL[:, rank:], key_T1R.squeeze(1))
    _assert_close(rows_TL[:, :rank], latent_TC, dtype, terms=rank)
    reference_attention.write_cache(wanted, slots_T, rows_TL)
    assert torch.equal(whole, untouched)
    theirs = reference_cache.write_latent_cache(
        as_given_THR.double(),
        kv_TL.double(),
        weight_C.double(),
        EPS,
        *angles,
        pages.double(),
        slots_T,
        interleaved,
    )
    _assert_close(turned_THR, theirs[0], dtype)
    _assert_close(rows_TL, theirs[1], dtype, terms=rank)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("heads", "groups", "dim"), [(32, 4, 128), (24, 24, 64)] if GPU else [(6, 2, 10)])
@pytest.mark.parametrize("rows", ROWS)
def test_write_kv_cache(
    rows: int, heads: int, groups: int, dim: int, interleaved: bool, dtype: torch.dtype
) -> None:
    q_THQ = _random(rows, heads, dim, dtype=dtype)
    k_TGQ, v_TGQ = _random(rows, 2, groups, dim, seed=1, dtype=dtype).unbind(1)
    angles, slots_T = _angles(rows, dim // 2), _slots(rows, 20, 16)
    pages = torch.full((20, 16, 2, groups, dim), 7.0, dtype=dtype, device=DEVICE)
    wanted = pages.clone()
    turned = cache.write_kv_cache(q_THQ, k_TGQ, v_TGQ, *angles, pages, slots_T, interleaved)
    assert turned[2] is v_TGQ
    for ours, x in zip(turned[:2], (q_THQ, k_TGQ), strict=True):
        assert torch.equal(ours, rotary.rope(x, *angles, interleaved))
        _assert_close(ours, reference.rope(x.double(), *angles, interleaved), dtype)
    reference_attention.write_cache(wanted, slots_T, torch.stack((turned[1], v_TGQ), dim=1))
    assert torch.equal(pages, wanted)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32], ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_write_cache(rows: int, dtype: torch.dtype) -> None:
    """Any dtype, rows that lie apart, and no slot but those named is touched."""
    rows_TX = (100 * _random(rows, 3, 29)).to(dtype)[:, 1:]
    slots_T = _slots(rows, 20, 16)
    pages = torch.full((20, 16, 2, 29), 7, dtype=dtype, device=DEVICE)
    wanted = pages.clone()
    cache.write_cache(pages, slots_T, rows_TX)
    reference_attention.write_cache(wanted, slots_T, rows_TX)
    assert torch.equal(pages, wanted)


def test_refusals_name_the_value() -> None:
    x, weight_D = _random(3, 8), _random(8)
    assert norms.rms_norm_refusal(x, weight_D, EPS) is None
    assert "float64" in str(norms.rms_norm_refusal(x.double(), weight_D.double(), EPS))
    assert "bfloat16" in str(norms.rms_norm_refusal(x, weight_D.bfloat16(), EPS))
    assert "20000" in str(norms.rms_norm_refusal(x[:, :1].expand(3, 20000), weight_D, EPS))
    assert "(2, 8)" in str(norms.add_rms_norm_refusal(x, x[:2], weight_D, EPS))
    assert "(2, 8)" in str(swiglu.swiglu_refusal(x, x[:2]))
    assert "2 dimensions" in str(rotary.rope_refusal(x, x, x, True))
    pages = torch.zeros(4, 2, 8, device=DEVICE)
    assert cache.write_cache_refusal(pages, torch.arange(3), x) is None
    assert "(7,)" in str(cache.write_cache_refusal(pages, torch.arange(3), x[:, :7]))
    assert "one stride" in str(cache.write_cache_refusal(pages.transpose(0, 1), torch.arange(3), x))
    assert "bfloat16" in str(cache.write_cache_refusal(pages.bfloat16(), torch.arange(3), x))


@pytest.mark.gpu
@on_gpu
def test_past_two_billion_elements() -> None:
    x = torch.randn(300_000, 7168, device=DEVICE, dtype=HALF)
    weight_D = _random(7168, dtype=HALF)
    last = slice(-3, None)
    assert torch.equal(norms.rms_norm(x, weight_D, EPS)[last], norms.rms_norm(x[last], weight_D, EPS))
    assert torch.equal(swiglu.swiglu(x, x)[last], swiglu.swiglu(x[last], x[last]))
