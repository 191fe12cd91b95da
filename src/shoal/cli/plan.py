"""`shoal plan`: the cost of a config as a table or as JSON.

All figures are those of `config.cost`, so no weights are read and nothing here computes; the keys of the JSON
are a promise (docs/json.md).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from shoal.config import cost, families
from shoal.config.hf import from_hf
from shoal.config.model import ModelConfig

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
        "kv_bytes_per_token": {"bfloat16": cost.kv_bytes_per_token(config, "bfloat16")},
        "weight_bytes": {dtype: cost.weight_bytes(config, dtype) for dtype in WEIGHT_DTYPES},
    }


def show(model: str, context: int, as_json: bool) -> None:
    if context < 1:
        raise ValueError(f"--context is {context}; it must be at least 1")
    result = costs(model, context)
    if as_json:
        print(json.dumps(result))
    else:
        Console().print(_table(result))


def _table(result: dict[str, Any]) -> Table:
    table = Table(
        title=f"{result['model']} ({result['model_type']})", show_header=False, title_justify="left"
    )
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in result["parameters"].items():
        table.add_row(f"parameters, {name}", f"{value:,}")
    table.add_section()
    for phase, value in result["flops_per_token"].items():
        table.add_row(f"GFLOP a token, {phase} at {result['context']:,}", f"{value / 1e9:,.3f}")
    table.add_section()
    kv = result["kv_bytes_per_token"]["bfloat16"]
    table.add_row("cache a token, bfloat16", f"{kv:,} bytes")
    table.add_row(f"cache of {result['context']:,} tokens", f"{kv * result['context'] / 2**20:,.1f} MiB")
    table.add_section()
    for dtype, value in result["weight_bytes"].items():
        table.add_row(f"weights, {dtype}", f"{value / 2**30:,.2f} GiB")
    return table
