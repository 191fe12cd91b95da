"""Stats: what an engine has done and holds, at one moment.

Counts are cumulative from the engine's first step; a rate is the difference of two. It is what a server
exports and a benchmark prints, and is made only when asked for: serving does not wait for it.

Shape letters: L layers that route, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shoal.model.moe import max_violation


@dataclass(frozen=True, eq=False)
class Stats:
    running: int
    waiting: int
    pages: int
    pages_free: int  # held by nobody, whatever is remembered of them
    prompt_positions: int = 0  # of prompts when they were first admitted
    prompt_positions_cached: int = 0  # of those, found in the prefix cache
    preemptions: int = 0
    generated: int = 0  # tokens that requests got
    steps: int = 0
    step_seconds: float = 0.0  # spent within `step`
    drafted: tuple[int, ...] = ()  # tokens guessed ahead, by place: first, second ...
    accepted: tuple[int, ...] = ()  # of those, the ones that the model then drew itself
    expert_tokens: Tensor | None = None  # (L, E) int64 on the host: tokens that each expert was given
    experts_touched: Tensor | None = None  # (L,) int64: distinct experts given a token, summed over steps
    expert_cache_queries: int | None = None  # experts that a layer's step named; None: none is offloaded
    expert_cache_hits: int | None = None  # of those, the ones that were on the device

    @property
    def max_violation(self) -> Tensor | None:
        """MaxVio of each layer since the first step."""
        return None if self.expert_tokens is None else max_violation(self.expert_tokens)
