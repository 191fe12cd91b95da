"""The steps from raw to clean text: clean, dedup, decontaminate, each files -> files and a report.

A step reads documents, writes those it keeps to OUT/documents.jsonl.zst and says what it did in
OUT/report.json (report.py shows it). The law: both files are the same, byte for byte, whatever the number of
workers, but for the seconds, which are not in them. Memory is a few chunks of text, and for duplicates some
numbers a document or paragraph (dedup.py). What a step does to a chunk of documents is a function of this
file, so that another engine can call it as well.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import zstandard

from shoal.data.atomic import write_atomically
from shoal.data.clean import CleanRules, judge
from shoal.data.decontaminate import RUN, count_hits, guard
from shoal.data.dedup import (
    DOCUMENTS,
    PARAGRAPHS,
    Duplicates,
    Level,
    MinHash,
    find_duplicates,
    paragraphs,
    split_texts,
)
from shoal.data.read import Document, Reading, read_documents
from shoal.data.report import StepReport, Tally
from shoal.data.workers import map_chunks

DOCUMENTS_FILE, REPORT_FILE = "documents.jsonl.zst", "report.json"
FRAME = 1 << 20  # bytes of text in a frame of the archive

Progress = Callable[[Reading], None]


@dataclass(frozen=True)
class Outcome:
    """What a step says of one document: the text to keep (perhaps shortened), or why not."""

    text: str
    reason: str = ""
    language: str = ""
    note: str = ""  # for a person who asks why

    @property
    def keep(self) -> bool:
        return not self.reason


def clean(
    patterns: Sequence[str | Path], out: Path, rules: CleanRules, *, workers: int, progress: Progress
) -> StepReport:
    done = map_chunks(
        partial(clean_chunk, rules=rules), _read(patterns, progress, reading := Reading()), workers
    )
    return _write("clean", done, out, reading, {"rules": asdict(rules)})


def clean_chunk(documents: list[Document], rules: CleanRules) -> list[Outcome]:
    return [
        Outcome(
            document.text, verdict.reason, verdict.language, f"{verdict.value:.3g}" if verdict.value else ""
        )
        for document, verdict in zip(documents, judge(documents, rules), strict=True)
    ]


def dedup(
    patterns: Sequence[str | Path],
    out: Path,
    *,
    level: Level,
    settings: MinHash | None = None,
    workers: int,
    progress: Progress,
) -> StepReport:
    """Reads the text twice: to sign it, and to keep what no earlier text has said."""
    settings = settings or (DOCUMENTS if level == "document" else PARAGRAPHS)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix="signatures-") as folder:
        documents = _read(patterns, progress, Reading())
        found = find_duplicates(documents, Path(folder), level=level, settings=settings, workers=workers)
    again = _read(patterns, progress, reading := Reading())
    sizes = np.bincount(found.first_X, minlength=found.first_X.size)
    clusters = {"texts": found.first_X.size, "clusters": int((sizes > 1).sum()), "largest": int(sizes.max())}
    clusters |= {"exact": int(found.exact_X.sum()), "near": int((~found.kept_X & ~found.exact_X).sum())}
    done = ((chunk, outcomes) for chunk, outcomes in _without(found, again, level))
    return _write(f"dedup by {level}", done, out, reading, {"settings": asdict(settings), "found": clusters})


def decontaminate(
    patterns: Sequence[str | Path],
    against: Sequence[str | Path],
    out: Path,
    *,
    run: int = RUN,
    min_hits: int = 1,
    workers: int,
    progress: Progress,
) -> StepReport:
    if min_hits < 1:
        raise ValueError(
            f"min_hits is {min_hits}; a document with no run in common is kept anyway: at least 1"
        )
    guarded = guard(against, run)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix="guarded-") as folder:
        file = Path(folder, "runs.npy")
        np.save(file, guarded.runs)
        work = partial(decontaminate_chunk, guarded=file, run=run, min_hits=min_hits)
        done = map_chunks(work, _read(patterns, progress, reading := Reading()), workers)
        counts = {"strings": guarded.strings, "too short to guard": guarded.short, "runs": guarded.runs.size}
        settings = {"run": run, "min_hits": min_hits}
        return _write("decontaminate", done, out, reading, {"settings": settings, "evaluation": counts})


def decontaminate_chunk(documents: list[Document], guarded: Path, run: int, min_hits: int) -> list[Outcome]:
    hits = count_hits(documents, _load(guarded), run)
    return [
        Outcome(document.text, "evaluation text" if count >= min_hits else "", note=f"{count} runs")
        for document, count in zip(documents, hits, strict=True)
    ]


def load_report(folder: Path) -> StepReport:
    """What a step wrote."""
    try:
        return StepReport(**json.loads((folder / REPORT_FILE).read_bytes()))
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {REPORT_FILE}; give the folder that a data step wrote") from None
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / REPORT_FILE} is no report of this version: {error}") from None


@lru_cache(maxsize=1)
def _load(file: Path) -> np.ndarray:
    return np.load(file)


def _without(
    found: Duplicates, documents: Iterable[Document], level: Level
) -> Iterator[tuple[list[Document], list[Outcome]]]:
    x = 0
    for document in documents:
        count = split_texts([document], level)[1][0]
        first_X, exact_X = found.first_X[x : x + count], found.exact_X[x : x + count]
        repeated = first_X != np.arange(x, x + count)
        x += count
        if not repeated.any():
            yield [document], [Outcome(document.text)]
        elif level == "document":
            reason = "exact copy" if exact_X[0] else "near copy"
            yield [document], [Outcome(document.text, reason, note=f"of document {first_X[0]}")]
        else:
            yield [document], [_shorten(document, repeated)]


def _shorten(document: Document, repeated: np.ndarray) -> Outcome:
    parts = paragraphs(document.text)
    kept = [
        part + gap
        for part, gap, gone in zip(parts[::2], [*parts[1::2], ""], repeated, strict=True)
        if not gone
    ]
    text = "".join(kept).rstrip() if repeated[-1] else "".join(kept)
    return Outcome(text) if text.strip() else Outcome(document.text, "every paragraph a copy")


def _read(patterns: Sequence[str | Path], progress: Progress, reading: Reading) -> Iterator[Document]:
    documents = read_documents(patterns, reading)
    for document in documents:
        yield document
        progress(reading)
    progress(reading)


def _write(
    name: str,
    done: Iterable[tuple[list[Document], list[Outcome]]],
    out: Path,
    reading: Reading,
    details: dict[str, object],
) -> StepReport:
    """The kept documents and the report, as results come."""
    tally = Tally()
    compressor = zstandard.ZstdCompressor(level=3)
    with write_atomically(out / DOCUMENTS_FILE) as file:
        frame: list[bytes] = []
        size = 0
        for documents, outcomes in done:
            for document, outcome in zip(documents, outcomes, strict=True):
                tally.add(document, outcome.text, outcome.reason, outcome.language, outcome.note)
                if outcome.keep:
                    record = {"text": outcome.text, "source": document.source}
                    record |= {"lang": outcome.language} if outcome.language else {}
                    frame.append(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                    size += len(frame[-1])
                if size >= FRAME:
                    file.write(compressor.compress(b"".join(frame)))
                    frame, size = [], 0
        file.write(compressor.compress(b"".join(frame)))
    report = tally.report(name, reading, details)
    with write_atomically(out / REPORT_FILE) as file:
        file.write(json.dumps(asdict(report), ensure_ascii=False, indent=1).encode())
    return report
