"""What a study found, as a table and as a picture.

Every run is a dot, every variant its mean and deviation: nothing is averaged away that a reader may want.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments.study import Result, Row
from shoal.analysis.plots import GRID, SERIES, tidy


def leaves(told: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record, by their names on the way to them."""
    for key, value in told.items():
        at = f"{path}, {key}" if path else key.replace("_", " ")
        if isinstance(value, Mapping):
            yield from leaves(value, at)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            yield from leaves({str(place + 1): each for place, each in enumerate(value)}, at)
        else:
            yield at, float(value)


def looked(results: Sequence[Result]) -> dict[str, dict[str, list[float]]]:
    """What was looked at: by name, by variant, a number a seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for each in results:
        for name, value in leaves(each.extra):
            found.setdefault(name, {}).setdefault(each.variant, []).append(value)
    return found


def looked_table(results: Sequence[Result]) -> str:
    """Means and deviations over seeds; empty where nothing was looked at."""
    found = looked(results)
    if not found:
        return ""
    names = list(dict.fromkeys(each.variant for each in results))
    lines = ["", "| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, by in found.items():
        cells = []
        for variant in names:
            values = by.get(variant, [])
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4g}{spread}" if values else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def table(name: str, record: Mapping[str, Any], rows: Sequence[Row]) -> str:
    plan = record["plan"]
    lines = [
        f"# {name}",
        "",
        f"Claim: {record['claim']}.",
        f"Source: {record['source']}.",
        "",
        f"{record['date']}, {record['hardware']}; {plan['steps']} steps of {plan['tokens_per_batch']:,}"
        f" tokens in sequences of {plan['seq_len']}, {record['seeds']} seeds, {record['width']} wide.",
        "Bits per byte are of held-out English, Chinese and Python.",
        f"`python -m experiments {name} --width {record['width']} --seeds {record['seeds']} "
        f"--steps {plan['steps']} --tokens-per-batch {plan['tokens_per_batch']} --seq-len {plan['seq_len']}`",
        "",
        "| variant | seeds | bits per byte | deviation | MaxVio | active, all parameters | FLOPs | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.variant} | {row.seeds} | {row.bits_per_byte:.4f} | {row.deviation:.4f} "
        f"| {row.max_violation:.2f} | {row.active / 1e6:.1f}M, {row.total / 1e6:.1f}M "
        f"| {row.flops:.2e} | {row.seconds:.0f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def dots(results: Sequence[Result]) -> Figure:
    names = list(dict.fromkeys(each.variant for each in results))
    found = {what: by for what, by in looked(results).items() if len(by) > 1}
    figure = Figure(figsize=(8, 0.5 * len(names) + 1.4 + 0.32 * len(found)), layout="constrained")
    heights = [0.5 * len(names) + 1.2, 0.32 * len(found)] if found else [1]
    axes, *below = figure.subplots(len(heights), height_ratios=heights, squeeze=False)[:, 0]
    for lower in below:  # each as a share of the largest, since they have units of their own
        for place, by in enumerate(found.values()):
            most = max(abs(value) for values in by.values() for value in values) or 1.0
            for number, (variant, values) in enumerate(by.items()):
                at = [place + 0.12 * number] * len(values)
                label = variant if place == 0 else None
                color = SERIES[number % len(SERIES)]
                lower.plot(
                    [value / most for value in values], at, "o", color=color, markersize=4, label=label
                )
        lower.set_yticks(range(len(found)), found)
        lower.invert_yaxis()
        lower.legend(frameon=False, fontsize=8)
        tidy(lower, "What was looked at, each as a share of its largest", "", "")
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
