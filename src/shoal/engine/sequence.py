"""Sequence: one request while it lives. SamplingParams: what the request asked for.

A sequence is its token ids, the pages that hold their keys and values, and how many positions those pages
hold so far. There is no phase: a prompt being read in chunks, a token being decoded, a sequence computed
again after it lost its pages are all ids whose positions are not computed yet. The last ids may still be on
their way from the device (`num_flying`): they count, though the host does not know them.

The law: `num_computed <= length`, and a token is sampled exactly when the two would meet.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from shoal.engine.grammar import Grammar, Matcher

Top = tuple[tuple[int, float], ...]  # (token, logprob), best first
FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    A token is drawn from softmax(logits / temperature), restricted to the `top_k` most probable, then to the
    fewest whose probabilities, renormalised, reach `top_p`, and to those at least `min_p` times as probable
    as the best; equals of the last one kept are kept too. Temperature 0 takes the best token, the lowest id
    among equals. The same `seed` gives the same tokens whatever else is being served; without one the engine
    gives each request its own.

    `stop_token_ids` end the text beside the model's own end-of-sequence ids, which `ignore_eos` disregards;
    none of them is drawn before `min_tokens`. `max_tokens` None goes on as far as the context allows; 0 only
    reads the prompt, for its log-probabilities.

    `logprobs` asks for that many of the most probable tokens at each position, `prompt_logprobs` for the
    log-probability of each prompt token after the first, and for that many of the most probable beside it.

    What the logits undergo before they are a distribution, in this order: those of tokens that the prompt or
    the text has are divided by `repetition_penalty` if positive, multiplied if negative (Keskar et al. 2019,
    arXiv 1909.05858); each loses `frequency_penalty` times how often the text has the token, and
    `presence_penalty` if it has it at all (OpenAI's); `logit_bias` is added to the ids it names. Tokens that
    `grammar` does not allow next are never drawn; with `think_end_id` it begins after that token.

    Requests of a lower `priority` go first. `routing` asks for the experts that each position was sent to, at
    the end; `routing_from` for those of the positions from there on, with each token as it comes. The last
    token of a text has gone through no expert yet.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int = 0
    prompt_logprobs: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    priority: int = 0
    grammar: Grammar | None = None
    think_end_id: int | None = None
    routing: bool = False
    routing_from: int | None = None

    def __post_init__(self) -> None:
        most, least = self.max_tokens, 1 if self.prompt_logprobs is None else 0
        biased = [token for token, _ in self.logit_bias]
        rules = (
            ("temperature", 0 <= self.temperature < math.inf, "finite and at least 0, where 0 is greedy"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1, where 1 keeps every token"),
            ("top_k", self.top_k is None or self.top_k > 0, "at least 1, or None to keep every token"),
            ("min_p", 0 <= self.min_p <= 1, "between 0, which keeps every token, and 1"),
            ("seed", self.seed is None or 0 <= self.seed < 2**64, "between 0 and 2**64 - 1"),
            (
                "max_tokens",
                most is None or most >= least,
                "at least 1 (0 with prompt_logprobs), or None for all the context has room for",
            ),
            (
                "min_tokens",
                0 <= self.min_tokens <= (math.inf if most is None else most),
                f"at least 0, at most max_tokens {most}",
            ),
            ("logprobs", self.logprobs >= 0, "at least 0"),
            ("prompt_logprobs", (self.prompt_logprobs or 0) >= 0, "at least 0, or None for none"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "finite"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "finite"),
            (
                "repetition_penalty",
                0 < self.repetition_penalty < math.inf,
                "finite and above 0, where 1 is none",
            ),
            (
                "logit_bias",
                len(set(biased)) == len(biased) and all(math.isfinite(bias) for _, bias in self.logit_bias),
                "one finite number an id",
            ),
            (
                "think_end_id",
                self.think_end_id is None or self.grammar is not None,
                "None where there is no grammar to begin after it",
            ),
        )
        for name, valid, rule in rules:
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {rule}")

    def seeded(self, seed: int) -> SamplingParams:
        """The same with this seed, without looking at all the others again."""
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}; it must be between 0 and 2**64 - 1")
        same = object.__new__(SamplingParams)
        vars(same).update(vars(self), seed=seed)
        return same

    @cached_property
    def penalises(self) -> bool:
        """Whether the ids before a token change its distribution."""
        return (self.frequency_penalty, self.presence_penalty, self.repetition_penalty) != (0, 0, 1)


_NONE: frozenset[int] = frozenset()


class Scored(NamedTuple):
    """A given token's log-probability, and the most probable ones in its place."""

    logprob: float
    top: Top


@dataclass(slots=True, eq=False)
class Sequence:
    ids: list[int]  # the prompt, then what was sampled and has reached the host
    params: SamplingParams
    request: int = 0
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    max_len: int = sys.maxsize  # the sequence is finished when it has this many ids
    num_prompt: int = field(init=False)
    num_needed: int = field(init=False)  # ids that go through the model: the last one of all need not
    pages: list[int] = field(default_factory=list)  # while it runs; written by the scheduler
    row: int = -1  # its place among those that run
    num_computed: int = 0  # positions whose keys and values lie in the pages, or will when the step is done
    num_flying: int = 0  # tokens drawn on the device that have not reached the host
    num_routed: int = 0  # positions whose experts were told, or are on their way
    num_drafts: int = 0  # tokens guessed ahead, on the device
    num_kept: int = 0  # pages, from the first, that the pool knows the contents of
    node: int = 0  # the pool's name for those contents
    began: float | None = None  # when its first step was launched, by time.monotonic()
    cached: int | None = None  # positions that the pool had when it was first admitted
    scores: list[Scored] = field(default_factory=list)  # of the prompt's tokens after the first, if asked for
    passed: int = 0  # later requests of its priority that were admitted while it waited
    group: tuple[int, int] | None = None  # what the order takes it for, of how many groups
    matcher: Matcher | None = None  # where its text stands in its grammar
    finish: FinishReason | None = None

    def __post_init__(self) -> None:
        self.num_prompt = len(self.ids)
        self.num_needed = self.max_len - 1 if self.max_len > self.num_prompt else self.num_prompt

    @property
    def length(self) -> int:
        """Ids, those on their way included."""
        return len(self.ids) + self.num_flying

    @property
    def num_pending(self) -> int:
        """Ids that have yet to go through the model."""
        return min(len(self.ids) + self.num_flying, self.num_needed) - self.num_computed

    @property
    def room(self) -> int:
        """How many ids more it may have."""
        return self.max_len - len(self.ids) - self.num_flying

    @property
    def banned_ids(self) -> frozenset[int]:
        """Ids that may not be drawn next."""
        return self.bans(self.length)

    def bans(self, position: int) -> frozenset[int]:
        """Ids that may not be drawn at a position."""
        return self.stop_ids if position - self.num_prompt < self.params.min_tokens else _NONE

    def take(self, tokens: list[int]) -> list[int]:
        """Those of them that come before the end, which may be one of them."""
        tokens = tokens[: self.max_len - len(self.ids)]
        if not self.stop_ids.isdisjoint(tokens):
            last = next(at for at, token in enumerate(tokens) if token in self.stop_ids)
            tokens, self.finish = tokens[: last + 1], "stop"
        self.ids += tokens
        if self.finish is None and len(self.ids) >= self.max_len:
            self.finish = "length"
        return tokens
