"""A corpus for the steps from raw to clean text, and all steps on it: what tests of jobs share."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from shoal.data import steps
from shoal.data.clean import CleanRules
from shoal.data.jobs import Job
from shoal.data.parts import DOCUMENTS_FILES, load_report
from shoal.data.report import StepReport

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "r", "st", "mel", "ta")]
CHOICES = (*WORDS, *("the", "of", "and", "that") * 8)


def prose(words: int, draw: random.Random) -> str:
    """Sentences with English's commonest words between made-up ones, so that no run comes twice by chance."""
    chosen = [draw.choice(CHOICES) for _ in range(words)]
    return " ".join(word + (".\n" if n % 12 == 11 else "") for n, word in enumerate(chosen))


def change(text: str, share: float, draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) if draw.random() < share else word for word in text.split(" "))


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


class Corpus(NamedTuple):
    sources: list[Path]
    evaluation: Path


SMALL = 300_000  # bytes; two of the files are a part


def make_corpus(folder: Path) -> Corpus:
    """Four files whose documents, paragraphs and bad records have their copies in others."""
    draw = random.Random(8)
    texts = [prose(draw.randrange(20, 900), draw) for _ in range(600)]
    notice = prose(60, draw)
    texts += [f"{prose(200, draw)}\n\n{notice}" for _ in range(10)]
    texts += [change(text, 0.01, draw) for text in texts[::7]] + texts[::11]
    sources = [write(folder / f"{n}.jsonl", texts[n * 200 : n * 200 + 200]) for n in range(4)]
    for source in sources[::2]:
        source.write_bytes(source.read_bytes() + b'{"text": 3}\n{"text": "\xff"}\nno JSON\n')
    return Corpus(sources, write(folder / "eval.jsonl", [max(texts[:600], key=len)]))


def run_all(
    corpus: Corpus, out: Path, run: Callable[[Job], object], part_bytes: int = SMALL
) -> list[StepReport]:
    """All steps, each with what the one before has written, to OUT/0, OUT/1 ..."""
    makes = [
        partial(steps.clean, rules=CleanRules()),
        partial(steps.dedup, level="document"),
        partial(steps.dedup, level="paragraph"),
        partial(steps.decontaminate, against=[corpus.evaluation]),
    ]
    reports, files = [], corpus.sources
    for number, make in enumerate(makes):
        run(job := make(files, out=out / str(number), part_bytes=part_bytes))
        reports.append(load_report(job.out))
        files = [job.out / DOCUMENTS_FILES]
    return reports


def same_files(one: Path, other: Path) -> bool:
    """Of all steps; the logs of a cluster apart."""
    made = [
        {
            path.relative_to(at): path.read_bytes()
            for path in sorted(at.rglob("*"))
            if path.is_file() and path.parent.parent == at
        }
        for at in (one, other)
    ]
    return made[0] == made[1]
