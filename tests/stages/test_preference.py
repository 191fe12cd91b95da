"""Laws of reward models: the loss is the written formula, pairs are told apart, RL is rewarded by it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from shoal.checkpoint import hf
from shoal.config.policy import published
from shoal.config.run import OptimConfig
from shoal.config.tune import RL_TRAIN, AppraisalConfig, GRPOConfig, PreferenceConfig, RolloutConfig
from shoal.data.text import Tokenizer
from shoal.stages import grpo, preference
from shoal.stages.appraise import Appraiser
from shoal.train.preference import preference_loss
from tests.stages.test_grpo import LETTERS, lines

SHARED = Path(__file__).parents[3] / "shared" / "data" / "sft" / "oasst1_rm_zh.json"


def config(start: Path, folder: Path, **changes: Any) -> PreferenceConfig:
    """Pairs of which the one with an exclamation mark is liked."""
    file = folder / "pairs.jsonl"
    rows = [
        {"prompt": f"{n}?", "chosen": f"{n}!", "rejected": f"{n}."} if n % 2 else
        {"messages": [{"role": "user", "content": f"{n}?"}], "chosen": "so!", "rejected": "so."}
        for n in range(60)
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = replace(RL_TRAIN, steps=30, optim=OptimConfig(lr=3e-3, weight_decay=0.0, schedule="constant"))
    plain = PreferenceConfig(str(start), (str(file),), train, seq_len=100, tokens_per_batch=400)
    return replace(plain, **changes)


def test_losses_are_the_written_formulas() -> None:
    values = torch.tensor([1.5, -0.5, 0.25, 2.0], dtype=torch.float64)
    pairs = preference_loss(values, "pairwise")
    assert pairs.tolist() == pytest.approx([math.log1p(math.exp(-2.0)), math.log1p(math.exp(1.75))])
    labels = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    expected = binary_cross_entropy_with_logits(values, labels)
    assert float(preference_loss(values, "pointwise").mean()) == pytest.approx(float(expected))


@pytest.mark.parametrize("kind", ["pairwise", "pointwise"])
def test_a_reward_model_tells_held_out_pairs_apart(start: Path, tmp_path: Path, kind: Any) -> None:
    run = config(start, tmp_path, kind=kind, holdout_fraction=0.3)
    assert not preference.run(run, tmp_path / "run").interrupted
    before, after = json.loads((tmp_path / "run" / "judged.json").read_text())
    assert (before["step"], after["step"]) == (0, 30)
    assert before["pairs"] == after["pairs"] > 5
    assert after["right"] == 1
    model, tokenizer = hf.load(tmp_path / "run" / "export"), Tokenizer.load(start)
    appraiser = Appraiser(model, tokenizer.pad_id)
    texts = [
        tokenizer.chat([{"role": "user", "content": "99?"}, {"role": "assistant", "content": said}],
                       add_generation_prompt=False)
        for said in ("99!", "99.", "so!")
    ]  # fmt: skip
    values = appraiser.values(texts)
    # Alone or together: float32 sums in another order.
    alone = torch.cat([appraiser.values([text]) for text in texts])
    torch.testing.assert_close(values, alone, rtol=1e-4, atol=1e-4)
    compared = appraiser.compare(texts, kind)
    assert compared[1] < 0.5 < compared[0]
    if kind == "pairwise":  # of each two, what one wins the other loses
        assert sum(compared) == pytest.approx(1.5)
    else:
        assert values[1] < 0 < values[0]


def test_rl_is_rewarded_by_rules_where_there_are_and_by_the_model_elsewhere(
    start: Path, tmp_path: Path
) -> None:
    problems = tmp_path / "problems.jsonl"
    rows = [{"prompt": f"{n}?", "n": n, "rewards": ["preference"] if n % 2 else [LETTERS]} for n in range(8)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = GRPOConfig(
        str(start),
        (str(problems),),
        (LETTERS,),
        replace(RL_TRAIN, steps=2),
        preference=AppraisalConfig(str(start), "pairwise"),
        rollout=RolloutConfig(questions=8, group=4, max_tokens=6, cache_bytes=1 << 20),
        policy=published("dapo"),
    )
    grpo.run(run, tmp_path / "run")
    told = lines(tmp_path / "run" / "rollouts.jsonl")
    assert all(row["reward/preference"] == pytest.approx(0.5) for row in told)  # wins and losses are as many
    assert all(0 <= row[f"reward/{LETTERS}"] <= 1 for row in told)
    assert not any(name.startswith("fault") for row in told for name in row)
    with pytest.raises(ValueError, match=r"record 2 is judged by \['preference'\]; this run has"):
        grpo.run(replace(run, preference=None), tmp_path / "other")


def test_mistakes_are_told(start: Path, tmp_path: Path) -> None:
    run = config(start, tmp_path)
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b"}\n')
    with pytest.raises(ValueError, match=r"record 1 has no answers to compare: 'chosen' and 'rejected'"):
        preference.run(run, tmp_path / "run")
    file.write_text(json.dumps({"prompt": "a", "chosen": "b" * 200, "rejected": "c"}) + "\n")
    with pytest.raises(ValueError, match=r"no two answers to compare in .* are within seq_len 100"):
        preference.run(run, tmp_path / "run")


@pytest.mark.skipif(not SHARED.exists(), reason="the sets of conversations are not on this machine")
def test_published_rankings_are_read(start: Path) -> None:
    run = PreferenceConfig(str(start), (str(SHARED),), RL_TRAIN, seq_len=400, tokens_per_batch=800)
    train, held_out = preference.read_pairs(run, Tokenizer.load(start), lambda event: None)
    assert len(train) > 10 * len(held_out) / 2 > 0
