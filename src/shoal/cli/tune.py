"""`shoal sft` and `shoal grpo`: run the stage of a recipe, and say what came of it.

The stages are in stages/sft and stages/grpo; here they are only started, resumed and shown.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from shoal.cli.view import COMMAND, TrainingView, say
from shoal.train.trainer import Outcome


def show(run: Callable[..., Outcome], config: Any, folder: Path, device: str) -> None:
    with TrainingView() as view:
        outcome = run(config, folder, device=device, observe=view)
    if outcome.interrupted:
        say(f"stopped after step {outcome.step} and saved; the same command goes on")
        raise typer.Exit(130)
    say(f"{outcome.step} steps. The model: {folder / 'export'}")
    say(f"Talk to it:  {COMMAND} chat {folder / 'export'}")
