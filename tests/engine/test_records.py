"""Laws of the records: the experts told of a request are those that one plain pass over its text chooses, in
whatever way it was served, and replaying them gives its logits.

Choices are compared as they are: scores of these weights lie far apart against rounding, so none flips.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from shoal.batch import Batch
from shoal.engine import Engine, EngineSettings, Event, SamplingParams
from shoal.model.transformer import Transformer
from tests.engine.conftest import TOLERANCE, Uncached, build

PLAIN = EngineSettings(page_size=4, num_pages=128, max_batch_tokens=512, max_sequences=8)
WISH = SamplingParams(temperature=0, max_tokens=12, routing=True)
MOE = ["deepseek-v3", "deepseek-v2-lite", "qwen3-30b-a3b"]


class Pass(NamedTuple):
    experts_TLK: Tensor
    logits_TV: Tensor
    weights_TLK: Tensor


@torch.inference_mode()
def plain_pass(model: Transformer, ids: list[int], routing: Tensor | None = None) -> Pass:
    """One pass without a cache."""
    batch = Batch(
        ids_T=torch.tensor(ids),
        positions_T=torch.arange(len(ids)),
        cu_seqlens_S1=torch.tensor([0, len(ids)], dtype=torch.int32),
        max_seqlen=len(ids),
        routing=routing,
    )
    output = model(batch)
    experts_TLK, weights_TLK = (
        torch.stack([layer[column] for layer in output.routing], 1) for column in (0, 1)
    )
    return Pass(experts_TLK, model.logits(output.hidden_TD, batch), weights_TLK)


WAYS = {
    "plain": PLAIN,
    "chunks": replace(PLAIN, max_batch_tokens=5, max_sequences=3),
    "few pages": replace(PLAIN, num_pages=20, max_batch_tokens=40),
    "few pages, overlap": replace(PLAIN, num_pages=20, max_batch_tokens=40, overlap=True),
    "padded, overlap": replace(PLAIN, buckets=(1, 3, 8), overlap=True),
}


@pytest.mark.parametrize("family", MOE)
@pytest.mark.parametrize("way", WAYS)
def test_the_record_is_that_of_a_plain_pass(family: str, way: str, prompts: list[list[int]]) -> None:
    model, engine = build(family), Engine(build(family), WAYS[way])
    for _ in range(2):  # the second time most of each prompt is found in the cache
        for ids, done in zip(prompts, engine.generate(prompts, WISH), strict=True):
            text = [*ids, *done.ids]
            assert done.routing is not None
            expected, logits, _ = plain_pass(model, text[:-1])
            assert done.routing.dtype == torch.int16
            assert torch.equal(done.routing.long(), expected)
            replayed, same, _ = plain_pass(model, text[:-1], routing=done.routing.long())
            assert torch.equal(replayed, expected)
            torch.testing.assert_close(same, logits, rtol=0, atol=TOLERANCE)
    assert engine.stats().prompt_positions_cached > 0
    if way.startswith("few"):
        assert engine.stats().preemptions > 0


@pytest.mark.parametrize("way", WAYS)
def test_what_is_told_token_by_token_is_the_record(way: str, prompts: list[list[int]]) -> None:
    """From any position of the prompt on, no row twice, none left out but that of the last token; and the
    weights are those of the pass, to float16's half unit in the last place."""
    model = build("deepseek-v3")
    engine = Engine(model, replace(WAYS[way], record_weights=True))
    for _ in range(2):  # the second time most of each prompt is found in the cache
        starts = [index % (len(ids) + 1) for index, ids in enumerate(prompts)]
        asked = [
            engine.add(ids, SamplingParams(temperature=0, max_tokens=12, routing_from=start))
            for ids, start in zip(prompts, starts, strict=True)
        ]
        events: dict[int, list[Event]] = {request: [] for request in asked}
        while engine.busy:
            for event in engine.step():
                events[event.request].append(event)
        for ids, start, request in zip(prompts, starts, asked, strict=True):
            told = [event.routed for event in events[request] if event.routed is not None]
            text = ids + [event.token for event in events[request] if event.token is not None]
            assert [each.start for each in told] == [
                start + sum(len(each.experts) for each in told[:place]) for place in range(len(told))
            ]
            expected = plain_pass(model, text[:-1])
            assert torch.equal(
                torch.cat([each.experts for each in told]).long(), expected.experts_TLK[start:]
            )
            kept = torch.cat([each.weights for each in told if each.weights is not None]).float()
            torch.testing.assert_close(kept, expected.weights_TLK[start:], rtol=2**-11, atol=TOLERANCE)
    if way.startswith("few"):
        assert engine.stats().preemptions > 0


def test_without_weights_kept_none_are_told() -> None:
    engine = Engine(build("deepseek-v3"), PLAIN)
    request = engine.add([1, 2, 3], replace(WISH, routing=False, routing_from=0, max_tokens=1))
    (event,) = engine.step()
    assert event.request == request
    assert event.routed is not None
    assert event.routed.weights is None
    with pytest.raises(ValueError, match=r"routing_from is 4; .* 0 to 3"):
        engine.add([1, 2, 3], SamplingParams(routing_from=4))


def test_counts_are_those_of_the_records(prompts: list[list[int]]) -> None:
    """Without a prefix cache every position is computed once: the counts are a histogram of the records."""
    engine = Engine(build("deepseek-v3"), replace(PLAIN, prefix_cache=False, buckets=(4, 8)))
    answers = engine.generate(prompts, WISH)
    stats = engine.stats()
    assert stats.expert_tokens is not None
    assert stats.experts_touched is not None
    expected = torch.zeros_like(stats.expert_tokens)
    for done in answers:
        assert done.routing is not None
        chosen_LM = done.routing.long().transpose(0, 1).flatten(1)
        expected.scatter_add_(1, chosen_LM, torch.ones_like(chosen_LM))
    assert torch.equal(stats.expert_tokens, expected)
    layers, experts = expected.shape
    assert stats.experts_touched.shape == (layers,)
    assert (stats.experts_touched <= stats.steps * experts).all()
    assert (stats.experts_touched >= stats.steps * answers[0].routing.shape[2]).all()  # type: ignore[union-attr]
    engine.generate(prompts[:1], WISH)
    assert torch.equal(stats.expert_tokens, expected), "what was told stays as it was"


def test_a_request_that_is_cancelled_has_the_record_of_what_was_computed() -> None:
    model = build("deepseek-v3")
    engine = Engine(model, replace(PLAIN, max_batch_tokens=8))
    request = engine.add(list(range(20)), WISH)
    engine.step()
    engine.step()
    assert engine.cancel(request)
    (event,) = engine.step()
    assert (event.finish, event.token) == ("cancelled", None)
    assert event.routing is not None
    assert torch.equal(event.routing.long(), plain_pass(model, list(range(16)))[0])


def test_a_model_that_routes_nothing_has_no_record() -> None:
    engine = Engine(build("r1-distill-qwen-1.5b"), PLAIN)
    with pytest.raises(ValueError, match="this model routes nothing"):
        engine.add([1], WISH)
    with pytest.raises(ValueError, match="this model routes nothing"):
        engine.add([1], SamplingParams(routing_from=0))
    assert engine.stats().expert_tokens is None


# ----------------------------------------------------------------------------------------------------
# Log-probabilities of prompts, which are not found in the cache


@pytest.mark.parametrize("budget", [5, 512])
def test_prompt_logprobs_are_those_of_the_uncached_model(
    model: Transformer, prompts: list[list[int]], uncached: Uncached, budget: int
) -> None:
    settings = replace(PLAIN, max_batch_tokens=budget, max_sequences=3, overlap=True)
    engine = Engine(model, settings)
    engine.generate(prompts, SamplingParams(temperature=0, max_tokens=2))  # fills the cache
    read = SamplingParams(max_tokens=0, prompt_logprobs=0)
    more = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2)
    alone = Engine(model, PLAIN).generate(prompts, SamplingParams(temperature=0, max_tokens=3))
    only, both = engine.generate(prompts, read), engine.generate(prompts, more)
    for ids, one, two, plain in zip(prompts, only, both, alone, strict=True):
        logprobs = uncached(model, ids).log_softmax(-1)[:-1]
        expected = (
            logprobs.gather(1, torch.tensor(ids[1:], dtype=torch.int64).unsqueeze(1)).squeeze(1).tolist()
        )
        assert (one.ids, one.finish, two.ids) == ((), "length", plain.ids)
        for done in (one, two):
            assert done.prompt_logprobs == pytest.approx(expected, abs=TOLERANCE)
            assert done.cached == 0
        assert two.prompt_tops is not None
        best, places = logprobs.topk(2)
        assert [[token for token, _ in top] for top in two.prompt_tops] == places.tolist()
        for top, values in zip(two.prompt_tops, best.tolist(), strict=True):
            assert [value for _, value in top] == pytest.approx(values, abs=TOLERANCE)
    assert engine.pool.num_free == settings.num_pages


def test_prompt_logprobs_come_once_however_often_the_prompt_is_read(prompts: list[list[int]]) -> None:
    model, wish = build("deepseek-v3"), SamplingParams(temperature=0, max_tokens=16, prompt_logprobs=1)
    expected = Engine(model, PLAIN).generate(prompts, wish)
    engine = Engine(model, replace(PLAIN, num_pages=20, max_batch_tokens=12, overlap=True))
    requests = [engine.add(ids, wish) for ids in prompts]
    events = []
    while engine.busy:
        events += engine.step()
    assert engine.stats().preemptions > 0
    for request, done in zip(requests, expected, strict=True):
        mine = [event for event in events if event.request == request]
        assert [event.prompt_logprobs is not None for event in mine] == [True] + [False] * 15
        assert mine[0].prompt_logprobs == pytest.approx(done.prompt_logprobs, abs=TOLERANCE)


def test_a_text_is_scored_by_the_experts_on_record(prompts: list[list[int]]) -> None:
    """In chunks: recorded choices give what the router's own do, and others give what they give in one plain
    pass."""
    model = build("deepseek-v3")
    engine = Engine(model, replace(PLAIN, max_batch_tokens=8, max_sequences=1))
    ids = prompts[3]
    own_TLK = plain_pass(model, ids[:-1])[0]
    assert engine.score(ids, own_TLK.to(torch.int16)) == pytest.approx(engine.score(ids), abs=TOLERANCE)
    other_TLK = (own_TLK + 1) % 8
    logits_TV = plain_pass(model, ids[:-1], routing=other_TLK)[1]
    expected = logits_TV.log_softmax(-1).gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
    scores = engine.score(ids, other_TLK)
    assert scores == pytest.approx(expected.tolist(), abs=TOLERANCE)
    assert scores != pytest.approx(engine.score(ids), abs=100 * TOLERANCE)
    assert engine.pool.num_free == engine.pool.num_pages


def test_a_record_of_something_else_is_refused(prompts: list[list[int]]) -> None:
    model = build("deepseek-v3")
    engine, ids = Engine(model, PLAIN), prompts[2]
    own_TLK = plain_pass(model, ids[:-1])[0]
    with pytest.raises(ValueError, match=r"routing has shape \(15, .* need \(16, "):
        engine.score(ids, own_TLK[1:])
    with pytest.raises(ValueError, match="routing has experts 0 to 99; this model has 0 to"):
        engine.score(ids, own_TLK.clone().fill_(0).index_fill_(0, torch.tensor([3]), 99))
    with pytest.raises(ValueError, match="this model routes nothing"):
        Engine(build("r1-distill-qwen-1.5b"), PLAIN).score(ids, own_TLK)
