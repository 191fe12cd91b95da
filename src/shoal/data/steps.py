"""The steps from raw to clean text: clean, dedup, decontaminate, each a job from files to files and a report.

A step reads documents, writes those it keeps to OUT/documents-*.jsonl.zst and says what it did in
OUT/report.json (report.py shows it). The law: all files are the same, byte for byte, whoever does the job
(jobs.py) with however many workers, but for the seconds, which are not in them. Memory is a few chunks of
text, and for duplicates what dedup.py says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from shoal.data import dedup as copies
from shoal.data.atomic import write_atomically
from shoal.data.clean import CleanRules
from shoal.data.clean import judge as judge_text
from shoal.data.decontaminate import RUN, count_hits, guard
from shoal.data.dedup import Copies, Level, paragraphs, split_texts
from shoal.data.jobs import Job, Progress, Stage
from shoal.data.minhash import DOCUMENTS, PARAGRAPHS, MinHash
from shoal.data.parts import (
    DETAILS_FILE,
    DOCUMENTS_FILES,
    PART_BYTES,
    REPORT_FILE,
    Outcome,
    Outcomes,
    Part,
    cut_parts,
    read_part,
    write_part,
    write_report,
)
from shoal.data.read import Document, Reading, find_files
from shoal.data.workers import Workers

Patterns = Sequence[str | Path]


def clean(patterns: Patterns, out: Path, rules: CleanRules, *, part_bytes: int = PART_BYTES) -> Job:
    settings = {"rules": asdict(rules)}
    return _job("clean", patterns, out, settings, partial(_clean, rules=rules), part_bytes=part_bytes)


def dedup(
    patterns: Patterns,
    out: Path,
    *,
    level: Level,
    settings: MinHash | None = None,
    part_bytes: int = PART_BYTES,
) -> Job:
    """Reads the text twice: to sign it, and to keep what no earlier text has said."""
    settings = settings or (DOCUMENTS if level == "document" else PARAGRAPHS)
    parts, work = cut_parts(find_files(patterns), part_bytes), out.resolve() / "work"
    first = (
        Stage("sign", len(parts), partial(_sign, parts=parts, folder=work, level=level, settings=settings)),
        Stage("match", settings.bands + 1, partial(_match, folder=work, settings=settings)),
        Stage("join", 1, partial(_join, folder=work, settings=settings)),
    )
    return _job(
        f"dedup by {level}",
        patterns,
        out,
        {"settings": asdict(settings)},
        partial(_without_copies, folder=work, level=level),
        first=first,
        part_bytes=part_bytes,
    )


def decontaminate(
    patterns: Patterns,
    against: Patterns,
    out: Path,
    *,
    run: int = RUN,
    min_hits: int = 1,
    part_bytes: int = PART_BYTES,
) -> Job:
    if min_hits < 1:
        raise ValueError(
            f"min_hits is {min_hits}; a document with no run in common is kept anyway: at least 1"
        )
    evaluation, work = tuple(find_files(against, (".json",))), out.resolve() / "work"
    return _job(
        "decontaminate",
        patterns,
        out,
        {"settings": {"run": run, "min_hits": min_hits}},
        partial(_decontaminate, folder=work, run=run, min_hits=min_hits),
        first=(Stage("guard", 1, partial(_guard, against=evaluation, folder=work, run=run)),),
        more=evaluation,
        part_bytes=part_bytes,
    )


def _job(
    step: str,
    patterns: Patterns,
    out: Path,
    settings: dict[str, Any],
    judge: Any,
    *,
    first: tuple[Stage, ...] = (),
    more: tuple[Path, ...] = (),
    part_bytes: int,
) -> Job:
    out, files = out.resolve(), tuple(find_files(patterns))
    parts = cut_parts(files, part_bytes)
    write = partial(write_part, parts=parts, out=out, judge=judge)
    report = partial(write_report, step=step, parts=parts, out=out, details=settings)
    return Job(
        step,
        out,
        (*files, *more),
        {**settings, "parts": [len(part) for part in parts]},
        (*first, Stage("write", len(parts), write), Stage("report", 1, report)),
        (DOCUMENTS_FILES, REPORT_FILE),
    )


# What is done to a chunk, or a part


def _clean(part: int, documents: Iterator[Document], workers: Workers, rules: CleanRules) -> Outcomes:
    return workers.map_chunks(partial(_clean_chunk, rules=rules), documents)


def _clean_chunk(documents: list[Document], rules: CleanRules) -> list[Outcome]:
    return [
        Outcome(
            document.text, verdict.reason, verdict.language, f"{verdict.value:.3g}" if verdict.value else ""
        )
        for document, verdict in zip(documents, judge_text(documents, rules), strict=True)
    ]


def _guard(
    task: int, *, against: Sequence[Path], folder: Path, run: int, workers: Workers, progress: Progress
) -> None:
    if (folder / DETAILS_FILE).exists():
        return
    guarded = guard(against, run)
    with write_atomically(folder / "runs.npy") as file:
        np.save(file, guarded.runs)
    counts = {"strings": guarded.strings, "too short to guard": guarded.short, "runs": guarded.runs.size}
    _tell(folder, {"evaluation": counts})


def _decontaminate(
    part: int, documents: Iterator[Document], workers: Workers, folder: Path, run: int, min_hits: int
) -> Outcomes:
    work = partial(_decontaminate_chunk, guarded=folder / "runs.npy", run=run, min_hits=min_hits)
    return workers.map_chunks(work, documents)


def _decontaminate_chunk(documents: list[Document], guarded: Path, run: int, min_hits: int) -> list[Outcome]:
    hits = count_hits(documents, _load(guarded, guarded.stat().st_mtime_ns), run)
    return [
        Outcome(document.text, "evaluation text" if count >= min_hits else "", note=f"{count} runs")
        for document, count in zip(documents, hits, strict=True)
    ]


@lru_cache(maxsize=1)
def _load(file: Path, written: int) -> np.ndarray:
    return np.load(file)


def _sign(
    task: int,
    *,
    parts: Sequence[Part],
    folder: Path,
    level: Level,
    settings: MinHash,
    workers: Workers,
    progress: Progress,
) -> None:
    documents = read_part(parts[task], progress, Reading())
    copies.sign_part(documents, folder, task, level=level, settings=settings, workers=workers)


def _match(task: int, *, folder: Path, settings: MinHash, workers: Workers, progress: Progress) -> None:
    copies.match_band(task, folder, settings)


def _join(task: int, *, folder: Path, settings: MinHash, workers: Workers, progress: Progress) -> None:
    if not (folder / DETAILS_FILE).exists():
        _tell(folder, {"found": copies.join_bands(folder, settings)})


def _tell(folder: Path, details: dict[str, Any]) -> None:
    with write_atomically(folder / DETAILS_FILE) as file:
        file.write(json.dumps(details).encode())


def _without_copies(
    part: int, documents: Iterable[Document], workers: Workers, folder: Path, level: Level
) -> Outcomes:
    text, end = copies.texts_before(folder)[part : part + 2]
    found = Copies.load(folder, text, end)
    c = 0
    for document in documents:
        count = split_texts([document], level)[1][0]
        last = c + int(np.searchsorted(found.text_C[c : c + count], text + count))
        told = [Outcome(document.text)]
        if last > c and level == "document":
            reason = "exact copy" if found.exact_C[c] else "near copy"
            told = [Outcome(document.text, reason, note=f"of document {found.first_C[c]}")]
        elif last > c:
            told = [_shorten(document, {int(number) - text for number in found.text_C[c:last]})]
        yield [document], told
        text, c = text + count, last


def _shorten(document: Document, repeated: set[int]) -> Outcome:
    """Without its paragraphs of those numbers."""
    parts = paragraphs(document.text)
    breaks = [*parts[1::2], ""]
    kept = [
        part + gap
        for number, (part, gap) in enumerate(zip(parts[::2], breaks, strict=True))
        if number not in repeated
    ]
    text = "".join(kept).rstrip() if len(breaks) - 1 in repeated else "".join(kept)
    return Outcome(text) if text.strip() else Outcome(document.text, "every paragraph a copy")
