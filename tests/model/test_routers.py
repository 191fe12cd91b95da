"""Laws of the rules that are there to be compared with: hash, expert choice, expert then segments.

Each is its definition written out, learns, and is a function of what it may see. Float32 against float64, as
in test_moe.py: 1e-5 is 170 units of 2^-24.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shoal.config.families import tiny
from shoal.config.model import MoEConfig
from shoal.engine import Engine, EngineSettings
from shoal.model.moe import Gate, MoE, choose_segments, choose_tokens, hash_experts, join_segments
from shoal.model.transformer import Transformer
from shoal.ops import api as ops
from tests.model import parts

CLOSE = 1e-5
ROWS = ["deepseek-moe-2b-hash", "deepseek-moe-2b-expert-choice", "deepseek-moe-2b-segments"]
SERVED = [
    ROWS[0],
    ROWS[2],
    *(f"deepseek-moe-2b-{rule}" for rule in ("switch", "gshard", "noisy")),
    "mixtral-8x7b",
]
TEXTS = [parts.draw_ids(512, 21, 0), parts.draw_ids(512, 9, 1)]
SEGMENTS = MoEConfig(12, 4, 5, topk_method="segments", n_group=4, topk_group=2)


def _model(name: str) -> Transformer:
    model = Transformer(tiny(name))
    parts.fill(model)
    return model.eval()


def _logits(model: Transformer, *texts: list[int]) -> Tensor:
    batch = parts.pack(*texts)
    return model.logits(model(batch).hidden_TD, batch)


def test_a_hash_is_even_over_a_vocabulary_and_another_in_each_layer() -> None:
    """8192 ids on 16 experts: 512 each by chance, give or take 22; 5 deviations are 110."""
    moe = MoEConfig(16, 2, 5, topk_method="hash")
    ids_T = torch.arange(8192)
    first, second = hash_experts(ids_T, 0, moe), hash_experts(ids_T, 1, moe)
    for experts_TK in (first, second):
        assert (experts_TK[:, 0].bincount(minlength=16) - 512).abs().max() < 110
        assert (experts_TK[:, 0] != experts_TK[:, 1]).all()
    # Layers agree by chance alone: 1 in 16 of 8192, again within 5 deviations.
    assert abs(int((first[:, 0] == second[:, 0]).sum()) - 512) < 110
    assert torch.equal(hash_experts(ids_T[5:6], 0, moe), first[5:6])


def test_a_hashed_expert_counts_in_full() -> None:
    model = _model("deepseek-moe-2b-hash")
    batch = parts.pack(*TEXTS)
    moe = model.config.moe
    assert moe is not None
    for layer, routing in enumerate(model(batch).routing):
        assert torch.equal(routing.experts_TK, hash_experts(batch.ids_T, layer, moe))
        assert torch.allclose(routing.weights_TK, torch.ones_like(routing.weights_TK))


def test_experts_choose_their_best_tokens() -> None:
    logits_TE = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)).round()  # with ties
    chosen_TE = choose_tokens(logits_TE, 2)
    scores_TE = logits_TE.softmax(-1)
    for e in range(4):
        best = sorted(range(10), key=lambda t: -float(scores_TE[t, e]))[:5]  # stable: 10 * 2 / 4 tokens
        assert (chosen_TE[:, e] == e).nonzero().flatten().tolist() == sorted(best)
        assert int((chosen_TE[:, e] < 0).sum()) == 5
    assert choose_tokens(logits_TE[:1], 2).tolist() == [[0, 1, 2, 3]]  # at least one each
    assert choose_tokens(logits_TE[:0], 2).shape == (0, 4)


def test_segments_are_products_of_two_softmaxes() -> None:
    draw = torch.Generator().manual_seed(0)
    experts_TG, segments_TE = torch.randn(7, 4, generator=draw), torch.randn(7, 12, generator=draw)
    joined_TE = join_segments(experts_TG, segments_TE)
    chosen_TK = choose_segments(joined_TE, SEGMENTS)
    for t in range(7):
        p, q = experts_TG[t].softmax(-1), segments_TE[t].view(4, 3).softmax(-1)
        assert (joined_TE[t].softmax(-1) - (p.unsqueeze(1) * q).flatten()).abs().max() <= CLOSE
        wanted = []
        for expert in sorted(range(4), key=lambda g: -float(p[g]))[:2]:
            wanted += [expert * 3 + m for m in sorted(range(3), key=lambda m: -float(q[expert, m]))[:2]]
        assert chosen_TK[t].tolist() == wanted


@pytest.mark.parametrize("name", ROWS)
def test_each_rule_learns(name: str) -> None:
    """Every parameter that shapes the output has a gradient; the gate of a hash weighs 1 and has none."""
    model = _model(name)
    _logits(model, *TEXTS).square().mean().backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        if not (name.endswith("hash") and key.endswith("gate.weight")):
            assert p.grad.abs().max() > 0, key


def test_the_spread_of_a_noisy_gate_is_learned_and_is_the_softplus() -> None:
    """H = x W + N softplus(x W_noise) in training (arXiv 1701.06538, eq. 4), x W outside it."""
    moe = MoEConfig(8, 2, 5, norm_topk_prob=True, noisy_gate=True)
    gate = Gate(16, moe, device=None, dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    for tensor in (gate.weight, gate.noise_weight):
        assert tensor is not None
        tensor.data.normal_(generator=draw)
    x_TD = torch.randn(400, 16, generator=draw)
    with pytest.raises(ValueError, match="nothing to draw from"):
        gate.train()(x_TD, None)
    gate.generator = torch.Generator().manual_seed(1)
    noisy = gate(x_TD, None)
    assert noisy.logits_TE is not None
    assert gate.noise_weight is not None
    spread_TE = torch.nn.functional.softplus(x_TD @ gate.noise_weight.t())
    unit_TE = ((noisy.logits_TE - x_TD @ gate.weight.t()) / spread_TE).detach()
    # 3200 draws: the mean within 4 of its deviations, 0.018 each; the spread within 4 of 0.0125.
    assert abs(unit_TE.mean().item()) < 0.07
    assert abs(unit_TE.std().item() - 1) < 0.05
    noisy.weights_TK.square().sum().backward()
    for tensor in (gate.weight, gate.noise_weight):
        assert tensor.grad is not None
        assert tensor.grad.abs().max() > 0
    plain = gate.eval()(x_TD, None)
    assert torch.equal(plain.experts_TK, ops.gate(x_TD, gate.weight, **gate._rule(None)).experts_TK)
    assert (plain.experts_TK != noisy.experts_TK).any()


def test_a_second_choice_is_kept_with_twice_its_weight() -> None:
    """GShard, algorithm 1; a choice that is left out is -1, weighs nothing, and the first stays as it was."""
    moe = MoEConfig(8, 2, 5, norm_topk_prob=True, random_second=True)
    gate = Gate(16, moe, device=None, dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    gate.weight.data.normal_(generator=draw)
    x_TD = torch.randn(4000, 16, generator=draw)
    plain = gate.eval()(x_TD, None)
    gate.generator = torch.Generator().manual_seed(1)
    chance = gate.train()(x_TD, None)
    assert torch.equal(chance.experts_TK[:, 0], plain.experts_TK[:, 0])
    assert torch.equal(chance.weights_TK[:, 0], plain.weights_TK[:, 0])
    kept_T, second_T = chance.experts_TK[:, 1] >= 0, plain.weights_TK[:, 1]
    assert torch.equal(chance.experts_TK[kept_T], plain.experts_TK[kept_T])
    assert (chance.weights_TK[~kept_T, 1] == 0).all()
    # Binomial in each tenth of the chances: the count within 4.5 of its deviations of what is expected.
    chance_T = (2 * second_T).clamp(max=1)
    for low in range(10):
        in_T = (chance_T >= low / 10) & (chance_T < (low + 1) / 10)
        expected, variance = chance_T[in_T].sum(), (chance_T[in_T] * (1 - chance_T[in_T])).sum()
        assert abs(kept_T[in_T].sum() - expected) <= 4.5 * variance.sqrt() + 1
    again = gate(x_TD, chance.experts_TK)  # a replay draws nothing
    assert torch.equal(again.experts_TK, chance.experts_TK)


@pytest.mark.parametrize("name", ROWS)
def test_a_replay_is_the_choice(name: str) -> None:
    """What a rule recorded, given back, gives the same: recompute and reinforcement learning rely on it."""
    model = _model(name)
    layer = model.model.layers[0].mlp
    assert isinstance(layer, MoE)
    x_TD = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    given_TK = None
    if name.endswith("hash"):
        given_TK = hash_experts(torch.arange(9), 0, layer.gate.moe)
    y_TD, routing = layer(x_TD, given_TK)
    again_TD, _ = layer(x_TD, routing.experts_TK)
    assert torch.equal(y_TD, again_TD)


@pytest.mark.parametrize("name", SERVED)
def test_causal_rules_are_served(name: str) -> None:
    model = _model(name)
    with torch.inference_mode():
        got = parts.through_cache(
            parts.Cache(model.config, 2),
            TEXTS,
            [[7], [2]],
            lambda batch, _: model.logits(model(batch).hidden_TD, batch),
        )
    for text, logits_TV in zip(TEXTS, got, strict=True):
        wanted_TV = _logits(model, text)
        assert (logits_TV - wanted_TV).abs().max() <= 10 * CLOSE * wanted_TV.abs().max()


def test_expert_choice_looks_ahead_and_is_not_served() -> None:
    model = _model(ROWS[1])
    before, after = _logits(model, TEXTS[0]), _logits(model, [*TEXTS[0][:10], *TEXTS[1], *TEXTS[1][:2]])
    assert (before[:10] - after[:10]).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"expert_choice.*depends on later ones"):
        Engine(model, EngineSettings())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"topk_method": "expert_choice", "norm_topk_prob": True}, "norm_topk_prob is true"),
        ({"topk_method": "expert_choice", "scoring_func": "sigmoid"}, "softmax scores"),
        ({"topk_method": "hash", "capacity_factor": 1.0}, "capacity_factor is 1.0"),
        ({"topk_method": "expert_choice", "noisy_gate": True}, "noisy_gate is true"),
        ({"random_second": True}, "random_second is true"),
        ({"topk_method": "hash", "n_group": 4}, "'hash' ignores groups"),
        ({"topk_method": "segments", "n_group": 4, "topk_group": 3}, "not a multiple of topk_group 3"),
        ({"topk_method": "segments", "n_group": 6, "topk_group": 1}, "leaves only 2 experts"),
    ],
)
def test_rules_refuse_what_they_do_not_have(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig(12, 4, 5, **settings)  # type: ignore[arg-type]
