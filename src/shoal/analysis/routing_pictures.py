"""The pictures of a routing report, each from observations of one model (analysis/observe.py).

Each function returns a figure and what it shows in words, for those who cannot see it. Of many layers three
are drawn where a picture takes a layer: the first, the middle and the last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from shoal.analysis.observe import Observation, divergence, together
from shoal.analysis.plots import GRID, SERIES, expert_load_map, tidy

Picture = tuple[Figure, str]


def loads(seen: Sequence[Observation], layers: Sequence[str]) -> Picture:
    told = "; ".join(
        f"{one.name}: mean MaxVio {one.max_violation_L.mean():.2f}, the busiest expert takes "
        f"{(one.max_violation_L.max() + 1):.1f} times the mean"
        for one in seen
    )
    figure = expert_load_map({one.name: one.load_LE for one in seen}, layers)
    return figure, f"Load of every expert, a row a layer, a panel a domain. {told}."


def balance(seen: Sequence[Observation], layers: Sequence[str]) -> Picture:
    """MaxVio, the entropy of scores and of loads, and how far the domains part, by layer."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    violation, scores, skew, apart = figure.subplots(2, 2).flatten()
    for number, one in enumerate(seen):
        colour = SERIES[number % len(SERIES)]
        violation.plot(layers, one.max_violation_L.tolist(), color=colour, marker="o", label=one.name)
        scores.plot(layers, one.entropy_L.tolist(), color=colour, marker="o", label=f"{one.name}, scores")
        loads_L = one.load_entropy_L.tolist()
        scores.plot(layers, loads_L, color=colour, linestyle=":", label=f"{one.name}, loads")
        skew.plot(layers, one.experts_for(0.5).tolist(), color=colour, marker="o", label=one.name)
    apart_L = divergence(torch.stack([one.load_LE for one in seen]))
    apart.bar(layers, apart_L.tolist(), color=SERIES[0])
    tidy(violation, "MaxVio", "layer", "largest load over the mean, less 1")
    tidy(scores, "Entropy", "layer", "bits")
    tidy(skew, "Experts that take half the choices", "layer", "experts")
    tidy(apart, "How far the domains part", "layer", "Jensen-Shannon, bits")
    for axes in (violation, scores, skew):
        axes.grid(color=GRID, linewidth=0.6)
        axes.legend(frameon=False, fontsize=8)
    for axes in (violation, skew, apart):
        axes.set_ylim(bottom=0)
    halves = ", ".join(f"{one.name} {one.experts_for(0.5).double().mean():.1f}" for one in seen)
    return figure, (
        f"By layer: MaxVio, entropy of scores and loads, experts that take half of a domain's choices (mean: "
        f"{halves}), and the divergence of the domains (mean {apart_L.mean():.3f} bits)."
    )


def pairs(pairs_LEE: Tensor, tokens: int, layers: Sequence[str]) -> Picture:
    chosen = _three(len(layers))
    ratios = [together(pairs_LEE[layer], tokens) for layer in chosen]
    figure = _squares([ratio.clamp(0, 4) for ratio in ratios], [layers[n] for n in chosen], "magma", (0, 4))
    told = ", ".join(
        f"layer {layers[n]}: up to {ratio.nan_to_num(0).max():.1f}"
        for n, ratio in zip(chosen, ratios, strict=True)
    )
    return figure, f"How much oftener two experts are chosen together than apart would have it ({told})."


def likeness(similar_LEE: Tensor, layers: Sequence[str]) -> Picture:
    chosen = _three(len(layers))
    squares = [similar_LEE[n].clone().fill_diagonal_(float("nan")) for n in chosen]
    top = max(1e-6, *(float(square.nan_to_num(0).abs().max()) for square in squares))
    figure = _squares(squares, [layers[n] for n in chosen], "RdBu_r", (-top, top))
    return figure, f"Cosine of each two experts' weights; the largest away from the diagonal is {top:.3f}."


def norms(seen: Sequence[Observation], layers: Sequence[str]) -> Picture:
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    for number, one in enumerate(seen):
        colour = SERIES[number % len(SERIES)]
        routed, shared = one.norms_L2.T.tolist()
        axes.plot(layers, routed, color=colour, marker="o", label=f"{one.name}, routed")
        axes.plot(layers, shared, color=colour, linestyle=":", marker="s", label=f"{one.name}, shared")
    tidy(axes, "What the experts put out", "layer", "mean norm a token")
    axes.set_ylim(bottom=0)
    axes.grid(color=GRID, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    ratio = torch.stack([one.norms_L2[:, 1] / one.norms_L2[:, 0] for one in seen]).nanmean()
    told = (
        "there is no shared expert" if torch.isnan(ratio) else f"shared over routed is {ratio:.2f} on average"
    )
    return figure, f"Mean norm of the routed and of the shared experts' output, by layer: {told}."


def _three(layers: int) -> list[int]:
    return sorted({0, layers // 2, layers - 1})


def _squares(squares: list[Tensor], titles: list[str], colours: str, limits: tuple[float, float]) -> Figure:
    figure = Figure(figsize=(1 + 3.6 * len(squares), 3.6), layout="constrained")
    panels = figure.subplots(1, len(squares), squeeze=False)[0]
    image = None
    for axes, square, title in zip(panels, squares, titles, strict=True):
        image = axes.imshow(square.numpy(), cmap=colours, vmin=limits[0], vmax=limits[1])
        tidy(axes, f"layer {title}", "expert", "expert")
    assert image is not None
    figure.colorbar(image, ax=list(panels))
    return figure
