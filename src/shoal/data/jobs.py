"""A step as stages of tasks: what is to be done, apart from who does it.

`run_here` does it on this machine, cluster.py on others. The law: tasks of a stage know nothing of each
other, a stage begins when the one before has ended, and a task leaves what it found in files of the folder
OUT/work, whole or not at all, and does nothing where they are there. So a job that was cut short goes on
where it was, whoever runs it; one that is asked for with other settings or files begins afresh.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shoal.data.atomic import write_atomically
from shoal.data.read import Reading
from shoal.data.workers import Workers

PLAN, LOGS = "plan.json", "logs"

Progress = Callable[[Reading], None]


class Work(Protocol):
    """A module's own function, or a `partial` of one."""

    def __call__(self, task: int, *, workers: Workers, progress: Progress) -> None: ...


@dataclass(frozen=True)
class Stage:
    name: str
    tasks: int
    work: Work


@dataclass(frozen=True)
class Job:
    name: str
    out: Path  # absolute, as all paths are
    files: tuple[Path, ...]  # read by it, evaluation files among them
    settings: dict[str, Any]
    stages: tuple[Stage, ...]
    results: tuple[str, ...]  # globs of what it leaves in `out`, the last of all last

    @property
    def work(self) -> Path:
        return self.out / "work"

    def prepare(self) -> None:
        """Its folder: as it was left where this very job was cut short, else without old results."""
        plan = self.work / PLAN
        if inside := [file for file in self.files if file.parent == self.out]:
            raise ValueError(f"{inside[0]} is read and lies in --out {self.out}; give another folder")
        if self.work.is_dir() and any(self.work.iterdir()) and not plan.exists():
            raise ValueError(f"{self.work} was made by something else; give another --out")
        files = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in self.files]
        told = json.dumps({"job": self.name, "settings": self.settings, "files": files}, indent=1).encode()
        if plan.exists() and plan.read_bytes() == told and not (self.out / self.results[-1]).exists():
            return
        shutil.rmtree(self.work, ignore_errors=True)
        for result in self.results:
            for old in self.out.glob(result):
                old.unlink()
        with write_atomically(plan) as file:
            file.write(told)


def run_here(job: Job, *, workers: int, progress: Progress) -> None:
    job.prepare()
    with Workers(workers) as crew:
        for stage in job.stages:
            for task in range(stage.tasks):
                stage.work(task, workers=crew, progress=progress)


def tidy(work: Path) -> None:
    """For the last task: nothing is left of the work, but for the logs of a cluster."""
    if not (work / LOGS).exists():
        shutil.rmtree(work)
        return
    for left in work.iterdir():
        if left.is_dir() and left.name != LOGS:
            shutil.rmtree(left)
        elif left.name not in (PLAN, LOGS):
            left.unlink()


def quiet(reading: Reading) -> None:
    """No progress is shown."""
