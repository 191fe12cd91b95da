"""A benchmark that measures a GPU runs whole without one, on a tiny shape."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_server_benchmark_starts_twice_and_counts_every_token(tmp_path: Path) -> None:
    out = tmp_path / "server.md"
    command = [sys.executable, "-m", "benchmarks.server", "--model", "tiny-deepseek-v2-lite"]
    command += ["--device", "cpu", "--streams", "4", "--prompt", "24", "--tokens", "20", "--rounds", "1"]
    command += ["--max-batch-tokens", "64", "--cache-gib", "0.05", "--out", str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0
    told = json.loads(out.with_suffix(".jsonl").read_text())
    assert set(told["starts"]) == {"empty caches", "warm"}
    for seconds, phases in told["starts"].values():
        assert phases.keys() >= {"interpreter, imports", "weights", "first answer"}
        assert sum(phases.values()) == pytest.approx(seconds)
    server, offline = told["rows"]
    assert (server["what"], offline["what"]) == ("server", "offline")
    for row in (server, offline):
        assert row["tokens_per_second"] == pytest.approx(4 * 20 / row["seconds"])
    assert "Through the server" in out.read_text()


@pytest.mark.slow
def test_precision_benchmark_trains_both_sides_on_the_same_tokens(tmp_path: Path) -> None:
    from benchmarks import precision
    from shoal.data.shard import TokenizedDocument, write_shard

    ids = [(7 * place * place + place) % 500 for place in range(20_000)]
    write_shard(tmp_path / "text.shard", [TokenizedDocument(ids, len(ids))], 512)
    runs = []
    for side, seed in (("bfloat16", 0), ("fp8", 0), ("bfloat16", 1)):
        runs.append(tmp_path / f"{side}-{seed}.jsonl")
        command = [
            sys.executable,
            "-m",
            "benchmarks.precision",
            "run",
            str(tmp_path / "text.shard"),
            "--tiny",
        ]
        command += ["--precision", side, "--seed", str(seed), "--out", str(runs[-1])]
        command += ["--steps", "52", "--warmup", "4", "--tokens", "64", "--length", "32"]
        assert subprocess.run(command, cwd=Path(__file__).parents[1]).returncode == 0
    losses = [[json.loads(line)["loss"] for line in path.read_text().splitlines()] for path in runs]
    assert [len(each) for each in losses] == [52] * 3
    # FP8 moves the loss, and less than another seed's weights do.
    narrow, _ = precision.compare(losses[0], losses[1])
    other, _ = precision.compare(losses[0], losses[2])
    assert 0 < abs(narrow) < abs(other)
    assert f"| fp8, seed 0 | bfloat16, seed 0 | {narrow:+.3%} |" in precision.table(runs)
