"""Order: which of those that wait is admitted next. What fits and who gives way is left to the scheduler.

`Arrival` takes the first. `Affinity` takes the one that is likely to touch the fewest experts that those who
run do not touch already: a decoding step reads every expert that any of its tokens goes to, so requests of a
kind are cheaper together. What a request will touch is guessed from those that finished: the first few found
groups, each later one moves the group whose prompts had the most similar ids, and a group remembers how often
its tokens went to each expert. Whoever waits is taken for one of the nearest group.

The law: an order chooses among the waiting of the first's priority, and nobody is passed by more than
`patience` later ones before it is first admitted. Who lost its pages is never passed once it is first.

Shape letters: L layers that route, E experts, K experts per token, N positions, G groups, B buckets of ids.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from typing import Protocol

import numpy as np
from torch import Tensor

from shoal.engine.sequence import Sequence

GROUPS = 16
BUCKETS = 4096  # that ids are counted in: enough to tell texts apart, few enough to compare many
MEMORY = 64  # requests that a group remembers, the older ones less and less
WINDOW = 256  # of those that wait, the first so many are looked at


class Order(Protocol):
    def choose(self, waiting: Many[Sequence], running: Many[Sequence]) -> int:
        """The place of the next among those that wait, which are of one priority or more and in turn."""
        ...

    def learn(self, sequence: Sequence, experts: Callable[[], Tensor]) -> None:
        """A sequence has finished; `experts()` is where its positions were sent (N, L, K)."""
        ...


class Arrival:
    """First come, first served."""

    def choose(self, waiting: Many[Sequence], running: Many[Sequence]) -> int:
        return 0

    def learn(self, sequence: Sequence, experts: Callable[[], Tensor]) -> None:
        pass


class Affinity:
    """`num_experts` is E; `patience`, how many later requests may pass one that waits."""

    def __init__(self, num_experts: int, patience: int) -> None:
        assert patience > 0
        self.num_experts, self.patience = num_experts, patience
        self._ids_GB: list[np.ndarray] = []
        self._touch_GLE: list[np.ndarray] = []  # the chance that a token of a group goes to an expert
        self._count_G: list[int] = []

    def choose(self, waiting: Many[Sequence], running: Many[Sequence]) -> int:
        first = waiting[0]
        # Who waits longer was passed at least as often, but by having lost its pages: it goes at once.
        if not self._count_G or first.cached is not None or first.passed >= self.patience:
            return 0
        # 1. What those that run leave untouched, as a chance for each expert.
        idle_LE = np.ones_like(self._touch_GLE[0])
        for sequence in running:
            idle_LE *= 1 - self._touch_GLE[self._group(sequence)]
        # 2. What a token of each group is expected to touch of it.
        price_G = [round(float((idle_LE * touch_LE).sum()), 6) for touch_LE in self._touch_GLE]
        # 3. The cheapest, the first in turn among equals.
        best = 0
        for place, sequence in enumerate(waiting[:WINDOW]):
            if sequence.params.priority != first.params.priority:
                break
            if price_G[self._group(sequence)] < price_G[self._group(waiting[best])]:
                best = place
        return best

    def learn(self, sequence: Sequence, experts: Callable[[], Tensor]) -> None:
        ids_B, touch_LE = _sketch(sequence), self.count(experts())
        if len(self._count_G) < GROUPS:
            self._ids_GB.append(ids_B)
            self._touch_GLE.append(touch_LE)
            self._count_G.append(1)
            return
        group = self._nearest(ids_B)
        self._count_G[group] = min(self._count_G[group] + 1, MEMORY)
        share = 1 / self._count_G[group]
        self._ids_GB[group] = (1 - share) * self._ids_GB[group] + share * ids_B
        self._touch_GLE[group] = (1 - share) * self._touch_GLE[group] + share * touch_LE

    def predict(self, sequence: Sequence) -> np.ndarray | None:
        """(L, E) the chance that a token of the sequence goes to an expert; None before anything is known."""
        return self._touch_GLE[self._nearest(_sketch(sequence))] if self._count_G else None

    def _group(self, sequence: Sequence) -> int:
        """Kept on the sequence until there are all groups, then for good."""
        if sequence.group is None or sequence.group[1] < GROUPS:
            known = len(self._count_G)
            if sequence.group is None or sequence.group[1] < known:
                sequence.group = self._nearest(_sketch(sequence)), known
        return sequence.group[0]

    def _nearest(self, ids_B: np.ndarray) -> int:
        """By cosine; the older among equals."""
        likeness = [
            float(ids_B @ of_group) / max(float(np.linalg.norm(of_group)), 1e-9) for of_group in self._ids_GB
        ]
        return int(np.argmax(likeness))

    def count(self, experts_NLK: Tensor) -> np.ndarray:
        """(L, E) the share of positions that went to each expert."""
        experts = experts_NLK.numpy().astype(np.int64)
        layers = experts.shape[1]
        kept = experts >= 0  # -1 is a choice that was dropped
        flat = (experts + np.arange(layers)[None, :, None] * self.num_experts)[kept]
        counts = np.bincount(flat, minlength=layers * self.num_experts)
        return counts.reshape(layers, self.num_experts) / max(len(experts), 1)


def _sketch(sequence: Sequence) -> np.ndarray:
    """The prompt's ids, counted in buckets: square roots, so that frequent ones do not drown the rest."""
    ids = np.asarray(sequence.ids[: sequence.num_prompt])
    counts_B = np.sqrt(np.bincount(ids % BUCKETS, minlength=BUCKETS).astype(np.float64))
    return counts_B / np.linalg.norm(counts_B)
