"""Checkpoint folders that several files of tests read, each made once. Nothing may write into them.

`made` are transformers' own, `v3` and `v3_fp8` the published layout of DeepSeek-V3.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoint.layouts import (
    FP8,
    V3_CONFIG,
    Made,
    fill,
    make_oracle,
    quantise,
    v3_shapes,
    write,
)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Folders that transformers wrote, each once."""
    root = tmp_path_factory.mktemp("made")

    def make(family: str, dtype: torch.dtype = torch.float32) -> Path:
        folder = root / f"{family}-{str(dtype)[6:]}"
        if not folder.exists():
            make_oracle(family, dtype).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("v3") / "v3", V3_CONFIG, fill(v3_shapes()))


@pytest.fixture(scope="session")
def v3_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = V3_CONFIG | {"quantization_config": FP8}
    return write(tmp_path_factory.mktemp("v3") / "fp8", config, quantise(fill(v3_shapes())))
