"""Speculation: tokens guessed ahead by the model's own prediction module, verified by the model in one step.

A prediction module joins the hidden state of a token with the token after it and predicts the one after that.
Fed its own hidden state and its own guess it goes on, one position at a time: a chain of drafts. The next
step runs the model over the last token and all drafts of a sequence at once and draws, at every position,
what plain decoding would draw there: each draw depends on its logits, seed and position alone. A draft stands
if it is what was drawn; the first that is not is replaced by what was drawn, and the rest are dropped.

The law: what a request gets is what it gets without speculation, sampled or greedy, token for token. The
module is never believed: a wrong key of its own costs a guess, not a text. Drafts are drawn at the number of
their position too, so that a module whose distribution is the model's guesses what the model will draw.

`Governor` decides whether guessing pays, from measured tokens a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shoal.engine import sampling, staging
from shoal.engine.runner import Runner
from shoal.engine.sampling import Draw
from shoal.engine.sequence import Sequence
from shoal.engine.spans import Span


class Seen(NamedTuple):
    """Positions of a sequence that a step has computed for good."""

    sequence: Sequence
    start: int
    count: int
    row: int  # of the first, in the step's hidden states
    drafts: bool  # whether the next token is known to the host, so that those after it can be guessed


class Drafter:
    """`reserve(sequence, positions)` says how many positions its pages hold, once it has tried for these."""

    def __init__(self, runner: Runner, num_drafts: int, reserve: Callable[[Sequence, int], int]) -> None:
        self._runner, self.num_drafts, self._reserve = runner, num_drafts, reserve
        self._guesses: list[tuple[dict[int, int], staging.Parcel]] = []  # by place: row of a request, tokens
        self.drafted, self.accepted = Counter[int](), Counter[int]()  # by place

    @torch.inference_mode()
    def draft(self, seen: list[Seen], hidden_TD: Tensor, count: int) -> None:
        """Read what a step computed into the module's own cache, and guess `count` tokens for each sequence
        that is up to its last id. Launches only."""
        runner = self._runner
        self._guesses = []
        for each in seen:
            each.sequence.num_drafts = 0
        # 1. The module over all that is new: position t with the id at t + 1.
        spans = [
            Span(
                each.sequence.pages,
                each.start,
                each.sequence.ids[each.start + 1 : each.start + 1 + each.count],
                num_drawn=int(each.drafts),
            )
            for each in seen
        ]
        rows = [row for each in seen for row in range(each.row, each.row + each.count)]
        if len(rows) != len(hidden_TD):
            (rows_T,) = staging.send([np.array(rows)], runner.device)
            hidden_TD = hidden_TD.index_select(0, rows_T)
        hidden_TD, last_M = runner.predict(hidden_TD, spans)
        # 2. Guess, and go on from the guess, for as long as there is room.
        line = [each.sequence for each in seen if each.drafts]
        hidden_SD = hidden_TD if last_M is None else hidden_TD.index_select(0, last_M)
        for guess in range(1, count + 1):
            if not line:
                return
            logits_SV = runner.project(hidden_SD)
            draws = [Draw(each.params, each.seed, len(each.ids) + guess - 1) for each in line]
            tokens_S = sampling.choose(logits_SV, draws).tokens_S
            runner.keep(tokens_S, line, guess)
            self._guesses.append(
                ({each.request: at for at, each in enumerate(line)}, staging.Parcel(tokens_S))
            )
            for sequence in line:
                sequence.num_drafts = guess
            if guess == count:
                return
            ends = [
                len(each.ids) + guess - 1 for each in line
            ]  # the module's next position is the one before
            stay = [at for at, end in enumerate(ends) if self._reserve(line[at], end) >= end]
            if not stay:
                return
            if len(stay) != len(line):
                (stay_S,) = staging.send([np.array(stay)], runner.device)
                hidden_SD, line = hidden_SD.index_select(0, stay_S), [line[at] for at in stay]
            spans = [
                Span(each.pages, ends[at] - 1, [-1 - runner.place(each, guess)], 1)
                for at, each in zip(stay, line, strict=True)
            ]
            hidden_SD, _ = runner.predict(hidden_SD, spans)

    def count(self, places: Counter[int]) -> tuple[int, ...]:
        return tuple(places[place] for place in range(self.num_drafts))

    def verify(self, sequence: Sequence, tokens: list[int]) -> int:
        """How many of the drawn tokens stand: one more than there are drafts before the first wrong one."""
        self.drafted.update(range(len(tokens) - 1))
        for place in range(len(tokens) - 1):
            rows, parcel = self._guesses[place]
            if int(parcel.open()[rows[sequence.request]]) != tokens[place]:
                return place + 1
            self.accepted[place] += 1
        return len(tokens)


class Governor:
    """Whether to guess, by the number of sequences that decode.

    Guessing and not guessing are both tried for `trial` steps, then the better is kept for `term` steps, and
    both are tried again: acceptance depends on the texts, cost on the machine.
    """

    def __init__(self, trial: int = 16, term: int = 1024) -> None:
        self._trial, self._term = trial, term
        self._states: dict[int, _State] = {}

    def decide(self, size: int) -> bool:
        return self._state(size).guessing

    def observe(self, size: int, seconds: float, tokens: int) -> None:
        """A step of decodes alone took so long and gave so many tokens, as `decide` had it."""
        state = self._state(size)
        state.steps += 1
        state.seconds += seconds
        state.tokens += tokens
        if state.steps < (self._term if state.settled else self._trial):
            return
        state.rates[state.guessing] = state.tokens / state.seconds
        if state.settled or len(state.rates) < 2:
            state.settled = False
            if len(state.rates) == 2:  # the end of a term: what was kept is known, the other is tried
                del state.rates[not state.guessing]
            state.guessing = not state.guessing
        else:
            state.settled = True
            state.guessing = state.rates[True] > state.rates[False]
        state.steps, state.seconds, state.tokens = 0, 0.0, 0

    def _state(self, size: int) -> _State:
        return self._states.setdefault(size.bit_length(), _State())


class _State:
    def __init__(self) -> None:
        self.guessing, self.settled = True, False
        self.rates: dict[bool, float] = {}  # tokens a second, guessing and not
        self.steps, self.seconds, self.tokens = 0, 0.0, 0
