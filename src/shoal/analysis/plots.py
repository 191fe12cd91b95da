"""Pictures of a run: the loss as it fell, and the load of every expert.

Each function takes numbers and returns a figure; `save` puts it where it belongs, whole or not at all. No
global state of matplotlib is touched, so these are safe in a server's thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from shoal.analysis.planner import Serving

INK, GRID, SERIES = "#1f2933", "#d9dee4", ("#2563eb", "#d97706", "#059669", "#7c3aed")


def tidy(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)


def loss_curve(
    training: Sequence[tuple[int, float]],
    held_out: Sequence[tuple[int, float]],
    baselines: Mapping[str, float],
) -> Figure:
    """(tokens seen, nats per token) of training above; (tokens seen, bits per byte) of held-out text, against
    what other methods reach on the same text, below."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    above, below = figure.subplots(2, 1)
    above.plot(*zip(*training, strict=True), color=SERIES[0], linewidth=1)
    tidy(above, "Training loss", "tokens", "nats per token")
    below.plot(*zip(*held_out, strict=True), color=SERIES[0], marker="o", markersize=4, label="this model")
    for colour, (name, value) in zip(SERIES[1:], baselines.items(), strict=False):
        below.axhline(value, color=colour, linestyle="--", linewidth=1.2, label=f"{name}: {value:.3f}")
    tidy(below, "Held-out text", "tokens", "bits per byte")
    below.set_ylim(bottom=0)
    below.legend(frameon=False, fontsize=9)
    for axes in (above, below):
        axes.grid(color=GRID, linewidth=0.6)
    return figure


def runs(lines: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Runs by name, each the lines of its metrics.jsonl: loss, held-out text, imbalance and speed."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    loss, bits, balance, speed = figure.subplots(2, 2).flatten()
    for number, (name, told) in enumerate(lines.items()):
        colour = SERIES[number % len(SERIES)]
        steps = [line for line in told if line["kind"] == "step"]
        tokens = [line["tokens"] for line in steps]
        seen = {line["step"]: line["tokens"] for line in steps}
        loss.plot(tokens, [line["loss"] for line in steps], color=colour, linewidth=1, label=name)
        held_out = [line for line in told if line["kind"] == "evaluation"]
        at = [seen[line["step"]] for line in held_out]
        bits.plot(at, [line["bits_per_byte"] for line in held_out], color=colour, marker="o", markersize=4)
        for domain in sorted({domain for line in held_out for domain in line.get("domains", {})}):
            curve = [line["domains"][domain] for line in held_out]
            bits.plot(at, curve, color=colour, linewidth=0.8, linestyle=":")
            bits.annotate(domain, (at[-1], curve[-1]), color=colour, fontsize=8)
        if steps[-1]["max_violation"]:
            worst = [sum(line["max_violation"]) / len(line["max_violation"]) for line in steps]
            balance.plot(tokens, worst, color=colour, linewidth=1)
        rates = [line["timing"]["tokens_per_second"] for line in steps]
        speed.plot(tokens, rates, color=colour, linewidth=1)
    tidy(loss, "Training loss", "tokens", "nats per token")
    tidy(bits, "Held-out text", "tokens", "bits per byte")
    tidy(balance, "MaxVio, mean of layers", "tokens", "largest load over the mean, less 1")
    tidy(speed, "Speed", "tokens", "tokens a second")
    speed.set_ylim(bottom=0)
    loss.legend(frameon=False, fontsize=9)
    for axes in (loss, bits, balance, speed):
        axes.grid(color=GRID, linewidth=0.6)
    return figure


def expert_load_map(loads_LE: Mapping[str, Tensor], layers: Sequence[str]) -> Figure:
    """The same layers' loads, side by side on one scale: an expert's tokens as a multiple of the layer's
    mean.
    """
    figure = Figure(figsize=(1.5 + 4.2 * len(loads_LE), 1.8 + 0.45 * len(layers)), layout="constrained")
    ratios = {name: load_LE / load_LE.float().mean(1, keepdim=True) for name, load_LE in loads_LE.items()}
    top = max(2.0, *(float(ratio.max()) for ratio in ratios.values()))
    panels = figure.subplots(1, len(loads_LE), squeeze=False)[0]
    images = []
    for axes, (name, ratio) in zip(panels, ratios.items(), strict=True):
        images.append(axes.imshow(ratio.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=top))
        tidy(axes, f"{name} (MaxVio {float((ratio.amax(1) - 1).mean()):.2f})", "expert", "")
        axes.set_yticks(range(len(layers)), layers)
    figure.colorbar(images[-1], ax=list(panels), label="tokens, as a multiple of the mean")
    return figure


def serving_plan(model: str, gpu: str, serving: Serving) -> Figure:
    """Memory of a GPU by part; tokens a second by batch, floor and predicted; milliseconds a step."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    parts, rates, steps = figure.subplots(1, 3)
    memory, gib, left = serving.memory, 2**30, 0.0
    for colour, (name, size) in zip(
        SERIES,
        {"weights": memory.weights, "cache": memory.cache, "activations": memory.activations}.items(),
        strict=False,
    ):
        parts.barh([0], [size / gib], left=left, color=colour, label=name)
        left += size / gib
    parts.axvline(memory.limit / gib, color=INK, linestyle="--", linewidth=1, label="may be used")
    parts.set_yticks([])
    parts.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)
    parts.set_ylim(-0.6, 1.2)
    tidy(parts, f"{model}, {serving.count} x {gpu}", "GiB of a GPU", "")
    batches = [point.batch for point in serving.ladder]
    floors = [point.floor_s for point in serving.ladder]
    predicted = [point.predicted_s for point in serving.ladder]
    for colour, name, seconds in ((GRID, "floor", floors), (SERIES[0], "predicted", predicted)):
        each = list(zip(batches, seconds, strict=True))
        rates.plot(batches, [batch / second for batch, second in each], color=colour, marker="o", label=name)
        steps.plot(batches, [1e3 * second for second in seconds], color=colour, marker="o", label=name)
    for axes, title, unit in ((rates, "Decoding", "tokens a second"), (steps, "A step", "milliseconds")):
        axes.set_xscale("log", base=2)
        axes.grid(color=GRID, linewidth=0.6)
        axes.legend(frameon=False, fontsize=9)
        tidy(axes, title, "sequences at once", unit)
    return figure


def needle_map(
    found: Mapping[str, Sequence[Sequence[float]]], lengths: Sequence[int], depths: Sequence[float]
) -> Figure:
    """The share of needles found, a panel a model: a column a context's length, a row a depth."""
    width = 1.2 + len(found) * (1.0 + 0.6 * len(lengths))
    figure = Figure(figsize=(max(6.0, width), 1.8 + 0.35 * len(depths)), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    images = []
    for axes, (name, rows) in zip(panels, found.items(), strict=True):
        columns = list(zip(*rows, strict=True))
        images.append(axes.imshow(columns, aspect="auto", cmap="RdYlGn", vmin=0, vmax=1))
        mean = sum(map(sum, rows)) / (len(lengths) * len(depths))
        tidy(axes, f"{name}: {mean:.0%}", "tokens", "depth" if axes is panels[0] else "")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    figure.colorbar(images[-1], ax=list(panels), label="share of needles found")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG; the file appears when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    FigureCanvasAgg(figure).print_png(str(temporary))
    temporary.replace(path)
