"""Laws of the narrow AdamW: exact where nothing is narrow, unbiased where something is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.ops import api as ops
from shoal.ops.api import Moments
from shoal.ops.reference import adamw as reference
from shoal.ops.reference import narrow
from shoal.ops.triton import adamw as triton_adamw
from tests.ops.parts import DEVICE, GPU, runs_triton, scalars_in_arrays

interpreted = [
    runs_triton,
    scalars_in_arrays,
]
SIZES = (1, 63, 257, 4097, 100_000) if GPU else (1, 63, 257, 1100)
STEP = torch.tensor(3.0, device=DEVICE)
RULE: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "key": 12345}


def random(n: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    """Normal values over some orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, generator=generator) * (spread * torch.randn(n, generator=generator)).exp()).to(
        DEVICE
    )


def empty_moments(n: int, kind: str) -> Moments:
    if kind == "int8":
        scales = [torch.zeros(-(-n // 256), device=DEVICE) for _ in range(2)]
        first, second = (
            torch.zeros(n, dtype=torch.int8, device=DEVICE),
            torch.full((n,), 255, dtype=torch.uint8, device=DEVICE),
        )
        return Moments(first, second, *scales)
    dtype = getattr(torch, kind)
    return Moments(torch.zeros(n, dtype=dtype, device=DEVICE), torch.zeros(n, dtype=dtype, device=DEVICE))


def filled_moments(n: int, kind: str) -> Moments:
    moments = empty_moments(n, kind)
    ops.narrow_store(moments.first, moments.first_scale, random(n, 1), 1, STEP)
    ops.narrow_store(moments.second, moments.second_scale, random(n, 2).square(), 2, STEP)
    return moments


# What is kept


@pytest.mark.parametrize("n", SIZES)
def test_linear_codes_are_within_a_step_and_right_on_average(n: int) -> None:
    x, draws = random(n), 400
    total = torch.zeros(n, device=DEVICE)
    padded = torch.nn.functional.pad(x.abs(), (0, -n % 256)).view(-1, 256)
    step = (padded.amax(1) / 127).repeat_interleave(256)[:n]
    values, scale = torch.empty(n, dtype=torch.int8, device=DEVICE), torch.empty(-(-n // 256), device=DEVICE)
    for draw in range(draws):
        ops.narrow_store(values, scale, x, draw, STEP)
        off = ops.narrow_load(values, scale) - x
        assert (off.abs() <= step * (1 + 1e-5)).all()
        total += off
    # A rounding's spread is at most half a step; the mean of 400 lies within 6 spreads of 0 (1e-9 a value).
    # 8 random bits resolve odds to 1/512.
    assert (total.abs() / draws <= 6 * 0.5 * step / draws**0.5 + step / 512).all()


@pytest.mark.parametrize("n", SIZES)
def test_log_codes_are_within_a_twelfth_of_an_octave_and_right_on_average(n: int) -> None:
    x, draws = random(n).square(), 400
    if n > 2:
        x[2] = 0
    total = torch.zeros(n, device=DEVICE)
    values, scale = torch.empty(n, dtype=torch.uint8, device=DEVICE), torch.empty(-(-n // 256), device=DEVICE)
    for draw in range(draws):
        ops.narrow_store(values, scale, x, draw, STEP)
        kept = ops.narrow_load(values, scale)
        assert torch.equal(kept == 0, x == 0)
        smallest = scale.repeat_interleave(256)[:n] * 2 ** (-254 / 12)
        told = torch.where(x > 0, torch.maximum(x, smallest), 1.0)
        octaves = (torch.where(x > 0, kept, 1.0) / told).log2()
        assert (octaves.abs() <= 1 / 12 + 1e-5).all()
        total += torch.where(x > smallest, kept / told - 1, 0.0)
    # Neighbours are 2^(1/12) - 1 = 5.9% apart: a spread of at most 3%, and 6 of them for the mean of 400;
    # 0.05% for odds that are linear in the logarithm, and 5.9% / 512 for their 8 bits.
    assert (total.abs() / draws <= 6 * 0.03 / draws**0.5 + 7e-4).all()


def test_bfloat16_is_rounded_to_a_neighbour_and_right_on_average() -> None:
    x = random(1000)
    total = torch.zeros_like(x)
    for draw in range(400):
        kept = torch.empty(1000, dtype=torch.bfloat16, device=DEVICE)
        ops.narrow_store(kept, None, x, draw, STEP)
        assert ((kept.float() - x).abs() < x.abs() * 2**-7).all()  # 8 bits of significand
        total += kept.float() / x - 1
    assert (total.abs() / 400 <= 6 * 0.5 * 2**-7 / 400**0.5).all()


def test_bits_are_those_of_key_step_and_element() -> None:
    one = narrow.random_bits(5000, 7, STEP)
    assert torch.equal(one[0], narrow.random_bits(5000, 7, STEP)[0])
    assert (one[0] < 1 << 32).all() and (one[0] >= 0).all()
    for other in (narrow.random_bits(5000, 8, STEP), narrow.random_bits(5000, 7, STEP + 1), one[::-1]):
        for shift in (0, 16):  # both halves of a word: 5000 draws of 16 bits agree 0.08 times on average
            assert ((one[0] >> shift & 0xFFFF) == (other[0] >> shift & 0xFFFF)).sum() < 8
    for bit in range(32):  # 5000 flips of a fair coin: 6 spreads are 212
        assert abs(int((one[0] >> bit & 1).sum()) - 2500) < 212


# The update


def test_where_nothing_is_narrow_it_is_torchs() -> None:
    weight, moments = random(1100, 5), empty_moments(1100, "float32")
    theirs = torch.nn.Parameter(weight.clone())
    oracle = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        grad = random(1100, step)
        theirs.grad = grad.clone()
        oracle.step()
        ops.adamw(weight, grad, moments, None, None, torch.tensor(float(step), device=DEVICE), **RULE)
    # Some ten float32 roundings of 6e-8 a step, of weights up to 100, and of a correction 1 - 0.95^t that
    # loses a digit: of steps of 0.01.
    torch.testing.assert_close(weight, theirs.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_step_is_exact_whatever_its_moments_are_kept_in_and_the_next_is_close(kind: str) -> None:
    weights = [random(1100, 5), random(1100, 5)]
    moments = [empty_moments(1100, "float32"), empty_moments(1100, kind)]
    grads = [random(1100, seed, spread=1.0) for seed in (1, 2)]
    for weight, kept in zip(weights, moments, strict=True):
        ops.adamw(weight, grads[0], kept, None, None, torch.ones((), device=DEVICE), **RULE)
    assert torch.equal(*weights)
    for weight, kept in zip(weights, moments, strict=True):
        ops.adamw(weight, grads[1], kept, None, None, torch.full((), 2.0, device=DEVICE), **RULE)
    # What storage loses: of m at most a step of its block, of v at most a ratio of 2^(1/12). In the second
    # update beta m is off by q = 0.9 * step, beta v by r = 2^(1/12): |m2| / sqrt(v2) by q / sqrt(v2) and
    # (sqrt(r) - 1) |m2| / sqrt(v2) together. bfloat16's 2^-7 is less than both.
    m2, v2 = 0.9 * 0.1 * grads[0] + 0.1 * grads[1], 0.95 * 0.05 * grads[0] ** 2 + 0.05 * grads[1] ** 2
    largest = torch.nn.functional.pad(0.1 * grads[0].abs(), (0, 180)).view(-1, 256).amax(1)
    q = 0.9 * largest.repeat_interleave(256)[:1100] / 127
    smallest = torch.nn.functional.pad(0.05 * grads[0] ** 2, (0, 180)).view(-1, 256).amax(1) * 2 ** (
        -254 / 12
    )
    v_low = v2 / 2 ** (1 / 12)
    bound = (q + (2 ** (1 / 24) - 1) * m2.abs()) / v_low.sqrt() * ((1 - 0.95**2) ** 0.5 / (1 - 0.9**2))
    clamped = 0.05 * grads[0] ** 2 < smallest.repeat_interleave(256)[:1100]  # kept larger: a smaller step
    off = (weights[0] - weights[1]).abs() / 0.01
    assert (off <= bound * 1.01 + 1e-5)[~clamped].all()
    assert not torch.equal(*weights)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_bfloat16_weight_of_its_own_moves_as_a_float32_one_on_average(kind: str) -> None:
    """Steps a tenth of its spacing: nearest rounding would never move it."""
    start = torch.full((4096,), 1.0, device=DEVICE)
    weight, moments = start.bfloat16(), empty_moments(4096, kind)
    for step in range(1, 31):
        grad = torch.ones(4096, device=DEVICE)
        ops.adamw(
            weight, grad, moments, None, None, torch.tensor(float(step), device=DEVICE),
            **{**RULE, "lr": 2**-8 / 10, "weight_decay": 0.0},
        )  # fmt: skip
    # 30 steps of 2^-8 / 10 each. A step's rounding has a spread below 2^-8 sqrt(0.1 * 0.9); that of the mean
    # of 4096 walks of 30 is 2^-8 * 0.3 * sqrt(30 / 4096) = 1e-4; 6 of them.
    assert weight.float().mean().item() == pytest.approx(1 - 30 * 2**-8 / 10, abs=6e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_factor_that_is_not_finite_calls_the_update_off(bad: float) -> None:
    weight, moments = random(300).bfloat16(), filled_moments(300, "int8")
    before = [tensor.clone() for tensor in (weight, *moments) if tensor is not None]
    ops.adamw(weight, random(300), moments, None, torch.tensor(bad, device=DEVICE), STEP, **RULE)
    after = [tensor for tensor in (weight, *moments) if tensor is not None]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


class TestKernel:
    pytestmark = interpreted

    @pytest.mark.parametrize("n", SIZES)
    @pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
    @pytest.mark.parametrize("home", ["float32", "bfloat16", "master"])
    def test_it_is_the_reference(self, n: int, kind: str, home: str) -> None:
        results = []
        for side in (reference, triton_adamw):
            wide = random(n, 5)
            weight = wide.clone() if home == "float32" else wide.bfloat16()
            master = wide.clone() if home == "master" else None
            moments = filled_moments(n, kind)
            grad = random(n, 6).to(weight.dtype)
            factor = torch.tensor(0.37, device=DEVICE)
            side.adamw(weight, grad, moments, master, factor, STEP, *RULE.values())
            results.append((weight, master, moments))
        (weight, master, moments), (weight_k, master_k, moments_k) = results
        # Float32 in another order: some ten roundings of 6e-8, of terms up to 100, which may cancel.
        if master is not None:
            torch.testing.assert_close(master_k, master, rtol=2e-6, atol=1e-5)
        # The same bits round the same way, but where a float32 rounding crosses the odds: one neighbour off.
        torch.testing.assert_close(
            weight_k.float(), weight.float(), rtol=2**-7 if home != "float32" else 2e-6, atol=1e-5
        )
        assert (weight_k != weight).float().mean() < 0.01 or home == "float32"
        for ours, theirs, scale in (
            (moments_k.first, moments.first, moments.first_scale),
            (moments_k.second, moments.second, moments.second_scale),
        ):
            if scale is not None:
                off = (ours.int() - theirs.int()).abs()
                assert off.max() <= 1
                assert (off > 0).float().mean() <= 0.01 + 1 / n * (n < 100)
            else:
                rtol = 2**-7 if kind == "bfloat16" else 2e-6
                torch.testing.assert_close(ours.float(), theirs.float(), rtol=rtol, atol=1e-5)

    def test_a_factor_that_is_not_finite_calls_the_update_off(self) -> None:
        weight, moments = random(300).bfloat16(), filled_moments(300, "int8")
        before = [tensor.clone() for tensor in (weight, *moments) if tensor is not None]
        factor = torch.tensor(float("nan"), device=DEVICE)
        triton_adamw.adamw(weight, random(300).bfloat16(), moments, None, factor, STEP, *RULE.values())
        after = [tensor for tensor in (weight, *moments) if tensor is not None]
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
