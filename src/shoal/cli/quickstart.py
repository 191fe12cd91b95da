"""`shoal quickstart`: train, teach, then show what came of it and what to do next.

What is trained and measured is in stages/quickstart and stages/lesson; here it is only started, resumed and
printed.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from shoal.cli.view import COMMAND, TrainingView, say
from shoal.stages import lesson, pretrain, quickstart

CONTINUE = "/#continue"  # the page, as base models want it


def show(patterns: list[str], folder: Path, steps: int | None, fresh: bool, *, teaches: bool) -> None:
    config = quickstart.recipe(patterns, steps)
    if fresh and (folder / "config.toml").exists():
        shutil.rmtree(folder)
    if (folder / "export").exists():
        say(f"{folder} holds a finished run; --fresh starts over, --out DIR makes another beside it")
    elif (folder / "checkpoints").exists():
        say(f"{folder} holds a run that was interrupted; going on")
    with TrainingView() as view:
        outcome = pretrain.run(config, folder, observe=view)
    if outcome.interrupted:
        say(f"stopped after step {outcome.step} and saved; the same command goes on")
        raise typer.Exit(130)
    say("comparing, drawing, writing")
    summary = quickstart.summarise(config, folder)
    _print(summary)
    if teaches:
        _teach(folder)
    _offer_page(summary.export)


def _teach(folder: Path) -> None:
    with TrainingView() as view:
        learned = lesson.run(folder / "export", folder / "sums", view)
    if learned is None:
        say("stopped and saved; the same command goes on")
        raise typer.Exit(130)
    _print_lesson(learned)


def _print(summary: quickstart.Summary) -> None:
    console = Console()
    table = Table(title="Held-out text, bits per byte (lower is better)", title_justify="left")
    table.add_column("method")
    table.add_column("bits per byte", justify="right")
    table.add_column("this model is", justify="right")
    others = summary.baselines
    for name, value in (("unigram bytes", others.unigram), ("gzip -9", others.gzip), ("xz -9", others.xz)):
        share = 1 - summary.bits_per_byte / value
        table.add_row(name, f"{value:.3f}", f"{abs(share):.1%} {'better' if share > 0 else 'worse'}")
    table.add_row("this model", f"{summary.bits_per_byte:.3f}", "", style="bold")
    console.print(table)
    console.print(
        "The compressors start empty on this text; the model has read the rest of the corpus.", style="dim"
    )
    for prompt, written in summary.samples:
        console.print(Panel(Text.assemble((prompt, "dim"), written), title="a sample", title_align="left"))
    console.print(
        f"{summary.parameters / 1e6:.1f}M parameters, {summary.minutes:.1f} minutes of training. Pictures: "
        + ", ".join(str(picture) for picture in summary.pictures),
        highlight=False,
    )
    console.print(
        f"The model, for any tool that reads Hugging Face folders: {summary.export}\n"
        f"Give it the start of a text:  {COMMAND} chat {summary.export} --raw\n"
        f"On a page, with a map of its experts:  {COMMAND} serve {summary.export} --ui\n"
        f"(there, at {CONTINUE}, it goes on with a text; it has learned no conversations)",
        highlight=False,
        markup=False,
    )


def _offer_page(export: Path) -> None:
    """Where somebody sits before a terminal: the page, now, until Ctrl-C."""
    from shoal.cli.serve import serve

    if sys.stdin.isatty() and sys.stdout.isatty() and typer.confirm("Open the page now?", default=False):
        serve(str(export), ui=True)


def _print_lesson(learned: lesson.Lesson) -> None:
    console = Console()
    table = Table(title=f"{lesson.HELD_OUT} sums that no stage has seen", title_justify="left")
    for column in ("model", "right", "95% interval"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for mark in learned.marks:
        table.add_row(mark.name, f"{mark.right:.1%}", f"{mark.low:.1%} to {mark.high:.1%}")
    console.print(table)
    console.print(
        f"SFT saw sums that forget {lesson.SLIPS:.0%} of their carries; GRPO was told right or wrong.",
        style="dim",
    )
    told = Text.assemble((learned.thought, "dim italic"), "\n", learned.said)
    title = f"{learned.asked}, thought and answered (it is {learned.answer})"
    console.print(Panel(told, title=title, title_align="left"))
    console.print(
        f"Ask it yourself, digits apart:  {COMMAND} chat {learned.export}", highlight=False, markup=False
    )
