"""Grammar: what a text must look like, as a request says it.

A grammar is a frozen spec that travels with the request, so that a mistake in it is told when the request is
made and two requests that ask for the same are seen to. `Vocabulary` is what the ids mean, handed to the
engine by whoever has the tokenizer: the engine itself knows no text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

GrammarKind = Literal["json_schema", "json_object", "regex", "ebnf", "choice"]
VocabularyKind = Literal["raw", "byte_level", "byte_fallback"]


@dataclass(frozen=True)
class Grammar:
    """`text` is a JSON schema, a regular expression, an EBNF grammar (xgrammar's, GBNF's notation, beginning
    at `root`), or a JSON list of strings to choose from; empty for any JSON object.
    """

    kind: GrammarKind
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind):
            raise ValueError(
                f"grammar is {self.kind!r}; it must be one of {', '.join(get_args(GrammarKind))}"
            )
        if bool(self.text) == (self.kind == "json_object"):
            raise ValueError(
                f"grammar {self.kind} has text {self.text!r}; "
                f"{'json_object takes none' if self.text else 'say what it is to follow'}"
            )


@dataclass(frozen=True)
class Vocabulary:
    """The text of each id, in the tokenizer's own spelling, which `kind` names: plain text, GPT-2's letters
    for bytes (`byte_level`), or SentencePiece's (`byte_fallback`: a space is U+2581, a byte <0xNN>).
    """

    tokens: tuple[str, ...]
    kind: VocabularyKind

    def __post_init__(self) -> None:
        if self.kind not in get_args(VocabularyKind):
            raise ValueError(
                f"vocabulary kind is {self.kind!r}; it must be one of {', '.join(get_args(VocabularyKind))}"
            )
