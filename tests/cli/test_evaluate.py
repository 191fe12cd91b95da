"""`shoal eval` as it is typed: what it prints, and what it says to mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Shoal, refusal
from tests.evaluation_sets import write_sets

pytest.importorskip("lm_eval", reason="needs shoal[eval]")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("data"))


def test_the_command(shoal: Shoal, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    result = shoal(
        "eval", checkpoint, "--tasks", "humaneval,mmlu_stem", "--data", data, "--limit", "2", "--json",
        "--samples", tmp_path / "samples.jsonl",
    )  # fmt: skip
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert [(each["task"], each["metric"], each["samples"]) for each in told["scores"]] == [
        ("humaneval", "pass@1", 2), ("mmlu_stem", "acc", 2),
    ]  # fmt: skip
    assert "sandbox" in result.err
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["task"] for line in lines] == ["humaneval", "humaneval", "mmlu_stem", "mmlu_stem"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "gsm9k"], "the nearest is 'gsm8k'"),
        (["--tasks", ","], "no task is named"),
        (["--tasks", "gsm8k", "--limit", "0"], "--limit is 0"),
        (["--tasks", "gsm8k", "--data", "nowhere"], "gsm8k/test.jsonl from github.com/openai"),
        (["--tasks", "svamp"], "svamp/test.jsonl is missing"),
    ],
)
def test_mistakes_are_one_line(
    shoal: Shoal,
    checkpoint: Path,
    data: Path,
    arguments: list[str],
    words: str,
) -> None:
    where = [] if "--data" in arguments else ["--data", data]
    assert words in refusal(shoal("eval", checkpoint, *arguments, *where))
