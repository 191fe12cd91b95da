"""Scheduler: which sequences go through the model in the next step, and with how many tokens. Integers only.

One rule serves every kind of work: a step is a list of (sequence, tokens), filled up to a budget of tokens in
order of arrival. A prompt is begun only with budget left by all before it, so at most one, the youngest, is
half read: decodes come first and never wait for a prompt, and a chunk of a prompt fills what they leave.

- First come, first served: `running` then `waiting` is always the order of arrival, and nothing overtakes.
- A sequence is admitted when there are pages for all its ids, and takes one more whenever it outgrows them.
- When pages run out the youngest running sequence gives up all of its own and waits at the front, to be
  computed again. The oldest is never the one, and none is accepted that could not run alone: so every
  sequence comes to its end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from shoal.engine.blocks import BlockPool
from shoal.engine.sequence import Sequence


class Pick(NamedTuple):
    """The next `num_new` pending tokens of a sequence go through the model."""

    sequence: Sequence
    num_new: int

    @property
    def samples(self) -> bool:
        """Whether the step brings the sequence up to its last id, so that its next one can be drawn."""
        return self.num_new == self.sequence.num_pending


class Scheduler:
    def __init__(self, pool: BlockPool, *, max_batch_tokens: int, max_sequences: int) -> None:
        assert 0 < max_sequences <= max_batch_tokens
        self.pool, self.max_batch_tokens, self.max_sequences = pool, max_batch_tokens, max_sequences
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_positions_admitted = 0
        self.num_positions_remembered = 0  # of those, by the pool: they were not computed again

    def add(self, sequence: Sequence) -> None:
        pool = self.pool
        if sequence.max_len > pool.capacity:
            raise ValueError(
                f"a prompt of {sequence.num_prompt} tokens with {sequence.max_len - sequence.num_prompt} "
                f"to generate needs {sequence.max_len} positions, but the cache has {pool.capacity} "
                f"({pool.num_pages} pages of {pool.page_size}); lower max_tokens, shorten the prompt, "
                f"or raise num_pages to {pool.count_pages(sequence.max_len)}"
            )
        self.waiting.append(sequence)

    def schedule(self) -> list[Pick]:
        """The next step. Empty only when no sequence lives."""
        # 1. Every running sequence gets pages for its ids, the oldest first.
        for sequence in self.running.copy():
            self._make_room(sequence)
        # 2. The budget is spent on them, then on those that wait.
        picks: list[Pick] = []
        budget = self.max_batch_tokens
        for sequence in self._in_line():
            num_new = min(sequence.num_pending, budget)
            picks.append(Pick(sequence, num_new))
            budget -= num_new
            if not budget:
                break
        assert picks or not self.waiting, "sequences wait although none runs"
        return picks

    def commit(self, picks: list[Pick], tokens: Iterable[int]) -> None:
        """The step was computed: `tokens` are those drawn for the picks that sample, in order."""
        drawn = iter(tokens)
        for pick in picks:
            sequence, samples = pick.sequence, pick.samples
            sequence.num_computed += pick.num_new
            self._keep_full_pages(sequence)
            if samples:
                sequence.append(next(drawn))
                if sequence.finish:
                    self.running.remove(sequence)
                    self._release(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Drop a sequence that has not finished."""
        (self.running if sequence.pages else self.waiting).remove(sequence)
        self._release(sequence)

    def _in_line(self) -> Iterator[Sequence]:
        """Those that run, then those that wait, each admitted when it is asked for."""
        yield from self.running
        while self.waiting and len(self.running) < self.max_sequences and self._admit():
            yield self.running[-1]

    def _make_room(self, sequence: Sequence) -> None:
        """Pages for all ids of a running sequence, taken from the youngest, which may be itself."""
        pool = self.pool
        while sequence.pages and (missing := pool.count_pages(len(sequence.ids)) - len(sequence.pages)) > 0:
            if missing <= pool.num_free:
                sequence.pages += pool.take(missing)
            else:
                self._preempt(self.running[-1])

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)
        self._release(sequence)
        self.num_preemptions += 1

    def _admit(self) -> bool:
        """Move the first in the queue to the running ones, if there are pages for all of its ids."""
        sequence, pool = self.waiting[0], self.pool
        # The last id is always computed: the next is drawn from its logits.
        prefix = pool.find(sequence.ids, most=len(sequence.ids) - 1)
        missing = pool.count_pages(len(sequence.ids)) - len(prefix.pages)
        if missing + pool.count_idle(prefix.pages) > pool.num_free:
            return False
        pool.share(prefix.pages)
        sequence.pages = prefix.pages + pool.take(missing)
        sequence.num_kept, sequence.node = len(prefix.pages), prefix.node
        sequence.num_computed = len(prefix.pages) * pool.page_size
        if not sequence.admitted:
            sequence.admitted, sequence.cached = True, sequence.num_computed
            self.num_positions_admitted += sequence.num_prompt
            self.num_positions_remembered += sequence.cached
        self.running.append(self.waiting.popleft())
        return True

    def _keep_full_pages(self, sequence: Sequence) -> None:
        size = self.pool.page_size
        while (end := (sequence.num_kept + 1) * size) <= sequence.num_computed:
            page, ids = sequence.pages[sequence.num_kept], tuple(sequence.ids[end - size : end])
            sequence.node = self.pool.keep(page, sequence.node, ids)
            sequence.num_kept += 1

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages, sequence.num_computed, sequence.num_kept = [], 0, 0
