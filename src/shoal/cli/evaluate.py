"""`shoal eval`: what a checkpoint scores on published evaluation sets, by lm-eval, offline.

The law: the numbers go to standard output, progress to standard error. Nothing is fetched: the files are in
a folder, and a file that is not there is named with where it is published.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.device import Checkpoint, Device, Download, find_device

if TYPE_CHECKING:
    from shoal.stages.evaluate import Score


def evaluate(
    path: Checkpoint,
    tasks: Annotated[str, typer.Option(help="Names, with commas: gsm8k,mmlu_stem,humaneval.")],
    data: Annotated[Path, typer.Option(help="The folder of the files.")] = Path("evaluation"),
    limit: Annotated[int | None, typer.Option(help="Questions of each task, the first ones.")] = None,
    chat: Annotated[bool, typer.Option(help="Ask in turns, by the checkpoint's chat template.")] = False,
    samples: Annotated[
        Path | None, typer.Option(help="Write what was asked and answered, as JSON lines.")
    ] = None,
    device: Device = "auto",
    download: Download = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON (docs/json.md).")] = False,
) -> None:
    """Score a checkpoint on evaluation sets with lm-eval (shoal[eval]): maths, knowledge, code."""
    try:
        from shoal.stages.evaluate import EngineLM, run
        from shoal.stages.exam import find_exams, prepare
    except ModuleNotFoundError as error:
        raise ValueError(f"lm-eval cannot be imported ({error}); install shoal[eval]") from None
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from shoal.checkpoint import hf
    from shoal.cli.view import console, say
    from shoal.data.atomic import write_atomically
    from shoal.data.text import Tokenizer
    from shoal.engine import EngineSettings
    from shoal.stages.llm import open_engine

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is as it should be
    names = tasks.split(",")
    if any(exam.kind == "code" for exam in find_exams(names).values()):
        say("answers in code run in the sandbox: no network, limits on time and memory, where the kernel can")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit is {limit}; ask 1 question of each task or more")
    exams = prepare(names, data, chat=chat)
    folder = hf.find_folder(path, download=download)
    tokenizer = Tokenizer.load(folder)
    engine = open_engine(folder, EngineSettings(), device=find_device(device))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:

        def progress(what: str, done: int, total: int) -> None:
            if done == 0:
                bars.add_task(what, total=total)
            bars.update(bars.task_ids[-1], completed=done)

        model = EngineLM(engine, tokenizer, chat=chat, progress=progress)
        scores, asked = run(model, exams, limit=limit)
    if model.cut:
        say(f"{model.cut} texts were longer than the context of {model.max_length} and lost their beginning")
    if samples is not None:
        with write_atomically(samples) as file:
            for name, each in asked.items():
                for sample in each:
                    line = json.dumps({"task": name, **sample}, ensure_ascii=False, default=str)
                    file.write(line.encode() + b"\n")
        say(f"written to {samples}")
    if as_json:
        told = [_row(score) for score in scores]
        print(json.dumps({"model": path, "chat": chat, "cut": model.cut, "scores": told}))
        return
    table = Table("task", "metric", "score", "+-", "questions", "examples before")
    for score in scores:
        error = "" if math.isnan(score.error) else f"{score.error:.4f}"
        table.add_row(
            score.task, score.metric, f"{score.value:.4f}", error, str(score.samples), str(score.shots)
        )
    Console().print(table)


def _row(score: Score) -> dict[str, object]:
    return {**asdict(score), "error": None if math.isnan(score.error) else score.error}
