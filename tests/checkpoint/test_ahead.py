"""The law of reading ahead: what comes out is what went in, in order, whatever its shape and size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoal.checkpoint import ahead, hf
from tests.tiny_checkpoint import write_checkpoint


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_tensors_come_as_they_are(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MOST_BYTES", 100)  # less than some of them
    shapes = [(), (3,), (0, 4), (64, 5), (7, 1, 2)] * 9
    dtypes = torch.float32, torch.bfloat16, torch.float8_e4m3fn
    tensors = [torch.randn(s).to(dtypes[at % 3]) for at, s in enumerate(shapes)]
    got = [
        tensor.to(device, non_blocking=True).cpu()
        for tensor in ahead.read_ahead(tensors, torch.device(device))
    ]
    assert len(got) == len(tensors)
    for one, other in zip(got, tensors, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.float(), other.float())


@pytest.mark.gpu
def test_a_checkpoint_is_the_same_on_a_gpu(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    here, there = hf.load(folder).state_dict(), hf.load(folder, device="cuda").state_dict()
    assert here.keys() == there.keys()
    for name, tensor in here.items():
        assert torch.equal(tensor, there[name].cpu()), name
