"""Text in which things are told and told again: text to practise looking back on.

Two forms. `strings`: keys and values without meaning, in an order that comes again to the document's end; a
small model learns from them to find what it has read, and what came after it. `facts`: words of other text
with facts among them, "#ba47", a key and its value. A key has one value in a document, another in the next,
so a fact told again can only be known by finding it; how far back it stands is spread evenly over the
logarithm, from the next word to the whole document. Alone, facts teach a guess among the values that were
seen (LOG.md, 2026-11-29), so strings come before them or beside them.

The law: a document is a function of the words, the seed and its number. Facts leave out `HELD_OUT`, keys and
values to test with; strings have them, or their tokens would mean nothing. A tokenizer trained on this text
has each key and each value as one token.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from shoal.data.read import Document

Form = Literal["strings", "facts"]


class Symbols(NamedTuple):
    keys: tuple[str, ...]
    values: tuple[str, ...]


MARK = "#"  # before every key; the words between have none, and no digits
CONSONANTS, TESTED, VOWELS = "bdfgklmnprst", "vz", "aeiou"
VALUES = tuple(map(str, range(10, 100)))
TOLD = Symbols(tuple(MARK + c + v for c in CONSONANTS for v in VOWELS), VALUES[:80])
HELD_OUT = Symbols(tuple(MARK + c + v for c in TESTED for v in VOWELS), VALUES[80:])
ALL = Symbols(TOLD.keys + HELD_OUT.keys, VALUES)

SHORTEST = 16  # words of a document
STRING = 4, 48  # keys of a string that comes again
DENSITY = 0.02, 0.5  # keys a word, so far as there are keys
TEXT = "the sea is calm and a shoal of fish swims by under grey boats while gulls call over sand"
WORDS = TEXT.split()


def find_words(text: str) -> list[str]:
    """Words to hide facts among."""
    return re.sub(rf"[{MARK}\d]", "", text).split()


def recall_documents(
    count: int, longest: int, seed: int, form: Form = "facts", words: Sequence[str] = WORDS
) -> Iterator[Document]:
    """`count` documents of at most `longest` words, a fact one of them; the words of `facts` are stretches of
    `words`."""
    if count < 1 or longest < SHORTEST:
        raise ValueError(
            f"{count} documents of at most {longest} words are asked for; ask for 1 at least, of {SHORTEST}"
        )
    if not words:
        raise ValueError("there are no words to hide facts among; name files with text in them")
    for number in range(count):
        rng = random.Random(f"recall {form} {seed} {number}")
        size = round(_draw(rng, SHORTEST, longest))
        text = _strings(rng, size) if form == "strings" else _facts(rng, size, words)
        yield Document(text, f"recall-{form}-{number}")


def _strings(rng: random.Random, size: int) -> str:
    keys = rng.choices(ALL.keys, k=round(_draw(rng, *STRING)))
    string = [key + rng.choice(("", rng.choice(ALL.values))) for key in keys]
    return "".join(string[n % len(string)] for n in range(size))


def _facts(rng: random.Random, size: int, words: Sequence[str]) -> str:
    wanted = round(size * _draw(rng, *DENSITY))
    told: list[tuple[float, str]] = []
    for key in rng.sample(TOLD.keys, min(max(wanted, 1), len(TOLD.keys))):
        fact, place = key + rng.choice(TOLD.values), size * rng.random()
        while place < size:
            told.append((place, fact))
            place += _draw(rng, 1, size)
    rest, first = max(size - len(told), 0), rng.randrange(len(words))
    told += [(size * n / rest, " " + words[(first + n) % len(words)]) for n in range(rest)]
    return "".join(word for _, word in sorted(told))


def _draw(rng: random.Random, least: float, most: float) -> float:
    """Evenly by the logarithm."""
    return least * (most / least) ** rng.random()
