"""Event, Portion and Completion: what a request is told, token by token, step by step or at its end.

They are frozen and hold no text: the ids are the caller's to read, and stop strings the caller's to find.

Shape letters: N positions, L layers that route, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import repeat
from typing import NamedTuple

from torch import Tensor

from shoal.engine.sequence import FinishReason, Scored, Top


@dataclass(frozen=True, eq=False)
class Routed:
    """Where positions were sent, from `start` on."""

    start: int
    experts: Tensor  # (N, L, K) int16, best first; -1 where the choice was dropped
    weights: Tensor | None  # (N, L, K) float16, where the engine keeps them


class Event(NamedTuple):
    """A request got a token, or ended, or both.

    `token` and `logprob` are None where it ended without one: it was cancelled, its logits are not numbers
    (`error` says which), or it asked for none.
    """

    request: int
    token: int | None
    logprob: float | None
    top: Top  # as many as the request asked for
    finish: FinishReason | None
    cached: int = 0  # positions of the prompt that the prefix cache had
    began: float | None = None  # when its first step was launched, by time.monotonic(); None: it had none
    prompt_logprobs: tuple[float, ...] | None = None  # on the first: of each prompt token but the first
    prompt_tops: tuple[Top, ...] | None = None
    routing: Tensor | None = None  # on the last: (positions - 1, L, K) int16
    error: str | None = None
    routed: Routed | None = None  # positions before its token, not told yet


class Portion(NamedTuple):
    """What a request gets in a step, or in several that were launched together: tokens, its end, or both."""

    request: int
    tokens: list[int]
    logprobs: list[float]
    tops: list[Top] | None  # None where nobody asked for any
    finish: FinishReason | None
    cached: int
    began: float | None
    prompt: list[Scored] | None = None  # with the first, where it was asked for
    routing: Tensor | None = None
    error: str | None = None
    routed: Routed | None = None

    @property
    def scores(self) -> tuple[tuple[float, ...], tuple[Top, ...]] | tuple[None, None]:
        """Of the prompt: log-probabilities, and the most probable; None where nobody asked."""
        if self.prompt is None:
            return None, None
        return tuple(zip(*self.prompt, strict=True)) or ((), ())  # type: ignore[return-value]

    def events(self) -> list[Event]:
        """The same token by token."""
        known = self.cached, self.began
        tops = self.tops or repeat(())
        rows = zip(self.tokens, self.logprobs, tops, strict=False)
        events = [Event(self.request, *row, None, *known) for row in rows]
        if not events:
            events = [Event(self.request, None, None, (), None, *known)]
        if self.prompt is not None or self.routed is not None:
            logprobs, tops = self.scores
            events[0] = events[0]._replace(prompt_logprobs=logprobs, prompt_tops=tops, routed=self.routed)
        if self.finish is not None:
            events[-1] = events[-1]._replace(finish=self.finish, routing=self.routing, error=self.error)
        return events


@dataclass(frozen=True)
class Completion:
    """All that a request got. The token that stopped it is the last of the ids."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    tops: tuple[Top, ...]
    finish: FinishReason
    cached: int = 0
    prompt_logprobs: tuple[float, ...] | None = None
    prompt_tops: tuple[Top, ...] | None = None
    routing: Tensor | None = field(default=None, compare=False)


class Gathered:
    """What a request has got so far."""

    def __init__(self) -> None:
        self._first: Portion | None = None
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._tops: list[Top] = []

    def add(self, portion: Portion) -> Completion | None:
        """All of it, once it is whole."""
        first = self._first = self._first or portion
        self._tokens += portion.tokens
        self._logprobs += portion.logprobs
        self._tops += portion.tops or [()] * len(portion.tokens)
        if portion.finish is None:
            return None
        prompt_logprobs, prompt_tops = first.scores
        return Completion(
            ids=tuple(self._tokens),
            logprobs=tuple(self._logprobs),
            tops=tuple(self._tops),
            finish=portion.finish,
            cached=first.cached,
            prompt_logprobs=prompt_logprobs,
            prompt_tops=prompt_tops,
            routing=portion.routing,
        )


def complete(events: list[Event]) -> Completion:
    """All events of one request, in order, as one."""
    first, last = events[0], events[-1]
    assert last.finish is not None
    return Completion(
        ids=tuple(event.token for event in events if event.token is not None),
        logprobs=tuple(event.logprob for event in events if event.logprob is not None),
        tops=tuple(event.top for event in events if event.token is not None),
        finish=last.finish,
        cached=first.cached,
        prompt_logprobs=first.prompt_logprobs,
        prompt_tops=first.prompt_tops,
        routing=last.routing,
    )
