"""Laws of the routing and permutation kernels: equal to the reference, with gradients, and nothing lost.

On a GPU the sizes are real; elsewhere Triton's interpreter (TRITON_INTERPRET=1) runs the same on small ones.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from shoal.ops.reference import routing as reference
from shoal.ops.triton import permutation, routing
from tests.ops.parts import DEVICE, GPU, HALF, runs_triton, scalars_in_arrays

pytestmark = [
    runs_triton,
    pytest.mark.usefixtures("poison"),
    scalars_in_arrays,
]


class Rule(NamedTuple):
    E: int
    K: int
    func: str
    groups: tuple[int, int]
    bias: bool
    norm: bool
    scale: float


RULES = {
    "v2-lite": Rule(64, 6, "softmax", (1, 1), bias=False, norm=False, scale=1.0),
    "v2": Rule(160, 6, "softmax", (8, 3), bias=False, norm=False, scale=16.0),
    "v3": Rule(256, 8, "sigmoid", (8, 4), bias=True, norm=True, scale=2.5),
    "mixtral": Rule(8, 2, "softmax", (1, 1), bias=False, norm=True, scale=1.0),
    "odd": Rule(30, 3, "sigmoid", (3, 2), bias=True, norm=True, scale=1.5),
}
TOKENS = (1, 63, 257, 4097) if GPU else (1, 5)


def _inputs(rule: Rule, T: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(T, rule.E, generator=generator).to(DEVICE)
    bias_E = 0.1 * torch.randn(rule.E, generator=generator).to(DEVICE)
    return logits_TE, bias_E if rule.bias else None


def _route(
    route: Callable[..., tuple[Tensor, Tensor, Tensor]],
    logits_TE: Tensor,
    bias_E: Tensor | None,
    rule: Rule,
    replay_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return route(logits_TE, rule.K, rule.func, bias_E, *rule.groups, rule.norm, rule.scale, replay_TK)


def _assert_same_gradient(ours: Tensor, theirs: Tensor, rule: Rule) -> None:
    """Sums of E products of order one, each good to a few ulp of its largest term."""
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=2e-6 * rule.scale)


@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize("name", RULES)
def test_route_equals_reference(name: str, T: int) -> None:
    """A softmax or a sigmoid in float32 is good to a few ulp however it is summed: 1e-5 covers E = 256."""
    rule = RULES[name]
    logits_TE, bias_E = _inputs(rule, T)
    ours, theirs = logits_TE.clone().requires_grad_(), logits_TE.clone().requires_grad_()
    got, wanted = _route(routing.route, ours, bias_E, rule), _route(reference.route, theirs, bias_E, rule)
    assert torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got[1:], wanted[1:], rtol=1e-5, atol=1e-7)
    gradients = torch.randn_like(got[1]), torch.randn_like(got[2])
    for through in ((1, 2), (1,), (2,)):  # weights, scores
        ours.grad = theirs.grad = None
        for out in (got, wanted):
            torch.autograd.backward(
                [out[i] for i in through], [gradients[i - 1] for i in through], retain_graph=True
            )
        _assert_same_gradient(ours, theirs, rule)


@pytest.mark.parametrize("name", ["v2", "v3", "odd"])
def test_ties_go_to_the_smaller_index(name: str) -> None:
    rule = RULES[name]
    logits_TE = torch.zeros(3, rule.E, device=DEVICE)
    logits_TE[1, ::2] = 1.0
    bias_E = torch.zeros(rule.E, device=DEVICE) if rule.bias else None
    got, wanted = (_route(side.route, logits_TE, bias_E, rule)[0] for side in (routing, reference))
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", ["v2-lite", "v3"])
def test_replay_replaces_the_selection_only(name: str) -> None:
    rule = RULES[name]
    logits_TE, bias_E = _inputs(rule, TOKENS[-1])
    replay_TK = _route(reference.route, _inputs(rule, TOKENS[-1], seed=1)[0], bias_E, rule)[0]
    replay_TK[::2, 1] = -1
    ours, theirs = logits_TE.clone().requires_grad_(), logits_TE.clone().requires_grad_()
    got = _route(routing.route, ours, bias_E, rule, replay_TK)
    wanted = _route(reference.route, theirs, bias_E, rule, replay_TK)
    assert torch.equal(got[0], replay_TK)
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-5, atol=1e-7)
    dweights_TK = torch.randn_like(got[1])
    got[1].backward(dweights_TK)
    wanted[1].backward(dweights_TK)
    _assert_same_gradient(ours, theirs, rule)


def test_route_takes_no_tokens() -> None:
    logits_TE = torch.empty(0, 64, device=DEVICE, requires_grad=True)
    experts_TK, weights_TK, _ = _route(routing.route, logits_TE, None, RULES["v2-lite"])
    weights_TK.sum().backward()
    assert experts_TK.shape == (0, 6)
    assert logits_TE.grad is not None


def test_refusals_name_the_limit() -> None:
    logits_TE = torch.zeros(2, 64, device=DEVICE)
    assert routing.route_refusal(logits_TE, 6, "softmax", None, 1, 1, False, 1.0, None) is None
    refusal = routing.route_refusal(logits_TE, 6, "softmax", None, 16, 1, False, 1.0, None)
    assert "top_k is 6" in str(refusal)
    assert "4 experts" in str(refusal)


@pytest.mark.parametrize("capacity", [0, 1, 7, 10_000])
def test_limit_capacity_equals_reference(capacity: int) -> None:
    T, K, E = (1031 if GPU else 37), 4, 11
    experts_TK = torch.randint(-1, E, (T, K), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    wanted_TK = reference.limit_capacity(experts_TK, E, capacity)
    assert torch.equal(routing.limit_capacity(experts_TK, E, capacity), wanted_TK)


CHOICES: dict[str, Callable[[int, int, int, torch.Generator], Tensor]] = {
    "spread": lambda T, K, E, g: torch.randint(0, E, (T, K), generator=g),
    "dropped": lambda T, K, E, g: torch.randint(-1, E, (T, K), generator=g),
    "one expert": lambda T, K, E, g: torch.full((T, K), E - 2),
    "none": lambda T, K, E, g: torch.full((T, K), -1),
}


@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize("T", (1, 63, 257, 3001) if GPU else (1, 63, 1500))
def test_groups_hold_every_choice_once_in_order(choices: str, T: int) -> None:
    """Above and below the size where counting takes a launch of its own."""
    E, K, tile = 13, 3, 16
    experts_TK = CHOICES[choices](T, K, E, torch.Generator().manual_seed(T)).to(DEVICE)
    groups = permutation.group_by_expert(experts_TK, E, tile)
    bounds = groups.first_tile_E1.tolist()
    assert bounds[-1] <= groups.max_tiles
    for expert, (first, last) in enumerate(pairwise(bounds)):
        slots = groups.choices_P[first * tile : last * tile].long()
        wanted_M = (experts_TK.flatten() == expert).nonzero().flatten()
        assert torch.equal(slots[: len(wanted_M)], wanted_M)
        assert (slots[len(wanted_M) :] == -1).all()
        assert slots.numel() - wanted_M.numel() < tile
        assert (groups.experts_N[first:last] == expert).all()
        assert groups.slots_M[wanted_M].tolist() == list(range(first * tile, first * tile + len(wanted_M)))


def test_rows_move_and_add_up() -> None:
    """Gathered rows are copies, and the sum of a token's rows is float32's, cast once."""
    T, K, E, D, tile = 37, 3, 5, 70, 16
    generator = torch.Generator().manual_seed(0)
    experts_TK = torch.randint(-1, E, (T, K), generator=generator).to(DEVICE)
    x_TD = torch.randn(T, D, generator=generator).to(DEVICE, HALF)
    weights_TK = torch.rand(T, K, generator=generator).to(DEVICE)
    groups = permutation.group_by_expert(experts_TK, E, tile)
    slots = int(groups.first_tile_E1[-1]) * tile
    choice_P = groups.choices_P[:slots].long()
    rows_PD = permutation.gather_rows(x_TD, experts_TK, groups)[:slots]
    assert torch.equal(rows_PD[choice_P >= 0], x_TD[choice_P[choice_P >= 0] // K])
    assert not rows_PD[choice_P < 0].any()
    rows_MD = torch.randn(T * K, D, generator=generator).to(DEVICE, HALF)
    kept_MD = rows_MD.float() * (weights_TK.flatten() * (experts_TK.flatten() >= 0)).unsqueeze(1)
    wanted_TD = kept_MD.view(T, K, D)[:, 0]
    for k in range(1, K):
        wanted_TD = wanted_TD + kept_MD.view(T, K, D)[:, k]
    got_TD = permutation.sum_choices(rows_MD, experts_TK, weights_TK)
    # One cast of a float32 sum that may differ in its last bit: half an ulp, and an ulp of the largest term.
    torch.testing.assert_close(got_TD.float(), wanted_TD, rtol=torch.finfo(HALF).eps / 2 + 1e-6, atol=1e-6)
