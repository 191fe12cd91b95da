"""Laws of post-training's recipes: they load, and a variant brings its paper's settings."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal.config.policy import PUBLISHED
from shoal.config.run import build, to_toml
from shoal.config.tune import (
    GRPOConfig,
    PreferenceConfig,
    RejectConfig,
    SFTConfig,
    grpo_from_table,
    load_grpo,
    load_preference,
    load_reject,
    load_sft,
)

RECIPES = Path(__file__).parents[2] / "recipes" / "r1"
BASE: dict[str, Any] = {"model": "m", "problems": ["p"], "rewards": ["number", "0.1 layout"]}


def test_the_recipes_load_and_read_back_equal() -> None:
    kinds = {
        SFTConfig: (load_sft, ("1-cold-start", "4-sft", "6-distill")),
        GRPOConfig: (load_grpo, ("0-zero", "2-reasoning-rl", "5-rl-all-scenarios", "gsm8k", "math")),
        RejectConfig: (load_reject, ("3-rejection-sampling",)),
        PreferenceConfig: (load_preference, ("5-preference",)),
    }
    loaded = {name for _, names in kinds.values() for name in names}
    assert loaded == {path.stem for path in RECIPES.glob("*.toml")}
    for kind, (load, names) in kinds.items():
        for name in names:
            recipe = load(RECIPES / f"{name}.toml")
            assert build(kind, tomllib.loads(to_toml(recipe)), "again") == recipe
    rl = load_grpo(RECIPES / "2-reasoning-rl.toml", ["policy.kl_weight=0.01"])
    assert rl.policy == replace(PUBLISHED["r1"], kl_weight=0.01)
    assert build(GRPOConfig, tomllib.loads(to_toml(rl)), "again") == rl


def test_a_variant_brings_its_settings() -> None:
    for variant, row in PUBLISHED.items():
        assert grpo_from_table({**BASE, "policy": {"variant": variant}}, "x").policy == row
    assert grpo_from_table(BASE, "x").weights() == {"number": 1.0, "layout": 0.1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": ["much number"]}, "does not read 'weight name'"),
        ({"train": {"balance": {"z_loss": 0.1}}}, r"train\.balance\.z_loss is 0\.1; RL has"),
        ({"train": {"mtp_loss_weight": 0.3}}, "does not train prediction modules"),
        ({"refresh_every": 5, "steps_per_round": 2}, "the reference changes between rounds"),
        ({"rollout": {"keep_sampling": True}}, "keep_sampling needs top_k"),
        ({"rollout": {"group": 1}}, "group is 1; an answer is compared with others"),
        ({"policy": {"importance_cap": 2.0}, "rollout": {"temperature": 0.7}}, "set these to 1, 1, 0"),
        ({"policy": {"variant": "dapoo"}}, "did you mean 'dapo'"),
    ],
)
def test_what_would_be_ignored_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grpo_from_table({**BASE, **changes}, "a recipe")
