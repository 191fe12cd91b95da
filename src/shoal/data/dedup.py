"""Duplicates, exact and near, of documents or of paragraphs: who repeats whom.

Texts that share a key of their signatures (minhash.py) are compared: of each key, every text with the first
and with the one before it. Pairs at the threshold or above are joined, and of each cluster the first in
reading order is kept. The law: the answer depends on the texts and their order alone, and memory does not
grow with them, but for some numbers a copy. So signatures lie in files, by runs of texts, their keys sorted,
and a band is gone through by ranges of keys that hold about half a million. Each stage below is tasks that
read files and write some: signatures of parts, pairs of bands, one join.

Shape letters: X texts, B bands, K hashes, P pairs, C copies.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from shoal.data.atomic import write_atomically
from shoal.data.minhash import MinHash, Signatures, sign
from shoal.data.read import Document
from shoal.data.units import Hashes
from shoal.data.workers import Workers

Ints = NDArray[np.int64]
Level = Literal["document", "paragraph"]

PARAGRAPH_BREAK = re.compile(r"(\n[ \t\r]*\n\s*)")
RUN = 1 << 16  # texts whose keys are sorted together
RANGE = 1 << 19  # keys looked at together, on average
COMPARED = 1 << 13  # pairs whose signatures are read together


def paragraphs(text: str) -> list[str]:
    """Paragraphs at even places, the breaks between them at odd ones: joined, they are the text."""
    return PARAGRAPH_BREAK.split(text)


def split_texts(documents: Sequence[Document], level: Level) -> tuple[list[str], list[int]]:
    """The texts compared at a level, and how many of them each document has."""
    if level == "document":
        return [document.text for document in documents], [1] * len(documents)
    parts = [paragraphs(document.text)[::2] for document in documents]
    return [part for each in parts for part in each], [len(each) for each in parts]


# Stage 1, a task a part: signatures


def sign_part(
    documents: Iterable[Document],
    folder: Path,
    part: int,
    *,
    level: Level,
    settings: MinHash,
    workers: Workers,
) -> None:
    """Writes runs of signatures, and last `count`, how many texts the part has.

    Of paragraphs, those too short to be compared are copies of nothing: they are counted, and that is all.
    """
    place = _place(folder, part)
    if (place / "count").exists():
        return
    count = run = 0
    signed: list[tuple[Ints, Signatures]] = []
    sign_chunk = partial(_sign_chunk, level=level, settings=settings)
    for _, signs in workers.map_chunks(sign_chunk, documents):
        told_X = np.arange(signs.long_X.size) if level == "document" else np.flatnonzero(signs.long_X)
        signed.append((count + told_X, signs.at(told_X)))
        count += signs.long_X.size
        if sum(told_X.size for told_X, _ in signed) >= RUN:
            _write_run(place / f"{run:05}", signed)
            signed, run = [], run + 1
    _write_run(place / f"{run:05}", signed)
    with write_atomically(place / "count") as file:
        file.write(str(count).encode())


def _sign_chunk(documents: list[Document], level: Level, settings: MinHash) -> Signatures:
    return sign(split_texts(documents, level)[0], settings)


def _write_run(place: Path, signed: list[tuple[Ints, Signatures]]) -> None:
    """Columns by row: text, exact, minima. By band, the exact keys as the last: keys, sorted, and rows."""
    if not sum(told_X.size for told_X, _ in signed):
        return
    place.mkdir(parents=True, exist_ok=True)
    np.concatenate([told_X for told_X, _ in signed]).tofile(place / "text")
    exact_X = np.concatenate([signs.exact_X for _, signs in signed])
    exact_X.tofile(place / "exact")
    with (place / "minima").open("wb") as file:
        for _, signs in signed:
            file.write(signs.minima_XK.tobytes())
    with (place / "keys").open("wb") as keys, (place / "rows").open("wb") as rows:
        for band in range(signed[0][1].keys_XB.shape[1]):
            _write_sorted(np.concatenate([signs.keys_XB[:, band] for _, signs in signed]), keys, rows)
        _write_sorted(exact_X, keys, rows)


def _write_sorted(keys_X: Hashes, keys: BinaryIO, rows: BinaryIO) -> None:
    order = np.argsort(keys_X, kind="stable")
    keys.write(keys_X[order].tobytes())
    rows.write(order.astype(np.uint32).tobytes())


def _place(folder: Path, part: int) -> Path:
    return folder / f"signs-{part:05}"


# Stage 2, a task a band, and one for exact copies: pairs


def match_band(band: int, folder: Path, settings: MinHash) -> None:
    """Writes (2, C): texts that are copies, as this band shows, and the first of each one's cluster.

    The band after the last one is that of exact copies.
    """
    if _pairs(folder, band).exists():
        return
    signs = _Signs.open(folder, settings.hashes)
    found = np.empty((2, 0), np.int64)
    for keys, rows in signs.ranges(band):
        # 1. Rows of one key, in reading order.
        order = np.argsort(keys, kind="stable")
        keys, rows = keys[order], rows[order]
        shared = _again(keys)
        shared[:-1] |= shared[1:]
        keys, rows = keys[shared], rows[shared]
        if band < settings.bands:
            # 2. Exact copies have the same key in every band; they are the last one's to tell.
            exact = signs.take("exact", rows)
            order = np.lexsort((rows, exact, keys))
            once = np.sort(order[~(_again(keys[order]) & _again(exact[order]))])
            keys, rows = keys[once], rows[once]
        # 3. Each one with the first of its key and, where they may differ, with the one before.
        again = _again(keys)
        heads = rows[np.maximum.accumulate(np.where(again, 0, np.arange(rows.size)))]
        pairs = np.stack([heads[again], rows[again]])
        if band < settings.bands:
            pairs = np.concatenate([pairs, np.stack([np.roll(rows, 1)[again], rows[again]])], axis=1)
            pairs = pairs[:, signs.near(pairs, settings.threshold)]
        found = join(np.concatenate([found, signs.take("text", pairs)], axis=1))
    with write_atomically(_pairs(folder, band)) as file:
        np.save(file, found)


def _again(keys: Hashes) -> NDArray[np.bool_]:
    """Whether a key is that before it."""
    again = np.zeros(keys.size, np.bool_)
    again[1:] = keys[1:] == keys[:-1]
    return again


def _pairs(folder: Path, band: int) -> Path:
    return folder / f"pairs-{band:03}.npy"


@dataclass(frozen=True, eq=False)
class _Signs:
    """The runs of all parts, in reading order; rows are numbered through them."""

    runs: list[Path]
    before: list[int]  # texts in the parts before that of each run
    starts: Ints  # (runs + 1)
    hashes: int

    @classmethod
    def open(cls, folder: Path, hashes: int) -> _Signs:
        runs, before, sizes, texts = [], [], [0], 0
        for place in sorted(folder.glob("signs-*")):
            for run in sorted(path for path in place.iterdir() if path.is_dir()):
                runs.append(run)
                before.append(texts)
                sizes.append((run / "exact").stat().st_size // 8)
            texts += int((place / "count").read_text())
        return cls(runs, before, np.cumsum(sizes), hashes)

    def ranges(self, band: int) -> Iterator[tuple[Hashes, Ints]]:
        """The keys of a band with their rows, by ranges of keys."""
        count = int(self.starts[-1]) // RANGE + 1
        bounds = np.array([(n << 64) // count for n in range(1, count)], np.uint64)
        places = []
        for n in range(len(self.runs)):
            keys = self._sorted(n, band)[0]
            places.append([0, *np.searchsorted(keys, bounds).tolist(), keys.size])
        for n in range(count):
            all_keys, all_rows = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
            for run, at in enumerate(places):
                keys, rows = self._sorted(run, band)
                all_keys.append(keys[at[n] : at[n + 1]])
                all_rows.append(rows[at[n] : at[n + 1]] + self.starts[run])
            yield np.concatenate(all_keys), np.concatenate(all_rows)

    def _sorted(self, run: int, band: int) -> tuple[Hashes, NDArray[np.uint32]]:
        size, place = int(self.starts[run + 1] - self.starts[run]), self.runs[run]
        keys = np.memmap(place / "keys", np.uint64, "r", 8 * band * size, size)
        return keys, np.memmap(place / "rows", np.uint32, "r", 4 * band * size, size)

    def take(self, column: str, rows: Ints) -> NDArray[Any]:
        """What is in `column` at `rows`, whatever their shape."""
        kinds = {"text": np.int64, "exact": np.uint64, "minima": np.uint32}
        shape = (self.hashes,) if column == "minima" else ()
        taken = np.empty((*rows.shape, *shape), kinds[column])
        run_of = np.searchsorted(self.starts, rows, side="right") - 1
        for run in np.unique(run_of).tolist():
            here = run_of == run
            mapped = np.memmap(self.runs[run] / column, kinds[column], "r").reshape(-1, *shape)
            taken[here] = mapped[rows[here] - self.starts[run]]
            if column == "text":
                taken[here] += self.before[run]
        return taken

    def near(self, pairs: Ints, threshold: float) -> NDArray[np.bool_]:
        """Whether the signatures of a pair are equal enough."""
        near = np.empty(pairs.shape[1], np.bool_)
        for start in range(0, near.size, COMPARED):
            some = pairs[:, start : start + COMPARED]
            rows, place = np.unique(some, return_inverse=True)
            left, right = self.take("minima", rows)[place.reshape(some.shape)]
            near[start : start + COMPARED] = np.mean(left == right, axis=1, dtype=np.float32) >= threshold
        return near


# Stage 3, one task: clusters


def join(pairs: Ints) -> Ints:
    """(2, C): of pairs (2, P), every text that is not the first of its cluster, ascending, and that first."""
    texts, ends = np.unique(pairs, return_inverse=True)
    one, other = ends.reshape(2, -1)
    first = np.arange(texts.size)
    while one.size:
        low, high = np.minimum(first[one], first[other]), np.maximum(first[one], first[other])
        np.minimum.at(first, high, low)
        while not np.array_equal(shorter := first[first], first):
            first = shorter
        apart = first[one] != first[other]
        one, other = one[apart], other[apart]
    copies = np.flatnonzero(first != np.arange(texts.size))
    return np.stack([texts[copies], texts[first[copies]]])


@dataclass(frozen=True, eq=False)
class Copies:
    """Text text_C[c] repeats first_C[c]; all others are kept. Ascending."""

    text_C: Ints
    first_C: Ints
    exact_C: NDArray[np.bool_]  # a copy, letter by letter, of an earlier text

    @classmethod
    def load(cls, folder: Path, start: int, stop: int) -> Copies:
        """Those among texts `start` to `stop`."""
        table = np.load(folder / "copies.npy", mmap_mode="r")
        low, high = np.searchsorted(table[0], [start, stop])
        text_C, first_C, exact_C = np.array(table[:, low:high])
        return cls(text_C, first_C, exact_C != 0)


def join_bands(folder: Path, settings: MinHash) -> dict[str, int]:
    """Writes the copies of all bands, and tells how many texts, clusters and copies there are."""
    found = exact = np.load(_pairs(folder, settings.bands))
    for band in range(settings.bands):
        found = join(np.concatenate([found, np.load(_pairs(folder, band))], axis=1))
    exact_C = np.isin(found[0], exact[0], assume_unique=True)
    with write_atomically(folder / "copies.npy") as file:
        np.save(file, np.concatenate([found, exact_C.astype(np.int64)[None]]))
    sizes = np.unique(found[1], return_counts=True)[1]
    return {
        "texts": texts_before(folder)[-1],
        "clusters": sizes.size,
        "largest": int(sizes.max(initial=0)) + 1,
        "exact": int(exact_C.sum()),
        "near": int((~exact_C).sum()),
    }


def texts_before(folder: Path) -> list[int]:
    """How many texts the parts before each one have; last, how many there are."""
    counts = [int((place / "count").read_text()) for place in sorted(folder.glob("signs-*"))]
    return [0, *accumulate(counts)]


def find_duplicates(
    documents: Iterable[Document], folder: Path, *, level: Level, settings: MinHash, workers: Workers
) -> Copies:
    """All stages, of one part; `folder` is an empty one, to be removed afterwards."""
    sign_part(documents, folder, 0, level=level, settings=settings, workers=workers)
    for band in range(settings.bands + 1):
        match_band(band, folder, settings)
    return Copies.load(folder, 0, join_bands(folder, settings)["texts"])
