"""Scheduler: which sequences go through the model in the next step, and with how many tokens. Integers only.

One rule serves every kind of work: a step is a list of (sequence, tokens), filled up to a budget of tokens.
Whoever decodes comes first and never waits for a prompt; a chunk of a prompt fills what they leave. A prompt
is begun only with budget left by all before it.

- Turns go by priority, then by arrival: nobody of a lower priority overtakes, and none of an equal one unless
  the `order` that is passed in chooses it.
- A sequence is admitted when there are pages for all its ids, and takes one more whenever it outgrows them.
- When pages run out, or a request of a higher priority finds no room, the last in turn of the running
  sequences gives up its pages and waits, to be computed again. None is accepted that could not run alone, so
  the first in turn always comes to its end; low priorities wait for as long as higher ones keep coming.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from typing import NamedTuple

from shoal.engine.blocks import BlockPool, Prefix
from shoal.engine.order import Arrival, Order
from shoal.engine.sequence import Sequence


class Pick(NamedTuple):
    """The next `num_new` pending tokens of a sequence go through the model, and guesses at those after."""

    sequence: Sequence
    num_new: int
    num_drafts: int = 0

    @property
    def start(self) -> int:
        """The position of the first of them, until the step is launched."""
        return self.sequence.num_computed

    @property
    def num_tokens(self) -> int:
        return self.num_new + self.num_drafts

    @property
    def samples(self) -> bool:
        """Whether the step brings the sequence up to its last id, so that its next one can be drawn."""
        sequence = self.sequence
        return sequence.num_computed + self.num_new == sequence.length and sequence.room > 0

    @property
    def reads_all(self) -> bool:
        """Whether it is the end of a prompt that wants no more than to be read."""
        sequence = self.sequence
        return sequence.max_len == sequence.num_prompt == sequence.num_computed + self.num_new


class Scheduler:
    def __init__(
        self, pool: BlockPool, *, max_batch_tokens: int, max_sequences: int, order: Order | None = None
    ) -> None:
        assert 0 < max_sequences <= max_batch_tokens
        self.pool, self.max_batch_tokens, self.max_sequences = pool, max_batch_tokens, max_sequences
        self.order: Order = order or Arrival()
        self.waiting: list[Sequence] = []  # in turn
        self.running: list[Sequence] = []  # as they were admitted
        self._rows = list(range(max_sequences))[::-1]
        self.num_preemptions = 0
        self.num_positions_admitted = 0
        self.num_positions_remembered = 0  # of those, by the pool: they were not computed again

    def add(self, sequence: Sequence) -> None:
        self.check(sequence)
        insort(self.waiting, sequence, key=_turn)

    def check(self, sequence: Sequence) -> None:
        """ValueError if it could not run alone."""
        pool = self.pool
        if sequence.max_len > pool.capacity:
            raise ValueError(
                f"a prompt of {sequence.num_prompt} tokens with {sequence.max_len - sequence.num_prompt} "
                f"to generate needs {sequence.max_len} positions, but the cache has {pool.capacity} "
                f"({pool.num_pages} pages of {pool.page_size}); lower max_tokens, shorten the prompt, "
                f"or raise num_pages to {pool.count_pages(sequence.max_len)}"
            )

    def schedule(self, *, num_drafts: int = 0, admit: bool = True) -> list[Pick]:
        """The next step, with at most `num_drafts` guesses a sequence; nobody is admitted without `admit`,
        unless nobody runs. Empty only when nothing is left to do before what is on its way has arrived."""
        # 1. Every running sequence gets pages for its ids, the first in turn before the others.
        for sequence in sorted(self._outgrown(), key=_turn):
            self._make_room(sequence)
        while self._must_make_way():
            self._preempt(max(self.running, key=_turn))
        # 2. Those that decode.
        pending = [(sequence, sequence.num_pending) for sequence in self.running]
        picks = [Pick(sequence, 1) for sequence, count in pending if count == 1]
        if num_drafts and len(picks) * (1 + num_drafts) <= self.max_batch_tokens:
            picks = [Pick(pick.sequence, 1, self._count_drafts(pick.sequence, num_drafts)) for pick in picks]
        # 3. Prompts, for as long as the budget lasts.
        budget = self.max_batch_tokens - sum(pick.num_tokens for pick in picks)
        begun = [sequence for sequence, count in pending if count > 1]
        prompts = self._prompts(begun, admit or not self.running)
        while budget and (sequence := next(prompts, None)):
            num_new = min(sequence.num_pending, budget)
            picks.append(Pick(sequence, num_new))
            budget -= num_new
        assert picks or self.running or not self.waiting, "sequences wait although none runs"
        return picks

    def extend(self, picks: list[Pick], most: int) -> list[int]:
        """Pages ahead, for at most `most` steps of these decodes in a row, fewer where pages are short: how
        many tokens of each will be drawn. Nobody gives way for them."""
        size, rooms = self.pool.page_size, [pick.sequence.room for pick in picks]
        steps = min(most, max(rooms))
        while True:
            counts = [min(steps, room) for room in rooms]
            missing = {
                at: pages
                for at, (pick, count) in enumerate(zip(picks, counts, strict=True))
                if (pages := -(-(pick.sequence.num_computed + count) // size) - len(pick.sequence.pages)) > 0
            }
            if sum(missing.values()) <= self.pool.num_free:
                for at, pages in missing.items():
                    picks[at].sequence.pages += self.pool.take(pages)
                return counts
            steps //= 2

    def is_short(self) -> bool:
        """Whether the next step has to take the place of a running sequence from it."""
        missing = sum(map(self._missing, self._outgrown()))
        return missing > self.pool.num_free or self._must_make_way(promised=missing)

    def launch(self, picks: list[Pick], counts: list[int] | None = None) -> None:
        """The step is on its way to the device, or several: whatever is launched after finds it done. So many
        tokens of each will come home, or one of each that is up to its last id."""
        counts = [int(pick.samples) for pick in picks] if counts is None else counts
        for pick, count in zip(picks, counts, strict=True):
            sequence = pick.sequence
            sequence.num_computed += max(pick.num_new, count)
            sequence.num_flying += count
            self._keep_full_pages(sequence)

    def commit(self, sequence: Sequence, tokens: list[int], flown: int = 1) -> list[int]:
        """These tokens were drawn for a sequence, one after the other: those it takes before it finishes.
        `flown` is what `launch` was told; guesses that stand come beside."""
        sequence.num_flying -= flown  # later steps' tokens may be on their way already
        taken = sequence.take(tokens)
        if sequence.pages:
            sequence.num_computed += len(taken) - flown
            if sequence.finish:  # what was computed for later tokens is of no use
                sequence.num_computed = min(sequence.num_computed, len(sequence.ids) - 1)
            self._keep_full_pages(sequence)
        if sequence.finish:
            self.remove(sequence)
        return taken

    def remove(self, sequence: Sequence) -> None:
        """Drop a sequence, wherever it is."""
        (self.running if sequence.pages else self.waiting).remove(sequence)
        self._release(sequence)

    def reserve(self, sequence: Sequence, positions: int) -> int:
        """Pages for so many positions of a running sequence, if nobody has to give way: those there are."""
        missing = self.pool.count_pages(positions) - len(sequence.pages)
        if 0 < missing <= self.pool.num_free:
            sequence.pages += self.pool.take(missing)
        return len(sequence.pages) * self.pool.page_size

    def forget(self, sequence: Sequence) -> None:
        """What its pages hold is worth nothing to anybody."""
        for page in sequence.pages:
            self.pool.forget(page)

    def _prompts(self, begun: list[Sequence], admit: bool) -> Iterator[Sequence]:
        """In turn: those begun, and those that wait, each admitted when it is asked for, if any are."""
        begun = sorted(begun, key=_turn, reverse=True)
        while begun or self.waiting:
            if begun and not (self.waiting and _turn(self.waiting[0]) < _turn(begun[-1])):
                yield begun.pop()
            elif admit and self._admit():
                yield self.running[-1]
            elif begun:
                yield begun.pop()
            else:
                return

    def _outgrown(self) -> list[Sequence]:
        """Running sequences with more ids than their pages hold."""
        size = self.pool.page_size
        return [s for s in self.running if len(s.pages) * size < len(s.ids) + s.num_flying]

    def _missing(self, sequence: Sequence) -> int:
        """Pages that a running sequence has yet to be given for its ids."""
        pages = self.pool.count_pages(sequence.length) - len(sequence.pages)
        return max(pages, 0) if sequence.num_pending else 0

    def _make_room(self, sequence: Sequence) -> None:
        """Pages for all ids of a running sequence, taken from the last in turn, which may be itself."""
        while sequence.pages and (missing := self._missing(sequence)):
            if missing <= self.pool.num_free:
                sequence.pages += self.pool.take(missing)
            else:
                self._preempt(max(self.running, key=_turn))

    def _must_make_way(self, promised: int = 0) -> bool:
        """Whether the first that waits outranks one that runs, and finds no room beside what is promised."""
        if not self.waiting or not self.running:
            return False
        lowest = max(sequence.params.priority for sequence in self.running)
        return self.waiting[0].params.priority < lowest and not self._fits(self.waiting[0], promised)

    def _count_drafts(self, sequence: Sequence, most: int) -> int:
        """How many guesses a sequence can have verified."""
        count = max(min(most, sequence.num_drafts, sequence.room - 1), 0)
        return min(count, self.reserve(sequence, sequence.length + count) - sequence.length) if count else 0

    def _preempt(self, sequence: Sequence) -> None:
        assert not sequence.num_flying, f"request {sequence.request} gives way with a token on its way"
        self.running.remove(sequence)
        self._release(sequence)
        insort(self.waiting, sequence, key=_turn)
        self.num_preemptions += 1

    def _find(self, sequence: Sequence) -> Prefix:
        """What the pool remembers of a sequence. The last id is always computed: the next is drawn from its
        logits; so is the prompt where its own are wanted."""
        wants_all = sequence.params.prompt_logprobs is not None and len(sequence.ids) == sequence.num_prompt
        return self.pool.find(sequence.ids, most=0 if wants_all else len(sequence.ids) - 1)

    def _fits(self, sequence: Sequence, promised: int = 0) -> bool:
        pages, pool = self._find(sequence).pages, self.pool
        needed = pool.count_pages(len(sequence.ids)) - len(pages) + pool.count_idle(pages) + promised
        return needed <= pool.num_free and len(self.running) < self.max_sequences

    def _admit(self) -> bool:
        """Move the next in order to the running ones, or the first in the queue where that finds no pages for
        all of its ids; False where neither does."""
        place, pool = self.order.choose(self.waiting, self.running), self.pool
        if place and not self._fits(self.waiting[place]):
            place = 0
        sequence = self.waiting[place]
        if not self._fits(sequence):
            return False
        for passed in self.waiting[:place]:
            passed.passed += 1
        prefix = self._find(sequence)
        pool.share(prefix.pages)
        sequence.pages = prefix.pages + pool.take(pool.count_pages(len(sequence.ids)) - len(prefix.pages))
        sequence.row = self._rows.pop()
        sequence.num_kept, sequence.node = len(prefix.pages), prefix.node
        sequence.num_computed = len(prefix.pages) * pool.page_size
        if sequence.cached is None:
            sequence.cached = sequence.num_computed
            self.num_positions_admitted += sequence.num_prompt
            self.num_positions_remembered += sequence.cached
        self.running.append(self.waiting.pop(place))
        return True

    def _keep_full_pages(self, sequence: Sequence) -> None:
        size = self.pool.page_size
        while (end := (sequence.num_kept + 1) * size) <= sequence.num_computed and end <= len(sequence.ids):
            page, ids = sequence.pages[sequence.num_kept], tuple(sequence.ids[end - size : end])
            sequence.node = self.pool.keep(page, sequence.node, ids)
            sequence.num_kept += 1

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        if sequence.pages:
            self._rows.append(sequence.row)
        sequence.pages, sequence.row = [], -1
        sequence.num_computed = sequence.num_kept = sequence.num_drafts = 0
        if len(sequence.ids) == sequence.num_prompt:
            sequence.scores.clear()  # its prompt is read again


def _turn(sequence: Sequence) -> tuple[int, int]:
    """Who comes first: the smaller."""
    return sequence.params.priority, sequence.request
