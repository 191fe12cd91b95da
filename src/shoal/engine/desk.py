"""Desk: who is being served, and what they are told: each token as it lands, and the end.

The routing record of a request that ends lies in its pages. Those of all that end in a step are gathered in
one launch and travel in one parcel, so a last token that comes with a record is told when that is here: a
step later, where steps overlap.

The law: a request is told each of its tokens once, in order, and its end once; who asks for nothing more than
tokens costs the host little more than the tokens.
"""

from __future__ import annotations

import math
from itertools import takewhile
from typing import NamedTuple

from shoal.engine import staging
from shoal.engine.events import Portion
from shoal.engine.flight import open_routed
from shoal.engine.order import Order
from shoal.engine.runner import Runner
from shoal.engine.sampling import Samples
from shoal.engine.scheduler import Pick, Scheduler
from shoal.engine.sequence import FinishReason, Scored, Sequence


class Desk:
    def __init__(self, scheduler: Scheduler, runner: Runner, order: Order) -> None:
        self._scheduler, self._runner, self._order = scheduler, runner, order
        self.live: dict[int, Sequence] = {}
        self.generated = 0
        self._ended: list[Portion] = []
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
        self._ended += self._leave(_end(sequence, "cancelled"), sequence, sequence.pages, known)
        self.send()
        self._drop(sequence)
        return True

    def deliver(self) -> list[Portion]:
        """Ends that have not been told. Waits for the records that were sent."""
        told, sent = self._ended, self._sent
        self._ended, self._sent = [], []
        for leaving, parcel in sent:
            experts = parcel.open()[0].split([each.known for each in leaving])
            told += [
                each.last._replace(routing=rows.clone()) for each, rows in zip(leaving, experts, strict=True)
            ]
        return told

    def send(self) -> None:
        """Send home the records of those that have ended, before their pages are written again."""
        leaving, self._leaving = self._leaving, []
        if leaving:
            rows = self._runner.records.gather([(each.pages, 0, each.known) for each in leaving])
            self._sent.append((leaving, staging.Parcel(rows)))

    def read(self, sequence: Sequence, sent: tuple[int, staging.Parcel] | None) -> list[Portion]:
        """A prompt has been read that wanted no more."""
        if sequence.request not in self.live:
            return []
        last = _end(sequence, "length")._replace(
            prompt=_scores(sequence), routed=open_routed(sent, sequence.num_prompt)
        )
        told = self._leave(last, sequence, sequence.pages, sequence.num_prompt - 1)
        self._drop(sequence)
        return told

    def take(
        self, pick: Pick, drawn: Samples, flown: int, sent: tuple[int, staging.Parcel] | None
    ) -> list[Portion]:
        """A sequence gets the tokens that were drawn for it, and stand; `flown` as for `Scheduler.commit`."""
        sequence = pick.sequence
        tokens, logprobs, tops, finite = drawn
        if not finite:
            tokens = [
                token
                for token, _ in takewhile(
                    lambda row: math.isfinite(row[1]), zip(tokens, logprobs, strict=True)
                )
            ]
        if not tokens:
            return [self._break_nonfinite(sequence)]
        # Nothing is drawn ahead where there is a grammar: there is one token.
        if sequence.matcher is not None and not sequence.matcher.accept(tokens[0]):
            return [self._break(sequence, "are of no use: no token of the vocabulary can go on its grammar")]
        prompt = _scores(sequence) if len(sequence.ids) == sequence.num_prompt else None
        request, pages = sequence.request, sequence.pages
        taken = self._scheduler.commit(sequence, tokens, flown)
        count = len(taken)
        self.generated += count
        if count < len(logprobs):
            logprobs, tops = logprobs[:count], None if tops is None else tops[:count]
        known = len(sequence.ids) - 1  # a guess that was wrong went through experts that the text does not
        if pick.num_drafts:
            sequence.num_routed = min(sequence.num_routed, known)
        routed = None if sent is None else open_routed(sent, known)
        finish, cached = sequence.finish, sequence.cached or 0
        portion = Portion(
            *(request, taken, logprobs, tops, finish, cached, sequence.began, prompt), routed=routed
        )
        if finish is not None:
            del self.live[request]
            self._order.learn(sequence, lambda: self._runner.records.experts(pages, known))
            return self._leave(portion, sequence, pages, known)
        if len(tokens) < len(drawn.tokens):
            return [portion, self._break_nonfinite(sequence)]
        return [portion]

    def _leave(self, last: Portion, sequence: Sequence, pages: list[int], known: int) -> list[Portion]:
        """The last of a request, unless it has to wait for a record."""
        if not sequence.params.routing or not pages:
            return [last]
        self._leaving.append(_Leaving(last, pages, known))
        return []

    def _break_nonfinite(self, sequence: Sequence) -> Portion:
        dtype = self._runner.model.head_weight().dtype
        return self._break(sequence, f"are not finite; the weights are broken, or overflow {dtype}")

    def _break(self, sequence: Sequence, why: str) -> Portion:
        """A request ends that nothing can be drawn for; nobody finds what its pages hold."""
        self._scheduler.forget(sequence)
        self._drop(sequence)
        error = f"request {sequence.request}: the logits of token {len(sequence.ids)} {why}"
        return _end(sequence, "error")._replace(error=error)

    def _drop(self, sequence: Sequence) -> None:
        del self.live[sequence.request]
        self._scheduler.remove(sequence)


class _Leaving(NamedTuple):
    """The last portion of a request whose record is still in its pages."""

    last: Portion
    pages: list[int]
    known: int  # positions


def _end(sequence: Sequence, finish: FinishReason) -> Portion:
    """An end without a token."""
    return Portion(sequence.request, [], [], None, finish, sequence.cached or 0, sequence.began)


def _scores(sequence: Sequence) -> list[Scored] | None:
    """Of its prompt, where they were asked for."""
    return None if sequence.params.prompt_logprobs is None else list(sequence.scores)
