"""Laws of loss-free balancing: every choice of a step is counted once, and each bias moves against its
load."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shoal.config.families import tiny
from shoal.config.run import BalanceConfig
from shoal.model.moe import max_violation
from shoal.model.transformer import Transformer
from shoal.ops import api as ops
from shoal.train.balance import Balancer, add_noise
from tests.train import parts


def choices(seed: int, tokens: int, layers: int = 3, dropped: float = 0.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    experts = torch.rand(layers, tokens, 16, generator=generator).topk(3).indices
    drop = torch.rand(experts.shape, generator=generator) < dropped
    return list(torch.where(drop, -1, experts))


def biases(model: Transformer) -> torch.Tensor:
    found = [tensor for name, tensor in model.named_buffers() if name.endswith("e_score_correction_bias")]
    return torch.stack(found).clone()


def test_every_choice_of_every_micro_batch_is_counted_once() -> None:
    balancer = Balancer(parts.model(), BalanceConfig(bias_update_speed=0.001))
    batches = [choices(seed, tokens, dropped=0.2) for seed, tokens in enumerate((1, 63, 257))]
    for experts in batches:
        balancer.count(experts)
    load_LE = balancer.update()
    for layer in range(3):
        for expert in range(16):
            assert load_LE[layer, expert] == sum((experts[layer] == expert).sum() for experts in batches)
    assert not balancer.update().any()  # the next step starts from nothing


def test_each_bias_moves_against_its_load_by_the_sign_alone() -> None:
    model = parts.model()
    balancer = Balancer(model, BalanceConfig(bias_update_speed=0.25))
    assert not biases(model).any()
    experts = choices(1, 40)
    experts[2] = torch.arange(48).view(16, 3) % 16  # perfectly even: nothing to move
    for layer in experts[:2]:
        layer[:30, 0] = 5  # overloaded
    balancer.count([layer[:16] for layer in experts])
    load_LE = balancer.update()
    mean_L1 = load_LE.double().mean(-1, keepdim=True)
    assert torch.equal(biases(model), (0.25 * torch.sign(mean_L1 - load_LE)).float())
    assert (biases(model)[:2, 5] == -0.25).all()
    assert not biases(model)[2].any()


def test_the_mean_is_exact_where_float32_is_not() -> None:
    """A load of 2^24 + 1 is one above a mean of 2^24: float32 would call them equal."""
    balancer = Balancer(parts.model(), BalanceConfig(bias_update_speed=1.0))
    balancer.load_LE[0] = 1 << 24
    balancer.load_LE[0, 3] += 1
    balancer.load_LE[0, 4] -= 1
    balancer.update()
    assert balancer.gates[0].e_score_correction_bias is not None
    assert balancer.gates[0].e_score_correction_bias[2:6].tolist() == [0.0, -1.0, 1.0, 0.0]


def test_a_router_without_bias_is_only_measured() -> None:
    model = Transformer(tiny("deepseek-v2"))
    model.init_weights(torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    balancer = Balancer(model, BalanceConfig(bias_update_speed=0.001))
    balancer.count(choices(2, 10, layers=len(balancer.gates)))
    assert balancer.update().sum() == 10 * 3 * len(balancer.gates)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_dense_model_has_nothing_to_balance() -> None:
    cfg = replace(parts.config(num_nextn_predict_layers=0), moe=None)
    balancer = Balancer(parts.model(cfg), BalanceConfig(bias_update_speed=0.001))
    balancer.count([])
    assert max_violation(balancer.update()).tolist() == []


def test_prediction_modules_that_did_not_run_do_not_move() -> None:
    model = parts.model()
    balancer = Balancer(model, BalanceConfig(bias_update_speed=1.0))
    balancer.count(choices(3, 20, layers=2))
    assert not balancer.update()[2].any()
    assert not biases(model)[2].any()


def test_max_violation_is_the_largest_over_the_mean() -> None:
    load_LE = torch.tensor([[2, 2, 2, 2], [8, 0, 0, 0], [3, 1, 2, 2], [0, 0, 0, 0]])
    assert max_violation(load_LE).tolist() == pytest.approx([0.0, 3.0, 0.5, 0.0])


def test_balancing_evens_the_load_of_skewed_scores() -> None:
    """Algorithm 1 on fixed scores that all prefer a few experts: MaxVio falls from near its maximum of 7."""
    model = parts.model()
    balancer = Balancer(model, BalanceConfig(bias_update_speed=0.005))
    bias_E = balancer.gates[0].e_score_correction_bias
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(4096, 16, generator=generator) + torch.linspace(-3, 3, 16)
    violations = []
    for _ in range(300):  # 200 steps of 0.005 move a bias across the range of a sigmoid
        balancer.count([ops.route(logits_TE, 2, scoring_func="sigmoid", bias_E=bias_E).experts_TK])
        violations.append(max_violation(balancer.update())[0].item())
    assert violations[0] > 3
    # A bias keeps swinging by u. Scores are densest where the sigmoid is flattest: at -3 its slope is 0.045,
    # so at most 9 shares of all tokens lie in a unit of score, 4.5% in a swing of 0.005, which is 0.36 of a
    # fair load.
    assert max(violations[-20:]) < 0.36


# Quantile balancing


def quantile_model() -> tuple[Transformer, Balancer]:
    model = parts.model()
    return model, Balancer(model, BalanceConfig(bias_rule="quantile"))


def test_a_solved_bias_gives_each_expert_its_share_of_the_cutoffs() -> None:
    """K/E of the step's tokens, over both micro-batches, have c - s below b, up to the centring."""
    _, balancer = quantile_model()
    gate = balancer.gates[0]
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(tokens, 16, generator=generator) for tokens in (160, 480)]
    for scores_TE in scores:
        balancer.count([torch.zeros(len(scores_TE), 3, dtype=torch.int64)] * 3, [scores_TE] * 3)
    balancer.update()
    bias_E = gate.e_score_correction_bias
    assert bias_E is not None
    assert bias_E.mean().abs() < 1e-6
    need_TE = torch.cat([s.topk(4, dim=-1).values[:, -1:] - s for s in scores])
    for share in (0, 1):  # K = 3 of E = 16: 120 of 640 tokens, exactly; centring shifts all by one number
        shift = (need_TE.kthvalue(120 + share, dim=0).values - bias_E).sort().values
        assert (
            shift[-1] - shift[0] < (need_TE.kthvalue(121, 0).values - need_TE.kthvalue(120, 0).values).max()
        )


def test_quantile_balancing_evens_skewed_scores_in_a_few_steps() -> None:
    """The same skew that the sign rule takes 200 steps for."""
    _, balancer = quantile_model()
    bias_E = balancer.gates[0].e_score_correction_bias
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(4096, 16, generator=generator) + torch.linspace(-3, 3, 16)
    violations = []
    for _ in range(30):
        routing = ops.route(logits_TE, 3, scoring_func="sigmoid", bias_E=bias_E)
        balancer.count([routing.experts_TK] * 3, [routing.scores_TE] * 3)
        violations.append(max_violation(balancer.update())[0].item())
    assert violations[0] > 3
    assert violations[-1] < 0.05


def test_quantile_needs_scores() -> None:
    _, balancer = quantile_model()
    with pytest.raises(ValueError, match="gives no scores"):
        balancer.count(choices(1, 8))


@pytest.mark.parametrize("rule", ["sign", "quantile"])
def test_a_bias_at_rest_does_not_move_and_loads_are_told(rule: str) -> None:
    model = parts.model()
    balancer = Balancer(model, BalanceConfig(bias_rule=rule))  # type: ignore[arg-type]
    experts = choices(4, 20)
    balancer.count(experts, [torch.rand(20, 16)] * 3)
    assert balancer.update(moving=False).sum() == 3 * 20 * 3
    assert not biases(model).any()


# Noise


def test_noise_is_drawn_from_its_generator_while_training_and_never_in_evaluation() -> None:
    pack = parts.batch(0)
    quiet, noisy = parts.model(), add_noise(parts.model(), 0.5, torch.Generator().manual_seed(1))
    assert torch.equal(quiet.eval()(pack).hidden_TD, noisy.eval()(pack).hidden_TD)
    noisy.train()
    first, second = noisy(pack), noisy(pack)
    assert not torch.equal(first.routing[0].scores_TE, second.routing[0].scores_TE)
    again = add_noise(parts.model(), 0.5, torch.Generator().manual_seed(1)).train()(pack)
    assert torch.equal(first.hidden_TD, again.hidden_TD)
    # The first router's input is that of the quiet model: the difference is normal of spread 0.5.
    logits = quiet.train()(pack).routing[0].logits_TE, first.routing[0].logits_TE
    assert logits[0] is not None
    assert logits[1] is not None
    noise = logits[1] - logits[0]
    # 512 draws: the spread of a spread is 1/sqrt(2 * 512) = 3% of it; 5 of them.
    assert noise.std().item() == pytest.approx(0.5, rel=0.16)
    assert noise.mean().abs() < 5 * 0.5 / noise.numel() ** 0.5
