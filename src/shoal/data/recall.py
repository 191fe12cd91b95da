"""Text in which facts are told and told again: text to practise looking back on.

A document is sentences without meaning among facts, "qz is 47." Each key has one value in a document, another
in the next, so a fact that comes again can only be known by finding it. The law: a document is a function of
the seed and its number.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator

from shoal.data.read import Document

TEXT = "the sea is calm and a shoal of fish swims by under grey boats while gulls call over sand"
WORDS = TEXT.split()
FILLER = 0.15  # of the sentences
AGAIN = 0.75  # of the facts, one that was told before


def recall_documents(count: int, characters: int, seed: int) -> Iterator[Document]:
    """`count` documents of at least `characters` each."""
    if count < 1 or characters < 1:
        raise ValueError(f"{count} documents of {characters} characters are none; ask for 1 at least")
    for number in range(count):
        yield Document(_write(random.Random(f"recall {seed} {number}"), characters), f"recall-{number}")


def _write(rng: random.Random, characters: int) -> str:
    facts: dict[str, int] = {}
    sentences: list[str] = []
    while sum(map(len, sentences)) < characters:
        if rng.random() < FILLER:
            sentences.append(" ".join(rng.choices(WORDS, k=rng.randint(3, 7))) + ".\n")
            continue
        if facts and rng.random() < AGAIN:
            key = rng.choice(list(facts))
        else:
            key = "".join(rng.choices(string.ascii_lowercase, k=2))
            facts.setdefault(key, rng.randint(10, 99))
        sentences.append(f"{key} is {facts[key]}.\n")
    return "".join(sentences)
