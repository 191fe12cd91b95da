"""The law of tensor parallel: an engine of n processes says what the engine of one says.

The processes are real (gloo), all cases share a launch. Tokens are equal, greedy and sampled. Their
log-probabilities differ by the order of sums alone: as for two ways of one process (engine/conftest.py),
values up to 8 rounded to 2^-24 of themselves in some two hundred places make 1e-4.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.checkpoint import hf
from shoal.config.families import tiny
from shoal.engine import Engine
from shoal.parallel.tensor import divide
from tests.engine.conftest import TOLERANCE
from tests.parallel import work
from tests.parallel.engines import PLAIN, Case, Served, serve, serve_cut

BY_TWO = {
    "heads of a latent": Case("deepseek-v3"),
    "guesses": Case("deepseek-v3", settings=replace(PLAIN, speculate=2)),
    "an indexer, chunks, few pages": Case(
        "deepseek-v3.2", settings=replace(PLAIN, max_batch_tokens=17, num_pages=14)
    ),
    "queries without a latent, an odd vocabulary, in bursts": Case(
        "deepseek-v2-lite", {"vocab_size": 509}, replace(PLAIN, decode_steps=4)
    ),
    "heads with norms, padded, ahead and in bursts": Case(
        "qwen3-30b-a3b", settings=replace(PLAIN, overlap=True, buckets=(1, 2, 4), decode_steps=4)
    ),
    "biases, a tied head": Case("r1-distill-qwen-1.5b", {"tie_word_embeddings": True}),
    "a norm of all heads": Case("olmoe-1b-7b"),
    "a narrow cache": Case("qwen3-30b-a3b", settings=replace(PLAIN, cache_dtype="fp8")),
}
# A number that lies between two of e4m3 may be rounded the other way, which moves it by 2^-4 of itself: one
# of hundreds that a logit of up to 8 is made of.
COARSE = 2e-2
BY_FOUR = {name: BY_TWO[name] for name in ("heads of a latent", "guesses", "a norm of all heads")}


def assert_same(got: Served, expected: Served, tolerance: float = TOLERANCE) -> None:
    for one, other in zip(got.completions, expected.completions, strict=True):
        assert (one.ids, one.finish) == (other.ids, other.finish)
        assert one.logprobs == pytest.approx(other.logprobs, abs=tolerance)
        assert one.prompt_logprobs == pytest.approx(other.prompt_logprobs, abs=tolerance)
        assert (one.routing is None) == (other.routing is None)
        if one.routing is not None and other.routing is not None:
            assert torch.equal(one.routing, other.routing)
    assert got.scores == pytest.approx(expected.scores, abs=tolerance)


@pytest.mark.parametrize(("ranks", "cases"), [(2, BY_TWO), (4, BY_FOUR)], ids=["two", "four"])
def test_many_processes_say_what_one_says(ranks: int, cases: dict[str, Case], tmp_path: Path) -> None:
    served, *nothing = work.launch(serve_cut, ranks, tmp_path, cases)
    assert nothing == [{}] * (ranks - 1)
    for name, case in cases.items():
        tolerance = COARSE if case.settings.cache_dtype == "fp8" else TOLERANCE
        alone = Engine(case.model(), replace(case.settings, decode_steps=1))
        assert_same(served[name], serve(alone), tolerance)


def test_a_rank_reads_its_part_of_a_checkpoint_alone(tmp_path: Path) -> None:
    cases = {name: BY_TWO[name] for name in ("heads of a latent", "biases, a tied head")}
    for name, case in cases.items():
        hf.save(case.model(), tmp_path / name)
    served, _ = work.launch(serve_cut, 2, tmp_path / "ranks", cases, tmp_path)
    for name, case in cases.items():
        assert_same(served[name], serve(Engine(case.model(), case.settings)))


@pytest.mark.parametrize(
    ("family", "ranks", "message"),
    [
        ("deepseek-v3", 3, "tensor_parallel is 3, but num_attention_heads is 4"),
        ("qwen3-30b-a3b", 4, "tensor_parallel is 4, but num_key_value_heads is 2"),
        ("nsa-27b", 2, r"tensor_parallel is 2, but attention of three branches"),
    ],
)
def test_what_does_not_come_out_even_is_refused(family: str, ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        divide(tiny(family), ranks)


def test_widths_must_come_out_even() -> None:
    v3 = tiny("deepseek-v3")
    assert v3.moe is not None
    with pytest.raises(ValueError, match="2, but moe_intermediate_size is 47"):
        divide(replace(v3, moe=replace(v3.moe, moe_intermediate_size=47)), 2)
    with pytest.raises(ValueError, match="2, but intermediate_size is 129"):
        divide(replace(v3, intermediate_size=129), 2)
