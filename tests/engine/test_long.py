"""Laws of benchmarks/long.py: a cache takes what `cost` tells; a copied one is looked back on like any."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import long as benchmark
from benchmarks.decode import prompts
from shoal.config.families import tiny
from shoal.engine import Engine, SamplingParams

CPU = torch.device("cpu")
ONE = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "long.md"
    sizes = "--tiny --models v2-lite v3.2-slice --length 256 --budget 64 --many 2"
    monkeypatch.setattr(sys, "argv", ["long", *sizes.split(), "--out", str(out)])
    benchmark.main()
    rows = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [(row["model"], row["cache"], row["batch"]) for row in rows] == [
        (model, cache, batch)
        for model, narrow in (("v2-lite", ("fp8",)), ("v3.2-slice", ("fp8 keys", "fp8")))
        for cache in ("wide", *narrow)
        for batch in (1, 2)
    ]
    assert all((row["first_ms"] is None) == (row["batch"] == 2) for row in rows)
    assert rows[2]["cache_bytes"] < rows[0]["cache_bytes"]


def test_a_cache_that_fails_leaves_the_others_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, copy = tmp_path / "long.md", benchmark.copy_cache

    def fail(engine: Engine, ids: list[int], other: list[int]) -> None:
        if engine.settings.cache_dtype == "fp8":
            raise RuntimeError("no room")
        copy(engine, ids, other)

    monkeypatch.setattr(benchmark, "copy_cache", fail)
    sizes = "--tiny --models v2-lite v3-slice --caches fp8 wide --length 128 --budget 64 --many 2"
    monkeypatch.setattr(sys, "argv", ["long", *sizes.split(), "--out", str(out)])
    with pytest.raises(SystemExit, match="failed: v2-lite, fp8 cache; v3-slice, fp8 cache"):
        benchmark.main()
    rows = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert [(row["cache"], row["batch"]) for row in rows] == 2 * [("fp8", 1), ("wide", 1), ("wide", 2)]


def test_a_cache_that_costs_more_than_is_told_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = benchmark.build(tiny("deepseek-v2-lite"), CPU)
    told = benchmark.told_bytes
    monkeypatch.setattr(benchmark, "told_bytes", lambda config, cache: told(config, cache) - 4)
    with pytest.raises(AssertionError, match="bytes were allocated"):
        benchmark.open_measured(model, "wide", 64, 2)


def test_a_copied_cache_gives_what_it_was_copied_from() -> None:
    """The last page is read anew, with ids of its own; with equal ids there the answer is the first one's."""
    model = benchmark.build(tiny("deepseek-v2-lite"), CPU)
    engine, _ = benchmark.open_engine(model, "wide", 64, 2, num_pages=12)
    size = engine.pool.page_size
    first, other = prompts(model.config, 2, 3 * size)
    other = other[:-size] + first[-size:]
    (wanted,) = engine.generate([first], ONE)
    benchmark.copy_cache(engine, first, other)
    (got,) = engine.generate([other], ONE)
    assert got.cached == 2 * size
    assert got.ids == wanted.ids and got.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)


def test_what_a_token_looks_back_on() -> None:
    """V2-Lite in 128K: 27 layers of 576 bfloat16, 656 bytes in FP8. V3.2: 2,048 latents, and every key."""
    lite, sparse = benchmark.find_shape("v2-lite"), benchmark.find_shape("v3.2-slice")
    assert benchmark.looked_back_on(lite, "wide", 131072) == 131072 * 27 * 576 * 2
    assert benchmark.looked_back_on(lite, "fp8", 131072) == 131072 * 27 * 656
    assert benchmark.looked_back_on(sparse, "wide", 131072) == 4 * 2 * (2048 * 576 + 131072 * 128)
    assert benchmark.looked_back_on(sparse, "fp8 keys", 131072) == 4 * (2048 * 576 * 2 + 131072 * 132)
    assert benchmark.looked_back_on(sparse, "fp8", 131072) == 4 * (2048 * 656 + 131072 * 132)
    assert benchmark.looked_back_on(sparse, "wide", 1000) == 1000 * 4 * 2 * (576 + 128)
