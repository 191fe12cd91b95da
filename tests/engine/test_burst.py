"""Laws of bursts: how many steps are launched in a row changes nothing of what a request gets.

In batch-invariant mode a row's bits do not depend on the rows beside it, so everything is compared to the
bit; in the other, where a request that has ended leaves a product with fewer rows, to rounding.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from shoal.engine import Completion, Engine, EngineSettings, Event, SamplingParams
from shoal.engine.blocks import BlockPool
from shoal.engine.runner import Step
from shoal.engine.scheduler import Pick, Scheduler
from shoal.engine.sequence import Sequence
from shoal.engine.spans import Span
from shoal.model.transformer import Transformer
from shoal.ops import dispatch
from tests.engine.conftest import build
from tests.engine.test_engine import assert_same

PLAIN = EngineSettings(page_size=8, num_pages=128, max_batch_tokens=64, max_sequences=8)
FEW = replace(PLAIN, page_size=4, num_pages=24, max_batch_tokens=40)


def wishes(model: Transformer) -> list[SamplingParams]:
    """Unequal lengths, none a multiple of a burst's; ends by a stop that is drawn sooner or later; whatever
    bends logits."""
    greedy = SamplingParams(temperature=0, max_tokens=21, routing=model.config.moe is not None)
    return [
        greedy,
        replace(greedy, max_tokens=1),
        replace(greedy, temperature=1.0, seed=3, stop_token_ids=tuple(range(0, 512, 9))),
        replace(greedy, temperature=0.8, seed=2**64 - 1, top_p=0.9, max_tokens=13),
        replace(greedy, temperature=1.0, seed=5, top_k=9, min_p=0.05, logprobs=3),
        replace(greedy, frequency_penalty=3.0, repetition_penalty=2.0, logit_bias=((7, 3.0),)),
        replace(greedy, temperature=1.0, min_tokens=6, stop_token_ids=tuple(range(0, 512, 3))),
        replace(greedy, temperature=1.0, prompt_logprobs=2, max_tokens=19),
    ]


def everything(done: Completion) -> tuple[Any, ...]:
    routing = None if done.routing is None else done.routing.tolist()
    told = done.ids, done.logprobs, done.tops, done.finish, done.cached
    return *told, done.prompt_logprobs, done.prompt_tops, routing


def turns(engine: Engine, prompts: list[list[int]]) -> list[tuple[Any, ...]]:
    """The prompts, and each answered again as a longer one, of which the cache has the beginning."""
    params = wishes(engine.runner.model)
    first = engine.generate(prompts, params)
    longer = [[*ids, *done.ids, 7] for ids, done in zip(prompts, first, strict=True)]
    return [everything(done) for done in (*first, *engine.generate(longer, params))]


@pytest.mark.parametrize(
    ("family", "overlap", "buckets", "steps"),
    [
        ("deepseek-v3", False, (1, 3, 8), 8),
        ("deepseek-v3", True, (), 5),
        ("qwen3-30b-a3b", True, (1, 3, 8), 8),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in product(
                ["deepseek-v3", "qwen3-30b-a3b"], [False, True], [(), (1, 3, 8)], [2, 3, 8, 16]
            )
        ),
    ],
)
def test_bursts_give_the_same_bits(
    family: str, overlap: bool, buckets: tuple[int, ...], steps: int, prompts: list[list[int]]
) -> None:
    model = build(family)
    with dispatch.batch_invariant():
        step_by_step = Engine(model, replace(PLAIN, overlap=overlap))
        expected = turns(step_by_step, prompts)
        engine = Engine(model, replace(PLAIN, overlap=overlap, buckets=buckets, decode_steps=steps))
        assert turns(engine, prompts) == expected
    assert engine.pool.num_free == PLAIN.num_pages
    told, before = engine.stats(), step_by_step.stats()
    assert told.generated == before.generated
    assert told.prompt_positions_cached == before.prompt_positions_cached > 0


def test_bursts_of_every_kind_of_attention(model: Transformer, prompts: list[list[int]]) -> None:
    params = wishes(model)
    expected = Engine(model, PLAIN).generate(prompts, params)
    found = Engine(model, replace(PLAIN, overlap=True, buckets=(8,), decode_steps=8)).generate(
        prompts, params
    )
    assert_same(found, expected)
    for done, other in zip(found, expected, strict=True):
        if other.routing is not None:
            assert done.routing is not None
            assert torch.equal(done.routing, other.routing)


@pytest.mark.parametrize("overlap", [False, True])
def test_pages_that_run_short_make_bursts_short(overlap: bool, prompts: list[list[int]]) -> None:
    model = build("deepseek-v3")
    with dispatch.batch_invariant():
        expected = [everything(done)[:4] for done in Engine(model, PLAIN).generate(prompts, wishes(model))]
        engine = Engine(model, replace(FEW, overlap=overlap, decode_steps=8))
        found = [everything(done)[:4] for done in engine.generate(prompts, wishes(model))]
    assert found == expected
    assert engine.stats().preemptions > 0
    assert engine.pool.num_free == FEW.num_pages


@pytest.mark.parametrize("overlap", [False, True])
def test_whoever_is_cancelled_between_bursts_leaves_the_others_alone(
    overlap: bool, prompts: list[list[int]]
) -> None:
    model = build("deepseek-v3")
    params = wishes(model)
    with dispatch.batch_invariant():
        expected = Engine(model, PLAIN).generate(prompts, params)
        engine = Engine(model, replace(PLAIN, overlap=overlap, decode_steps=4))
        requests = [engine.add(ids, wish) for ids, wish in zip(prompts, params, strict=True)]
        events: list[Event] = []
        for _ in range(4):
            events += engine.step()
        assert engine.cancel(requests[0])
        while engine.busy:
            events += engine.step()
    for request, done in list(zip(requests, expected, strict=True)):
        mine = [event for event in events if event.request == request]
        tokens = tuple(event.token for event in mine if event.token is not None)
        if request != requests[0]:
            assert (tokens, mine[-1].finish) == (done.ids, done.finish)
            continue
        assert mine[-1].finish == "cancelled"
        assert 0 < len(tokens) < len(done.ids)
        assert tokens == done.ids[: len(tokens)]
        rows = mine[-1].routing
        assert rows is not None and done.routing is not None
        assert torch.equal(rows, done.routing[: len(rows)])
    assert engine.pool.num_free == PLAIN.num_pages


def test_where_positions_were_sent_is_told_once(prompts: list[list[int]]) -> None:
    model = build("deepseek-v3")
    params = [replace(wish, routing_from=0) for wish in wishes(model)]
    engine = Engine(model, replace(PLAIN, overlap=True, decode_steps=4))
    requests = [engine.add(ids, wish) for ids, wish in zip(prompts, params, strict=True)]
    events: list[Event] = []
    while engine.busy:
        events += engine.step()
    for request in requests:
        mine = [event for event in events if event.request == request]
        told = torch.cat([event.routed.experts for event in mine if event.routed is not None])
        assert mine[-1].routing is not None
        assert torch.equal(told, mine[-1].routing)


def test_a_burst_is_one_step_to_who_waits_and_a_prompt_is_never_in_one() -> None:
    """Eight tokens at a time; who comes is read at once, beside one token of those who decode."""
    engine = Engine(build("deepseek-v3"), replace(PLAIN, decode_steps=8))
    wish = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    counts = []
    for prompt in ([1, 2, 3], None, [4, 5]):
        if prompt is not None:
            engine.add(prompt, wish)
        told = [event.request for event in engine.step()]
        counts.append((told.count(0), told.count(1)))
    assert counts == [(1, 0), (8, 0), (1, 1)]
    while engine.busy:
        engine.step()
    assert engine.stats().steps == engine.runner.calls == 1 + 8 + 1 + 20 + 9


def test_places_that_come_free_one_by_one_are_filled_once_a_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    """While somebody waits for a place, no two steps in a row read prompts; one that fills its budget is gone
    on with."""
    prompts = [[request + 1] * 4 for request in range(9)]
    wishes = [SamplingParams(max_tokens=3 + request, ignore_eos=True, seed=request) for request in range(9)]
    told = []
    for decode_steps, budget in ((1, 64), (4, 64), (4, 9)):
        settings = replace(PLAIN, decode_steps=decode_steps, max_sequences=3, max_batch_tokens=budget)
        engine = Engine(build("deepseek-v3"), settings)
        steps: list[tuple[bool, int, bool]] = []
        run = engine.runner.run

        def note(spans: list[Span], ends: list[int] | None = None) -> Step:
            lengths = [len(span.codes) for span in spans]
            steps.append((max(lengths) > 1, sum(lengths), bool(engine.scheduler.waiting)))  # noqa: B023
            return run(spans, ends)  # noqa: B023

        monkeypatch.setattr(engine.runner, "run", note)
        told.append([answer.ids for answer in engine.generate(prompts, wishes)])
        for (read, tokens, waited), (reads, *_) in itertools.pairwise(steps):
            if decode_steps > 1 and read and waited and tokens < budget:
                assert not reads
        in_a_row = sum(read and reads for (read, *_), (reads, *_) in itertools.pairwise(steps))
        assert (in_a_row > 0) == ((decode_steps, budget) != (4, 64))
    assert told[0] == told[1] == told[2]


def test_pages_are_taken_ahead_for_what_can_be_drawn_and_no_more() -> None:
    scheduler = Scheduler(BlockPool(8, 4), max_batch_tokens=64, max_sequences=4)
    for request, (length, wanted) in enumerate([(3, 20), (3, 2)]):
        scheduler.add(
            Sequence([request] * length, SamplingParams(), request=request, max_len=length + wanted)
        )
    picks = scheduler.schedule()
    scheduler.launch(picks)
    for pick in picks:
        scheduler.commit(pick.sequence, [9])
    picks = scheduler.schedule()
    assert [pick.num_new for pick in picks] == [1, 1]
    assert scheduler.extend(picks, 8) == [8, 1]
    assert [len(pick.sequence.pages) for pick in picks] == [3, 1]  # positions 3 to 10, and 3 alone
    assert scheduler.extend(picks, 40) == [19, 1]  # the first's room
    assert scheduler.pool.num_free == 8 - 6 - 1
    scheduler.launch(picks, [19, 1])
    assert [pick.sequence.num_computed for pick in picks] == [22, 4]


def test_few_free_pages_halve_a_burst() -> None:
    scheduler = Scheduler(BlockPool(5, 4), max_batch_tokens=64, max_sequences=4)
    sequences = [Sequence([at] * 4, SamplingParams(), request=at, max_len=20) for at in range(2)]
    for sequence in sequences:
        scheduler.add(sequence)
    picks = scheduler.schedule()
    scheduler.launch(picks)
    for sequence in sequences:
        scheduler.commit(sequence, [9])
    picks = scheduler.schedule()
    assert scheduler.pool.num_free == 1
    assert scheduler.extend(picks, 8) == [4, 4]
    assert [len(sequence.pages) for sequence in sequences] == [2, 2]
    assert isinstance(picks[0], Pick)


def test_bursts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="decode_steps is 0; it must be at least 1"):
        EngineSettings(decode_steps=0)
    with pytest.raises(ValueError, match=r"decode_steps is 8 and speculate is 2, .* set decode_steps to 1"):
        EngineSettings(decode_steps=8, speculate=2)
