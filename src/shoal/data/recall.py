"""Text in which things are told and told again: text to practise looking back on.

Three forms. `strings`: keys and values without meaning, each string told a few times before the next.
`lists`: up to ten facts told over and over, "#ba27", a key and its value, from nearly in order to in none.
`facts`: words of other text with facts among them. A key has one value in a list or among words, another in
the next document, so a fact told again can only be known by finding it; among words, how far back it stands
is spread evenly over the logarithm, from the next word to the whole document. A small model that begins with
facts learns to guess among the values it has seen (LOG.md, 2026-11-29); strings are to be learned before.

The law: a document is a function of the words, the seed and its number. Facts among words leave out
`HELD_OUT`, keys and values to test with; strings and lists have them, or their tokens would mean nothing. A
tokenizer trained on this text has each key and each value as one token.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from shoal.data.read import Document

Form = Literal["strings", "lists", "facts"]


class Symbols(NamedTuple):
    keys: tuple[str, ...]
    values: tuple[str, ...]


MARK = "#"  # before every key; the words between have none, and no digits
CONSONANTS, TESTED, VOWELS = "bdfg", "vz", "aeiou"
TOLD = Symbols(tuple(MARK + c + v for c in CONSONANTS for v in VOWELS), tuple(map(str, range(10, 30))))
HELD_OUT = Symbols(tuple(MARK + c + v for c in TESTED for v in VOWELS), tuple(map(str, range(90, 100))))
ALL = Symbols(TOLD.keys + HELD_OUT.keys, TOLD.values + HELD_OUT.values)

LEAST = 16  # words of a document
STRING = 3, 10  # keys of a string or a list
TIMES = 2, 8  # a string is told
DENSITY = 0.02, 0.5  # keys a word, so far as there are keys
TEXT = "the sea is calm and a shoal of fish swims by under grey boats while gulls call over sand"
WORDS = TEXT.split()


def find_words(text: str) -> list[str]:
    """Words to hide facts among."""
    return re.sub(rf"[{MARK}\d]", "", text).split()


def recall_documents(
    count: int,
    lengths: tuple[int, int],
    seed: int,
    form: Form = "facts",
    words: Sequence[str] = WORDS,
) -> Iterator[Document]:
    """`count` documents of so many words, from the first to the second of `lengths`; a fact is one. The words
    of `facts` are stretches of `words`."""
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
        match form:
            case "strings":
                text = _strings(rng, size)
            case "lists":
                text = _lists(rng, size)
            case "facts":
                text = _facts(rng, size, words)
        yield Document(text, f"recall-{form}-{number}")


def _strings(rng: random.Random, size: int) -> str:
    told: list[str] = []
    while len(told) < size:
        keys = rng.choices(ALL.keys, k=round(_draw(rng, *STRING)))
        told += round(_draw(rng, *TIMES)) * [key + rng.choice(("", rng.choice(ALL.values))) for key in keys]
    return "".join(told[:size])


def _lists(rng: random.Random, size: int) -> str:
    keys = rng.sample(ALL.keys, k=round(_draw(rng, *STRING)))
    facts, disorder, at = [key + rng.choice(ALL.values) for key in keys], rng.random(), -1
    told: list[str] = []
    for _ in range(size):
        at = rng.randrange(len(facts)) if rng.random() < disorder else (at + 1) % len(facts)
        told.append(facts[at])
    return "".join(told)


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
