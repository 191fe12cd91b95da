"""Laws of the records: the experts told of a request are those that one plain pass over its text chooses, in
whatever way it was served, and replaying them gives its logits.

Choices are compared as they are: scores of these weights lie far apart against rounding, so none flips.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shoal.batch import Batch
from shoal.engine import Engine, EngineSettings, SamplingParams
from shoal.model.transformer import Transformer
from tests.engine.conftest import TOLERANCE, Uncached, build

PLAIN = EngineSettings(page_size=4, num_pages=128, max_batch_tokens=512, max_sequences=8)
WISH = SamplingParams(temperature=0, max_tokens=12, routing=True)
MOE = ["deepseek-v3", "deepseek-v2-lite", "qwen3-30b-a3b"]


@torch.inference_mode()
def plain_pass(model: Transformer, ids: list[int], routing: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The experts (T, L, K) and the logits (T, V) of one pass without a cache."""
    batch = Batch(
        ids_T=torch.tensor(ids),
        positions_T=torch.arange(len(ids)),
        cu_seqlens_S1=torch.tensor([0, len(ids)], dtype=torch.int32),
        max_seqlen=len(ids),
        routing=routing,
    )
    output = model(batch)
    experts_TLK = torch.stack([layer.experts_TK for layer in output.routing], 1)
    return experts_TLK, model.logits(output.hidden_TD, batch)


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
            expected, logits = plain_pass(model, text[:-1])
            assert done.routing.dtype == torch.int16
            assert torch.equal(done.routing.long(), expected)
            replayed, same = plain_pass(model, text[:-1], routing=done.routing.long())
            assert torch.equal(replayed, expected)
            torch.testing.assert_close(same, logits, rtol=0, atol=TOLERANCE)
    assert engine.stats().prompt_positions_cached > 0
    if way.startswith("few"):
        assert engine.stats().preemptions > 0


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
    with pytest.raises(ValueError, match="routing is True, but this model routes nothing"):
        engine.add([1], WISH)
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
