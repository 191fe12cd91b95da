"""Laws of the expert kernels: equal to the reference, values and gradients, whatever the rows and the tiles.

The reference runs in float64. With u the unit roundoff of the dtype (2^-8 in bfloat16), a result passes
through at most eight roundings (g and u, h, y, the sum; backward dh, dgu, dx), each at most u, independent,
so the relative error of a tensor is about sqrt(8) u at worst, and 4 u holds for tensors too small to average.
float32 adds sums of n terms, each good to sqrt(n) 2^-24.

On a GPU the sizes are real; elsewhere Triton's interpreter (TRITON_INTERPRET=1) runs the same on small ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from shoal.ops.reference import experts as reference
from shoal.ops.triton import expert_gradients, expert_plan, experts, permutation
from tests.ops.parts import DEVICE, GPU, HALF, on_gpu, runs_triton, scalars_in_arrays

pytestmark = [
    runs_triton,
    pytest.mark.usefixtures("poison"),
    scalars_in_arrays,
]

ROWS = (1, 63, 257) if GPU else (1, 19)
DTYPES = (HALF, torch.float32)


class Dims(NamedTuple):
    E: int
    K: int
    D: int
    F: int


ODD = Dims(8, 3, 328, 200) if GPU else Dims(5, 2, 40, 24)  # no tile divides them
V2_LITE, V3_SLICE = Dims(64, 6, 2048, 1408), Dims(32, 8, 7168, 2048)


class Inputs(NamedTuple):
    x_TD: Tensor
    experts_TK: Tensor
    weights_TK: Tensor
    gate_up_E2FD: Tensor
    down_EDF: Tensor


def _inputs(T: int, dims: Dims, dtype: torch.dtype) -> Inputs:
    E, K, D, F = dims
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE)

    return Inputs(
        normal(T, D).to(dtype),
        torch.rand(T, E, generator=generator, device=DEVICE).argsort(-1)[:, :K],
        torch.rand(T, K, generator=generator, device=DEVICE),
        (normal(E, 2 * F, D) / D**0.5).to(dtype),
        (normal(E, D, F) / F**0.5).to(dtype),
    )


def _rows(inputs: Inputs, rows: slice) -> Inputs:
    x_TD, experts_TK, weights_TK = (t[rows] for t in inputs[:3])
    return inputs._replace(x_TD=x_TD, experts_TK=experts_TK, weights_TK=weights_TK)


def _wide(inputs: Inputs) -> Inputs:
    return Inputs(*(t.double() if t.is_floating_point() else t for t in inputs))


def _assert_close(got: Tensor, wanted: Tensor, dtype: torch.dtype, terms: int) -> None:
    limit = 4 * torch.finfo(dtype).eps / 2 + 2 * terms**0.5 * 2.0**-24
    assert got.shape == wanted.shape
    error = (got.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)
    assert error <= limit, f"relative error {error:.2e}, limit {limit:.2e}"


def _results(layer: Callable[..., Tensor], inputs: Inputs, **settings: Any) -> list[Tensor]:
    """The output and every gradient, for one random gradient of the output."""
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
    y_TD = layer(*leaves, **settings)
    generator = torch.Generator(DEVICE).manual_seed(1)
    dy_TD = torch.randn(y_TD.shape, generator=generator, device=DEVICE).to(HALF)
    y_TD.backward(dy_TD.to(y_TD.dtype))
    return [y_TD.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _assert_equals_reference(inputs: Inputs, **settings: Any) -> None:
    got, wanted = (
        _results(experts.grouped_mlp, inputs, **settings),
        _results(reference.grouped_mlp, _wide(inputs)),
    )
    assert len(got) == 5
    for ours, theirs in zip(got, wanted, strict=True):
        _assert_close(
            ours, theirs, inputs.x_TD.dtype, terms=max(2 * inputs.x_TD.shape[1], inputs.x_TD.shape[0])
        )


EDGES: dict[str, Callable[[Tensor], Tensor]] = {
    "spread": lambda experts_TK: experts_TK,
    "an expert without rows": lambda experts_TK: torch.where(experts_TK == 1, 2, experts_TK),
    "one expert": lambda experts_TK: torch.full_like(experts_TK, 3),
    "dropped": lambda experts_TK: torch.where(experts_TK % 2 == 0, -1, experts_TK),
    "all dropped": lambda experts_TK: torch.full_like(experts_TK, -1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", ROWS)
@pytest.mark.parametrize("edge", EDGES)
def test_values_and_gradients_equal_reference(edge: str, T: int, dtype: torch.dtype) -> None:
    inputs = _inputs(T, ODD, dtype)
    _assert_equals_reference(inputs._replace(experts_TK=EDGES[edge](inputs.experts_TK)))


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
def test_every_way_to_load_gives_the_gradients(tma: bool) -> None:
    _assert_equals_reference(
        _inputs(ROWS[-1], ODD, HALF), plan=expert_plan.portable_plan("tiles", 32, tma=tma)
    )


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
@pytest.mark.parametrize("kind", ["scan", "stream", "tiles"])
@pytest.mark.parametrize("edge", EDGES)
def test_every_path_serves_few_rows(edge: str, kind: str, tma: bool) -> None:
    """20 rows of one expert are more than a tile of 16, for the path that scans too."""
    inputs = _inputs(20, ODD, HALF)
    inputs = inputs._replace(experts_TK=EDGES[edge](inputs.experts_TK))
    plan = expert_plan.portable_plan(kind, 16, columns=64 if GPU else 32, tma=tma)
    wanted_TD = reference.grouped_mlp(*_wide(inputs))
    _assert_close(experts.grouped_mlp(*inputs, plan=plan), wanted_TD, HALF, terms=ODD.D)


def test_no_tokens_give_no_rows_and_zero_gradients() -> None:
    y_TD, *gradients = _results(experts.grouped_mlp, _inputs(0, ODD, HALF))
    assert y_TD.shape == (0, ODD.D)
    assert len(gradients) == 4
    assert not any(gradient.any() for gradient in gradients)


def test_a_row_does_not_depend_on_its_batch() -> None:
    """Bit for bit: each row's sums run in one order, wherever the row stands and whatever tile it shares."""
    inputs = _inputs(ROWS[-1], ODD, HALF)
    plan = None if GPU else expert_plan.portable_plan("tiles", 16)
    whole_TD = experts.grouped_mlp(*inputs, plan=plan)
    assert torch.equal(whole_TD, experts.grouped_mlp(*inputs, plan=plan))
    assert torch.equal(whole_TD[:1], experts.grouped_mlp(*_rows(inputs, slice(1)), plan=plan))


def test_refusals_name_the_value() -> None:
    inputs = _inputs(3, ODD, HALF)
    assert experts.grouped_mlp_refusal(*inputs) is None
    assert "float64" in str(experts.grouped_mlp_refusal(*_wide(inputs)))
    strided = inputs._replace(gate_up_E2FD=inputs.gate_up_E2FD.mT.contiguous().mT)
    assert "contiguous" in str(experts.grouped_mlp_refusal(*strided))


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("halves", [(64, 256), (128, 128)], ids=str)
@pytest.mark.parametrize(("T", "R", "C"), [(1, 128, 8), (700, 384, 328), (3000, 2816, 2048)])
def test_weight_gradients_copied_multiplied_and_stored_at_once(
    T: int, R: int, C: int, halves: tuple[int, int]
) -> None:
    """Of float64's, but for one rounding and float32 sums; an expert without rows has zeros."""
    E, K = 8, 3
    generator = torch.Generator(DEVICE).manual_seed(0)
    chosen_TK = torch.rand(T, E, generator=generator, device=DEVICE).argsort(-1)[:, :K]
    chosen_TK = chosen_TK.where(chosen_TK != 2, -1)
    groups = permutation.group_by_expert(chosen_TK, E, 128)
    left, right = (torch.randn(T, n, generator=generator, device=DEVICE).to(HALF) for n in (R, C))
    left_PR, right_PC = (permutation.gather_rows(x, chosen_TK, groups) for x in (left, right))
    tile = expert_gradients.Halves(*halves)
    if (refused := expert_gradients.weight_gradient_refusal(left_PR, right_PC, groups, tile)) is not None:
        pytest.skip(refused)
    got_ERC = expert_gradients.weight_gradient(left_PR, right_PC, groups, tile)
    for expert in range(E):
        mine_T = (chosen_TK == expert).any(-1)
        wanted_RC = left[mine_T].double().t() @ right[mine_T].double()
        error = (got_ERC[expert].double() - wanted_RC).norm()
        assert error <= (torch.finfo(HALF).eps / 2 + T**0.5 * 2.0**-24) * wanted_RC.norm()


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 8, 32, 128, 256, 1024])
@pytest.mark.parametrize("dims", [V2_LITE, V3_SLICE], ids=["V2-Lite", "V3 slice"])
def test_real_shapes_in_a_graph(dims: Dims, T: int) -> None:
    """Every bucket of the plan, replayed as a server runs it; a few rows against float64."""
    inputs = _inputs(T, dims, HALF)
    eager_TD = experts.grouped_mlp(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_TD = experts.grouped_mlp(*inputs)
    graph.replay()
    assert torch.equal(eager_TD, y_TD)
    for t in range(0, T, max(1, T // 8)):
        chosen_K = inputs.experts_TK[t]
        row = _rows(inputs, slice(t, t + 1))._replace(
            experts_TK=torch.arange(dims.K, device=DEVICE).unsqueeze(0),
            gate_up_E2FD=inputs.gate_up_E2FD[chosen_K],
            down_EDF=inputs.down_EDF[chosen_K],
        )
        _assert_close(y_TD[t : t + 1], reference.grouped_mlp(*_wide(row)), HALF, terms=dims.D)


@on_gpu
@pytest.mark.gpu
def test_gradients_at_a_real_shape() -> None:
    _assert_equals_reference(_inputs(1000, Dims(8, 2, 2048, 1408), HALF))


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 8, 40, 100, 300, 600, 1000])
def test_a_row_does_not_depend_on_the_bucket(T: int) -> None:
    """Every path adds the products of a row in one order, so a small batch gives what a large one gave."""
    inputs = _inputs(4096, V2_LITE, HALF)
    whole_TD = experts.grouped_mlp(*inputs)
    assert torch.equal(experts.grouped_mlp(*_rows(inputs, slice(T))), whole_TD[:T])


@on_gpu
@pytest.mark.gpu
def test_rows_past_two_billion_elements() -> None:
    inputs = _inputs(37_600, Dims(8, 8, 7168, 64), HALF)
    assert inputs.experts_TK.numel() * 7168 > 2**31
    last = slice(-300, None)
    assert torch.equal(experts.grouped_mlp(*inputs)[last], experts.grouped_mlp(*_rows(inputs, last)))


@on_gpu
@pytest.mark.gpu
def test_training_and_serving_give_the_same_row() -> None:
    """With gradients the gate-up rows are written as well; the output is the same, bit for bit."""
    inputs = _inputs(300, V2_LITE, HALF)
    leaf_TD = inputs.x_TD.clone().requires_grad_()
    trained_TD = experts.grouped_mlp(leaf_TD, *inputs[1:])
    assert trained_TD.requires_grad
    assert torch.equal(trained_TD, experts.grouped_mlp(*inputs))


def test_plans_of_fixed_buckets_fit_the_scan() -> None:
    """A plan that scans serves no more choices than a program scans, and training never scans or streams."""
    for choices in (1, 6, 64, 65, 512, 4096, 100_000):
        plan = expert_plan.choose_plan(choices, 64, 2048, HALF, tma=True, training=False)
        assert (plan.kind == "scan") == (choices <= expert_plan.MAX_SCAN)
        assert expert_plan.choose_plan(choices, 64, 2048, HALF, tma=True, training=True).kind == "tiles"
        assert replace(plan, rows=plan.gate_up.bm) == plan
