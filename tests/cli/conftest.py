"""The command line as `main()` runs it, and a tiny checkpoint to run it on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from shoal.cli import main
from tests.tiny_checkpoint import write_checkpoint


class Result(NamedTuple):
    code: int
    out: str
    err: str


Shoal = Callable[..., Result]


@pytest.fixture
def shoal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shoal:
    def run(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["shoal", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def refusal(result: Result) -> str:
    """The one line a mistake makes."""
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("shoal: ")
    assert result.err.count("\n") == 1
    return result.err
