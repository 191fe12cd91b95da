"""Laws of putting sparse attention on a trained model: warm-up moves indexers alone and loses nothing of the
checkpoint, the sparse stage goes on from it, and what cannot be is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.checkpoint import hf
from shoal.config.families import tiny
from shoal.config.model import IndexerConfig, MLAConfig
from shoal.config.run import DataConfig, OptimConfig, TrainConfig
from shoal.config.sparsify import SparsifyConfig, load_sparsify, with_indexer
from shoal.stages import sparsify
from shoal.train.metrics import Event, StepReport

RECIPES = Path(__file__).parents[2] / "recipes" / "dsa"
INDEXER = IndexerConfig(8, 8, 12)


@pytest.fixture
def config(start: Path, tmp_path: Path) -> SparsifyConfig:
    text = tmp_path / "text.txt"
    lines = (f"The {n}th line says that {n} is {n % 7} more than it was." for n in range(200))
    text.write_text("\n".join(lines))
    return SparsifyConfig(
        str(start),
        "warm-up",
        TrainConfig(steps=6, evaluate_every=0, checkpoint_every=3, optim=OptimConfig(lr=0.01)),
        DataConfig(train=(str(text),), holdout_fraction=0.1, tokens_per_batch=256, seq_len=64),
        INDEXER,
    )


def test_indexers_are_taught_and_then_all_go_on(config: SparsifyConfig, start: Path, tmp_path: Path) -> None:
    told: list[Event] = []
    sparsify.run(config, tmp_path / "warm", observe=told.append)
    divergences = [event.terms["indexer"] for event in told if isinstance(event, StepReport)]
    assert divergences[-1] < divergences[0]
    before, warm = hf.load(start).state_dict(), hf.load(tmp_path / "warm" / "export")
    assert warm.config.model_type == "deepseek_v32"
    assert isinstance(warm.config.attention, MLAConfig)
    assert warm.config.attention.indexer == INDEXER
    after = warm.state_dict()
    assert {name for name in after if name not in before} == {name for name in after if ".indexer." in name}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    sparse = replace(config, model=str(tmp_path / "warm"), stage="sparse", indexer=None)
    told.clear()
    sparsify.run(sparse, tmp_path / "sparse", observe=told.append)
    steps = [event for event in told if isinstance(event, StepReport)]
    assert {"loss", "indexer"} <= steps[0].terms.keys()
    final = hf.load(tmp_path / "sparse" / "export").state_dict()
    still = {name for name, tensor in final.items() if torch.equal(tensor, after[name])}
    assert all("bias" in name or "norm" in name for name in still), still


def test_recipes_are_the_two_stages() -> None:
    warm, sparse = load_sparsify(RECIPES / "1-warm-up.toml"), load_sparsify(RECIPES / "2-sparse.toml")
    assert (warm.stage, sparse.stage, sparse.model) == ("warm-up", "sparse", "runs/warm")


def test_what_cannot_be_sparse_is_refused(config: SparsifyConfig, start: Path) -> None:
    model = hf.load(start).config
    with pytest.raises(ValueError, match="has no indexer; give \\[indexer\\]"):
        with_indexer(model, replace(config, indexer=None))
    with pytest.raises(ValueError, match="run the stage warm-up on it first"):
        with_indexer(model, replace(config, indexer=None, stage="sparse"))
    with pytest.raises(ValueError, match="indexer is given, but the sparse stage"):
        replace(config, stage="sparse")
    with pytest.raises(ValueError, match="stage is 'dense'"):
        replace(config, stage="dense")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="q_lora_rank is null"):
        with_indexer(tiny("deepseek-v2-lite"), config)
    with pytest.raises(ValueError, match="has no latent attention"):
        with_indexer(tiny("mixtral-8x7b"), config)
    sparse = with_indexer(model, config)
    with pytest.raises(ValueError, match="has an indexer of"):
        with_indexer(sparse, replace(config, indexer=IndexerConfig(4, 8, 12)))
