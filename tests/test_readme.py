"""The README's commands are commands: each is read by the real command line, with its options and arguments.

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
from shoal.config.tune import load_grpo, load_sft

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines()]


def test_every_line_is_one_of_ours() -> None:
    assert {shlex.split(line, comments=True)[0] for line in LINES} == {"./shoal", "./check"}


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("./shoal")])
def test_the_command_line_reads(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    load = {"sft": load_sft, "grpo": load_grpo, "extend": load_extend}.get(words[0], load_recipe)
    command = get_command(app)
    while isinstance(command, TyperGroup):
        command = command.commands[words.pop(0)]
    given = command.make_context(line, words).params
    if "recipe" in given:
        load(ROOT / given["recipe"], given["set_"])
