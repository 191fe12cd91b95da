"""Laws of the router's product: float32 logits and gradients of narrow operands, whatever the batch.

Products of narrow numbers are exact in float32; a sum of D terms on the tensor cores is good to sqrt(D) 2^-23
of the terms' size (they may cut instead of round, so twice a float32 sum's). A gradient is one rounding to
the operand's dtype of such a sum over three parts that hold the float32 gradient to 2^-24.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shoal.ops.triton import gate
from tests.ops.parts import DEVICE, GPU, HALF, runs_triton, scalars_in_arrays

pytestmark = [
    runs_triton,
    pytest.mark.usefixtures("poison"),
    scalars_in_arrays,
]
SHAPES = ((64, 2048), (256, 7168), (160, 5120), (30, 1000)) if GPU else ((5, 300),)
ROWS = (0, 1, 63, 257, 515) if GPU else (0, 1, 17)


def _inputs(T: int, E: int, D: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(T, D, generator=generator)
    weight_ED = torch.randn(E, D, generator=generator) / D**0.5
    return x_TD.to(DEVICE, HALF), weight_ED.to(DEVICE, HALF)


@pytest.mark.parametrize(("E", "D"), SHAPES)
@pytest.mark.parametrize("T", ROWS)
def test_logits_and_gradients_are_float32s(T: int, E: int, D: int) -> None:
    x_TD, weight_ED = (x.requires_grad_() for x in _inputs(T, E, D))
    logits_TE = gate.gate_logits(x_TD, weight_ED)
    dlogits_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    dx_TD, dweight_ED = torch.autograd.grad(logits_TE, (x_TD, weight_ED), dlogits_TE)
    x, weight, dlogits = x_TD.detach().double(), weight_ED.detach().double(), dlogits_TE.double()
    assert logits_TE.dtype == torch.float32
    for got, wanted, terms, narrow in (
        (logits_TE, x @ weight.t(), D, False),
        (dx_TD, dlogits @ weight, E, True),
        (dweight_ED, dlogits.t() @ x, T, True),
    ):
        assert got.shape == wanted.shape
        if not wanted.numel():
            continue
        scale = max(1.0, float(wanted.abs().max()))
        limit = scale * (terms**0.5 * 2.0**-23 + 2.0**-21 + (torch.finfo(HALF).eps / 2 if narrow else 0.0))
        assert (got.double() - wanted).abs().max() <= limit


@pytest.mark.parametrize(("E", "D"), SHAPES)
def test_a_row_does_not_depend_on_its_batch(E: int, D: int) -> None:
    """Few tokens, a program for each chunk; many, one for all: the same bits."""
    T = 1000 if GPU else 520
    x_TD, weight_ED = _inputs(T, E, D)
    whole_TE = gate.gate_logits(x_TD, weight_ED)
    for few in (1, 16, 17, 512, 513) if GPU else (1, 17):
        assert torch.equal(gate.gate_logits(x_TD[:few], weight_ED), whole_TE[:few])


def test_three_narrow_numbers_hold_a_float32() -> None:
    """float16 has no numbers below 2^-24, and the interpreter truncates to bfloat16: 2^-7 cubed, of 4 at
    most.
    """
    x_TE = torch.randn(100, 7, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for dtype in (torch.bfloat16, torch.float16):
        thirds_TX = gate.split_in_three(x_TE, dtype)
        assert thirds_TX.dtype == dtype
        error = thirds_TX.double().view(100, 3, 7).sum(1) - x_TE.double()
        assert error.abs().max() <= 4 * (2.0**-24 if GPU or dtype == torch.float16 else 2.0**-21)


def test_refusals_name_the_value() -> None:
    x_TD, weight_ED = _inputs(3, 4, 8)
    assert gate.gate_logits_refusal(x_TD, weight_ED) is None
    assert "float32" in str(gate.gate_logits_refusal(x_TD.float(), weight_ED.float()))
    assert "float32" in str(gate.gate_logits_refusal(x_TD, weight_ED.float()))
    assert "contiguous" in str(gate.gate_logits_refusal(x_TD, weight_ED.t()))
