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
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton

_MOST_THREADS = 16


class Rehearsal:
    """What `rehearsing` gives. `attempt` is a context for a part of it, in which nothing may be copied to or
    from the host; `compiled` tells, at its end, how many kernels Triton's cache on disk did not have."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], tuple[Any, str]] = {}
        self.compiled = 0
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []  # they share their memory for as long as all live

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        self._graphs.append(graph := torch.cuda.CUDAGraph())
        # What is wrong with this part will be said when it is run.
        with contextlib.suppress(RuntimeError, ValueError), torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="relaxed")
            try:
                yield
            finally:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that a graph of nothing but kernels left out is empty
                    graph.capture_end()

    def meet(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Triton's hook before it compiles: True tells it to leave compiling and launching out."""
        data = compile["specialization_data"]
        self.found[fn.jit_function.cache_key, json.dumps(compile["key"])] = fn.jit_function, data
        return True

    def end(self) -> None:
        self._graphs.clear()
        torch._C._cuda_clearCublasWorkspaces()  # of the stream, which keep 32 MiB of the graphs' memory each
        torch.cuda.empty_cache()
        device, threads = torch.cuda.current_device(), min(len(os.sched_getaffinity(0)), _MOST_THREADS)

        def count(*, cache_hit: bool, **_: Any) -> None:
            self.compiled += not cache_hit

        def prepare(kernel: Any, data: str) -> None:
            torch.cuda.set_device(device)  # of this thread
            with contextlib.suppress(Exception):  # it is compiled when it is met, and what is wrong said then
                kernel.preload(data)

        with _set(triton.knobs.compilation, "listener", count), ThreadPoolExecutor(threads) as pool:
            for kernel, data in self.found.values():
                pool.submit(prepare, kernel, data)


@contextlib.contextmanager
def rehearsing() -> Iterator[Rehearsal]:
    """Within it no kernel is launched that is not compiled yet; at its end those that were met are."""
    rehearsal = Rehearsal()
    with _set(triton.knobs.runtime, "jit_cache_hook", rehearsal.meet):
        yield rehearsal
    rehearsal.end()


@contextlib.contextmanager
def _set(knobs: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(knobs, name)
    setattr(knobs, name, value)
    try:
        yield
    finally:
        setattr(knobs, name, before)
