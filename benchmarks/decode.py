"""The engine on one GPU: decoding and prefill of a whole model of random weights, against the memory bus.

    python -m benchmarks.decode [--model deepseek-v2-lite] [--batches 1 8 32 128 256] [--peer] [--profile]
    python -m benchmarks.decode --context 8192 --batches 32 128 --prefills
    python -m benchmarks.decode --quant int4 --batches 32 --prefills

Floors: the larger of FLOPs over the burst matrix rate and least bytes over the read rate (`kernels/harness`);
bytes are those of the weights that a step touches, its experts as counted by the engine itself, and of the
cache it reads. The peer is transformers as shipped, eager with grouped_mm, in the same run.

What is timed is `Engine.step` from outside: scheduling, launching, sampling and reading the tokens included.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.kernels.harness import PEAK_BYTES, PEAK_FLOPS
from shoal.config import cost
from shoal.config.families import family
from shoal.config.hf import to_hf
from shoal.config.model import ModelConfig
from shoal.engine import Engine, EngineSettings, SamplingParams
from shoal.model.quantised import quantise
from shoal.model.transformer import Transformer

CONTEXT, STEPS = 1024, 64
MOST_TOKENS = 16384  # of a step
TARGETS = {1: 550, 8: 1450, 32: 3800, 128: 13_000, 256: 23_000}  # tokens/s wanted, V2-Lite on an H200
SPECIAL = {  # by context and weights, instead: shares of floors of 3,629 and 8,653, 8,300, 14,700
    (8192, None): {32: 2540, 128: 6057},
    (CONTEXT, "fp8"): {32: 4980},
    (CONTEXT, "int4"): {32: 7350},
}
PREFILL_TARGETS = {1: 98_000, 4: 110_000}


@dataclass(frozen=True)
class Row:
    what: str
    batch: int
    ms: float  # of a step, or of all the prompts
    tokens_per_second: float
    floor_ms: float
    target: float | None
    experts: float | None  # distinct ones that a step touched, in a layer
    peer: float | None = None  # tokens/s


def build(config: ModelConfig) -> Transformer:
    model = Transformer(config, device="meta", dtype=torch.bfloat16)
    model.allocate("cuda")
    model.init_weights(torch.Generator("cuda").manual_seed(0))
    return model.eval()


NARROW = {"fp8": 1 + 4 / 128**2, "int4": 0.5 + 2 / 128}  # bytes a weight, scales included


def touched_bytes(config: ModelConfig, experts: float, quant: str | None = None) -> float:
    """Of the weights that a step reads, where it touches so many experts in a layer."""
    total = 0.0
    for weight in cost.weights(config, mtp=False):
        size = NARROW[quant] if quant is not None and weight.storage == "low" else cost.BYTES[config.dtype]
        if weight.part == "routed":
            assert config.moe is not None
            total += weight.count / config.moe.n_routed_experts * experts * weight.numel * size
        elif weight.part != "embedding":
            total += weight.count * weight.numel * size
    return total


def target(batch: int, context: int, quant: str | None) -> float | None:
    wanted = TARGETS if (context, quant) == (CONTEXT, None) else SPECIAL.get((context, quant), {})
    return wanted.get(batch)


def decode_floor_ms(
    config: ModelConfig, batch: int, experts: float, quant: str | None = None, context: int = CONTEXT
) -> float:
    """Least bytes of a step over the read rate."""
    cache = batch * context * cost.kv_bytes_per_token(config)
    return 1e3 * (touched_bytes(config, experts, quant) + cache) / PEAK_BYTES


def prefill_floor_ms(config: ModelConfig, prompts: int, length: int) -> float:
    flops = cost.flops_per_token(config, length, "prefill") * prompts * length
    return 1e3 * flops / PEAK_FLOPS[torch.bfloat16]


def prompts(config: ModelConfig, count: int, length: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (count, length), generator=generator).tolist()


def decoding(engine: Engine, batch: int, quant: str | None = None, context: int = CONTEXT) -> Row:
    """Steps at a context that passes through `context`."""
    config = engine.config
    tokens = STEPS + 40 + reading_steps(batch, context)
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for ids in prompts(config, batch, context - STEPS // 2, seed=batch):
        engine.add(ids, params)
    wait_for_decodes(engine, batch)
    before = engine.stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        engine.step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    after = engine.stats()
    steps, generated = after.steps - before.steps, after.generated - before.generated
    if (steps, generated) != (STEPS, STEPS * batch):
        raise RuntimeError(
            f"{STEPS} calls ran {steps} steps and gave {generated} tokens; each call must give {batch}"
        )
    ms = 1e3 * seconds / STEPS
    experts = None
    if before.experts_touched is not None and after.experts_touched is not None:
        touched = (after.experts_touched - before.experts_touched).double().mean().item()
        experts = touched / steps
    while engine.busy:
        engine.step()
    floor = decode_floor_ms(config, batch, experts or 0.0, quant, context)
    what = "decode" if context == CONTEXT else f"decode at {context}"
    what += f", {quant}" if quant else ""
    return Row(what, batch, ms, 1e3 * batch / ms, floor, target(batch, context, quant), experts)


def reading_steps(batch: int, context: int) -> int:
    """In which the prompts are read: those that were first decode meanwhile."""
    return batch * context // MOST_TOKENS


def wait_for_decodes(engine: Engine, batch: int) -> None:
    """Until all prompts are read, and some steps more."""
    got = 0
    while got < batch:
        got = sum(1 for sequence in engine.scheduler.running if sequence.length > sequence.num_prompt)
        engine.step()
    for _ in range(8):
        engine.step()


def prefill(engine: Engine, count: int, length: int = 4096) -> Row:
    """Prompts read from nothing to their first token; the best of five, the engine's other work included."""
    times = []
    for seed in range(6):
        for ids in prompts(engine.config, count, length, seed=1000 + seed):
            engine.add(ids, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
        torch.cuda.synchronize()
        start = time.perf_counter()
        while engine.busy:
            engine.step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    ms = 1e3 * sorted(times[1:])[2]
    floor = prefill_floor_ms(engine.config, count, length)
    return Row("prefill", count, ms, 1e3 * count * length / ms, floor, PREFILL_TARGETS.get(count), None)


def peer(ours: ModelConfig, batches: list[int], device: str = "cuda") -> Iterator[tuple[int, float]]:
    """Tokens/s of transformers as shipped: eager, grouped_mm, its own dynamic cache, a forward a token."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = to_hf(ours)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, experts_implementation="grouped_mm"
        )
    model = model.to_empty(device=device).eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data.normal_(std=0.02)
    for batch in batches:
        ids = torch.randint(config.vocab_size, (batch, CONTEXT), device=device)
        with torch.inference_mode():
            output = model(ids, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            times = []
            for _ in range(12):
                ids = output.logits[:, -1:].argmax(-1)
                torch.cuda.synchronize()
                start = time.perf_counter()
                output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
        yield batch, batch / sorted(times)[len(times) // 2]


def profile_prefill(engine: Engine, count: int, length: int = 4096) -> str:
    """Where the device's time of reading prompts goes."""
    for ids in prompts(engine.config, count, length, seed=count):
        engine.add(ids, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as traced:
        while engine.busy:
            engine.step()
        torch.cuda.synchronize()
    return f"prefill of {count}, " + _listed(traced, 1)


def profile(engine: Engine, batch: int, steps: int = 10) -> str:
    """Where the device's time of a decoding step goes."""
    for ids in prompts(engine.config, batch, CONTEXT):
        engine.add(ids, SamplingParams(temperature=0, max_tokens=80, ignore_eos=True))
    wait_for_decodes(engine, batch)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as traced:
        for _ in range(steps):
            engine.step()
        torch.cuda.synchronize()
    while engine.busy:
        engine.step()
    return f"decode of {batch}, " + _listed(traced, steps)


def _listed(traced: torch.profiler.profile, steps: int) -> str:
    """Kernels by their time. A kernel set up ahead of its predecessor's end counts what it waited, too."""
    rows: dict[str, list[float]] = {}
    for event in traced.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            cell = rows.setdefault(event.name, [0, 0])
            cell[0] += 1
            cell[1] += event.device_time_total
    lines = ["device us and launches a step:"]
    for name, (count, us) in sorted(rows.items(), key=lambda row: -row[1][1])[:28]:
        lines.append(f"{us / steps:9.1f} {count / steps:6.1f}  {name[:100]}")
    total = sum(us for _, us in rows.values()) / steps
    lines.append(f"{total:9.1f} {sum(count for count, _ in rows.values()) / steps:6.1f}  all")
    return "\n".join(lines)


def table(rows: list[Row]) -> str:
    lines = [
        "| | batch | ms | tokens/s | floor ms | of it | wanted tokens/s | experts a layer | peer tokens/s |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        cells = (
            row.what,
            row.batch,
            f"{row.ms:.2f}",
            f"{row.tokens_per_second:,.0f}",
            f"{row.floor_ms:.2f}",
            f"{row.floor_ms / row.ms:.0%}",
            f"{row.target:,.0f}" if row.target else "",
            f"{row.experts:.1f}" if row.experts else "",
            f"{row.peer:,.0f}" if row.peer else "",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--model", default="deepseek-v2-lite")
    parser.add_argument("--batches", type=int, nargs="*", default=list(TARGETS))
    parser.add_argument("--context", type=int, default=CONTEXT, help="at which steps decode")
    parser.add_argument("--prefills", type=int, nargs="*", default=list(PREFILL_TARGETS))
    parser.add_argument("--peer", action="store_true", help="transformers in the same run, batches 1 and 32")
    parser.add_argument("--profile", type=int, nargs="*", default=[], help="batches whose kernels are listed")
    parser.add_argument("--quant", choices=["fp8", "int4"], help="experts and linears held so")
    parser.add_argument("--quick", action="store_true", help="only graphs before it begins, no other kernels")
    parser.add_argument("--out", type=Path, help="Markdown file to append to, with a .jsonl beside it")
    arguments = parser.parse_args()

    def say(text: str, since: float) -> None:
        print(f"[{time.perf_counter() - since:6.1f} s] {text}", flush=True)

    begun = time.perf_counter()
    config = family(arguments.model).config
    model = build(config)
    if arguments.quant:
        quantise(model, arguments.quant)
    torch.cuda.synchronize()
    say(f"{arguments.model}: {torch.cuda.memory_allocated() / 2**30:.1f} GiB of weights", begun)
    most = max([*arguments.batches, *arguments.prefills, 1])
    longest = arguments.context + reading_steps(most, arguments.context)
    settings = EngineSettings(
        num_pages=most * -(-(longest + STEPS + 40) // EngineSettings.page_size) + 4 * 70,
        max_batch_tokens=MOST_TOKENS,
        max_sequences=most,
        prefix_cache=False,
        buckets=tuple(arguments.batches),
    )
    engine = Engine(model, settings)
    if arguments.quick:
        engine.runner.capture()
    else:
        engine.warm_up()
    torch.cuda.synchronize()
    say("warm", begun)
    rows: list[Row] = []
    for batch in arguments.batches:
        rows.append(decoding(engine, batch, arguments.quant, arguments.context))
        say(table(rows[-1:]).splitlines()[-1], begun)
    for count in arguments.prefills:
        rows.append(prefill(engine, count))
        say(table(rows[-1:]).splitlines()[-1], begun)
    print(table(rows), flush=True)
    if arguments.peer:
        peers = {}
        for batch, rate in peer(config, [1, 32]):
            peers[batch] = rate
            say(f"transformers, batch {batch}: {rate:,.0f} tokens/s", begun)
        rows = [replace(row, peer=peers.get(row.batch)) if row.what == "decode" else row for row in rows]
    print(table(rows))
    if arguments.out:
        device = torch.cuda.get_device_name()
        title = f"{device}, torch {torch.__version__}"
        report.append(arguments.out, "decode", device, title, table(rows), map(asdict, rows))

    # Last: launches stay slower in a process that was once traced.
    for batch in arguments.profile:
        say(profile(engine, batch), begun)
    for count in arguments.prefills if arguments.profile else []:
        say(profile_prefill(engine, count), begun)


if __name__ == "__main__":
    main()
