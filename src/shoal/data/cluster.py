"""A job on a cluster: its tasks handed to datatrove's executors (the extra `cluster`; decision 0012).

A TOML file says which: a table [slurm], [ray] or [local] whose keys are those of datatrove's executor
(partition, time, workers, cpus_per_task, env_command ...). The machines of the cluster must see the files
read, the folder written and an environment with shoal under the same paths. The law: what is done is what
jobs.py says, so the result is the local one, byte for byte; datatrove knows of tasks and of which are done.
"""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from shoal.data.jobs import LOGS, Job, Work, quiet
from shoal.data.workers import Workers

EXECUTORS = {"local": "LocalPipelineExecutor", "slurm": "SlurmPipelineExecutor", "ray": "RayPipelineExecutor"}
OURS = {"self", "pipeline", "tasks", "depends", "depends_job_id", "logging_dir", "job_name", "skip_completed"}


@dataclass(frozen=True)
class Cluster:
    kind: str
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        if self.kind not in EXECUTORS:
            raise ValueError(f"a cluster is [{'], ['.join(EXECUTORS)}]; not [{self.kind}]")
        known = inspect.signature(self.executor).parameters
        if unknown := sorted(key for key in self.settings if key in OURS or key not in known):
            takes = ", ".join(sorted(set(known) - OURS))
            raise ValueError(f"[{self.kind}] {unknown[0]} is no setting of it; it takes {takes}")
        needed = [name for name, each in known.items() if each.default is each.empty and name not in OURS]
        if missing := [name for name in needed if name not in self.settings]:
            raise ValueError(f"[{self.kind}] has no {missing[0]}; it needs {', '.join(needed)}")

    @property
    def executor(self) -> Callable[..., Any]:
        try:
            module = import_module(f"datatrove.executor.{self.kind}")
        except ModuleNotFoundError as error:
            raise ValueError(f"--cluster needs datatrove ({error}): pip install 'shoal[cluster]'") from None
        return getattr(module, EXECUTORS[self.kind])

    @classmethod
    def load(cls, path: Path) -> Cluster:
        try:
            tables = tomllib.loads(path.read_text())
        except FileNotFoundError:
            raise ValueError(f"no such file: {path}; deploy/slurm.toml is one to begin with") from None
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not TOML: {error}") from None
        if len(tables) != 1 or not isinstance(settings := next(iter(tables.values())), dict):
            raise ValueError(f"{path} has {', '.join(tables) or 'nothing'}; it takes one table, as [slurm]")
        return cls(next(iter(tables)), settings)


def submit(job: Job, cluster: Cluster) -> str:
    """Under Slurm what was queued, in words; elsewhere the job is done when this returns, and that is ''."""
    if cluster.kind == "slurm" and " " in str(job.out):
        raise ValueError(f"{job.out} has a space, which Slurm's scripts do not take; give another --out")
    job.prepare()
    before: Any = None
    for stage in job.stages:
        settings = dict(cluster.settings)
        if cluster.kind == "slurm":
            settings |= {"job_name": f"{job.name} {stage.name}".replace(" ", "-"), "depends": before}
        # Under Slurm a task has its cores to itself; elsewhere it runs where processes may not start others.
        cores = settings.get("cpus_per_task", 1) if cluster.kind == "slurm" else 1
        before = cluster.executor(
            [_Task(stage.work, cores)],
            tasks=stage.tasks,
            logging_dir=str((job.work / LOGS / stage.name).resolve()),
            **settings,
        )
        if cluster.kind != "slurm":
            before.run()
            if left := before.get_incomplete_ranks():  # Ray's executor only warns of them
                raise ValueError(
                    f"{len(left)} of {stage.tasks} tasks of stage {stage.name} failed, first {left[0]}: see "
                    f"{job.work / LOGS / stage.name}; the same command goes on from here"
                )
    if cluster.kind != "slurm":
        return ""
    before.run()
    return f"{len(job.stages)} stages queued, the last as job {before.job_id}"


@dataclass(frozen=True)
class _Task:
    """In datatrove's words a step of a pipeline: a callable of data, rank and world size."""

    work: Work
    cores: int

    def __call__(self, data: object, rank: int, world_size: int) -> None:
        with Workers(self.cores) as crew:
            self.work(rank, workers=crew, progress=quiet)
