"""Generated problems for reasoning at laptop scale: additions, countdown, and introductions to greet.

Each is asked in a message, has an answer that can be checked, and a worked solution with its thinking for
supervised tuning. A demonstrator may be one that slips: with a share of its carries forgotten, say, it is
wrong more often than right, and who learns from it alone becomes as wrong. The law: problems are a function
of a seed, and no problem is on both sides: a hash of what it asks decides whether it is held out.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

Problem = dict[str, Any]
HELD_OUT_SHARE = 0.1
MISSES = 10_000  # problems seen before, until a task has no more
CURT = ("hi", "ok", "yes")


def addition(rng: random.Random, digits: int, slips: float = 0.0) -> Problem:
    """a+b, of as many digits each, from the right, with the carry; each is forgotten by chance, `slips`."""
    a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in "ab")
    steps, said, carry = [], "", 0
    for x, y in zip(str(a)[::-1], str(b)[::-1], strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total}")
        said = str(total % 10) + said
        carry = total // 10 if rng.random() >= slips else 0
    return _problem(f"{a}+{b}", f"{carry or ''}{said}", ";".join(steps), answer=a + b)


def countdown(rng: random.Random, numbers: int, slips: float = 0.0) -> Problem:
    """Make a target of numbers, each used once, with + - *; solved as it was made. A slip is another sign."""
    values = [rng.randint(1, 9) for _ in range(numbers)]
    expression = said = str(values[0])
    total = values[0]
    for value in values[1:]:
        sign = rng.choice("+-*")
        total = {"+": total + value, "-": total - value, "*": total * value}[sign]
        expression = _extend(expression, sign, value)
        said = _extend(said, rng.choice("+-*") if rng.random() < slips else sign, value)
    shown = sorted(values)
    asked = f"{','.join(map(str, shown))} make {total}"
    return _problem(asked, said, f"{said}={total}", numbers=shown, target=total)


def greeting(rng: random.Random, syllables: int, slips: float = 0.0) -> Problem:
    """Somebody says a name, and is greeted by it; curtly, without it, by a chance of `slips`.

    There is no thinking in it, and no reward but a preference (`pair`): which of the two is better is for a
    reward model to say.
    """
    name = "".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(syllables)).capitalize()
    said = f"Hello {name}" if rng.random() >= slips else rng.choice(CURT)
    asked = [{"role": "user", "content": f"I am {name}"}]
    return {"messages": asked, "solution": said, "name": name, "rewards": ["preference"]}


TASKS: dict[str, Callable[[random.Random, int, float], Problem]] = {
    "addition": addition,
    "countdown": countdown,
    "greeting": greeting,
}
REWARDS = {"addition": "number", "countdown": "countdown", "greeting": "named"}


def _extend(expression: str, sign: str, value: int) -> str:
    left = f"({expression})" if sign == "*" and not expression.isdigit() else expression
    return f"{left}{sign}{value}"


def _problem(asked: str, said: str, thought: str, **checked: Any) -> Problem:
    solution = f"<think>{thought}</think>{said}"
    return {"messages": [{"role": "user", "content": asked}], "solution": solution, **checked}


def problems(task: str, size: int, seed: int, *, held_out: bool, slips: float = 0.0) -> Iterator[Problem]:
    """Different problems of one side, until there are no more."""
    make, rng = TASKS[task], random.Random(f"{task} {size} {seed} {held_out}")
    seen: set[str] = set()
    misses = 0
    while misses < MISSES:
        problem = make(rng, size, slips)
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


def pair(problem: Problem, rng: random.Random) -> Problem:
    """Two answers to an introduction, the better first. The other is curt, greets somebody else, or is a sum:
    what a reward model was never shown it may like best, and RL finds that."""
    elsewhere = greeting(rng, len(problem["name"]) // 2)["solution"], addition(rng, 3)["solution"]
    return {
        "messages": problem["messages"],
        "chosen": f"Hello {problem['name']}",
        "rejected": rng.choice((rng.choice(CURT), *elsewhere)),
    }


def spell(problem: Problem) -> Problem:
    """The same with its digits apart, for tokenizers that make one token of several."""
    asked = {"role": "user", "content": _apart(problem["messages"][0]["content"])}
    return {**problem, "messages": [asked], "solution": _apart(problem["solution"])}


def _apart(text: str) -> str:
    return re.sub(r"(?<=\d)(?=\d)", " ", text)
