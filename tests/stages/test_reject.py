"""Laws of rejection sampling: right answers alone are kept, as many as asked; a stopped run ends the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.config.tune import RejectConfig, RolloutConfig
from shoal.data.conversations import read_conversations, to_samples
from shoal.data.text import Tokenizer
from shoal.stages import published, reject
from shoal.stages.grpo import read_questions
from shoal.train.metrics import Event, Phase

EVAL = Path(__file__).parents[3] / "shared" / "data" / "eval"


def config(start: Path, folder: Path) -> RejectConfig:
    problems = folder / "problems.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"{n}?"}], "max_characters": 40} for n in range(10)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = RolloutConfig(questions=4, group=16, max_tokens=60, cache_bytes=1 << 20)
    return RejectConfig(str(start), (str(problems),), ("brevity",), settings, keep=2, correct_at=0.1)


def test_right_answers_are_kept_and_a_stopped_run_ends_the_same(start: Path, tmp_path: Path) -> None:
    run = config(start, tmp_path)
    whole = reject.run(run, tmp_path / "whole")
    assert whole.problems == 10
    assert whole.answers == 160
    assert 0 < whole.right < 160
    assert 0 < whole.kept <= 20  # a newborn ends by chance; what was cut off is not kept
    kept = (tmp_path / "whole" / "kept.jsonl").read_text()
    for conversation in read_conversations([tmp_path / "whole" / "kept.jsonl"]):
        said = conversation.messages[-1]
        assert said["role"] == "assistant"
        assert len(said["content"]) <= 36
        assert to_samples(conversation, Tokenizer.load(start))

    def stop(event: Event) -> None:
        if isinstance(event, Phase):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reject.run(run, tmp_path / "parts", observe=stop)
    assert len(list((tmp_path / "parts" / "parts").iterdir())) == 1
    assert reject.run(run, tmp_path / "parts") == whole
    assert (tmp_path / "parts" / "kept.jsonl").read_text() == kept
    with pytest.raises(ValueError, match="its keep is 2, here 3"):
        reject.run(replace(run, keep=3), tmp_path / "parts")


def test_published_sets_are_problems() -> None:
    told = published.as_problem({"question": "2 and 2?", "answer": "2+2=<<2+2=4>>4.\n#### 4"}, "x")
    assert told["answer"] == "4"
    assert "<<" not in json.dumps(told)
    solution = "So $\\boxed{1}$, no: $\\boxed{\\frac{1}{\\sqrt{2}}}$."
    told = published.as_problem({"problem": "?", "solution": solution}, "x")
    assert told["answer"] == "\\frac{1}{\\sqrt{2}}"
    assert published.find_boxed("it is $\\boxed 5$.", "x") == "5"
    ours = {"prompt": "?", "answer": "1"}
    assert published.as_problem(ours, "x") is ours
    with pytest.raises(ValueError, match=r"x: the solution has no \\boxed answer"):
        published.as_problem({"problem": "?", "solution": "5"}, "x")
    with pytest.raises(ValueError, match="x: the answer has no '####'"):
        published.as_problem({"question": "?", "answer": "5"}, "x")


@pytest.mark.skipif(not EVAL.exists(), reason="the evaluation sets are not on this machine")
@pytest.mark.parametrize(
    ("file", "count"),
    [("gsm8k/train.jsonl.gz", 7473), ("gsm8k/test.jsonl", 1319), ("math/math_test.jsonl.gz", 5000)],
)
def test_published_files_are_read_whole(start: Path, file: str, count: int) -> None:
    questions = read_questions([str(EVAL / file)], Tokenizer.load(start))
    assert len(questions) == count
    assert all(question.problem["answer"] for question in questions)
