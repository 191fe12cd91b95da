"""What the server tells Prometheus, under the names that the field's dashboards know, with the prefix shoal:.

Times are measured where clients feel them, in this process; counts of the engine come with its reports.
Beside the field's names stand those nobody else exports: tokens per layer and expert, how far the busiest
expert is from the mean (MaxVio), distinct experts a step, drafts accepted by position.

The law: a counter never goes back. When an engine is started again its counts start at zero, and those of
the engines before it are added.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from shoal.server.process import EngineProcess

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_LONG = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_GAPS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1, 5)
_TOKENS = tuple(scale * 10**power for power in range(6) for scale in (1, 2, 5))


class Histogram(Collector):
    """One is told of every token, so it holds no lock: whoever observes and collects is one thread."""

    def __init__(self, name: str, what: str, buckets: tuple[float, ...]) -> None:
        self._name, self._what, self._buckets = name, what, buckets
        self._counts, self._sum = [0] * (len(buckets) + 1), 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._buckets, value)] += times
        self._sum += value * times

    def collect(self) -> Iterable[Metric]:
        bounds = [*map(floatToGoString, self._buckets), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._what, buckets, self._sum)


class Metrics:
    def __init__(self, process: EngineProcess) -> None:
        self.registry = CollectorRegistry()

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"shoal:{name}", what, buckets)
            self.registry.register(made)
            return made

        self.first_token = histogram("time_to_first_token_seconds", "Arrival to first token.", _SECONDS)
        self.inter_token = histogram("inter_token_latency_seconds", "Between two tokens.", _GAPS)
        self.per_output_token = histogram(
            "request_time_per_output_token_seconds", "Mean time a token after the first.", _GAPS
        )
        self.end_to_end = histogram("e2e_request_latency_seconds", "Arrival to end.", _LONG)
        self.queue_time = histogram("request_queue_time_seconds", "Arrival to first step.", _LONG)
        self.prefill_time = histogram("request_prefill_time_seconds", "First step to first token.", _LONG)
        self.inference_time = histogram("request_inference_time_seconds", "First step to end.", _LONG)
        self.decode_time = histogram("request_decode_time_seconds", "First token to end.", _LONG)
        self.request_prompt_tokens = histogram("request_prompt_tokens", "Of each request.", _TOKENS)
        self.request_generation_tokens = histogram("request_generation_tokens", "Of each request.", _TOKENS)
        self.success = Counter(
            "shoal:request_success", "Requests that ended.", ["finished_reason"], registry=self.registry
        )
        self.rejections = Counter(
            "shoal:admission_rejections",
            "Requests that were turned away.",
            ["reason"],
            registry=self.registry,
        )
        self.http = Counter("shoal:http_requests", "Answers.", ["path", "status"], registry=self.registry)
        self.registry.register(_EngineReport(process))

    def render(self) -> bytes:
        return generate_latest(self.registry)


_COUNTERS = {
    "prompt_positions": ("prompt_tokens", "Prompt tokens taken in."),
    "generated": ("generation_tokens", "Tokens generated."),
    "preemptions": ("num_preemptions", "Requests that gave up their pages to older ones."),
    "steps": ("engine_steps", "Steps of the model."),
    "step_seconds": ("engine_step_seconds", "Spent in steps."),
}


class _EngineReport:
    """The engine's last report, as metrics."""

    def __init__(self, process: EngineProcess) -> None:
        self._process = process

    def collect(self) -> Iterable[Metric]:
        process = self._process
        stats: dict[str, Any] = process.stats

        def gauge(name: str, what: str, value: float) -> Metric:
            return GaugeMetricFamily(f"shoal:{name}", what, value=value)

        def counter(name: str, what: str, value: float) -> Metric:
            return CounterMetricFamily(f"shoal:{name}", what, value=value)

        yield gauge("engine_up", "1 while the engine serves.", process.state == "ready")
        yield counter("engine_restarts", "Times the engine's process died.", process.deaths)
        if process.info is not None:
            info = process.info
            config = {"num_gpu_blocks": str(info.num_pages), "block_size": str(info.page_size)}
            yield InfoMetricFamily("shoal:cache_config", "The paged cache.", value=config)
        if not stats:
            return
        yield gauge("num_requests_running", "In the engine's batch.", stats["running"])
        yield gauge("num_requests_waiting", "For a place in it.", stats["waiting"])
        used = 1 - stats["pages_free"] / stats["pages"]
        yield gauge("kv_cache_usage_perc", "Share of the cache's pages in use, 0 to 1.", used)
        before = process.past_stats
        for key, (name, what) in _COUNTERS.items():
            yield counter(name, what, stats[key] + before.get(key, 0))
        queries, hits = "prompt_positions", "prompt_positions_cached"
        yield counter(
            "prefix_cache_queries", "Prompt tokens looked up.", stats[queries] + before.get(queries, 0)
        )
        yield counter("prefix_cache_hits", "Of those, found.", stats[hits] + before.get(hits, 0))
        if stats["drafted"]:
            yield from _drafts(stats["drafted"], stats["accepted"])
        if stats["expert_cache_queries"] is not None:
            queries, hits = "expert_cache_queries", "expert_cache_hits"
            past = before.get(queries) or 0, before.get(hits) or 0
            what = "Offloaded experts that steps named."
            yield counter("expert_cache_queries", what, stats[queries] + past[0])
            yield counter("expert_cache_hits", "Of those, on the device.", stats[hits] + past[1])
        if stats["expert_tokens"] is not None:
            yield from _experts(stats)


def _drafts(drafted: list[int], accepted: list[int]) -> Iterable[Metric]:
    yield CounterMetricFamily("shoal:spec_decode_num_drafts", "Rounds of drafting.", value=drafted[0])
    yield CounterMetricFamily("shoal:spec_decode_num_draft_tokens", "Drafted.", value=sum(drafted))
    yield CounterMetricFamily("shoal:spec_decode_num_accepted_tokens", "Accepted.", value=sum(accepted))
    by_position = CounterMetricFamily(
        "shoal:spec_decode_num_accepted_tokens_per_pos", "Accepted, by position.", labels=["position"]
    )
    for position, count in enumerate(accepted):
        by_position.add_metric([str(position)], count)
    yield by_position


def _experts(stats: dict[str, Any]) -> Iterable[Metric]:
    load = CounterMetricFamily(
        "shoal:expert_tokens", "Tokens each expert was given.", labels=["layer", "expert"]
    )
    violation = GaugeMetricFamily(
        "shoal:expert_max_violation", "Load of the busiest expert over the mean, less 1.", labels=["layer"]
    )
    distinct = CounterMetricFamily(
        "shoal:distinct_experts", "Experts given a token, summed over steps.", labels=["layer"]
    )
    for layer, counts in enumerate(stats["expert_tokens"]):
        for expert, count in enumerate(counts):
            load.add_metric([str(layer), str(expert)], count)
    for layer, value in enumerate(stats["max_violation"]):
        violation.add_metric([str(layer)], value)
    for layer, count in enumerate(stats["experts_touched"] or ()):
        distinct.add_metric([str(layer)], count)
    yield from (load, violation, distinct)
