"""`shoal bench latency` and `throughput`: all tokens asked for are counted; like is compared with like."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Shoal, refusal

SMALL = ("--prompt", "8", "--tokens", "4", "--device", "cpu")


def test_latency_counts_every_round_and_compares(shoal: Shoal, checkpoint: Path, tmp_path: Path) -> None:
    wanted = ("bench", "latency", checkpoint, "--batch", "3", "--rounds", "2", *SMALL)
    first = shoal(*wanted, "--json")
    told = json.loads(first.out)
    assert told["completed"] == 3 * 2
    assert told["output_tokens_per_s"] * told["duration_s"] == pytest.approx(3 * 2 * 4)
    assert told["total_tokens_per_s"] * told["duration_s"] == pytest.approx(3 * 2 * (8 + 4))
    assert 0 < told["p50_ttft_ms"] <= told["p50_e2e_ms"]
    # The floor is the ideal: what was measured takes longer.
    assert 0 < told["of_floor"] < 1
    assert told["of_floor"] == pytest.approx(told["floor"]["latency_ms"] / told["p50_e2e_ms"])
    file = tmp_path / "before.json"
    file.write_text(json.dumps({**told, "duration_s": 2 * told["duration_s"]}))
    again = json.loads(shoal(*wanted, "--json", "--baseline", file).out)
    assert again["baseline"]["duration_s"] == pytest.approx(again["duration_s"] / (2 * told["duration_s"]))
    assert "%" in shoal(*wanted, "--baseline", file).out
    other = shoal("bench", "latency", checkpoint, "--batch", "2", *SMALL, "--baseline", file)
    assert "measured with batch 3, this run has 2" in refusal(other)


def test_throughput_serves_the_whole_queue(shoal: Shoal, tmp_path: Path) -> None:
    """Of random weights in a config's shape, more requests than run at once."""
    from shoal.config.families import tiny
    from shoal.config.hf import to_hf

    (tmp_path / "config.json").write_text(json.dumps(to_hf(tiny("deepseek-v2-lite"))))
    wanted = ("bench", "throughput", tmp_path, "--random", "--requests", "5", "--max-sequences", "2", *SMALL)
    told = json.loads(shoal(*wanted, "--json").out)
    assert told["completed"] == 5 and "expert_cache_hit_rate" not in told
    assert told["output_tokens_per_s"] * told["duration_s"] == pytest.approx(5 * 4)
    assert told["of_floor"] == pytest.approx(
        told["output_tokens_per_s"] / told["floor"]["output_tokens_per_s"]
    )
    few = json.loads(shoal(*wanted, "--json", "--offload", "0.0001", "--kv-cache-dtype", "fp8").out)
    assert 0 < few["expert_cache_hit_rate"] < 1
    assert few["settings"]["offload"] == 0.0001 and few["settings"]["kv_cache_dtype"] == "fp8"
    assert "offload is 100 GiB; it must be above 0 and at most" in refusal(shoal(*wanted, "--offload", "100"))


@pytest.mark.parametrize("verb", [("latency", "x"), ("throughput", "x"), ("serve",)])
def test_a_bad_baseline_is_one_line(
    shoal: Shoal, checkpoint: Path, tmp_path: Path, verb: tuple[str, ...]
) -> None:
    name = [str(checkpoint) if part == "x" else part for part in verb]
    file = tmp_path / "none.json"
    assert "cannot be read" in refusal(shoal("bench", *name, "--baseline", file))
    file.write_text("[1]")
    assert "has no settings" in refusal(shoal("bench", *name, "--baseline", file))
    file.write_text('{"settings": {"bench": "other"}}')
    assert "measured with bench 'other'" in refusal(shoal("bench", *name, "--baseline", file))
    assert "must be at least 1" in refusal(shoal("bench", *name, "--tokens", "0"))
