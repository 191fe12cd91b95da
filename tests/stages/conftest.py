"""What the stages of post-training start from: a small V3 with a tokenizer, saved as a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.checkpoint import hf
from shoal.data.tokenizer import SMALLEST, train_tokenizer
from shoal.model.transformer import Transformer
from tests.train import parts


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, latent attention, 16 experts; a token a byte."""
    folder = tmp_path_factory.mktemp("start") / "checkpoint"
    tokenizer = train_tokenizer(["a text"], SMALLEST)
    config = replace(
        parts.config(num_nextn_predict_layers=0),
        vocab_size=SMALLEST,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    files = folder.parent / "tokenizer"
    tokenizer.save(files)
    hf.save(model, folder, tokenizer_files=sorted(files.iterdir()))
    return folder
