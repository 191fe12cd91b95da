"""Staging: small arrays between host and device without stopping either.

A copy from ordinary memory makes the host wait for all that the device has yet to do. What a step needs is
therefore laid into one pinned buffer and sent in one copy, and what it gives is copied back into another and
read when it is there. PyTorch's allocator of pinned memory does not give a buffer out again before its copy
is done. On a CPU the same calls copy nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes: where each array begins, as a freshly made tensor would
_TORCH = {np.dtype(name): getattr(torch, name) for name in ("int64", "int32", "float64", "float32")}


class Slab:
    """Device memory for arrays of one fixed layout, the same place every time: what a CUDA graph reads."""

    def __init__(self, arrays: Sequence[np.ndarray], device: torch.device) -> None:
        spans = _lay_out(arrays)
        self.memory = torch.zeros(spans[-1][1], dtype=torch.uint8, device=device)
        self.arrays = _views(self.memory, arrays)

    def fill(self, arrays: Sequence[np.ndarray]) -> None:
        self.memory.copy_(_pack(arrays, pin=self.memory.is_cuda), non_blocking=True)


def send(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """The arrays on the device, in one transfer. On a CPU they are there: nothing is copied."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return _views(_pack(arrays, pin=device.type == "cuda").to(device, non_blocking=True), arrays)


class Parcel:
    """A tensor on its way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._event = None
        if not tensor.is_cuda:
            self._host = tensor
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def open(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host


def _lay_out(arrays: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    spans, end = [], 0
    for array in arrays:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + array.nbytes
        spans.append((start, end))
    return spans


def _pack(arrays: Sequence[np.ndarray], *, pin: bool) -> Tensor:
    spans = _lay_out(arrays)
    packed = torch.empty(spans[-1][1], dtype=torch.uint8, pin_memory=pin)
    bytes_of = packed.numpy()
    for array, (start, end) in zip(arrays, spans, strict=True):
        bytes_of[start:end].view(array.dtype)[:] = array.ravel()
    return packed


def _views(memory: Tensor, arrays: Sequence[np.ndarray]) -> list[Tensor]:
    return [
        memory[start:end].view(_TORCH[array.dtype]).view(array.shape)
        for array, (start, end) in zip(arrays, _lay_out(arrays), strict=True)
    ]
