"""Scoring: what probability a model gives a text that is there, read beside the requests that are served.

It goes through free pages of the cache in steps, so memory does not grow with the text, and leaves nothing
behind there. The law: the pages come back, whatever happens.
"""

from __future__ import annotations

from torch import Tensor

from shoal.engine.blocks import BlockPool
from shoal.engine.runner import Runner
from shoal.engine.spans import Span


def score(
    runner: Runner, pool: BlockPool, ids: list[int], routing: Tensor | None, *, most: int
) -> list[float]:
    """Log-probability of each id after the first, given those before it, in float32.

    By steps of `most` tokens; `routing` (ids - 1, L, K) are recorded experts to replay.
    """
    length = len(ids) - 1  # nothing is asked of the last
    pages = pool.take(count_pages(pool, ids))
    logprobs: list[float] = []
    try:
        for start in range(0, length, most):
            end = min(start + most, length)
            span = Span(pages, start, ids[start:end], num_drawn=0)
            replay = None if routing is None else routing[start:end]
            logprobs += runner.score(span, ids[start + 1 : end + 1], replay)
    finally:
        pool.release(pages)
    return logprobs


def count_pages(pool: BlockPool, ids: list[int]) -> int:
    """How many it takes to read a text. ValueError if there are too few free ones."""
    needed = pool.count_pages(len(ids) - 1)
    if needed > pool.num_free:
        raise ValueError(
            f"a text of {len(ids)} tokens needs {needed} pages, but {pool.num_free} of "
            f"{pool.num_pages} are free; score it in pieces, let requests finish, or raise num_pages"
        )
    return needed
