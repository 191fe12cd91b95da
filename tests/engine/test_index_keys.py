"""Laws of serving sparse attention with its index keys in FP8: what a request gets depends on no company, and
the cache takes the bytes that the ledger says.

Tokens need not be those of wide keys: a choice near a tie may fall otherwise. How often is in LOG.md.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shoal.config.families import tiny
from shoal.config.model import IndexerConfig, MLAConfig
from shoal.engine import Engine, EngineSettings, SamplingParams
from shoal.engine.records import count_record_bytes
from shoal.model.transformer import Transformer
from tests.engine.conftest import build

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
NARROW = EngineSettings(page_size=8, num_pages=120, index_keys="fp8", prefix_cache=False)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build("deepseek-v3.2")


@pytest.fixture(scope="module", params=["auto", "fp8"], ids=["wide rows", "narrow rows"])
def narrow(request: pytest.FixtureRequest) -> EngineSettings:
    return replace(NARROW, cache_dtype=request.param)


@pytest.fixture(scope="module")
def alone(model: Transformer, prompts: list[list[int]], narrow: EngineSettings) -> list[tuple[int, ...]]:
    engine = Engine(model, narrow)
    return [engine.generate([ids], GREEDY)[0].ids for ids in prompts[2:6]]


@pytest.mark.parametrize(
    "changes",
    [
        {"max_batch_tokens": 9, "max_sequences": 4},
        {"prefix_cache": True},
        {"overlap": True, "buckets": (1, 2, 4, 8)},
        {"speculate": 1},
    ],
    ids=["chunks", "prefix cache", "padded and ahead", "guesses"],
)
def test_narrow_keys_serve_alike_in_every_way(
    model: Transformer,
    prompts: list[list[int]],
    narrow: EngineSettings,
    alone: list[tuple[int, ...]],
    changes: dict[str, int],
) -> None:
    engine = Engine(model, replace(narrow, **changes))
    for _ in range(2):  # then by what a prefix cache kept
        assert [done.ids for done in engine.generate(prompts[2:6], GREEDY)] == alone


def test_a_context_that_is_read_whole_gets_the_very_tokens_of_wide_keys(model: Transformer) -> None:
    attention = model.config.attention
    assert isinstance(attention, MLAConfig)
    assert attention.indexer is not None
    ids = list(range(1, attention.indexer.index_topk - 11))
    answers = [
        Engine(model, replace(NARROW, index_keys=kind)).generate([ids], GREEDY)[0] for kind in ("wide", "fp8")
    ]
    assert answers[0].ids == answers[1].ids
    assert answers[0].logprobs == answers[1].logprobs


def test_the_cache_takes_what_the_ledger_says(model: Transformer) -> None:
    engine = Engine(model, NARROW)
    runner, attention = engine.runner, model.config.attention
    assert isinstance(attention, MLAConfig)
    assert attention.indexer is not None
    keys = sum(values.nbytes + scales.nbytes for values, scales in runner.index_keys)
    assert keys == model.config.num_hidden_layers * 121 * 8 * (attention.indexer.index_head_dim + 4)
    kept = keys + sum(pages.nbytes for pages in runner.pages)
    assert engine.ledger.cache == kept + 121 * 8 * count_record_bytes(model.config)
    assert engine.ledger.cache < Engine(model, replace(NARROW, index_keys="wide")).ledger.cache


def test_what_cannot_be_narrow_is_refused() -> None:
    with pytest.raises(ValueError, match="index_keys is 'int8'; it must be wide or fp8"):
        EngineSettings(index_keys="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="attention has no indexer"):
        Engine(build("deepseek-v3"), NARROW)
    config = tiny("deepseek-v3.2")
    assert isinstance(config.attention, MLAConfig)
    odd = replace(config, attention=replace(config.attention, indexer=IndexerConfig(8, 24, 24)))
    model = Transformer(odd)
    model.init_weights(torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="keys have 24 elements"):
        Engine(model.eval(), NARROW)
