"""The law of float8 in blocks: every element times the scale of its block.

Checkpoints that hold such blocks are in test_hf.py.
"""

from __future__ import annotations

import pytest
import torch

from shoal.checkpoint.fp8 import dequantise, scale_shape


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (576, 200), (300, 128), (3, 130, 60), (40, 1000)])
def test_dequantise_multiplies_every_element_by_the_scale_of_its_block(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(scale_shape(shape, (128, 128)), generator=generator)
    rows, columns = (torch.arange(size) // 128 for size in shape[-2:])
    # One float32 product an element on both sides: equal to the last bit.
    assert torch.equal(
        dequantise(codes, scale, (128, 128)), codes.float() * scale[..., rows[:, None], columns]
    )
