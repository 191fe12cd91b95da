"""Published sets of problems as problems of ours: a message to answer, and the answer to compare with.

GSM8K (arXiv 2110.14168) has "question" and "answer", which ends in "#### 72"; MATH (arXiv 2103.03874) has
"problem" and "solution", whose last \\boxed{} is the answer. The law: nothing of a solution but its answer
goes along, and a record of ours is passed on as it is.
"""

from __future__ import annotations

from typing import Any

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def as_problem(record: Any, where: str) -> Any:
    """ValueError where a record of a known layout has no answer."""
    if not isinstance(record, dict) or "messages" in record or "prompt" in record:
        return record
    told: dict[str, Any] = record  # type: ignore[reportUnknownVariableType]
    if {"question", "answer"} <= told.keys():
        _, mark, answer = str(told["answer"]).rpartition("####")
        if not mark:
            raise ValueError(f"{where}: the answer has no '####' before its number, as GSM8K's have")
        return _asked(told["question"], answer.strip())
    if {"problem", "solution"} <= told.keys():
        return _asked(told["problem"] + BOXED, find_boxed(str(told["solution"]), where))
    return told


def find_boxed(solution: str, where: str) -> str:
    """What the last \\boxed{} holds, braces within it matched; \\boxed 5, without any, is known too."""
    _, mark, rest = solution.rpartition("\\boxed")
    if not mark:
        raise ValueError(f"{where}: the solution has no \\boxed answer, as MATH's have")
    rest = rest.lstrip()
    if not rest.startswith("{"):
        return rest.split("$")[0].split()[0].rstrip(".")
    depth = 0
    for at, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[1:at]
    raise ValueError(f"{where}: the last \\boxed{{ of the solution is never closed")


def _asked(text: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "answer": answer}
