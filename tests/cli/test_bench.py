"""`shoal bench`: what it will not measure is said in one line. tests/ops/test_plans.py tests what it does."""

from __future__ import annotations

import sys

import pytest
import torch

from shoal.cli import main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "deepseek-llm-7b"], "has no routed experts"),
        (["--budget", "0"], "--budget is 0.0; it must be more than 0 seconds"),
        (["--experts", "3"], "--experts is 3; deepseek-v2-lite has 64 and each token needs 6"),
        (["--experts", "65"], "--experts is 65"),
        pytest.param(
            ["--tune"],
            "there is no CUDA device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["shoal", "bench", "kernels", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert words in " ".join(err.split())
    assert "Traceback" not in err
    assert not out
