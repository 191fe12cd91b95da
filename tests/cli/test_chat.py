"""Laws of an answer on the screen: thinking is folded on a terminal, and the text is whole elsewhere."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from shoal.cli.chat import LINES, Screen

SAID = "<think>" + "\n".join(f"step {n}" for n in range(20)) + "</think>\nIt is 4."
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def shown(pieces: list[str], *, terminal: bool, opened: bool = False) -> tuple[str, Screen]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=60, height=30)
    screen = Screen(console, reasons=True, opened=opened)
    for piece in pieces:
        screen.show(piece)
    screen.end()
    return file.getvalue(), screen


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_thinking_is_folded_and_the_answer_stands(size: int) -> None:
    pieces = [SAID[at : at + size] for at in range(0, len(SAID), size)]
    text, screen = shown(pieces, terminal=True)
    assert screen.thought == "\n".join(f"step {n}" for n in range(20))
    plain = ESCAPES.sub("", text)
    assert "thought for 40 words; /think shows them" in plain
    assert plain.endswith("It is 4.\n")
    assert "<think>" not in plain
    assert "</think>" not in plain
    # The last lines alone were ever on the screen at once; and each erased before the fold.
    assert max(frame.count("step") for frame in text.split("\x1b[2K")) <= LINES


def test_what_a_prompt_opened_and_what_never_ends() -> None:
    text, screen = shown(["so", " and so</think>4"], terminal=True, opened=True)
    assert screen.thought == "so and so"
    assert ESCAPES.sub("", text).endswith("4\n")
    text, screen = shown(["<think>cut off"], terminal=True)
    assert screen.thought == "cut off"
    assert "thought for 2 words" in ESCAPES.sub("", text)


def test_elsewhere_the_text_is_as_it_came() -> None:
    text, screen = shown([SAID[:9], SAID[9:]], terminal=False)
    assert text == SAID + "\n"
    assert screen.thought == ""


def test_an_answer_without_thinking_is_plain() -> None:
    text, screen = shown(["It is ", "4."], terminal=True)
    assert text == "It is 4.\n"
    assert screen.thought == ""
