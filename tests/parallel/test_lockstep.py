"""The law of lockstep: engines that share experts alone say what one engine with all of them says.

Real processes over gloo, with fewer requests than places and more, so that some rest while others read and
draw. Tolerances as in test_tensor.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal.checkpoint import hf
from shoal.config.families import tiny
from shoal.engine import Engine, EngineSettings
from shoal.model.quantised import quantise
from shoal.stages.spread import Degrees, check_shared
from tests.parallel import work
from tests.parallel.engines import PLAIN, Case, Served, serve, serve_in_lockstep
from tests.parallel.test_tensor import assert_same

CASES = {
    "shared experts, groups": Case("deepseek-v3"),
    "an indexer, chunks, few pages": Case(
        "deepseek-v3.2", settings=replace(PLAIN, max_batch_tokens=17, num_pages=14)
    ),
    "grouped heads, ahead": Case("qwen3-30b-a3b", settings=replace(PLAIN, overlap=True)),
    "branches, one at a time": Case("nsa-27b", settings=replace(PLAIN, max_sequences=1)),
    "narrow weights": Case("deepseek-v2-lite", quant="fp8"),
}


def alone(case: Case) -> Served:
    model = case.model()
    return serve(Engine(quantise(model, case.quant) if case.quant else model, case.settings))


@pytest.mark.parametrize("ranks", [2, 4])
def test_many_engines_say_what_one_says(ranks: int, tmp_path: Path) -> None:
    cases = CASES if ranks == 2 else {"shared experts, groups": CASES["shared experts, groups"]}
    served, *nothing = work.launch(serve_in_lockstep, ranks, tmp_path, cases)
    assert nothing == [{}] * (ranks - 1)
    for name, case in cases.items():
        got, stats = served[name]
        assert_same(got, alone(case))
        assert stats.generated == sum(len(done.ids) for done in got.completions)
        assert case.settings.num_pages and stats.pages == ranks * case.settings.num_pages


def test_a_process_reads_its_experts_alone(tmp_path: Path) -> None:
    case = CASES["narrow weights"]
    hf.save(case.model(), tmp_path / "it")
    served, _ = work.launch(serve_in_lockstep, 2, tmp_path / "ranks", {"it": case}, tmp_path)
    assert_same(served["it"][0], alone(case))


@pytest.mark.parametrize(
    ("family", "processes", "settings", "message"),
    [
        ("deepseek-v3", 3, PLAIN, "data_parallel is 3 .* the model has 16 experts"),
        ("r1-distill-qwen-1.5b", 2, PLAIN, "the model has no experts"),
        ("deepseek-v3", 2, replace(PLAIN, speculate=1), "speculate is 1, but .* set it to 0"),
        ("deepseek-v3", 2, replace(PLAIN, decode_steps=8), "decode_steps is 8, but .* leave it at 1"),
        ("deepseek-v3", 2, replace(PLAIN, buckets=(1, 2)), r"buckets are \(1, 2\), but .* leave them out"),
    ],
)
def test_what_cannot_step_together_is_refused(
    family: str, processes: int, settings: EngineSettings, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_shared(tiny(family), processes, settings)


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"tensor_parallel": 0}, "tensor_parallel is 0; it must be at least 1"),
        (
            {"tensor_parallel": 2, "data_parallel": 4, "expert_parallel": True},
            "tensor_parallel is 2 and data_parallel 4",
        ),
        ({"data_parallel": 2}, "data_parallel is 2 without expert_parallel: those are replicas"),
        ({"expert_parallel": True}, "data_parallel, over how many .* is 1; raise it"),
    ],
)
def test_degrees_that_say_nothing_are_refused(degrees: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Degrees(**degrees)
