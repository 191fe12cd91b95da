"""Laws of quantised arithmetic, as the references keep them: how far off, for whom exact, and the gradients.

e4m3 has 4 significant bits: a rounded normal number is off by 2^-4 of itself at most, and by half of its
smallest step, 2^-10, below 2^-6. So with s = amax / 448 an element is off by |x| / 16 or s / 1024. INT4 is
off by half a step of amax / 7 (1 + 2^-8, for its scale is rounded to bfloat16).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shoal.ops import api, quantised
from shoal.ops.reference.quantised import _dequantise_rows

SHAPES = ((1, 1), (3, 128), (130, 129), (257, 344))  # 344: two blocks and 88


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _spread(x: Tensor, size: int) -> Tensor:
    """The scale of each column's block."""
    return x.repeat_interleave(128, -1)[..., :size]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_is_off_by_an_e4m3_rounding(shape: tuple[int, int]) -> None:
    x = _normal(*shape) * 10 ** (3 * _normal(shape[0], 1, seed=1))
    values, scales = quantised.quantise_rows(x)
    assert values.dtype == quantised.FP8 and values.shape == x.shape
    assert scales.shape == (shape[0], -(-shape[1] // 128))
    wide = _spread(scales, shape[1])
    error = (values.float() * wide - x).abs()
    assert (error <= (x.abs() / 16).maximum(wide / 1024) * (1 + 2**-20)).all()


@pytest.mark.parametrize("shape", [*SHAPES, (2, 130, 200)])
def test_blocks_are_off_by_an_e4m3_rounding(shape: tuple[int, ...]) -> None:
    x = _normal(*shape)
    weight = quantised.quantise_blocks(x)
    assert weight.scales.shape == (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    error = (quantised.dequantise(weight, shape[-1]) - x).abs()
    assert (error <= (x.abs() / 16).maximum(weight.scales.max() / 1024) * (1 + 2**-20)).all()


@pytest.mark.parametrize("shape", [*SHAPES, (2, 130, 200)])
def test_groups_are_off_by_half_a_step(shape: tuple[int, ...]) -> None:
    x = _normal(*shape)
    weight = quantised.quantise_groups(x)
    groups = -(-shape[-1] // 128)
    assert weight.values.shape == (*shape[:-1], 64 * groups)
    assert weight.scales.shape == (*shape[:-2], groups, shape[-2])
    step = _spread(weight.scales.transpose(-1, -2).float(), shape[-1])
    error = (quantised.dequantise(weight, shape[-1]) - x).abs()
    # A scale rounded down leaves the largest element beyond 7 steps, by 2^-8 of them.
    assert (error <= step * (0.5 + 2**-20)).all()


def test_what_fits_is_kept_exactly() -> None:
    """Integers to 7 beside one that sets the scale to 1, or to a power of two."""
    x = torch.randint(-7, 8, (4, 256), generator=torch.Generator().manual_seed(0)).float()
    x[:, ::128] = 7
    assert torch.equal(quantised.dequantise(quantised.quantise_groups(x), 256), x)
    x[:, ::128] = 448 / 2**5
    assert torch.equal(quantised.dequantise(quantised.quantise_blocks(x), 256), x)


def test_zeros_and_nothing_are_kept() -> None:
    for x in (torch.zeros(130, 200), torch.zeros(0, 200)):
        for quantise in (quantised.quantise_blocks, quantised.quantise_groups):
            assert torch.equal(quantised.dequantise(quantise(x), 200), x)
        values, scales = quantised.quantise_rows(x)
        assert not values.float().any() and (scales > 0).all()


def test_gradients_smaller_than_a_float16_are_kept() -> None:
    """The scale follows the block, so that no loss scaling is needed."""
    x = _normal(4, 256)
    assert torch.equal(quantised.quantise_rows(x)[0].float(), quantised.quantise_rows(x * 2**-40)[0].float())


@pytest.mark.parametrize("quantise", [quantised.quantise_blocks, quantised.quantise_groups])
def test_products_are_those_of_what_the_weights_stand_for(quantise) -> None:  # noqa: ANN001
    """float32 sums of 200 products on both sides: 2 sqrt(200) 2^-24, twice."""
    E, F, D = 4, 136, 200
    x_TD, weights_TK = _normal(9, D), _normal(9, 2, seed=1)
    experts_TK = torch.tensor([[0, 1], [1, 3], [-1, 0], [3, 1], [1, 0], [0, -1], [3, 0], [1, 3], [-1, -1]])
    gate_up, down = quantise(_normal(E, 2, F, D, seed=2) / D**0.5), quantise(_normal(E, D, F, seed=3))
    wide_gate_up, wide_down = quantised.dequantise(gate_up, D).flatten(1, 2), quantised.dequantise(down, F)
    wanted_TD = api.grouped_mlp(x_TD, experts_TK, weights_TK, wide_gate_up, wide_down)
    got_TD = quantised.quantised_mlp(x_TD, experts_TK, weights_TK, gate_up, down)
    assert (got_TD - wanted_TD).norm() <= 4 * D**0.5 * 2**-24 * wanted_TD.norm()
    one = quantise(_normal(F, D, seed=2))
    got_TF = quantised.quantised_linears(x_TD, [one])[0]
    wanted_TF = x_TD @ quantised.dequantise(one, D).T
    assert (got_TF - wanted_TF).norm() <= 4 * D**0.5 * 2**-24 * wanted_TF.norm()


def test_training_product_and_its_gradients() -> None:
    """y and dx are of quantised numbers, dW of plain ones; each exactly, up to float32 sums."""
    x, weight, dy = _normal(5, 200), _normal(130, 200, seed=1), _normal(5, 130, seed=2)
    x.requires_grad_()
    weight.requires_grad_()
    y = quantised.fp8_linears(x, (weight,))[0]
    y.backward(dy)
    blocks = quantised.dequantise(quantised.quantise_blocks(weight.detach()), weight.shape[-1])
    wanted = (
        _dequantise_rows(x.detach()) @ blocks.T,
        _dequantise_rows(dy) @ blocks,
        dy.T @ x.detach(),
    )
    for got, exact in zip((y.detach(), x.grad, weight.grad), wanted, strict=True):
        assert got is not None
        assert (got - exact).norm() <= 1e-6 * exact.norm()


def test_training_experts_are_near_exact_ones() -> None:
    """A rounding to e4m3 is uniform within 2^-4 of a number between powers of two: 2.6% root mean square.

    Three operands meet it on the way to y (x and W, then h and W: 4 roundings, 5.2%), at most six on the way
    to a gradient (6.4%). Twice that is the limit; with a wrong scale the error is of order 1.
    """
    E, F, D, T = 4, 136, 200, 40
    inputs = (
        _normal(T, D),
        _normal(T, 2, seed=1).abs(),
        _normal(E, 2 * F, D) / D**0.5,
        _normal(E, D, F) / F**0.5,
    )
    experts_TK = torch.rand(T, E, generator=torch.Generator().manual_seed(3)).topk(2).indices
    results = []
    for layer in (quantised.fp8_grouped_mlp, api.grouped_mlp):
        x, w, gate_up, down = (t.clone().requires_grad_() for t in inputs)
        y = layer(x, experts_TK, w, gate_up, down)
        y.backward(_normal(T, D, seed=4))
        results.append([y.detach(), x.grad, w.grad, gate_up.grad, down.grad])
    for got, exact in zip(*results, strict=True):
        assert 1e-3 < (got - exact).norm() / exact.norm() < 0.13


def test_a_weight_of_other_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="x has 130 columns, and the quantised weight 128"):
        quantised.quantised_linears(_normal(2, 130), [quantised.quantise_blocks(_normal(4, 128))])
