"""Duplicates, exact and near, of documents or of paragraphs: who repeats whom.

Exact ones by a hash of the text. Near ones by MinHash (Broder 1997) over runs of units, 5 words or 8
characters long, and banded hashing: two texts that agree in all rows of a band are compared by the share of
their signatures that is equal, an estimate of their Jaccard similarity. Pairs at the threshold or above are
joined, and of each cluster the first in reading order is kept. The law: the answer depends on the texts and
their order alone. Signatures lie on disk, mapped; in memory is one band's key, 8 bytes a text, and its order.

Shape letters: X texts, B bands, R rows, K = B * R hashes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from shoal.data.read import Document
from shoal.data.units import Hashes, Units, mix
from shoal.data.workers import map_chunks

Ints = NDArray[np.int64]
Level = Literal["document", "paragraph"]

WORD_RUN, IDEOGRAPH_RUN = 5, 8
PARAGRAPH_BREAK = re.compile(r"(\n[ \t\r]*\n\s*)")
COMPARED = 1 << 16  # signatures read at a time


@dataclass(frozen=True)
class MinHash:
    """A pair of Jaccard similarity s is compared with the chance 1 - (1 - s^rows)^bands; its estimate has a
    standard deviation of sqrt(s (1 - s) / (bands * rows))."""

    threshold: float = 0.8
    bands: int = 32
    rows: int = 5
    min_units: int = 13  # of a text, below which only exact copies count (of paragraphs, nothing)

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; it must lie above 0, and at most at 1")
        if self.bands < 1 or self.rows < 1:
            raise ValueError(f"bands is {self.bands} and rows {self.rows}; each is at least 1")

    @property
    def hashes(self) -> int:
        return self.bands * self.rows


DOCUMENTS = MinHash()
PARAGRAPHS = MinHash(bands=16, rows=4, min_units=20)


class Signatures(NamedTuple):
    exact_X: Hashes
    minima_XK: NDArray[np.uint32]
    keys_XB: Hashes
    long_X: NDArray[np.bool_]  # enough units to be compared


@dataclass(frozen=True, eq=False)
class Duplicates:
    """Text x repeats text first_X[x], which is x itself where it is kept."""

    first_X: Ints
    exact_X: NDArray[np.bool_]  # a copy, letter by letter, of an earlier text

    @property
    def kept_X(self) -> NDArray[np.bool_]:
        return self.first_X == np.arange(self.first_X.size)


def paragraphs(text: str) -> list[str]:
    """Paragraphs at even places, the breaks between them at odd ones: joined, they are the text."""
    return PARAGRAPH_BREAK.split(text)


def sign(texts: Sequence[str], settings: MinHash) -> Signatures:
    exact_X = np.array([_digest(text) for text in texts], np.uint64)
    units = Units.of(texts)
    long_X = units.counts_X >= max(settings.min_units, IDEOGRAPH_RUN)
    minima_XK = np.full((len(texts), settings.hashes), np.uint32(0xFFFFFFFF))
    chinese_X = units.mostly_ideographs_X
    for length, wanted_X in ((WORD_RUN, long_X & ~chinese_X), (IDEOGRAPH_RUN, long_X & chinese_X)):
        if wanted_X.any():
            runs, first_X1 = units.runs(length)
            inside = np.repeat(wanted_X, np.diff(first_X1))
            starts = np.cumsum(np.diff(first_X1)[wanted_X])
            minima_XK[wanted_X] = _minima(runs[inside], np.concatenate([[0], starts[:-1]]), settings.hashes)
    bands_XBR = minima_XK.reshape(len(texts), settings.bands, settings.rows)
    keys_XB = np.zeros((len(texts), settings.bands), np.uint64)
    for row in range(settings.rows):
        keys_XB = mix(keys_XB + bands_XBR[:, :, row] + np.uint64(0x9E3779B97F4A7C15))
    return Signatures(exact_X, minima_XK, keys_XB, long_X)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _minima(runs: Hashes, starts_X: Ints, hashes: int) -> NDArray[np.uint32]:
    """The smallest of each text's runs under each of `hashes` orders: x -> (x ^ b) * a, its upper half."""
    minima_XK = np.empty((starts_X.size, hashes), np.uint32)
    ordered = np.empty_like(runs)
    for k, (a, b) in enumerate(_orders(hashes)):
        np.bitwise_xor(runs, b, out=ordered)
        np.multiply(ordered, a, out=ordered)
        minima_XK[:, k] = np.minimum.reduceat(ordered, starts_X) >> np.uint64(32)
    return minima_XK


@cache
def _orders(hashes: int) -> list[tuple[np.uint64, np.uint64]]:
    drawn = mix(np.arange(1, 2 * hashes + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return list(zip(drawn[::2] | np.uint64(1), drawn[1::2], strict=True))


def split_texts(documents: Sequence[Document], level: Level) -> tuple[list[str], list[int]]:
    """The texts compared at a level, and how many of them each document has."""
    if level == "document":
        return [document.text for document in documents], [1] * len(documents)
    parts = [paragraphs(document.text)[::2] for document in documents]
    return [part for each in parts for part in each], [len(each) for each in parts]


def _sign_chunk(documents: list[Document], level: Level, settings: MinHash) -> Signatures:
    return sign(split_texts(documents, level)[0], settings)


def find_duplicates(
    documents: Iterable[Document], folder: Path, *, level: Level, settings: MinHash, workers: int
) -> Duplicates:
    """Writes signatures into `folder`, an empty one, to be removed afterwards."""
    # 1. Signatures, to disk; of the paragraphs, only those that are long enough have one.
    exact, number, kept_numbers = [], 0, []
    bands = [(folder / f"band-{b}").open("wb") for b in range(settings.bands)]
    with (folder / "minima").open("wb") as minima:
        for _, signed in map_chunks(partial(_sign_chunk, level=level, settings=settings), documents, workers):
            compared = signed.long_X
            if level == "document":
                exact.append(signed.exact_X)
            else:
                exact.append(signed.exact_X[compared])
            minima.write(signed.minima_XK[compared].tobytes())
            for file, keys_X in zip(bands, signed.keys_XB[compared].T, strict=True):
                file.write(keys_X.tobytes())
            kept_numbers.append(number + np.flatnonzero(compared))
            number += compared.size
    for file in bands:
        file.close()
    numbers = np.concatenate([np.empty(0, np.int64), *kept_numbers])
    first_X = np.arange(number)

    # 2. Exact copies join their first.
    keys = np.concatenate([np.empty(0, np.uint64), *exact])
    of_key = np.arange(number) if level == "document" else numbers
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    first_X[of_key] = of_key[first[inverse]]
    exact_X = first_X != np.arange(number)

    # 3. Near ones: in each band, texts of one key are held against the first with it and the one before.
    minima_NK = (
        np.memmap(folder / "minima", np.uint32, "r").reshape(-1, settings.hashes)
        if numbers.size
        else np.empty((0, settings.hashes), np.uint32)
    )
    alone_N = ~exact_X[numbers]  # the copies have been told
    for b in range(settings.bands):
        keys = np.fromfile(folder / f"band-{b}", np.uint64)
        order = np.flatnonzero(alone_N)[np.argsort(keys[alone_N], kind="stable")]
        keys = keys[order]
        new = np.ones(order.size, np.bool_)
        new[1:] = keys[1:] != keys[:-1]
        heads = order[np.maximum.accumulate(np.where(new, np.arange(order.size), 0))]
        before = np.roll(order, 1)
        pairs = np.stack([np.concatenate([heads[~new], before[~new]]), np.concatenate([order[~new]] * 2)])
        for start in range(0, pairs.shape[1], COMPARED):
            left, right = pairs[:, start : start + COMPARED]
            equal = np.mean(minima_NK[left] == minima_NK[right], axis=1, dtype=np.float32)
            for one, other in pairs[:, start : start + COMPARED][:, equal >= settings.threshold].T:
                _join(first_X, int(numbers[one]), int(numbers[other]))

    # 4. Every text points at its cluster's first.
    while not np.array_equal(shorter := first_X[first_X], first_X):
        first_X = shorter
    return Duplicates(first_X, exact_X)


def _root(first_X: Ints, x: int) -> int:
    while first_X[x] != x:
        first_X[x] = first_X[first_X[x]]
        x = int(first_X[x])
    return x


def _join(first_X: Ints, one: int, other: int) -> None:
    one, other = _root(first_X, one), _root(first_X, other)
    first_X[max(one, other)] = min(one, other)
