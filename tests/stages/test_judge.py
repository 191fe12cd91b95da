"""Laws of the judge: every answer gets a score, in order, and every fault is counted and told."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.stages.judge import Judge

BAD, HALF = "tests.stages.misbehaving:misbehave", "tests.stages.misbehaving:half"


@pytest.mark.parametrize("workers", [1, 3])
def test_whatever_a_reward_does_the_others_are_judged(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    does = {
        "raise": "raised",
        "hang": "hung",
        "hang in a thread": "hung",
        "fork": "left processes",
        "return twice": "left processes",
        "nan": "not a number",
        "exit": "died",
        "print": None,
        "good": None,
    }
    with Judge({BAD: 1.0, HALF: 2.0}, seconds=4.0, workers=workers) as judge:
        scores = judge.score(list(does), [{}] * len(does))
        again = judge.score(["good"], [{}])
    for score, fault in zip(scores, does.values(), strict=True):
        assert score.faults == ({} if fault is None else {BAD: fault})
        assert score.parts == {BAD: 1.0 if fault is None else 0.0, HALF: 0.5}
        assert score.total == (2.0 if fault is None else 1.0)
    assert again[0].total == 2.0
    assert judge.faults == {"raised": 1, "hung": 2, "left processes": 2, "not a number": 1, "died": 1}
    assert judge.examples["raised"] == f"{BAD}: RuntimeError: no such luck"
    assert "no answer in 4 s" in judge.examples["hung"]


def test_rewards_that_cannot_be_found_are_named() -> None:
    with Judge({"nosuch:reward": 1.0}) as judge, pytest.raises(ValueError, match="No module named 'nosuch'"):
        judge.score(["x"], [{}])
    with Judge({"nosuch": 1.0}) as judge, pytest.raises(ValueError, match="no attribute 'nosuch'"):
        judge.score(["x"], [{}])
    with pytest.raises(ValueError, match="no rewards are named"):
        Judge({})
    with pytest.raises(ValueError, match="workers is 0; it must be at least 1"):
        Judge({BAD: 1.0}, workers=0)


def test_the_worker_loads_no_torch() -> None:
    """It would cost seconds a start, and a gigabyte."""
    import subprocess
    import sys

    source = "import sys, shoal.stages.judge, shoal.stages.rewards; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
