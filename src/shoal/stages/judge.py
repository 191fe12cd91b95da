"""Calling rewards where they can do no harm: in another process, with a time limit that ends threads too.

A reward is named "module:function" and called in a worker that lives as long as it behaves. The law: whatever
a reward does, each answer gets a score, in order; one that could not be judged counts 0 for that reward, and
the fault is counted by kind and told once. A reward that hangs loses its worker, killed as a process group; a
new one is started for the next answer.

Several workers judge side by side, every n-th answer each. A worker is this file run as a program: it loads
rewards.py and what the named modules import, not torch.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from shoal.stages.jail import children

Fault = Literal["raised", "hung", "not a number", "left processes", "died"]
READY = "ready"  # the worker's first word
START_SECONDS = 60.0  # for its imports
AHEAD_BYTES = 1 << 15  # of questions that wait for the worker: half of what a pipe holds


@dataclass(frozen=True)
class Score:
    """`total` is the weighted sum of `parts`; a part that failed is 0 and has its fault."""

    total: float
    parts: Mapping[str, float]
    faults: Mapping[str, Fault]


@dataclass
class Judge:
    """Scores answers by `rewards`, {"module:function": weight}; a name without a module is of rewards.py.

    A problem that lists "rewards" of its own is judged by those of the list alone. Use it as a context: what
    it started ends with it.
    """

    rewards: Mapping[str, float]
    seconds: float = 10.0  # for one reward of one answer
    faults: Counter[Fault] = field(default_factory=Counter)
    examples: dict[Fault, str] = field(default_factory=dict)  # the first message of each kind
    workers: int = field(default_factory=lambda: min(8, max(1, (os.cpu_count() or 1) // 2)))
    _crew: dict[int, _Worker] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}; it must be at least 1")
        if not self.rewards:
            raise ValueError("no rewards are named; an answer needs one at least to be told good from bad")
        if self.seconds <= 0:
            raise ValueError(f"seconds is {self.seconds}; it must be above 0")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._crew:
            self._crew.popitem()[1].kill()

    def score(self, answers: Sequence[str], problems: Sequence[Mapping[str, Any]]) -> list[Score]:
        """One score an answer, in order."""
        asked = [
            (at, {"reward": name, "text": text, "problem": problem})
            for at, (text, problem) in enumerate(zip(answers, problems, strict=True))
            for name in chosen(problem, self.rewards)
        ]
        parts: list[dict[str, float]] = [{} for _ in answers]
        faults: list[dict[str, Fault]] = [{} for _ in answers]
        replies = self._ask([question for _, question in asked])
        for (at, question), (value, fault, message) in zip(asked, replies, strict=True):
            name = question["reward"]
            if fault is not None:
                faults[at][name] = fault
                self.faults[fault] += 1
                self.examples.setdefault(fault, f"{name}: {message}")
            parts[at][name] = value
        totals = [sum(self.rewards[name] * value for name, value in own.items()) for own in parts]
        return [Score(*each) for each in zip(totals, parts, faults, strict=True)]

    def _ask(self, questions: Sequence[Mapping[str, Any]]) -> Iterator[tuple[float, Fault | None, str]]:
        """The replies, in order. The next questions are sent while a worker thinks about one."""
        count = min(self.workers, len(questions))
        ahead = list(range(count))  # the next question to send to each
        self._start(own for own in range(count) if own not in self._crew)
        for at in range(len(questions)):
            own = at % count
            if own not in self._crew:
                self._start([own])
                ahead[own] = at
            worker = self._crew[own]
            if not worker.waits:
                ahead[own] += count * worker.send(islice(questions, ahead[own], None, count))
            reply = worker.reply(self.seconds)
            if isinstance(reply, str):  # it hung or died
                self._crew.pop(own).kill()
                fault: Fault = "hung" if reply == "hung" else "died"
                told = f"no answer in {self.seconds:g} s" if fault == "hung" else "its process ended"
                yield 0.0, fault, told
            else:
                yield reply["value"], reply.get("fault"), reply.get("message", "")

    def _start(self, places: Iterable[int]) -> None:
        """A worker at each of these, all at work on their imports at once."""
        new = {own: _Worker(list(self.rewards)) for own in places}
        try:
            for worker in new.values():
                worker.meet()
        except ValueError:
            for worker in new.values():
                worker.kill()
            raise
        self._crew |= new


def chosen(problem: Mapping[str, Any], rewards: Iterable[str]) -> list[str]:
    """Which of the rewards a problem is judged by."""
    own = problem.get("rewards")
    return [name for name in rewards if own is None or name in own]


class _Worker:
    """The other process, seen from here: lines of JSON to it, a line back for each."""

    def __init__(self, rewards: list[str]) -> None:
        self._rewards = rewards
        source = str(Path(__file__).parents[2])  # `-P` and this: found as we were, whatever the folder
        paths = [source, *(path for path in sys.path if path and path != source)]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "shoal.stages.judge", json.dumps(rewards)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )
        assert self._process.stdin and self._process.stdout
        self._to: IO[bytes] = self._process.stdin
        self._from = self._process.stdout.fileno()
        self._rest, self._lines = b"", deque[bytes]()  # of its output
        self.waits = 0  # questions that have no reply yet

    def meet(self) -> None:
        """Wait until it is ready; ValueError where it cannot be."""
        first = self._read(START_SECONDS)
        if first != READY:
            told = first["error"] if isinstance(first, dict) else f"its process {first}"
            raise ValueError(f"the rewards {', '.join(self._rewards)} cannot be used: {told}")

    def send(self, questions: Iterable[Mapping[str, Any]]) -> int:
        """How many were sent, at least one: no more at a time than the pipe holds, or a worker that hangs
        would stop us too."""
        lines, size = [], 0
        for question in questions:
            line = json.dumps(question).encode() + b"\n"
            if lines and size + len(line) > AHEAD_BYTES:
                break
            lines.append(line)
            size += len(line)
        with contextlib.suppress(BrokenPipeError):  # it has died: the reply will say so
            self._to.write(b"".join(lines))
            self._to.flush()
        self.waits += len(lines)
        return len(lines)

    def reply(self, seconds: float) -> Any:
        """To the first question without one; or "hung", or "died"."""
        self.waits -= 1
        return self._read(seconds)

    def _read(self, seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while not self._lines:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._from], [], [], left)[0]:
                return "hung"
            data = os.read(self._from, 1 << 16)
            if not data:
                return "died"
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._lines.extend(lines)
        return json.loads(self._lines.popleft())

    def kill(self) -> None:
        """The whole group: the worker and what a reward started in it."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()


# The worker itself.


def serve() -> None:
    """Answer questions until there are no more. Standard output is the answers' alone."""
    questions, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a reward prints is not an answer
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)  # and the next question is nothing for it to read

    def tell(reply: Any) -> None:
        answers.write(json.dumps(reply) + "\n")
        answers.flush()

    try:
        rewards = {name: _find(name) for name in json.loads(sys.argv[1])}
    except (ImportError, AttributeError, ValueError) as error:
        tell({"error": str(error)})
        return
    tell(READY)
    us = os.getpid()
    for line in questions:
        question = json.loads(line)
        reply = _judge(rewards[question["reward"]], question["text"], question["problem"])
        if os.getpid() != us:  # a reward forked, and this is the fork: there is one answer, and it is not its
            os._exit(0)
        if left := children(us):
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            reply = {"value": 0.0, "fault": "left processes", "message": f"{len(left)} were running"}
        tell(reply)


def _judge(reward: Any, text: str, problem: Mapping[str, Any]) -> dict[str, Any]:
    try:
        value = float(reward(text, problem))
    except Exception as error:  # noqa: BLE001  (the user's code: whatever it raises is told and counted)
        return {"value": 0.0, "fault": "raised", "message": f"{type(error).__name__}: {error}"}
    if not math.isfinite(value):
        return {"value": 0.0, "fault": "not a number", "message": f"it returned {value}"}
    return {"value": value}


def _find(name: str) -> Any:
    module, colon, function = name.partition(":")
    if not colon:
        module, function = "shoal.stages.rewards", name
    return getattr(importlib.import_module(module), function)


if __name__ == "__main__":
    serve()
