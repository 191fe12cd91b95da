"""Laws of the auxiliary losses: each equals its paper's formula, in value and gradient.

All but z are 1 for each token where loads are even.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from shoal.config.families import tiny
from shoal.config.run import BalanceConfig
from shoal.ops.api import Routing
from shoal.train.auxiliary import (
    Auxiliary,
    communication_balance,
    device_balance,
    sequence_balance,
    switch_balance,
    z_loss,
)
from tests.train import parts

E, K, D, M = 8, 3, 4, 2
Literal = Callable[[Tensor, Tensor], Tensor]


def literal_device(experts: Tensor, scores: Tensor) -> Tensor:
    """V2 eq. 23-28 of one sequence."""
    T, total = len(experts), scores.new_zeros(())
    f = [E / (K * T) * int((experts == i).sum()) for i in range(E)]
    P = [sum((scores[t, i] / scores[t].sum() for t in range(T)), scores.new_zeros(())) / T for i in range(E)]
    for d in range(D):
        on_d = range(d * E // D, (d + 1) * E // D)
        total = total + sum(f[j] for j in on_d) / len(on_d) * sum((P[j] for j in on_d), scores.new_zeros(()))
    return total


def literal_communication(experts: Tensor, scores: Tensor) -> Tensor:
    """V2 eq. 29-31 of one sequence."""
    T, total = len(experts), scores.new_zeros(())
    for d in range(D):
        on_d = range(d * E // D, (d + 1) * E // D)
        sent = sum(any(int(e) in on_d for e in experts[t]) for t in range(T))
        P = sum((scores[t, j] / scores[t].sum() for t in range(T) for j in on_d), scores.new_zeros(())) / T
        total = total + D / (M * T) * sent * P
    return total


def literal_switch(experts: Tensor, scores: Tensor) -> Tensor:
    """Switch eq. 4-6, over all choices."""
    T, total = len(experts), scores.new_zeros(())
    for i in range(E):
        f = int((experts == i).sum()) / (T * experts.shape[1])
        total = (
            total + E * f * sum((scores[t, i] / scores[t].sum() for t in range(T)), scores.new_zeros(())) / T
        )
    return total


def choose(lengths: tuple[int, ...], *, dropped: bool) -> tuple[Routing, Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    T = sum(lengths)
    logits = torch.randn(T, E, generator=generator, dtype=torch.float64).requires_grad_()
    scores = logits.sigmoid()
    experts = torch.rand(T, E, generator=generator).topk(K).indices
    if dropped:
        experts = torch.where(torch.rand(T, K, generator=generator) < 0.3, -1, experts)
    return Routing(experts, scores.detach(), scores, logits), logits


@pytest.mark.parametrize("lengths", [(1,), (63,), (5, 1, 30)])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("name", ["device", "communication", "switch", "gshard", "z"])
def test_each_is_its_formula_in_value_and_gradient(
    name: str, lengths: tuple[int, ...], dropped: bool
) -> None:
    routing, logits = choose(lengths, dropped=dropped)
    T, scores = sum(lengths), routing.scores_TE
    rows = [slice(a, b) for a, b in pairwise(accumulate(lengths, initial=0))]
    ours = Auxiliary({name: 1.0}, D, M)([routing], parts.sequences(lengths), 1)[0]
    match name:
        case "device" | "communication":
            literal = literal_device if name == "device" else literal_communication
            wanted = sum(
                ((r.stop - r.start) * literal(routing.experts_TK[r], scores[r]) for r in rows),
                scores.new_zeros(()),
            )
        case "switch":
            wanted = T * literal_switch(routing.experts_TK, scores)
        case "gshard":
            wanted = T * literal_switch(routing.experts_TK[:, :1], scores)
        case _:
            wanted = sum((logits[t].exp().sum().log() ** 2 for t in range(T)), scores.new_zeros(()))
    # Float64 sums of at most 63 * 8 terms of order 1: some 500 roundings of 1e-16 each.
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-13)
    grads = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (ours, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-14)
    assert grads[0].any() or dropped or name == "device"


def test_where_all_is_even_each_is_one_for_every_token() -> None:
    """Token t takes experts 2t and 2t + 1: every device and expert has its share, a token one device."""
    experts = torch.arange(16).view(8, 2) % E
    routing = Routing(experts, torch.ones(8, 2), torch.full((8, E), 0.3))
    one = parts.sequences((8,))
    values = [
        sequence_balance(routing, one),
        device_balance(routing, one, D),
        communication_balance(routing, one, D, 1),
        switch_balance(routing, one),
    ]
    assert [value.item() for value in values] == pytest.approx([8.0] * 4, rel=1e-6)


def test_z_needs_the_gates_logits_and_a_gate_gives_them() -> None:
    model, pack = parts.model(), parts.batch(0)
    for routing in model(pack).routing:
        assert routing.logits_TE is not None
        torch.testing.assert_close(routing.logits_TE.sigmoid(), routing.scores_TE)
        assert z_loss(routing) > 0


def test_a_recipe_names_what_is_summed_over_layers() -> None:
    model, pack = parts.model(), parts.batch(0)
    settings = BalanceConfig(sequence_loss=0.1, device_loss=0.05, z_loss=0.001)
    asked = Auxiliary.of(settings, model.config.moe)
    assert asked.devices == model.config.moe.n_group if model.config.moe else False
    routing = model(pack).routing
    total, terms = asked(routing, parts.sequences(parts.LENGTHS), len(routing))
    assert terms.keys() == {"balance", "device", "z"}
    weights = {"balance": 0.1, "device": 0.05, "z": 0.001}
    wanted = sum(weights[name] * float(value) * len(routing) for name, value in terms.items())
    assert total.item() == pytest.approx(wanted, rel=1e-5)
    assert Auxiliary.of(settings, None).weights == {}


def test_devices_must_divide_the_experts() -> None:
    moe = tiny("deepseek-v3").moe
    assert moe is not None
    for devices, groups in ((3, 1), (0, 1)):
        config = replace(moe, n_group=groups, topk_group=groups)
        with pytest.raises(ValueError, match=r"balance\.devices"):
            Auxiliary.of(BalanceConfig(device_loss=0.05, devices=devices), config)
