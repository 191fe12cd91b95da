"""What a study found, as a table and as a picture.

Every run is a dot, every variant its mean and deviation: nothing is averaged away that a reader may want.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments.study import Result, Row
from shoal.analysis.plots import GRID, SERIES, tidy


def table(name: str, record: Mapping[str, Any], rows: Sequence[Row]) -> str:
    plan = record["plan"]
    lines = [
        f"# {name}",
        "",
        f"Claim: {record['claim']}.",
        f"Source: {record['source']}.",
        "",
        f"{record['date']}, {record['hardware']}; {plan['steps']} steps of {plan['tokens_per_batch']:,}"
        f" tokens in sequences of {plan['seq_len']}, {rows[0].seeds} seeds, {record['width']} wide.",
        "Bits per byte are of held-out English, Chinese and Python.",
        f"`python -m experiments {name}`",
        "",
        "| variant | bits per byte | deviation | MaxVio | parameters, active / all | FLOPs | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.variant} | {row.bits_per_byte:.4f} | {row.deviation:.4f} | {row.max_violation:.2f} "
        f"| {row.active / 1e6:.1f}M / {row.total / 1e6:.1f}M | {row.flops:.2e} | {row.seconds:.0f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def dots(results: Sequence[Result]) -> Figure:
    names = list(dict.fromkeys(each.variant for each in results))
    figure = Figure(figsize=(8, 0.5 * len(names) + 1.4), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(names):
        bits = [each.bits_per_byte for each in results if each.variant == name]
        mean = sum(bits) / len(bits)
        axes.plot([mean, mean], [place - 0.25, place + 0.25], color=SERIES[0], linewidth=2)
        axes.plot(bits, [place] * len(bits), "o", color=SERIES[0], alpha=0.5, markersize=5)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    tidy(axes, "Held-out text, a dot a seed, the mean a bar", "bits per byte", "")
    return figure
