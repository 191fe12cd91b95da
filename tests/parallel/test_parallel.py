"""The law of parallelism: a step of n processes is the step of one. Gradients, losses, biases, checkpoints.

The processes are real (gloo), a few tests share each launch. The tolerance: all is float32, and a sum in
another order differs by at most n eps of the sum of magnitudes for n terms added one after the other; sums
here have up to 64 * 4 rows, cancel by less than a factor of 4, and pairs of roundings are random, so 128 eps
(1.5e-5) of a tensor's largest entry.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.checkpoint import native
from shoal.config.run import OptimConfig, ParallelConfig
from shoal.train.optim import Optimizer
from shoal.train.team import Team
from tests.parallel import work
from tests.train import parts

EPS = torch.finfo(torch.float32).eps
TWO = [ParallelConfig(data=2), ParallelConfig(expert=2), ParallelConfig(context=2)]
FOUR = [
    *(ParallelConfig(data=4), ParallelConfig(expert=4), ParallelConfig(context=4)),
    *(
        ParallelConfig(data=2, expert=2),
        ParallelConfig(data=2, context=2),
        ParallelConfig(context=2, expert=2),
    ),
]


def assert_close(ours: Tensor, theirs: Tensor, scale: Tensor, name: str) -> None:
    error = (ours - theirs).abs().max().item() if ours.numel() else 0.0
    assert error <= 128 * EPS * scale.abs().max().item(), f"{name}: off by {error}"


@pytest.mark.parametrize("degrees", [TWO, FOUR], ids=["two", "four"])
def test_loss_and_gradients_are_those_of_one_process(degrees: list[ParallelConfig], tmp_path: Path) -> None:
    model = parts.model()
    loss, grads = work.losses_and_gradients([parts.batch(i) for i in range(work.BATCHES)], model, Team())
    found = work.launch(work.every_gradient, degrees[0].ranks, tmp_path, degrees)
    for mesh in degrees:
        covered = dict.fromkeys(grads, 0)
        for rank in found:
            theirs, pieces = rank[mesh]
            assert theirs == pytest.approx(loss, rel=128 * EPS)
            assert pieces.keys() == grads.keys()
            for name, ((first, whole), grad) in pieces.items():
                assert whole == len(grads[name])
                assert_close(grad, grads[name][first : first + len(grad)], grads[name], f"{mesh} {name}")
                covered[name] += len(grad)
        # Every row is on exactly one process: the global norm counts it once.
        assert covered == {name: len(grad) for name, grad in grads.items()}


@pytest.mark.parametrize(
    ("degrees", "names"),
    [
        (ParallelConfig(data=2), ["taught", "native sparse"]),
        (
            ParallelConfig(expert=2),
            ["selective", "full", "hash", "expert_choice", "segments", "taught", "native sparse"],
        ),
        (
            ParallelConfig(context=2),
            ["selective", "full", "hash", "segments", "grouped", "two ahead", "every loss", "nothing here"],
        ),
    ],
    ids=["data", "expert", "context"],
)
def test_ways_to_run_it_and_other_parts_change_nothing_about_it(
    degrees: ParallelConfig, names: list[str], tmp_path: Path
) -> None:
    found = work.launch(work.gradients_of_variants, 2, tmp_path, degrees, names)
    for variant in names:
        batch, losses = work.BATCH.get(variant, parts.batch), work.LOSSES.get(variant, work.USUAL)
        batches = [batch(i) for i in range(work.BATCHES)]
        loss, grads = work.losses_and_gradients(
            batches, work.VARIANTS[variant](), Team(), auxiliary=losses, teaches=variant in work.TEACHES
        )
        assert any(".indexer." in name for name in grads) == (variant in work.TEACHES)
        for rank in found:
            theirs, pieces = rank[variant]
            assert theirs == pytest.approx(loss, rel=128 * EPS)
            assert pieces.keys() == grads.keys()
            for name, ((first, _), grad) in pieces.items():
                assert_close(grad, grads[name][first : first + len(grad)], grads[name], f"{variant} {name}")


def test_muon_and_quantile_biases_are_those_of_one_process(tmp_path: Path) -> None:
    """Whole matrices are made orthogonal, and biases solved over the tokens of all. Newton-Schulz multiplies
    what is small by up to 3.45^5 = 490, relative to the matrix's norm, and a step is 1e-3 of the result."""
    alone = work.train(None, tmp_path / "alone", 3, work.MUON)
    biases = work.launch(
        work.train, 2, tmp_path / "two", ParallelConfig(2, 1), tmp_path / "two", 3, work.MUON
    )
    for theirs in biases:
        for name, bias in alone.items():
            assert_close(theirs[name], bias, torch.ones(()), name)
            assert bias.any()
    single, both = (weights(tmp_path / run, 3, work.MUON.optim)["model"] for run in ("alone", "two"))
    for name, tensor in single.items():
        assert_close(both[name], tensor, torch.ones(()), name)


def weights(folder: Path, step: int, optim: OptimConfig = work.TRAIN.optim) -> dict[str, dict[str, Tensor]]:
    """All that a checkpoint keeps of a run, whole, whoever wrote it."""
    model = parts.model()
    state = {"model": model.state_dict(), "optimizer": Optimizer(model, optim).state()}
    native.load(folder / "checkpoints" / f"step-{step:06d}", state)
    return state


def test_training_goes_on_bit_for_bit_and_on_any_number_of_processes(tmp_path: Path) -> None:
    """One launch: two processes, experts spread. Then one process takes over, and is taken over from."""
    alone = work.train(None, tmp_path / "alone")
    biases = work.launch(work.runs, 2, tmp_path / "two", ParallelConfig(1, 2), tmp_path / "two")
    # 1. Biases move by loads of all processes: the same everywhere, and as in one process.
    for theirs in biases:
        assert theirs.keys() == alone.keys()
        assert all(torch.equal(theirs[name], alone[name]) for name in alone)
        assert any(bias.any() for bias in theirs.values())
    # 2. Resumed is uninterrupted, bit for bit.
    whole, halves = (weights(tmp_path / "two" / run, 4) for run in ("whole", "parts"))
    assert all(
        torch.equal(tensor, halves[stem][name]) for stem in whole for name, tensor in whole[stem].items()
    )
    # 3. And it is the run of one process: AdamW's steps differ by rounding of the gradient over eps 1e-3.
    single = weights(tmp_path / "alone", 4)
    for name, tensor in single["model"].items():
        assert_close(whole["model"][name], tensor, torch.ones(()), name)
    # 4. One process goes on from what two wrote, with all of it.
    work.train(None, tmp_path / "two" / "parts", steps=5)
    work.train(None, tmp_path / "alone", steps=5)
    after, single = weights(tmp_path / "two" / "parts", 5), weights(tmp_path / "alone", 5)
    for name, tensor in single["model"].items():
        assert_close(after["model"][name], tensor, torch.ones(()), name)
    # 5. Four go on from what one wrote.
    work.launch(work.train, 4, tmp_path / "four", ParallelConfig(2, 2), tmp_path / "alone", 6)
    work.train(None, tmp_path / "two" / "parts", steps=6)
    after, single = weights(tmp_path / "alone", 6), weights(tmp_path / "two" / "parts", 6)
    for name, tensor in single["model"].items():
        assert_close(after["model"][name], tensor, torch.ones(()), name)


def test_a_run_of_shared_sequences_is_that_of_one_process(tmp_path: Path) -> None:
    """Four processes, two of them on each micro-batch: weights, biases, metrics, evaluation, and resuming."""
    alone = work.train(None, tmp_path / "alone")
    degrees = ParallelConfig(data=2, context=2)
    biases = work.launch(work.runs, 4, tmp_path / "four", degrees, tmp_path / "four")
    for theirs in biases:
        assert all(torch.equal(theirs[name], alone[name]) for name in alone)
    single, whole, halves = (
        weights(tmp_path / run, work.TRAIN.steps) for run in ("alone", "four/whole", "four/parts")
    )
    assert all(
        torch.equal(tensor, halves[stem][name]) for stem in whole for name, tensor in whole[stem].items()
    )
    for name, tensor in single["model"].items():
        assert_close(whole["model"][name], tensor, torch.ones(()), name)
    told = [metrics(tmp_path / run) for run in ("alone", "four/whole", "four/parts")]
    later = [[line for line in lines if line["step"] > 2] for lines in told]  # where the halves meet
    assert later[1] == later[2]
    assert {line["kind"] for line in later[2]} == {"step", "evaluation"}
    assert [line.keys() for line in told[0]] == [line.keys() for line in told[1]]
    for ours, theirs in zip(told[1], told[0], strict=True):
        for name, value in theirs.items():
            assert ours[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), name


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run, without what it took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "timing"} for line in lines]


def test_tokens_are_conserved_and_travel_no_more_than_their_groups(tmp_path: Path) -> None:
    """Four processes of 2 experts each. A token of a rank is sent once to each process of its experts; what
    comes back is the weighted sum over its choices, and so are gradients. One rank has no tokens, dropped
    choices go nowhere, and choices within 2 of the 4 groups reach at most 2 processes."""
    generator = torch.Generator().manual_seed(0)
    cases = []
    for tokens in (5, 0, 1, 40):
        groups_T2 = torch.rand(tokens, 4, generator=generator).topk(2, dim=1).indices
        picks_TK = torch.rand(tokens, 4, generator=generator).topk(3, dim=1).indices
        experts_TK = groups_T2.gather(1, picks_TK // 2) * 2 + picks_TK % 2
        experts_TK = experts_TK.masked_fill(torch.rand(tokens, 3, generator=generator) < 0.2, -1)
        weights_TK = torch.rand(tokens, 3, generator=generator)
        cases.append((torch.randn(tokens, 8, generator=generator), experts_TK, weights_TK))
    found = work.launch(work.dispatches, 4, tmp_path, cases, 2)
    for rank, (x_TD, experts_TK, weights_TK) in enumerate(cases):
        x_TD, weights_TK = x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
        want_TD = x_TD * (weights_TK * (experts_TK >= 0)).sum(1, keepdim=True)
        want_TD.square().sum().backward()
        y_TD, x_grad, weights_grad, sent, received, experts_NK = found[rank]
        torch.testing.assert_close(y_TD, want_TD.detach())
        torch.testing.assert_close(x_grad, x_TD.grad)
        torch.testing.assert_close(weights_grad, weights_TK.grad)
        places = [{e // 2 for e in row if e >= 0} for row in experts_TK.tolist()]
        assert sent == [sum(place in reached for reached in places) for place in range(4)]
        assert all(len(reached) <= 2 for reached in places)
        assert received == [found[peer][3][rank] for peer in range(4)]
        # Each choice is computed once, where its expert is.
        chosen = sum(
            int((theirs_TK.div(2, rounding_mode="floor") == rank).sum()) for _, theirs_TK, _ in cases
        )
        assert int((experts_NK >= 0).sum()) == chosen
        assert not experts_NK.gt(1).any()
