"""Laws of the losses: each equals a literal loop over sequences, in value and in gradient.

How a step is cut into micro-batches changes nothing; a sequence never learns from its neighbour in the pack.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.batch import Batch
from shoal.model.transformer import Transformer
from shoal.ops.api import Routing
from shoal.train import loss
from shoal.train.auxiliary import sequence_balance
from shoal.train.objective import Share, Step
from tests.train import parts


def assert_close(actual: Any, expected: Any) -> None:
    """Equal but for float32: some 1e3 roundings of 6e-8 on a path, random in sign, leave 2e-6 of a value."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def literal_balance(routing: Routing, lengths: tuple[int, ...]) -> Tensor:
    """Eq. 17-20 with real assignments, a sequence and an expert at a time; each sequence times its length."""
    total, start = routing.scores_TE.new_zeros(()), 0
    for length in lengths:
        rows = slice(start, start + length)
        experts, scores = routing.experts_TK[rows], routing.scores_TE[rows]
        E, K = scores.shape[1], experts.shape[1]
        for i in range(E):
            f_i = E / (K * length) * int((experts == i).sum())
            P_i = sum((scores[t, i] / scores[t].sum() for t in range(length)), scores.new_zeros(())) / length
            total = total + length * f_i * P_i
        start += length
    return total


@pytest.mark.parametrize("lengths", [(1,), (63,), (5, 1, 30), (2, 2)])
@pytest.mark.parametrize("dropped", [False, True])
def test_balance_equals_the_loop_in_value_and_gradient(lengths: tuple[int, ...], dropped: bool) -> None:
    generator = torch.Generator().manual_seed(len(lengths))
    T, E, K = sum(lengths), 8, 3
    scores = torch.rand(T, E, generator=generator, dtype=torch.float64).requires_grad_()
    experts = torch.rand(T, E, generator=generator).topk(K).indices
    if dropped:
        experts = torch.where(torch.rand(T, K, generator=generator) < 0.3, -1, experts)
    routing = Routing(experts, scores.detach(), scores)
    ours, literal = sequence_balance(routing, parts.sequences(lengths)), literal_balance(routing, lengths)
    # Float64 sums of at most 63 * 8 terms of order 1: some 500 roundings of 1e-16 each.
    torch.testing.assert_close(ours, literal, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(value, scores, retain_graph=True)[0] for value in (ours, literal)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-15)


def test_perfect_balance_is_the_number_of_tokens() -> None:
    experts = torch.arange(24).view(8, 3) % 8  # each of 8 experts three times
    routing = Routing(experts, torch.ones(8, 3), torch.full((8, 8), 0.3))
    assert sequence_balance(routing, parts.sequences((8,))).item() == pytest.approx(8, rel=1e-6)


def test_look_ahead_shifts_inside_each_sequence_only() -> None:
    packed = parts.batch(0)
    twice = loss.look_ahead(loss.look_ahead(packed))
    assert packed.targets_T is not None
    assert packed.weights_T is not None
    assert twice.targets_T is not None
    assert twice.weights_T is not None
    start = 0
    for length in parts.LENGTHS:
        for t in range(start, start + length):
            if t + 2 < start + length:
                assert twice.targets_T[t] == packed.targets_T[t + 2]
                assert twice.weights_T[t] == packed.weights_T[t + 2]
            else:
                assert twice.weights_T[t] == 0
                assert twice.targets_T[t] in packed.targets_T[start : start + length]
        start += length


def literal_losses(model: Transformer, packed: Batch, modules: int) -> list[tuple[Tensor, int]]:
    """Sum and count of the main loss and of each module's, from the logits of each sequence run alone."""
    sums = [(torch.zeros(()), 0) for _ in range(modules + 1)]
    for s in range(packed.num_sequences):
        one = parts.alone(packed, s)
        assert one.targets_T is not None
        assert one.weights_T is not None
        n, hidden = one.num_tokens, model(one).hidden_TD
        for depth in range(modules + 1):
            # Row t of depth d predicts the target of row t + d; rows without one are not rows of this loss.
            for t in range(n - depth):
                if one.weights_T[t + depth] > 0:
                    nll = F.cross_entropy(F.linear(hidden[t], model.head_weight()), one.targets_T[t + depth])
                    sums[depth] = (sums[depth][0] + nll, sums[depth][1] + 1)
            if depth < modules:
                # Where the sequence has ended, any id will do: causal attention keeps it from what counts.
                ids = F.pad(one.targets_T[depth:], (0, min(depth, n)), value=3)
                hidden = model.predict_ahead(hidden, ids, one, depth).hidden_TD
    return sums


def share(
    model: Transformer,
    packed: Batch,
    modules: int = 1,
    *,
    mtp_weight: float = 0.3,
    balance_weight: float = 0.0,
) -> Share:
    """What a step of this one micro-batch minimises."""
    objective = loss.NextToken(modules, mtp_weight=mtp_weight, balance_weight=balance_weight)
    return objective.compute(model, packed, Step(0, 1, objective.count([packed])))


def gradients(model: Transformer, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("modules", [1, 2])
def test_main_and_mtp_loss_equal_each_sequence_alone(modules: int) -> None:
    model = parts.model(parts.config(num_nextn_predict_layers=modules))
    packed = parts.batch(1)
    ours = share(model, packed, modules)
    (main, main_count), *ahead = literal_losses(model, packed, modules)
    counts = loss.NextToken(modules, mtp_weight=0.3, balance_weight=0.0).count([packed])
    assert counts.tolist() == [packed.num_tokens, main_count, *(count for _, count in ahead)]
    mtp = torch.stack([total / count for total, count in ahead]).mean()
    assert_close(ours.terms["loss"], main / main_count)
    assert_close(ours.terms["mtp"], mtp)
    expected = gradients(model, main / main_count + 0.3 * mtp)
    assert_close(gradients(model, ours.total), expected)


def test_balance_of_the_model_is_summed_over_layers_prediction_module_included() -> None:
    model, packed = parts.model(), parts.batch(2)
    ours, plain = share(model, packed, balance_weight=10.0), share(model, packed)
    out = model(packed)
    assert packed.targets_T is not None
    routing = [*out.routing, *model.predict_ahead(out.hidden_TD, packed.targets_T, packed).routing]
    assert len(routing) == len(ours.experts) == 3
    term = torch.stack([literal_balance(layer, parts.LENGTHS) for layer in routing]).sum() / packed.num_tokens
    assert_close(ours.terms["balance"], term / 3)
    expected = gradients(model, plain.total + 10.0 * term)
    assert_close(gradients(model, ours.total), expected)


def test_micro_batches_add_up_to_the_step() -> None:
    """Two packs of unequal size give, together, the losses and gradients of one pack of both."""
    model = parts.model()
    first, second = parts.batch(3, (9, 4)), parts.batch(4, (30, 1, 2))
    joined = {
        name: torch.cat([getattr(first, name), getattr(second, name)])
        for name in ("ids_T", "positions_T", "targets_T", "weights_T")
    }
    cu = torch.cat([first.cu_seqlens_S1, second.cu_seqlens_S1[1:] + first.num_tokens])
    whole = replace(first, **joined, cu_seqlens_S1=cu, max_seqlen=30)

    def step(batches: list[Batch]) -> tuple[dict[str, Tensor], Tensor]:
        model.zero_grad()
        objective = loss.NextToken(1, mtp_weight=0.3, balance_weight=0.1)
        counts, terms = objective.count(batches), torch.zeros(3)
        for batch in batches:
            part = objective.compute(model, batch, Step(0, 1, counts))
            part.total.backward()
            terms += torch.stack(list(part.terms.values()))
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, terms

    assert_close(step([first, second]), step([whole]))


def test_a_term_of_weight_zero_is_not_computed() -> None:
    model, packed = parts.model(), parts.batch(5)
    losses = share(model, packed, mtp_weight=0.0)
    assert losses.terms.keys() == {"loss"}
    untouched = {name for name, _ in model.named_parameters() if name.startswith("model.layers.3.")}
    assert untouched
    assert not untouched & gradients(model, losses.total).keys()


def test_a_batch_where_nothing_counts_is_a_loss_of_zero() -> None:
    model, packed = parts.model(), parts.batch(6, (1, 1))
    losses = share(model, packed)
    assert losses.total == 0
    assert all((grad == 0).all() for grad in gradients(model, losses.total).values())


def test_a_mean_is_over_targets_that_count_whatever_they_weigh() -> None:
    packed = parts.batch(7)
    assert packed.weights_T is not None
    doubled = replace(packed, weights_T=-2 * packed.weights_T)
    model = parts.model()
    one, two = (share(model, batch) for batch in (packed, doubled))
    assert_close(two.total, -2 * one.total)
