"""The command line as `main()` runs it, and a tiny checkpoint to run it on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from shoal.checkpoint import hf
from shoal.cli import main
from shoal.config.families import tiny
from shoal.data.tokenizer import train_tokenizer
from shoal.model.transformer import Transformer

TEXT = "def add(a, b):\n    return a + b\n" * 40


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
    """A tiny V3 with a tokenizer, its weights large enough that its predictions are not flat."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer([TEXT, "".join(map(chr, range(32, 1000)))], 320)
    tokenizer.save(folder / "tokenizer")
    config = replace(tiny("deepseek-v3"), initializer_range=0.2, bos_token_id=0, eos_token_id=1)
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    files = [folder / "tokenizer" / name for name in ("tokenizer.json", "tokenizer_config.json")]
    hf.save(model, folder / "model", tokenizer_files=files)
    return folder / "model"


def refusal(result: Result) -> str:
    """The one line a mistake makes."""
    assert result.code == 2
    assert result.out == ""
    assert result.err.startswith("shoal: ")
    assert result.err.count("\n") == 1
    return result.err
