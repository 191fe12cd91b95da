"""Laws of saves in the background: the bytes of one that is waited for, no step that waits for the disk, and
a disk that fails tells in the end and leaves what was there.
"""

from __future__ import annotations

import os
import resource
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.checkpoint import native
from shoal.config.run import OptimConfig, TrainConfig
from shoal.train.metrics import CheckpointReport, Event, Observer, StepReport
from shoal.train.trainer import Trainer
from tests.train import parts

SETTINGS = TrainConfig(
    steps=6, checkpoint_every=2, keep=2, background_saves=True, optim=OptimConfig(schedule="constant")
)


def train(settings: TrainConfig, folder: Path, observe: Observer = lambda event: None) -> None:
    Trainer(parts.model(), parts.batch, settings, folder, generator=torch.Generator(), observe=observe).run()


def files(folder: Path) -> dict[str, bytes]:
    """Every checkpoint, but for the generators' states: torch's own starts at random."""
    found = {str(file.relative_to(folder)): file for file in (folder / "checkpoints").rglob("*.safetensors")}
    return {name: file.read_bytes() for name, file in found.items() if "generators" not in name}


def test_steps_go_on_while_the_disk_is_slow_and_the_bytes_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(replace(SETTINGS, background_saves=False), tmp_path / "waited")
    going_on, in_time, told = threading.Event(), list[bool](), list[int]()
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        # The disk of the first save answers only when step 3 is over.
        if threading.current_thread() is not threading.main_thread() and not in_time:
            in_time.append(going_on.wait(60))
        fsync(descriptor)

    def watch(event: Event) -> None:
        if isinstance(event, StepReport) and event.step == 3:
            going_on.set()
        if isinstance(event, CheckpointReport):
            told.append(event.step)

    monkeypatch.setattr(os, "fsync", slow)
    train(SETTINGS, tmp_path / "beside", watch)
    assert in_time == [True]
    assert told == [2, 4, 6]
    assert files(tmp_path / "beside") == files(tmp_path / "waited")
    for path in native.find(tmp_path / "beside" / "checkpoints"):
        native.verify(path)
    assert len(native.find(tmp_path / "beside" / "checkpoints")) == SETTINGS.keep


def test_a_disk_that_fails_stops_the_run_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    last = 0

    def watch(event: Event) -> None:
        nonlocal last
        if isinstance(event, CheckpointReport):  # no file larger than this from now on
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        if isinstance(event, StepReport):
            last = event.step

    try:
        with pytest.raises(OSError, match=r"step-\d{6} could not be saved .*; .*step-000002 is intact"):
            train(replace(SETTINGS, steps=100), tmp_path, watch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert last <= 6  # the save after the one that failed finds out at the latest
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    native.verify(tmp_path / "checkpoints" / "step-000002")
