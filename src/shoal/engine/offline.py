"""Offline: prompts served to their end, for who wants answers and no events.

The law: whatever happens, none of them is left behind.
"""

from __future__ import annotations

from typing import Protocol

from shoal.engine.events import Completion, Gathered, Portion
from shoal.engine.sequence import SamplingParams


class Steps(Protocol):
    """What an engine is here."""

    @property
    def busy(self) -> bool: ...

    def add(self, ids: list[int], params: SamplingParams) -> int: ...

    def cancel(self, request: int) -> bool: ...

    def run_step(self) -> list[Portion]: ...


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
    living: dict[int, Gathered] = {}
    done: dict[int, Completion | None] = {}  # in the order of the prompts
    try:
        for ids, wish in zip(prompts, each, strict=True):
            request = engine.add(ids, wish)
            living[request], done[request] = Gathered(), None
        while engine.busy:
            for portion in engine.run_step():
                if portion.error is not None:
                    raise FloatingPointError(portion.error)
                if (whole := living[portion.request].add(portion)) is not None:
                    done[portion.request] = whole
                    del living[portion.request]
    except BaseException:
        for request in living:
            engine.cancel(request)
        while engine.busy:
            engine.run_step()
        raise
    return [completion for completion in done.values() if completion is not None]
