"""A run under torchrun that loses a process, and one that is asked to stop.

The law: kill -9 of any rank at any moment costs at most the steps since the last checkpoint; torchrun starts
all again, and what comes out is bit for bit what an unharmed run gives. SIGTERM saves and exits 0.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

RECIPE = """
seed = 1
[model]
family = "deepseek-v3"
tiny = true
vocab_size = 300
[data]
tokens_per_batch = 64
seq_len = 32
train = ["{text}"]
[train]
steps = {steps}
accumulation = 2
evaluate_every = 0
checkpoint_every = {every}
[parallel]
expert = 2
"""
SHOAL = [sys.executable, "-c", "from shoal.cli import main; main()", "train"]
LAST = 12
PATIENCE = 600  # seconds; other work may hold the machine


def start(
    folder: Path, run: str, torchrun: Sequence[str], changes: Sequence[str] = (), every: int = 3
) -> subprocess.Popen[bytes]:
    recipe = folder / "recipe.toml"
    text = Path(__file__).parents[2] / "src/shoal/ops/api.py"
    recipe.write_text(RECIPE.format(text=text, every=every, steps=LAST))
    command = [*torchrun, *SHOAL, str(recipe), "--out", str(folder / run), "--device", "cpu"]
    command += [word for change in changes for word in ("--set", change)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def torchrun(restarts: int) -> list[str]:
    words = "-m torch.distributed.run --standalone --nproc-per-node 2 --no-python --max-restarts"
    return [sys.executable, *words.split(), str(restarts)]


def steps(run: Path) -> list[dict[str, object]]:
    """The lines of a run's record, without what the clock decides."""
    if not (run / "metrics.jsonl").exists():
        return []
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    told = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in line.items() if key != "timing"} for line in told]


def waited() -> Iterator[None]:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        yield
        time.sleep(0.01)
    raise AssertionError(f"not seen within {PATIENCE} s")


def wait_for_step(run: Path, number: int) -> None:
    for _ in waited():
        if len(steps(run)) >= number:
            return


def workers(run: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes of a run, by rank, once they are there."""
    for _ in waited():
        found = {}
        for child in psutil.Process(run.pid).children():
            try:
                found[child.environ().get("RANK")] = child
            except psutil.Error:  # it is only being born
                continue
        if found.keys() >= {"0", "1"}:
            return [found["0"], found["1"]]
    raise AssertionError


def final(run: Path) -> dict[str, bytes]:
    """The last checkpoint's files, but for those that tell of the run's own time and place."""
    path = run / "checkpoints" / f"step-{LAST:06d}"
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to, and that others are held to."""
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder, "run", torchrun(0)).wait(PATIENCE) == 0
    # The two ranks' weights and moments, and the generators.
    assert len(final(folder / "run")) == 5
    return folder / "run"


def test_rank_0_killed_costs_the_interval_at_most(whole: Path, tmp_path: Path) -> None:
    harmed = start(tmp_path, "run", torchrun(1), ["train.background_saves=true"])
    first, _ = workers(harmed)
    wait_for_step(tmp_path / "run", 4)
    first.kill()
    assert harmed.wait(PATIENCE) == 0
    assert (final(tmp_path / "run"), steps(tmp_path / "run")) == (final(whole), steps(whole))


@pytest.mark.slow
def test_two_processes_share_sequences(whole: Path, tmp_path: Path) -> None:
    """Context parallelism as it is typed: the losses of two shares of experts, from sums in another order.
    Float32 rounds these by 1e-7 each; 1e-4 leaves room for twelve steps, and none for another batch."""
    run = tmp_path / "run"
    changes = ["parallel.expert=1", "parallel.context=2"]
    assert start(tmp_path, "run", torchrun(0), changes, every=0).wait(PATIENCE) == 0
    ours, theirs = ([line["loss"] for line in steps(path)] for path in (run, whole))
    assert len(ours) == LAST + 1  # the held-out text at the end
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert (run / "export" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_any_rank_killed_at_any_moment(seed: int, whole: Path, tmp_path: Path) -> None:
    """A checkpoint every step, so that many kills meet one half-written; two kills in one run."""
    moments = random.Random(seed)
    beside = str(seed % 2 == 0).lower()
    harmed = start(tmp_path, "run", torchrun(2), [f"train.background_saves={beside}"], every=1)
    for _ in range(2):
        before = len(steps(tmp_path / "run"))
        processes = workers(harmed)
        if moments.random() < 0.8:  # else while it starts
            wait_for_step(tmp_path / "run", before + 1)
        time.sleep(moments.random())
        try:
            processes[moments.randrange(2)].kill()
        except psutil.NoSuchProcess:  # it has ended
            break
        for process in processes:
            process.wait(PATIENCE)
    assert harmed.wait(PATIENCE) == 0
    assert (final(tmp_path / "run"), steps(tmp_path / "run")) == (final(whole), steps(whole))
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_sigterm_saves_on_all_ranks_and_exits_0(tmp_path: Path) -> None:
    run = start(tmp_path, "run", torchrun(0), ["train.steps=100000", "train.checkpoint_every=0"])
    wait_for_step(tmp_path / "run", 2)
    workers(run)[1].send_signal(signal.SIGTERM)  # one is told; both stop after the same step
    assert run.wait(PATIENCE) == 0
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name == f"step-{len(steps(tmp_path / 'run')):06d}"


@pytest.mark.slow
def test_sigterm_of_a_process_alone_saves_and_exits_0(tmp_path: Path) -> None:
    run = start(tmp_path, "run", [], ["train.steps=100000", "train.checkpoint_every=0", "parallel.expert=1"])
    wait_for_step(tmp_path / "run", 2)
    run.send_signal(signal.SIGTERM)
    assert run.wait(PATIENCE) == 0
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name == f"step-{len(steps(tmp_path / 'run')):06d}"
