"""How fast text is prepared: MB/s and peak memory of each step, and the recall of planted copies.

`python -m benchmarks.data FILES... --size MB [--workers N]` makes a corpus of that size from the documents of
the files: as they are, then again and again with three words in ten changed by a seed, so that no
repetition is a copy of another, and the duplicates are those that the files have; then it runs the steps of
src/shoal/data/steps.py on it. `--corpus FILE` keeps the corpus, or takes the one that is there.
Recall is of pairs whose exact Jaccard similarity, counted here from the sets of runs, is at the threshold or
above, among copies planted at similarities around it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import zstandard

from shoal.data import steps
from shoal.data.clean import CleanRules
from shoal.data.dedup import find_duplicates
from shoal.data.jobs import Job, quiet, run_here
from shoal.data.minhash import DOCUMENTS, IDEOGRAPH_RUN, WORD_RUN
from shoal.data.parts import DOCUMENTS_FILES, load_report
from shoal.data.read import Document, read_documents
from shoal.data.units import Units
from shoal.data.workers import Workers

PIECE = re.compile(r"[A-Za-z]+|[\u4e00-\u9fff]|[^A-Za-z\u4e00-\u9fff]+")


def change(text: str, share: float, draw: random.Random) -> str:
    """`share` of the words and of the Chinese characters replaced by others."""
    pieces = PIECE.findall(text)
    for n, piece in enumerate(pieces):
        if draw.random() < share and piece[0].isalpha():
            pieces[n] = chr(draw.randrange(0x4E00, 0x9000)) if piece[0] > "z" else f"x{draw.randrange(10**6)}"
    return "".join(pieces)


def make_corpus(files: list[str], path: Path, size: int) -> int:
    """Documents to at least `size` bytes of text; every repetition has a third of its words changed."""
    written, number, draw = 0, 0, random.Random(0)
    compressor = zstandard.ZstdCompressor(3)
    with path.open("wb") as out, compressor.stream_writer(out) as file:
        while written < size:
            for document in read_documents(files):
                text = change(document.text, 0.3, draw) if number else document.text
                file.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
                written += len(text.encode())
                if written >= size:
                    break
            number += 1
    return written


class PeakMemory:
    """The most memory of this process with its children, and of it alone, looked at ten times a second."""

    def __enter__(self) -> PeakMemory:
        self.peak, self.own, self._stop = 0, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.1):
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak, self.own = max(self.peak, total), max(self.own, me.memory_info().rss)


def recall(files: list[str], count: int) -> tuple[int, int, int, int]:
    """(true pairs, found of them, pairs below, joined of those) among planted copies of `count` documents."""
    draw = random.Random(1)
    originals = [document.text for document, _ in zip(_distinct(files), range(count), strict=False)]
    copies = [change(text, draw.uniform(0.005, 0.06), draw) for text in originals]
    documents = [Document(text, "") for text in originals + copies]
    with tempfile.TemporaryDirectory() as folder, Workers(1) as here:
        found = find_duplicates(documents, Path(folder), level="document", settings=DOCUMENTS, workers=here)
    first = dict(zip(found.text_C.tolist(), found.first_C.tolist(), strict=True))
    counts = [0, 0, 0, 0]
    for n, (one, other) in enumerate(zip(originals, copies, strict=True)):
        near = jaccard(one, other) >= DOCUMENTS.threshold
        together = first.get(n, n) == first.get(len(originals) + n)
        counts[0 if near else 2] += 1
        counts[1 if near else 3] += int(together)
    return counts[0], counts[1], counts[2], counts[3]


def _distinct(files: list[str]) -> Iterator[Document]:
    seen: set[str] = set()
    for document in read_documents(files):
        if 500 < len(document.text) < 20_000 and document.text not in seen:
            seen.add(document.text)
            yield document


def jaccard(one: str, other: str) -> float:
    chinese = bool(Units.of([one]).mostly_ideographs_X[0])
    length = IDEOGRAPH_RUN if chinese else WORD_RUN
    a, b = (set(Units.of([text]).runs(length)[0].tolist()) for text in (one, other))
    return len(a & b) / max(len(a | b), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--size", type=float, default=100, help="MB of text")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--against", nargs="*", default=[], help="evaluation files")
    parser.add_argument("--pairs", type=int, default=1000, help="planted copies for the recall; 0: none")
    parser.add_argument("--corpus", type=Path, help="a .jsonl.zst to make, or made before")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus: Path = options.corpus or folder / "corpus.jsonl.zst"
        if not corpus.exists():
            make_corpus(options.files, corpus, int(options.size * 1e6))
        print(f"{'step':16}{'MB':>7}{'seconds':>9}{'MB/s':>8}{'peak MiB':>10}{'this one':>10}{'kept':>8}")
        work: list[tuple[str, Callable[[Path, Path], Job]]] = [
            ("clean", lambda at, to: steps.clean([at], to, CleanRules())),
            ("documents", lambda at, to: steps.dedup([at], to, level="document")),
            ("paragraphs", lambda at, to: steps.dedup([at], to, level="paragraph")),
        ]
        if options.against:
            work.append(("decontaminate", lambda at, to: steps.decontaminate([at], options.against, to)))
        last, total, size = corpus, 0.0, 0
        for step, make in work:
            start = time.perf_counter()
            with PeakMemory() as memory:
                run_here(make(last, folder / step), workers=options.workers, progress=quiet)
            seconds = time.perf_counter() - start
            report, last = load_report(folder / step), folder / step / DOCUMENTS_FILES
            total, size = total + seconds, size or report.bytes_in
            read, kept = report.bytes_in / 1e6, report.bytes_out / report.bytes_in
            print(
                f"{step:16}{read:7.0f}{seconds:9.1f}{read / seconds:8.1f}"
                f"{memory.peak / 2**20:10.0f}{memory.own / 2**20:10.0f}{kept:8.1%}",
                flush=True,
            )
        print(f"{'all':16}{size / 1e6:7.0f}{total:9.1f}{size / 1e6 / total:8.1f}, {options.workers} workers")
    if options.pairs:
        near, found, below, joined = recall(options.files, options.pairs)
        print(f"planted copies: {found} of {near} at Jaccard >= {DOCUMENTS.threshold} found ", end="")
        print(f"({found / max(near, 1):.1%}); of {below} below it {joined} joined")


if __name__ == "__main__":
    main()
