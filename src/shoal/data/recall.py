"""Text in which things are told and told again: text to practise looking back on.

Three forms. `strings`: symbols without order or meaning, each string told twice before the next. `facts`:
words of other text with facts among them, "#ba=di", a key and its value, told again from a word to a document
later (evenly by the logarithm). A key has one value in a document and another in the next; in half of the
documents keys and values change places. `words`: no facts, to hide needles in. A small model that begins with
facts learns to guess among the values it has seen, so strings come first; with few keys it learns these and
not to look (LOG.md, 2026-11-29).

The law: a document is a function of the words, the seed and its number. No fact has a key of `HELD_OUT`, keys
to test with; strings have them, or their tokens would mean nothing. A tokenizer trained on this text has each
key and each value as one token, whatever stands beside it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import Literal

from shoal.data.read import Document

Form = Literal["strings", "facts", "words"]


def _symbols(mark: str, consonants: str) -> tuple[str, ...]:
    return tuple(mark + consonant + vowel for consonant in consonants for vowel in "aeiou")


TOLD, HELD_OUT = _symbols("#", "bdfg"), _symbols("#", "vz")  # keys
VALUES = _symbols("=", "bdfgvz")

LEAST = 16  # words of a document
STRING = 4  # symbols at least, and half of the document at most
DENSITY = 0.02, 0.5  # keys a word, so far as there are keys
TEXT = "the sea is calm and a shoal of fish swims by under grey boats while gulls call over sand"
WORDS = TEXT.split()


def find_words(text: str) -> list[str]:
    """Words to hide facts among: letters alone, for a tokenizer joins a mark to punctuation before it."""
    return re.findall(r"[^\W\d_]+", text)


def recall_documents(
    count: int,
    lengths: tuple[int, int],
    seed: int,
    form: Form = "facts",
    words: Sequence[str] = WORDS,
) -> Iterator[Document]:
    """`count` documents of so many words, from the first to the second of `lengths`; a fact is one, and so is
    a symbol of a string. The words of `facts` are stretches of `words`."""
    shortest, longest = lengths
    if count < 1 or not LEAST <= shortest <= longest:
        raise ValueError(
            f"{count} documents of {shortest} to {longest} words are asked for; ask for 1 at least, of "
            f"{LEAST} words or more"
        )
    if not words:
        raise ValueError("there are no words to hide facts among; name files with text in them")
    for number in range(count):
        rng = random.Random(f"recall {form} {seed} {number}")
        size = round(_draw(rng, shortest, longest))
        text = _strings(rng, size) if form == "strings" else _words(rng, size, words, form == "facts")
        yield Document(text, f"recall-{form}-{number}")


def _strings(rng: random.Random, size: int) -> str:
    told: list[str] = []
    while len(told) < size:
        told += 2 * rng.choices(TOLD + HELD_OUT + VALUES, k=round(_draw(rng, STRING, size / 2)))
    return "".join(told[:size])


def _words(rng: random.Random, size: int, words: Sequence[str], facts: bool) -> str:
    wanted = round(size * _draw(rng, *DENSITY)) or 1
    told: list[tuple[float, str]] = []
    keys, values = rng.choice(((TOLD, VALUES), (VALUES, TOLD)))
    for key in rng.sample(keys, min(wanted, len(keys)) if facts else 0):
        fact, place = key + rng.choice(values), size * rng.random()
        while place < size:
            told.append((place, fact))
            place += _draw(rng, 1, size)
    rest, first = max(size - len(told), 0), rng.randrange(len(words))
    told += [(size * n / rest, " " + words[(first + n) % len(words)]) for n in range(rest)]
    return "".join(word for _, word in sorted(told))


def _draw(rng: random.Random, least: float, most: float) -> float:
    """Evenly by the logarithm."""
    return least * (most / least) ** rng.random()
