"""Laws of the ops that decoding is made of: several products at once, MLA on either side of the cache, the
gate, routed experts with the shared ones.

Each is held to its reference in float64: a product of D terms is good to sqrt(D) of float32's rounding, and
what is stored narrow is rounded once more for each op it stands for.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.ops import dispatch
from shoal.ops.triton import (
    cache_attention,
    cache_values,
    experts,
    latent,
    linears,
    norms,
    permutation,
    routing,
)
from shoal.ops.triton.expert_plan import portable_plan
from tests.ops.parts import DEVICE, GPU, HALF, runs_triton, scalars_in_arrays

pytestmark = [runs_triton, pytest.mark.usefixtures("poison"), scalars_in_arrays]
DTYPES = (torch.float32, HALF)
ROWS = (0, 1, 7, 17, 63, 64, 65) if GPU else (0, 1, 17)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


def assert_near(found: Tensor, wanted: Tensor, dtype: torch.dtype, roundings: int, terms: int) -> None:
    """Within `roundings` of the dtype and a sum of `terms` in float32, of the largest value there is."""
    assert found.shape == wanted.shape
    if not found.numel():
        return
    limit = float(wanted.abs().max()) * (roundings * torch.finfo(dtype).eps + terms**0.5 * 2.0**-21)
    assert (found.double() - wanted.double()).abs().max() <= limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", ROWS)
@pytest.mark.parametrize(
    ("sizes", "D", "bias"), [((96, 40), 128, False), ((33,), 200, True), ((16, 8, 8), 64, True)]
)
def test_products_at_once_are_products(
    T: int, sizes: tuple[int, ...], D: int, bias: bool, dtype: torch.dtype
) -> None:
    x_TD = draw(T, 2 * D, dtype=dtype)[:, :D]  # rows that lie apart
    weights = tuple(draw(size, D, dtype=dtype, seed=size, scale=D**-0.5) for size in sizes)
    biases = tuple(draw(size, dtype=dtype, seed=size) if bias else None for size in sizes)
    found = linears.linears(x_TD, weights, biases, invariant=True)
    assert linears.linears_refusal(x_TD, weights, biases) is None
    for ours, weight, add in zip(found, weights, biases, strict=True):
        wanted = x_TD.double() @ weight.double().t() + (0 if add is None else add.double())
        assert_near(ours, wanted, dtype, 1, D)


@pytest.mark.parametrize("T", [65, 600])
def test_weights_side_by_side_are_one_product_of_some_rows(T: int) -> None:
    x_TD, sizes = draw(T, 64, dtype=HALF), (40, 24)
    weights = draw(sum(sizes), 64, dtype=HALF, seed=1).split(sizes)
    apart = tuple(weight.clone() for weight in weights)
    (y, z), wanted = linears.linears(x_TD, weights, (None, None)), linears.linears(x_TD, apart, (None, None))
    as_one = y.untyped_storage().data_ptr() == z.untyped_storage().data_ptr()
    assert as_one == (T <= linears.MAX_AS_ONE)
    for ours, theirs in zip((y, z), wanted, strict=True):
        assert_near(ours, theirs.double(), HALF, 1, 64)
    learning = tuple(weight.requires_grad_() for weight in apart)
    assert all(y.requires_grad for y in linears.linears(x_TD, learning, (None, None)))


def test_a_product_does_not_depend_on_its_batch() -> None:
    x_TD, weight = draw(70, 128, dtype=HALF), draw(48, 128, dtype=HALF, seed=1)
    (whole,) = linears.linears(x_TD, (weight,), (None,), invariant=True)
    for few in (1, 16, 17):
        (part,) = linears.linears(x_TD[:few], (weight,), (None,), invariant=True)
        assert torch.equal(part, whole[:few])


def test_products_with_a_gradient_have_one() -> None:
    x_TD, weight = draw(3, 64, dtype=torch.float32), draw(8, 64, dtype=torch.float32).requires_grad_()
    (y,) = linears.linears(x_TD, (weight,), (None,))
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    assert torch.allclose(gradient, x_TD.sum(0).expand(8, -1))
    assert linears.choose(x_TD, (weight,), (None,), invariant=False)[0] == "cublas"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", ROWS)
@pytest.mark.parametrize(
    ("H", "N", "R", "V", "C"),
    [(16, 128, 64, 128, 512), (3, 24, 16, 40, 96)] if GPU else [(3, 24, 16, 40, 96)],
)
def test_absorbed_queries_and_values(
    T: int, H: int, N: int, R: int, V: int, C: int, dtype: torch.dtype
) -> None:
    q_THQ, kv_TL = draw(T, H, N + R, dtype=dtype), draw(T, 2 * (C + R), dtype=dtype, seed=1)[:, : C + R]
    norm_C, kv_b = draw(C, dtype=dtype, seed=2), draw(H * (N + V), C, dtype=dtype, seed=3, scale=N**-0.5)
    angle = draw(T, R // 2, dtype=torch.float32, seed=4)
    slots_T = torch.randperm(80, generator=torch.Generator().manual_seed(5))[:T].to(DEVICE)
    arguments: tuple[Any, ...] = (q_THQ, kv_TL, norm_C, 1e-6, angle.cos(), angle.sin(), kv_b)
    pages, theirs = (torch.zeros(5, 16, C + R, dtype=dtype, device=DEVICE) for _ in range(2))
    rest: tuple[Any, ...] = (pages, slots_T, True)
    assert latent.latent_queries_refusal(*arguments, *rest) is None
    found = latent.latent_queries(*arguments, *rest)
    wanted = dispatch.REFERENCE["latent_queries"](
        *(x.double() if isinstance(x, Tensor) else x for x in arguments), theirs.double(), slots_T, True
    )
    dispatch.REFERENCE["latent_queries"](*arguments, theirs, slots_T, True)
    assert_near(found, wanted, dtype, 1, N)
    assert_near(pages, theirs.double(), dtype, 2, C)
    o_THC = draw(T, H, C, dtype=dtype, seed=6)
    values = latent.latent_values(o_THC, kv_b, V)
    assert_near(values, dispatch.REFERENCE["latent_values"](o_THC.double(), kv_b.double(), V), dtype, 1, C)
    for few in (1, 16) if T > 16 else ():
        rows = latent.latent_values(o_THC, kv_b, V, invariant=True)[:few]
        assert torch.equal(latent.latent_values(o_THC[:few], kv_b, V, invariant=True), rows)


@pytest.mark.parametrize("T", [1, 17])
@pytest.mark.parametrize("bias", [False, True])
def test_the_gate_is_its_two_ops(T: int, bias: bool) -> None:
    x_TD, weight = draw(T, 300, dtype=HALF), draw(12, 300, dtype=HALF, seed=1, scale=0.06)
    bias_E = draw(12, dtype=torch.float32, seed=2) if bias else None
    rule = ("sigmoid" if bias else "softmax", bias_E, 3, 2, True, 2.5, None)
    assert routing.gate_refusal(x_TD, weight, 4, *rule) is None
    experts_TK, weights_TK, scores_TE, logits_TE = routing.gate(x_TD, weight, 4, *rule)
    alone_TE = routing.gate_logits(x_TD, weight)
    assert torch.equal(logits_TE, alone_TE)  # the same sums in the same order
    for ours, theirs in zip(
        (experts_TK, weights_TK, scores_TE), routing.route(alone_TE, 4, *rule), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["scan", "scan tma", "stream", "stream tma", "tiles"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [0, 1, 17])
@pytest.mark.parametrize("times", [1, 2] if GPU else [2])
def test_shared_experts_ride_along(times: int, T: int, dtype: torch.dtype, kind: str) -> None:
    E, K, D, F = 5, 2, 64, 32
    x_TD, generator = draw(T, D, dtype=dtype), torch.Generator().manual_seed(1)
    experts_TK = torch.rand(T, E, generator=generator).argsort(1)[:, :K].contiguous().to(DEVICE)
    if T > 1:
        experts_TK[1, 0] = -1  # dropped
    weights_TK = draw(T, K, dtype=torch.float32, seed=2).abs()
    stacks = (
        draw(E, 2 * F, D, dtype=dtype, seed=3, scale=D**-0.5),
        draw(E, D, F, dtype=dtype, seed=4, scale=0.2),
    )
    shared = tuple(
        draw(*shape, dtype=dtype, seed=5 + at, scale=0.15)
        for at, shape in enumerate(((times * F, D), (times * F, D), (D, times * F)))
    )
    tma = kind.endswith("tma") and dtype == HALF
    plan = portable_plan(kind.removesuffix(" tma"), 16, tma=tma)
    assert experts.mixture_refusal(x_TD, experts_TK, weights_TK, *stacks, *shared) is None
    found = experts.mixture(x_TD, experts_TK, weights_TK, *stacks, *shared, plan=plan)
    wide = [t.double() for t in (*stacks, *shared)]
    wanted = dispatch.REFERENCE["mixture"](x_TD.double(), experts_TK, weights_TK.double(), *wide)
    assert_near(found, wanted, dtype, 4, D + times * F)
    apart = experts.mixture(x_TD, experts_TK, weights_TK, *stacks, *shared, plan=plan, invariant=True)
    assert_near(apart, wanted, dtype, 4, D + times * F)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [129, 256, 257])
def test_shared_experts_ride_in_wider_tiles(T: int) -> None:
    E, K, D, F = 32, 2, 256, 128
    x_TD, generator = draw(T, D, dtype=HALF), torch.Generator().manual_seed(1)
    experts_TK = torch.rand(T, E, generator=generator).argsort(1)[:, :K].contiguous().to(DEVICE)
    weights_TK = draw(T, K, dtype=torch.float32, seed=2).abs()
    shapes = (E, 2 * F, D), (E, D, F), (2 * F, D), (2 * F, D), (D, 2 * F)
    matrices = [draw(*shape, dtype=HALF, seed=3 + at, scale=0.1) for at, shape in enumerate(shapes)]
    made = experts.open_mixture(x_TD, experts_TK, weights_TK, *matrices)
    assert not isinstance(made, Tensor) and len(made[3]) == (2 if T <= 256 else 1)  # parts of the shared sum
    wide = [t.double() for t in matrices]
    wanted = dispatch.REFERENCE["mixture"](x_TD.double(), experts_TK, weights_TK.double(), *wide)
    assert_near(permutation.close(*made), wanted, HALF, 4, D + 2 * F)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [2, 17])
@pytest.mark.parametrize("kind", ["scan", "stream", "tiles"])
def test_the_layer_is_the_sum_of_rows_made_in_rounds(kind: str, T: int, dtype: torch.dtype) -> None:
    """Bit for bit, over another number of experts and in other places of the stack, as offloading does it."""
    E, K, D, F = 5, 3, 64, 32
    x_TD, generator = draw(T, D, dtype=dtype), torch.Generator().manual_seed(1)
    experts_TK = torch.rand(T, E, generator=generator).argsort(1)[:, :K].contiguous().to(DEVICE)
    experts_TK[0, 1] = -1  # dropped
    weights_TK = draw(T, K, dtype=torch.float32, seed=2).abs()
    gate_up = draw(E, 2 * F, D, dtype=dtype, seed=3, scale=D**-0.5)
    down = draw(E, D, F, dtype=dtype, seed=4, scale=0.2)
    plan = portable_plan(kind, 16)
    wanted = experts.grouped_mlp(x_TD, experts_TK, weights_TK, gate_up, down, plan=plan)
    x_MD, ones_M1 = x_TD.repeat_interleave(K, 0), weights_TK.new_ones(T * K, 1)
    rows_MD = torch.zeros_like(x_MD)
    for round_ in ([4, 1], [0, 3], [2]):
        table = torch.full((E + 1,), -1, device=DEVICE)
        table[round_] = torch.arange(len(round_), device=DEVICE)
        slots_M1 = table[experts_TK.reshape(-1, 1)]
        rows_MD += experts.grouped_mlp(x_MD, slots_M1, ones_M1, gate_up[round_], down[round_], plan=plan)
    assert torch.equal(permutation.sum_choices(rows_MD, experts_TK, weights_TK), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sizes", "D", "bias"), [((96, 41), 128, False), ((33,), 2304, True)])
def test_one_row_is_a_product(sizes: tuple[int, ...], D: int, bias: bool, dtype: torch.dtype) -> None:
    x_TD = draw(1, D, dtype=dtype)
    weights = tuple(draw(size, D, dtype=dtype, seed=size, scale=D**-0.5) for size in sizes)
    biases = tuple(draw(size, dtype=dtype, seed=size) if bias else None for size in sizes)
    assert linears.choose(x_TD, weights, biases, invariant=False)[0] == "one row"
    for ours, weight, add in zip(linears.linears(x_TD, weights, biases), weights, biases, strict=True):
        wanted = x_TD.double() @ weight.double().t() + (0 if add is None else add.double())
        assert_near(ours, wanted, dtype, 1, D)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [0, 1, 17])
@pytest.mark.parametrize("S", [1, 2])
def test_an_open_sum_is_closed_by_the_norm_that_reads_it(S: int, T: int, dtype: torch.dtype) -> None:
    D, K = 200, 3
    x_TD, weight_D = draw(T, 2 * D, dtype=dtype)[:, :D], draw(D, dtype=dtype, seed=1)
    experts_TK = torch.arange(T * K, device=DEVICE).view(T, K) % 7 - (torch.arange(K, device=DEVICE) == 1) * 1
    rows_MD, weights_TK = draw(T * K, D, dtype=dtype, seed=2), draw(T, K, dtype=torch.float32, seed=3).abs()
    rows_MD[experts_TK.flatten() < 0] = float("nan")  # what nobody wrote
    dense_STD = draw(S, T, D, dtype=torch.float32 if S > 1 else dtype, seed=4)
    open_sum = rows_MD, experts_TK, weights_TK, dense_STD
    closed_TD = permutation.close(*open_sum)
    assert_near(closed_TD, dispatch.REFERENCE["close"](*open_sum), dtype, 2, K)
    assert norms.add_sum_rms_norm_refusal(x_TD, *open_sum, weight_D, 1e-6) is None
    total_TD, normal_TD = norms.add_sum_rms_norm(x_TD, *open_sum, weight_D, 1e-6)
    assert torch.equal(total_TD, x_TD + closed_TD)
    assert torch.equal(normal_TD, norms.add_rms_norm(x_TD, closed_TD, weight_D, 1e-6)[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("context", "longest", "at_once"),
    [(0, 300, 32), (1, 300, 32), (60, 64, 32), (300, 300, 2), (300, 300, 32), (300, 4000, 32)],
)
def test_values_of_one_token_are_those_of_its_merged_parts(
    context: int, longest: int, at_once: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_values, "AT_ONCE", at_once)
    H, C, R, N, V = (16, 512, 64, 128, 128) if GPU else (3, 24, 8, 8, 20)
    pages = draw(40, 16, C + R, dtype=dtype, seed=1)
    table_SB = torch.randperm(40, generator=torch.Generator().manual_seed(2)).int().to(DEVICE)[None]
    where = table_SB, torch.tensor([context], dtype=torch.int32, device=DEVICE), longest
    cu_S1 = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    q_THL, kv_b = draw(1, H, C + R, dtype=dtype), draw(H * (N + V), C, dtype=dtype, seed=3, scale=C**-0.5)
    call = q_THL, pages, *where, cu_S1, 1, C, (C + R) ** -0.5
    assert cache_attention.latent_attention_refusal(*call, (kv_b, V)) is None
    together = cache_attention.latent_attention(*call, (kv_b, V))
    apart = latent.latent_values(cache_attention.latent_attention(*call), kv_b, V)
    assert_near(together, apart.double(), dtype, 3, C)
    fixed = cache_attention.latent_attention(*call, (kv_b, V), invariant=True)
    assert_near(together, fixed.double(), dtype, 3, C)


@pytest.mark.parametrize("T", [0, 1, 17])
@pytest.mark.parametrize("bias", [False, True])
def test_the_gate_behind_a_norm_is_both(T: int, bias: bool) -> None:
    x_TD, y_TD, norm_D = (
        draw(T, 600, dtype=HALF)[:, :300],
        draw(T, 300, dtype=HALF, seed=1),
        draw(300, dtype=HALF),
    )
    weight_ED = draw(72, 300, dtype=HALF, seed=2, scale=0.06)
    bias_E = draw(72, dtype=torch.float32, seed=2) if bias else None
    rule = (4, "sigmoid" if bias else "softmax", bias_E, 3, 2, True, 2.5, None)
    assert routing.add_norm_gate_refusal(x_TD, y_TD, norm_D, 1e-6, weight_ED, *rule) is None
    total_TD, normal_TD, *found = routing.add_norm_gate(x_TD, y_TD, norm_D, 1e-6, weight_ED, *rule)
    wanted = norms.add_rms_norm(x_TD, y_TD, norm_D, 1e-6)
    assert torch.equal(total_TD, wanted[0])
    assert_near(normal_TD, wanted[1].double(), HALF, 2, 300)
    logits_TE = routing.gate_logits(normal_TD, weight_ED)
    assert_near(found[3], normal_TD.double() @ weight_ED.double().t(), torch.float32, 1, 300)
    assert_near(found[3], logits_TE.double(), torch.float32, 1, 300)
    for ours, theirs in zip(found[:3], routing.route(found[3], *rule), strict=True):
        assert torch.equal(ours, theirs)
