"""Laws of recipes/r1: each file is read by its verb, and the published sets run as they are."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path

import pytest

from shoal.config.tune import load_grpo, load_preference, load_reject, load_sft
from shoal.stages import grpo

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "r1"
EVAL = ROOT.parent / "shared" / "data" / "eval"
VERBS = {
    "0-zero": load_grpo,
    "1-cold-start": load_sft,
    "2-reasoning-rl": load_grpo,
    "3-rejection-sampling": load_reject,
    "4-sft": load_sft,
    "5-preference": load_preference,
    "5-rl-all-scenarios": load_grpo,
    "6-distill": load_sft,
    "gsm8k": load_grpo,
    "math": load_grpo,
}


def test_every_recipe_is_read() -> None:
    assert sorted(file.stem for file in RECIPES.glob("*.toml")) == sorted(VERBS)
    for name, load in VERBS.items():
        load(RECIPES / f"{name}.toml")


@pytest.mark.skipif(not EVAL.exists(), reason="the evaluation sets are not on this machine")
@pytest.mark.parametrize(
    ("name", "file"), [("gsm8k", "gsm8k/train.jsonl.gz"), ("math", "math/math_test.jsonl.gz")]
)
def test_published_sets_run_on_a_tiny_model(start: Path, tmp_path: Path, name: str, file: str) -> None:
    if name == "math" and importlib.util.find_spec("math_verify") is None:
        pytest.skip("math-verify is not installed (the extra `rl`)")
    some = tmp_path / "some.jsonl"
    lines = gzip.decompress((EVAL / file).read_bytes()).splitlines()
    short = sorted(lines, key=len)[:20]  # the tiny model has 512 positions, a token a byte
    some.write_bytes(b"\n".join(short) + b"\n")
    changes = [
        f"model={start}", f'problems=["{some}"]', f'held_out=["{some}"]', "dtype=float32", "train.steps=2",
        "train.accumulation=2", "train.optim.warmup_steps=0", "rollout.questions=4", "rollout.group=2",
        "rollout.max_tokens=8", "rollout.cache_bytes=4194304",
    ]  # fmt: skip
    grpo.run(load_grpo(RECIPES / f"{name}.toml", changes), tmp_path / "run")
    told = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert len(told) == 2
    assert all(0 <= row[f"reward/{'number' if name == 'gsm8k' else 'math'}"] <= 1 for row in told)
    assert not any(key.startswith("fault") for row in told for key in row)
    (first, last) = (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(first)["problems"] == json.loads(last)["problems"] == 20
