"""`shoal verify`: does serving a checkpoint give what its model says, feature by feature and pair by pair?

The stage is stages/verify; here a checkpoint is opened, progress told, and the cases shown. Exit code 1 where
one does not hold.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.device import Checkpoint, Device, Download, Dtype, find_device

if TYPE_CHECKING:
    from shoal.stages.verify import Case, Feature, Report


def verify(
    path: Checkpoint,
    feature: Annotated[
        list[str] | None, typer.Option(help="Only this feature, and its pairs with others named. Repeatable.")
    ] = None,
    pairs: Annotated[bool, typer.Option(help="Each two of them too.")] = True,
    prompts: Annotated[int, typer.Option(help="Prompts of random ids, half of them answered greedily.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of the longest.")] = 48,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    download: Download = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON (docs/json.md).")] = False,
) -> None:
    """Hold serving to the model's naive forward pass: every feature and every pair. Exit 1 if one fails."""
    import torch

    from shoal.checkpoint import hf
    from shoal.cli.view import loading, say
    from shoal.stages import verify as stage

    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"--dtype is {dtype!r}; it must be float32 or bfloat16")
    features = _find(feature, stage.FEATURES)
    folder = hf.find_folder(path, download=download)
    with loading("loading") as progress:
        model = hf.load(
            folder,
            device=find_device(device),
            dtype=None if dtype is None else getattr(torch, dtype),
            progress=progress,
        )

    def observe(done: int, total: int, names: tuple[str, ...]) -> None:
        say(f"{done + 1}/{total} {' with '.join(names) or 'plainly'}")

    report = stage.verify(
        model.eval(),
        prompts=stage.draw_prompts(model, prompts, length, seed),
        tokens=tokens,
        features=features,
        pairs=pairs,
        observe=observe,
    )
    if as_json:
        print(json.dumps({"model": path, "holds": report.holds, **asdict(report), "slack": stage.SLACK}))
    else:
        _show(report, stage.SLACK)
    if not report.holds:
        raise typer.Exit(1)


def _find(names: list[str] | None, known: tuple[Feature, ...]) -> tuple[Feature, ...]:
    by_name = {feature.name: feature for feature in known}
    for name in names or ():
        if name not in by_name:
            raise ValueError(f"--feature is {name!r}; it must be one of {', '.join(by_name)}")
    return known if not names else tuple(by_name[name] for name in dict.fromkeys(names))


def _show(report: Report, slack: float) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Log-probabilities of drawn tokens, against the naive pass", title_justify="left")
    for head in ("features", "holds", "off by", "allowed", "other experts", "same bits"):
        table.add_column(head, justify="left" if head == "features" else "right")
    for case in report.cases:
        table.add_row(*_row(case))
    console = Console()
    console.print(table)
    console.print(
        f"Allowed: {slack:g} times what the naive pass in {report.dtype} differs from the same in "
        f"{report.wide}, over the texts read; in the end {report.rounding:.2e} nats, on {report.device}.",
        highlight=False,
    )
    if report.fp8_rounding:
        console.print(
            f"With a cache in fp8: {slack:g} times what rounding its rows to e4m3 costs the naive pass; in "
            f"the end {report.fp8_rounding:.2e} nats.",
            highlight=False,
        )
    if report.fp8_keys_rounding:
        console.print(
            f"With index keys in fp8: {slack:g} times what the naive passes with such keys differ, the rows "
            f"narrow where a case says so; in the end {report.fp8_keys_rounding:.2e} nats.",
            highlight=False,
        )
    run = [case for case in report.cases if case.skipped is None]
    failed = sum(not case.holds for case in run)
    console.print(f"{len(run) - failed} of {len(run)} hold, {len(report.cases) - len(run)} left out.")


def _row(case: Case) -> tuple[str, ...]:
    name = " + ".join(case.features) or "plainly"
    if case.skipped is not None:
        return f"{name}: {case.skipped}", "-", "", "", "", ""
    return (
        name if case.fault is None else f"{name}: {case.fault}",
        "yes" if case.holds else "NO",
        f"{case.difference:.2e}",
        f"{case.tolerance:.2e}",
        f"{case.other_choices} of {case.choices}",
        "yes" if case.same_as_plain else "no",
    )
