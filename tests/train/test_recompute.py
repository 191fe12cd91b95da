"""Laws of recompute: the same loss and gradients from less memory, and never a second choice."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shoal.config.families import tiny
from shoal.config.model import ModelConfig
from shoal.config.run import Recompute
from shoal.model.transformer import Transformer
from shoal.ops import api as ops
from shoal.train.balance import add_noise
from shoal.train.loss import NextToken
from shoal.train.objective import Step
from shoal.train.recompute import recompute
from tests.train import parts

CONFIGS = {
    "v3": parts.config(),
    "v2": replace(tiny("deepseek-v2"), vocab_size=50),
    "mixtral": replace(tiny("mixtral-8x7b"), vocab_size=50),
    "llama": replace(tiny("llama-3-8b"), vocab_size=50),
}


def backward(model: Transformer, seed: int = 0) -> tuple[float, dict[str, Tensor]]:
    modules = model.config.num_nextn_predict_layers
    objective, pack = NextToken(modules, mtp_weight=0.3, balance_weight=0.1), parts.batch(seed)
    share = objective.compute(model, pack, Step(0, 1, objective.count([pack])))
    share.total.backward()
    return share.total.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("family", CONFIGS)
def test_loss_and_gradients_are_those_of_none_bit_for_bit(mode: Recompute, family: str) -> None:
    cfg = CONFIGS[family]
    loss, grads = backward(parts.model(cfg))
    again, remade = backward(recompute(parts.model(cfg), mode))
    assert loss == again
    assert grads.keys() == remade.keys()
    assert {name for name in grads if not torch.equal(grads[name], remade[name])} == set()


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_frozen_parameters_stay_frozen_and_the_rest_learns_as_ever(mode: Recompute) -> None:
    """With the embedding frozen too, the first block's input wants no gradient."""
    models = parts.model(), recompute(parts.model(), mode)
    for model in models:
        for name, p in model.named_parameters():
            p.requires_grad_("down_proj" in name or "layernorm" in name)
    (loss, grads), (again, remade) = map(backward, models)
    assert loss == again
    assert grads.keys() == remade.keys() == {n for n, p in models[0].named_parameters() if p.requires_grad}
    assert all(torch.equal(grads[name], remade[name]) for name in grads)


class Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.data  # without its graph, which would hold on to itself


def saved_bytes(model: Transformer) -> int:
    """Of tensors that autograd keeps between forward and backward, parameters apart."""
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Kept:
        wrapped = Kept(tensor)
        kept.add(wrapped)
        return wrapped

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda wrapped: wrapped.tensor):
        out = model(parts.batch(0, (64, 64)))
    assert out.hidden_TD.requires_grad
    storages = {w.tensor.untyped_storage().data_ptr(): w.tensor.untyped_storage().nbytes() for w in kept}
    for p in model.parameters():
        storages.pop(p.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def test_each_mode_keeps_less() -> None:
    cfg = parts.config(num_nextn_predict_layers=0)
    modes: list[Recompute] = ["none", "selective", "full"]
    none, selective, full = (saved_bytes(recompute(parts.model(cfg), mode)) for mode in modes)
    assert full < 0.3 * none
    assert full < selective < 0.8 * none


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_router_is_asked_once_and_its_choices_replayed(
    mode: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits moved between the passes, as a near-tie on a GPU may be, change no choice."""
    asked: list[Tensor | None] = []
    chosen: list[Tensor] = []
    true = ops.gate

    def gate(x_TD: Tensor, weight_ED: Tensor, **settings: object) -> ops.Routing:
        replay_TK = settings.get("replay_TK")
        asked.append(replay_TK)  # type: ignore[arg-type]
        if replay_TK is not None:
            x_TD = x_TD + torch.randn(x_TD.shape, generator=torch.Generator().manual_seed(3))
        routing = true(x_TD, weight_ED, **settings)  # type: ignore[arg-type]
        chosen.append(routing.experts_TK)
        return routing

    monkeypatch.setattr(ops, "gate", gate)
    backward(recompute(parts.model(), mode))
    layers = 3
    assert [replay is None for replay in asked] == [True] * layers + [False] * (
        layers - 1 if mode == "full" else 0  # the prediction module's experts are kept
    )
    for first, again in zip(chosen[:layers], reversed(chosen[layers:]), strict=False):
        assert torch.equal(first, again)


def test_recompute_costs_nothing_where_there_is_no_backward() -> None:
    model, pack = recompute(parts.model(), "full"), parts.batch(0)
    with torch.no_grad():
        assert torch.equal(model(pack).hidden_TD, parts.model()(pack).hidden_TD)


def test_a_capacity_with_normalised_weights_is_refused() -> None:
    cfg: ModelConfig = parts.config(num_nextn_predict_layers=0)
    assert cfg.moe is not None
    moe = replace(cfg.moe, capacity_factor=1.25, eval_capacity_factor=2.0)
    with pytest.raises(ValueError, match="would weigh more"):
        recompute(parts.model(replace(cfg, moe=moe)), "full")


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_noise_is_drawn_once_and_made_again(mode: Recompute) -> None:
    results = []
    for kept in ("none", mode):
        generator = torch.Generator().manual_seed(5)
        model = add_noise(parts.model().train(), 0.5, generator)
        recompute(model, kept, [generator])  # type: ignore[arg-type]
        results.append((*backward(model), generator.get_state()))
    (loss, grads, state), (again, remade, after) = results
    assert loss == again
    assert torch.equal(state, after)
    assert all(torch.equal(grads[name], remade[name]) for name in grads)
