"""A checkpoint small enough to make in a test, with a tokenizer, as commands and servers are given one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from shoal.checkpoint import hf
from shoal.config.families import tiny
from shoal.data.tokenizer import train_tokenizer
from shoal.model.transformer import Transformer

TEXT = "def add(a, b):\n    return a + b\n" * 40  # what its tokenizer knows


def write_checkpoint(folder: Path) -> Path:
    """A tiny V3 with a tokenizer, its weights large enough that its predictions are not flat."""
    tokenizer = train_tokenizer([TEXT, "".join(map(chr, range(32, 1000)))], 320)
    tokenizer.save(folder / "tokenizer")
    config = replace(tiny("deepseek-v3"), initializer_range=0.2, bos_token_id=0, eos_token_id=1)
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    files = [folder / "tokenizer" / name for name in ("tokenizer.json", "tokenizer_config.json")]
    hf.save(model, folder / "tiny", tokenizer_files=files)
    return folder / "tiny"
