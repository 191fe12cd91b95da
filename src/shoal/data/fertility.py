"""How many tokens a tokenizer spends on a character, by language: its fertility.

The languages are those that clean.py tells apart. The law: every tokenizer counts the same documents, without
BOS and EOS, so the rows can be compared. Lower is cheaper; a larger vocabulary should be.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers

from shoal.data.clean import CleanRules, judge
from shoal.data.read import Document
from shoal.data.workers import chunks

LANGUAGES = ("en", "zh", "code", "other")


@dataclass(frozen=True)
class Fertility:
    name: str
    vocab_size: int
    language: str
    documents: int
    characters: int
    num_bytes: int
    tokens: int

    @property
    def tokens_per_character(self) -> float:
        return self.tokens / self.characters

    @property
    def bytes_per_token(self) -> float:
        return self.num_bytes / self.tokens

    def table(self) -> dict[str, Any]:
        return asdict(self) | {
            "tokens_per_character": self.tokens_per_character,
            "bytes_per_token": self.bytes_per_token,
        }


def measure(documents: Iterable[Document], paths: Sequence[Path]) -> list[Fertility]:
    """A row a tokenizer and language, by language first. A path is a tokenizer.json or the folder of one."""
    known = [_load(path) for path in paths]
    sums: dict[str, list[int]] = {}  # documents, characters, bytes, then the tokens of each
    for chunk in chunks(documents):
        texts = [document.text for document in chunk]
        counts = [
            [len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
            for _, tokenizer in known
        ]
        for n, verdict in enumerate(judge(chunk, CleanRules(min_units=1))):
            row = sums.setdefault(verdict.language, [0] * (3 + len(known)))
            measured = (1, len(texts[n]), len(texts[n].encode()), *(each[n] for each in counts))
            sums[verdict.language] = [a + b for a, b in zip(row, measured, strict=True)]
    return [
        Fertility(name, tokenizer.get_vocab_size(), language, row[0], row[1], row[2], row[3 + k])
        for language in LANGUAGES
        if (row := sums.get(language)) is not None
        for k, (name, tokenizer) in enumerate(known)
    ]


def _load(path: Path) -> tuple[str, tokenizers.Tokenizer]:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no tokenizer at {path}; give a tokenizer.json or a folder with one")
    try:
        return path.name.removesuffix(".tokenizer.json"), tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library has no narrower one
        raise ValueError(f"{file} cannot be read as a tokenizer.json: {error}") from error
