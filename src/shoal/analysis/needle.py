"""Needle in a haystack: is a fact found again, wherever it stood in a context of any length?

A prompt is a long text with one fact put into it at a depth, and the question last. The law: prompt and
answer together have exactly as many tokens as the length says, and an answer is right if its tokens, taken
greedily, are the needle's, all of them. Who answers is the caller's: an engine, or a hand-made one in a test.

Left to others: text and its tokens (stages/extend.py), the picture (plots.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Ids = Sequence[int]


@dataclass(frozen=True)
class Needle:
    """A fact, what is asked at the end, and what follows there; token ids."""

    fact: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Trial:
    length: int  # tokens of prompt and answer
    depth: float  # 0: the fact is first; 1: it stands just before the question
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


# What follows each prompt, greedily: as many tokens as its answer has.
Answering = Callable[[Sequence[Trial]], Sequence[Ids]]


def make_trials(
    needles: Sequence[Needle],
    haystack: Ids,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    bos: int | None = None,
) -> list[Trial]:
    """Every needle at every length and depth, each in a stretch of the haystack of its own.

    ValueError where a needle does not fit a length, or the haystack is shorter than a stretch.
    """
    trials: list[Trial] = []
    for length in lengths:
        for depth in depths:
            for needle in needles:
                trials.append(_plant(needle, haystack, length, depth, len(trials), bos))
    return trials


def _plant(needle: Needle, haystack: Ids, length: int, depth: float, number: int, bos: int | None) -> Trial:
    first = () if bos is None else (bos,)
    taken = len(first) + len(needle.fact) + len(needle.question) + len(needle.answer)
    room = length - taken
    if room < 0:
        raise ValueError(f"a needle takes {taken} tokens, more than the length {length}; ask from {taken} on")
    if room > len(haystack):
        raise ValueError(
            f"a length of {length} needs a haystack of {room} tokens, but there are {len(haystack)}; "
            f"hold out more text or test shorter lengths"
        )
    start = number * room % (len(haystack) - room + 1)
    hay, cut = tuple(haystack[start : start + room]), round(depth * room)
    prompt = (*first, *hay[:cut], *needle.fact, *hay[cut:], *needle.question)
    return Trial(length, depth, prompt, needle.answer)


def find_needles(trials: Sequence[Trial], answering: Answering) -> list[list[float]]:
    """The share found: a row a length, a column a depth, in the order of the trials."""
    told = answering(trials)
    if len(told) != len(trials):
        raise ValueError(f"{len(trials)} needles were asked for, and {len(told)} answers came")
    cells: dict[int, dict[float, list[bool]]] = {}
    for trial, ids in zip(trials, told, strict=True):
        right = tuple(ids[: len(trial.answer)]) == trial.answer
        cells.setdefault(trial.length, {}).setdefault(trial.depth, []).append(right)
    return [[sum(cell) / len(cell) for cell in row.values()] for row in cells.values()]
