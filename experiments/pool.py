"""The runs of several studies, side by side.

One training serves every study that asks for it, and no study waits for another's last run. Each run has a
process of its own, so one that fails, its GPU context with it, fails alone; on one GPU too they go side by
side: a small model waits for its launches. The law: what is timed is looked at last, one model after the
other, with nothing beside it. What becomes of a result is for the caller, who gets it as its run ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

from experiments.claims import Claim
from experiments.study import Plan, Question, Result, identity, look_again, nothing_more, run_one


@dataclass(frozen=True)
class Study:
    name: str
    claim: Claim
    plan: Plan

    def ask(self, seed: int) -> Iterator[tuple[str, Question]]:
        """What it wants to know of one seed's runs, by their identity."""
        for variant in self.claim.variants:
            yield (
                identity(variant, seed, self.plan),
                Question(self.name, variant, self.claim.extra),
            )


@dataclass(frozen=True)
class Run:
    """A training, and everything that is asked of it."""

    seed: int
    plan: Plan
    questions: tuple[Question, ...]

    def __str__(self) -> str:
        first = self.questions[0]
        return f"{first.study}, {first.variant.name}, seed {self.seed}"


Take = Callable[[str, Result], None]


def plan_runs(studies: Sequence[Study], seeds: int) -> list[Run]:
    """The earlier studies' first, each training once. Plans of all studies name one folder for models."""
    runs: dict[str, Run] = {}
    for study in studies:
        for seed in range(seeds):
            for name, question in study.ask(seed):
                run = runs.setdefault(name, Run(seed, study.plan, ()))
                runs[name] = replace(run, questions=(*run.questions, question))
    return list(runs.values())


def run(studies: Sequence[Study], seeds: int, jobs: int, take: Take) -> list[str]:
    """All of them, `jobs` at a time; `take` gets each result, by its study, and those of a timed one again
    when it was looked at. What failed, and why."""
    runs, timed = plan_runs(studies, seeds), {study.name for study in studies if study.claim.timed}
    failures: list[str] = []
    first: dict[tuple[str, str, int], Result] = {}
    start = time.perf_counter()

    def ended(done: Future[Any], told: str) -> Any:
        if (error := done.exception()) is not None:
            failures.append(f"{told}: {type(error).__name__}: {error}")
        how = "failed" if error else "done"
        print(f"{told}: {how}, {time.perf_counter() - start:.0f} s", flush=True)
        return None if error else done.result()

    pool = ThreadPoolExecutor(jobs)
    try:
        waiting = {pool.submit(_apart, _untimed(each, timed), each.seed, each.plan): each for each in runs}
        for number, done in enumerate(as_completed(waiting), 1):
            each = waiting[done]
            results = ended(done, f"{number}/{len(runs)} {each}")
            for question, result in zip(each.questions, results or (), strict=results is not None):
                first[question.study, question.variant.name, each.seed] = result
                take(question.study, result)
    finally:
        pool.shutdown(cancel_futures=True)
    late = [
        (each, question)
        for each in runs
        for question in each.questions
        if (question.study, question.variant.name, each.seed) in first and question.study in timed
    ]
    if not late:
        return failures
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
        looks = [alone.submit(look_again, question, each.seed, each.plan) for each, question in late]
        for (each, question), done in zip(late, looks, strict=True):
            found = ended(done, f"{question.study}, {question.variant.name}, seed {each.seed}, alone")
            if found:
                result = first[question.study, question.variant.name, each.seed]
                take(question.study, replace(result, extra=found))
    return failures


def _untimed(run: Run, timed: set[str]) -> list[Question]:
    """Its questions, without what those of timed studies look at."""
    return [replace(each, extra=nothing_more) if each.study in timed else each for each in run.questions]


def _apart(questions: list[Question], seed: int, plan: Plan) -> list[Result]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as own:
        return own.submit(run_one, questions, seed, plan).result()
