"""Laws of ESFT: the chosen experts are those of the authors' own tables, for softmax and sigmoid routers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.model import esft
from tests.train import parts

TABLES = Path(__file__).parents[3] / "shared" / "data" / "deepseek" / "esft_routing"


@pytest.mark.skipif(not TABLES.exists(), reason="needs ../shared/data")
def test_the_authors_tables_give_the_authors_choice() -> None:
    """Token scores at 0.2; the tables are rounded to 4 digits, which may turn one layer of 104."""
    agreeing = layers = 0
    for task in ("intent", "law", "summary", "translation"):
        scores = json.loads((TABLES / f"{task}_expert_scores.json").read_text())["token_scores"]
        theirs = json.loads((TABLES / f"{task}_expert_config.json").read_text())["experts"]
        names = sorted(scores, key=int)
        table = torch.tensor([[scores[n][str(e)] for e in range(64)] for n in names], dtype=torch.float64)
        for name, chosen in zip(names, esft.choose_experts(table, 0.2), strict=True):
            agreeing += set(chosen.tolist()) == set(theirs[name])
            layers += 1
    assert layers == 104
    assert agreeing >= 103


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_scores_are_the_means_that_the_paper_takes(scoring: str) -> None:
    config = parts.config()
    assert config.moe is not None
    if scoring == "softmax":
        moe = replace(config.moe, scoring_func="softmax", topk_method="greedy", n_group=1, topk_group=1)
        config = replace(config, moe=moe)
    model, batches = parts.model(config), [parts.batch(0), parts.batch(1)]
    gate, token = (esft.score_experts(model, batches, kind) for kind in ("gate", "token"))
    torch.testing.assert_close(gate.sum(-1), torch.ones(2, dtype=torch.float64))
    counts, gates = torch.zeros(2, 2, 16, dtype=torch.float64)
    for batch in batches:
        for layer, routing in enumerate(model(batch).routing):
            rows = zip(routing.experts_TK.tolist(), routing.weights_TK.tolist(), strict=True)
            for experts, weights in rows:
                for expert, weight in zip(experts, weights, strict=True):
                    counts[layer, expert] += 1
                    gates[layer, expert] += weight
    torch.testing.assert_close(token, counts / counts.sum(-1, keepdim=True))
    torch.testing.assert_close(gate, gates / gates.sum(-1, keepdim=True))


def test_the_fewest_that_reach_the_share_are_chosen() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.15, 0.25]], dtype=torch.float64)
    assert [c.tolist() for c in esft.choose_experts(scores, 0.5)] == [[1]]
    assert [c.tolist() for c in esft.choose_experts(scores, 0.51)] == [[1, 3]]
    assert [sorted(c.tolist()) for c in esft.choose_experts(scores, 1.0)] == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match="share is 0"):
        esft.choose_experts(scores, 0)


def test_only_rows_of_the_stacks_are_named() -> None:
    model = parts.model()
    chosen = esft.choose_experts(esft.score_experts(model, [parts.batch(0)], "token"), 0.3)
    named = esft.trainable_experts(model, chosen)
    assert set(named) == {
        f"model.layers.{layer}.mlp.experts.{stack}"
        for layer in (1, 2)
        for stack in ("gate_up_proj", "down_proj")
    }
    assert named.keys() <= dict(model.named_parameters()).keys()
