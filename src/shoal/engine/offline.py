"""Offline: prompts served to their end, for who wants answers and no events.

The law: whatever happens, none of them is left behind.
"""

from __future__ import annotations

from typing import Protocol

from shoal.engine.events import Completion, Event, complete
from shoal.engine.sequence import SamplingParams


class Steps(Protocol):
    """What an engine is here."""

    @property
    def busy(self) -> bool: ...

    def add(self, ids: list[int], params: SamplingParams) -> int: ...

    def cancel(self, request: int) -> bool: ...

    def step(self) -> list[Event]: ...


def generate(
    engine: Steps, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]
) -> list[Completion]:
    """Serve these prompts to their end, with params for all or for each.

    FloatingPointError if the logits of one are not numbers.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    if len(each) != len(prompts):
        raise ValueError(
            f"there are {len(prompts)} prompts and {len(each)} params; give one, or one for each"
        )
    if engine.busy:
        raise ValueError("requests are being served; use add and step beside them")
    events: dict[int, list[Event]] = {}
    try:
        for ids, wish in zip(prompts, each, strict=True):
            events[engine.add(ids, wish)] = []
        while engine.busy:
            for event in engine.step():
                if event.error is not None:
                    raise FloatingPointError(event.error)
                events[event.request].append(event)
    except BaseException:
        for request in events:
            engine.cancel(request)
        while engine.busy:
            engine.step()
        raise
    return [complete(of_request) for of_request in events.values()]
