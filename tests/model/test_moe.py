"""Laws of the mixture-of-experts layer: every family's rule, written out token by token, gives what the
layer gives.

The literal side runs in float64, the layer in float32: sums of at most 24 terms, four products deep, whose
sizes stay near 1, differ by some tens of units of 2^-24. 1e-5 of the scale is 170 units; another choice of
expert moves a row by its whole size.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.config.model import GQAConfig, ModelConfig, MoEConfig
from shoal.model.moe import MoE
from tests.model import parts

CLOSE = 1e-5
HIDDEN = 10
PLAIN = MoEConfig(n_routed_experts=12, num_experts_per_tok=3, moe_intermediate_size=5)
GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2}
V3 = replace(
    PLAIN,
    **GROUPS,
    n_shared_experts=1,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
)
RULES = {
    "deepseek_moe": replace(PLAIN, n_shared_experts=2),
    "v2_lite": replace(PLAIN, n_shared_experts=2, routed_scaling_factor=1.0),
    "v2": replace(
        PLAIN, **GROUPS, n_shared_experts=2, topk_method="group_limited_greedy", routed_scaling_factor=16.0
    ),
    "v3": V3,
    "moonlight": replace(V3, n_group=1, topk_group=1, routed_scaling_factor=2.446),
    "mixtral": replace(PLAIN, num_experts_per_tok=2, norm_topk_prob=True),
    "olmoe": PLAIN,
    "qwen3": replace(PLAIN, norm_topk_prob=True),
    "switch": replace(PLAIN, num_experts_per_tok=1, capacity_factor=1.25, eval_capacity_factor=2.0),
    "gshard": replace(PLAIN, num_experts_per_tok=2, norm_topk_prob=True, capacity_factor=1.0),
}


def _layer(moe: MoEConfig, dtype: torch.dtype = torch.float32) -> MoE:
    config = ModelConfig("deepseek", 7, HIDDEN, 8, 1, GQAConfig(1, 1, 2), moe=moe)
    layer = MoE(config, moe, device=None, dtype=dtype)
    parts.fill(layer, std=0.5)
    if layer.gate.e_score_correction_bias is not None:  # mostly negative, and enough to turn choices over
        layer.gate.e_score_correction_bias.sub_(0.5)
    return layer.eval()


def _hidden(tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)


def _swiglu(gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, x_D: Tensor) -> Tensor:
    gate_F = gate_FD @ x_D
    return down_DF @ (gate_F / (1 + (-gate_F).exp()) * (up_FD @ x_D))


def _choose(scores: list[float], moe: MoEConfig, bias: list[float]) -> list[int]:
    values = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(values) // moe.n_group

    def group_value(group: int) -> float:
        best = sorted(values[group * size : (group + 1) * size], reverse=True)
        return best[0] + best[1] if moe.topk_method == "noaux_tc" else best[0]

    kept = sorted(range(moe.n_group), key=group_value, reverse=True)[: moe.topk_group]
    allowed = [e for e in range(len(values)) if e // size in kept]
    return sorted(allowed, key=lambda e: values[e], reverse=True)[: moe.num_experts_per_tok]


def _literal(layer: MoE, x_TD: Tensor, capacity: int | None) -> tuple[Tensor, list[list[int]]]:
    """The output, and who served each choice: -1 for nobody."""
    moe = layer.gate.moe
    tensors = {name: tensor.detach().double() for name, tensor in layer.state_dict().items()}
    bias = tensors.get("gate.e_score_correction_bias", torch.zeros(moe.n_routed_experts)).tolist()
    choices, weights = [], []
    for x_D in x_TD.double():
        logits = (tensors["gate.weight"] @ x_D).tolist()
        if moe.scoring_func == "sigmoid":
            scores = [1 / (1 + math.exp(-z)) for z in logits]
        else:
            scores = [math.exp(z) / sum(math.exp(other) for other in logits) for z in logits]
        chosen = _choose(scores, moe, bias)
        divisor = sum(scores[e] for e in chosen) if moe.norm_topk_prob else 1.0
        choices.append(chosen)
        weights.append([scores[e] / divisor * moe.routed_scaling_factor for e in chosen])
    queue = dict.fromkeys(range(moe.n_routed_experts), 0)
    for k in range(moe.num_experts_per_tok):
        for chosen in choices:
            queue[chosen[k]] += 1
            if capacity is not None and queue[chosen[k]] > capacity:
                chosen[k] = -1
    rows = []
    for x_D, chosen, weight in zip(x_TD.double(), choices, weights, strict=True):
        y_D = torch.zeros(HIDDEN, dtype=torch.float64)
        for expert, w in zip(chosen, weight, strict=True):
            if expert >= 0:
                gate_FD, up_FD = tensors["experts.gate_up_proj"][expert].split(moe.moe_intermediate_size)
                y_D += w * _swiglu(gate_FD, up_FD, tensors["experts.down_proj"][expert], x_D)
        if moe.n_shared_experts:
            gate_FD, up_FD, down_DF = (
                tensors[f"shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down")
            )
            y_D += _swiglu(gate_FD, up_FD, down_DF, x_D)
        rows.append(y_D)
    return torch.stack(rows), choices


def _assert_is_literal(layer: MoE, x_TD: Tensor, capacity: int | None) -> int:
    """Returns how many choices were dropped."""
    y_TD, routing = layer(x_TD, None)
    wanted_TD, choices = _literal(layer, x_TD, capacity)
    assert routing.experts_TK.tolist() == choices
    assert (y_TD - wanted_TD).abs().max() <= CLOSE * wanted_TD.abs().max()
    dropped_TK = routing.experts_TK < 0
    assert routing.weights_TK[dropped_TK].eq(0).all()
    return int(dropped_TK.sum())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tokens", [1, 63])
def test_the_layer_is_its_rule(rule: str, tokens: int) -> None:
    moe = replace(RULES[rule], capacity_factor=None, eval_capacity_factor=None)
    _assert_is_literal(_layer(moe), _hidden(tokens), None)


def test_a_step_without_tokens() -> None:
    y_TD, routing = _layer(V3)(_hidden(0), None)
    assert y_TD.shape == (0, HIDDEN)
    assert routing.experts_TK.shape == (0, 3)


def test_shared_experts_are_one_swiglu_of_their_width_together() -> None:
    layer = _layer(RULES["deepseek_moe"])
    assert layer.shared_experts is not None
    assert layer.shared_experts.gate_proj.weight.shape == (2 * 5, HIDDEN)
    assert _layer(PLAIN).shared_experts is None


# --------------------------------------------------------------------------------------------------
# Capacity


@pytest.mark.parametrize("rule", ["switch", "gshard"])
@pytest.mark.parametrize(
    ("tokens", "places"), [(63, {"switch": 7, "gshard": 11}), (5, {"switch": 4, "gshard": 4})]
)
def test_capacity_in_training(rule: str, tokens: int, places: dict[str, int]) -> None:
    """ceil(1.25 * 63 * 1 / 12) = 7, ceil(1.0 * 63 * 2 / 12) = 11, and never fewer than 4. GShard's second
    choices wait for all first ones, and weights are normalised before anything is dropped."""
    layer = _layer(RULES[rule]).train()
    layer.gate.weight.data[3] *= 3  # a favourite, so that there is something to drop
    dropped = _assert_is_literal(layer, _hidden(tokens), places[rule])
    assert dropped or tokens == 5


@pytest.mark.parametrize(("rule", "places"), [("switch", 11), ("gshard", None)])
def test_capacity_outside_training_is_its_own(rule: str, places: int | None) -> None:
    """ceil(2.0 * 63 * 1 / 12) = 11; null never drops."""
    layer = _layer(RULES[rule])
    layer.gate.weight.data[3] *= 3
    dropped = _assert_is_literal(layer, _hidden(63), places)
    assert bool(dropped) == (places is not None)


def test_replay_drops_nothing_of_its_own() -> None:
    layer = _layer(RULES["switch"]).train()
    replay_TK = torch.full((63, 1), 3)
    _, routing = layer(_hidden(63), replay_TK)
    assert torch.equal(routing.experts_TK, replay_TK)


# --------------------------------------------------------------------------------------------------
# The gate in a narrow model, replay, the dispatcher


def test_the_gate_is_float32_in_a_bfloat16_model() -> None:
    layer = _layer(V3, torch.bfloat16)
    gate = layer.gate
    assert gate.e_score_correction_bias is not None
    assert (gate.weight.dtype, gate.e_score_correction_bias.dtype) == (torch.bfloat16, torch.float32)
    x_TD = _hidden(63, torch.bfloat16)
    y_TD, routing = layer(x_TD, None)
    assert (y_TD.dtype, routing.weights_TK.dtype) == (torch.bfloat16, torch.float32)
    exact_TE = (x_TD.double() @ gate.weight.double().t()).sigmoid()
    rounded_TE = (x_TD @ gate.weight.t()).float().sigmoid().double()
    assert (routing.scores_TE - exact_TE).abs().max() <= 1e-6
    assert (rounded_TE - exact_TE).abs().max() > 1e-4


@pytest.mark.parametrize("rule", RULES)
def test_replay_of_its_own_choices_changes_nothing(rule: str) -> None:
    moe = replace(RULES[rule], capacity_factor=None, eval_capacity_factor=None)
    layer, x_TD = _layer(moe), _hidden(63)
    y_TD, routing = layer(x_TD, None)
    again_TD, again = layer(x_TD, routing.experts_TK.int())
    assert torch.equal(y_TD, again_TD)
    assert torch.equal(routing.weights_TK, again.weights_TK)


class _Backwards:
    """Sends tokens to their experts last first, and brings them back."""

    def dispatch(
        self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        return x_TD.flip(0), experts_TK.flip(0), weights_TK.flip(0), x_TD.shape[0]

    def combine(self, y_TD: Tensor, handle: int) -> Tensor:
        assert y_TD.shape[0] == handle
        return y_TD.flip(0)


def test_the_dispatcher_is_a_part() -> None:
    """Expert parallelism passes another one in: what it takes apart it puts together, and the layer is the
    same."""
    layer, x_TD = _layer(V3), _hidden(63)
    wanted_TD, _ = layer(x_TD, None)
    layer.dispatcher = _Backwards()
    y_TD, _ = layer(x_TD, None)
    assert (y_TD - wanted_TD).abs().max() <= CLOSE * wanted_TD.abs().max()
