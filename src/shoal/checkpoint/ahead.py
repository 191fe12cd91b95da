"""Reading ahead: tensors of mapped files on their way to a GPU, through pinned memory.

Copied from a mapped file itself, a tensor goes by the driver's own buffer, a page after the other, at a fifth
of what the bus carries. Here threads copy what comes next into pinned memory, from where the device takes it
while the host goes on. For a CPU the mapped tensors are handed out as they are.

The law: what comes out is what the files hold, in the order that was asked for, and no more than
`MOST_BYTES`, or one tensor, is held of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

MOST_BYTES = 1 << 30
THREADS = 4


def read_ahead(tensors: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """These tensors, each in pinned memory where the device is a GPU. Copy with `non_blocking=True`."""
    if device.type != "cuda":
        yield from tensors
        return
    coming: deque[tuple[Future[Tensor], int]] = deque()
    held = 0
    with ThreadPoolExecutor(THREADS, "read-ahead") as pool:
        for tensor in tensors:
            coming.append((pool.submit(_pin, tensor), tensor.nbytes))
            held += tensor.nbytes
            while held > MOST_BYTES or len(coming) > 4 * THREADS:
                future, size = coming.popleft()
                yield future.result()
                held -= size
        for future, _ in coming:
            yield future.result()


def _pin(tensor: Tensor) -> Tensor:
    # By numpy: torch would share each copy out over all cores, in each thread.
    pinned = torch.empty_like(tensor, pin_memory=True)
    np.copyto(_bytes(pinned), _bytes(tensor))
    return pinned


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()
