"""`shoal bench latency` and `shoal bench throughput`: the engine by itself, without HTTP, against the floor.

Latency is one batch of requests that begin together, served several times; throughput is a queue of requests
through the engine. Prompts are random ids, answers have a fixed length. Beside what was measured stands the
floor of this model on this device (analysis/floor.py), and the share of it that was reached.
"""

from __future__ import annotations

import random
import statistics
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli import baseline as baselines
from shoal.cli.baseline import Baseline
from shoal.cli.bench_serve import Load, summarise
from shoal.cli.device import Device, Download, Dtype, KvCacheDtype, Offload, find_device

if TYPE_CHECKING:
    from shoal.engine import Engine, EngineSettings

Model = Annotated[str, typer.Argument(help="A checkpoint folder, a hub id, or with --random a family.")]
Random = Annotated[bool, typer.Option("--random", help="Random weights in the shape of a family or config.")]
Prompt = Annotated[int, typer.Option(help="Tokens of each prompt.")]
Tokens = Annotated[int, typer.Option(help="Tokens of each answer.")]
Seed = Annotated[int, typer.Option(help="Of prompts and weights.")]
Speculate = Annotated[int, typer.Option(help="Tokens guessed ahead with the model's MTP module.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON (docs/json.md).")]


def latency(
    model: Model,
    random_: Random = False,
    batch: Annotated[int, typer.Option(help="Requests that begin together.")] = 8,
    prompt: Prompt = 32,
    tokens: Tokens = 128,
    rounds: Annotated[int, typer.Option(help="Times that the batch is served, after one to warm up.")] = 5,
    speculate: Speculate = 0,
    offload: Offload = None,
    kv_cache_dtype: KvCacheDtype = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    download: Download = False,
    baseline: Baseline = None,
    as_json: AsJson = False,
) -> None:
    """One batch through the engine: time to the first token, between tokens, and to the end."""
    settings = {"bench": "latency", "model": model, "random": random_, "batch": batch, "prompt": prompt}
    settings |= {"tokens": tokens, "rounds": rounds, "speculate": speculate, "seed": seed}
    settings |= {"kv_cache_dtype": kv_cache_dtype, "offload": offload}
    _check(batch=batch, prompt=prompt, tokens=tokens, rounds=rounds)
    engine, settings = _open(settings, device, dtype, download, most=batch)
    earlier = baselines.read(baseline, settings)
    prompts = _prompts(engine, batch, prompt, seed)
    _serve(engine, prompts, tokens, Load())
    load = Load()
    for _ in range(rounds):
        _serve(engine, prompts, tokens, load)
    result = _result(engine, load, settings, batch=batch, prompt=prompt, tokens=tokens)
    floor = result["floor"]["latency_ms"]
    result["of_floor"] = floor / result["p50_e2e_ms"]
    baselines.show(result, earlier, as_json)


def throughput(
    model: Model,
    random_: Random = False,
    requests: Annotated[int, typer.Option(help="Requests in all.")] = 64,
    max_sequences: Annotated[int, typer.Option(help="Requests that run at once.")] = 32,
    prompt: Prompt = 128,
    tokens: Tokens = 128,
    speculate: Speculate = 0,
    offload: Offload = None,
    kv_cache_dtype: KvCacheDtype = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    download: Download = False,
    baseline: Baseline = None,
    as_json: AsJson = False,
) -> None:
    """A queue of requests through the engine: tokens a second, and what each request felt."""
    settings = {"bench": "throughput", "model": model, "random": random_, "requests": requests}
    settings |= {"max_sequences": max_sequences, "prompt": prompt, "tokens": tokens}
    settings |= {"speculate": speculate, "seed": seed, "kv_cache_dtype": kv_cache_dtype}
    settings |= {"offload": offload}
    _check(requests=requests, max_sequences=max_sequences, prompt=prompt, tokens=tokens)
    engine, settings = _open(settings, device, dtype, download, most=max_sequences)
    earlier = baselines.read(baseline, settings)
    prompts, load = _prompts(engine, requests, prompt, seed), Load()
    _serve(engine, prompts[:max_sequences], min(tokens, 4), Load())
    _serve(engine, prompts, tokens, load)
    together = min(requests, max_sequences)
    result = _result(engine, load, settings, batch=together, prompt=prompt, tokens=tokens)
    result["of_floor"] = result["output_tokens_per_s"] / result["floor"]["output_tokens_per_s"]
    baselines.show(result, earlier, as_json)


def _check(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def _open(
    settings: dict[str, Any], device: str, dtype: str | None, download: bool, *, most: int
) -> tuple[Engine, dict[str, Any]]:
    """The engine, warmed up, and the settings with what it runs on."""
    from shoal.cli.view import loading
    from shoal.engine import Engine, EngineSettings
    from shoal.model.offloaded import offload

    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"--dtype is {dtype!r}; it must be float32 or bfloat16")
    speculate = settings["speculate"]
    wanted = EngineSettings(
        max_sequences=most,
        max_batch_tokens=max(2048, most),
        prefix_cache=False,
        speculate=speculate,
        cache_dtype=settings["kv_cache_dtype"],
    )
    if settings["random"]:
        model = _random(settings["model"], find_device(device), dtype, settings["seed"], mtp=speculate > 0)
        if settings["offload"] is not None:
            offload(model, settings["offload"])
        engine = Engine(model, wanted)
    else:
        with loading("loading") as progress:
            engine = _load(settings, wanted, find_device(device), dtype, download, progress)
    engine.warm_up()
    head = engine.runner.model.head_weight()
    name = head.device.type if not head.is_cuda else _gpu_name(head.device)
    return engine, settings | {"device": name, "dtype": str(head.dtype).removeprefix("torch.")}


def _gpu_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device)


def _load(
    given: dict[str, Any],
    settings: EngineSettings,
    device: str,
    dtype: str | None,
    download: bool,
    progress: Any,
) -> Engine:
    import torch

    from shoal.checkpoint import hf
    from shoal.stages.llm import open_engine

    folder = hf.find_folder(given["model"], download=download)
    wanted = None if dtype is None else getattr(torch, dtype)
    return open_engine(
        folder, settings, device=device, dtype=wanted, offload=given["offload"], progress=progress
    )


def _random(name: str, device: str, dtype: str | None, seed: int, *, mtp: bool) -> Any:
    """A model of a family's shape that has read nothing."""
    from dataclasses import replace

    import torch

    from shoal.cli.plan import find_config
    from shoal.model.transformer import Transformer

    config = find_config(name)
    config = config if mtp else replace(config, num_nextn_predict_layers=0)
    chosen = getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"))
    model = Transformer(config, device="meta", dtype=chosen)
    model.allocate(device)
    model.init_weights(torch.Generator(device).manual_seed(seed))
    return model.eval()


def _prompts(engine: Engine, count: int, length: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(engine.config.vocab_size) for _ in range(length)] for _ in range(count)]


def _serve(engine: Engine, prompts: list[list[int]], tokens: int, load: Load) -> None:
    """Serve prompts to their end, and note when what came."""
    from shoal.engine import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    begin = time.perf_counter()
    last = {engine.add(ids, params): begin for ids in prompts}
    begun: set[int] = set()
    stepped, together, ended = begin, False, False
    while engine.busy:
        events = engine.step()
        now = time.perf_counter()
        if together:
            load.steps.append(now - stepped)
        stepped = now
        arrived: dict[int, int] = {}
        for event in events:
            if event.error is not None:
                raise FloatingPointError(event.error)
            arrived[event.request] = arrived.get(event.request, 0) + (event.token is not None)
            if event.finish is not None:
                load.whole.append(now - begin)
        for request, count in arrived.items():
            if request not in begun and count:
                begun.add(request)
                load.first.append(now - begin)
                count -= 1
            load.gaps += [(now - last[request]) / max(count, 1)] * count
            last[request] = now
            load.generated += arrived[request]
        ended = ended or any(event.finish is not None for event in events)
        together = len(begun) == len(prompts) and not ended
    load.prompt_tokens += sum(map(len, prompts))
    load.seconds += time.perf_counter() - begin


def _result(
    engine: Engine, load: Load, settings: dict[str, Any], *, batch: int, prompt: int, tokens: int
) -> dict[str, Any]:
    from shoal.analysis.floor import find_floor

    head = engine.runner.model.head_weight()
    cached = engine.settings.cache_dtype
    floor = find_floor(
        engine.config,
        head.device,
        head.dtype,
        batch=batch,
        prompt=prompt,
        tokens=tokens,
        cache_dtype=cached,
    )
    seconds = floor.latency(tokens)
    result: dict[str, Any] = {"settings": settings, **summarise(load)}
    if load.steps:
        result["p50_step_ms"] = 1000 * statistics.median(load.steps)
    stats = engine.stats()
    if stats.expert_cache_queries:
        result["expert_cache_hit_rate"] = (stats.expert_cache_hits or 0) / stats.expert_cache_queries
    result["floor_ttft_ms"], result["floor_itl_ms"] = 1000 * floor.prefill, 1000 * floor.step
    result["floor"] = {
        "latency_ms": 1000 * seconds,
        "output_tokens_per_s": batch * tokens / seconds,
        "bound": floor.bound,
        "read_bytes_per_s": floor.read,
        "flops_per_s": floor.flops,
        "source": floor.source,
    }
    return result
