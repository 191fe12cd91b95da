"""Laws of the spike guard: a leap is found, left out or rolled back from, told, and judged alike later."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.batch import Batch
from shoal.train.guards import SpikeGuard
from shoal.train.metrics import Event, SpikeReport, StepReport
from tests.train import parts
from tests.train.test_trainer import SETTINGS, assert_same_run, state, trainer

CALM = replace(
    SETTINGS, steps=24, accumulation=1, evaluate_every=0, checkpoint_every=5, spike_deviations=8.0, keep=9
)
SPIKED = 20  # the micro-batch that leaps


def leaping(index: int) -> Batch:
    """One pack in all steps, but for one whose targets weigh ten thousand times more."""
    pack = parts.batch(0)
    assert pack.weights_T is not None
    return replace(pack, weights_T=pack.weights_T * 1e4) if index == SPIKED else pack


def spikes(folder: Path, kind: str = "spike") -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_the_limit_is_the_mean_and_so_many_deviations() -> None:
    guard = SpikeGuard(3.0)
    for i in range(15):
        guard.accept(2.0 + (i % 2))
        assert guard.limit() == float("inf")
    guard.accept(3.0)
    assert guard.limit() == pytest.approx(2.5 + 3 * 0.5)
    for _ in range(64):  # only the last 64 count; a flat run's spread is 1% of its mean
        guard.accept(2.0)
    assert guard.limit() == pytest.approx(2.0 + 3 * 0.02)
    assert SpikeGuard(0.0).limit() == float("inf")


@pytest.mark.parametrize("inside", [False, True])
def test_a_spike_is_skipped_and_touches_nothing(inside: bool, tmp_path: Path) -> None:
    """The run is the one whose guard found nothing to do, and which had no such batch."""
    optim = replace(CALM.optim, in_backward=inside)
    settings = replace(CALM, optim=optim, steps=SPIKED + 1, checkpoint_every=SPIKED)
    events: list[Event] = []
    run = trainer(tmp_path, settings, batches=leaping, evaluation=None, observe=events.append)
    run.run()
    before, after = (state(tmp_path / "checkpoints" / f"step-{step:06d}") for step in (SPIKED, SPIKED + 1))
    assert {name for name in before if not torch.equal(before[name], after[name])} == set()
    (spike,) = spikes(tmp_path)
    assert (spike["step"], spike["action"]) == (SPIKED + 1, "skip")
    assert spike["loss"] > spike["limit"]
    assert [type(event) for event in events if isinstance(event, SpikeReport)] == [SpikeReport]


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_after_a_spike_the_run_goes_on_and_resumes_bit_for_bit(action: Any, tmp_path: Path) -> None:
    """Stopped before the spike, after it, and between the checkpoint and it: the run that was not."""
    settings = replace(CALM, spike_action=action)
    trainer(tmp_path / "whole", settings, batches=leaping, evaluation=None).run()
    (spike,) = spikes(tmp_path / "whole")
    # Rolled back to the checkpoint at its step 20, which is just before the batch that leapt.
    assert spike["step"] == SPIKED + 1
    for stop in (17, 18, 21, 24):
        done: list[int] = []

        def interrupt(event: Event, stop: int = stop, done: list[int] = done) -> None:
            if isinstance(event, StepReport) and event.step == stop and not done:
                done.append(stop)
                os.kill(os.getpid(), signal.SIGINT)

        run = trainer(tmp_path / "parts", settings, batches=leaping, evaluation=None, observe=interrupt)
        run.resume()
        run.run()
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    steps = [line["step"] for line in spikes(tmp_path / "whole", "step")]
    assert steps == list(range(1, 25))


def test_rolling_back_passes_over_all_batches_since_the_checkpoint(tmp_path: Path) -> None:
    seen: list[int] = []

    def batches(index: int) -> Batch:
        seen.append(index)
        return leaping(index)

    settings = replace(CALM, spike_action="rollback", checkpoint_every=9)
    trainer(tmp_path, settings, batches=batches, evaluation=None).run()
    assert seen == [*range(21), *range(21, 27)]  # back to step 18, and on with batch 21
    assert spikes(tmp_path)[0]["step"] == 19


def test_a_loss_that_leaps_again_and_again_ends_the_run(tmp_path: Path) -> None:
    def batches(index: int) -> Batch:
        return leaping(min(index, SPIKED))

    settings = replace(CALM, spike_action="rollback")
    with pytest.raises(ValueError, match="3 times after rolling back to step 20"):
        trainer(tmp_path, settings, batches=batches, evaluation=None).run()
    fresh = trainer(
        tmp_path / "none", replace(settings, checkpoint_every=0), batches=batches, evaluation=None
    )
    with pytest.raises(ValueError, match="no checkpoint to roll back to"):
        fresh.run()
