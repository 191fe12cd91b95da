"""Laws of speculation: the same texts, token for token, greedy or sampled, however often guesses are right.

A random model's module never guesses right. One is built whose layers add nothing and whose module passes the
embedding on: it guesses always right. Between them lies a model whose layers add a little.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine import Engine, EngineSettings, SamplingParams
from shoal.engine.speculation import Governor
from shoal.model.layers import MLP
from shoal.model.mla import MLA
from shoal.model.moe import MoE
from shoal.model.transformer import Block, PredictionModule, Transformer
from tests.engine.conftest import build
from tests.engine.test_engine import assert_same, mixed_params

PLAIN = EngineSettings(page_size=8, num_pages=128, max_batch_tokens=512, max_sequences=8, prefix_cache=False)
ALWAYS_RIGHT, SOMETIMES = 0.0, 0.006


@torch.no_grad()
def clairvoyant(share: float) -> Transformer:
    """What a layer adds is scaled by `share`; the module sees the next token's embedding alone."""
    model = copy.deepcopy(build("deepseek-v3"))
    for block in model.model.layers:
        assert isinstance(block, Block)
        assert isinstance(block.self_attn, MLA)
        block.self_attn.o_proj.weight.mul_(share)
        if isinstance(block.mlp, MoE):
            block.mlp.experts.down_proj.mul_(share)
            assert block.mlp.shared_experts is not None
            block.mlp.shared_experts.down_proj.weight.mul_(share)
        else:
            assert isinstance(block.mlp, MLP)
            block.mlp.down_proj.weight.mul_(share)
        if isinstance(block, PredictionModule):
            size = model.config.hidden_size
            block.eh_proj.weight.copy_(torch.cat((torch.eye(size), torch.zeros(size, size)), 1))
    return model


WAYS = {
    "plain": PLAIN,
    "padded": replace(PLAIN, buckets=(1, 3, 8)),
    "chunks": replace(PLAIN, max_batch_tokens=24, prefix_cache=True),
    "few pages": replace(PLAIN, page_size=4, num_pages=20, max_batch_tokens=60, prefix_cache=True),
}


@pytest.mark.parametrize("share", [ALWAYS_RIGHT, SOMETIMES, 1.0])
@pytest.mark.parametrize("way", WAYS)
def test_guesses_change_no_text(share: float, way: str, prompts: list[list[int]]) -> None:
    model = clairvoyant(share)
    expected = Engine(model, PLAIN).generate(prompts, mixed_params())
    engine = Engine(model, replace(WAYS[way], speculate=3))
    for _ in range(2):
        assert_same(engine.generate(prompts, mixed_params()), expected)
    stats = engine.stats()
    assert stats.drafted[0] > 0
    assert list(stats.drafted) == sorted(stats.drafted, reverse=True)
    if share == ALWAYS_RIGHT:
        assert sum(stats.accepted) > 0.9 * sum(stats.drafted)
        assert stats.steps < stats.generated
    if share == SOMETIMES:
        assert 0 < sum(stats.accepted) < sum(stats.drafted)
    assert engine.pool.num_free == engine.pool.num_pages


def test_guessing_on_and_off_at_every_size_changes_no_text(prompts: list[list[int]]) -> None:
    """The governor's decisions depend on the clock; here they are as wild as can be."""
    model = clairvoyant(SOMETIMES)
    expected = Engine(model, PLAIN).generate(prompts, mixed_params())

    class Coin(Governor):
        draw = random.Random(0)

        def decide(self, size: int) -> bool:
            return self.draw.random() < 0.5

    engine = Engine(model, replace(PLAIN, speculate=3), governor=Coin())
    for _ in range(5):
        assert_same(engine.generate(prompts, mixed_params()), expected)
    assert sum(engine.stats().accepted) > 0


def test_right_guesses_save_steps(prompts: list[list[int]]) -> None:
    """A text of 21 tokens: one from the prompt, then four a step."""
    engine = Engine(clairvoyant(ALWAYS_RIGHT), replace(PLAIN, speculate=3))
    (done,) = engine.generate(prompts[:1], SamplingParams(temperature=0, max_tokens=21))
    assert len(done.ids) == 21
    assert engine.stats().steps == 1 + 5
    assert engine.stats().accepted == engine.stats().drafted == (5, 5, 5)


def test_sampled_frequencies_are_those_of_plain_sampling() -> None:
    """The second token of many seeds: right and wrong guesses alike leave its distribution what it is."""
    model = clairvoyant(SOMETIMES)
    params = [SamplingParams(seed=seed, top_k=6, max_tokens=3) for seed in range(400)]
    settings = replace(PLAIN, max_sequences=64)
    plain = Engine(model, settings).generate([[5, 9]] * 400, params)
    engine = Engine(model, replace(settings, speculate=2))
    guessed = engine.generate([[5, 9]] * 400, params)
    assert Counter(done.ids for done in guessed) == Counter(done.ids for done in plain)
    assert len({done.ids for done in plain}) > 50
    assert 0 < engine.stats().accepted[0] < engine.stats().drafted[0]


def test_penalties_stops_and_records_hold_under_speculation(prompts: list[list[int]]) -> None:
    model = clairvoyant(SOMETIMES)
    wish = SamplingParams(temperature=0, max_tokens=20, frequency_penalty=2.0, logprobs=2, routing=True)
    (free,) = Engine(model, PLAIN).generate(prompts[2:3], wish)
    for params in (wish, replace(wish, stop_token_ids=(free.ids[7],), min_tokens=3)):
        (plain,) = Engine(model, PLAIN).generate(prompts[2:3], params)
        (done,) = Engine(model, replace(PLAIN, speculate=3)).generate(prompts[2:3], params)
        assert (done.ids, done.finish) == (plain.ids, plain.finish)
        assert done.routing is not None
        assert plain.routing is not None
        assert torch.equal(done.routing, plain.routing)


def test_what_is_told_token_by_token_has_no_wrong_guess_in_it(prompts: list[list[int]]) -> None:
    model = clairvoyant(SOMETIMES)
    wish = SamplingParams(temperature=0, max_tokens=20, routing=True)
    plain = Engine(model, PLAIN).generate(prompts, wish)
    engine, told = Engine(model, replace(PLAIN, speculate=3)), [[] for _ in prompts]
    for ids in prompts:
        engine.add(ids, replace(wish, routing_from=1))
    while engine.busy:
        for event in engine.step():
            if event.routed is not None:
                told[event.request].append(event.routed.experts)
    for parts, done in zip(told, plain, strict=True):
        assert done.routing is not None
        assert torch.equal(torch.cat(parts), done.routing[1:])
    assert 0 < sum(engine.stats().accepted) < sum(engine.stats().drafted)


def test_cancels_and_full_pages_leave_nothing_behind_while_guessing() -> None:
    """Random lengths, priorities and cancels over few pages, which drafts want too."""
    draw = random.Random(0)
    settings = EngineSettings(page_size=4, num_pages=24, max_batch_tokens=40, max_sequences=8, speculate=3)
    engine = Engine(clairvoyant(SOMETIMES), settings)
    wanted: dict[int, int] = {}
    got: Counter[int] = Counter()
    live: list[int] = []

    def step() -> None:
        for event in engine.step():
            assert event.error is None
            got[event.request] += event.token is not None
            if event.finish and event.request in live:
                live.remove(event.request)

    for _ in range(120):
        ids = [draw.randrange(3) for _ in range(draw.randint(1, 40))]
        wish = SamplingParams(
            temperature=draw.choice([0, 1]),
            max_tokens=draw.randint(1, 12),
            priority=draw.choice([0, 0, 1]),
            presence_penalty=draw.choice([0, 0, 1]),
        )
        live.append(engine.add(ids, wish))
        wanted[live[-1]] = wish.max_tokens or 0
        while len(live) > 12:
            step()
        if draw.random() < 0.2:
            gone = live.pop(draw.randrange(len(live)))
            assert engine.cancel(gone)
            del wanted[gone]
    while engine.busy:
        step()
    assert {request: got[request] for request in wanted} == wanted
    assert engine.stats().preemptions > 0
    assert sum(engine.stats().accepted) > 0
    assert (engine.pool.num_free, engine.pool.num_held) == (24, 0)


def test_what_cannot_be_guessed_is_refused() -> None:
    with pytest.raises(ValueError, match="speculate is 2, but this model has no prediction module"):
        Engine(build("deepseek-v2-lite"), replace(PLAIN, speculate=2))
    with pytest.raises(ValueError, match="overlap is True and speculate is 1"):
        replace(PLAIN, speculate=1, overlap=True)
    with pytest.raises(ValueError, match="speculate is -1"):
        replace(PLAIN, speculate=-1)


# ----------------------------------------------------------------------------------------------------
# Whether it pays


@given(st.floats(0.2, 5.0), st.integers(0, 3))
def test_the_governor_keeps_what_is_faster(ratio: float, size_class: int) -> None:
    """A machine on which guessing gives `ratio` times the tokens a second; noise is none of its business."""
    governor, size = Governor(trial=4, term=40), 1 << size_class
    guessed = 0
    for _ in range(400):
        guesses = governor.decide(size)
        guessed += guesses
        governor.observe(size, seconds=1.0 if guesses else ratio, tokens=size)
    if abs(ratio - 1) > 0.01:
        share = guessed / 400
        assert share > 0.8 if ratio > 1 else share < 0.2


def test_the_governor_notices_that_the_texts_have_changed() -> None:
    governor = Governor(trial=4, term=40)

    def run(steps: int, ratio: float) -> float:
        guessed = 0
        for _ in range(steps):
            guesses = governor.decide(1)
            guessed += guesses
            governor.observe(1, seconds=1.0 if guesses else ratio, tokens=1)
        return guessed / steps

    assert run(200, 2.0) > 0.8
    run(100, 0.5)  # a term ends, both are tried
    assert run(200, 0.5) < 0.2
    assert governor.decide(64)  # other sizes have their own say
