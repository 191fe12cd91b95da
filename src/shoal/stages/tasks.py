"""Generated problems for reasoning at laptop scale: adding numbers of many digits, and countdown.

Each is asked in a message, has an answer that can be checked, and a worked solution with its thinking for
supervised tuning. The law: problems are a function of a seed, and no problem is on both sides: a hash of what
it asks decides whether it is held out.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

Problem = dict[str, Any]
HELD_OUT_SHARE = 0.1
MISSES = 10_000  # problems seen before, until a task has no more


def addition(rng: random.Random, digits: int) -> Problem:
    """a+b, worked out digit by digit from the right, with the carry."""
    a, b = (rng.randrange(10 ** rng.randint(1, digits)) for _ in "ab")
    steps, carry = [], 0
    for x, y in itertools.zip_longest(str(a)[::-1], str(b)[::-1], fillvalue="0"):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total}")
        carry = total // 10
    return _problem(f"{a}+{b}", str(a + b), ";".join(steps), answer=a + b)


def countdown(rng: random.Random, numbers: int) -> Problem:
    """Make a target of numbers, each used once, with + - *; solved as it was made."""
    values = [rng.randint(1, 9) for _ in range(numbers)]
    expression, total = str(values[0]), values[0]
    for value in values[1:]:
        sign = rng.choice("+-*")
        left = f"({expression})" if sign == "*" and not expression.isdigit() else expression
        expression = f"{left}{sign}{value}"
        total = {"+": total + value, "-": total - value, "*": total * value}[sign]
    shown = sorted(values)
    asked = f"{','.join(map(str, shown))} make {total}"
    return _problem(asked, expression, f"{expression}={total}", numbers=shown, target=total)


TASKS: dict[str, Callable[[random.Random, int], Problem]] = {"addition": addition, "countdown": countdown}
REWARDS = {"addition": "number", "countdown": "countdown"}


def _problem(asked: str, said: str, thought: str, **checked: Any) -> Problem:
    solution = f"<think>{thought}</think>{said}"
    return {"messages": [{"role": "user", "content": asked}], "solution": solution, **checked}


def problems(task: str, size: int, seed: int, *, held_out: bool) -> Iterator[Problem]:
    """Different problems of one side, until there are no more."""
    make, rng = TASKS[task], random.Random(f"{task} {size} {seed} {held_out}")
    seen: set[str] = set()
    misses = 0
    while misses < MISSES:
        problem = make(rng, size)
        asked = problem["messages"][0]["content"]
        if asked in seen:
            misses += 1
        elif is_held_out(asked) == held_out:
            seen.add(asked)
            yield problem


def is_held_out(asked: str) -> bool:
    digest = hashlib.sha256(asked.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < HELD_OUT_SHARE


def demonstration(problem: Problem) -> Problem:
    """The conversation to learn from."""
    return {"messages": [*problem["messages"], {"role": "assistant", "content": problem["solution"]}]}
