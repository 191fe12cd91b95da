"""Laws of the router: scores, selection and weights equal DeepSeek-V2 eq. 20-22 and V3 eq. 12-16, token by
token.

Logits and biases lie on a coarse grid, so exact ties are everywhere. Selection is held to the float32
scores that the op itself returns, so it must agree without tolerance; scores and weights are held to
float64, where a softmax or a sigmoid in float32 is good to a few units of 2^-24 and a weight to a few
more: 2e-6 of the value leaves room for 30.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.ops import api as ops
from shoal.ops.api import Routing

CLOSE = 2e-6
SIZES = [0, 1, 63, 257]
EXPERTS = 12
# Each family's rule, in small: (top_k, settings of the op, whether there is a bias).
RULES: dict[str, tuple[int, dict[str, Any], bool]] = {
    "deepseek_moe": (6, {"scoring_func": "softmax"}, False),
    "mixtral": (2, {"scoring_func": "softmax", "norm_topk_prob": True}, False),
    "switch": (1, {"scoring_func": "softmax"}, False),
    "v2": (
        3,
        {"scoring_func": "softmax", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
        False,
    ),
    "v3": (
        4,
        {
            "scoring_func": "sigmoid",
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
        True,
    ),
    "moonlight": (
        6,
        {"scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.446},
        True,
    ),
    "every expert": (EXPERTS, {"scoring_func": "sigmoid"}, False),
}
rules = pytest.mark.parametrize("rule", RULES)


def _logits(tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-12, 13, (tokens, EXPERTS), generator=generator) / 4.0


def _bias(seed: int = 1) -> Tensor:
    """Strong enough to turn choices over, and negative enough that score + bias often is."""
    return torch.randint(-8, 3, (EXPERTS,), generator=torch.Generator().manual_seed(seed)) / 8.0


def _route(logits_TE: Tensor, rule: str, replay_TK: Tensor | None = None) -> Routing:
    top_k, settings, biased = RULES[rule]
    return ops.route(logits_TE, top_k, bias_E=_bias() if biased else None, replay_TK=replay_TK, **settings)


def _scores(logits: list[float], scoring_func: str) -> list[float]:
    if scoring_func == "sigmoid":
        return [1 / (1 + math.exp(-z)) for z in logits]
    total = sum(math.exp(z) for z in logits)
    return [math.exp(z) / total for z in logits]


def _chosen(
    scores: list[np.float32], bias: list[np.float32] | None, top_k: int, n_group: int = 1, topk_group: int = 1
) -> list[int]:
    """The choice for one token, in float32 as the contract has it."""
    values = scores if bias is None else [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(values) // n_group
    groups = [range(g * size, (g + 1) * size) for g in range(n_group)]

    def group_value(group: range) -> np.float32:
        best_first = sorted((values[e] for e in group), reverse=True)
        return best_first[0] if bias is None else best_first[0] + best_first[1]

    kept = sorted(range(n_group), key=lambda g: (-group_value(groups[g]), g))[:topk_group]
    allowed = [e for g in kept for e in groups[g]]
    return sorted(allowed, key=lambda e: (-values[e], e))[:top_k]


@rules
@pytest.mark.parametrize("tokens", SIZES)
def test_route_is_its_equations(tokens: int, rule: str) -> None:
    top_k, settings, biased = RULES[rule]
    logits_TE = _logits(tokens)
    routing = _route(logits_TE, rule)
    assert routing.experts_TK.shape == routing.weights_TK.shape == (tokens, top_k)
    assert (routing.experts_TK.dtype, routing.weights_TK.dtype) == (torch.int64, torch.float32)
    bias = list(_bias().numpy()) if biased else None
    limits = {name: settings[name] for name in ("n_group", "topk_group") if name in settings}
    for token in range(tokens):
        scores = _scores(logits_TE[token].tolist(), settings["scoring_func"])
        assert routing.scores_TE[token].tolist() == pytest.approx(scores, rel=CLOSE)

        experts = routing.experts_TK[token].tolist()
        assert experts == _chosen(list(routing.scores_TE[token].numpy()), bias, top_k, **limits)

        weights = [scores[e] for e in experts]
        if settings.get("norm_topk_prob"):
            weights = [w / sum(weights) for w in weights]
        weights = [w * settings.get("routed_scaling_factor", 1.0) for w in weights]
        assert routing.weights_TK[token].tolist() == pytest.approx(weights, rel=CLOSE)


@rules
def test_route_gradients(rule: str) -> None:
    """Against autograd through the equations in float64, for given choices: weights and scores both lead
    back."""
    _, settings, _ = RULES[rule]
    logits_TE = _logits(63).requires_grad_()
    routing = _route(logits_TE, rule)
    generator = torch.Generator().manual_seed(2)
    dweights_TK = torch.randn(routing.weights_TK.shape, generator=generator)
    dscores_TE = torch.randn(routing.scores_TE.shape, generator=generator)
    (got_TE,) = torch.autograd.grad(
        [routing.weights_TK, routing.scores_TE], logits_TE, [dweights_TK, dscores_TE]
    )

    wide_TE = logits_TE.detach().double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for token, experts in enumerate(routing.experts_TK.tolist()):
        z = wide_TE[token]
        scores = 1 / (1 + (-z).exp()) if settings["scoring_func"] == "sigmoid" else z.exp() / z.exp().sum()
        chosen = [scores[e] for e in experts]
        divisor = sum(chosen) if settings.get("norm_topk_prob") else 1.0
        for k, score in enumerate(chosen):
            weight = score / divisor * settings.get("routed_scaling_factor", 1.0)
            total = total + weight * dweights_TK[token, k]
        total = total + (scores * dscores_TE[token]).sum()
    (wanted_TE,) = torch.autograd.grad(total, wide_TE)
    # Products of scores cancel: the error is of the scale of the largest gradient, not of each.
    assert (got_TE - wanted_TE).abs().max() <= CLOSE * wanted_TE.abs().max()


def test_ties_go_to_the_smaller_index() -> None:
    flat_TE = torch.zeros(5, EXPERTS)
    for rule, (top_k, _, biased) in RULES.items():
        if not biased:
            assert _route(flat_TE, rule).experts_TK.tolist() == [list(range(top_k))] * 5


def test_an_excluded_group_stays_excluded_when_every_biased_score_is_negative() -> None:
    """Masking with 0 instead of -inf would put the excluded experts above all others."""
    logits_TE = torch.tensor([[2.0, 1.0, -1.0, -2.0]])
    routing = ops.route(
        logits_TE,
        2,
        scoring_func="sigmoid",
        bias_E=torch.tensor([-3.0, -3.0, -2.5, -2.5]),
        n_group=2,
        topk_group=1,
    )
    # Biased scores: -2.12, -2.27 | -2.23, -2.38. The first group sums to -4.39, the second to -4.61.
    assert routing.experts_TK.tolist() == [[0, 1]]


def test_groups_are_valued_by_maximum_or_with_a_bias_by_their_best_two() -> None:
    logits_TE = torch.tensor([[3.0, -3.0, 1.0, 1.0]])
    settings: dict[str, Any] = {"scoring_func": "sigmoid", "n_group": 2, "topk_group": 1}
    assert ops.route(logits_TE, 1, **settings).experts_TK.tolist() == [[0]]
    assert ops.route(logits_TE, 1, bias_E=torch.zeros(4), **settings).experts_TK.tolist() == [[2]]


def test_the_bias_selects_and_no_more() -> None:
    bias_E = torch.tensor([-9.0] * 6 + [0.0] * 6).requires_grad_()
    logits_TE = _logits(63).requires_grad_()
    routing = ops.route(logits_TE, 3, scoring_func="sigmoid", bias_E=bias_E)
    assert int(routing.experts_TK.min()) >= 6
    assert torch.equal(routing.weights_TK, routing.scores_TE.gather(1, routing.experts_TK))
    routing.weights_TK.sum().backward()
    assert bias_E.grad is None
    assert logits_TE.grad is not None


@rules
def test_replay_gives_the_same_weights_and_gradients(rule: str) -> None:
    first_TE, again_TE = _logits(63).requires_grad_(), _logits(63).requires_grad_()
    first = _route(first_TE, rule)
    again = _route(again_TE, rule, replay_TK=first.experts_TK.int())
    for recorded, replayed in zip(first[:3], again[:3], strict=True):
        assert torch.equal(recorded, replayed)
    slope_TK = torch.randn(first.weights_TK.shape, generator=torch.Generator().manual_seed(3))
    (first.weights_TK * slope_TK).sum().backward()
    (again.weights_TK * slope_TK).sum().backward()
    assert first_TE.grad is not None
    assert again_TE.grad is not None
    assert torch.equal(first_TE.grad, again_TE.grad)


def test_replay_takes_any_choice_and_weighs_a_dropped_one_by_nothing() -> None:
    logits_TE = _logits(3).requires_grad_()
    replay_TK = torch.tensor([[11, 0], [-1, 5], [-1, -1]])
    routing = ops.route(logits_TE, 2, scoring_func="sigmoid", norm_topk_prob=True, replay_TK=replay_TK)
    assert torch.equal(routing.experts_TK, replay_TK)
    assert routing.weights_TK.sum(1).tolist() == pytest.approx([1, 1, 0])
    assert routing.weights_TK[replay_TK < 0].eq(0).all()
    routing.weights_TK[2].sum().backward()
    assert logits_TE.grad is not None
    assert logits_TE.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_route_refuses_logits_that_are_not_float32(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=str(dtype)):
        ops.route(_logits(3).to(dtype), 2, scoring_func="softmax")


@pytest.mark.parametrize("top_k", [-1, 0, EXPERTS + 1])
def test_route_refuses_an_impossible_top_k(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k is {top_k}; .* 12 experts"):
        ops.route(_logits(3), top_k, scoring_func="softmax")


# --------------------------------------------------------------------------------------------------
# Capacity


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("capacity", [0, 1, 4, 1000])
def test_capacity_is_a_queue_at_every_expert(tokens: int, capacity: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    experts_TK = torch.randint(-1, 5, (tokens, 3), generator=generator)
    served = dict.fromkeys(range(5), 0)
    wanted = [[-1] * 3 for _ in range(tokens)]
    for choice in range(3):
        for token in range(tokens):
            expert = int(experts_TK[token, choice])
            if expert >= 0 and served[expert] < capacity:
                served[expert] += 1
                wanted[token][choice] = expert
    got_TK = ops.limit_capacity(experts_TK, 5, capacity)
    assert (got_TK.shape, got_TK.dtype) == (experts_TK.shape, torch.int64)
    assert got_TK.tolist() == wanted
