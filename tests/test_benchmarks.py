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
