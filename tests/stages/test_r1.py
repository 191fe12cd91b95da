"""Laws of R1 in small: problems can be checked, the sides are apart, and the whole of it runs and goes on."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path

import pytest

from benchmarks import r1 as benchmark
from shoal.checkpoint import hf
from shoal.config.run import to_toml
from shoal.config.tune import load_grpo, load_preference, load_reject, load_sft
from shoal.stages import r1, rewards, tasks
from shoal.stages.r1_recipes import SCALES, Recipes, Scale, scale_of
from shoal.train.metrics import Event, StepReport

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


@pytest.mark.parametrize("task", ["addition", "countdown"])
def test_a_demonstrator_who_slips_is_wrong_and_nothing_else_changes(task: str) -> None:
    right, slipped = (
        list(islice(tasks.problems(task, 3, 0, held_out=False, slips=slips), 400)) for slips in (0.0, 0.6)
    )
    assert [problem["messages"] for problem in right] == [problem["messages"] for problem in slipped] or (
        task == "countdown"  # where a slip draws another sign, and so all that comes after it
    )
    reward = REWARD[tasks.REWARDS[task]]
    share = sum(reward(problem["solution"], problem) for problem in slipped) / 400
    assert 0.1 < share < 0.6
    if task == "addition":
        # A sum without carries is right; with one it is right by chance 0.4.
        plain = [p for p in slipped if all(int(x) < 10 for x in _totals(p))]
        assert all(reward(problem["solution"], problem) for problem in plain if "1" not in _carries(problem))


def _totals(problem: tasks.Problem) -> list[str]:
    thought = problem["solution"].partition("</think>")[0]
    return [step.partition("=")[2] for step in thought.split(";")]


def _carries(problem: tasks.Problem) -> str:
    thought = problem["solution"].partition("</think>")[0]
    return "".join(step.partition("=")[0][-1] for step in thought.split(";"))


def test_greetings_and_digits_apart() -> None:
    met = next(tasks.problems("greeting", 3, 0, held_out=False))
    assert rewards.named(met["solution"], met) == 1
    pair = tasks.pair(met, random.Random(0))
    assert rewards.named(pair["chosen"], met) == 1
    assert rewards.named(pair["rejected"], met) == 0
    sum_ = tasks.spell(next(tasks.problems("addition", 3, 0, held_out=False)))
    assert rewards.spelled(sum_["solution"], sum_) == 1
    assert not any(a.isdigit() and b.isdigit() for a, b in zip(sum_["solution"], sum_["solution"][1:]))  # noqa: B905


def test_what_cannot_be_asked_is_told(tmp_path: Path) -> None:
    small = Scale(size=1, demonstrations=5, held_out=500)
    with pytest.raises(ValueError, match=r"has no more than .* raise its size"):
        Recipes(small, tmp_path, 0).write_problems()
    with pytest.raises(ValueError, match="no task 'chess'"):
        scale_of("laptop", "chess", {})
    with pytest.raises(ValueError, match="no scale 'moon'"):
        scale_of("moon", "addition", {})
    with pytest.raises(ValueError, match="slips is 1"):
        scale_of("laptop", "addition", {"slips": 1})


@pytest.mark.parametrize("scale", [scale for tasks in SCALES.values() for scale in tasks.values()])
def test_every_scale_has_its_problems_and_recipes_that_are_read_back(scale: Scale, tmp_path: Path) -> None:
    recipes = Recipes(scale, tmp_path, 0)
    held_out = tasks.problems(scale.task, scale.size, 0, held_out=True)
    assert sum(1 for _ in islice(held_out, scale.held_out)) == scale.held_out
    loads = {
        load_sft: [recipes.cold_start(), recipes.control(5), recipes.tuning(), recipes.distillation()],
        load_grpo: [recipes.reasoning(), recipes.all_scenarios()],
        load_reject: [recipes.rejection()],
        load_preference: [recipes.taste()],
    }
    for load, those in loads.items():
        for recipe in those:
            (tmp_path / "recipe.toml").write_text(to_toml(recipe))
            assert load(tmp_path / "recipe.toml") == recipe


def test_the_whole_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale = Scale(
        size=2, demonstrations=60, problems=200, held_out=20, start_steps=4, rl_steps=2, questions=4, group=4,
        max_tokens=8, kept=10, greetings=30, tuned_steps=3, pairs=20, taste_steps=2, final_steps=2,
        student_steps=2,
    )  # fmt: skip
    results = r1.run(scale, tmp_path)
    assert results is not None
    assert [result.name for result in results] == ["start", "rl", "control", "tuned", "final", "student"]
    for result in results:
        assert 0 <= result.low <= result.accuracy <= result.high <= 1
        assert (result.named is None) == (result.name in ("start", "rl", "control"))
    start, rl, control, *_ = results
    # The control's arithmetic is that of RL, to half a step.
    per_step = start.training_tokens / start.steps
    assert abs(control.training_tokens - rl.training_tokens) <= 0.6 * per_step + 300
    told = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [line["name"] for line in told] == [result.name for result in results]
    # Sums are judged by their rule, greetings by the reward model, in the same round.
    rounds = [json.loads(line) for line in (tmp_path / "final" / "rollouts.jsonl").read_text().splitlines()]
    assert {"reward/number", "reward/preference"} <= set().union(*rounds)
    assert "reward/named" not in set().union(*rounds)
    events: list[Event] = []
    monkeypatch.setattr(r1, "measure", None)
    assert r1.run(scale, tmp_path, observe=events.append) == results  # done: all is known
    assert not any(isinstance(event, StepReport) for event in events)
    assert hf.load(tmp_path / "student" / "export").config.model_type == "qwen2"


@pytest.mark.slow
def test_the_benchmark_of_a_round_runs(tmp_path: Path) -> None:
    assert benchmark.covered([(5, 9), (0, 3), (2, 4), (6, 7)]) == 8
    recipes = Recipes(scale_of("laptop", "addition", benchmark.TINY), tmp_path, 0)
    told = benchmark.measure(recipes, 2, "cpu", None)
    assert 0 < told.kernels <= told.profiled
    assert told.hand_over_ms > 0
    assert 0 < told.sampling + told.looking_back < told.seconds
