"""Evaluation sets out of the training text: documents that share a run of 13 units with one.

A run of 13 words, as GPT-3 and Gopher counted; in Chinese, 13 characters. The law: every string of an
evaluation record counts, whatever its key, so that questions, options and answers are all guarded. A string
shorter than a run is guarded by nothing, and counted. Common runs (a list of numbers, an idiom of code) hit
too: `min_hits` asks for several runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shoal.data.read import Document, find_files, read_documents, read_lines
from shoal.data.units import Hashes, Units

RUN = 13
FILTER_BITS = 24
FILTER = np.uint64((1 << FILTER_BITS) - 1)


@dataclass(frozen=True, eq=False)
class Guarded:
    """What must not be trained on: sorted hashes of runs."""

    runs: Hashes
    strings: int
    short: int  # strings with fewer units than a run


def guard(patterns: Sequence[str | Path], run: int = RUN) -> Guarded:
    """The runs of all strings in evaluation files (.jsonl, .json; other files are read as documents)."""
    if run < 2:
        raise ValueError(f"a run has {run} units; take at least 2, and 13 as the field does")
    texts = [text for path in find_files(patterns, (".json",)) for text in _strings_of(path)]
    units = Units.of(texts)
    runs = np.unique(units.runs(run)[0])
    if not runs.size:
        raise ValueError(f"no string of {', '.join(map(str, patterns))} has {run} units; lower the run")
    return Guarded(runs, len(texts), int((units.counts_X < run).sum()))


def count_hits(documents: Sequence[Document], guarded: Hashes, run: int = RUN) -> list[int]:
    """How many runs of each document are among the sorted hashes `guarded`."""
    runs, first_X1 = Units.of([document.text for document in documents]).runs(run)
    # Most runs are not: a table of the lowest bits says so for nearly all, and the rest are looked up.
    likely = np.zeros(1 << FILTER_BITS, np.bool_)
    likely[guarded & FILTER] = True
    hits = likely[runs & FILTER]
    asked = runs[hits]
    places = np.minimum(np.searchsorted(guarded, asked), guarded.size - 1)
    hits[hits] = guarded[places] == asked
    sums = np.concatenate([[0], np.cumsum(hits)])
    return np.diff(sums[first_X1]).tolist()


def _strings_of(path: Path) -> Iterator[str]:
    if path.suffix == ".json":
        yield from _strings(json.loads(path.read_bytes()))
    elif path.suffix == ".jsonl" or path.name.endswith((".jsonl.gz", ".jsonl.zst")):
        for line in read_lines(path):
            if line.strip():
                yield from _strings(json.loads(line))
    else:
        for document in read_documents([path]):
            yield document.text


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
