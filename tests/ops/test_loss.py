"""Laws of the output head with cross-entropy: it is PyTorch's cross-entropy of the whole logits, which it
never holds.

In float64 the two sides differ by roundings of 2^-53 over sums of at most a few hundred terms: within
1e-12 of the scale. Small vocabularies would fit one chunk, so chunks are made small where chunking is the
point.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from shoal.ops import api as ops
from shoal.ops.reference import loss as reference

pytestmark = pytest.mark.usefixtures("poison")

EXACT = 1e-12
DIM, VOCAB = 6, 11


def _inputs(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, targets, weights: the weights of any sign, a third of them 0."""
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(tokens, DIM, dtype=torch.float64, generator=generator)
    weight_VD = torch.randn(VOCAB, DIM, dtype=torch.float64, generator=generator)
    targets_T = torch.randint(0, VOCAB, (tokens,), generator=generator)
    weights_T = torch.randn(tokens, dtype=torch.float64, generator=generator)
    weights_T[::3] = 0
    return hidden_TD.to(dtype), weight_VD.to(dtype), targets_T, weights_T.to(dtype)


def _assert_close(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    if wanted.numel():
        assert (got - wanted).abs().max() <= EXACT * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize("chunk", [1, 10, 1000])
@pytest.mark.parametrize("tokens", [0, 1, 63, 257])
def test_it_is_cross_entropy(tokens: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_CHUNK_ELEMENTS", chunk * VOCAB)
    hidden_TD, weight_VD, targets_T, weights_T = _inputs(tokens)
    leaves = (hidden_TD.requires_grad_(), weight_VD.requires_grad_())
    total, nll_T = ops.linear_cross_entropy(*leaves, targets_T, weights_T)
    got = torch.autograd.grad(total * 0.7, leaves)

    wanted_nll_T = F.cross_entropy(hidden_TD @ weight_VD.t(), targets_T, reduction="none")
    wanted_total = (weights_T * wanted_nll_T).sum()
    wanted = torch.autograd.grad(wanted_total * 0.7, leaves)
    _assert_close(nll_T, wanted_nll_T)
    _assert_close(total, wanted_total)
    for ours, theirs in zip(got, wanted, strict=True):
        _assert_close(ours, theirs)
    assert not nll_T.requires_grad


def test_gradcheck() -> None:
    hidden_TD, weight_VD, targets_T, weights_T = _inputs(5)

    def total(hidden: Tensor, weight: Tensor) -> Tensor:
        return ops.linear_cross_entropy(hidden, weight, targets_T, weights_T).total

    assert gradcheck(total, (hidden_TD.requires_grad_(), weight_VD.requires_grad_()))


@pytest.mark.parametrize("which", [0, 1])
def test_one_side_may_be_frozen(which: int) -> None:
    whole, part = _inputs(63), _inputs(63)
    for leaf in whole[:2]:
        leaf.requires_grad_()
    part[which].requires_grad_()
    ops.linear_cross_entropy(*whole).total.backward()
    ops.linear_cross_entropy(*part).total.backward()
    ours, theirs = part[which].grad, whole[which].grad
    assert ours is not None
    assert theirs is not None
    assert torch.equal(ours, theirs)
    assert part[1 - which].grad is None


def test_narrow_inputs_give_a_float32_loss_and_narrow_gradients() -> None:
    """A logit is a product rounded to bfloat16, off by at most 2^-8 of its size, which here is under 16: a
    token's loss, the difference of a log-sum-exp and a logit, is off by at most twice 2^-4."""
    hidden_TD, weight_VD, targets_T, weights_T = _inputs(63, torch.bfloat16)
    leaves = (hidden_TD.requires_grad_(), weight_VD.requires_grad_())
    total, nll_T = ops.linear_cross_entropy(*leaves, targets_T, weights_T.float())
    assert (total.dtype, nll_T.dtype) == (torch.float32, torch.float32)
    assert [grad.dtype for grad in torch.autograd.grad(total, leaves)] == [torch.bfloat16] * 2
    logits_TV = hidden_TD.double() @ weight_VD.double().t()
    assert logits_TV.abs().max() < 16
    exact_T = F.cross_entropy(logits_TV, targets_T, reduction="none")
    assert (nll_T.double() - exact_T).abs().max() <= 2 * 2.0**-4


def test_huge_logits_overflow_nothing() -> None:
    hidden_TD, weight_VD, targets_T, _ = _inputs(63)
    hidden_TD = (1e30 * hidden_TD).float().requires_grad_()
    ops.linear_cross_entropy(hidden_TD, weight_VD.float(), targets_T, torch.ones(63)).total.backward()
    assert hidden_TD.grad is not None
    assert hidden_TD.grad.isfinite().all()


@pytest.mark.parametrize(("target", "span"), [(-1, "-1 to"), (-100, "-100 to"), (VOCAB, f"to {VOCAB}")])
def test_targets_outside_the_vocabulary_are_refused(target: int, span: str) -> None:
    hidden_TD, weight_VD, targets_T, weights_T = _inputs(63)
    targets_T[0] = target  # a position that does not count is refused too: its gradient would be garbage
    with pytest.raises(ValueError, match=f"{span}.* vocabulary of {VOCAB}"):
        ops.linear_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T)
