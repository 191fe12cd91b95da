"""Laws of `verify`: a sound engine holds in every pair of features; a fault, however small, is told.

Faults are put into the model that is served where the naive pass does not look: into the dispatcher of a
layer, which the naive pass replaces. A feature that does nothing is a fault too.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.model.moe import LocalDispatcher, MoE
from shoal.model.transformer import Transformer
from shoal.stages import naive, verify
from tests.cli.conftest import Shoal, checkpoint, refusal, shoal  # noqa: F401
from tests.engine.conftest import build

FAMILIES = ["deepseek-v3", "qwen3-30b-a3b", "r1-distill-qwen-1.5b"]


def run(model: Transformer, **changes: Any) -> verify.Report:
    prompts = verify.draw_prompts(model, 4, 40, seed=0)
    return verify.verify(model, prompts=prompts, **{"tokens": 16, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_feature_and_pair_holds(family: str) -> None:
    model = build(family)
    report = run(model)
    assert report.holds, [case for case in report.cases if not case.holds]
    count = len(verify.FEATURES)
    assert (
        len({case.features for case in report.cases})
        == len(report.cases)
        == 1 + count + count * (count - 1) // 2
    )
    sparse = [case for case in report.cases if any("index keys" in name for name in case.features)]
    assert sparse
    assert all(case.skipped is not None for case in sparse)  # none of these has an indexer
    left_out = {case.features for case in report.cases if case.skipped is not None and case not in sparse}
    if model.config.num_nextn_predict_layers:
        assert left_out == {("overlap", "speculation")}
    else:
        assert left_out == {
            case.features for case in report.cases if "speculation" in case.features and case not in sparse
        }
    for case in report.cases:
        assert case.skipped is not None or (case.tokens == 64 and 0 < case.difference <= case.tolerance)


def test_narrow_caches_of_sparse_attention_hold() -> None:
    """Narrow keys as closely as all else, since both passes have them; narrow rows beside them only."""
    chosen = [each for each in verify.FEATURES if each.name == "prefix cache" or each.fp8_keys]
    report = run(build("deepseek-v3.2"), features=chosen)
    assert report.holds, [case for case in report.cases if not case.holds]
    done = {case.features: case for case in report.cases if case.skipped is None}
    assert len(done) == len(report.cases) - 1  # the two exclude each other
    assert done["fp8 index keys",].tolerance < 1e-3
    assert not done["fp8 index keys",].same_as_plain
    assert done["fp8 cache and index keys",].difference > 1e-3  # it does round


class Leaky(LocalDispatcher):
    """Every token's experts give it a little less than they should."""

    def combine(self, y_TD: Tensor, handle: Any) -> Tensor:
        return y_TD * 0.999


def test_a_fault_of_a_thousandth_is_found() -> None:
    model = copy.deepcopy(build("deepseek-v3"))
    mlp = model.model.layers[1].mlp
    assert isinstance(mlp, MoE)
    mlp.dispatcher = Leaky()
    report = run(model, features=verify.FEATURES[:1], pairs=False)
    assert not report.holds
    assert all("more than rounding" in (case.fault or "") for case in report.cases)


def test_other_experts_are_told_from_wrong_sums() -> None:
    """An engine over a router that has another mind: log-probabilities are the replay's, experts are not."""
    model = build("deepseek-v3")
    ids = list(range(20))
    own = naive.forward(model, ids, torch.float64, None).experts_TLK
    assert own is not None
    assert naive.count_others(own, own.flip(-1)) == 0
    assert naive.count_others((own + 1) % 8, own) > 0
    turned = naive.forward(model, ids, torch.float64, (own + 1) % 8)
    assert turned.experts_TLK is not None
    assert naive.count_others((own + 1) % 8, turned.experts_TLK) > 0.1 * own.numel()


def test_a_feature_that_does_nothing_does_not_hold() -> None:
    idle = replace(verify.FEATURES[0], name="idle", apply=lambda setup: setup)
    report = run(build("deepseek-v3"), features=[idle], pairs=False)
    assert [case.holds for case in report.cases] == [True, False]
    assert report.cases[1].fault == "idle did nothing in this run"


def test_the_command_says_what_holds(shoal: Shoal, checkpoint: Any) -> None:  # noqa: F811
    wanted = ["--feature", "prefix cache", "--feature", "chunks", "--tokens", "16"]
    result = shoal("verify", checkpoint, *wanted, "--json")
    told = json.loads(result.out)
    assert result.code == 0 and told["holds"]
    assert [case["features"] for case in told["cases"]] == [
        [],
        ["prefix cache"],
        ["chunks"],
        ["prefix cache", "chunks"],
    ]
    assert "it must be one of prefix cache, chunks" in refusal(
        shoal("verify", checkpoint, "--feature", "magic")
    )
    assert shoal("verify", checkpoint, "--length", "20").err.endswith("2 of 24 show something\n")
    assert shoal("verify", checkpoint, "--tokens", "1").err.count("outgrow a page") == 1
