"""Laws of the expert tools: what ought to change nothing does not, and routers go with their experts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from shoal.analysis.experts import bits_per_byte, choose_best, duplicate, merge, prune, routed, shares
from shoal.batch import Batch
from shoal.config.families import tiny
from shoal.config.model import ModelConfig
from shoal.model.transformer import Transformer

ROUTERS = ["deepseek-v2-lite", "deepseek-v3", "mixtral-8x7b", "olmoe-1b-7b"]


def build(config: ModelConfig | str, seed: int = 0) -> Transformer:
    config = tiny(config) if isinstance(config, str) else config
    model = Transformer(replace(config, initializer_range=0.2, num_nextn_predict_layers=0))
    model.init_weights(torch.Generator().manual_seed(seed))
    return model.eval()


def batch(length: int = 61) -> Batch:
    ids = torch.randint(512, (length + 1,), generator=torch.Generator().manual_seed(1))
    return Batch(
        ids[:-1],
        torch.arange(length),
        torch.tensor([0, length], dtype=torch.int32),
        length,
        targets_T=ids[1:],
        weights_T=torch.ones(length),
    )


def test_bits_per_byte_are_the_mean_log_probability() -> None:
    model, one = build("deepseek-v2-lite"), batch()
    with torch.inference_mode():
        logits = model.logits(model(one).hidden_TD, one)
    assert one.targets_T is not None
    nats = torch.nn.functional.cross_entropy(logits, one.targets_T, reduction="sum").item()
    # Two float32 sums of 61 terms of about 10.
    assert bits_per_byte(model, [one], 100) == pytest.approx(nats / math.log(2) / 100, rel=1e-5)


@pytest.mark.parametrize("family", ROUTERS)
def test_pruning_nobody_is_the_identity(family: str) -> None:
    model, one = build(family), batch()
    moe = model.config.moe
    assert moe is not None
    scores = torch.rand(len(routed(model.config)), moe.n_routed_experts)
    everyone = choose_best(scores, moe.n_routed_experts, moe)
    assert torch.equal(prune(model, everyone)(one).hidden_TD, model(one).hidden_TD)


@pytest.mark.parametrize("family", ["deepseek-v3", "mixtral-8x7b"])
def test_tokens_of_kept_experts_go_where_they_went(family: str) -> None:
    """A batch that used the kept experts alone cannot tell. Weights here are renormalised over the chosen."""
    config = tiny(family)
    assert config.moe is not None
    # One group, so that the router's choice is of experts alone; one layer that routes.
    moe = replace(config.moe, n_group=1, topk_group=1)
    model, one = build(replace(config, moe=moe, num_hidden_layers=moe.first_k_dense_replace + 1)), batch(2)
    used = model(one).routing[0].experts_TK.unique()
    kept = used.unsqueeze(0)
    assert kept.shape[1] < moe.n_routed_experts
    small = prune(model, kept)
    assert small.config.moe is not None
    assert small.config.moe.n_routed_experts == kept.shape[1]
    # The weights' sum is of the same numbers; products run over other stacks: rounding of sums of about 1.
    torch.testing.assert_close(small(one).hidden_TD, model(one).hidden_TD, atol=1e-5, rtol=1e-5)


def test_the_best_are_kept_of_each_group() -> None:
    config = tiny("deepseek-v3")
    assert config.moe is not None
    moe = replace(config.moe, n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4)
    scores = torch.arange(16.0).unsqueeze(0)
    assert choose_best(scores, 8, moe).tolist() == [[2, 3, 6, 7, 10, 11, 14, 15]]
    with pytest.raises(ValueError, match="keep 12"):
        choose_best(scores, 10, moe)
    with pytest.raises(ValueError, match="goes to 4"):
        choose_best(scores, 3, moe)


@pytest.mark.parametrize("family", ["deepseek-v2-lite", "mixtral-8x7b", "olmoe-1b-7b"])
def test_duplicates_compute_the_same(family: str) -> None:
    model, one = build(family), batch()
    twice = duplicate(model, 2)
    # Each product is added in halves: rounding of sums of about 1, through three layers.
    torch.testing.assert_close(twice(one).hidden_TD, model(one).hidden_TD, atol=2e-5, rtol=2e-5)
    moe, more = model.config.moe, twice.config.moe
    assert moe is not None
    assert more is not None
    assert (more.n_routed_experts, more.num_experts_per_tok) == (
        2 * moe.n_routed_experts,
        2 * moe.num_experts_per_tok,
    )


def test_duplicates_of_a_sigmoid_router_share_its_scale() -> None:
    config = tiny("deepseek-v3")
    assert config.moe is not None
    with pytest.raises(ValueError, match="groups"):
        duplicate(build("deepseek-v3"), 2)
    for norm in (True, False):
        moe = replace(config.moe, n_group=1, topk_group=1, norm_topk_prob=norm)
        model, one = build(replace(config, moe=moe)), batch()
        torch.testing.assert_close(
            duplicate(model, 3)(one).hidden_TD, model(one).hidden_TD, atol=2e-5, rtol=2e-5
        )


def test_merging_with_itself_is_the_identity_and_shares_choose() -> None:
    model, other, one = build("deepseek-v2-lite"), build("deepseek-v2-lite", seed=1), batch()
    before = model(one).hidden_TD.clone()
    merge(model, build("deepseek-v2-lite"))
    assert torch.equal(model(one).hidden_TD, before)
    layers = len(routed(model.config))
    assert model.config.moe is not None
    ours = torch.zeros(layers, model.config.moe.n_routed_experts)
    share = shares(ours.clone().fill_(1.0), ours)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merge(model, other, share)
    # other + 1 * (ours - other): a rounding of float32 numbers below 1.
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, kept[name], atol=1e-6, rtol=0)
    merge(model, other, shares(ours, ours.clone().fill_(1.0)))
    name = f"model.layers.{routed(model.config)[0]}.mlp.experts.down_proj"
    assert torch.equal(model.get_parameter(name), other.get_parameter(name))
    assert shares(ours, ours).unique().tolist() == [0.5]
