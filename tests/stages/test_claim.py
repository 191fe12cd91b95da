"""Laws of a run's folder: the same recipe goes on, as far as it likes; any other is refused, by its key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shoal.config.run import TrainConfig
from shoal.config.tune import RL_TRAIN, DistillConfig, GRPOConfig, LoraConfig, SFTConfig
from shoal.stages.claim import claim, is_begun

TUNING = SFTConfig("model", ("data.jsonl",), TrainConfig(steps=4))


def test_a_folder_is_whose_recipe_lies_in_it(tmp_path: Path) -> None:
    assert not is_begun(tmp_path, TUNING)
    claim(tmp_path, TUNING)
    assert is_begun(tmp_path, TUNING)
    claim(tmp_path, replace(TUNING, train=replace(TUNING.train, steps=8, keep=1)))
    assert is_begun(tmp_path, TUNING)


def test_a_table_more_or_less_is_another_run(tmp_path: Path) -> None:
    """Tables stand at the end of what is written, where a comparison line by line does not see them."""
    lora = replace(TUNING, lora=LoraConfig(("o_proj",)))
    for name, first, second in (("more", TUNING, lora), ("less", lora, TUNING)):
        claim(tmp_path / name, first)
        with pytest.raises(ValueError, match=r"holds another run: its lora\.alpha is .* \(2 more differ\)"):
            claim(tmp_path / name, second)
    claim(tmp_path / "taught", TUNING)
    train = replace(TUNING.train, balance=RL_TRAIN.balance)
    taught = replace(TUNING, train=train, distill=DistillConfig("teacher"))
    with pytest.raises(ValueError, match=r"its distill\.keep is None, here 32"):
        claim(tmp_path / "taught", taught)


def test_kinds_of_run_are_not_mixed(tmp_path: Path) -> None:
    claim(tmp_path, TUNING)
    with pytest.raises(ValueError, match=r"config\.toml"):
        claim(tmp_path, GRPOConfig("model", ("problems.jsonl",), ("number",), RL_TRAIN))
