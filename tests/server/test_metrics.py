"""Laws of the times that are exported: a request's parts are all there, and add up to the whole."""

from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path

import httpx
import pytest

from shoal.engine import Engine, EngineSettings, SamplingParams
from shoal.model.offloaded import offload
from shoal.server.metrics import Metrics
from shoal.server.process import EngineProcess
from shoal.server.worker import plain
from tests.engine.conftest import build
from tests.server.conftest import Server

PARTS = {
    "queue": "request_queue_time_seconds",
    "prefill": "request_prefill_time_seconds",
    "decode": "request_decode_time_seconds",
    "inference": "request_inference_time_seconds",
    "first": "time_to_first_token_seconds",
    "whole": "e2e_request_latency_seconds",
}


def test_the_parts_of_a_request_add_up(server: Server, http: httpx.Client) -> None:
    def read(kind: str) -> dict[str, float]:
        return {part: server.metric(f"{name}_{kind}") for part, name in PARTS.items()}

    counts, sums = read("count"), read("sum")
    for prompt in ("a", "b", "c"):
        body = {"prompt": prompt, "max_tokens": 8, "ignore_eos": True, "n": 2}
        assert http.post("/v1/completions", json=body).status_code == 200
    more = {part: count - counts[part] for part, count in read("count").items()}
    assert more == dict.fromkeys(PARTS, 6)
    took = {part: total - sums[part] for part, total in read("sum").items()}
    assert all(seconds > 0 for seconds in took.values())
    # The parts of a request end at the same readings of one clock: sums of doubles are all that differs.
    assert took["queue"] + took["prefill"] == pytest.approx(took["first"], abs=1e-6)
    assert took["prefill"] + took["decode"] == pytest.approx(took["inference"], abs=1e-6)
    assert took["queue"] + took["inference"] == pytest.approx(took["whole"], abs=1e-6)


def test_offloaded_experts_are_counted_over_restarts() -> None:
    """By the report of a real engine, and what one before it had counted."""
    engine = Engine(offload(deepcopy(build("deepseek-v3")), 1e-4), EngineSettings())
    process = EngineProcess(lambda report: engine)
    process.stats = plain(engine.stats())
    text = Metrics(process).render().decode()
    assert "shoal:expert_cache_queries_total 0.0" in text
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=4))
    process.stats, process.past_stats = plain(engine.stats()), {"expert_cache_hits": 10}
    text = Metrics(process).render().decode()
    assert f"shoal:expert_cache_queries_total {float(engine.stats().expert_cache_queries or 0)}" in text
    assert f"shoal:expert_cache_hits_total {10.0 + (engine.stats().expert_cache_hits or 0)}" in text
    dashboard = (Path(__file__).parents[2] / "deploy" / "grafana.json").read_text("utf-8")
    asked = set(re.findall(r"shoal:expert_cache\w+", dashboard))
    assert len(asked) == 2
    assert all(f"\n{name} " in text for name in asked)
    process.stats = plain(Engine(build("deepseek-v3"), EngineSettings()).stats())
    assert "expert_cache" not in Metrics(process).render().decode()
