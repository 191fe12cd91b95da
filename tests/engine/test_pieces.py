"""Laws of steps in pieces: padding a prompt's step changes no answer, whatever else is in the step; what
cannot go so is refused. The graphs themselves are for test_engine_gpu.py.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from shoal.config.families import tiny
from shoal.engine import Engine, EngineSettings, SamplingParams
from shoal.engine.pieces import Pieces, default_lengths
from shoal.model.offloaded import offload
from tests.engine.conftest import build

EAGER = EngineSettings(page_size=16, num_pages=128, max_batch_tokens=40, max_sequences=8)
PADDED = replace(EAGER, lengths=(8, 24, 40))
PARAMS = SamplingParams(temperature=0, max_tokens=12, logprobs=2, prompt_logprobs=1)


@pytest.mark.parametrize(
    "family", ["deepseek-v3", "deepseek-v2-lite", "qwen3-30b-a3b", "r1-distill-qwen-1.5b"]
)
@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_padding_changes_no_answer(family: str, cache: str, prompts: list[list[int]]) -> None:
    """Prompts in chunks beside decodes, and again from the prefix cache; with a table of experts."""
    model = build(family)
    params = replace(PARAMS, routing=model.config.moe is not None)
    eager, padded = (Engine(model, replace(each, cache_dtype=cache)) for each in (EAGER, PADDED))
    for _ in range(2):
        for ours, theirs in zip(
            padded.generate(prompts, params), eager.generate(prompts, params), strict=True
        ):
            assert ours.ids == theirs.ids
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
            assert ours.prompt_logprobs == pytest.approx(theirs.prompt_logprobs, abs=1e-4)
            if theirs.routing is not None:
                assert ours.routing is not None
                assert torch.equal(ours.routing, theirs.routing)
    if model.config.moe is not None:
        ours, theirs = (engine.stats().expert_tokens for engine in (padded, eager))
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)


def test_what_padding_is_given_as_attention_may_be_anything(prompts: list[list[int]]) -> None:
    model = build("deepseek-v3")
    engine = Engine(model, replace(PADDED, lengths=(40,)))
    expected = Engine(model, EAGER).generate(prompts, PARAMS)
    runner = engine.runner
    attended_TD = runner.pieces._attended_TD
    before = runner._between

    def poisoned(rows_3T: torch.Tensor, between: object) -> torch.Tensor:
        attended_TD.fill_(torch.nan)
        return before(rows_3T, between)  # type: ignore[arg-type]

    runner._between = poisoned  # type: ignore[method-assign]
    assert [done.ids for done in engine.generate(prompts, PARAMS)] == [done.ids for done in expected]


def test_lengths_hold_every_step_and_no_more_than_asked() -> None:
    lengths = default_lengths(2048)
    assert lengths[0] == 64
    assert lengths[-1] == 2048
    assert all(b - a <= max(64, a // 4) for a, b in pairwise(lengths))
    assert default_lengths(20) == (20,)
    pieces = Pieces(lengths, tiny("deepseek-v3"), 0, torch.float32, torch.device("cpu"))
    assert [pieces.find(tokens) for tokens in (1, 64, 65, 2048, 2049)] == [64, 64, 128, 2048, None]


def test_what_cannot_go_in_pieces_is_refused() -> None:
    for family in ("deepseek-v3.2", "nsa-27b"):
        with pytest.raises(
            ValueError, match=r"lengths are \(8, 24, 40\), but sparse attention computes more"
        ):
            Engine(build(family), PADDED)
    with pytest.raises(ValueError, match=r"lengths are \(0,\); each must be at least 1"):
        replace(EAGER, lengths=(0,))
    model = copy.deepcopy(build("deepseek-v3"))
    offload(model, 1e-9)
    with pytest.raises(ValueError, match="cannot fetch offloaded experts"):
        Engine(model, PADDED)
