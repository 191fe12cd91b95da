"""Grammar: what a text must look like, as a request says it.

A grammar is a frozen spec that travels with the request, so that a mistake in it is told when the request is
made and two requests that ask for the same are seen to. `Vocabulary` is what the ids mean, handed to the
engine by whoever has the tokenizer: the engine itself knows no text. `GrammarCompiler` makes one out of
both, by xgrammar, which is imported when the first request asks for it; `Matcher` is where a text stands.

JSON may be spaced and indented, but only so far: a model that is unsure would else write blanks for ever.

The law: after every token the text can still be completed, and it ends only where the grammar does.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from shoal.engine import staging

MOST_BLANKS = 40  # in a row between two tokens of JSON: a line break and ten levels indented by four
MOST_BYTES = 1 << 30  # of compiled grammars that are remembered
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
    for bytes (`byte_level`), or SentencePiece's (`byte_fallback`: a space is U+2581, a byte <0xNN>). Empty
    for an id without text, such as a control token: no grammar allows it.
    """

    tokens: tuple[str, ...]
    kind: VocabularyKind

    def __post_init__(self) -> None:
        if self.kind not in get_args(VocabularyKind):
            raise ValueError(
                f"vocabulary kind is {self.kind!r}; it must be one of {', '.join(get_args(VocabularyKind))}"
            )


class Matcher:
    """Where one text stands in its grammar. With `think_end_id` the grammar begins after that token."""

    def __init__(self, matcher: Any, think_end_id: int | None) -> None:
        self._matcher, self._think_end_id = matcher, think_end_id

    def accept(self, token: int) -> bool:
        """The text goes on with a token. False if it may not, as where the vocabulary has none that may."""
        if self._think_end_id is not None:
            if token == self._think_end_id:
                self._think_end_id = None
        elif not self._matcher.is_terminated():
            return self._matcher.accept_token(token)
        return True

    def fill(self, words_SW: Tensor, row: int) -> None:
        """Write which tokens may come next: bit i of word w is token 32 w + i."""
        if self._think_end_id is None:
            self._matcher.fill_next_token_bitmask(words_SW, row)


class GrammarCompiler:
    """Grammars over one vocabulary; those compiled before are remembered."""

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, stop_ids: frozenset[int]) -> None:
        if len(vocabulary.tokens) > vocab_size:
            raise ValueError(
                f"the vocabulary handed in has {len(vocabulary.tokens)} tokens, the model {vocab_size}; "
                f"give the tokens of this model"
            )
        import xgrammar

        self._xgrammar = xgrammar
        kinds = xgrammar.VocabType
        kind = {"raw": kinds.RAW, "byte_level": kinds.BYTE_LEVEL, "byte_fallback": kinds.BYTE_FALLBACK}
        info = xgrammar.TokenizerInfo(
            list(vocabulary.tokens),
            kind[vocabulary.kind],
            vocab_size=vocab_size,
            stop_token_ids=sorted(stop_ids),
        )
        threads = min(8, max(1, (os.cpu_count() or 1) // 2))  # the others go on being served
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=threads, cache_limit_bytes=MOST_BYTES)

    def match(self, grammar: Grammar, stop_ids: frozenset[int], think_end_id: int | None) -> Matcher:
        """A text at its beginning, which may end by these ids. ValueError if the grammar is none."""
        try:
            compiled = self._compile(grammar)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"grammar {grammar.kind} is {grammar.text[:200]!r}; it cannot be compiled: {reason}"
            ) from error
        matcher = self._xgrammar.GrammarMatcher(compiled, override_stop_tokens=sorted(stop_ids))
        return Matcher(matcher, think_end_id)

    def _compile(self, grammar: Grammar) -> Any:
        compiler, text = self._compiler, grammar.text
        match grammar.kind:
            case "json_schema":
                return compiler.compile_json_schema(text, max_whitespace_cnt=MOST_BLANKS)
            case "json_object":
                return compiler.compile_json_schema('{"type": "object"}', max_whitespace_cnt=MOST_BLANKS)
            case "regex":
                return compiler.compile_regex(text)
            case "ebnf":
                return compiler.compile_grammar(text)
            case "choice":
                choices = json.loads(text)
                if not choices or not all(isinstance(choice, str) for choice in choices):
                    raise ValueError("a choice is a JSON list of strings")
                return compiler.compile_grammar("root ::= " + " | ".join(map(json.dumps, choices)))


class Grammars:
    """The grammars that the requests of one engine ask for; made ready when the first asks. Threads may ask
    at once: the compiler allows it, and lets others run."""

    def __init__(self, vocabulary: Vocabulary | None, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._vocabulary, self._vocab_size, self._eos_ids = vocabulary, vocab_size, eos_ids
        self._compiler: GrammarCompiler | None = None
        self._making = threading.Lock()

    def match(
        self, grammar: Grammar, stop_ids: frozenset[int], *, think_end_id: int | None, min_tokens: int
    ) -> Matcher:
        """A text at its beginning, which may end by these ids."""
        if self._vocabulary is None:
            raise ValueError("grammar needs a vocabulary; hand one to Engine(model, settings, vocabulary)")
        if not stop_ids:
            raise ValueError(
                "grammar needs a token to end with, but there is none; give stop_token_ids, or leave out "
                "ignore_eos"
            )
        if min_tokens:
            raise ValueError(
                f"min_tokens is {min_tokens}, but a grammar says when it ends; leave one of them out"
            )
        with self._making:
            if self._compiler is None:
                self._compiler = GrammarCompiler(self._vocabulary, self._vocab_size, self._eos_ids)
        return self._compiler.match(grammar, stop_ids, think_end_id)


def allow(matchers: list[Matcher | None], vocab_size: int, device: torch.device) -> Tensor | None:
    """Which tokens each row may go on with (S, V), on the device; None if no row has a grammar."""
    if not any(matchers):
        return None
    words_SW = torch.full((len(matchers), -(-vocab_size // 32)), -1, dtype=torch.int32)
    for row, matcher in enumerate(matchers):
        if matcher is not None:
            matcher.fill(words_SW, row)
    (words_SW,) = staging.send([words_SW.numpy()], device)
    bits_32 = torch.arange(32, dtype=torch.int32, device=device)
    return ((words_SW.unsqueeze(-1) >> bits_32) & 1).bool().flatten(1)[:, :vocab_size]
