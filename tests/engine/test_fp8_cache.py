"""Laws of a cache in FP8: it is the engine's one rounding, made of each token alone.

So in batch-invariant mode, where sums are fixed, a request gets the same bits however its prompt was cut,
what the cache remembered, how often it lost its pages and what was guessed ahead. Outside of it another order
of sums may turn a number that lies between two of e4m3's, and with it a draw; how near the model's own answer
the cache comes is for tests/stages/test_verify.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.config import cost
from shoal.config.model import MLAConfig
from shoal.engine import Completion, Engine, EngineSettings, SamplingParams
from shoal.model.transformer import Transformer
from shoal.ops import dispatch
from tests.engine.conftest import build

FAMILIES = ["deepseek-v3", "qwen3-30b-a3b"]  # sparse attention: test_index_keys.py
PLAIN: dict[str, Any] = {"cache_dtype": "fp8", "page_size": 8, "num_pages": 40, "max_sequences": 4}
WAYS: dict[str, dict[str, Any]] = {
    "in chunks": {"max_batch_tokens": 8},
    "on few pages": {"num_pages": 8},
    "padded": {"buckets": (1, 4)},
    "overlapped": {"overlap": True},
    "guessed ahead": {"speculate": 2},
}


def keys(model: Transformer) -> cost.IndexKeys:
    """An indexer's keys have no room in rows of FP8: they are narrow as well."""
    attention = model.config.attention
    return "fp8" if isinstance(attention, MLAConfig) and attention.indexer else "wide"


def settings(model: Transformer, ways: dict[str, Any]) -> EngineSettings:
    return EngineSettings(**{**PLAIN, "index_keys": keys(model), **ways})


def serve(model: Transformer, ways: dict[str, Any], *, times: int = 1) -> tuple[Engine, list[Completion]]:
    prompts = [list(range(3, 40)), [*range(3, 30), 7, 7], [9]]
    params = [
        SamplingParams(temperature=place % 2, seed=place, max_tokens=12, ignore_eos=True)
        for place in range(len(prompts))
    ]
    engine = Engine(model, settings(model, ways))
    answers: list[Completion] = []
    for _ in range(times):
        answers = engine.generate(prompts, params)
    return engine, answers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_request_gets_the_same_bits_in_every_way(family: str) -> None:
    model = build(family)
    with dispatch.batch_invariant():
        _, wanted = serve(model, {})
        told = [(each.ids, each.logprobs) for each in wanted]
        for name, ways in WAYS.items():
            if name == "guessed ahead" and not model.config.num_nextn_predict_layers:
                continue
            engine, got = serve(model, ways)
            assert [(each.ids, each.logprobs) for each in got] == told, name
            assert (engine.stats().preemptions > 0) == (name == "on few pages")
            assert (sum(engine.stats().drafted) > 0) == (name == "guessed ahead")
        engine, got = serve(model, {}, times=2)
        assert [(each.ids, each.logprobs) for each in got] == told, "remembered"
        assert engine.stats().prompt_positions_cached > 0
        assert serve(model, {"cache_dtype": "auto"})[1][0].logprobs != wanted[0].logprobs  # it does round


@pytest.mark.parametrize("family", [*FAMILIES, "r1-distill-qwen-1.5b", "deepseek-v2-lite", "deepseek-v3.2"])
def test_pages_and_ledger_take_what_cost_says(family: str) -> None:
    model = build(family)
    engine, _ = serve(model, {})
    kept = [*engine.runner.pages, *(part for both in engine.runner.index_keys for part in both)]
    records = engine.ledger.page - sum(each.nbytes for each in kept) // (40 + 1)
    a_token = cost.kv_bytes_per_token(model.config, "fp8", index_keys=keys(model))
    assert engine.ledger.page - records == a_token * PLAIN["page_size"]
    assert engine.runner.pages[0].dtype == torch.uint8
    wide = Engine(model, EngineSettings(**{**PLAIN, "cache_dtype": "auto"}))  # its keys too
    assert wide.ledger.page - engine.ledger.page == PLAIN["page_size"] * (
        cost.kv_bytes_per_token(model.config, "float32") - a_token
    )


def test_scoring_reads_what_decoding_wrote() -> None:
    """Log-probabilities of an answer, when it is read in steps of 8, and when it was drawn."""
    model = build("deepseek-v3")
    with dispatch.batch_invariant():
        engine, answers = serve(model, {})
        small = Engine(model, EngineSettings(**{**PLAIN, "max_batch_tokens": 8}))
        ids = list(range(3, 40)) + list(answers[0].ids)
        assert engine.score(ids) == small.score(ids)
        drawn = torch.tensor(answers[0].logprobs)
        torch.testing.assert_close(torch.tensor(engine.score(ids)[36:]), drawn, rtol=0, atol=1e-6)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cache_dtype .* is 'int8'; it must be one of auto, fp8"):
        EngineSettings(cache_dtype="int8")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="sparse attention reads it as it is"):
        Engine(build("nsa-27b"), EngineSettings(**PLAIN))
    with pytest.raises(ValueError, match=r"wide keys .* ask for index_keys \(--index-keys\) fp8 too"):
        Engine(build("deepseek-v3.2"), EngineSettings(**PLAIN))
    with pytest.raises(ValueError, match="index_keys is 'fp8', but the model's attention has no indexer"):
        Engine(build("deepseek-v3"), EngineSettings(**PLAIN, index_keys="fp8"))
