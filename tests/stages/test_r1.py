"""Laws of R1 in small: problems can be checked, the sides are apart, and the whole of it runs and goes on."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from shoal.checkpoint import hf
from shoal.stages import r1, rewards, tasks
from shoal.train.metrics import Event, Phase

REWARD = {"number": rewards.number, "countdown": rewards.countdown}


@pytest.mark.parametrize(("task", "size"), [("addition", 4), ("countdown", 4)])
def test_demonstrations_are_right_and_sides_are_apart(task: str, size: int) -> None:
    sides = [list(islice(tasks.problems(task, size, 0, held_out=side), 300)) for side in (False, True)]
    reward = REWARD[tasks.REWARDS[task]]
    for problem in sides[0] + sides[1]:
        assert reward(problem["solution"], problem) == 1
        assert reward(problem["solution"] + "0", problem) == 0
    asked = [{problem["messages"][0]["content"] for problem in side} for side in sides]
    assert len(asked[0]) == len(asked[1]) == 300
    assert not asked[0] & asked[1]
    again = list(islice(tasks.problems(task, size, 0, held_out=False), 300))
    assert again == sides[0]
    assert again != list(islice(tasks.problems(task, size, 1, held_out=False), 300))


def test_a_task_that_runs_out_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no more than .* raise its size"):
        r1.write_problems(r1.Scale("addition", size=1, demonstrations=5, held_out=500), tmp_path, 0)
    with pytest.raises(ValueError, match="no task 'chess'"):
        r1.laptop("chess", {})


def test_the_whole_runs_and_goes_on(tmp_path: Path) -> None:
    scale = r1.Scale(
        size=2, demonstrations=60, problems=200, held_out=20, start_steps=4, rl_steps=2, questions=4, group=4,
        max_tokens=8,
    )  # fmt: skip
    results = r1.run(scale, tmp_path)
    assert results is not None
    assert [result.name for result in results] == ["start", "rl", "control"]
    for result in results:
        assert 0 <= result.low <= result.accuracy <= result.high <= 1
    start, rl, control = results
    assert rl.training_tokens > 0
    # The control's arithmetic is that of RL, to half a step.
    assert (
        abs(control.training_tokens - rl.training_tokens) <= 0.6 * start.training_tokens / start.steps + 300
    )
    told = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["name"] for line in told] == ["start", "rl", "control"]
    events: list[Event] = []
    assert r1.run(scale, tmp_path, observe=events.append) == results  # done: nothing is trained again
    assert all(isinstance(event, Phase) for event in events)
    assert hf.load(tmp_path / "rl" / "export").config.vocab_size == r1.MODEL.vocab_size
