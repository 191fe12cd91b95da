"""A long context served on one GPU: 128K tokens read in chunks, and decoded at, from wide and narrow caches.

    python -m benchmarks.long [--models v2-lite v3-slice v3.2-slice] [--length 131072] [--many 4]

The shapes: V2-Lite whole, and of V3 and V3.2 the first four layers (one of them dense) with 32 experts, as
one of eight GPUs holds; random weights in bfloat16. A row is one sequence: the time to its first token, then
decoding steps from that length on; then steps of as many as fit, at most `--many`. Those others are not read:
their caches are copies of the first one's, in pages of their own, and only their last page is read anew.

Floors: FLOPs (config/cost.py) over the matrix rate that an H200 sustains, and bytes over its read rate, of
the weights that a step touches, its experts as counted by the engine, and of the cache it looks back on.
Bytes a token of the cache are what torch's allocator was asked for: of two engines, the difference over that
of their positions. They must be `cost`'s to the byte, records (engine/records.py) beside them.
"""

from __future__ import annotations

import argparse
import gc
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.decode import prompts, touched_bytes, wait_for_decodes
from benchmarks.kernels.harness import PEAK_BYTES
from shoal.config import cost
from shoal.config.families import family, tiny
from shoal.config.model import MLAConfig, ModelConfig
from shoal.engine import Engine, EngineSettings, SamplingParams
from shoal.engine.records import count_record_bytes
from shoal.engine.runner import Runner
from shoal.model.transformer import Transformer

# Of sparse attention `fp8 keys` narrows the indexer's alone, `fp8` the latents too.
Cache = Literal["wide", "fp8 keys", "fp8"]

SUSTAINED_FLOPS = 666e12  # bfloat16 at an H200's power limit
STEPS = 32
LAYERS, EXPERTS = 4, 32  # of a slice
SHAPES = {"v2-lite": "deepseek-v2-lite", "v3-slice": "deepseek-v3", "v3.2-slice": "deepseek-v3.2"}


@dataclass(frozen=True)
class Row:
    """Times in milliseconds; those of the first token, of one sequence, are None where it was not read."""

    model: str
    cache: Cache
    length: int
    batch: int
    first_ms: float | None
    first_floor_ms: float | None
    step_ms: float
    step_floor_ms: float
    experts: float  # distinct ones that a step touched, in a layer
    cache_bytes: int  # a token, of all layers, as allocated
    record_bytes: int

    @property
    def cells(self) -> tuple[str, ...]:
        read = ("", "", "", "")
        if self.first_ms is not None and self.first_floor_ms is not None:
            rate = f"{1e3 * self.length / self.first_ms:,.0f}"
            read = (f"{self.first_ms / 1e3:.2f}", rate, f"{self.first_floor_ms / 1e3:.2f}")
            read = (*read, f"{self.first_ms / self.first_floor_ms:.2f}")
        return (
            self.model,
            self.cache,
            f"{self.batch} x {self.length:,}",
            *read,
            f"{self.step_ms:.2f}",
            f"{1e3 * self.batch / self.step_ms:,.0f}",
            f"{self.step_floor_ms:.2f}",
            f"{self.step_ms / self.step_floor_ms:.2f}",
            f"{self.experts:.1f}",
            f"{self.cache_bytes:,} + {self.record_bytes:,}",
        )


HEADS = ("shape", "cache", "sequences", "first token s", "prefill tokens/s", "floor s", "x floor", "step ms")
HEADS += ("tokens/s", "floor ms", "x floor", "experts a layer", "bytes a token, cache + records")


def table(rows: list[Row]) -> str:
    lines = ["| " + " | ".join(HEADS) + " |", "|---" * len(HEADS) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row.cells) + " |" for row in rows])


def find_shape(name: str) -> ModelConfig:
    config = replace(family(SHAPES[name]).config, num_nextn_predict_layers=0, quantization=None)
    if not name.endswith("slice"):
        return config
    assert config.moe is not None
    moe = replace(config.moe, n_routed_experts=EXPERTS, first_k_dense_replace=1)
    return replace(config, num_hidden_layers=LAYERS, moe=moe)


def caches(config: ModelConfig) -> tuple[Cache, ...]:
    """The ways in which the engine keeps what this model looks back on."""
    attention = config.attention
    sparse = isinstance(attention, MLAConfig) and attention.indexer is not None
    return ("wide", "fp8 keys", "fp8") if sparse else ("wide", "fp8")


def build(config: ModelConfig, device: torch.device) -> Transformer:
    model = Transformer(config, device="meta", dtype=getattr(torch, config.dtype))
    model.allocate(device)
    model.init_weights(torch.Generator(device).manual_seed(0))
    return model.eval()


def narrowed(config: ModelConfig, cache: Cache) -> dict[str, Any]:
    """The settings of an engine that keeps such a cache."""
    keys = {"index_keys": "fp8"} if cache != "wide" and len(caches(config)) > 2 else {}
    return keys | ({"cache_dtype": "fp8"} if cache == "fp8" else {})


def told_bytes(config: ModelConfig, cache: Cache) -> int:
    """What `cost` says of a token."""
    told = narrowed(config, cache)
    dtype: Any = told.get("cache_dtype", config.dtype)
    return cost.kv_bytes_per_token(config, dtype, index_keys=told.get("index_keys", "wide"))


def looked_back_on(config: ModelConfig, cache: Cache, context: int) -> int:
    """Bytes of the cache that one decoded token must read, in all layers."""
    whole, attention = told_bytes(config, cache), config.attention
    indexer = attention.indexer if isinstance(attention, MLAConfig) else None
    if indexer is None or context <= indexer.index_topk:
        return context * whole
    assert isinstance(attention, MLAConfig)
    keys = indexer.index_head_dim * cost.BYTES[config.dtype]
    if cache != "wide":
        keys = cost.index_key_bytes(config, "fp8")
    keys *= config.num_hidden_layers
    return context * keys + indexer.index_topk * (whole - keys)


def step_floor_ms(config: ModelConfig, cache: Cache, batch: int, context: int, experts: float) -> float:
    read = touched_bytes(config, experts) + batch * looked_back_on(config, cache, context)
    flops = batch * cost.flops_per_token(config, context, "decode")
    return 1e3 * max(read / PEAK_BYTES, flops / SUSTAINED_FLOPS)


def prefill_floor_ms(config: ModelConfig, length: int) -> float:
    return 1e3 * length * cost.flops_per_token(config, length, "prefill") / SUSTAINED_FLOPS


def open_engine(
    model: Transformer, cache: Cache, budget: int, many: int, num_pages: int | None = None
) -> tuple[Engine, int]:
    """An engine, and the bytes that torch's allocator was asked for to make it. A CPU's counts none: there
    they are those of the cache and the records."""
    device = model.head_weight().device
    settings = EngineSettings(
        num_pages=num_pages,
        max_batch_tokens=budget,
        max_sequences=many,
        buckets=tuple(sorted({1, many})) if device.type == "cuda" else None,
        **narrowed(model.config, cache),
    )
    gc.collect()  # what an engine before this one held
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = _requested(device)
        engine = Engine(model, settings)
        return engine, _requested(device) - before
    engine = Engine(model, settings)
    return engine, sum(tensor.untyped_storage().nbytes() for tensor in _paged(engine.runner))


def _requested(device: torch.device) -> int:
    return torch.cuda.memory_stats(device)["requested_bytes.all.current"]


def _paged(runner: Runner) -> list[Tensor]:
    """What is kept of each position."""
    keys = [tensor for pair in runner.index_keys for tensor in pair]
    records = [value for value in vars(runner.records).values() if isinstance(value, Tensor)]
    return [*runner.pages, *keys, *records]


def open_measured(model: Transformer, cache: Cache, budget: int, many: int) -> tuple[Engine, int]:
    """An engine with as many pages as there is room for, and the bytes that a position takes in it: the cache
    alone. They are held against `cost`'s."""
    few, small = open_engine(model, cache, budget, many, num_pages=2)
    positions = few.pool.capacity
    del few
    engine, large = open_engine(model, cache, budget, many)
    taken, rest = divmod(large - small, engine.pool.capacity - positions)
    told, records = told_bytes(model.config, cache), count_record_bytes(model.config)
    if (taken, rest) != (told + records, 0):
        raise AssertionError(
            f"{cache} cache: {large - small:,} bytes were allocated for {engine.pool.capacity - positions:,} "
            f"positions, {taken:,} each, but cost tells {told:,} and records take {records:,}"
        )
    return engine, taken - records


def serve_first(engine: Engine, ids: list[int]) -> float:
    """Read a prompt: milliseconds to its first token. It decodes on."""
    params = SamplingParams(temperature=0, max_tokens=STEPS + 40, ignore_eos=True)
    start = time.perf_counter()
    request = engine.add(ids, params)
    while True:
        for event in engine.step():
            if event.error is not None:
                raise FloatingPointError(event.error)
            if event.request == request and event.token is not None:
                return 1e3 * (time.perf_counter() - start)


def decode(engine: Engine, batch: int) -> tuple[float, float]:
    """Of the sequences that run: milliseconds of a step, and distinct experts in a layer. They end."""
    wait_for_decodes(engine, batch)
    before = engine.stats()
    start = time.perf_counter()
    for _ in range(STEPS):
        engine.step()
    ms = 1e3 * (time.perf_counter() - start) / STEPS
    after = engine.stats()
    if (after.steps - before.steps, after.generated - before.generated) != (STEPS, STEPS * batch):
        raise RuntimeError(
            f"{STEPS} calls gave {after.generated - before.generated} tokens to {batch} sequences"
        )
    while engine.busy:
        engine.step()
    assert before.experts_touched is not None and after.experts_touched is not None
    return ms, (after.experts_touched - before.experts_touched).double().mean().item() / STEPS


def copy_cache(engine: Engine, ids: list[int], other: list[int]) -> None:
    """Let the engine hold for other ids what it remembers of these."""
    pool, size = engine.pool, engine.pool.page_size
    source = pool.find(ids, len(ids)).pages
    pages = pool.take(len(source))
    device = engine.runner.device
    to, origin = torch.tensor(pages, device=device), torch.tensor(source, device=device)
    keys = [tensor for pair in engine.runner.index_keys for tensor in pair]
    for tensor in (*engine.runner.pages, *keys):
        tensor[to] = tensor[origin]
    node = pool.find([], 0).node
    for at, page in enumerate(pages):
        node = pool.keep(page, node, tuple(other[at * size : (at + 1) * size]))
    pool.release(pages)


def measure(
    name: str, model: Transformer, cache: Cache, *, length: int, budget: int, many: int
) -> Iterator[Row]:
    """One sequence, then as many as fit."""
    config = model.config
    engine, taken = open_measured(model, cache, budget, many)
    engine.runner.capture()
    pool = engine.pool
    texts = prompts(config, many, length)
    # Whatever compiles does so on a shorter text.
    engine.generate(
        prompts(config, 1, min(4 * budget, length), seed=1), SamplingParams(temperature=0, max_tokens=2)
    )
    first = serve_first(engine, texts[0])
    fit = min(many, pool.num_pages // (pool.count_pages(length) + 2))
    for batch in sorted({1, fit}):
        if batch > 1:
            for other in texts[1:batch]:
                copy_cache(engine, texts[0], other)
            params = SamplingParams(temperature=0, max_tokens=STEPS + 40, ignore_eos=True)
            for ids in texts[:batch]:
                engine.add(ids, params)
        ms, experts = decode(engine, batch)
        yield Row(
            model=name,
            cache=cache,
            length=length,
            batch=batch,
            first_ms=first if batch == 1 else None,
            first_floor_ms=prefill_floor_ms(config, length) if batch == 1 else None,
            step_ms=ms,
            step_floor_ms=step_floor_ms(config, cache, batch, length, experts),
            experts=experts,
            cache_bytes=taken,
            record_bytes=count_record_bytes(config),
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--caches", nargs="+", choices=get_args(Cache), default=get_args(Cache))
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--budget", type=int, default=8192, help="tokens of a chunk")
    parser.add_argument("--many", type=int, default=4, help="sequences at once, at most")
    parser.add_argument("--seconds", type=float, default=90, help="after so many no other cache is begun")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny twins on a CPU: the form of the table alone"
    )
    parser.add_argument("--out", type=Path, help="Markdown file to append to, with a .jsonl beside it")
    told = parser.parse_args()
    begun = time.perf_counter()
    device = torch.device("cpu" if told.tiny else "cuda")
    where = "a CPU, tiny: its ratios say nothing" if told.tiny else torch.cuda.get_device_name()
    rows: list[Row] = []
    failed: list[str] = []
    for name in told.models:
        config = find_shape(name)
        model = build(tiny(config) if told.tiny else config, device)
        for cache in told.caches:
            if cache not in caches(config):
                continue
            spent = time.perf_counter() - begun
            if spent > told.seconds:
                print(f"left out after {spent:.0f} s: {name}, {cache} cache", flush=True)
                continue
            try:
                for row in measure(
                    name, model, cache, length=told.length, budget=told.budget, many=told.many
                ):
                    rows.append(row)
                    spent = time.perf_counter() - begun
                    print(f"[{spent:6.1f} s] {table(rows[-1:]).splitlines()[-1]}", flush=True)
            except Exception:  # noqa: BLE001  (the other caches have their rows; the exit status tells)
                failed.append(f"{name}, {cache} cache")
                print(f"failed: {failed[-1]}\n{traceback.format_exc()}", flush=True)
        del model
    print(f"{where}, torch {torch.__version__}\n\n{table(rows)}")
    if told.out:
        title = f"{where}, torch {torch.__version__}"
        report.append(told.out, "long", where, title, table(rows), map(asdict, rows))
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
