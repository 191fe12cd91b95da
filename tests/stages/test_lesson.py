"""Laws of the quickstart's second half: it runs on any checkpoint, goes on, and shows a whole answer."""

from __future__ import annotations

import json
from pathlib import Path

from shoal.data.text import Tokenizer
from shoal.stages import lesson, rewards
from shoal.train.metrics import Event, StepReport


def test_a_lesson_is_given_once_and_told(start: Path, tmp_path: Path) -> None:
    told = lesson.run(start, tmp_path, lambda event: None, sft_steps=2, rl_steps=1, held_out=8)
    assert told is not None
    assert [mark.name for mark in told.marks] == ["pretrained", "after SFT", "after GRPO"]
    assert all(0 <= mark.low <= mark.right <= mark.high <= 1 for mark in told.marks)
    assert told.asked.replace(" ", "").count("+") == 1
    events: list[Event] = []
    assert lesson.run(start, tmp_path, events.append, sft_steps=2, rl_steps=1, held_out=8) == told
    assert not any(isinstance(event, StepReport) for event in events)


def test_sums_are_apart_right_where_held_out_and_fit(start: Path, tmp_path: Path) -> None:
    files = lesson.write_sums(tmp_path)
    rows = {
        name: [json.loads(line) for line in file.read_text().splitlines()] for name, file in files.items()
    }
    asked = {name: [row["messages"][0]["content"] for row in of] for name, of in rows.items()}
    assert len(asked["held-out"]) == len(set(asked["held-out"])) == lesson.HELD_OUT
    assert len(asked["demonstrations"]) == lesson.DEMONSTRATIONS
    assert len(asked["problems"]) == lesson.PROBLEMS
    assert not set(asked["held-out"]) & (set(asked["problems"]) | set(asked["demonstrations"]))
    tokenizer = Tokenizer.load(start)  # a token a byte: the most that any tokenizer makes
    for problem in rows["held-out"]:
        assert rewards.spelled(problem["solution"], problem) == 1
        assert len(tokenizer.encode(problem["solution"])) < 48
