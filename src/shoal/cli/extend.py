"""`shoal extend`: continue a checkpoint at a longer context, and say what it finds there.

The stage is stages/extend; here it is only started, resumed and shown.
"""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shoal.cli import tune
from shoal.config.extend import ExtendConfig
from shoal.stages import extend


def show(config: ExtendConfig, folder: Path, device: str) -> None:
    tune.show(extend.run, config, folder, device)
    if config.needle is None:
        return
    told = json.loads((folder / extend.NEEDLES).read_text())
    table = Table(title="Needles found, mean of depths", title_justify="left")
    table.add_column("model")
    for length in told["lengths"]:
        table.add_column(f"{length:,} tokens", justify="right")
    for name, rows in told["found"].items():
        table.add_row(name, *(f"{sum(row) / len(row):.0%}" for row in rows))
    console = Console()
    console.print(table)
    console.print(f"By depth: {folder / extend.NEEDLES}, {folder / 'needle.png'}", highlight=False)
