"""The law of pipelines: stages on several processes give the loss and gradients of one model on one.

The tolerance is that of test_parallel.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from shoal.checkpoint import native
from shoal.config.model import ModelConfig
from shoal.config.run import ParallelConfig, Recompute, TrainConfig
from shoal.train.optim import Optimizer
from shoal.train.team import Team
from tests.parallel import work
from tests.parallel.test_parallel import EPS, assert_close
from tests.train import parts

Runs = list[tuple[ParallelConfig, ModelConfig, Recompute]]
DOWN, VEE = ParallelConfig(pipeline=2), ParallelConfig(pipeline=2, schedule="dualpipev")
# Clipped at every step, by a norm of both stages.
TRAIN = replace(work.TRAIN, evaluate_every=2, optim=replace(work.TRAIN.optim, clip=0.1))
MUON = replace(work.MUON, evaluate_every=0)


def assert_equal_to_one(
    folder: Path, ranks: int, runs: Runs, batches: int, device: str = "cpu", backend: str = "gloo"
) -> None:
    found = work.launch(work.gradients_of_stages, ranks, folder, runs, batches, device, backend=backend)
    for number, (degrees, config, mode) in enumerate(runs):
        model = parts.model(config).to(device)
        every = [parts.batch(i) for i in range(batches)]
        every = [batch.to(torch.device(device)) for batch in every]
        loss, grads = work.losses_and_gradients(every, model, Team())
        covered = dict.fromkeys(grads, 0)
        for rank in found:
            theirs, pieces = rank[number]
            assert theirs == pytest.approx(loss, rel=128 * EPS)
            for name, ((first, whole), grad) in pieces.items():
                ours, told = grads[name].cpu(), f"{degrees} {mode} {name}"
                assert whole == len(ours)
                assert_close(grad.cpu(), ours[first : first + len(grad)], ours, told)
                covered[name] += len(grad)
        twice = degrees.schedule == "1f1b" and model.reads_embedding_twice
        times = {"model.embed_tokens.weight": 2} if twice else {}
        assert covered == {name: len(grad) * times.get(name, 1) for name, grad in grads.items()}


def test_loss_and_gradients_of_two_stages(tmp_path: Path) -> None:
    tied = work.deep(num_nextn_predict_layers=0, tie_word_embeddings=True)
    runs: Runs = [(DOWN, work.deep(), "none"), (DOWN, tied, "none"), (VEE, work.deep(), "full")]
    assert_equal_to_one(tmp_path, 2, runs, batches=4)


def test_loss_and_gradients_of_four_processes(tmp_path: Path) -> None:
    """Stages of sharded weights, of experts spread, and four stages."""
    runs: Runs = [
        (ParallelConfig(data=2, pipeline=2), work.deep(), "none"),
        (ParallelConfig(expert=2, pipeline=2, schedule="dualpipev"), work.deep(), "none"),
        (ParallelConfig(pipeline=4), work.deep(), "none"),
    ]
    assert_equal_to_one(tmp_path, 4, runs, batches=8)


@pytest.mark.slow
def test_loss_and_gradients_of_more(tmp_path: Path) -> None:
    cut = [ParallelConfig(*each, 2, way) for each in ((2, 1), (1, 2)) for way in ("dualpipev", "1f1b")]
    tied = work.deep(tie_word_embeddings=True)
    runs: Runs = [(degrees, tied, mode) for degrees in cut for mode in ("none", "selective", "full")]
    eight = parts.config(num_hidden_layers=8)
    assert_equal_to_one(
        tmp_path / "four", 4, [*runs, (ParallelConfig(1, 1, 4, "dualpipev"), eight, "none")], batches=8
    )
    plain = work.deep(num_nextn_predict_layers=0)
    both: Runs = [(way, config, "none") for way in (DOWN, VEE) for config in (plain, tied)]
    routers: Runs = [(DOWN, work.routed(rule), "none") for rule in ("hash", "expert_choice", "segments")]
    assert_equal_to_one(tmp_path / "two", 2, both + routers, batches=4)


def test_what_stages_cannot_do_is_refused(tmp_path: Path) -> None:
    for uneven, unstaged in work.launch(work.refusals, 2, tmp_path, VEE, tmp_path):
        assert uneven.startswith("the micro-batches of a step have 12 to 32 tokens; a pipeline needs them")
        assert unstaged.startswith("the objective Policy needs a model whose layers are all in one process")


def test_training_goes_on_bit_for_bit_and_on_other_stages(tmp_path: Path) -> None:
    """One launch of two processes: a V straight through and in two halves, 1F1B taken over by a V, and Muon
    with solved biases."""
    whole, parts_of, mixed, muon = (tmp_path / name for name in ("whole", "parts", "mixed", "muon"))
    runs = [(VEE, whole, 3, TRAIN), (VEE, parts_of, 2, TRAIN), (VEE, parts_of, 3, TRAIN)]
    runs += [(DOWN, mixed, 2, TRAIN), (VEE, mixed, 3, TRAIN), (DOWN, muon, 2, MUON)]
    work.launch(work.train_all, 2, tmp_path, runs)
    # 1. Resumed is uninterrupted, bit for bit.
    state = weights(whole, 3)
    for stem, tensors in weights(parts_of, 3).items():
        assert all(torch.equal(tensor, state[stem][name]) for name, tensor in tensors.items())
    assert lines(whole) == lines(parts_of)
    # Nothing is written twice, and a place has its layers alone.
    for written in (names(whole / "checkpoints/step-000003"), names(mixed / "checkpoints/step-000002")):
        assert len(written) == 2
        assert written[0].isdisjoint(written[1])
        assert len(written[0] | written[1]) == len(parts.model(work.deep()).state_dict())
    # 2. And it is the run of one process, in what it is and in what it tells.
    work.train_deep(None, tmp_path / "alone", 3, TRAIN)
    assert_same(weights(tmp_path / "alone", 3), state, weights(mixed, 3))
    assert_told(lines(tmp_path / "alone"), lines(whole), lines(mixed))
    # 3. One process goes on from what two wrote, with all of it.
    for folder in (mixed, tmp_path / "alone"):
        work.train_deep(None, folder, 4, TRAIN)
    assert_same(weights(tmp_path / "alone", 4), weights(mixed, 4))
    # 4. With whole matrices made orthogonal, and biases solved over the tokens of all.
    work.train_deep(None, tmp_path / "one", 2, MUON)
    assert_same(*(weights(folder, 2, MUON) for folder in (tmp_path / "one", muon)))


def test_stages_of_sharded_weights_keep_all_of_a_run(tmp_path: Path) -> None:
    """Four processes go on from what one wrote, with experts spread, then weights cut; then one again."""
    folder, alone = tmp_path / "four", tmp_path / "alone"
    for run in (folder, alone):
        work.train_deep(None, run, 1, TRAIN)
    spread = ParallelConfig(expert=2, pipeline=2)
    runs = [(spread, folder, 2, TRAIN), (ParallelConfig(data=2, pipeline=2), folder, 3, TRAIN)]
    work.launch(work.train_all, 4, tmp_path, runs)
    work.train_deep(None, folder, 4, TRAIN)
    work.train_deep(None, alone, 4, TRAIN)
    assert_same(weights(alone, 4), weights(folder, 4))
    # Each run is judged at its end, and these ended at other steps.
    told = [
        [line for line in lines(run) if line["kind"] == "step" or line["step"] == 4]
        for run in (alone, folder)
    ]
    assert_told(*told)


def weights(folder: Path, step: int, settings: TrainConfig = TRAIN) -> dict[str, dict[str, Tensor]]:
    """All that a checkpoint keeps of a run, whole, whoever wrote it."""
    model = parts.model(work.deep())
    state = {"model": model.state_dict(), "optimizer": Optimizer(model, settings.optim).state()}
    native.load(folder / "checkpoints" / f"step-{step:06d}", state)
    return state


def names(checkpoint: Path) -> list[set[str]]:
    """What each process wrote of the model."""
    written = []
    for file in sorted(checkpoint.glob("model-*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            written.append(set(opened.keys()))
    return written


def lines(folder: Path) -> list[dict[str, Any]]:
    """What a run told, but for its time and its length."""
    told = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: line[name] for name in line.keys() - {"timing", "steps"}} for line in told]


def assert_same(one: dict[str, dict[str, Tensor]], *others: dict[str, dict[str, Tensor]]) -> None:
    """AdamW's steps differ by rounding of the gradient over eps 1e-3; biases, moved by counts, do not."""
    for other in others:
        for name, tensor in one["model"].items():
            if name.endswith("e_score_correction_bias"):
                assert tensor.any()
            assert_close(other["model"][name], tensor, torch.ones(()), name)


def assert_told(one: list[dict[str, Any]], *others: list[dict[str, Any]]) -> None:
    for other in others:
        assert len(other) == len(one)
        for theirs, ours in zip(other, one, strict=True):
            assert theirs.keys() == ours.keys()
            for name, value in ours.items():
                exact = isinstance(value, str) or name == "expert_load"
                assert theirs[name] == (value if exact else pytest.approx(value, rel=1e-4)), name
