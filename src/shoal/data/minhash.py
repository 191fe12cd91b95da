"""Signatures of texts: what an exact and a near duplicate are told by.

Exact ones by a hash of the text. Near ones by MinHash (Broder 1997) over runs of units, 5 words or 8
characters long, and banded hashing: two texts that agree in all rows of a band share that band's key. The
share of two signatures' minima that is equal estimates the Jaccard similarity of their texts. The law: a
signature depends on its text alone. Who shares what is looked up in dedup.py.

Shape letters: X texts, B bands, R rows, K = B * R hashes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shoal.data.units import Hashes, Units, mix

WORD_RUN, IDEOGRAPH_RUN = 5, 8


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
    keys_XB: Hashes  # of texts that are not long, their exact hash
    long_X: NDArray[np.bool_]  # enough units to be compared

    def at(self, places: NDArray[np.int64]) -> Signatures:
        return Signatures(
            self.exact_X[places], self.minima_XK[places], self.keys_XB[places], self.long_X[places]
        )


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
    return Signatures(exact_X, minima_XK, np.where(long_X[:, None], keys_XB, exact_X[:, None]), long_X)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _minima(runs: Hashes, starts_X: NDArray[np.int64], hashes: int) -> NDArray[np.uint32]:
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
