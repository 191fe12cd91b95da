"""Laws of the order of admission: nobody is passed more often than the bound, priorities hold, and what a
request gets is the same; and that it does what it is for, on experts that differ by kind of text.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine import Engine, EngineSettings, SamplingParams
from shoal.engine.blocks import BlockPool
from shoal.engine.order import GROUPS, Affinity
from shoal.engine.scheduler import Scheduler
from shoal.engine.sequence import Sequence
from tests.engine.conftest import build

KINDS, EXPERTS = 3, 12


def ask(number: int, kind: int, *, length: int = 6, wanted: int = 3, priority: int = 0) -> Sequence:
    """A text of ids that its kind alone has."""
    ids = [100 * kind + (7 * number + at) % 50 for at in range(length)]
    return Sequence(ids, SamplingParams(priority=priority), request=number, max_len=length + wanted)


def taught(patience: int) -> Affinity:
    """Each kind goes to four experts of its own, in one layer."""
    order = Affinity(EXPERTS, patience)
    for number in range(2 * GROUPS):
        kind = number % KINDS
        order.learn(ask(number, kind), lambda kind=kind: torch.arange(4).view(4, 1, 1) + 4 * kind)
    return order


def test_those_of_a_kind_run_together_and_ties_go_by_arrival() -> None:
    order = taught(patience=8)
    waiting = [ask(number, number % KINDS) for number in range(1, 7)]
    assert order.choose(waiting, [ask(0, 0)]) == 2
    assert order.choose(waiting, [ask(0, 1)]) == 0
    assert order.choose(waiting, []) == 0


def test_a_guess_is_what_texts_of_the_kind_did() -> None:
    order = taught(patience=8)
    guess = order.predict(ask(99, 1))
    assert guess is not None
    assert guess[0].tolist() == [0.0] * 4 + [0.25] * 4 + [0.0] * 4
    assert Affinity(EXPERTS, 8).predict(ask(99, 1)) is None


@given(st.integers(0, 2**32))
def test_nobody_is_passed_beyond_the_bound_and_priorities_hold(seed: int) -> None:
    """Pages are scarce, so requests give way too; some are cancelled. Passing is counted from outside."""
    draw = random.Random(seed)
    patience, most = draw.randint(1, 5), draw.randint(1, 4)
    scheduler = Scheduler(
        BlockPool(draw.randint(4, 12), 4),
        max_batch_tokens=most + 8,
        max_sequences=most,
        order=taught(patience),
    )
    passed: dict[int, int] = {}
    admitted: set[int] = set()
    live: dict[int, Sequence] = {}
    added = 0
    while added < 30 or live:
        for _ in range(draw.randint(0, 4) if added < 30 else 0):
            length, priority = draw.randint(1, 8), draw.choice((0, 0, 0, 1))
            live[added] = ask(added, draw.randrange(KINDS), length=length, priority=priority)
            passed[added] = 0
            scheduler.add(live[added])
            added += 1
        if live and draw.random() < 0.1:
            scheduler.remove(live.pop(draw.choice(list(live))))
        before = {sequence.request for sequence in scheduler.running}
        picks = scheduler.schedule()
        assert bool(picks) == bool(live)
        news = [sequence for sequence in scheduler.running if sequence.request not in before]
        for new in news:
            admitted.add(new.request)
        for waits in scheduler.waiting:
            if waits.request not in admitted:
                assert all(new.params.priority <= waits.params.priority for new in news)
                mine = [new for new in news if new.params.priority == waits.params.priority]
                passed[waits.request] += sum(new.request > waits.request for new in mine)
                assert passed[waits.request] <= patience
        drawn = [pick.sequence for pick in picks if pick.samples]
        scheduler.launch(picks)
        for sequence in drawn:
            scheduler.commit(sequence, [7])
            if sequence.finish:
                del live[sequence.request]
    assert scheduler.pool.num_held == 0


def test_what_a_request_gets_is_the_same(prompts: list[list[int]]) -> None:
    model = build("deepseek-v3")
    params = SamplingParams(temperature=0, max_tokens=6)
    settings = EngineSettings(page_size=8, num_pages=64, max_sequences=2)
    plain, other = Engine(model, settings), Engine(model, replace(settings, affinity=4))
    asked = 4 * prompts
    told = [done.ids for done in plain.generate(asked, params)]
    for _ in range(2):  # with nothing learned, and with it
        assert [done.ids for done in other.generate(asked, params)] == told


def test_a_bound_that_means_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"affinity is -1; it must be at least 0"):
        EngineSettings(affinity=-1)
    with pytest.raises(ValueError, match=r"affinity is 4, but this model routes nothing; set it to 0"):
        Engine(build("r1-distill-qwen-1.5b"), EngineSettings(num_pages=8, affinity=4))
