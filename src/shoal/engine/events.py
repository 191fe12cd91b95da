"""Event and Completion: what a request is told, token by token or at its end.

They are frozen and hold no text: the ids are the caller's to read, and stop strings the caller's to find.

Shape letters: N positions, L layers that route, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from shoal.engine.sequence import FinishReason, Top


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
