"""Desk: who is being served, and what they are told: each token as it lands, and the end.

The routing record of a request that ends lies in its pages. Those of all that end in a step are gathered in
one launch and travel in one parcel, so a last token that comes with a record is told when that is here: a
step later, where steps overlap.

The law: a request is told each of its tokens once, in order, and its end once; who asks for nothing more than
tokens costs the host little more than the tokens.
"""

from __future__ import annotations

import math
from itertools import repeat
from typing import NamedTuple

from shoal.engine import staging
from shoal.engine.events import Event, Routed
from shoal.engine.flight import open_routed
from shoal.engine.order import Order
from shoal.engine.runner import Runner
from shoal.engine.sampling import Samples
from shoal.engine.scheduler import Pick, Scheduler
from shoal.engine.sequence import FinishReason, Sequence


class _Leaving(NamedTuple):
    """The last event of a request whose record is still in its pages."""

    event: Event
    pages: list[int]
    known: int  # positions


class Desk:
    def __init__(self, scheduler: Scheduler, runner: Runner, order: Order) -> None:
        self._scheduler, self._runner, self._order = scheduler, runner, order
        self.live: dict[int, Sequence] = {}
        self.generated = 0
        self._ended: list[Event] = []
        self._leaving: list[_Leaving] = []
        self._sent: list[tuple[list[_Leaving], staging.Parcel]] = []

    @property
    def busy(self) -> bool:
        """Whether somebody lives, or an end is still to be told."""
        return bool(self.live or self._ended or self._sent)

    def add(self, sequence: Sequence) -> None:
        self._scheduler.add(sequence)
        self.live[sequence.request] = sequence

    def cancel(self, request: int) -> bool:
        """Its end is told by the next `deliver`. False if there is none."""
        sequence = self.live.get(request)
        if sequence is None:
            return False
        known = min(len(sequence.ids) - 1, sequence.num_computed)
        self._ended += self._leave(self._event(sequence, "cancelled"), sequence, sequence.pages, known)
        self.send()
        self._drop(sequence)
        return True

    def deliver(self) -> list[Event]:
        """Ends that have not been told. Waits for the records that were sent."""
        events, sent = self._ended, self._sent
        self._ended, self._sent = [], []
        for leaving, parcel in sent:
            experts = parcel.open()[0].split([each.known for each in leaving])
            events += [
                each.event._replace(routing=rows.clone()) for each, rows in zip(leaving, experts, strict=True)
            ]
        return events

    def send(self) -> None:
        """Send home the records of those that have ended, before their pages are written again."""
        leaving, self._leaving = self._leaving, []
        if leaving:
            rows = self._runner.records.gather([(each.pages, 0, each.known) for each in leaving])
            self._sent.append((leaving, staging.Parcel(rows)))

    def read(self, sequence: Sequence, sent: tuple[int, staging.Parcel] | None) -> list[Event]:
        """A prompt has been read that wanted no more."""
        if sequence.request not in self.live:
            return []
        routed = open_routed(sent, sequence.num_prompt)
        event = _with_prompt(self._event(sequence, "length", routed=routed), sequence)
        events = self._leave(event, sequence, sequence.pages, sequence.num_prompt - 1)
        self._drop(sequence)
        return events

    def take(
        self, pick: Pick, drawn: Samples, flown: int, sent: tuple[int, staging.Parcel] | None
    ) -> list[Event]:
        """A sequence gets the tokens that were drawn for it, and stand; `flown` as for `Scheduler.commit`."""
        sequence, tokens = pick.sequence, drawn.tokens
        if sequence.request not in self.live:
            return []
        if not all(map(math.isfinite, drawn.logprobs)):
            tokens = tokens[: next(at for at, value in enumerate(drawn.logprobs) if not math.isfinite(value))]
        # Nothing is drawn ahead where there is a grammar: there is one token.
        if tokens and sequence.matcher is not None and not sequence.matcher.accept(tokens[0]):
            return [self._break(sequence, "are of no use: no token of the vocabulary can go on its grammar")]
        first, pages = len(sequence.ids) == sequence.num_prompt, sequence.pages
        taken = self._scheduler.commit(sequence, tokens, flown) if tokens else []
        self.generated += len(taken)
        request, cached, began = sequence.request, sequence.cached or 0, sequence.began
        events = [
            Event(request, token, logprob, top, None, cached, began)
            for token, logprob, top in zip(taken, drawn.logprobs, drawn.tops or repeat(()), strict=False)
        ]
        known = len(sequence.ids) - 1  # a guess that was wrong went through experts that the text does not
        if taken and first:
            events[0] = _with_prompt(events[0], sequence)
        if taken and sent is not None:
            events[0] = events[0]._replace(routed=open_routed(sent, known))
        if pick.num_drafts:
            sequence.num_routed = min(sequence.num_routed, known)
        if sequence.finish:
            del self.live[request]
            self._order.learn(sequence, lambda: self._runner.records.experts(pages, known))
            events += self._leave(events.pop()._replace(finish=sequence.finish), sequence, pages, known)
        elif len(tokens) < len(drawn.tokens):
            dtype = self._runner.model.head_weight().dtype
            why = f"are not finite; the weights are broken, or overflow {dtype}"
            events.append(self._break(sequence, why))
        return events

    def _leave(self, event: Event, sequence: Sequence, pages: list[int], known: int) -> list[Event]:
        """The last event of a request, unless it has to wait for a record."""
        if not sequence.params.routing or not pages:
            return [event]
        self._leaving.append(_Leaving(event, pages, known))
        return []

    def _break(self, sequence: Sequence, why: str) -> Event:
        """A request ends that nothing can be drawn for; nobody finds what its pages hold."""
        self._scheduler.forget(sequence)
        self._drop(sequence)
        error = f"request {sequence.request}: the logits of token {len(sequence.ids)} {why}"
        return self._event(sequence, "error", error=error)

    def _event(
        self,
        sequence: Sequence,
        finish: FinishReason,
        *,
        error: str | None = None,
        routed: Routed | None = None,
    ) -> Event:
        """An end without a token."""
        cached, began = sequence.cached or 0, sequence.began
        return Event(sequence.request, None, None, (), finish, cached, began, error=error, routed=routed)

    def _drop(self, sequence: Sequence) -> None:
        del self.live[sequence.request]
        self._scheduler.remove(sequence)


def _with_prompt(event: Event, sequence: Sequence) -> Event:
    """The first event of a request also has what was asked of its prompt."""
    if sequence.params.prompt_logprobs is None:
        return event
    logprobs = tuple(score.logprob for score in sequence.scores)
    return event._replace(prompt_logprobs=logprobs, prompt_tops=tuple(score.top for score in sequence.scores))
