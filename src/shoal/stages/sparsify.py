"""Sparse attention on a trained model, top to bottom: indexers are added and taught, then all go on together.

The run is stages/pretrain's in everything but its start and what it minimises (train/indexer.py): the folder,
its record and its exact resume are those of pretraining. Evaluation reads what the indexers choose, in both
stages: in warm-up it says what sparse attention would cost if it began now.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from shoal.checkpoint import hf
from shoal.checkpoint.source import open_source
from shoal.config.run import RunConfig
from shoal.config.sparsify import SparsifyConfig, with_indexer
from shoal.model.transformer import Transformer
from shoal.stages import pretrain
from shoal.stages.extend import find_checkpoint
from shoal.train.indexer import LearnIndexers, indexers
from shoal.train.loss import NextToken
from shoal.train.metrics import Observer
from shoal.train.trainer import Outcome


def run(
    config: SparsifyConfig,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    observe: Observer = lambda event: None,
) -> Outcome:
    """Run a recipe in a folder, or go on with the run that is there."""
    # 1. The checkpoint, and the same model with indexers.
    checkpoint = find_checkpoint(config.model)
    found = open_source(checkpoint).model.config
    plain = RunConfig(
        model=with_indexer(found, config),
        train=config.train,
        data=replace(config.data, tokenizer=str(checkpoint)),
        seed=config.seed,
        dtype=config.dtype,
        parallel=config.parallel,
    )

    # 2. Its weights; indexers that it has not are drawn.
    def fill(model: Transformer, generator: torch.Generator) -> None:
        if plain.model.attention == found.attention:
            hf.fill(model, checkpoint)
            return
        model.init_weights(generator)
        dense = Transformer(found, device="meta", dtype=model.head_weight().dtype)
        ours = model.state_dict()
        dense.load_state_dict({name: ours[name] for name in dense.state_dict()}, assign=True)
        hf.fill(dense, checkpoint)  # into the very tensors of the model

    # 3. The run: in warm-up nothing but indexers learns.
    def lesson(model: Transformer) -> pretrain.Lesson:
        if config.stage == "warm-up":
            return pretrain.Lesson(LearnIndexers(), indexers(model))
        return pretrain.Lesson(LearnIndexers(NextToken.of(model.config, config.train)))

    return pretrain.run(
        plain, folder, device=device, observe=observe, start=lambda corpus: fill, lesson=lesson
    )
