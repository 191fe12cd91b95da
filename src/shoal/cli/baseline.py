"""A benchmark's result beside an earlier one: `--baseline FILE` of the `bench` verbs.

A result is a flat object of figures with the `settings` it was measured under. The law: figures are compared
only where the settings agree; a baseline of something else is refused, by the first setting that differs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Baseline = Annotated[
    Path | None, typer.Option(help="An earlier run's --json to compare with, under the same settings.")
]
Result = dict[str, Any]


def read(path: Path | None, settings: dict[str, Any]) -> Result | None:
    """The earlier result. ValueError if it is none, or was measured under other settings."""
    if path is None:
        return None
    try:
        earlier = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--baseline is {path}, which cannot be read: {error}; give a file of --json"
        ) from None
    if not isinstance(earlier, dict) or "settings" not in earlier:
        raise ValueError(f"--baseline is {path}, which has no settings; give what `shoal bench --json` wrote")
    for name, value in settings.items():
        if (before := earlier["settings"].get(name)) != value:
            raise ValueError(
                f"--baseline was measured with {name} {before!r}, this run has {value!r}; measure it again"
            )
    return earlier


def compare(result: Result, earlier: Result) -> dict[str, float]:
    """Each figure that both have, as a ratio: this run over the earlier."""
    return {
        name: value / earlier[name]
        for name, value in result.items()
        if isinstance(value, int | float) and isinstance(earlier.get(name), int | float) and earlier[name]
    }


def show(result: Result, earlier: Result | None, as_json: bool) -> None:
    """Print a result, and beside it what the baseline had."""
    ratios = {} if earlier is None else compare(result, earlier)
    if as_json:
        print(json.dumps(result if earlier is None else {**result, "baseline": ratios}))
        return
    for name, value in result.items():
        if isinstance(value, dict):
            continue
        line = f"{name:<28}{_written(value):>14}"
        if earlier is not None and name in ratios:
            line += f"{_written(earlier[name]):>14}{ratios[name] - 1:>+9.1%}"
        print(line)


def _written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
