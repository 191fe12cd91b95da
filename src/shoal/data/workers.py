"""A function over chunks of documents, on several processes: the same results in the same order as on one.

The law: what comes out does not depend on the number of workers. Chunks are cut by size before anyone works,
results are handed on in the order of the chunks, and at most two chunks a worker are in memory. The function
must be a module's own, or a `partial` of one, so that a process started afresh can find it.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

from shoal.data.read import Document

CHUNK_CHARACTERS = 1 << 20
CHUNK_DOCUMENTS = 4096

Result = TypeVar("Result")


def chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """In order; each of about a million characters, or one long document."""
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= CHUNK_CHARACTERS or len(chunk) == CHUNK_DOCUMENTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class Workers:
    """So many processes, started when they are first needed; one worker is this process."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"workers is {count}; it takes at least 1")
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map_chunks(
        self, function: Callable[[list[Document]], Result], documents: Iterable[Document]
    ) -> Iterator[tuple[list[Document], Result]]:
        """Each chunk with what `function` makes of it."""
        if self.count == 1:
            for chunk in chunks(documents):
                yield chunk, function(chunk)
            return
        if self._pool is None:
            # Not a fork: threads of numpy and torch do not survive it.
            self._pool = ProcessPoolExecutor(self.count, multiprocessing.get_context("spawn"))
        waiting: deque[tuple[list[Document], Future[Result]]] = deque()
        for chunk in chunks(documents):
            waiting.append((chunk, self._pool.submit(function, chunk)))
            if len(waiting) > 2 * self.count:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
