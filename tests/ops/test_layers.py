"""Laws of RMSNorm, SwiGLU and RoPE: the references equal their formulas, written out element by element.

In float64 both sides round every operation to 2^-53, and a sum of n terms to n times that: with n below
300 they agree within 1e-13 of the scale. `gradcheck` holds the gradients against finite differences in
float64.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from shoal.ops import api as ops

EXACT = 1e-13
BF16_UNIT = 2.0**-8  # half the distance of neighbours, relative: the error of one rounding is at most this


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _assert_close(got: Tensor, wanted: Tensor, limit: float = EXACT) -> None:
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    if wanted.numel():
        assert (got - wanted).abs().max() <= limit * wanted.abs().max()


# --------------------------------------------------------------------------------------------------
# RMSNorm


@pytest.mark.parametrize("shape", [(1, 1), (63, 7), (257, 5), (3, 5, 16), (0, 8)])
def test_rms_norm_is_its_formula(shape: tuple[int, ...]) -> None:
    x, weight_D, eps = _random(*shape), _random(shape[-1], seed=1), 1e-5
    wanted = torch.empty_like(x)
    for row, out in zip(x.view(-1, shape[-1]), wanted.view(-1, shape[-1]), strict=True):
        size = math.sqrt(sum(v * v for v in row.tolist()) / shape[-1] + eps)
        for dim in range(shape[-1]):
            out[dim] = row[dim] / size * weight_D[dim]
    _assert_close(ops.rms_norm(x, weight_D, eps), wanted)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_rms_norm_gradients(rows: int) -> None:
    inputs = (_random(rows, 6).requires_grad_(), _random(6, seed=1).requires_grad_())
    assert gradcheck(lambda x, weight: ops.rms_norm(x, weight, 1e-3), inputs)


def test_rms_norm_casts_before_the_weight() -> None:
    x, weight_D = _random(63, 40).bfloat16(), _random(40, seed=1).bfloat16()
    normal = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    cast_first = (normal.bfloat16().double() * weight_D.double()).bfloat16()
    cast_last = (normal * weight_D.double()).bfloat16()
    assert torch.equal(ops.rms_norm(x, weight_D, 1e-6), cast_first)
    assert not torch.equal(cast_first, cast_last)


# --------------------------------------------------------------------------------------------------
# SwiGLU


@pytest.mark.parametrize("rows", [0, 1, 63, 257])
def test_swiglu_is_its_formula(rows: int) -> None:
    gate, up = _random(rows, 3), _random(rows, 3, seed=1)
    wanted = [
        g / (1 + math.exp(-g)) * u for g, u in zip(gate.view(-1).tolist(), up.view(-1).tolist(), strict=True)
    ]
    _assert_close(ops.swiglu(gate, up), torch.tensor(wanted, dtype=torch.float64).view(rows, 3))
    assert gradcheck(ops.swiglu, (gate[:5].requires_grad_(), up[:5].requires_grad_()))


# --------------------------------------------------------------------------------------------------
# RoPE


def _angles(tokens: int, pairs: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    angles_TR2 = 10 * _random(tokens, pairs, seed=seed)
    return angles_TR2.cos(), angles_TR2.sin()


def _pair(pair: int, pairs: int, interleaved: bool) -> tuple[int, int]:
    return (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + pairs)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("tokens", "heads", "pairs"), [(1, 1, 1), (63, 3, 2), (257, 1, 3), (0, 2, 4)])
def test_rope_turns_each_pair(tokens: int, heads: int, pairs: int, interleaved: bool) -> None:
    x_THR, (cos_TR2, sin_TR2) = _random(tokens, heads, 2 * pairs), _angles(tokens, pairs)
    wanted_THR = torch.empty_like(x_THR)
    for t in range(tokens):
        for h in range(heads):
            for p in range(pairs):
                a, b = _pair(p, pairs, interleaved)
                c, s = cos_TR2[t, p], sin_TR2[t, p]
                wanted_THR[t, h, a] = x_THR[t, h, a] * c - x_THR[t, h, b] * s
                wanted_THR[t, h, b] = x_THR[t, h, a] * s + x_THR[t, h, b] * c
    _assert_close(ops.rope(x_THR, cos_TR2, sin_TR2, interleaved=interleaved), wanted_THR)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_gradient_is_the_opposite_turn(interleaved: bool) -> None:
    x_THR, (cos_TR2, sin_TR2) = _random(5, 2, 6).requires_grad_(), _angles(5, 3)
    assert gradcheck(lambda x: ops.rope(x, cos_TR2, sin_TR2, interleaved=interleaved), (x_THR,))

    dy_THR = _random(5, 2, 6, seed=3)
    ops.rope(x_THR, cos_TR2, sin_TR2, interleaved=interleaved).backward(dy_THR)
    assert x_THR.grad is not None
    _assert_close(x_THR.grad, ops.rope(dy_THR, cos_TR2, -sin_TR2, interleaved=interleaved))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("start", [1, 2, 3])
@pytest.mark.parametrize(("tokens", "heads"), [(7, 3), (1, 1)])
def test_rope_takes_a_slice_at_any_offset(tokens: int, heads: int, start: int, interleaved: bool) -> None:
    """The rotated part of a query lies behind its other dims, however many those are."""
    wide_THX, (cos_TR2, sin_TR2) = _random(tokens, heads, start + 4), _angles(tokens, 2)
    part_THR = wide_THX[..., start:]
    turned = ops.rope(part_THR, cos_TR2, sin_TR2, interleaved=interleaved)
    assert torch.equal(turned, ops.rope(part_THR.clone(), cos_TR2, sin_TR2, interleaved=interleaved))


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_rounds_once(interleaved: bool) -> None:
    """Narrow inputs turn in float32, whose error is nothing beside the one rounding to bfloat16 at the
    end."""
    x_THR, (cos_TR2, sin_TR2) = _random(63, 2, 8).bfloat16(), _angles(63, 4)
    got = ops.rope(x_THR, cos_TR2.float(), sin_TR2.float(), interleaved=interleaved)
    exact = ops.rope(x_THR.double(), cos_TR2, sin_TR2, interleaved=interleaved)
    size = x_THR.double().abs().amax()
    assert got.dtype == torch.bfloat16
    assert ((got.double() - exact).abs() <= BF16_UNIT * exact.abs() + 2.0**-22 * size).all()
