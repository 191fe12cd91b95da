"""`shoal plan`: what a model costs and, on named GPUs, whether it fits, how fast it can be, and for how much.

    plan MODEL            parameters, FLOPs, bytes        plan MODEL --gpu h200 --count 8
    plan compare A B C    models side by side             plan published    papers' figures, recomputed

All figures are those of `config.cost` and `analysis.planner`, so no weights are read and nothing here
computes; the keys of the JSON are a promise (docs/json.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from shoal.cli.device import KvCacheDtype
from shoal.config import cost, families
from shoal.config.hf import from_hf
from shoal.config.model import ModelConfig

if TYPE_CHECKING:
    from shoal.analysis.planner import Load, Point, Serving, Training
    from shoal.config.hardware import Gpu

WEIGHT_DTYPES = ("float32", "bfloat16", "fp8", "int4")


def find_config(model: str) -> ModelConfig:
    """A config.json, a folder that has one, or a family's name."""
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        return families.family(model).config
    try:
        return from_hf(json.loads(path.read_text("utf-8")))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def costs(model: str, context: int) -> dict[str, Any]:
    config = find_config(model)
    return {
        "model": model,
        "model_type": config.model_type,
        "context": context,
        "parameters": asdict(cost.params(config)),
        "flops_per_token": {
            phase: cost.flops_per_token(config, context, phase) for phase in get_args(cost.Phase)
        },
        "kv_bytes_per_token": _kv_bytes(config),
        "weight_bytes": {dtype: cost.weight_bytes(config, dtype) for dtype in WEIGHT_DTYPES},
    }


def _kv_bytes(config: ModelConfig) -> dict[str, int]:
    """By dtype, those that the model's attention takes."""
    found = {"bfloat16": cost.kv_bytes_per_token(config, "bfloat16")}
    try:
        return found | {"fp8": cost.kv_bytes_per_token(config, "fp8")}
    except ValueError:
        return found


class Weights(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    fp8 = "fp8"
    int4 = "int4"


def plan(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="A family (deepseek-v3), a config.json, or a checkpoint folder. `compare A B C` sets models "
            "side by side; `published` recomputes the papers' figures.",
        ),
    ],
    context: Annotated[int, typer.Option(help="Tokens of context that attention is counted at.")] = 4096,
    gpu: Annotated[
        str | None, typer.Option(help="Plan for this GPU: h200, h100, h800, a100, b200 ...")
    ] = None,
    count: Annotated[int | None, typer.Option(help="GPUs. By default the fewest that hold the load.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences at once. By default as many as fit.")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 1024,
    output: Annotated[int, typer.Option(help="Tokens of an answer.")] = 128,
    weights: Annotated[Weights, typer.Option(help="What the weights are stored in.")] = Weights.bfloat16,
    cache_bits: Annotated[float, typer.Option(help="Bits of an element of the cache.")] = 16.0,
    kv_cache_dtype: KvCacheDtype = "auto",
    tokens: Annotated[float | None, typer.Option(help="Plan training on so many tokens: 14.8e12.")] = None,
    mfu: Annotated[
        float | None, typer.Option(help="Share of the bfloat16 rate that training reaches.")
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="Dollars a GPU and hour, in place of the table's.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the plan into this PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON (docs/json.md).")] = False,
) -> None:
    """What a model costs, and on GPUs: does it fit, how fast, for how much. Reads no weights."""
    from shoal.analysis.planner import Load

    if context < 1:
        raise ValueError(f"--context is {context}; it must be at least 1")
    load = Load(batch, prompt, output, weights.value, cache_bits, kv_cache_dtype)
    hardware = None
    if gpu is not None or tokens is not None or plot is not None or models[0] == "compare":
        hardware = _hardware(gpu or "h200", price)
    if models == ["published"]:
        _show_published(as_json)
    elif models[0] == "compare" and len(models) > 1:
        assert hardware is not None
        _compare(models[1:], hardware, count, load, plot, as_json)
    elif len(models) > 1:
        raise ValueError(
            f"{models[1]!r} is a second model; set them side by side: plan compare {' '.join(models)}"
        )
    elif models[0] == "compare":
        raise ValueError("compare needs models: plan compare deepseek-v3 llama-3-70b")
    else:
        _show(models[0], context, hardware, count, load, tokens, mfu, plot, as_json)


def planned(model: str, fields: Mapping[str, str]) -> dict[str, Any]:
    """The JSON of `plan MODEL --gpu ...`, of fields as a form has them: gpu, count, weights, batch, prompt,
    output. ValueError for one that is unknown or no number."""
    from shoal.analysis.planner import Load

    unknown = sorted(fields.keys() - {"gpu", "count", "weights", "batch", "prompt", "output"})
    if unknown:
        raise ValueError(f"a plan has no field {unknown[0]!r}; leave it out")

    def number(name: str) -> int | None:
        text = fields.get(name, "")
        if text and not (text.isascii() and text.isdigit() and len(text) < 12 and int(text)):
            raise ValueError(f"{name} is {text!r}; it must be a whole number, 1 or more")
        return int(text) if text else None

    weights = fields.get("weights") or "bfloat16"
    if weights not in tuple(Weights):
        raise ValueError(f"weights is {weights!r}; it must be one of {', '.join(Weights)}")
    room = find_config(model).max_position_embeddings
    output = number("output") or min(128, room // 2)
    prompt = number("prompt") or min(1024, room - output)
    load = Load(number("batch"), prompt, output, Weights(weights).value)
    return _plan(model, prompt, _hardware(fields.get("gpu") or "h200", None), number("count"), load)[0]


def _hardware(name: str, price: float | None) -> Gpu:
    from shoal.config.hardware import gpu

    row = gpu(name)
    if price is None:
        return row
    if price <= 0:
        raise ValueError(f"--price is {price}; it must be more than 0 dollars an hour")
    return replace(row, price=price, price_source="given")


def _show(
    model: str,
    context: int,
    hardware: Gpu | None,
    count: int | None,
    load: Load,
    tokens: float | None,
    mfu: float | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    from shoal.analysis import planner

    result, config = costs(model, context), find_config(model)
    tables = [_table(result)]
    if hardware is not None:
        result, serving = _plan(model, context, hardware, count, load)
        count = serving.count
        tables += [_serving_table(serving, hardware, load), _ladder_table(serving)]
        if tokens is not None:
            share = planner.TRAINING_MFU if mfu is None else mfu
            training = planner.plan_training(config, hardware, count, tokens, context=context, mfu=share)
            result["training"] = asdict(training)
            tables.append(_training_table(training, hardware, count))
        if plot is not None:
            from shoal.analysis import plots

            plots.save(plots.serving_plan(model, hardware.name, serving), plot)
    _print(result, tables, as_json)


def _plan(
    model: str, context: int, hardware: Gpu, count: int | None, load: Load
) -> tuple[dict[str, Any], Serving]:
    """What a model costs, and how it serves the load on so many GPUs; None: the fewest that do."""
    from shoal.analysis import planner

    config = find_config(model)
    serving = planner.plan_serving(config, hardware, count or planner.fewest(config, hardware, load), load)
    told = {"hardware": _told(hardware, serving.count), "load": asdict(load), "serving": _served(serving)}
    return costs(model, context) | told, serving


def _print(result: Any, tables: list[Table], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
        return
    for table in tables:
        Console().print(table)


def _told(gpu: Gpu, count: int) -> dict[str, Any]:
    return {
        "gpu": gpu.name,
        "count": count,
        "memory": gpu.memory,
        "read": gpu.read,
        "flops": gpu.rate("bfloat16"),
        "price": gpu.price,
        "source": "; ".join(filter(None, (gpu.source, gpu.measured_source))),
        "price_source": gpu.price_source,
    }


def _served(serving: Serving) -> dict[str, Any]:
    told = asdict(serving)
    told["memory"] |= {"total": serving.memory.total, "fits": serving.memory.fits}
    told["point"] = None if serving.point is None else _pointed(serving.point)
    told["ladder"] = [_pointed(point) for point in serving.ladder]
    return told


def _pointed(point: Point) -> dict[str, Any]:
    return asdict(point) | {
        "floor_s": point.floor_s,
        "predicted_s": point.predicted_s,
        "tokens_per_second": point.batch / point.predicted_s,
        "bound": point.bound,
    }


def _two(title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    return table


def _money(value: float | None) -> str:
    return "no price; give --price" if value is None else f"${value:,.2f}"


def _serving_table(serving: Serving, gpu: Gpu, load: Load) -> Table:
    memory, point = serving.memory, serving.point
    how = "a whole model each" if serving.degree == 1 else f"{serving.layout} over {serving.degree}"
    table = _two(f"Serving on {serving.count} x {gpu.name}: {how}, weights in {load.weights}")
    gib = 2**30
    table.add_row("weights, a GPU", f"{memory.weights / gib:,.2f} GiB")
    table.add_row("cache of the batch", f"{memory.cache / gib:,.2f} GiB")
    table.add_row("activations", f"{memory.activations / gib:,.2f} GiB")
    table.add_row(
        "together, of what may be used", f"{memory.total / gib:,.2f} of {memory.limit / gib:,.2f} GiB"
    )
    table.add_row(f"room for requests of {load.prompt:,} + {load.output:,} tokens", f"{serving.room:,}")
    table.add_section()
    if point is None:
        table.add_row("fits", "no: more GPUs, a smaller batch, or --weights fp8 or int4")
        return table
    table.add_row("fits", f"yes, {point.batch:,} at once")
    table.add_row("prompts, tokens/s (floor)", f"{serving.prefill:,.0f} ({serving.prefill_floor:,.0f})")
    step = f"{1e3 * point.predicted_s:.2f} ms ({1e3 * point.floor_s:.2f}), by {point.bound}"
    table.add_row("a decoding step (floor)", step)
    table.add_row("answers, tokens/s", f"{serving.output or 0:,.0f}")
    table.add_row(
        "energy at full power", f"{(serving.joules_per_token or 0) / 3.6:,.2f} kWh a million tokens"
    )
    table.add_row(f"price ({gpu.price_source})", f"{_money(serving.dollars_per_million)} a million")
    return table


def _ladder_table(serving: Serving) -> Table:
    table = Table(
        title="Decoding, by batch: floor, and what the engine is predicted to reach", title_justify="left"
    )
    for head in ("batch", "experts a layer", "floor ms", "predicted ms", "tokens/s", "a user", "bound"):
        table.add_column(head, justify="right")
    for point in serving.ladder:
        rate = point.batch / point.predicted_s
        table.add_row(
            f"{point.batch:,}",
            f"{point.experts:.1f}",
            f"{1e3 * point.floor_s:.2f}",
            f"{1e3 * point.predicted_s:.2f}",
            f"{rate:,.0f}",
            f"{rate / point.batch:,.0f}",
            point.bound,
        )
    return table


def _training_table(training: Training, gpu: Gpu, count: int) -> Table:
    table = _two(f"Training on {training.tokens:,.0f} tokens with {count} x {gpu.name}")
    table.add_row("GFLOP a token", f"{training.flops_per_token / 1e9:,.1f}")
    table.add_row("share of the bfloat16 rate, assumed", f"{training.mfu:.1%}")
    table.add_row("GPU hours", f"{training.gpu_hours:,.0f}")
    table.add_row("days", f"{training.days:,.1f}")
    table.add_row("energy", f"{training.megawatt_hours:,.1f} MWh")
    table.add_row("price", _money(training.dollars))
    states = f"{training.state_bytes / 2**30:,.0f} GiB, {training.gpus_for_states} GPUs"
    table.add_row("weights, gradients, moments (16 bytes)", states)
    return table


def _compare(
    models: list[str], gpu: Gpu, count: int | None, load: Load, plot: Path | None, as_json: bool
) -> None:
    from shoal.analysis import planner

    if plot is not None:
        raise ValueError("--plot draws the plan of one model; leave it out of compare")
    table = Table(title=f"On {gpu.name}, weights in {load.weights}, {load.prompt:,} + {load.output:,} tokens")
    heads = (
        "model",
        "total",
        "active",
        "cache at 128K",
        "GFLOP a token",
        "GPUs",
        "batch",
        "tokens/s",
        "$ a million",
    )
    for head in heads:
        table.add_column(head, justify="left" if head == "model" else "right")
    rows: list[dict[str, Any]] = []
    for model in models:
        config = find_config(model)
        sizes = cost.params(config, mtp=False)
        # A family that reads less than the load is asked for what it reads.
        own = replace(load, prompt=min(load.prompt, config.max_position_embeddings - load.output))
        gpus = count or planner.fewest(config, gpu, own)
        serving = planner.plan_serving(config, gpu, gpus, own)
        row = {
            "model": model,
            "total": sizes.total,
            "active": sizes.active,
            "kv_bytes_at_128k": 128 * 1024 * cost.kv_bytes_per_token(config),
            "flops_per_token": cost.flops_per_token(config, own.prompt, "decode"),
            "count": gpus,
            "batch": None if serving.point is None else serving.point.batch,
            "prompt": own.prompt,
            "output_tokens_per_second": serving.output,
            "dollars_per_million": serving.dollars_per_million,
        }
        rows.append(row)
        dollars = "" if serving.dollars_per_million is None else f"{serving.dollars_per_million:.2f}"
        table.add_row(
            model,
            f"{sizes.total / 1e9:,.1f}B",
            f"{sizes.active / 1e9:,.1f}B",
            f"{row['kv_bytes_at_128k'] / 2**30:,.2f} GiB",
            f"{row['flops_per_token'] / 1e9:,.1f}",
            str(gpus),
            "does not fit" if serving.point is None else f"{serving.point.batch:,}",
            "" if serving.output is None else f"{serving.output:,.0f}",
            dollars,
        )
    _print({"hardware": _told(gpu, count or 0), "load": asdict(load), "models": rows}, [table], as_json)


def _show_published(as_json: bool) -> None:
    from shoal.analysis.published import claims

    table = Table(title="Published figures, recomputed", title_justify="left")
    for head in ("figure", "printed", "ours", "ratio", "reproduced", "source and note"):
        table.add_column(head, justify="right" if head in ("printed", "ours", "ratio") else "left")
    rows: list[dict[str, Any]] = []
    for claim in claims():
        rows.append(asdict(claim) | {"ratio": claim.ratio, "reproduced": claim.reproduced})
        where = f"{claim.source}{'; ' if claim.note else ''}{claim.note}"
        table.add_row(
            claim.what,
            f"{claim.printed:,.4g} {claim.unit}",
            f"{claim.ours:,.4g}",
            f"{claim.ratio:.3f}",
            "yes" if claim.reproduced else "no",
            where,
        )
    _print(rows, [table], as_json)


def _table(result: dict[str, Any]) -> Table:
    table = _two(f"{result['model']} ({result['model_type']})")
    for name, value in result["parameters"].items():
        table.add_row(f"parameters, {name}", f"{value:,}")
    table.add_section()
    for phase, value in result["flops_per_token"].items():
        table.add_row(f"GFLOP a token, {phase} at {result['context']:,}", f"{value / 1e9:,.3f}")
    table.add_section()
    for dtype, kv in result["kv_bytes_per_token"].items():
        size = kv * result["context"] / 2**20
        table.add_row(f"cache a token, {dtype}", f"{kv:,} bytes")
        table.add_row(f"cache of {result['context']:,} tokens, {dtype}", f"{size:,.1f} MiB")
    table.add_section()
    for dtype, value in result["weight_bytes"].items():
        table.add_row(f"weights, {dtype}", f"{value / 2**30:,.2f} GiB")
    return table
