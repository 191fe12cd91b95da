"""Admission: from what a request asks for to a Sequence, or a refusal that names the value and the limit.

All that can be known of a request before it runs is settled here: its ids and bounds, where it ends, its
seed, its grammar. A grammar may take seconds to compile, so `prepare` does that ahead, in another thread if
the caller has others to serve; `admit` then finds it done.

The law: what is admitted can be served alone, to its end.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from shoal.config.model import ModelConfig
from shoal.engine.grammar import Grammars, Matcher, Vocabulary
from shoal.engine.records import check_record
from shoal.engine.sampling import hash_pair
from shoal.engine.sequence import SamplingParams, Sequence


class Admission:
    """`longest`: positions that a request may have; `seed`: what those without one are given theirs from."""

    def __init__(self, config: ModelConfig, longest: int, seed: int, vocabulary: Vocabulary | None) -> None:
        self.config, self.longest, self.seed = config, longest, seed
        eos = config.eos_token_id
        self._eos_ids = frozenset(eos if isinstance(eos, tuple) else () if eos is None else (eos,))
        self._grammars = Grammars(vocabulary, config.vocab_size, self._eos_ids)

    def admit(self, request: int, ids: list[int], params: SamplingParams) -> Sequence:
        """The request, ready to be scheduled. ValueError if it could never be served."""
        self._check_ids("prompt", ids)
        self._check_vocabulary("stop_token_ids", params.stop_token_ids)
        self._check_vocabulary("logit_bias", (token for token, _ in params.logit_bias))
        for name, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs or 0)):
            if count > self.config.vocab_size:
                raise ValueError(f"{name} is {count}; the vocabulary has {self.config.vocab_size} tokens")
        if (params.routing or params.routing_from is not None) and self.config.moe is None:
            raise ValueError("the experts are asked for, but this model routes nothing; do not ask for them")
        if params.routing_from is not None and not 0 <= params.routing_from <= len(ids):
            raise ValueError(
                f"routing_from is {params.routing_from}; it must be a position of the prompt, 0 to {len(ids)}"
            )
        return Sequence(
            ids=list(ids),
            params=params,
            request=request,
            seed=hash_pair(self.seed, request) if params.seed is None else params.seed,
            stop_ids=self._stop_ids(params),
            max_len=len(ids) + self._count_wanted(len(ids), params),
            matcher=self.prepare(params),
            num_routed=params.routing_from or 0,
        )

    def prepare(self, params: SamplingParams) -> Matcher | None:
        """Compile the grammar of a request, or find it compiled: safe in a thread beside the engine's.

        Where its text stands at its beginning; None without a grammar.
        """
        if params.grammar is None:
            return None
        return self._grammars.match(
            params.grammar,
            self._stop_ids(params),
            think_end_id=params.think_end_id,
            min_tokens=params.min_tokens,
        )

    def check_text(self, ids: list[int], routing: Tensor | None) -> None:
        """A text to be scored, and the experts that were recorded of it."""
        self._check_ids("text", ids)
        self._check_positions(len(ids), f"a text of {len(ids)} tokens", "score it in pieces")
        if routing is not None:
            check_record(self.config, routing, len(ids) - 1)

    def _check_ids(self, what: str, ids: list[int]) -> None:
        if not ids:
            raise ValueError(f"the {what} is empty; give at least one token, such as the beginning of text")
        self._check_vocabulary(f"the {what}", ids)

    def _check_positions(self, needed: int, what: str, fix: str) -> None:
        limit = self.config.max_position_embeddings
        if needed > limit:
            raise ValueError(
                f"{what} needs {needed} positions, but the model has {limit} (max_position_embeddings); {fix}"
            )

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_ids)

    def _check_vocabulary(self, what: str, ids: Iterable[int]) -> None:
        size = self.config.vocab_size
        wrong = [token for token in ids if not 0 <= token < size]
        if wrong:
            raise ValueError(
                f"{what} has token {wrong[0]}, outside the vocabulary of {size}; use the model's tokenizer"
            )

    def _count_wanted(self, num_prompt: int, params: SamplingParams) -> int:
        """Tokens a request may generate: what it says, or else all that the context has room for."""
        room = self.longest - num_prompt
        wanted = max(room, params.min_tokens, 1) if params.max_tokens is None else params.max_tokens
        self._check_positions(
            num_prompt + wanted,
            f"a prompt of {num_prompt} tokens with {wanted} to generate",
            "shorten the prompt or lower max_tokens",
        )
        return wanted
