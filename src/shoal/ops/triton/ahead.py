"""Compiling ahead: kernels are found by a rehearsal in which nothing runs, and compiled several at a time.

Triton compiles a kernel when it is first launched, one after the other, a second or so each; a server met a
hundred before it was ready. Compiling is MLIR, LLVM and ptxas, which leave Python's lock to others, so
threads share it out. What a rehearsal does is recorded into a CUDA graph that is thrown away: its operators
compute nothing, so it matters to nobody that kernels not compiled yet are left out of it.

The law: a rehearsal changes neither results nor what is launched later; where one fails, or a kernel cannot
be compiled here, it is compiled when it is met, as ever.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton

_MOST_THREADS = 16


class Rehearsal:
    """What `rehearsing` gives: `attempt` is a context for a part of the rehearsal."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], tuple[Any, str]] = {}

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        graph = torch.cuda.CUDAGraph()
        # What is wrong with this part will be said when it is run.
        with contextlib.suppress(RuntimeError, ValueError), torch.cuda.stream(torch.cuda.Stream()):
            graph.capture_begin(capture_error_mode="relaxed")
            try:
                yield
            finally:
                graph.capture_end()

    def __call__(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Triton's hook before it compiles: True tells it to leave compiling and launching out."""
        data = compile["specialization_data"]
        self.found[fn.jit_function.cache_key, json.dumps(compile["key"])] = fn.jit_function, data
        return True


@contextlib.contextmanager
def rehearsing() -> Iterator[Rehearsal]:
    """Within it no kernel is launched that is not compiled yet; at its end those that were met are."""
    runtime, rehearsal = triton.knobs.runtime, Rehearsal()
    before, runtime.jit_cache_hook = runtime.jit_cache_hook, rehearsal
    try:
        yield rehearsal
    finally:
        runtime.jit_cache_hook = before
    device, threads = torch.cuda.current_device(), min(len(os.sched_getaffinity(0)), _MOST_THREADS)

    def prepare(kernel: Any, data: str) -> None:
        torch.cuda.set_device(device)  # of this thread
        with contextlib.suppress(Exception):  # it is compiled when it is met, and what is wrong said then
            kernel.preload(data)

    with ThreadPoolExecutor(threads) as pool:
        for kernel, data in rehearsal.found.values():
            pool.submit(prepare, kernel, data)
