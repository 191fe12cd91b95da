"""Laws of a job on a cluster: its files are those of this machine, byte for byte, a failed one goes on where
it was, and what an executor would not understand is refused first.

The executor is datatrove's for one machine; those for Slurm and Ray are given the same tasks (LOG.md says
where they were run).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from shoal.data import steps
from shoal.data.clean import CleanRules
from shoal.data.cluster import Cluster, submit
from shoal.data.jobs import Job, Progress, Stage
from shoal.data.report import StepReport
from shoal.data.workers import Workers
from tests.data.corpus import SMALL, Corpus, run_all, same_files

pytest.importorskip("datatrove", reason="datatrove is not installed: pip install 'shoal[cluster]'")


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_on_a_cluster_the_files_are_the_local_ones(
    workers: int, corpus: Corpus, cleaned: tuple[Path, list[StepReport]], tmp_path: Path
) -> None:
    def run(job: Job) -> None:
        assert submit(job, Cluster("local", {"workers": workers})) == ""

    here, reports = cleaned
    assert run_all(corpus, tmp_path, run) == reports
    assert same_files(tmp_path, here)


def _fall(task: int, *, workers: Workers, progress: Progress, light: Path) -> None:
    if task == 1 and not light.exists():
        raise OSError("it is dark")


def test_a_failed_task_is_told_and_the_same_job_goes_on(corpus: Corpus, tmp_path: Path) -> None:
    job = steps.clean(corpus.sources, tmp_path / "out", CleanRules(), part_bytes=SMALL)
    fall = Stage("fall", 2, partial(_fall, light=tmp_path / "light"))
    job = replace(job, stages=(job.stages[0], fall, *job.stages[1:]))
    here = Cluster("local", {"workers": 1})
    with pytest.raises(OSError, match="it is dark"):
        submit(job, here)
    first = job.out / "documents-00000.jsonl.zst"
    written = first.stat().st_mtime_ns
    (tmp_path / "light").touch()
    submit(job, here)
    assert first.stat().st_mtime_ns == written
    assert (job.out / "report.json").exists()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ("[slurm]\npartition = 'cpu'\n", "has no time"),
        ("[slurm]\npartition = 'cpu'\ntime = '1:00'\ncores = 3\n", "cores is no setting .* cpus_per_task"),
        ("[local]\ntasks = 3\n", "tasks is no setting"),
        ("[dask]\n", "not .dask."),
        ("workers = 3\n", "it takes one table"),
        ("[slurm\n", "is not TOML"),
    ],
)
def test_what_an_executor_would_not_take_is_refused(told: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text(told)
    with pytest.raises(ValueError, match=message):
        Cluster.load(file)
    with pytest.raises(ValueError, match="no such file"):
        Cluster.load(tmp_path / "none.toml")
