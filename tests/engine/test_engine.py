"""Laws of the engine: what a request gets depends on its ids, its params and the weights, on nothing else.

The reference is the forward pass without a cache over the whole text. Every way of serving (together, in
chunks, with few pages, with a cache that remembers) must give the tokens of serving alone. Every page comes
back.
"""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from shoal.engine import Completion, Engine, EngineSettings, SamplingParams
from shoal.model.transformer import Transformer
from tests.engine.conftest import TOLERANCE, Uncached, build

GREEDY = SamplingParams(temperature=0, max_tokens=16)
PLAIN = EngineSettings(page_size=8, num_pages=128, max_batch_tokens=512, max_sequences=8, prefix_cache=False)


def mixed_params() -> list[SamplingParams]:
    """For the eight prompts: greedy and sampled, restricted and not, of unequal lengths."""
    return [
        SamplingParams(temperature=0, max_tokens=12),
        SamplingParams(seed=5, max_tokens=9),
        SamplingParams(seed=5, temperature=0.7, top_p=0.9, max_tokens=12),
        SamplingParams(temperature=0, max_tokens=2),
        SamplingParams(seed=2, top_k=20, max_tokens=14),
        SamplingParams(seed=3, min_p=0.05, max_tokens=12),
        SamplingParams(temperature=0, max_tokens=12),
        SamplingParams(seed=9, max_tokens=12),
    ]


def serve_alone(
    model: Transformer, prompts: list[list[int]], params: list[SamplingParams]
) -> list[Completion]:
    each = zip(prompts, params, strict=True)
    return [Engine(model, PLAIN).generate([ids], wish)[0] for ids, wish in each]


@pytest.fixture(scope="module")
def alone(model: Transformer, prompts: list[list[int]]) -> list[Completion]:
    """What each prompt gets with its `mixed_params` when nothing else is served."""
    return serve_alone(model, prompts, mixed_params())


def assert_same(got: list[Completion], expected: list[Completion]) -> None:
    assert [done.ids for done in got] == [done.ids for done in expected]
    assert [done.finish for done in got] == [done.finish for done in expected]
    for one, other in zip(got, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)


# ----------------------------------------------------------------------------------------------------
# Cached equals uncached


def test_greedy_tokens_are_the_best_of_the_uncached_model(
    model: Transformer, prompts: list[list[int]], uncached: Uncached
) -> None:
    for ids, done in zip(prompts, Engine(model, PLAIN).generate(prompts, GREEDY), strict=True):
        logprobs = uncached(model, [*ids, *done.ids])[len(ids) - 1 : -1].log_softmax(-1)
        assert list(done.ids) == logprobs.argmax(-1).tolist()
        chosen = logprobs.gather(1, torch.tensor(done.ids).unsqueeze(1)).squeeze(1)
        assert done.logprobs == pytest.approx(chosen.tolist(), abs=TOLERANCE)


def test_together_equals_alone(model: Transformer, prompts: list[list[int]], alone: list[Completion]) -> None:
    together = Engine(model, PLAIN).generate(prompts, mixed_params())
    assert_same(together, alone)


@pytest.mark.parametrize("budget", [3, 17])
def test_chunks_equal_the_whole_prompt(
    model: Transformer, prompts: list[list[int]], alone: list[Completion], budget: int
) -> None:
    settings = EngineSettings(page_size=8, num_pages=128, max_batch_tokens=budget, max_sequences=2)
    got = Engine(model, settings).generate(prompts, mixed_params())
    assert_same(got, alone)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("buckets", [(), (1, 3, 8)])
def test_padding_and_overlap_change_nothing(
    model: Transformer,
    prompts: list[list[int]],
    alone: list[Completion],
    overlap: bool,
    buckets: tuple[int, ...],
) -> None:
    """Texts of unequal length: the batch shrinks through the buckets, and a stop is noticed a step late."""
    engine = Engine(model, replace(PLAIN, overlap=overlap, buckets=buckets))
    assert_same(engine.generate(prompts, mixed_params()), alone)
    stop = alone[0].ids[3]
    wish = replace(mixed_params()[0], stop_token_ids=(stop,))
    (stopped,) = engine.generate(prompts[:1], wish)
    assert (stopped.ids, stopped.finish) == (alone[0].ids[: alone[0].ids.index(stop) + 1], "stop")
    assert engine.pool.num_free == PLAIN.num_pages
    assert engine.stats().generated == sum(len(done.ids) for done in [*alone, stopped])


@pytest.mark.parametrize("count", [1, 8])
def test_every_step_launched_ahead_draws_for_all(
    v3: Transformer, prompts: list[list[int]], count: int
) -> None:
    """No step waits for the token of the one before it, and none leaves out who could go on."""
    engine = Engine(v3, replace(PLAIN, overlap=True))
    for ids in prompts[:count]:
        engine.add(ids, replace(GREEDY, max_tokens=40, ignore_eos=True))
    for _ in range(3):
        engine.step()
    before = engine.stats()
    for _ in range(20):
        engine.step()
    after = engine.stats()
    assert (after.steps - before.steps, after.generated - before.generated) == (20, 20 * count)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_preemption_changes_nothing(
    model: Transformer,
    prompts: list[list[int]],
    alone: list[Completion],
    prefix_cache: bool,
    overlap: bool,
) -> None:
    settings = EngineSettings(
        page_size=4,
        num_pages=20,
        max_batch_tokens=40,
        max_sequences=8,
        prefix_cache=prefix_cache,
        overlap=overlap,
        buckets=(2, 8),
    )
    engine = Engine(model, settings)
    assert_same(engine.generate(prompts, mixed_params()), alone)
    assert engine.scheduler.num_preemptions > 0
    assert engine.pool.num_free == 20


def test_a_prefix_that_is_remembered_changes_nothing(model: Transformer, prompts: list[list[int]]) -> None:
    """A second turn: the first prompt, its answer, and more. The pages of both are found."""
    engine = Engine(model, EngineSettings(page_size=4, num_pages=128, max_sequences=8))
    answers = engine.generate(prompts, mixed_params())
    turns = [[*ids, *done.ids, 7, 8, 9] for ids, done in zip(prompts, answers, strict=True)]
    found = engine.scheduler.num_positions_remembered
    assert_same(engine.generate(turns, mixed_params()), serve_alone(model, turns, mixed_params()))
    most = sum(len(turn) - 4 for turn in turns)  # all but the last answered token and the three new ones
    assert most - 4 * len(turns) < engine.scheduler.num_positions_remembered - found <= most


def test_forgotten_prefixes_are_computed_with_the_new_weights(
    v3: Transformer, prompts: list[list[int]]
) -> None:
    model = copy.deepcopy(v3)
    engine = Engine(model, EngineSettings(page_size=4, num_pages=64))
    before = engine.generate(prompts[5:6], GREEDY)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.8)
    engine.forget_prefixes()
    after = engine.generate(prompts[5:6], GREEDY)
    assert engine.scheduler.num_positions_remembered == 0
    assert_same(after, serve_alone(model, prompts[5:6], [GREEDY]))
    assert before != after


def test_what_old_pages_hold_is_never_seen(
    model: Transformer, prompts: list[list[int]], alone: list[Completion]
) -> None:
    """NaN in every place that no one has written: one read of them would show in the tokens."""
    engine = Engine(model, PLAIN)
    for pages in engine.runner.pages:
        pages.fill_(math.nan)
    assert_same(engine.generate(prompts, mixed_params()), alone)


def test_penalties_see_the_same_text_however_it_was_served(v3: Transformer, prompts: list[list[int]]) -> None:
    """They read the ids from the pages, where a token lands that has not reached the host."""
    wishes = [
        SamplingParams(temperature=0, max_tokens=16, repetition_penalty=4.0),
        SamplingParams(temperature=0, max_tokens=16, frequency_penalty=9.0),
        SamplingParams(seed=4, max_tokens=16, presence_penalty=8.0, logit_bias=((7, 9.0),)),
        SamplingParams(temperature=0, max_tokens=16),
    ] * 2
    alone = serve_alone(v3, prompts, wishes)
    free = serve_alone(v3, prompts, [GREEDY] * 8)
    assert sum(a.ids != b.ids for a, b in zip(alone, free, strict=True)) >= 3  # they do something
    for settings in (
        replace(PLAIN, overlap=True, buckets=(2, 8)),
        EngineSettings(page_size=4, num_pages=20, max_batch_tokens=9, max_sequences=8, overlap=True),
    ):
        engine = Engine(v3, settings)
        for _ in range(2):
            assert_same(engine.generate(prompts, wishes), alone)


# ----------------------------------------------------------------------------------------------------
# Seeds


def test_a_seed_gives_the_same_tokens_in_any_company(v3: Transformer, prompts: list[list[int]]) -> None:
    wish = SamplingParams(seed=123, max_tokens=12)
    (alone,) = Engine(v3, PLAIN).generate(prompts[2:3], wish)
    others = SamplingParams(max_tokens=30)
    among = Engine(v3, PLAIN).generate([prompts[0], prompts[2], prompts[1]], [others, wish, others])[1]
    assert_same([among], [alone])
    (different,) = Engine(v3, PLAIN).generate(prompts[2:3], SamplingParams(seed=124, max_tokens=12))
    assert different.ids != alone.ids


def test_requests_without_a_seed_differ_but_the_engines_seed_repeats_them(v3: Transformer) -> None:
    wish = SamplingParams(max_tokens=12)
    first, second = (Engine(v3, PLAIN).generate([[1, 2, 3]] * 3, wish) for _ in range(2))
    assert first == second
    assert len({done.ids for done in first}) == 3
    settings = EngineSettings(page_size=8, num_pages=128, prefix_cache=False, seed=1)
    assert Engine(v3, settings).generate([[1, 2, 3]] * 3, wish) != first


# ----------------------------------------------------------------------------------------------------
# Ends


def test_a_text_ends_with_its_stop_token_or_at_its_length(v3: Transformer) -> None:
    engine = Engine(v3, PLAIN)
    (free,) = engine.generate([[1, 2, 3]], GREEDY)
    assert (len(free.ids), free.finish) == (16, "length")
    stop = free.ids[5]
    first = free.ids.index(stop)
    wish = SamplingParams(temperature=0, max_tokens=16, stop_token_ids=(stop,))
    (stopped,) = engine.generate([[1, 2, 3]], wish)
    assert (stopped.ids, stopped.finish) == (free.ids[: first + 1], "stop")


def test_the_end_of_sequence_of_the_model_stops_unless_ignored(v3: Transformer) -> None:
    (free,) = Engine(v3, PLAIN).generate([[1, 2, 3]], GREEDY)
    model = build("deepseek-v3", eos=free.ids[3:5])
    (stopped,) = Engine(model, PLAIN).generate([[1, 2, 3]], GREEDY)
    assert stopped.finish == "stop"
    assert stopped.ids == free.ids[: len(stopped.ids)]
    assert stopped.ids[-1] in free.ids[3:5]
    ignoring = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    assert Engine(model, PLAIN).generate([[1, 2, 3]], ignoring) == [free]


def test_nothing_stops_before_min_tokens(v3: Transformer) -> None:
    stops = tuple(range(500))  # of 512 ids: a text would end at once
    wish = SamplingParams(seed=1, max_tokens=30, min_tokens=6, stop_token_ids=stops)
    (done,) = Engine(v3, PLAIN).generate([[1, 2, 3]], wish)
    assert min(done.ids[:6]) >= 500
    assert done.finish == "stop"
    assert len(done.ids) > 6


def test_without_max_tokens_a_text_ends_with_the_context(v3: Transformer) -> None:
    engine = Engine(v3, EngineSettings(page_size=4, num_pages=10))
    (done,) = engine.generate([[1, 2, 3]], SamplingParams(temperature=0))
    assert (3 + len(done.ids), done.finish) == (40, "length")


# ----------------------------------------------------------------------------------------------------
# Many requests, and requests that go away


def test_events_come_a_token_at_a_time_and_agree_with_generate(
    v3: Transformer, prompts: list[list[int]]
) -> None:
    engine = Engine(v3, PLAIN)
    requests = [engine.add(ids, SamplingParams(temperature=0, max_tokens=5, logprobs=2)) for ids in prompts]
    events = []
    while engine.busy:
        step = engine.step()
        assert len({event.request for event in step}) == len(step)
        events += step
    assert engine.step() == []
    whole = Engine(v3, PLAIN).generate(prompts, SamplingParams(temperature=0, max_tokens=5))
    for request, done in zip(requests, whole, strict=True):
        mine = [event for event in events if event.request == request]
        assert tuple(event.token for event in mine) == done.ids
        assert [event.finish for event in mine] == [None] * 4 + ["length"]
        assert all(event.top[0] == (event.token, event.logprob) for event in mine)  # greedy takes the first


def test_cancelling_frees_the_pages_and_hurts_nobody(v3: Transformer, prompts: list[list[int]]) -> None:
    engine = Engine(v3, EngineSettings(page_size=4, num_pages=30, max_batch_tokens=8, max_sequences=2))
    stays, goes, waits = (engine.add(prompts[at], GREEDY) for at in (2, 3, 4))
    tokens = [event.token for _ in range(4) for event in engine.step()]
    assert engine.cancel(goes)  # while its prompt is being read
    assert engine.cancel(waits)  # before it began
    assert not engine.cancel(goes)
    step = engine.step()
    ends = [(event.request, event.token, event.finish) for event in step[:2]]
    assert ends == [(goes, None, "cancelled"), (waits, None, "cancelled")]
    tokens += [event.token for event in step[2:]]
    while engine.busy:
        step = engine.step()
        assert {event.request for event in step} == {stays}
        tokens += [event.token for event in step]
    assert not engine.cancel(stays)
    assert tuple(tokens) == serve_alone(v3, [prompts[2]], [GREEDY])[0].ids
    assert engine.pool.num_free == 30


def test_a_request_that_is_cancelled_while_its_token_is_on_its_way_gets_none(v3: Transformer) -> None:
    engine = Engine(v3, replace(PLAIN, overlap=True))
    stays, goes = engine.add([1, 2], GREEDY), engine.add([3, 4], GREEDY)
    assert engine.step() == []  # both are on their way
    assert engine.cancel(goes)
    events = []
    while engine.busy:
        events += engine.step()
    assert [(event.token, event.finish) for event in events if event.request == goes] == [(None, "cancelled")]
    tokens = tuple(event.token for event in events if event.request == stays)
    assert tokens == serve_alone(v3, [[1, 2]], [GREEDY])[0].ids
    assert engine.pool.num_free == PLAIN.num_pages


def test_priorities_go_first_and_change_no_text(v3: Transformer, prompts: list[list[int]]) -> None:
    """One place to run: the urgent request takes it from the one that has it, which then goes on."""
    engine = Engine(v3, EngineSettings(page_size=4, num_pages=32, max_batch_tokens=64, max_sequences=1))
    slow, later = (engine.add(prompts[at], GREEDY) for at in (2, 4))
    events = engine.step() + engine.step()
    urgent = engine.add(prompts[1], replace(GREEDY, priority=-1))
    while engine.busy:
        events += engine.step()
    ends = [event.request for event in events if event.finish]
    assert ends == [urgent, slow, later]
    for request, at in ((slow, 2), (later, 4), (urgent, 1)):
        tokens = tuple(event.token for event in events if event.request == request)
        assert tokens == serve_alone(v3, [prompts[at]], [GREEDY])[0].ids
    assert engine.stats().preemptions == 1


def test_a_long_prompt_starves_nobody(v3: Transformer) -> None:
    """Whoever decodes gets a token in every step while a prompt of 30 steps is read, urgent or not."""
    engine = Engine(v3, EngineSettings(page_size=8, num_pages=64, max_batch_tokens=8, max_sequences=4))
    talking = [engine.add([at], replace(GREEDY, max_tokens=40)) for at in (1, 2)]
    engine.step()
    engine.add([3] * 180, replace(GREEDY, max_tokens=1, priority=-1))
    for _ in range(29):
        assert {event.request for event in engine.step()} == set(talking)


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_requests_leave_every_page_free(count: int) -> None:
    """Random lengths, budgets, priorities, cancels; whoever was not cancelled gets what it asked for."""
    draw = random.Random(0)
    engine = Engine(
        build("r1-distill-qwen-1.5b"),
        EngineSettings(
            page_size=4,
            num_pages=24,
            max_batch_tokens=24,
            max_sequences=12,
            overlap=True,
            buckets=(4, 12),
        ),
    )
    wanted: dict[int, int] = {}
    got: Counter[int] = Counter()
    live: list[int] = []

    def step() -> None:
        for event in engine.step():
            if event.finish != "cancelled":
                got[event.request] += 1
                if event.finish:
                    live.remove(event.request)

    for _ in range(count):
        ids = [draw.randrange(3) for _ in range(draw.randint(1, 40))]
        wish = SamplingParams(
            temperature=draw.choice([0, 1]),
            max_tokens=draw.randint(1, 8),
            priority=draw.choice([0, 0, 0, 1, -1]),
            frequency_penalty=draw.choice([0, 0, 1]),
        )
        live.append(engine.add(ids, wish))
        wanted[live[-1]] = wish.max_tokens or 0
        while len(live) > 16:
            step()
        if draw.random() < 0.2:
            gone = live.pop(draw.randrange(len(live)))
            assert engine.cancel(gone)
            del wanted[gone], got[gone]
    while engine.busy:
        step()
    assert not live
    assert got == wanted
    assert engine.scheduler.num_preemptions > 0
    assert engine.scheduler.num_positions_remembered > 0
    assert engine.pool.num_free == 24
    assert engine.pool.num_held == 0
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_free) == (0, 0, 24)


# ----------------------------------------------------------------------------------------------------
# Scores of given text


@pytest.mark.parametrize("budget", [5, 512])
def test_scores_are_those_of_the_uncached_model(
    model: Transformer, prompts: list[list[int]], uncached: Uncached, budget: int
) -> None:
    ids = prompts[3]
    engine = Engine(model, EngineSettings(page_size=8, num_pages=8, max_batch_tokens=budget, max_sequences=2))
    logprobs = uncached(model, ids)[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:]).unsqueeze(1))
    assert engine.score(ids) == pytest.approx(logprobs.squeeze(1).tolist(), abs=TOLERANCE)
    assert engine.pool.num_free == 8


def test_a_text_scores_as_it_was_generated_also_beside_requests(v3: Transformer) -> None:
    engine = Engine(v3, PLAIN)
    (done,) = engine.generate([[1, 2, 3]], GREEDY)
    request = engine.add([4, 5], GREEDY)
    tokens = [event.token for event in engine.step()]
    assert engine.score([1, 2, 3, *done.ids])[2:] == pytest.approx(done.logprobs, abs=TOLERANCE)
    while engine.busy:
        tokens += [event.token for event in engine.step() if event.request == request]
    assert tuple(tokens) == serve_alone(v3, [[4, 5]], [GREEDY])[0].ids


def test_one_token_has_no_score(v3: Transformer) -> None:
    assert Engine(v3, PLAIN).score([1]) == []


# ----------------------------------------------------------------------------------------------------
# Refusals and failures


@pytest.mark.parametrize(
    ("ids", "params", "message"),
    [
        ([], GREEDY, "the prompt is empty; give at least one token"),
        ([1, 512], GREEDY, "the prompt has token 512, outside the vocabulary of 512"),
        ([-1], GREEDY, "the prompt has token -1, outside the vocabulary of 512"),
        ([1], SamplingParams(stop_token_ids=(600,)), "stop_token_ids has token 600, outside the vocabulary"),
        ([1], SamplingParams(logprobs=513), "logprobs is 513; the vocabulary has 512 tokens"),
        ([1] * 250, GREEDY, r"250 tokens with 16 to generate needs 266 positions, but the model has 256"),
        ([1] * 256, SamplingParams(), r"256 tokens with 1 to generate needs 257 positions, .* has 256"),
        ([1], SamplingParams(min_tokens=300), "needs 301 positions, but the model has 256"),
        ([1] * 70, GREEDY, r"needs 86 positions, but the cache has 80 \(10 pages of 8\); .* num_pages to 11"),
    ],
)
def test_a_request_that_could_never_be_served_is_refused(
    ids: list[int], params: SamplingParams, message: str
) -> None:
    settings = EngineSettings(page_size=8, num_pages=10)
    engine = Engine(build("qwen3-30b-a3b"), settings)
    with pytest.raises(ValueError, match=message):
        engine.add(ids, params)
    assert not engine.busy


def test_a_text_too_long_to_score_is_refused(v3: Transformer) -> None:
    with pytest.raises(ValueError, match="needs 300 positions, but the model has 256"):
        Engine(build("qwen3-30b-a3b"), PLAIN).score([1] * 300)
    engine = Engine(v3, EngineSettings(page_size=8, num_pages=10))
    engine.add([1] * 20, GREEDY)
    engine.step()
    with pytest.raises(ValueError, match="82 tokens needs 11 pages, but 7 of 10 are free"):
        engine.score([1] * 82)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"page_size": 0}, "page_size is 0; it must be at least 1"),
        ({"num_pages": 0}, "num_pages is 0; it must be at least 1"),
        ({"max_sequences": 9, "max_batch_tokens": 8}, "max_sequences 9 exceeds max_batch_tokens 8"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineSettings(**settings)


def test_the_cache_is_as_large_as_its_budget_and_no_larger_than_useful() -> None:
    model = build("qwen3-30b-a3b")  # a context of 256: 32 pages of 8
    page_bytes = sum(pages.nbytes for pages in Engine(model, PLAIN).runner.pages) // 129  # one takes padding

    def count(cache_bytes: int) -> int:
        return Engine(
            model, EngineSettings(page_size=8, max_sequences=2, cache_bytes=cache_bytes)
        ).pool.num_pages

    assert count(5 * page_bytes + 1) == 5
    assert count(1 << 30) == 64
    with pytest.raises(
        ValueError, match=rf"cache_bytes is 100, but a page of 8 positions takes {page_bytes}"
    ):
        count(100)


def test_generate_leaves_nothing_behind_when_a_prompt_is_refused(v3: Transformer) -> None:
    engine = Engine(v3, PLAIN)
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.generate([[1, 2], [3], []], GREEDY)
    assert not engine.busy
    assert engine.pool.num_free == 128


def test_generate_refuses_what_it_would_mix_up(v3: Transformer) -> None:
    engine = Engine(v3, PLAIN)
    with pytest.raises(ValueError, match="2 prompts and 1 params"):
        engine.generate([[1], [2]], [GREEDY])
    engine.add([1], GREEDY)
    with pytest.raises(ValueError, match="requests are being served"):
        engine.generate([[1]], GREEDY)


def test_broken_weights_end_the_request_and_the_rest_goes_on(v3: Transformer) -> None:
    model = copy.deepcopy(v3)
    engine = Engine(model, PLAIN)
    sound, broken = engine.add([1, 2], GREEDY), engine.add([3, 4], GREEDY)
    with torch.no_grad():
        model.model.embed_tokens.weight[4] = math.nan
    events = []
    while engine.busy:
        events += engine.step()
    (end,) = [event for event in events if event.request == broken]
    assert (end.token, end.finish) == (None, "error")
    assert end.error is not None
    assert f"request {broken}: the logits of token 2 are not finite" in end.error
    tokens = [event.token for event in events if event.request == sound]
    assert tuple(tokens) == serve_alone(v3, [[1, 2]], [GREEDY])[0].ids
    with pytest.raises(FloatingPointError, match="the logits of token 2 are not finite"):
        engine.generate([[3, 4]], GREEDY)
    assert engine.pool.num_free == PLAIN.num_pages
