"""Laws of watching a run: what is shown is what happened, and a picture needs no more than metrics.jsonl."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shoal.cli.app import app
from shoal.cli.plot import read
from shoal.cli.view import TrainingView, heat_map, numbers
from shoal.train.metrics import EvaluationReport, MetricsLog, SpikeReport, StepReport, to_line
from shoal.train.track import Tracker, tracking

STEP = StepReport(
    step=1,
    steps=9,
    terms={"loss": 2.5, "z": 0.25},
    lr=1e-3,
    grad_norm=0.5,
    tokens=1000,
    max_violation=(0.5, 1.0),
    seconds=2.0,
    tokens_per_second=500.0,
    flops_per_second=4e14,
    mfu=0.404,
    peak_bytes=3 << 30,
    expert_load=((4, 4, 4, 4), (0, 8, 4, 4)),
)
HELD_OUT = EvaluationReport(1, 2.0, 1.5, STEP.expert_load, 0.1, {"en": 1.25, "zh": 1.75})


def make_run(folder: Path, steps: int = 5) -> Path:
    with MetricsLog(folder / "metrics.jsonl", 0) as log:
        for step in range(1, steps + 1):
            log.write(to_line(replace(STEP, step=step, tokens=1000 * step)))
        log.write(to_line(replace(HELD_OUT, step=steps)))
    return folder


def test_a_step_in_one_line_tells_what_it_knows_and_no_more() -> None:
    assert numbers(STEP) == (
        "loss 2.500  500 tokens/s  lr 1.0e-03  gradient 0.50  400 TFLOP/s  MFU 40.4%  3.0 GiB  MaxVio 0.75"
    )
    bare = replace(STEP, mfu=None, peak_bytes=0, max_violation=())
    assert numbers(bare) == "loss 2.500  500 tokens/s  lr 1.0e-03  gradient 0.50"


def test_the_heat_map_has_a_row_a_layer_and_adds_up_what_does_not_fit() -> None:
    rows = heat_map(STEP.expert_load, 80)
    assert [row.plain.count("█") for row in rows] == [4, 4]
    even, blue, red = (str(rows[layer].spans[cell].style) for layer, cell in ((0, 0), (1, 0), (1, 1)))
    assert (even, blue, red) == ("rgb(0,200,0)", "rgb(0,0,255)", "rgb(255,0,0)")
    wide = heat_map([list(range(256))], 72)
    assert wide[0].plain.count("█") == 64
    assert heat_map([], 80) == []


def test_off_a_terminal_events_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingView() as view:
        for event in (STEP, HELD_OUT, SpikeReport(7, 9.0, 3.0, "skip"), SpikeReport(7, 9.0, 3.0, "rollback")):
            view(event)
    told = " ".join(capsys.readouterr().err.split())
    assert "step 1/9 loss 2.500" in told
    assert "step 1: 1.500 bits per byte of held-out text en 1.250 zh 1.750" in told
    assert "step 7: loss leapt to 9.000, above 3.000: left out" in told
    assert "rolled back to step 6" in told


def test_plot_draws_runs_and_tells_how_each_stands(tmp_path: Path) -> None:
    runs = [str(make_run(tmp_path / name, steps)) for name, steps in (("a", 3), ("longer", 5))]
    result = CliRunner().invoke(app, ["plot", *runs, "--out", str(tmp_path / "runs.png")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith(("a ", "longer "))]
    assert [row[1] for row in rows] == ["3", "5"]
    assert rows[1][2:] == ["5,000", "2.500", "1.500", "500", "en", "1.250", "zh", "1.750"]


def test_a_line_cut_short_is_left_out_and_a_run_without_steps_is_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "cut", 2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "st')
    assert len(read(folder)) == 3
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="has no step yet"):
        read(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"holds no metrics\.jsonl"):
        read(tmp_path)


def test_a_line_has_no_load_of_every_step_and_its_timing_apart() -> None:
    line = to_line(STEP)
    assert "expert_load" not in line
    assert line["z"] == 0.25
    assert line["timing"]["mfu"] == 0.404
    assert not line.keys() & {"seconds", "mfu", "peak_bytes"}
    assert to_line(HELD_OUT)["domains"] == {"en": 1.25, "zh": 1.75}
    json.dumps(line)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_every_number_by_its_name_and_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tracking("tensorboard", tmp_path) as observe:
        observe(STEP)
        observe(replace(STEP, step=2, terms={"loss": 2.25, "z": 0.5}))
        observe(HELD_OUT)
    told = EventAccumulator(str(tmp_path / "tensorboard"))
    told.Reload()
    assert [(event.step, event.value) for event in told.Scalars("loss")] == [(1, 2.5), (2, 2.25)]
    assert told.Scalars("bits_per_byte/zh")[0].value == 1.75
    assert told.Scalars("max_violation")[0].value == 0.75


def test_trackio_and_wandb_get_every_number_by_its_name_and_step(tmp_path: Path) -> None:
    """Each in a process of its own: they keep threads and settings."""
    read = {"trackio": _read_trackio, "wandb": _read_wandb}
    for tracker in filter(importlib.util.find_spec, read):
        there = {"TRACKIO_DIR": str(tmp_path / "kept"), "WANDB_MODE": "offline", "HOME": str(tmp_path)}
        command = "import sys; from tests.cli.test_watch import hand_over; hand_over(*sys.argv[1:])"
        asked = [sys.executable, "-c", command, tracker, str(tmp_path / "runs" / "one")]
        subprocess.run(asked, check=True, env={**os.environ, **there})
        told = read[tracker](tmp_path)
        assert [(step, numbers["loss"]) for step, numbers in told if "loss" in numbers] == [
            (1, 2.5),
            (2, 2.25),
        ]
        assert [numbers["bits_per_byte/zh"] for step, numbers in told if "held_out_loss" in numbers] == [1.75]


def hand_over(tracker: Tracker, folder: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tracking(tracker, Path(folder)) as observe:
        observe(STEP)
        observe(replace(STEP, step=2, terms={"loss": 2.25, "z": 0.5}))
        observe(replace(HELD_OUT, step=2))


def _read_trackio(home: Path) -> list[tuple[int, dict[str, float]]]:
    with contextlib.closing(sqlite3.connect(home / "kept" / "runs.db")) as kept:
        rows = kept.execute("select step, metrics from metrics order by id").fetchall()
    return [(step, json.loads(numbers)) for step, numbers in rows]


def _read_wandb(home: Path) -> list[tuple[int, dict[str, float]]]:
    """Of its file: 7 bytes, then records (checksum, size, kind, bytes) in blocks of 32 KiB, of which one is
    enough here."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportMissingImports]

    (path,) = (home / "runs" / "one").glob("wandb/offline-run-*/run-*.wandb")
    data, at, told = path.read_bytes(), 7, []
    assert len(data) < 1 << 15
    while at < len(data):
        _, size, _ = struct.unpack_from("<IHB", data, at)
        record, at = Record.FromString(data[at + 7 : at + 7 + size]), at + 7 + size
        if items := {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}:
            told.append((int(items["_step"]), {name: json.loads(value) for name, value in items.items()}))
    return told
