"""`shoal bench serve`: a running server under load, as its clients feel it.

So many streams at a time over /v1/completions, with prompts of random ids and answers of a fixed length. What
is counted is what the server says it sent (`usage`), and when its bytes arrived. One process sends all of it:
on a small machine it takes its share of the cores from the server.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from shoal.cli import baseline as baselines
from shoal.cli.baseline import Baseline


@dataclass
class Load:
    """What clients felt, in seconds."""

    first: list[float] = field(default_factory=list)  # to the first token
    gaps: list[float] = field(default_factory=list)  # between two arrivals
    whole: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)  # of an engine, in which all requests decode
    prompt_tokens: int = 0
    generated: int = 0
    errors: int = 0
    seconds: float = 0.0


def serve(
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:8000",
    streams: Annotated[int, typer.Option(help="Requests at a time.")] = 32,
    requests: Annotated[int, typer.Option(help="Requests in all.")] = 128,
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 128,
    vocabulary: Annotated[int, typer.Option(help="Prompts are drawn from ids 100 up to this one.")] = 10000,
    key: Annotated[str | None, typer.Option(envvar="SHOAL_API_KEY", help="The API key.")] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    baseline: Baseline = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON (docs/json.md).")] = False,
) -> None:
    """Load a running server: tokens a second, time to first token, and between tokens."""
    for name, value in (("streams", streams), ("requests", requests), ("prompt", prompt), ("tokens", tokens)):
        if value < 1:
            raise ValueError(f"--{name} is {value}; it must be at least 1")
    settings = {"bench": "serve", "streams": streams, "requests": requests, "prompt": prompt}
    settings |= {"tokens": tokens, "vocabulary": vocabulary, "seed": seed}
    earlier = baselines.read(baseline, settings)
    load = asyncio.run(measure(url, streams, requests, prompt, tokens, vocabulary, key, seed))
    baselines.show({"settings": settings, **summarise(load)}, earlier, as_json)


async def measure(
    url: str,
    streams: int,
    requests: int,
    prompt: int,
    tokens: int,
    vocabulary: int,
    key: str | None,
    seed: int,
) -> Load:
    import httpx

    load, draw = Load(), random.Random(seed)
    bodies = [
        {
            "prompt": [draw.randrange(100, vocabulary) for _ in range(prompt)],
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for _ in range(requests)
    ]
    waiting = iter(bodies)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=None, limits=limits) as client:

        async def one_after_another() -> None:
            for body in waiting:
                await _ask(client, body, load)

        start = time.perf_counter()
        try:
            await asyncio.gather(*(one_after_another() for _ in range(streams)))
        except httpx.ConnectError:
            raise ValueError(f"no server answers at {url}; start one with `shoal serve`") from None
        load.seconds = time.perf_counter() - start
    return load


async def _ask(client: Any, body: dict[str, Any], load: Load) -> None:
    start = last = time.perf_counter()
    begun, ended = False, False
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            load.errors += 1
            return
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now = time.perf_counter()
            chunk = json.loads(line[6:])
            if "error" in chunk:
                load.errors += 1
                return
            if (usage := chunk.get("usage")) is not None:
                load.prompt_tokens += usage["prompt_tokens"]
                load.generated += usage["completion_tokens"]
                ended = True
            elif not begun:
                begun = True
                load.first.append(now - start)
            else:
                load.gaps.append(now - last)
            last = now
    load.errors += not ended
    load.whole.append(time.perf_counter() - start)


def summarise(load: Load) -> dict[str, float | int]:
    """Rates and percentiles, under the names that other benchmarks use."""
    result: dict[str, float | int] = {
        "completed": len(load.whole),
        "errors": load.errors,
        "duration_s": load.seconds,
        "output_tokens_per_s": load.generated / load.seconds,
        "total_tokens_per_s": (load.generated + load.prompt_tokens) / load.seconds,
    }
    for name, values in (("ttft_ms", load.first), ("itl_ms", load.gaps), ("e2e_ms", load.whole)):
        ranked = sorted(values)
        for percent in (50, 90, 99):
            if ranked:
                at = min(len(ranked) - 1, len(ranked) * percent // 100)
                result[f"p{percent}_{name}"] = 1000 * ranked[at]
    return result
