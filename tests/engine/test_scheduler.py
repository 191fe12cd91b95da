"""Laws of the scheduler, without a model: any integers will do for tokens.

The workload drives the scheduler as the engine does and checks every step: the budget and the cap hold,
everyone who runs gets a turn, arrival order is kept, pages suffice and are shared only where texts are equal,
all finish.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.blocks import BlockPool
from shoal.engine.scheduler import Pick, Scheduler
from shoal.engine.sequence import SamplingParams, Sequence


def make(num_pages: int = 16, page_size: int = 4, budget: int = 8, most: int = 4) -> Scheduler:
    return Scheduler(BlockPool(num_pages, page_size), max_batch_tokens=budget, max_sequences=most)


def request(number: int, length: int, wanted: int, token: int | None = None) -> Sequence:
    """A text unlike any other, or all of one token."""
    ids = [1000 * number + at if token is None else token for at in range(length)]
    return Sequence(ids, SamplingParams(), request=number, max_len=length + wanted)


def numbers(picks: list[Pick]) -> list[tuple[int, int]]:
    return [(pick.sequence.request, pick.num_new) for pick in picks]


def advance(scheduler: Scheduler, token: int = 7) -> list[tuple[int, int]]:
    picks = scheduler.schedule()
    told = numbers(picks)
    drawn = [pick.sequence for pick in picks if pick.samples]
    scheduler.launch(picks)
    for sequence in drawn:
        scheduler.commit(sequence, [token])
    return told


def test_prompts_are_read_in_chunks_beside_decodes() -> None:
    scheduler = make()
    scheduler.add(request(1, length=3, wanted=9))
    scheduler.add(request(2, length=12, wanted=9))
    assert advance(scheduler) == [(1, 3), (2, 5)]
    assert advance(scheduler) == [(1, 1), (2, 7)]
    assert advance(scheduler) == [(1, 1), (2, 1)]


def test_no_more_than_the_cap_run() -> None:
    scheduler = make(most=2)
    for number in range(3):
        scheduler.add(request(number, length=1, wanted=2))
    assert [advance(scheduler) for _ in range(4)] == [
        [(0, 1), (1, 1)],
        [(0, 1), (1, 1)],
        [(2, 1)],
        [(2, 1)],
    ]


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    scheduler = make(num_pages=4, most=3)
    for number in (1, 2):
        scheduler.add(request(number, length=7, wanted=8))
    scheduler.add(request(3, length=1, wanted=1))
    told = [advance(scheduler) for _ in range(4)]
    assert told[:2] == [[(1, 7), (2, 1)], [(1, 1), (2, 6)]]
    assert scheduler.num_preemptions == 1
    assert [sequence.request for sequence in scheduler.running] == [1]
    assert [sequence.request for sequence in scheduler.waiting] == [2, 3]


def test_a_request_that_could_never_run_is_refused_with_the_way_out() -> None:
    scheduler = make(num_pages=4, page_size=4)
    scheduler.add(request(1, length=10, wanted=6))
    with pytest.raises(
        ValueError, match=r"10 tokens with 7 .* needs 17 positions, .* has 16 .* num_pages to 5"
    ):
        scheduler.add(request(2, length=10, wanted=7))


def test_equal_beginnings_share_pages() -> None:
    scheduler = make()
    scheduler.add(request(1, length=8, wanted=4, token=5))
    advance(scheduler)
    scheduler.add(request(2, length=8, wanted=4, token=5))
    assert advance(scheduler) == [(1, 1), (2, 4)]  # one page is found; the last token is always computed
    first, second = scheduler.running
    assert first.pages[0] == second.pages[0]
    assert not set(first.pages[1:]) & set(second.pages[1:])
    assert (scheduler.num_positions_admitted, scheduler.num_positions_remembered) == (16, 4)


def check_step(scheduler: Scheduler, picks: list[Pick]) -> None:
    running, pool = scheduler.running, scheduler.pool
    assert [pick.sequence.request for pick in picks] == [sequence.request for sequence in running]
    assert 0 < sum(pick.num_new for pick in picks) <= scheduler.max_batch_tokens
    assert len(running) <= scheduler.max_sequences
    assert all(pick.samples for pick in picks[:-1])  # only the youngest may be half read
    order = [sequence.request for sequence in (*running, *scheduler.waiting)]
    assert order == sorted(order)
    text_of: dict[int, list[int]] = {}
    for sequence in running:
        assert len(sequence.pages) == pool.count_pages(len(sequence.ids))
        for place, page in enumerate(sequence.pages):
            text = sequence.ids[: (place + 1) * pool.page_size]
            assert text_of.setdefault(page, text) == text  # held twice only where the texts agree


@given(st.integers(0, 2**32))
def test_any_workload_ends_with_every_page_free(seed: int) -> None:
    draw = random.Random(seed)
    most = draw.randint(1, 5)
    scheduler = make(draw.randint(4, 12), draw.randint(1, 4), most + draw.randint(0, 6), most)
    capacity, added = scheduler.pool.capacity, 0
    live: dict[int, Sequence] = {}
    while added < 25 or live:
        if added < 25 and draw.random() < 0.5:
            length = draw.randint(1, max(1, min(14, capacity - 1)))
            wanted = draw.randint(1, max(1, min(10, capacity - length)))
            sequence = Sequence(
                [draw.randrange(2) for _ in range(length)],
                SamplingParams(),
                request=added,
                stop_ids=frozenset({3}),
                max_len=length + wanted,
            )
            scheduler.add(sequence)
            live[added], added = sequence, added + 1
        if live and draw.random() < 0.1:
            scheduler.remove(live.pop(draw.choice(list(live))))
        picks = scheduler.schedule()
        assert bool(picks) == bool(live)
        if picks:
            check_step(scheduler, picks)
            drawn = [pick.sequence for pick in picks if pick.samples]
            scheduler.launch(picks)
            for sequence in drawn:
                scheduler.commit(sequence, [draw.randrange(4)])
            live = {number: sequence for number, sequence in live.items() if not sequence.finish}
    assert not scheduler.running
    assert not scheduler.waiting
    assert scheduler.pool.num_free == scheduler.pool.num_pages
