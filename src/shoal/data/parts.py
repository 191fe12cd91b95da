"""The text that a step reads and writes, in parts: some files in, one archive and one tally out.

A part is some consecutive files, or a large one. The law: how the files are parted depends on their sizes
alone, and what a part becomes on its files, so that a result is the same bytes whoever wrote which part. A
part's tally is written after its archive, and so tells that the part is done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import zstandard

from shoal.data.atomic import write_atomically
from shoal.data.jobs import Progress, tidy
from shoal.data.read import Document, Reading, read_files
from shoal.data.report import StepReport, Tally
from shoal.data.workers import Workers

PART_BYTES = 64 << 20  # of files, compressed as they are
FRAME = 1 << 20  # bytes of text in a frame of the archive
DOCUMENTS_FILES, REPORT_FILE = "documents-*.jsonl.zst", "report.json"
DETAILS_FILE = "details.json"

Part = tuple[Path, ...]


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


Outcomes = Iterable[tuple[list[Document], list[Outcome]]]


def cut_parts(files: Sequence[Path], size: int = PART_BYTES) -> tuple[Part, ...]:
    """Files in their order; a part ends with the file that brings it to `size` bytes."""
    parts: list[Part] = []
    part: list[Path] = []
    held = 0
    for file in files:
        part.append(file)
        held += file.stat().st_size
        if held >= size:
            parts.append(tuple(part))
            part, held = [], 0
    return (*parts, tuple(part)) if part else tuple(parts)


def read_part(part: Part, progress: Progress, reading: Reading) -> Iterator[Document]:
    for document in read_files(part, reading):
        yield document
        progress(reading)
    progress(reading)


def write_part(
    task: int,
    *,
    parts: Sequence[Part],
    out: Path,
    judge: Callable[[int, Iterator[Document], Workers], Outcomes],
    workers: Workers,
    progress: Progress,
) -> None:
    """`judge` is given the part's number, its documents and the workers it may use."""
    told = out / "work" / f"tally-{task:05}.json"
    if told.exists():
        return
    tally, reading = Tally(), Reading()
    compressor = zstandard.ZstdCompressor(level=3)
    with write_atomically(out / DOCUMENTS_FILES.replace("*", f"{task:05}")) as file:
        frame: list[bytes] = []
        size = 0
        for documents, outcomes in judge(task, read_part(parts[task], progress, reading), workers):
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
    tally.bad, tally.quotes = reading.bad, reading.quotes
    with write_atomically(told) as file:
        file.write(tally.save())


def write_report(
    task: int,
    *,
    step: str,
    parts: Sequence[Part],
    out: Path,
    details: dict[str, Any],
    workers: Workers,
    progress: Progress,
) -> None:
    """Of all parts, with what a stage left in DETAILS_FILE. The last task: the work is cleared away."""
    work, tally = out / "work", Tally()
    for number in range(len(parts)):
        tally.follow(Tally.load((work / f"tally-{number:05}.json").read_bytes()))
    if not tally.totals[0]:
        raise ValueError(f"no text in {len(parts)} parts, {parts[0][0]} first; give files that have some")
    found = work / DETAILS_FILE
    details = {**details, **(json.loads(found.read_bytes()) if found.exists() else {})}
    with write_atomically(out / REPORT_FILE) as file:
        report = asdict(tally.report(step, details))
        file.write(json.dumps(report, ensure_ascii=False, indent=1).encode())
    tidy(work)


def load_report(folder: Path) -> StepReport:
    """What a step wrote."""
    try:
        return StepReport(**json.loads((folder / REPORT_FILE).read_bytes()))
    except FileNotFoundError:
        state = "is not done yet" if (folder / "work").is_dir() else "has no report of a data step"
        raise ValueError(f"{folder} {state}; {folder / REPORT_FILE} is the last that a step writes") from None
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / REPORT_FILE} is no report of this version: {error}") from None
