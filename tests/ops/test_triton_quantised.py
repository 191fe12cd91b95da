"""Laws of the FP8 and INT4 kernels: equal to the reference, values and gradients, whatever the rows.

Quantising is equal bit for bit. Products of given quantised numbers are exact but for float32 sums and the
dtype of the result. Where a kernel quantises what it has computed itself, an intermediate off by u of itself
crosses a rounding of e4m3 in one of 2^-4 / u cases and is then off by 2^-4: 2^-4 sqrt(16 u), 1.6% in
bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log

import pytest
import torch
from torch import Tensor

from shoal.ops import quantised
from shoal.ops.dispatch import batch_invariant, using
from shoal.ops.triton import fp8, fp8_linear
from tests.ops.parts import DEVICE, GPU, HALF, on_gpu, runs_triton, scalars_in_arrays

pytestmark = [runs_triton, pytest.mark.usefixtures("poison"), scalars_in_arrays]

Quantise = Callable[[Tensor], quantised.Weight]
SCHEMES: dict[str, Quantise] = {"fp8": quantised.quantise_blocks, "int4": quantised.quantise_groups}
E, K = (8, 3) if GPU else (4, 2)
# Ragged in every way that a group may be: past a half, before it, at it.
DIMS = ((328, 200), (192, 128), (70, 42)) if GPU else ((192, 40), (70, 42))
# Of a rounding to e4m3: 2^-4 / m, uniform, for significands m from 1 to 2 as often as 1 / m.
RMS = 2**-4 / (8 * log(2)) ** 0.5
CROSSED = 2 * 2**-4 * (16 * torch.finfo(HALF).eps / 2) ** 0.5


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = HALF) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


def _choices(T: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(5)
    experts_TK = torch.rand(T, E, generator=generator, device=DEVICE).argsort(-1)[:, :K]
    experts_TK = experts_TK.where((experts_TK != 1) & (experts_TK + torch.arange(K, device=DEVICE) != 3), -1)
    return experts_TK, torch.rand(T, K, generator=generator, device=DEVICE)


def _error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    assert got.isfinite().all()
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


def _limit(terms: int) -> float:
    """At most four roundings to the dtype, and float32 sums."""
    return 4 * torch.finfo(HALF).eps / 2 + 2 * terms**0.5 * 2.0**-24


@pytest.mark.parametrize("shape", [(1, 128), (33, 200), (2, 3, 64)])
def test_rows_and_blocks_are_quantised_as_the_reference_does(shape: tuple[int, ...]) -> None:
    x = _normal(*shape)
    results = []
    for side in ("triton", "reference"):
        with using(side):
            weight = quantised.quantise_blocks(x)
            results.append((*quantised.quantise_rows(x), *weight))
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got.float(), wanted.float())


def test_a_transposed_weight_is_the_weight_transposed() -> None:
    from shoal.ops.triton.quantise import quantise_blocks, quantise_both, quantise_transposed

    w = _normal(2, 136, 200)
    values, scales = quantise_blocks(w)
    values_t, scales_t = quantise_transposed(w)
    assert torch.equal(values_t.float(), values.float().mT)
    assert torch.equal(scales_t, scales.mT)
    for both, alone in zip(quantise_both(w), (values, scales, values_t, scales_t), strict=True):
        assert torch.equal(both.float(), alone.float())


def test_scales_lie_as_cublas_wants_them() -> None:
    """By torch's own check of the call, which knows shapes and strides and no device."""
    from shoal.ops.triton.quantise import quantise_rows

    x = _normal(8, 640)
    (values, scales), tall = quantise_rows(x), quantise_rows(x, tall=True)
    assert torch.equal(values.float(), tall[0].float())
    assert torch.equal(scales, tall[1])
    with using("reference"):
        weight = quantised.quantise_blocks(_normal(256, 640))
    a, a_scales, wide, w, w_scales = (t.to("meta") for t in (*tall, scales, *weight))
    assert fp8_linear.cublas_product(a, a_scales, w, w_scales, torch.bfloat16).shape == (8, 256)
    with pytest.raises(RuntimeError, match="scale a must have shape"):
        fp8_linear.cublas_product(a, wide, w, w_scales, torch.bfloat16)
    assert fp8_linear.misfit(8, 256, 640) is None
    assert "6 rows" in str(fp8_linear.misfit(6, 256, 640))
    assert "576 columns" in str(fp8_linear.misfit(8, 576, 640))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("columns", [40, 192, 328])
def test_a_weight_is_widened_as_the_reference_does(scheme: str, columns: int) -> None:
    with using("reference"):
        weight = SCHEMES[scheme](_normal(2, 136, columns))
        wanted = quantised.dequantise(weight, columns)
    with using("triton"):
        assert torch.equal(quantised.dequantise(weight, columns), wanted)


@pytest.mark.parametrize("dims", DIMS)
@pytest.mark.parametrize("T", [1, 19, 40] if GPU else [3, 33])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_few_rows_equal_the_reference(scheme: str, T: int, dims: tuple[int, int]) -> None:
    """By scan and by groups; activations are not quantised, in batch-invariant mode for any number."""
    D, F = dims
    with using("reference"):
        gate_up = SCHEMES[scheme](_normal(E, 2, F, D, seed=1) / D**0.5)
        down = SCHEMES[scheme](_normal(E, D, F, seed=2) / F**0.5)
        some = [SCHEMES[scheme](_normal(N, D, seed=3 + N) / D**0.5) for N in (F, 130, 7)]
    x_TD = _normal(T, D)
    results = []
    for side in ("triton", "reference"):
        with using(side), batch_invariant():
            y_TD = quantised.quantised_mlp(x_TD, *_choices(T), gate_up, down, x_TD)
            some_TN = quantised.quantised_linears(x_TD, some)
            results.append((y_TD, *some_TN, quantised.quantised_linears(x_TD, [some[1]])[0]))
    for got, wanted in zip(*results, strict=True):
        assert _error(got, wanted) <= _limit(max(D, F))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_experts_of_very_few_rows_equal_the_reference(scheme: str) -> None:
    """Tiles of 8 rows: some experts have none, one has more than a tile, some choices are dropped."""
    D, F = DIMS[0]
    T, experts, top_k = 23, 24, 3
    with using("reference"):
        gate_up = SCHEMES[scheme](_normal(experts, 2, F, D, seed=1) / D**0.5)
        down = SCHEMES[scheme](_normal(experts, D, F, seed=2) / F**0.5)
    x_TD = _normal(T, D)
    liked_E = torch.linspace(-3, 3, experts, device=DEVICE)
    experts_TK = (_normal(T, experts, seed=4).float() + liked_E).topk(top_k).indices
    experts_TK[::5, 1] = -1
    weights_TK = torch.rand(T, top_k, device=DEVICE)
    results = []
    for side in ("triton", "reference"):
        with using(side):
            results.append(quantised.quantised_mlp(x_TD, experts_TK, weights_TK, gate_up, down, x_TD))
    assert _error(*results) <= _limit(max(D, F))


@pytest.mark.parametrize("T", [12, 32])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_linear_of_a_whole_tile_equals_the_reference(scheme: str, T: int) -> None:
    """As many rows as a program holds: none is left for another, none is padding."""
    D, F = DIMS[0]
    with using("reference"):
        weight = SCHEMES[scheme](_normal(F, D, seed=3) / D**0.5)
    x_TD = _normal(T, D)
    results = []
    for side in ("triton", "reference"):
        with using(side):
            results.append(quantised.quantised_linears(x_TD, [weight])[0])
    assert _error(*results) <= _limit(D)


@pytest.mark.parametrize("dims", DIMS[::2] if GPU else DIMS[1:])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_many_rows_are_near_the_reference(scheme: str, dims: tuple[int, int]) -> None:
    """FP8 reads activations quantised: 2.6% root mean square, once for x and once for h. INT4 does not."""
    D, F = dims
    T = 150 if GPU else 100
    with using("reference"):
        gate_up = SCHEMES[scheme](_normal(E, 2, F, D, seed=1) / D**0.5)
        down = SCHEMES[scheme](_normal(E, D, F, seed=2) / F**0.5)
        one = SCHEMES[scheme](_normal(F, D, seed=3) / D**0.5)
    x_TD = _normal(T, D)
    results = []
    for side in ("triton", "reference"):
        with using(side):
            y_TD = quantised.quantised_mlp(x_TD, *_choices(T), gate_up, down)
            results.append((y_TD, quantised.quantised_linears(x_TD, [one])[0]))
    for got, wanted in zip(*results, strict=True):
        # Widened INT4 weights are rounded to the dtype, one rounding more.
        assert _error(got, wanted) <= (0.06 if scheme == "fp8" else 2 * _limit(D))


@pytest.mark.parametrize("grouped", [False, True])
def test_fp8_products_of_given_numbers_equal_the_reference(grouped: bool) -> None:
    """Nothing is quantised by the kernel here: the product is held to float64."""
    from shoal.ops.triton.permutation import group_by_expert

    T, D, F = 70, 200, 136
    with using("reference"):
        a, a_scales = quantised.quantise_rows(_normal(T, D))
        weight = quantised.quantise_blocks(_normal(E, F, D, seed=1))
        wide = quantised.dequantise(weight, D).double()
    rows = a.double() * a_scales.double().repeat_interleave(128, -1)[:, :D]
    if not grouped:
        got = fp8.product(a, a_scales, weight.values[2], weight.scales[2], HALF)
        assert _error(got, rows @ wide[2].T) <= _limit(D)
        return
    experts_TK, _ = _choices(T)
    groups = group_by_expert(experts_TK, E, 128 if GPU else 32)
    slots_P = groups.choices_P
    tiles = int(groups.first_tile_E1[-1]) * groups.tile
    choice = slots_P[:tiles].clamp(min=0).long()
    taken = torch.zeros(slots_P.shape[0], dtype=torch.int64, device=DEVICE)
    taken[:tiles] = choice // K
    got_MF = fp8.product(
        a.view(torch.uint8)[taken].view(a.dtype), a_scales[taken], *weight, HALF, groups, choices=T * K
    )
    kept_M = experts_TK.flatten() >= 0
    wanted_MF = torch.einsum(
        "md,mfd->mf", rows.repeat_interleave(K, 0), wide[experts_TK.flatten().clamp(min=0)]
    )
    assert _error(got_MF[kept_M], wanted_MF[kept_M]) <= _limit(D)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("T", "D", "F"), [(1, 128, 128), (70, 208, 384), (1500, 2048, 1408)])
def test_warpgroups_at_their_own_pace_multiply_what_one_loop_does(T: int, D: int, F: int) -> None:
    """The last half of a row of tiles, and the last block of a reduction, may lie past the end."""
    from shoal.ops.triton.permutation import group_by_expert

    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("Hopper's")
    x, x_scales = quantised.quantise_rows(_normal(T, D))
    gate_up, gate_up_scales = quantised.quantise_blocks(_normal(E, 2, F, D, seed=1) * D**-0.5)
    down, down_scales = quantised.quantise_blocks(_normal(E, D, F, seed=2))
    experts_TK, _ = _choices(T)
    groups = group_by_expert(experts_TK, E, 128)
    used = int(groups.first_tile_E1[-1]) * groups.tile
    choice = groups.choices_P[:used].long()

    def swiglu(tile: fp8.Fp8Tile | None) -> tuple[Tensor, Tensor, Tensor]:
        told = fp8.swiglu(x, x_scales, gate_up, gate_up_scales, groups, K, HALF, save=True, tile=tile)
        assert told[2] is not None
        return told[0], told[1], told[2]

    one, own = swiglu(fp8.SWIGLU), swiglu(None)
    for got, wanted in zip(own, one, strict=True):
        assert torch.equal(got[:used].float(), wanted[:used].float())
    wanted = fp8.product(*one[:2], down, down_scales, HALF, groups, tile=fp8.PRODUCT)[:used]
    by_slot = fp8.product(*one[:2], down, down_scales, HALF, groups)[:used]
    by_choice = fp8.product(*one[:2], down, down_scales, HALF, groups, choices=T * K)
    assert torch.equal(by_slot, wanted)
    assert torch.equal(by_choice[choice[choice >= 0]], wanted[choice >= 0])


def test_rows_quantised_once_are_those_of_each_choice() -> None:
    from shoal.ops.triton.permutation import gather_rows, group_by_expert
    from shoal.ops.triton.quantise import quantise_rows

    x_TD, (experts_TK, _) = _normal(20, 136), _choices(20)
    groups = group_by_expert(experts_TK, E, fp8.PORTABLE.bm)
    once = fp8.gather_quantised(*quantise_rows(x_TD), experts_TK, groups)
    kept_P = groups.choices_P >= 0
    used = int(groups.first_tile_E1[-1]) * groups.tile
    each = quantise_rows(gather_rows(x_TD, experts_TK, groups)[:used])
    for got, wanted in zip(once, each, strict=True):
        assert torch.equal(got[:used].float()[kept_P[:used]], wanted.float()[kept_P[:used]])
        assert not got[:used].float()[~kept_P[:used]].any()


def test_a_gradient_that_leaves_its_kernel_quantised_is_that_gradient_quantised() -> None:
    from shoal.ops.triton import experts
    from shoal.ops.triton.permutation import group_by_expert
    from shoal.ops.triton.quantise import quantise_rows

    T, F = 9, 1152 if GPU else 384  # more than one block of a program, the last of them short
    experts_TK, weights_TK = _choices(T)
    groups = group_by_expert(experts_TK, E, fp8.PORTABLE.bm)
    P, used = groups.choices_P.shape[0], int(groups.first_tile_E1[-1]) * groups.tile
    dh_PF, gate_up_P2F = _normal(P, F, seed=1), _normal(P, 2 * F, seed=2)
    narrow = fp8._narrow_like(gate_up_P2F)
    dgate_up_P2F, *_ = experts.swiglu_backward(dh_PF, gate_up_P2F, weights_TK, groups, narrow)
    for got, wanted in zip(narrow, quantise_rows(dgate_up_P2F[:used]), strict=True):
        assert torch.equal(got[:used].float(), wanted.float())


def test_a_weight_quantised_before_gives_the_same_gradients() -> None:
    T, D, F = 9, 136, 128
    results = []
    for kept in (False, True):
        x, w, gate_up, down = (
            t.requires_grad_()
            for t in (
                _normal(T, D),
                _normal(40, D, seed=1),
                _normal(E, 2 * F, D, seed=2) / D**0.5,
                _normal(E, D, F, seed=3) / F**0.5,
            )
        )
        with using("triton"):
            pair = quantised.fp8_pair(w) if kept else None
            pairs = (quantised.fp8_pair(*gate_up.chunk(2, 1)), quantised.fp8_pair(down)) if kept else None
            (y,) = quantised.fp8_linears(x, (w,), pair)
            z = quantised.fp8_grouped_mlp(x, *_choices(T), gate_up, down, pairs)
        (y.float().sin().sum() + z.float().sin().sum()).backward()
        results.append([y.detach(), z.detach(), *(t.grad for t in (x, w, gate_up, down))])
    for before, met in zip(*results, strict=True):
        assert torch.equal(before, met)


def test_linears_of_the_same_rows_are_each_as_alone() -> None:
    """40 rows end within a block; what comes next begins at its own. Gradients of x are added in one sum."""
    x = _normal(3, 2, 200)
    weights = [_normal(rows, 200, seed=rows) for rows in (40, 136, 128)]
    results = []
    for together in (False, True):
        leaf, *leaves = (t.clone().requires_grad_() for t in (x, *weights))
        with using("triton"):
            if together:
                told = quantised.fp8_linears(leaf, tuple(leaves), quantised.fp8_pair(*leaves))
            else:
                told = tuple(quantised.fp8_linears(leaf, (w,))[0] for w in leaves)
        torch.stack([y.float().sin().sum() for y in told]).sum().backward()
        results.append((told, [w.grad for w in leaves], leaf.grad))
    (alone, dalone, dx), (joint, djoint, dx_joint) = results
    for one, other in zip(alone, joint, strict=True):
        assert torch.equal(one, other)
    for one, other in zip((dx, *dalone), (dx_joint, *djoint), strict=True):
        assert _error(other, one) <= _limit(304)
    with using("reference"):
        wanted = quantised.fp8_pair(*weights)
    with using("triton"):
        for got, want in zip(quantised.fp8_pair(*weights), wanted, strict=True):
            assert torch.equal(got.float(), want.float())


@pytest.mark.parametrize("kept", [False, True] if GPU else [True])
def test_training_equals_the_reference(kept: bool) -> None:
    T, D, F = 20, 136, 128
    results = []
    for side in ("triton", "reference"):
        x, gate_up, down, one = (
            t.requires_grad_()
            for t in (
                _normal(T, D),
                _normal(E, 2 * F, D, seed=1) / D**0.5,
                _normal(E, D, F, seed=2) / F**0.5,
                _normal(200, D, seed=3) / D**0.5,
            )
        )
        experts_TK, weights_TK = _choices(T)
        weights_TK.requires_grad_()
        with using(side):
            pairs = (quantised.fp8_pair(*gate_up.chunk(2, 1)), quantised.fp8_pair(down)) if kept else None
            y = quantised.fp8_grouped_mlp(x, experts_TK, weights_TK, gate_up, down, pairs)
            (z,) = quantised.fp8_linears(x, (one,), quantised.fp8_pair(one) if kept else None)
        (y.float().sin().sum() + z.float().sin().sum()).backward()
        results.append([y.detach(), z.detach(), *(t.grad for t in (x, weights_TK, gate_up, down, one))])
    # The gradient of a weight is <rows(dy) W, h> in kernels and <dy, rows(h) W> in the reference, W rounded
    # alike: two operands are rounded on one side alone, and their errors of either sign meet sums of terms
    # of either sign. So each moves the gradients by its own root mean square; twice both is the limit.
    limits = [CROSSED] * 7
    limits[3] = 2 * 2**0.5 * RMS
    for got, wanted, limit in zip(*results, limits, strict=True):
        assert _error(got, wanted) <= limit


def test_refusals_name_the_value() -> None:
    x = _normal(3, 200)
    gate_up, down = _normal(E, 2 * 40, 200), _normal(E, 200, 40)
    assert "40 wide" in str(fp8.grouped_mlp_refusal(x, *_choices(3), gate_up, down))
    assert "float64" in str(fp8_linear.linears_refusal(x.double(), (_normal(4, 200),)))


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("T", [1, 8, 32, 128, 700, 4096])
def test_real_shapes_in_a_graph(T: int, scheme: str) -> None:
    """V2-Lite, replayed as a server runs it; in batch-invariant mode against a few rows of the same."""
    D, F, experts, top_k = 2048, 1408, 64, 6
    gate_up = SCHEMES[scheme](_normal(experts, 2, F, D, seed=1) / D**0.5)
    down = SCHEMES[scheme](_normal(experts, D, F, seed=2) / F**0.5)
    x_TD = _normal(T, D)
    experts_TK = torch.rand(T, experts, device=DEVICE).topk(top_k).indices
    weights_TK = torch.rand(T, top_k, device=DEVICE)
    eager_TD = quantised.quantised_mlp(x_TD, experts_TK, weights_TK, gate_up, down)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TD = quantised.quantised_mlp(x_TD, experts_TK, weights_TK, gate_up, down)
    graph.replay()
    assert torch.equal(eager_TD, y_TD)
    some = slice(0, T, max(1, T // 8))
    with using("reference"):
        wanted_TD = quantised.quantised_mlp(x_TD[some], experts_TK[some], weights_TK[some], gate_up, down)
    assert _error(y_TD[some], wanted_TD) <= (0.06 if scheme == "fp8" else 2 * _limit(D))
    with batch_invariant():
        rows_TD = quantised.quantised_mlp(x_TD, experts_TK, weights_TK, gate_up, down)
        one_TD = quantised.quantised_mlp(x_TD[:1], experts_TK[:1], weights_TK[:1], gate_up, down)
    assert torch.equal(rows_TD[:1], one_TD)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 8, 9, 16, 17, 32, 33, 64])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linears_of_few_rows_equal_the_reference(scheme: str, T: int) -> None:
    """V2-Lite's, one that ends within a block of columns, and one of fewer blocks than warps."""
    shapes = (
        (2048, (3072, 576)),
        (2048, (2816, 2816)),
        (2816, (2048,)),
        (10944, (2048,)),
        (384, (16, 2048, 80)),
    )
    for D, sizes in shapes:
        with using("reference"):
            weights = [SCHEMES[scheme](_normal(N, D, seed=N) / D**0.5) for N in sizes]
        x_TD = _normal(T, D)
        results = []
        for side in ("triton", "reference"):
            with using(side):
                results.append(quantised.quantised_linears(x_TD, weights))
        for got, wanted in zip(*results, strict=True):
            assert _error(got, wanted) <= _limit(D)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_of_a_linear_does_not_depend_on_its_batch(scheme: str, dtype: torch.dtype) -> None:
    """V2-Lite's, each launch set up while the one before runs; in a graph as without."""
    many, D, F = 1000, 2048, 2816
    q, kv, back = (SCHEMES[scheme](_normal(N, C, seed=N) / C**0.5) for N, C in ((F, D), (576, D), (D, F)))
    x_TD = _normal(many, D).to(dtype)

    def run(x_TD: Tensor) -> tuple[Tensor, ...]:
        q_TF, kv_TX = quantised.quantised_linears(x_TD, (q, kv))
        return q_TF, kv_TX, quantised.quantised_linears(q_TF, [back])[0]

    with batch_invariant():
        all_ys = run(x_TD)
    with using("reference"):
        for got, wanted in zip(all_ys, run(x_TD), strict=True):
            assert _error(got, wanted) <= 2 * _limit(F)
    for T in (1, 16, 17, 33, 64):
        few = x_TD[:T].clone()
        ys = run(few)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = run(few)
        graph.replay()
        for got, replayed, wanted in zip(ys, again, all_ys, strict=True):
            assert torch.equal(got, wanted[:T])
            assert torch.equal(replayed, wanted[:T])


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("M", "N", "K_"), [(4, 128, 128), (260, 384, 640), (4096, 3072, 2048)])
def test_cublas_multiplies_the_same_numbers(M: int, N: int, K_: int, dtype: torch.dtype) -> None:
    """Held to float64, as our product is; the scales differ from block to block by far."""
    from shoal.ops.triton.quantise import quantise_rows

    spread = 2.0 ** torch.arange(K_ // 128, device=DEVICE).remainder(7).repeat_interleave(128)
    x, w = _normal(M, K_) * spread.to(HALF), _normal(N, K_, seed=1)
    w[: N // 2] *= 16
    weight = quantised.quantise_blocks(w)
    a, a_scales = quantise_rows(x, tall=True)
    got = fp8_linear.cublas_product(a, a_scales, *weight, dtype)
    rows = a.double() * a_scales.double().repeat_interleave(128, -1)
    wanted = rows @ quantised.dequantise(weight, K_).double().T
    assert got.dtype == dtype
    # Tensor cores add e4m3 products in some 14 bits, 128 of them before float32 takes over.
    assert _error(got, wanted) <= 2 * torch.finfo(torch.bfloat16).eps
    assert _error(got, fp8.product(a, a_scales.contiguous(), *weight, dtype)) <= 2 * torch.finfo(HALF).eps


@on_gpu
@pytest.mark.gpu
def test_a_linear_of_whole_blocks_is_cublas_s() -> None:
    """V2-Lite's q, against the reference; in batch-invariant mode a row is the same in any company."""
    from shoal.ops.dispatch import explain

    x, w = _normal(1000, 2048), _normal(3072, 2048, seed=1) / 2048**0.5
    whole = torch.cuda.get_device_capability()[0] == 9
    assert ("triton/cublas" if whole else "triton/ours") in explain("fp8_linears", x, (w,))
    assert "1001 rows" in explain("fp8_linears", _normal(1001, 2048), (w,)) or not whole
    kv_a = _normal(576, 2048, seed=3) / 2048**0.5  # beside q of whole blocks, too
    assert ("triton/cublas" if whole else "triton/ours") in explain("fp8_linears", x, (w, kv_a))
    results = []
    for side in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, w, kv_a)]
        with using(side):
            y, z = quantised.fp8_linears(leaves[0], tuple(leaves[1:]))
        torch.autograd.backward([y, z], [_normal(1000, 3072, seed=2), _normal(1000, 576, seed=4)])
        results.append([y.detach(), z.detach(), *(leaf.grad for leaf in leaves)])
    for got, wanted in zip(*results, strict=True):
        assert _error(got, wanted) <= _limit(3648)
    with batch_invariant():
        assert torch.equal(quantised.fp8_linears(x, (w,))[0][:8], quantised.fp8_linears(x[:8], (w,))[0])
        assert "batch-invariant" in explain("fp8_linears", x, (w,))


@on_gpu
@pytest.mark.gpu
def test_gradients_at_a_real_shape() -> None:
    """Against float64 without quantising: e4m3's 2.6% an operand, six of them at most, and twice that."""
    from shoal.ops.reference import experts as exact

    T, D, F = 1000, 2048, 1408
    x, gate_up, down = _normal(T, D), _normal(8, 2 * F, D, seed=1) / D**0.5, _normal(8, D, F, seed=2) / F**0.5
    experts_TK, weights_TK = torch.rand(T, 8, device=DEVICE).topk(2).indices, torch.rand(T, 2, device=DEVICE)
    results = []
    for layer, wide in ((quantised.fp8_grouped_mlp, False), (exact.grouped_mlp, True)):
        leaves = [
            (t.double() if wide else t.clone()).requires_grad_() for t in (x, weights_TK, gate_up, down)
        ]
        y = layer(leaves[0], experts_TK, leaves[1], leaves[2], leaves[3])
        y.backward(_normal(T, D, seed=4).to(y.dtype))
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for got, wanted in zip(*results, strict=True):
        assert _error(got, wanted) < 0.13
