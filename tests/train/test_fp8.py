"""Laws of FP8 training: every gradient near the exact one, and a loss that falls as it does without.

How near is measured by what bounds it. An e4m3 rounding is off by 2^-4 of a number at most (what lies below
2^-6 of the scale is off by 2^-10 of it, nothing beside its neighbours: tests/ops/test_quantised.py). So the
exact model is run again with every operand that FP8 rounds off by 2^-4 of itself, up or down by a coin: the
same places, the same products, the same way through the layers, each error at its bound. Its distance from
the exact gradient is the limit. A product that is scaled wrongly, or not at all, is off by its own size.

A rounding's own root mean square is 0.42 of its bound: 2^-4 / m, uniform, for significands m from 1 to 2 as
often as 1 / m. So is the distance, in the mean over tensors. The least have 8 numbers, whose root mean
square strays by 1 / sqrt(16); the mean of all strays by no more, whatever errors they share.
"""

from __future__ import annotations

from dataclasses import replace
from math import log
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoal.config.run import DataConfig, RunConfig, TrainConfig, from_table, to_table
from shoal.model.layers import Linear
from shoal.model.moe import Experts, MoE
from shoal.model.transformer import Transformer
from shoal.ops import quantised as ops
from shoal.train.fp8 import Fp8Grouped, multiply_in_fp8
from shoal.train.loss import NextToken
from shoal.train.objective import Step
from tests.train import parts

CONFIG = replace(parts.config(), num_nextn_predict_layers=0)
OBJECTIVE = NextToken(0, mtp_weight=0.0)


def _loss(model: Transformer, index: int, routing: Tensor | None = None) -> Tensor:
    batch = replace(parts.batch(index), routing=routing)
    return OBJECTIVE.compute(model, batch, Step(0, 1, OBJECTIVE.count([batch]))).total


class _Off(torch.autograd.Function):
    """`fp8_linears` with errors of 2^-4 for its roundings."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, generator: torch.Generator) -> Tensor:
        wrong_NK = _wrong(weight_NK, generator)
        ctx.save_for_backward(x, wrong_NK)
        ctx.generator = generator
        return _wrong(x, generator) @ wrong_NK.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, wrong_NK = ctx.saved_tensors
        return _wrong(dy, ctx.generator) @ wrong_NK, dy.flatten(0, -2).T @ x.flatten(0, -2), None


def _wrong(x: Tensor, generator: torch.Generator) -> Tensor:
    return x * (1 + 2**-4 * (2 * torch.randint(0, 2, x.shape, generator=generator) - 1))


def _multiply_wrongly(model: Transformer, generator: torch.Generator) -> Transformer:
    """As `multiply_in_fp8`, of the same products."""

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = _Off.apply(x, weight, generator)
        return y if bias is None else y + bias

    def grouped(
        x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for expert in experts_TK.unique().tolist():
            token, place = (experts_TK == expert).nonzero(as_tuple=True)
            gate, up = (_Off.apply(x_TD[token], half, generator) for half in gate_up_E2FD[expert].chunk(2))
            rows = _Off.apply(F.silu(gate) * up, down_EDF[expert], generator)
            y_TD = y_TD.index_add(0, token, weights_TK[token, place, None] * rows)
        return y_TD

    for module in model.modules():
        if isinstance(module, Linear) and module is not model.lm_head:
            module.product = product
        elif isinstance(module, Experts):
            module.product = grouped
    return model


def _gradients(model: Transformer, routing: Tensor) -> dict[str, Tensor]:
    _loss(model, 0, routing).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_off_by_less_than_the_bound_of_a_rounding_makes_them() -> None:
    """With the routing of the exact model replayed: a choice that flips is no rounding."""
    exact_model = parts.model(CONFIG)
    with torch.no_grad():
        routing = torch.stack([each.experts_TK for each in exact_model(parts.batch(0)).routing], dim=1)
    exact = _gradients(exact_model, routing)
    narrow = _gradients(multiply_in_fp8(parts.model(CONFIG)), routing)
    draws = [
        _gradients(_multiply_wrongly(parts.model(CONFIG), torch.Generator().manual_seed(seed)), routing)
        for seed in range(4)
    ]
    assert set(narrow) == set(exact) == {name for name, _ in exact_model.named_parameters()}
    ratios = {}
    for name, wanted in exact.items():
        # The root of the mean of squares: of a norm's few numbers one draw may be near by chance.
        limit = torch.stack([(wrong[name] - wanted).norm() for wrong in draws]).square().mean().sqrt()
        ratios[name] = ((narrow[name] - wanted).norm() / limit).item()
    assert max(ratios.values()) < 1, ratios
    assert sum(ratios.values()) / len(ratios) == pytest.approx((8 * log(2)) ** -0.5, rel=0.25)


def test_no_way_of_a_layer_passes_its_experts_product_by() -> None:
    """A layer takes shared and other experts at once where both are plain; here the others are in FP8."""
    model = parts.model(CONFIG)
    layer = next(module for module in model.modules() if isinstance(module, MoE))
    assert layer.shared_experts is not None and layer.shared_experts.matrices() is not None
    x_TD = torch.randn(8, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))
    plain_TD, _ = layer(x_TD, None)
    layer.experts.product = ops.fp8_grouped_mlp
    y_TD, routing = layer(x_TD, None)
    stacks = (layer.experts.gate_up_proj, layer.experts.down_proj)
    wanted_TD = ops.fp8_grouped_mlp(x_TD, routing.experts_TK, routing.weights_TK, *stacks)
    assert torch.equal(y_TD, wanted_TD + layer.shared_experts(x_TD))
    assert not torch.equal(y_TD, plain_TD)


def test_every_product_but_the_head_is_in_fp8() -> None:
    model = multiply_in_fp8(parts.model(parts.config()))
    plain = [name for name, module in model.named_modules() if getattr(module, "product", None) is F.linear]
    assert plain == ["lm_head"]
    grouped = [module.product for module in model.modules() if isinstance(module, Experts)]
    assert grouped and all(isinstance(product, Fp8Grouped) for product in grouped)


def test_the_loss_falls_as_it_does_without() -> None:
    """Four batches learned by heart in 60 steps: nearer to the exact run than another seed's exact run is."""

    def learn(model: Transformer) -> float:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for step in range(60):
            loss = _loss(model, step % 4)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return sum(losses[-8:]) / 8

    exact, other = learn(parts.model(CONFIG)), learn(parts.model(CONFIG, seed=1))
    narrow = learn(multiply_in_fp8(parts.model(CONFIG)))
    assert exact < 3.0  # of ln 50 = 3.9 at the start
    assert abs(narrow - exact) < max(abs(other - exact), 0.02 * exact)


def test_the_recipe_says_it() -> None:
    data = DataConfig(seq_len=16)
    run = RunConfig(model=CONFIG, train=TrainConfig(steps=1), data=data, precision="fp8")
    assert from_table(to_table(run), "here").precision == "fp8"
    with pytest.raises(ValueError, match="precision"):
        from_table(to_table(run) | {"precision": "fp4"}, "here")
