"""Laws of the needle test: prompts are as long as they say, a scorer that copies finds all, one that cannot
does not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from shoal.analysis.needle import Needle, Trial, find_needles, make_trials

# Key 50 has the value 60, key 51 the value 61 62; 1 marks a fact, 2 a question.
NEEDLES = [Needle((1, 50, 60), (2, 50), (60,)), Needle((1, 51, 61, 62), (2, 51), (61, 62))]
HAYSTACK = [3 + n % 40 for n in range(200)]
LENGTHS, DEPTHS = [16, 31, 64], [0.0, 0.5, 1.0]
TRIALS = make_trials(NEEDLES, HAYSTACK, LENGTHS, DEPTHS, bos=0)


def copy(trial: Trial, sees: int) -> tuple[int, ...]:
    """What stood after the key that is asked for, if it is among the last `sees` tokens."""
    seen, key = trial.prompt[-sees:], trial.prompt[-1]
    facts = [n for n in range(len(seen) - 2) if seen[n : n + 2] == (1, key)]
    return seen[facts[0] + 2 : facts[0] + 2 + len(trial.answer)] if facts else ()


def test_a_needle_is_planted_once_at_its_depth_and_the_length_is_exact() -> None:
    assert [(trial.length, trial.depth) for trial in TRIALS] == [
        (length, depth) for length in LENGTHS for depth in DEPTHS for _ in NEEDLES
    ]
    for trial, needle in zip(TRIALS, NEEDLES * 9, strict=True):
        assert len(trial.prompt) + len(trial.answer) == trial.length
        assert trial.prompt[0] == 0
        assert trial.prompt[-2:] == needle.question
        places = [
            n for n in range(len(trial.prompt)) if trial.prompt[n : n + len(needle.fact)] == needle.fact
        ]
        room = trial.length - 1 - len(needle.fact) - len(needle.question) - len(needle.answer)
        assert places == [1 + round(trial.depth * room)]


def test_a_scorer_that_copies_finds_all_and_one_that_sees_less_only_what_is_near() -> None:
    def whole(trials: Sequence[Trial]) -> list[tuple[int, ...]]:
        return [copy(trial, trial.length) for trial in trials]

    def near(trials: Sequence[Trial]) -> list[tuple[int, ...]]:
        return [copy(trial, 15) for trial in trials]

    def half(trials: Sequence[Trial]) -> list[tuple[int, ...]]:
        return [(*answer[:1], 99) for answer in whole(trials)]  # of two tokens only the first is right

    assert find_needles(TRIALS, whole) == [[1.0] * 3] * 3
    assert find_needles(TRIALS, near) == [[1.0] * 3, [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    assert find_needles(TRIALS, half) == [[0.5] * 3] * 3
    with pytest.raises(ValueError, match="18 needles were asked for, and 1 answers came"):
        find_needles(TRIALS, lambda trials: [(1,)])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="a needle takes 7 tokens, more than the length 6; ask from 7 on"):
        make_trials(NEEDLES[:1], HAYSTACK, [6], DEPTHS, bos=0)
    with pytest.raises(ValueError, match="needs a haystack of 294 tokens, but there are 200"):
        make_trials(NEEDLES[:1], HAYSTACK, [300], DEPTHS)
