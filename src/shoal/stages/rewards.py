"""Rewards: plain functions of what a model answered and of the problem it was given.

`f(text, problem) -> float`; `text` is the answer, special tokens left out, and `problem` a mapping that came
with the prompt: its "answer", "tests", "language", "numbers". A function may raise, hang or fork; judge.py,
which calls it in another process, is what copes. The law: nothing here loads torch, keeps state, or looks at
anything but its two arguments, so a reward can be told again from the record of a run.

Where an answer is looked for: inside <answer> tags if there are any, else after the reasoning.
"""

from __future__ import annotations

import ast
import operator
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

Problem = Mapping[str, Any]
Reward = Callable[[str, Problem], float]

THINK_END = "</think>"
_FORMAT = re.compile(r"\s*<think>(?P<thought>.+?)</think>\s*<answer>(?P<answer>.+?)</answer>\s*", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer)>")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_HAN = re.compile(r"[\u4e00-\u9fff]")
_WORD = re.compile(r"[^\W\d_]+")
_CODE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


def find_answer(text: str) -> str:
    """What the text says in the end: its last <answer>, else what follows its reasoning."""
    tagged = _ANSWER.findall(text)
    return (tagged[-1] if tagged else text.rpartition(THINK_END)[2]).strip()


def number(text: str, problem: Problem) -> float:
    """1 where the last number of the answer is the problem's "answer", exactly."""
    found = _NUMBER.findall(find_answer(text))
    return float(bool(found) and _exact(found[-1]) == _exact(str(problem["answer"])))


def spelled(text: str, problem: Problem) -> float:
    """1 where the answer's digits, spaces between them left out, are the problem's "answer"."""
    return float(find_answer(text).replace(" ", "") == str(problem["answer"]))


def named(text: str, problem: Problem) -> float:
    """1 where the answer has the problem's "name" in it."""
    return float(str(problem["name"]) in find_answer(text))


def math(text: str, problem: Problem) -> float:
    """1 where the answer equals the problem's "answer" as mathematics (math-verify; the extra `rl`).

    Its own time limits are signals, which a process with threads cannot use; they are off, and judge.py ends
    what takes too long.
    """
    from math_verify import parse, verify

    gold = parse(f"${problem['answer']}$", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    said = parse(find_answer(text), parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return float(verify(gold, said, timeout_seconds=None))


def countdown(text: str, problem: Problem) -> float:
    """1 where the answer is an expression over "numbers", each used at most once, that makes "target".

    With + - * / and brackets; what stands before or after an equals sign is tried.
    """
    available = Counter(int(n) for n in problem["numbers"])
    for side in find_answer(text).split("="):
        used: list[int] = []
        try:
            value = _evaluate(ast.parse(side.strip(), mode="eval").body, used)
        except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
            continue
        if len(used) > 1 and not Counter(used) - available and value == int(problem["target"]):
            return 1.0
    return 0.0


def code(text: str, problem: Problem) -> float:
    """1 where the last block of Python in the answer passes the problem's "tests", run in the sandbox."""
    from shoal.stages import sandbox

    blocks = _CODE.findall(text.rpartition(THINK_END)[2])
    if not blocks:
        return 0.0
    return float(sandbox.run_tests(blocks[-1], str(problem["tests"])).outcome == "ok")


def layout(text: str, problem: Problem) -> float:
    """R1's format reward: 1 for <think>...</think> then <answer>...</answer>, and nothing around them.

    A prompt that ends inside the reasoning has written the first tag already.
    """
    whole = _FORMAT.fullmatch(text if text.lstrip().startswith("<think>") else "<think>" + text)
    return float(
        whole is not None and not re.search(r"</?(think|answer)>", whole["thought"] + whole["answer"])
    )


def language(text: str, problem: Problem) -> float:
    """R1's language consistency: the share of the reasoning's words in the problem's "language", zh or en.

    A Han character is a word of Chinese; a run of Latin letters one of English. 1 where there are no words.
    """
    wanted = problem["language"]
    if wanted not in ("zh", "en"):
        raise ValueError(f"language is {wanted!r}; the words of zh and en can be told apart")
    thought = text.rpartition(THINK_END)[0] or text
    han = len(_HAN.findall(thought))
    latin = sum(
        all(unicodedata.name(c, "").startswith("LATIN") for c in word)
        for word in _WORD.findall(_HAN.sub(" ", thought))
    )
    return 1.0 if han + latin == 0 else (han if wanted == "zh" else latin) / (han + latin)


def brevity(text: str, problem: Problem) -> float:
    """1 for an empty text, falling to 0 at the problem's "max_characters"."""
    return max(0.0, 1 - len(text) / int(problem["max_characters"]))


def _exact(text: str) -> Fraction:
    return Fraction(text.replace(",", ""))


_OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _evaluate(node: ast.expr, used: list[int]) -> Fraction:
    """The exact value of + - * / over whole numbers, which are noted in `used`."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and (apply := _OPERATORS.get(type(node.op))):
        return apply(_evaluate(node.left, used), _evaluate(node.right, used))
    raise ValueError("neither a whole number nor one of + - * /")
