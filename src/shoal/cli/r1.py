"""`shoal r1`: the whole of reasoning RL in small, and a table of what came of it.

What is run is stages/r1; here it is only started, resumed and shown.
"""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from shoal.cli.view import COMMAND, TrainingView, say
from shoal.stages import r1
from shoal.stages.r1_recipes import Scale


def show(scale: Scale, folder: Path, seed: int, device: str, *, whole: bool) -> None:
    with TrainingView() as view:
        results = r1.run(scale, folder, seed, whole=whole, device=device, observe=view)
    if results is None:
        say("stopped and saved; the same command goes on")
        raise typer.Exit(130)
    table = Table(title=f"{scale.held_out} held-out problems of {scale.task}", title_justify="left")
    columns = (
        "right",
        "95% interval",
        "at temperature 1",
        "greets by name",
        "tokens an answer",
        "steps",
        "cost",
    )
    for column in ("model", *columns):
        table.add_column(column, justify="left" if column == "model" else "right")
    for result in results:
        table.add_row(
            result.name,
            f"{result.accuracy:.1%}",
            f"{result.low:.1%} to {result.high:.1%}",
            f"{result.sampled:.1%}",
            "" if result.named is None else f"{result.named:.1%}",
            f"{result.length:.0f}",
            f"{result.steps:,}",
            f"{result.training_tokens:,}",
        )
    Console().print(table)
    say(f"start learned from demonstrations that slip at {scale.slips:.0%} of their steps. rl and control go")
    say("on from it for as much arithmetic (cost, in tokens of training): the control is shown more of them,")
    say("RL is told only whether it is right.")
    say(f"Ask it:  {COMMAND} chat {folder / ('final' if whole else 'rl') / 'export'}")
