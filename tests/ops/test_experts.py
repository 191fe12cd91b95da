"""Laws of the routed experts: y_t = sum_k w_tk down_e(silu(gate_e x_t) * up_e x_t), one token and one
choice at a time.

In float64 the two sides differ by roundings of 2^-53 over sums of at most a few hundred terms: within
1e-12 of the scale, gradients included. In a narrow dtype with unit roundoff u, a result passes through at
most six roundings, of independent sign, so the relative error of a tensor stays under sqrt(6) u < 2.5 u.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from shoal.ops import api as ops

pytestmark = pytest.mark.usefixtures("poison")

EXACT = 1e-12
EXPERTS, TOP_K, DIM, WIDTH = 5, 3, 6, 7
CHOICES = {
    "random": lambda tokens: torch.rand(tokens, EXPERTS, generator=_generator()).argsort(-1)[:, :TOP_K],
    "some dropped": lambda tokens: torch.randint(-1, EXPERTS, (tokens, TOP_K), generator=_generator()),
    "all dropped": lambda tokens: torch.full((tokens, TOP_K), -1),
    "all on one": lambda tokens: torch.full((tokens, TOP_K), 3),
    "last never asked": lambda tokens: torch.randint(0, EXPERTS - 1, (tokens, TOP_K), generator=_generator()),
}
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _inputs(tokens: int, choices: str = "random") -> Inputs:
    """x, experts, weights, gate_up, down: of unit size throughout, in float64."""
    generator = _generator(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return (
        random(tokens, DIM),
        CHOICES[choices](tokens),
        random(tokens, TOP_K),
        random(EXPERTS, 2 * WIDTH, DIM) / math.sqrt(DIM),
        random(EXPERTS, DIM, WIDTH) / math.sqrt(WIDTH),
    )


def _differentiable(inputs: Inputs, dtype: torch.dtype = torch.float64) -> Inputs:
    x, experts, *rest = inputs
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, *rest)]
    return leaves[0], experts, leaves[1], leaves[2], leaves[3]


def _literal(inputs: Inputs) -> Tensor:
    x_TD, experts_TK, weights_TK, gate_up_E2FD, down_EDF = inputs
    rows = []
    for token, experts in enumerate(experts_TK.tolist()):
        y_D = 0 * x_TD[token]
        for choice, expert in enumerate(experts):
            if expert < 0:
                continue
            gate_F = gate_up_E2FD[expert, :WIDTH] @ x_TD[token]
            up_F = gate_up_E2FD[expert, WIDTH:] @ x_TD[token]
            hidden_F = gate_F / (1 + (-gate_F).exp()) * up_F
            y_D = y_D + weights_TK[token, choice] * (down_EDF[expert] @ hidden_F)
        rows.append(y_D)
    return torch.stack(rows) if rows else 0 * x_TD


def _outcome(y_TD: Tensor, inputs: Inputs, dy_TD: Tensor) -> list[Tensor]:
    """The output, then the gradient of everything that has one."""
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    grads = torch.autograd.grad(y_TD, leaves, dy_TD, allow_unused=True, materialize_grads=True)
    return [y_TD.detach(), *grads]


@pytest.mark.parametrize(
    ("tokens", "choices"),
    [*((tokens, choices) for tokens in (0, 1, 63) for choices in CHOICES), (257, "random")],
)
def test_grouped_mlp_is_its_formula(tokens: int, choices: str) -> None:
    got_from, wanted_from = (_differentiable(_inputs(tokens, choices)) for _ in range(2))
    dy_TD = torch.randn(tokens, DIM, dtype=torch.float64, generator=_generator(2))
    got = _outcome(ops.grouped_mlp(*got_from), got_from, dy_TD)
    wanted = _outcome(_literal(wanted_from), wanted_from, dy_TD)
    for ours, literal in zip(got, wanted, strict=True):
        assert ours.shape == literal.shape
        if literal.numel():
            assert (ours - literal).abs().max() <= EXACT * literal.abs().max().clamp(min=1)


@pytest.mark.parametrize("choices", CHOICES)
def test_gradcheck(choices: str) -> None:
    assert gradcheck(ops.grouped_mlp, _differentiable(_inputs(4, choices)), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_round_six_times(dtype: torch.dtype) -> None:
    """Weights stay float32 beside narrow rows; each gradient comes in the dtype of what it belongs to."""
    narrow = _differentiable(_inputs(257, "some dropped"), dtype)
    narrow = (*narrow[:2], narrow[2].detach().float().requires_grad_(), *narrow[3:])
    wide = _differentiable(narrow)
    dy_TD = torch.randn(257, DIM, generator=_generator(2)).to(dtype)
    got = _outcome(ops.grouped_mlp(*narrow), narrow, dy_TD)
    wanted = _outcome(ops.grouped_mlp(*wide), wide, dy_TD.double())
    assert [tensor.dtype for tensor in got] == [dtype, dtype, torch.float32, dtype, dtype]
    for ours, exact in zip(got, wanted, strict=True):
        unit = torch.finfo(dtype).eps / 2
        # Float32 also adds up as many as 257 terms, each sum good to about 16 units of its own.
        limit = 2.5 * unit + 16 * 2.0**-24
        assert (ours.double() - exact).norm() <= limit * exact.norm()


def test_the_sum_over_choices_is_rounded_once() -> None:
    """1 + 2^-8 + 2^-8, one expert each: bfloat16 would lose every term after the first."""
    x_TD = torch.ones(1, 1, dtype=torch.bfloat16)
    gate_up_E2FD = torch.full((3, 2, 1), 32.0, dtype=torch.bfloat16)  # silu(32) * 32 = 1024, to rounding
    down_EDF = torch.full((3, 1, 1), 2.0**-10, dtype=torch.bfloat16)
    weights_TK = torch.tensor([[1.0, 2.0**-8, 2.0**-8]])
    y_TD = ops.grouped_mlp(x_TD, torch.tensor([[0, 1, 2]]), weights_TK, gate_up_E2FD, down_EDF)
    assert y_TD.item() == 1 + 2.0**-7


def test_swiglu_is_recomputed_not_stored() -> None:
    """Kept for the backward pass: the inputs, the gate-up rows, and where each row lies."""
    inputs = _differentiable(_inputs(63))
    kept: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        ops.grouped_mlp(*inputs)
    rows = 63 * TOP_K
    assert sum(kept.values()) <= sum(tensor.numel() for tensor in inputs) + rows * (2 * WIDTH + 1)


@pytest.mark.parametrize("inner", [8, 7], ids=["whole 16 bytes", "ragged"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 63, 65])
def test_without_gradients_the_result_is_the_same(tokens: int, inner: int) -> None:
    """Serving takes other paths, by size and by what torch's grouped product accepts."""
    generator = torch.Generator().manual_seed(tokens)
    experts, top_k, hidden = 6, 3, 16
    x = torch.randn(tokens, hidden, generator=generator)
    chosen = torch.stack(
        [torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)] or [torch.empty(top_k)]
    )
    chosen = chosen[:tokens].long()
    chosen[::2, 1] = -1
    weights = torch.rand(tokens, top_k, generator=generator)
    gate_up = torch.randn(experts, 2 * inner, hidden, generator=generator)
    down = torch.randn(experts, hidden, inner, generator=generator)
    trained = ops.grouped_mlp(x, chosen, weights, gate_up.requires_grad_(), down)
    with torch.no_grad():
        served = ops.grouped_mlp(x, chosen, weights, gate_up, down)
    # The same products in float32, summed in other orders: some 1e-6 of values up to about 100.
    torch.testing.assert_close(served, trained.detach(), atol=1e-4, rtol=1e-5)
