"""Generated problems for reasoning at laptop scale: adding numbers of many digits, and countdown.

Each has a prompt, an answer that can be checked, and a worked solution in <think> tags for supervised tuning.
The law: a problem is a function of a seed and an index, and the held-out side shares none with the other;
which side one is on is decided by a hash of what it asks.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

Problem = dict[str, Any]
HELD_OUT_SHARE = 0.1


def addition(rng: random.Random, digits: int) -> Problem:
    """a+b, worked out digit by digit from the right, with the carry."""
    a, b = (rng.randrange(10 ** (rng.randint(1, digits) - 1), 10 ** rng.randint(1, digits) + 1) for _ in "ab")
    a, b = a % 10**digits, b % 10**digits
    steps, carry = [], 0
    for x, y in itertools.zip_longest(str(a)[::-1], str(b)[::-1], fillvalue="0"):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total}")
        carry = total // 10
    return {"prompt": f"{a}+{b}=", "answer": a + b, "thought": ";".join(steps)}


def countdown(rng: random.Random, numbers: int) -> Problem:
    """Make a target from numbers, each used once, with + - *. The solution is the one it was made from."""
    values = [rng.randint(1, 9) for _ in range(numbers)]
    expression, total = str(values[0]), values[0]
    for value in values[1:]:
        sign = rng.choice("+-*")
        expression = (
            f"({expression}){sign}{value}"
            if sign == "*" and not expression.isdigit()
            else (f"{expression}{sign}{value}")
        )
        total = {"+": total + value, "-": total - value, "*": total * value}[sign]
    shown = sorted(values)
    return {
        "prompt": f"{','.join(map(str, shown))}>{total}:",
        "numbers": shown,
        "target": total,
        "answer": expression,
        "thought": f"{expression}={total}",
    }


TASKS: dict[str, Callable[[random.Random, int], Problem]] = {"addition": addition, "countdown": countdown}
REWARDS = {"addition": "number", "countdown": "countdown"}


def is_held_out(prompt: str) -> bool:
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < HELD_OUT_SHARE


def problems(task: str, size: int, seed: int, *, held_out: bool) -> Iterator[Problem]:
    """Different problems of one side, without end where there are enough of them."""
    make, rng, seen, misses = TASKS[task], random.Random(f"{task} {size} {seed} {held_out}"), set[str](), 0
    while misses < 10_000:
        problem = make(rng, size)
        if problem["prompt"] in seen or is_held_out(problem["prompt"]) != held_out:
            misses += problem["prompt"] in seen
            continue
        seen.add(problem["prompt"])
        yield problem


def worked(problem: Problem) -> str:
    """The answer to learn from."""
    return f"<think>{problem['thought']}</think><answer>{problem['answer']}</answer>"
