"""Texts as units on one flat axis: a word is a unit, and so is a Chinese or Japanese character.

What compares texts (clean.py, dedup.py, decontaminate.py) compares runs of units, so that case, white space
and punctuation do not count and Chinese needs no segmenter. The law: a unit is a hash that depends on its
own characters alone, the same in every process, on every machine. Scripts whose letters need combining marks
are cut at the marks, which loses nothing in comparing.

Shape letters: C characters, U units, X texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

CODE_POINTS = 0x110000
IDEOGRAPHS = ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF))
LONGEST = 64  # characters of a word whose order counts; of longer ones, each 64 more are counted as a sum
SEPARATOR, WORD, IDEOGRAPH = range(3)


@dataclass(frozen=True, eq=False)
class Units:
    """Text x is units offsets[x] to offsets[x + 1]."""

    hashes_U: Hashes
    ideographs_U: NDArray[np.bool_]
    offsets_X1: NDArray[np.int64]

    @classmethod
    def of(cls, texts: Sequence[str]) -> Units:
        codes_C = np.frombuffer("\n".join([*texts, ""]).encode("utf-32-le"), np.uint32)
        kinds, values = _tables()
        kinds_C = kinds[codes_C]
        word_C, alone_C = kinds_C == WORD, kinds_C == IDEOGRAPH
        starts_C = alone_C.copy()
        starts_C[1:] |= word_C[1:] & ~word_C[:-1]
        starts_C[:1] |= word_C[:1]
        starts_U = np.flatnonzero(starts_C)
        ends = np.cumsum([len(text) + 1 for text in texts], dtype=np.int64)
        offsets_X1 = np.searchsorted(starts_U, np.concatenate([[0], ends]))
        if not starts_U.size:
            return cls(np.empty(0, np.uint64), np.empty(0, np.bool_), offsets_X1)
        lengths_U = np.diff(np.append(starts_U, codes_C.size))
        place_C = np.arange(starts_U[0], codes_C.size) - np.repeat(starts_U, lengths_U)
        # Separators after a word have the value 0.
        terms_C = values[codes_C[starts_U[0] :]] * _powers()[place_C % LONGEST]
        hashes_U = mix(np.add.reduceat(terms_C, starts_U - starts_U[0]))
        return cls(hashes_U, alone_C[starts_U], offsets_X1)

    @property
    def counts_X(self) -> NDArray[np.int64]:
        return np.diff(self.offsets_X1)

    @property
    def mostly_ideographs_X(self) -> NDArray[np.bool_]:
        """Whether more than half of a text's units are single characters."""
        sums = np.concatenate([[0], np.cumsum(self.ideographs_U)])[self.offsets_X1]
        return 2 * np.diff(sums) > self.counts_X

    def runs(self, length: int) -> tuple[Hashes, NDArray[np.int64]]:
        """The hash of every run of `length` units within one text, and (X + 1) where each text's runs
        start."""
        counts_X = np.maximum(self.counts_X - length + 1, 0)
        total = max(self.hashes_U.size - length + 1, 0)
        sums = np.zeros(total, np.uint64)
        for shift, factor in enumerate(_powers()[1 : length + 1]):
            sums += self.hashes_U[shift : shift + total] * factor
        first_X = np.cumsum(counts_X) - counts_X
        places = np.arange(counts_X.sum()) + np.repeat(self.offsets_X1[:-1] - first_X, counts_X)
        return mix(sums[places]), np.concatenate([first_X, [counts_X.sum()]])


def mix(values: Hashes) -> Hashes:
    """SplitMix64's finalizer: every bit of the result depends on every bit of the value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@cache
def _tables() -> tuple[NDArray[np.uint8], Hashes]:
    """The kind of each code point, and its number: that of its lower case, 0 for a separator."""
    characters = [chr(code) for code in range(0xD800)] + [chr(code) for code in range(0xE000, CODE_POINTS)]
    kinds, lower = np.zeros(CODE_POINTS, np.uint8), np.zeros(CODE_POINTS, np.uint64)
    for character in characters:
        if character.isalnum():
            kinds[ord(character)] = WORD
            lower[ord(character)] = ord(character.lower()[0])
    for first, last in IDEOGRAPHS:
        kinds[first : last + 1] = np.where(kinds[first : last + 1] == WORD, IDEOGRAPH, SEPARATOR)
    return kinds, np.where(kinds == SEPARATOR, np.uint64(0), mix(lower + np.uint64(0x9E3779B97F4A7C15)))


@cache
def _powers() -> Hashes:
    with np.errstate(over="ignore"):
        return np.cumprod(np.full(LONGEST, 0x9E3779B97F4A7C15, np.uint64), dtype=np.uint64)
