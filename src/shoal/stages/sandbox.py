"""Running code that a model wrote: in a process of its own, with limits, and killed whole.

`run` gives a program CPU, wall time, memory, file, process and output limits, an empty folder to live in and
no environment; no network, and no writing elsewhere, where the kernel allows (`Verdict.held` says what it
did allow). What enforces it is jail.py. The law: whatever the program does, `run` comes back within its
limits, raises nothing because of it, and leaves no process and no file behind.

It is meant for what a model in training writes by accident. It is no wall against someone who attacks the
kernel; for that, run the whole training in a virtual machine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

JAIL = Path(__file__).with_name("jail.py")
GRACE_SECONDS = 5.0  # for the supervisor to start, kill and report, beyond the program's own time

Outcome = Literal["ok", "failed", "timeout", "killed"]
Guard = Literal["network", "processes", "files"]


@dataclass(frozen=True)
class Limits:
    seconds: float = 4.0  # on the wall
    cpu_seconds: int = 4
    memory_bytes: int = 512 << 20  # of address space, each process
    file_bytes: int = 8 << 20  # the largest file
    open_files: int = 32
    processes: int = 8  # threads included
    output_bytes: int = 64 << 10  # what is kept of standard output and error, each

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0")


@dataclass(frozen=True)
class Verdict:
    outcome: Outcome  # "failed": it ended by itself, not with exit code 0; "killed": by a limit or a signal
    output: str
    errors: str
    seconds: float
    held: frozenset[Guard]  # what the kernel let us shut: else it was open


def run(source: str, *, stdin: str = "", limits: Limits | None = None) -> Verdict:
    """Run a Python program."""
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="shoal-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        program = folder / "program.py"
        program.write_text(source, encoding="utf-8", errors="replace")
        return _supervise(folder, [str(program)], stdin, limits)


def run_tests(source: str, tests: str, *, limits: Limits | None = None) -> Verdict:
    """Run a program, then assertions about what it defines. An early exit, even with code 0, is a failure.

    The tests end by printing a line that the program cannot know.
    """
    word = os.urandom(16).hex()
    verdict = run(f"{source}\n\n{tests}\n\nprint({word!r})\n", limits=limits)
    if verdict.outcome != "ok":
        return verdict
    passed = verdict.output.rstrip("\n").endswith(word)
    return Verdict(
        "ok" if passed else "failed", verdict.output, verdict.errors, verdict.seconds, verdict.held
    )


def _supervise(folder: Path, arguments: Sequence[str], stdin: str, limits: Limits) -> Verdict:
    told, report = os.pipe()
    settings = {**vars(limits), "arguments": arguments, "folder": str(folder), "report": report}
    jail = subprocess.Popen(
        [sys.executable, "-I", "-S", str(JAIL), json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
        pass_fds=(report,),
        start_new_session=True,
    )
    os.close(report)
    assert jail.stdin and jail.stdout and jail.stderr
    heads = [_Head(pipe, limits.output_bytes) for pipe in (jail.stdout, jail.stderr)]
    feeder = threading.Thread(target=_feed, args=(jail.stdin, stdin.encode("utf-8", "replace")), daemon=True)
    feeder.start()
    try:
        jail.wait(limits.seconds + GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        pass  # the supervisor itself hangs: the group goes below, and there is no report
    finally:
        if jail.returncode is None:
            os.killpg(jail.pid, signal.SIGKILL)
            jail.wait()
    for head in heads:
        head.join()
    feeder.join()
    with os.fdopen(told) as file:
        text = file.read()
    result = json.loads(text) if text else {"status": "signal 9", "seconds": limits.seconds, "held": []}
    return Verdict(
        _outcome(result["status"]),
        heads[0].text(),
        heads[1].text(),
        result["seconds"],
        frozenset(result["held"]),
    )


def _outcome(status: str) -> Outcome:
    if status == "timeout":
        return "timeout"
    if status == "processes":
        return "killed"
    if status.startswith("signal"):
        return "timeout" if status == f"signal {int(signal.SIGXCPU)}" else "killed"
    return "ok" if status == "exit 0" else "failed"


def _feed(pipe: IO[bytes], data: bytes) -> None:
    try:
        pipe.write(data)
        pipe.close()
    except BrokenPipeError:  # it ended without reading, as it may
        pass


class _Head(threading.Thread):
    """Reads a pipe to its end, so that the writer never waits, and keeps its first bytes."""

    def __init__(self, pipe: IO[bytes], most: int) -> None:
        super().__init__(daemon=True)
        self._pipe, self._most, self._kept = pipe, most, bytearray()
        self.start()

    def run(self) -> None:
        while data := self._pipe.read1(1 << 16):  # type: ignore[attr-defined]
            self._kept += data[: self._most - len(self._kept)]
        self._pipe.close()

    def text(self) -> str:
        return self._kept.decode("utf-8", "replace")
