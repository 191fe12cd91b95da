"""`convert --gguf`: a checkpoint as a file for llama.cpp, and what to type next.

What is written, and what is refused, is checkpoint/gguf.py's; here are the bar and the words. The law: what
the file does otherwise than the checkpoint is said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def show(source: str, target: Path, kind: Any, *, download: bool, overwrite: bool) -> None:
    from shoal.checkpoint.gguf import MODELFILE, export
    from shoal.cli.view import loading, say

    with loading("writing") as progress:
        exported = export(source, target, kind, download=download, overwrite=overwrite, progress=progress)
    for note in exported.notes:
        say(f"note: {note}")
    say(
        f"written to {exported.file}: {exported.num_bytes / 1e9:.2f} GB, architecture {exported.architecture}"
    )
    say(f"with Ollama: ollama create {target.name} -f {target / MODELFILE}")
