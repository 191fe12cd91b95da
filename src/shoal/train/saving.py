"""Checkpoints that are written while training goes on, from a copy on the host.

A step waits for the copy, never for the disk: a thread writes, syncs and renames, as native.py does it. The
law: what is written is the state of the step that asked, byte for byte what a save that is waited for gives,
and at most one is under way; the next one waits for it. Processes write together and meet over a line of
their own (`peers`), since the steps' own is busy.

A disk that fails is told when the save is settled: `failed` asks without waiting, for the Trainer to stop on
all processes after the same step. The copy takes as much host memory as the state has bytes, and is kept.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from shoal.checkpoint import native
from shoal.train.metrics import CheckpointReport


class Saver:
    """Saves of one run. While it is open it may hold one that is under way; closed, it holds none."""

    def __init__(self, folder: Path, keep: int, peers: native.Peers, *, background: bool) -> None:
        self.folder, self.keep, self.peers = folder, keep, peers
        self.background = background
        self._under_way: Future[CheckpointReport] | None = None
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def begin(self, step: int, tensors: native.Tensors, state: Mapping[str, Any]) -> None:
        """Have a checkpoint written; in the background, once no other one is. Until `settle` it may fail."""
        assert self._under_way is None, "settle the save before first"
        start = time.perf_counter()
        if self.background:
            tensors = self._copied(tensors)
            self._under_way = self._writer.submit(self._write, step, tensors, state, start)
        else:
            self._under_way = Future()
            self._under_way.set_result(self._write(step, tensors, state, start))

    def _write(
        self, step: int, tensors: native.Tensors, state: Mapping[str, Any], start: float
    ) -> CheckpointReport:
        path = native.save(self.folder, step, tensors, state, keep=self.keep, peers=self.peers)
        return CheckpointReport(step, path, time.perf_counter() - start)

    @property
    def failed(self) -> bool:
        """Whether one under way has come to its end and failed."""
        return self.ended and self._under_way is not None and self._under_way.exception() is not None

    @property
    def ended(self) -> bool:
        """Whether `settle` has something to tell, and need not wait."""
        return self._under_way is not None and self._under_way.done()

    def settle(self) -> CheckpointReport | None:
        """Wait for the save under way, if there is one, and tell of it. OSError where the disk refused it."""
        under_way, self._under_way = self._under_way, None
        return None if under_way is None else under_way.result()

    def _copied(self, tensors: native.Tensors) -> dict[str, dict[str, Tensor]]:
        """The tensors as they are now, on the host, in memory that is used again."""
        devices = set[torch.device]()
        copies: dict[str, dict[str, Tensor]] = {}
        for stem, group in tensors.items():
            kept, copies[stem] = self._copies.get(stem, {}), {}
            for name, tensor in group.items():
                copy = kept.get(name)
                if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
                    # Pinned, a copy from a GPU runs at the bus's rate and beside the next one.
                    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                copies[stem][name] = copy.copy_(tensor.detach(), non_blocking=True)
                devices |= {tensor.device} if tensor.is_cuda else set()
        for device in devices:
            torch.cuda.synchronize(device)
        self._copies = copies
        return copies

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let the one under way come to its end, well or not: nobody asks any more."""
        if self._under_way is not None:
            self._under_way.exception()
            self._under_way = None
