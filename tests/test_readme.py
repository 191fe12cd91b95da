"""The commands of README and docs are commands: the real command line reads each, options and arguments.

They are parsed, not run; tests/test_tiny.py runs what the first of them does. Recipes that they name are
loaded, with the changes they ask for.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from shoal.cli.app import app
from shoal.config.extend import load_extend
from shoal.config.run import load_recipe
from shoal.config.sparsify import load_sparsify
from shoal.config.tune import load_grpo, load_sft

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def lines_of(page: Path) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


LINES = [(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in lines_of(page)]


def test_every_line_is_one_of_ours() -> None:
    first = {shlex.split(line, comments=True)[0] for _, line in LINES}
    assert first == {"./shoal", "./check", "shoal", "torchrun"}  # without ./ where it is installed
    assert len([line for page, line in LINES if page != "README.md"]) > 30


@pytest.mark.parametrize(("page", "line"), [each for each in LINES if not each[1].startswith("./check")])
def test_the_command_line_reads(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    words = words[1 + (words.index("shoal") if words[0] == "torchrun" else 0) :]
    loads = {"sft": load_sft, "grpo": load_grpo, "extend": load_extend, "sparsify": load_sparsify}
    load = loads.get(words[0], load_recipe)
    command = get_command(app)
    while isinstance(command, TyperGroup):
        command = command.commands[words.pop(0)]
    given = command.make_context(line, words).params
    if "recipe" in given:
        load(ROOT / given["recipe"], given["set_"])
