"""BlockPool: who holds which page of the cache, in integers alone.

A page is free or held by a count of sequences. A full page may be remembered for what it holds, so that a
later sequence that begins with the same tokens shares it instead of computing it again. A remembered page
that nobody holds is still free: it is given out, least recently used first, when pages that hold nothing
worth keeping are gone.

The law: every page taken is given back once by every holder, so when no sequence lives every page is free.

Prefixes are exact, not hashed to a fingerprint: a page is known by (node of the page before it, its own
tokens), and a node number is never used twice, so equal nodes mean equal tokens from position 0 on. What lies
in the pages, and when a page has really been computed, is left to the runner and the scheduler.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

_Key = tuple[int, tuple[int, ...]]  # the node before a page, and the tokens in it


class Prefix(NamedTuple):
    """What the pool remembers of the beginning of a sequence."""

    pages: list[int]
    node: int  # of the last of them


class BlockPool:
    def __init__(self, num_pages: int, page_size: int, *, remember: bool = True) -> None:
        assert min(num_pages, page_size) > 0
        self.num_pages, self.page_size, self.remember = num_pages, page_size, remember
        self._holders = [0] * num_pages
        self._free = OrderedDict.fromkeys(range(num_pages))  # the next to be given out comes first
        self._known: dict[_Key, tuple[int, int]] = {}  # -> page, node
        self._keys: list[_Key | None] = [None] * num_pages  # what each page is known by
        self._root = self._last_node = 0  # the node before every first page

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        """How often pages are held, by all sequences together."""
        return sum(self._holders)

    @property
    def capacity(self) -> int:
        """Positions that all pages hold together."""
        return self.num_pages * self.page_size

    def count_pages(self, num_positions: int) -> int:
        return -(-num_positions // self.page_size)

    def take(self, count: int) -> list[int]:
        """`count` free pages, each now held once. What was remembered of them is forgotten."""
        assert 0 <= count <= self.num_free, f"{count} pages asked for, {self.num_free} are free"
        pages = [self._free.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            assert self._holders[page] == 0
            self._holders[page] = 1
            self.forget(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Hold pages found by `find` once more."""
        for page in pages:
            assert self._keys[page] is not None, f"page {page} is shared, but nobody knows what it holds"
            if self._holders[page] == 0:
                del self._free[page]
            self._holders[page] += 1

    def release(self, pages: list[int]) -> None:
        """Give back pages of one sequence, in its order. Its last are the first to be given out again: a
        remembered page is of no use without those before it."""
        for page in reversed(pages):
            assert self._holders[page] > 0, f"page {page} is given back, but nobody holds it"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free[page] = None
                if self._keys[page] is None:
                    self._free.move_to_end(page, last=False)

    def find(self, ids: list[int], most: int) -> Prefix:
        """The longest known beginning of `ids`, in whole pages, at most `most` positions. Takes nothing."""
        pages, node, size = [], self._root, self.page_size
        for start in range(0, most - size + 1, size):
            known = self._known.get((node, tuple(ids[start : start + size])))
            if known is None:
                break
            page, node = known
            pages.append(page)
        return Prefix(pages, node)

    def count_idle(self, pages: Iterable[int]) -> int:
        """How many of the pages are free, and would not be after `share`."""
        return sum(self._holders[page] == 0 for page in pages)

    def keep(self, page: int, before: int, ids: tuple[int, ...]) -> int:
        """Remember a held page, now full and computed: its node. If an equal one is known, that one stays."""
        assert self._holders[page] > 0, f"page {page} is remembered, but nobody holds it"
        assert len(ids) == self.page_size, f"page {page} is remembered with {len(ids)} tokens"
        if not self.remember:
            return before
        known = self._known.get((before, ids))
        if known is None:
            assert self._keys[page] is None, f"page {page} already holds other tokens"
            self._last_node += 1
            known = (page, self._last_node)
            self._known[(before, ids)], self._keys[page] = known, (before, ids)
        return known[1]

    def forget_all(self) -> None:
        """From now on find nothing of what is known, nor of what sequences now running add to it."""
        self._root = self._last_node = self._last_node + 1

    def forget(self, page: int) -> None:
        """What the page holds is not worth finding, nor what was built on it."""
        key, self._keys[page] = self._keys[page], None
        if key is not None:
            del self._known[key]
