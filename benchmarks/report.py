"""Where a benchmark leaves what it found: a table for people, rows for programs.

Files are appended to, so that a day's runs lie together; each says the command that made it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def append(out: Path, name: str, device: str, title: str, text: str, rows: Iterable[dict[str, Any]]) -> None:
    """Add a table to a Markdown file, under the command that made it (benchmarks/NAME.py), and its rows, each
    with device and command, to a .jsonl beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join((f"python -m benchmarks.{name}", *sys.argv[1:]))
    with out.open("a") as file:
        file.write(f"\n## {title}\n\n`{command}`\n\n{text}\n")
    with out.with_suffix(".jsonl").open("a") as file:
        for row in rows:
            file.write(json.dumps({"device": device, "command": command, **row}) + "\n")
