"""Laws of the update rules: AdamW is torch's, Muon's step is orthogonal, an expert is a matrix of its own.

And of the learning rate, a pure function of the step.
"""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from shoal.config.run import OptimConfig
from shoal.model.transformer import Transformer
from shoal.train.muon import matrices, orthogonalise
from shoal.train.optim import Optimizer, learning_rate
from tests.train import parts


class Bag(nn.Module):
    """Parameters under the names of a model."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = {name: nn.Parameter(tensor.clone()) for name, tensor in tensors.items()}
        for name, tensor in self.tensors.items():
            self.register_parameter(name.replace(".", "/"), tensor)

    def named_parameters(self, *args: object, **kwargs: object) -> list[tuple[str, nn.Parameter]]:  # type: ignore[override]
        return list(self.tensors.items())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Learning rate


def rates(steps: int = 100, **settings: object) -> list[float]:
    config = OptimConfig(lr=1.0, **settings)  # type: ignore[arg-type]
    return [learning_rate(step, config, steps) for step in range(steps)]


def test_warm_up_rises_linearly_to_lr() -> None:
    for schedule in ("constant", "cosine", "multi_step", "linear"):
        got = rates(warmup_steps=10, schedule=schedule)
        assert got[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
        assert got[10] == 1.0
        assert all(later <= earlier for earlier, later in pairwise(got[10:]))


def test_multi_step_falls_at_80_and_90_percent_of_the_run() -> None:
    assert rates(schedule="multi_step", warmup_steps=10)[10:] == [1.0] * 70 + [0.316] * 10 + [0.316**2] * 10


def test_cosine_ends_at_the_floor_and_linear_at_zero() -> None:
    config = OptimConfig(lr=1.0, schedule="cosine", floor=0.1, warmup_steps=20)
    assert learning_rate(60, config, 100) == pytest.approx(0.55)  # half-way: the mean of lr and floor
    assert learning_rate(100, config, 100) == pytest.approx(0.1)
    linear = rates(schedule="linear", warmup_steps=20)
    assert linear[20:] == pytest.approx([(100 - step) / 80 for step in range(20, 100)])
    assert linear[-1] > 0  # the last step still learns


# AdamW


def test_adamw_is_torchs_bit_for_bit_with_decay_on_matrices_alone() -> None:
    ours, theirs = parts.model(), parts.model()
    optimizer = Optimizer(ours, OptimConfig(weight_decay=0.1))
    matrix, vector = ([p for p in theirs.parameters() if (p.ndim > 1) == many] for many in (True, False))
    assert matrix
    assert vector
    groups = [{"params": matrix, "weight_decay": 0.1}, {"params": vector, "weight_decay": 0.0}]
    oracle = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for step in range(5):
        accumulate(ours, step)
        accumulate(theirs, step)
        for group in oracle.param_groups:
            group["lr"] = 0.01 / (step + 1)
        oracle.step()
        optimizer.step(0.01 / (step + 1))
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q), name


# Muon


def quintic(x: Tensor) -> Tensor:
    """What five steps do to a singular value."""
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (48, 48), (1, 7), (7, 1)])
def test_orthogonalise_keeps_singular_vectors_and_levels_values(shape: tuple[int, int]) -> None:
    x = random(3, *shape).double()
    U, values, Vh = torch.linalg.svd(x, full_matrices=False)
    levelled = quintic(values / values.norm(dim=-1, keepdim=True))
    # Float64 throughout: 15 products of 1e-16, amplified by 3.4445^5 = 485 at most.
    torch.testing.assert_close(orthogonalise(x), U @ torch.diag_embed(levelled) @ Vh, rtol=0, atol=1e-11)
    # In float32 the same, from 6e-8.
    torch.testing.assert_close(orthogonalise(x.float()).double(), orthogonalise(x), rtol=0, atol=2e-3)


def test_any_value_above_a_hundredth_of_the_norm_ends_near_one() -> None:
    ends = quintic(torch.linspace(0.01, 1.0, 100_001, dtype=torch.float64))
    assert ends.min() > 0.67
    assert ends.max() < 1.21


def test_an_expert_is_a_matrix_of_its_own_and_so_are_gate_and_up() -> None:
    """Steps on stacked experts are those on each of their matrices alone."""
    E, F, D = 5, 6, 16
    stacked = {
        "mlp.experts.gate_up_proj": random(E, 2 * F, D, seed=1),
        "mlp.experts.down_proj": random(E, D, F, seed=2),
    }
    single = {
        f"{name}.{i}": matrix
        for name, tensor in stacked.items()
        for i, matrix in enumerate(matrices(name, tensor))
    }
    assert len(single) == 3 * E
    settings = OptimConfig(optimizer="muon", lr=0.1)
    bags = Bag(stacked), Bag(single)
    optimizers = [Optimizer(bag, settings) for bag in bags]
    for step in range(3):
        for name, p in bags[0].tensors.items():
            p.grad = random(*p.shape, seed=10 + step)
            for i, grad in enumerate(matrices(name, p.grad)):
                bags[1].tensors[f"{name}.{i}"].grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step(0.1)
    for name, p in bags[0].tensors.items():
        alone = torch.stack([bags[1].tensors[f"{name}.{i}"] for i in range(len(matrices(name, p)))])
        # The same sums, in the order that suits the batch: a few 6e-8, of values of order 1.
        torch.testing.assert_close(matrices(name, p), alone, rtol=0, atol=1e-6)


def test_muon_is_the_formula() -> None:
    settings = OptimConfig(optimizer="muon", lr=0.02, weight_decay=0.1)
    start = random(8, 24)
    bag = Bag({"self_attn.o_proj.weight": start})
    optimizer = Optimizer(bag, settings)
    p, expected, momentum = (
        bag.tensors["self_attn.o_proj.weight"],
        start.double(),
        torch.zeros(8, 24).double(),
    )
    for step in range(4):
        p.grad = random(8, 24, seed=step + 1)
        momentum = 0.95 * momentum + p.grad.double()
        update = orthogonalise((p.grad.double() + 0.95 * momentum)[None])[0]
        expected = (1 - 0.02 * 0.1) * expected - 0.02 * 0.2 * math.sqrt(24) * update
        optimizer.step(0.02)
    # Float32 Newton-Schulz is off by 1e-5 of entries of 0.2, times steps of 0.02; then 6e-8 of weights of
    # order 1.
    torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=2e-6)


def test_muon_leaves_embedding_head_and_vectors_to_adamw() -> None:
    model = parts.model()
    optimizer = Optimizer(model, OptimConfig(optimizer="muon"))
    adamw = set(optimizer.adamw.slots)
    assert adamw == {
        name
        for name, p in model.named_parameters()
        if p.ndim == 1 or name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    assert adamw.isdisjoint(optimizer.muon.slots)
    assert adamw | optimizer.muon.slots.keys() == optimizer.parameters.keys()


# Both


def accumulate(model: nn.Module, seed: int) -> None:
    for i, p in enumerate(model.parameters()):
        p.grad = random(*p.shape, seed=1000 * seed + i).to(p.dtype)


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_state_carried_to_another_optimizer_goes_on_bit_for_bit(rule: str) -> None:
    settings = OptimConfig(optimizer=rule, lr=0.01)  # type: ignore[arg-type]
    model, twin = parts.model(), parts.model(seed=1)
    optimizer, other = Optimizer(model, settings), Optimizer(twin, settings)
    for step in range(3):
        accumulate(model, step)
        optimizer.step(0.01)
    twin.load_state_dict(model.state_dict())
    state = optimizer.state()
    assert state.keys() == other.state().keys()
    for name, tensor in other.state().items():
        tensor.detach().copy_(state[name])
    for step in range(3, 5):
        for part in (model, twin):
            accumulate(part, step)
        optimizer.step(0.02)
        other.step(0.02)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name]), name


KINDS = [
    {},
    {"moments": "bfloat16"},
    {"moments": "int8"},
    {"master": "bfloat16", "moments": "int8"},
    {"master": "bfloat16"},
]


def run_inside(model: Transformer, optimizer: Optimizer, step: int, lr: float) -> None:
    """A backward pass whose gradients are those of `accumulate`."""
    value = torch.zeros(())
    for i, p in enumerate(model.parameters()):
        value = value + (p * random(*p.shape, seed=1000 * step + i).to(p.dtype)).float().sum()
    with optimizer.inside_backward(lr):
        value.backward()


@pytest.mark.parametrize("rule", ["adamw", "muon"])
@pytest.mark.parametrize(
    "kept", KINDS, ids=lambda kept: "-".join(f"{k}-{v}" for k, v in kept.items()) or "float32"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_inside_backward_is_the_step_after_it(
    rule: str, kept: dict[str, str], dtype: torch.dtype
) -> None:
    """Bit for bit, where nothing is clipped; and no gradient is left."""
    settings = OptimConfig(optimizer=rule, clip=1e9, in_backward=True, **kept)  # type: ignore[arg-type]
    after, inside = parts.model(dtype=dtype), parts.model(dtype=dtype)
    plain, hooked = Optimizer(after, settings), Optimizer(inside, settings)
    hooked.attach()
    for step in range(3):
        accumulate(after, step)
        norm = torch.nn.utils.get_total_norm(plain.gradients().values())
        plain.step(0.01)
        run_inside(inside, hooked, step, 0.01)
        # Two sums of the same squares in float32: bfloat16 gradients' norms are rounded to it on one side.
        torch.testing.assert_close(hooked.close_step(), norm.float(), rtol=1e-2, atol=0)
        assert all(p.grad is None for p in inside.parameters())
    for (name, p), q in zip(after.named_parameters(), inside.parameters(), strict=True):
        # Muon sums one matrix in the order that suits it alone, many in another.
        torch.testing.assert_close(
            p,
            q,
            rtol=0,
            atol=0 if rule == "adamw" else 1e-2 * 0.01 if dtype == torch.float32 else 2**-7,
            msg=name,
        )


def test_inside_backward_a_gradient_is_clipped_by_the_last_norm_or_its_own() -> None:
    settings = OptimConfig(clip=3.0, in_backward=True)
    model, twin = parts.model(), parts.model()
    optimizer, plain = Optimizer(model, settings), Optimizer(twin, replace(settings, clip=1e9))
    optimizer.attach()
    last = 0.0
    for step in range(3):
        accumulate(twin, step)
        norms = [float(p.grad.norm()) for p in twin.parameters() if p.grad is not None]
        for p, norm in zip(twin.parameters(), norms, strict=True):
            assert p.grad is not None
            p.grad *= min(1.0, 3.0 / max(norm, last))
        plain.step(0.01)
        run_inside(model, optimizer, step, 0.01)
        last = float(optimizer.close_step())
        assert last == pytest.approx(math.hypot(*norms), rel=1e-5)
    assert last > 3.0
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        # A factor off by 1e-7 leaves AdamW's ratio as it was: some roundings of 6e-8, of steps of 0.01.
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_moments_in_8_bits_lead_where_float32_ones_do(rule: str) -> None:
    """A quadratic bowl with noisy gradients: both end at its bottom, as near as the noise lets them."""
    ends = {}
    for kind in ("float32", "int8"):
        bag = Bag({"proj.weight": 0.5 * random(64, 96)})
        settings = OptimConfig(optimizer=rule, moments=kind, weight_decay=0.0)  # type: ignore[arg-type]
        optimizer, p = Optimizer(bag, settings), bag.tensors["proj.weight"]
        for step in range(200):
            p.grad = p.detach() + 0.3 * random(64, 96, seed=step)
            optimizer.step(0.06 * (1 - step / 200))
        ends[kind] = float(p.detach().square().mean().sqrt())
    assert ends["float32"] < 0.1  # from 0.5
    # Stored moments add noise of half a step, 1/254 of a block's largest, to gradients whose own is 0.3.
    assert ends["int8"] == pytest.approx(ends["float32"], rel=0.05)


def test_what_is_kept_is_what_was_asked_for() -> None:
    """8 bits and their scales for matrices, float32 for vectors, and no master where none is wanted."""
    model = parts.model(dtype=torch.bfloat16)
    optimizer = Optimizer(model, OptimConfig(moments="int8", master="bfloat16"))
    numel = {name: p.numel() for name, p in model.named_parameters() if p.ndim >= 2}
    state = optimizer.state()
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            kinds = (torch.int8, torch.uint8, torch.float32)
            fields = ("exp_avg", "exp_avg_sq", "exp_avg.scale")
            assert tuple(state[f"{name}.{field}"].dtype for field in fields) == kinds
            assert state[f"{name}.exp_avg.scale"].numel() == math.ceil(numel[name] / 256)
            assert f"{name}.master" not in state
        else:
            assert state[f"{name}.exp_avg"].dtype == state[f"{name}.master"].dtype == torch.float32


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_narrow_weights_follow_float32_masters(rule: str) -> None:
    """Steps far below the spacing of bfloat16 add up: the weights are the rounded float32 ones, bit for
    bit."""
    settings = OptimConfig(optimizer=rule, lr=1e-4)  # type: ignore[arg-type]
    narrow, wide = parts.model(dtype=torch.bfloat16), parts.model()
    wide.load_state_dict(narrow.state_dict())
    before = {name: p.detach().clone() for name, p in narrow.named_parameters()}
    pairs = [(model, Optimizer(model, settings)) for model in (narrow, wide)]
    for step in range(20):
        accumulate(narrow, step)
        for p, q in zip(narrow.parameters(), wide.parameters(), strict=True):
            assert p.grad is not None
            q.grad = p.grad.float()
        for _, optimizer in pairs:
            optimizer.step(1e-4)
    for (name, p), q in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        assert torch.equal(p, q.bfloat16()), name
        assert p.ndim == 1 or not torch.equal(p, before[name])
    master = "lm_head.weight.master"
    assert torch.equal(pairs[0][1].state()[master], wide.head_weight())


def test_a_model_whose_steps_were_inside_backward_is_freed() -> None:
    model = parts.model()
    optimizer = Optimizer(model, OptimConfig(in_backward=True))
    optimizer.attach()
    run_inside(model, optimizer, 0, 0.01)
    kept = weakref.ref(model), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert [ref() for ref in kept] == [None, None]
