"""`shoal plot RUN...`: runs side by side, from their metrics.jsonl alone.

It needs no model: a run on another machine can be compared by copying one file. The law: what is drawn is
what was written; a line that a kill cut short is left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shoal.cli.view import say

Lines = list[dict[str, Any]]


def show(folders: Sequence[Path], out: Path) -> None:
    """Draw the runs into one PNG, and print how each stands."""
    from shoal.analysis import plots

    runs = {_name(folder, folders): read(folder) for folder in folders}
    plots.save(plots.runs(runs), out)
    width = max(map(len, runs))
    print(f"{'run':<{width}}  {'steps':>7}  {'tokens':>13}  {'loss':>7}  {'bits/byte':>9}  {'tokens/s':>9}")
    for name, lines in runs.items():
        steps = [line for line in lines if line["kind"] == "step"]
        held_out = [line for line in lines if line["kind"] == "evaluation"]
        seconds = sum(line["timing"]["seconds"] for line in steps)
        bits = f"{held_out[-1]['bits_per_byte']:.3f}" if held_out else "-"
        domains = held_out[-1].get("domains", {}) if held_out else {}
        by_domain = "".join(f"  {domain} {value:.3f}" for domain, value in domains.items())
        rate = steps[-1]["tokens"] / seconds
        tokens, loss = steps[-1]["tokens"], steps[-1]["loss"]
        stands = f"{steps[-1]['step']:>7}  {tokens:>13,}  {loss:>7.3f}  {bits:>9}  {rate:>9,.0f}"
        print(f"{name:<{width}}  {stands}{by_domain}")
    say(f"drawn: {out}")


def read(folder: Path) -> Lines:
    """The lines of a run, or of its metrics file. ValueError where there is no step to draw."""
    path = folder / "metrics.jsonl" if folder.is_dir() else folder
    if not path.exists():
        raise ValueError(f"{folder} holds no metrics.jsonl; give a run's folder")
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]
    lines: Lines = [json.loads(line) for line in whole]
    if not any(line["kind"] == "step" for line in lines):
        raise ValueError(f"{path} has no step yet; wait for the first, or give another run")
    return lines


def _name(folder: Path, folders: Sequence[Path]) -> str:
    """The last part of the path, or all of it where two are alike."""
    alike = sum(other.name == folder.name for other in folders) > 1
    return str(folder) if alike else folder.name
