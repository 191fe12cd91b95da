"""Laws of a quantised model: it is the model with the weights that the quantised ones stand for.

Float32 sums on both sides, so logits differ as two orders of the same sums do (tests/engine: 1e-4). What the
narrow weights themselves are off by is the law of tests/ops/test_quantised.py.
"""

from __future__ import annotations

from copy import deepcopy
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from shoal.batch import Batch
from shoal.config.families import tiny
from shoal.model.layers import Linear
from shoal.model.lora import add_lora
from shoal.model.moe import Experts
from shoal.model.quantised import (
    KEPT,
    QuantisedExperts,
    QuantisedLinear,
    Scheme,
    check_quant,
    empty,
    is_quantised,
    quantise,
)
from shoal.model.transformer import Transformer
from shoal.ops import quantised as ops

FAMILIES = (
    "deepseek-v3",
    "deepseek-v3.2",
    "deepseek-v2-lite",
    "qwen3-30b-a3b",
    "r1-distill-qwen-1.5b",
    "nsa-27b",
)
SCHEMES = get_args(Scheme)


def _model(family: str) -> Transformer:
    model = Transformer(tiny(family))
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


@torch.no_grad()
def _logits(model: Transformer) -> Tensor:
    ids_T = torch.arange(20) % model.config.vocab_size
    cu_S1 = torch.tensor([0, 12, 20], dtype=torch.int32)
    batch = Batch(ids_T, torch.cat((torch.arange(12), torch.arange(8))), cu_S1, 12)
    return model.logits(model(batch).hidden_TD, batch)


@torch.no_grad()
def _widen(model: Transformer, plain: Transformer) -> Transformer:
    """`plain` with the weights that those of the quantised `model` stand for."""
    for name, module in model.named_modules():
        twin = plain.get_submodule(name)
        if isinstance(module, QuantisedLinear):
            assert isinstance(twin, Linear)
            twin.weight.copy_(ops.dequantise(module.kept("weight"), twin.weight.shape[1]))
        elif isinstance(module, QuantisedExperts):
            assert isinstance(twin, Experts)
            for weight, kept in ((twin.gate_up_proj, "gate_up_proj"), (twin.down_proj, "down_proj")):
                weight.copy_(ops.dequantise(module.kept(kept), weight.shape[-1]).view_as(weight))
    return plain


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantised_model_computes_what_its_weights_stand_for(family: str, scheme: Scheme) -> None:
    model = quantise(_model(family), scheme)
    wide = _widen(model, _model(family))
    assert (_logits(model) - _logits(wide)).abs().max() < 1e-4


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_expert_and_linear_is_quantised_but_those_that_are_read_as_they_are(scheme: Scheme) -> None:
    model = quantise(_model("deepseek-v3.2"), scheme)
    plain = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    assert all(name.split(".")[-1] in KEPT or ".indexer." in name for name in plain)
    assert not any(isinstance(module, Experts) for module in model.modules())
    assert any(isinstance(module, QuantisedExperts) for module in model.modules())
    assert is_quantised(model)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shapes_on_the_meta_device_are_those_of_a_quantised_weight(scheme: Scheme) -> None:
    """What a checkpoint is read into is what quantising would have made."""
    meta = quantise(Transformer(tiny("deepseek-v3"), device="meta"), scheme).state_dict()
    real = quantise(_model("deepseek-v3"), scheme).state_dict()
    assert {name: (t.shape, t.dtype) for name, t in meta.items()} == {
        name: (t.shape, t.dtype) for name, t in real.items()
    }


def test_bytes_are_a_byte_or_half_of_one_a_weight() -> None:
    """V2-Lite's experts: 8 bits and a float32 for 16,384, or 4 bits and 16 for 128."""
    shape = (64, 2, 1408, 2048)
    numbers = 64 * 2 * 1408 * 2048
    sizes = {
        scheme: sum(t.nbytes for t in empty(shape, scheme, torch.device("meta"))) / numbers
        for scheme in SCHEMES
    }
    assert sizes == {"fp8": 1 + 4 / 128**2, "int4": 0.5 + 2 / 128}


def test_what_does_not_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="quant is 'fp4'; it must be fp8 or int4"):
        check_quant("fp4")
    model = quantise(_model("deepseek-v3"), "fp8")
    with pytest.raises(ValueError, match="quantised already"):
        quantise(model, "int4")
    adapted = add_lora(_model("deepseek-v3"), ["o_proj"], 2, 4.0, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"self_attn\.o_proj carries an adapter; merge it"):
        quantise(adapted, "fp8")


def test_the_model_it_came_from_is_gone_and_nothing_learns() -> None:
    model = _model("deepseek-v2-lite")
    before: nn.Module = deepcopy(model)
    quantise(model, "int4")
    assert sum(p.nbytes for p in model.parameters()) < sum(p.nbytes for p in before.parameters()) / 2
    assert not any(
        p.requires_grad for m in model.modules() if isinstance(m, QuantisedLinear) for p in m.parameters()
    )
