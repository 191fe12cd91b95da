"""Warming up: what would be done the first time only, done before there are requests.

On CUDA graphs are recorded, and steps run of every size that the kernels tell apart, so that nothing is
compiled while requests are served (test_engine_gpu.py hooks the compiler). A model repeats its blocks, so it
is the beginning of it that runs. On a machine that has none of the kernels yet all this is rehearsed before,
to compile what kernels it meets several at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from shoal.engine import burst, sampling
from shoal.engine.blocks import BlockPool
from shoal.engine.runner import Runner
from shoal.engine.sampling import Draw, History
from shoal.engine.sequence import SamplingParams
from shoal.engine.spans import Span
from shoal.engine.team import Alone
from shoal.ops import api as ops


def warm_up(
    runner: Runner, pool: BlockPool, most: int, max_sequences: int, tell: Callable[[str], None]
) -> None:
    """For steps of `most` tokens and so many sequences; `tell` is told what begins."""
    pages = pool.take(pool.count_pages(most))
    steps = list(_steps(pages, most, max_sequences))
    # A machine that has the kernels of one graph has them all.
    if isinstance(runner.team, Alone) and _rehearse(runner, steps, first=True):
        tell("compiling kernels")
        _rehearse(runner, steps)
    tell("trying kernels")
    runner.try_out(steps)
    _sample(runner, steps[-1])
    tell("recording graphs")
    runner.capture()
    pool.release(pages)


def _rehearse(runner: Runner, steps: list[list[Span]], *, first: bool = False) -> int:
    """How many kernels had to be compiled."""
    with ops.rehearsing() as rehearsal:
        if not first:
            _sample(runner, steps[-1])
        runner.rehearse(steps, rehearsal, first=first)
    return rehearsal.compiled


def _steps(pages: list[int], most: int, max_sequences: int) -> Iterator[list[Span]]:
    for length in warm_lengths(most):
        for start in {0, min(length, most - length)}:
            yield [Span(pages, start, [0] * length, num_drawn=1)]
    # Steps of prompts and decodes: as many sequences as kernels tell apart, near and far, whose chunks meet
    # the cache as it is, or are expanded.
    for decodes in {1, *warm_counts(min(max_sequences, most - 32))}:
        for start in {1, most - 1}:
            for new in (new for new in (2, 31, 32) if new < most):
                yield [Span(pages, int(new < 32), [0] * new, 1), *[Span(pages, start, [0], 1)] * decodes]
    half = max(most // 2, 1)
    yield [Span(pages, 0, [0] * half, 1), Span(pages, half - 1, [0], 1)]


def _sample(runner: Runner, spans: list[Span]) -> None:
    """Two tokens, in each way to sample, and what stands between two steps of a burst."""
    rows, vocabulary = len(spans), runner.model.config.vocab_size
    logits_MV = torch.zeros(rows, vocabulary, dtype=runner.model.head_weight().dtype, device=runner.device)
    table_SB = runner.inputs(spans).table_SB
    said = History(lambda rows, length: runner.records.ids(table_SB, rows, length), [1] * rows)
    for wish in (
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(top_p=0.9, top_k=40),
        SamplingParams(frequency_penalty=1.0),
        SamplingParams(temperature=0, repetition_penalty=1.1),
    ):
        drawn = sampling.draw(logits_MV, [Draw(wish, 0, 2), Draw(wish, 1, 2)], said)
        decodes = runner.inputs([Span(spans[0].pages, 0, [0], 1)] * rows, [2] * rows)
        burst.hand(decodes, drawn.tokens_S1.squeeze(1))
        burst.advance(decodes, runner.page_size, runner.pad_slot)


def warm_lengths(most: int) -> list[int]:
    """Lengths of steps up to `most` that meet every plan of the kernels: those choose by size, and compile
    apart for sizes that are multiples of 16."""
    lengths = {most}
    base = 1
    while base <= most:
        for length in (base, base + base // 2):
            lengths |= {length, length + 1, length + 8}
        base *= 2
    return sorted(length for length in lengths if length <= most)


def warm_counts(most: int) -> list[int]:
    """Numbers of decoding sequences, up to `most`, that meet every plan of attention over the cache, alone
    and beside one more: those pad to powers of two."""
    counts, base = {most}, 32
    while base < most:
        counts |= {base - 1, base + 1}
        base *= 2
    return sorted(count for count in counts if 0 < count <= most)
