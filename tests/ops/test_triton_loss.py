"""Laws of the fused output head and cross-entropy: the reference's values and gradients, in any chunks.

In float32 both sides differ from float64 by sums of D and V terms: sqrt(n) 2^-23 of the terms' size. In
narrow dtypes a logit is a product rounded to u = 2^-8 of its size, here under 16, which moves a loss by at
most twice that; a probability by as much of itself, and the gradients, sums over many, by 2 u of their norm
and the rounding of p - onehot, u more, with one for the weight of the token and one for the result.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.ops.triton import loss
from tests.ops.parts import DEVICE, GPU, HALF, on_gpu, runs_triton, scalars_in_arrays

pytestmark = [
    runs_triton,
    pytest.mark.usefixtures("poison"),
    scalars_in_arrays,
]
DIM, VOCAB = (96, 20_011) if GPU else (12, 301)
ROWS = (0, 1, 63, 257) if GPU else (0, 1, 7)


def _inputs(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(tokens, DIM, generator=generator)
    weight_VD = 2 * torch.randn(VOCAB, DIM, generator=generator) / DIM**0.5
    targets_T = torch.randint(0, VOCAB, (tokens,), generator=generator)
    weights_T = torch.randn(tokens, generator=generator)
    weights_T[::3] = 0
    hidden_TD, weight_VD = hidden_TD.to(DEVICE, dtype), weight_VD.to(DEVICE, dtype)
    return hidden_TD, weight_VD, targets_T.to(DEVICE), weights_T.to(DEVICE)


@pytest.mark.parametrize("rows_of_a_chunk", [1, 5, 1000])
@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", ROWS)
def test_values_and_gradients_equal_cross_entropy(
    tokens: int, dtype: torch.dtype, rows_of_a_chunk: int
) -> None:
    inputs = _inputs(tokens, dtype)
    leaves = [x.clone().requires_grad_() for x in inputs[:2]]
    chunk_bytes = rows_of_a_chunk * VOCAB * dtype.itemsize
    hidden_TD, weight_VD = leaves
    total, nll_T = loss.linear_cross_entropy(hidden_TD, weight_VD, *inputs[2:], chunk_bytes=chunk_bytes)
    got = torch.autograd.grad(total * 0.7, leaves)

    wide = [x.detach().double().requires_grad_() for x in inputs[:2]]
    logits_TV = wide[0] @ wide[1].t()
    wanted_T = F.cross_entropy(logits_TV, inputs[2], reduction="none")
    wanted_total = (inputs[3] * wanted_T).sum()
    wanted = torch.autograd.grad(wanted_total * 0.7, wide)
    unit = torch.finfo(dtype).eps / 2 if dtype == HALF else 0.0
    rounding = 2.0**-23 * (DIM**0.5 + 4)
    assert (total.dtype, nll_T.dtype) == (torch.float32, torch.float32)
    assert not nll_T.requires_grad
    if tokens:
        assert logits_TV.abs().max() < 16
        assert (nll_T.double() - wanted_T).abs().max() <= 2 * 16 * (unit + rounding)
        scale = inputs[3].abs().sum()
        assert (total.double() - wanted_total).abs() <= 2 * 16 * (unit + rounding) * scale
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == dtype
        assert ours.shape == theirs.shape
        assert (ours.double() - theirs).norm() <= (5 * unit + 2.0**-18) * theirs.norm()


@pytest.mark.parametrize("which", [0, 1])
def test_one_side_may_be_frozen(which: int) -> None:
    whole, part = _inputs(ROWS[-1], HALF), _inputs(ROWS[-1], HALF)
    for leaf in whole[:2]:
        leaf.requires_grad_()
    part[which].requires_grad_()
    loss.linear_cross_entropy(*whole)[0].backward()
    loss.linear_cross_entropy(*part)[0].backward()
    ours, theirs = part[which].grad, whole[which].grad
    assert ours is not None
    assert theirs is not None
    assert torch.equal(ours, theirs)
    assert part[1 - which].grad is None


def test_scoring_keeps_the_logits_and_makes_no_gradient() -> None:
    inputs = _inputs(ROWS[-1], HALF)
    inputs[1].requires_grad_()
    with torch.no_grad():
        total, nll_T = loss.linear_cross_entropy(*inputs)
    trained_total, trained_T = loss.linear_cross_entropy(*inputs)
    assert not total.requires_grad
    assert trained_total.requires_grad
    assert torch.equal(nll_T, trained_T)


def test_huge_logits_overflow_nothing_and_a_wrong_target_shows() -> None:
    hidden_TD, weight_VD, targets_T, _ = _inputs(7, torch.float32)
    weights_T = torch.ones(7, device=DEVICE)
    hidden_TD = (1e30 * hidden_TD).requires_grad_()
    loss.linear_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T)[0].backward()
    assert hidden_TD.grad is not None
    assert hidden_TD.grad.isfinite().all()
    targets_T[3], targets_T[4] = -1, VOCAB
    _, nll_T = loss.linear_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T)
    assert nll_T.isnan().tolist() == [False] * 3 + [True] * 2 + [False] * 2


def test_a_chunk_is_worth_its_pass_over_the_sums() -> None:
    mib = 2**20
    sizes = [loss.chunk_of(weight * mib) // mib for weight in (1, 128, 400, 512, 4096)]
    assert sizes == [512, 512, 1600, 2048, 4096]


def test_refusals_name_the_value() -> None:
    inputs = _inputs(3, HALF)
    assert loss.linear_cross_entropy_refusal(*inputs) is None
    assert "float64" in str(loss.linear_cross_entropy_refusal(inputs[0].double(), *inputs[1:]))
    assert "float32" in str(loss.linear_cross_entropy_refusal(inputs[0], inputs[1].float(), *inputs[2:]))


@pytest.mark.gpu
@on_gpu
def test_a_real_vocabulary_in_a_tenth_of_eagers_memory() -> None:
    """V3's vocabulary and 4096 tokens, where the logits in float32 alone are 2.1 GB."""
    T, V, D = 4096, 129_280, 512
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden_TD = torch.randn(T, D, device=DEVICE, generator=generator).to(HALF).requires_grad_()
    weight_VD = (torch.randn(V, D, device=DEVICE, generator=generator) / D**0.5).to(HALF).requires_grad_()
    targets_T = torch.randint(0, V, (T,), device=DEVICE, generator=generator)
    weights_T = torch.ones(T, device=DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    total, nll_T = loss.linear_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T)
    peak = torch.cuda.max_memory_allocated() - before
    sums = V * D * (4 + 2)
    assert peak <= loss.CHUNK_BYTES + sums + 64 * 2**20
    total.backward()
    logits_TV = hidden_TD.detach().float() @ weight_VD.detach().float().t()
    wanted_T = F.cross_entropy(logits_TV, targets_T, reduction="none")
    assert (nll_T - wanted_T).abs().max() <= 2 * 16 * torch.finfo(HALF).eps / 2
    dlogits_TV = logits_TV.softmax(-1)
    dlogits_TV[torch.arange(T, device=DEVICE), targets_T] -= 1
    for leaf, wanted in (
        (hidden_TD, dlogits_TV @ weight_VD.float()),
        (weight_VD, dlogits_TV.t() @ hidden_TD.float()),
    ):
        assert leaf.grad is not None
        assert (leaf.grad.float() - wanted).norm() <= 5 * torch.finfo(HALF).eps / 2 * wanted.norm()
