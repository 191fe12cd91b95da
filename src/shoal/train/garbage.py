"""When Python looks for garbage that refers to itself: while the device works, and never by itself.

A collection that comes when some counter is full stops the host for 1 to 100 ms, and nothing is launched:
in a round of RL with 1,024 answers 45 to 125 ms, all told (LOG, 2026-11-29). torchtitan, too, collects by
steps. The law: what a step leaves behind is gone after the next, and what lived longer within FULL steps.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

FULL = 1000


@contextmanager
def by_hand() -> Iterator[None]:
    """No collections but those that are asked for."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def collect(step: int) -> None:
    """What came since the last time; every FULL steps the whole heap, which takes 100 ms or more."""
    gc.collect(2 if step and step % FULL == 0 else 1)
