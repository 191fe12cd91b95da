"""Laws of the planner: floors are those of the measured table, papers' figures come out, memory adds up."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import plan as benchmark
from shoal.analysis.planner import TRAINING_MFU, Load, decode_point, fewest, plan_serving, plan_training
from shoal.analysis.published import TOLERANCE, claims
from shoal.config import cost
from shoal.config.families import FAMILIES, family, tiny
from shoal.config.hardware import GPUS, gpu
from shoal.config.hf import from_hf, to_hf

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "2026-11-24-h200-kernels.jsonl"
LITE, H200 = family("deepseek-v2-lite").config, gpu("h200")


@pytest.mark.parametrize(("batch", "ms"), [(1, 1.08), (8, 3.99), (32, 6.77), (128, 7.76), (256, 8.7)])
def test_floors_of_v2_lite_on_an_h200(batch: int, ms: float) -> None:
    """1,024 tokens in and 128 out, the load that the table was made for. Its figures are rounded to 3
    digits: half of the last of the shortest, 8.7, is 0.6%.
    """
    point = decode_point(LITE, H200, 1, Load(prompt=1024, output=128), batch)
    assert 1e3 * point.floor_s == pytest.approx(ms, rel=6e-3)
    assert point.bound == "memory"


def test_prediction_against_the_measured_blocks() -> None:
    """20% is what the planner promises. A step is its 27 blocks, as `benchmarks.kernels block` timed one in a
    graph, and its head, whose weights are read once. (The engine's own steps of that day served two sequences
    of three, LOG.md, and hold nothing.)
    """
    rows = [json.loads(line) for line in MEASURED.read_text("utf-8").splitlines()]
    blocks = {int(row["shape"].split()[0]): row["us"]["ours"] for row in rows if row["op"] == "block"}
    assert {1, 8, 32, 128} <= blocks.keys()
    head = 2 * LITE.vocab_size * LITE.hidden_size / H200.read
    for batch, block in blocks.items():
        point = decode_point(LITE, H200, 1, Load(prompt=1023, output=2), batch)
        step = LITE.num_hidden_layers * block * 1e-6 + head
        assert point.predicted_s == pytest.approx(step, rel=0.2), f"batch {batch}"


def test_the_benchmark_sets_prediction_beside_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real runs of `shoal bench latency`. A CPU is no GPU: that is said, and the ratios are not looked at."""
    (tmp_path / "config.json").write_text(json.dumps(to_hf(tiny("deepseek-v2-lite"))))
    sizes = "--batches 1 2 --prompt 8 --tokens 4 --rounds 1 --device cpu --gpu h200"
    out = tmp_path / "plan.md"
    monkeypatch.setattr(sys, "argv", ["plan", "--model", str(tmp_path), *sizes.split(), "--out", str(out)])
    benchmark.main()
    told = capsys.readouterr().out
    assert "h200 predicted, cpu measured: not the same device" in told
    assert table_of(told) == table_of(out.read_text("utf-8"))
    rows = [json.loads(line) for line in out.with_suffix(".jsonl").read_text("utf-8").splitlines()]
    assert [row["batch"] for row in rows] == [1, 2]
    config = from_hf(json.loads((tmp_path / "config.json").read_text()))
    for row in rows:
        point = decode_point(config, H200, 1, Load(row["batch"], 8, 4, "float32"), row["batch"])
        assert row["step_predicted"] == pytest.approx(1e3 * point.predicted_s)
        assert row["step_measured"] > 0 < row["first_measured"]
    assert benchmark.known("NVIDIA H200") is H200
    assert benchmark.known("cpu") is None
    right = benchmark.Row(1, 1.19, 1.0, 1.0, 1.0)
    assert "| 1.19 | yes |" in benchmark.table([right])
    assert "| 1.21 | no |" in benchmark.table([replace(right, step_predicted=1.21)])


def table_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def test_the_share_of_training_is_what_its_other_figures_say() -> None:
    """180K H800 hours for 1e12 tokens of 250 GFLOPs. Printed to 2 and 3 digits, so to half a percent."""
    share = 1e12 * 250e9 / (180e3 * 3600 * gpu("h800").flops["bfloat16"])
    assert share == pytest.approx(TRAINING_MFU, rel=5e-3)


def test_published_figures_come_out_or_say_why_not() -> None:
    table = list(claims())
    assert len(table) == 10
    for claim in table:
        if claim.settled:
            assert claim.reproduced, claim
        else:
            assert not claim.reproduced
            assert "cannot be reproduced" in claim.note
    assert TOLERANCE == 0.15
    unsettled = [claim.what for claim in table if not claim.settled]
    assert unsettled == ["generation, V2 over 67B, 8 H800"]


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 5000))
def test_distinct_experts_lie_between_one_token_and_all(experts: int, top_k: int, tokens: int) -> None:
    top_k = min(top_k, experts)
    distinct = cost.distinct_experts(experts, top_k, tokens)
    # One token touches K; no batch more than all or more than its choices. Slack for a rounded power.
    assert top_k - 1e-9 <= distinct <= min(experts, tokens * top_k) + 1e-9
    assert distinct <= cost.distinct_experts(experts, top_k, tokens + 1) + 1e-9


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_is_planned_and_more_gpus_hold_more(name: str) -> None:
    config = family(name).config
    length = min(128, config.max_position_embeddings // 2)
    load = Load(batch=8, prompt=length, output=length, weights="bfloat16")
    count = fewest(config, H200, load)
    plan = plan_serving(config, H200, count, load)
    assert plan.point is not None
    assert plan.memory.fits
    assert plan.memory.total == plan.memory.weights + plan.memory.cache + plan.memory.activations
    assert plan.room >= 8
    assert plan_serving(config, H200, 2 * count, load).room > plan.room
    rates = [point.batch / point.floor_s for point in plan.ladder]
    assert rates == sorted(rates), "a larger batch shares what it reads"
    if count > 1:
        assert plan_serving(config, H200, count // 2, load).point is None


def test_one_gpus_bytes_are_the_cost_tables() -> None:
    """At a batch that touches every expert, a step reads every weight but the embedding."""
    point = decode_point(LITE, H200, 1, Load(prompt=1024, output=2), 4096)
    embedding = 2 * LITE.vocab_size * LITE.hidden_size
    # 64 (58/64)^4096 experts are untouched: none, in float64.
    assert point.weight_bytes == cost.weight_bytes(LITE, "bfloat16", mtp=False) - embedding
    assert point.cache_bytes == 4096 * 1025 * 31_104


def test_expert_parallel_splits_experts_and_keeps_the_rest() -> None:
    v3 = family("deepseek-v3").config
    plan = plan_serving(v3, H200, 8, Load(weights="fp8", batch=64))
    assert plan.layout in ("expert parallel", "tensor parallel")
    assert plan.degree == 8, "four GPUs do not hold it"
    experts = sum(
        weight.count * cost.stored_bytes(weight, "fp8")
        for weight in cost.weights(v3, mtp=False)
        if weight.part == "routed"
    )
    whole = cost.weight_bytes(v3, "fp8", mtp=False)
    if plan.layout == "expert parallel":
        assert plan.memory.weights == pytest.approx(whole - experts + experts / 8)
    else:
        assert plan.memory.weights == pytest.approx(whole / 8)


def test_sparse_attention_reads_what_it_picks() -> None:
    """V3.2: 2,048 rows of 576 and every key of 128, in 61 layers, where V3 reads every row."""
    sparse = family("deepseek-v3.2").config
    load = Load(prompt=65535, output=2, weights="fp8")
    point = decode_point(sparse, H200, 8, load, 8, "expert parallel", 8)
    assert point.cache_bytes == 61 * 2 * (2048 * 576 + 65536 * 128)


def test_training_scales_with_tokens_and_not_with_gpus() -> None:
    one = plan_training(LITE, H200, 8, 1e12)
    two = plan_training(LITE, H200, 16, 2e12)
    assert two.gpu_hours == pytest.approx(2 * one.gpu_hours)
    assert two.days == pytest.approx(one.days)
    assert one.dollars is not None
    assert H200.price is not None
    assert one.dollars == pytest.approx(one.gpu_hours * H200.price)
    assert one.gpus_for_states == math.ceil(16 * cost.params(LITE).total / (0.9 * H200.memory))


def test_every_figure_has_a_source() -> None:
    for row in GPUS.values():
        assert row.source
        assert row.price is None or row.price_source != "none found; pass one"
        assert bool(row.measured_bandwidth) == bool(row.measured_source)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: gpu("h20o"), "h20"),
        (lambda: Load(prompt=0), "prompt is 0"),
        (lambda: Load(batch=0), "batch is 0"),
        (lambda: Load(cache_bits=0.5), "0.5"),
        (lambda: plan_serving(LITE, H200, 0, Load()), "count is 0"),
        (lambda: plan_serving(LITE, H200, 1, Load(prompt=10**6)), "1,000,128"),
        (lambda: plan_training(LITE, H200, 1, 1e9, mfu=0.0), "mfu is 0"),
        (lambda: plan_training(LITE, H200, 1, 0), "tokens is 0"),
    ],
)
def test_mistakes_are_named(call: object, words: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=words):
        call()
