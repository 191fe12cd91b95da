"""History: how the server was over the last minutes, for whoever looks at it later than it happened.

A sample a second of what the engine reports (worker.plain), ten minutes of them; every fifth keeps the counts
of all experts too. Counts are cumulative, as reported: a rate is the difference of two samples. When the
engine is started again its counts begin at zero, and what was before is forgotten.

The law: watching costs the engine nothing; the reports come anyway.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

import numpy as np

from shoal.server.process import EngineProcess

SECONDS, HEAT_EVERY = 600, 5
COLUMNS = (
    *("running", "waiting", "pages", "pages_free", "prompt_positions", "prompt_positions_cached"),
    *("generated", "steps", "preemptions"),
)


class History:
    def __init__(self, process: EngineProcess) -> None:
        self._process = process
        self._rows: deque[list[float]] = deque(maxlen=SECONDS)  # the time, then COLUMNS
        self._heat: deque[tuple[float, np.ndarray]] = deque(maxlen=SECONDS // HEAT_EVERY + 1)
        self._taken = 0

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            self.sample(time.time())
            await asyncio.sleep(1.0)

    def sample(self, now: float) -> None:
        stats = self._process.stats
        if not stats:
            return
        row = [now, *(float(stats[name]) for name in COLUMNS)]
        if self._rows and row[COLUMNS.index("steps") + 1] < self._rows[-1][COLUMNS.index("steps") + 1]:
            self._rows.clear()
            self._heat.clear()
        self._rows.append(row)
        if stats["expert_tokens"] is not None and self._taken % HEAT_EVERY == 0:
            self._heat.append((now, np.array(stats["expert_tokens"])))
        self._taken += 1

    def since(self, start: float) -> list[list[float]]:
        """The samples after a time."""
        return [row for row in self._rows if row[0] > start]

    def heat(self, layer: int) -> dict[str, Any]:
        """Choices that went to each expert: of all layers over the last minute, and of one over time.

        IndexError where there is no such layer.
        """
        if len(self._heat) < 2:
            return {"seconds": 0.0, "load": [], "times": [], "layer": layer, "over_time": []}
        times, counts = [when for when, _ in self._heat], [each for _, each in self._heat]
        back = max(0, len(counts) - 1 - 60 // HEAT_EVERY)
        rows = np.stack([each[layer] for each in counts])
        return {
            "seconds": times[-1] - times[back],
            "load": (counts[-1] - counts[back]).tolist(),
            "times": times[1:],
            "layer": layer,
            "over_time": np.diff(rows, axis=0).tolist(),
        }
