"""`shoal sft`, `grpo`, `preference` and `reject`: run the stage of a recipe, and say what came of it.

The stages are in stages/ by these names; here they are only started, resumed and shown.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import typer

from shoal.cli.view import COMMAND, TrainingView, say
from shoal.config.tune import PreferenceConfig, RejectConfig
from shoal.stages import reject
from shoal.train.trainer import Outcome


def show(run: Callable[..., Outcome], config: Any, folder: Path, device: str) -> None:
    first = os.environ.get("RANK", "0") == "0"  # of the processes of torchrun: it alone shows
    with TrainingView() if first else nullcontext(lambda event: None) as view:
        outcome = run(config, folder, device=device, observe=view)
    if not first:
        raise typer.Exit(130 if outcome.interrupted else 0)
    if outcome.interrupted:
        say(f"stopped after step {outcome.step} and saved; the same command goes on")
        raise typer.Exit(130)
    say(f"{outcome.step} steps. The model: {folder / 'export'}")
    if isinstance(config, PreferenceConfig):
        say(f"Reward by it:  {COMMAND} grpo RECIPE --set preference.model={folder / 'export'}")
        return
    say(f"Talk to it:  {COMMAND} chat {folder / 'export'}")


def show_kept(config: RejectConfig, folder: Path, device: str) -> None:
    with TrainingView() as view:
        kept = reject.run(config, folder, device=device, observe=view)
    say(f"{kept.right} of {kept.answers} answers were right, to {kept.solved} of {kept.problems} problems")
    data = f"'data=[\"{folder / reject.KEPT}\"]'"
    say(f"Tune on the {kept.kept} that were kept:  {COMMAND} sft RECIPE --set {data}")
