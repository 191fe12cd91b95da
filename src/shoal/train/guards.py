"""What keeps a run from harm: a loss that leaps, and a signal to stop.

A spike is a loss above the mean of the last 64 by so many of their standard deviations. What is done about it
is the recipe's choice, and is told: `skip` leaves the step out, its batches with it; `rollback` goes back to
the last checkpoint and on with the batches after the spike. The law: the window of losses is part of the
state of a run, so a resumed run judges as the one that was not stopped. Losses that are not finite are the
Trainer's own to refuse.
"""

from __future__ import annotations

import math
import signal
import statistics
import threading
from collections import deque
from collections.abc import Sequence
from types import FrameType
from typing import Any, Self

WINDOW, LEAST = 64, 16  # losses that are looked back on, and how many there must be
FLOOR = 0.01  # of the mean: a spread below it is taken for it, since a flat run is not suspicious of itself


class SpikeGuard:
    """Judges the losses of a run, in order. `deviations` 0 finds nothing."""

    def __init__(self, deviations: float) -> None:
        self.deviations = deviations
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def limit(self) -> float:
        """The loss above which the next one is a spike."""
        if not self.deviations or len(self._losses) < LEAST:
            return math.inf
        mean = statistics.fmean(self._losses)
        spread = max(statistics.pstdev(self._losses), FLOOR * abs(mean))
        return mean + self.deviations * spread

    def accept(self, loss: float) -> None:
        """Count a loss that was learned from."""
        if self.deviations:
            self._losses.append(loss)

    def state(self) -> list[float]:
        return list(self._losses)

    def restore(self, losses: Sequence[float]) -> None:
        self._losses = deque(losses, maxlen=WINDOW)


class Interrupt:
    """While it is open, the first Ctrl-C or SIGTERM is only noted; a second one acts as it always does."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._handlers = {
                number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
            }
        return self

    def __exit__(self, *_: object) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.__exit__()
