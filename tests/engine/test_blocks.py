"""Laws of the pool: pages are conserved, shared pages are counted, and what is found is exactly what was
kept.

The random walk keeps its own books (a list of pages a sequence, and the tokens written to each page) and
holds the pool to them after every operation.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.blocks import BlockPool


def keep_all(pool: BlockPool, pages: list[int], ids: list[int]) -> None:
    node = pool.find([], 0).node
    for place, page in enumerate(pages):
        start = place * pool.page_size
        node = pool.keep(page, node, tuple(ids[start : start + pool.page_size]))


def test_pages_are_distinct_and_come_back() -> None:
    pool = BlockPool(5, 4)
    first, second = pool.take(2), pool.take(3)
    assert sorted(first + second) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0
    pool.release(first)
    assert sorted(pool.take(2)) == sorted(first)


def test_a_broken_caller_is_caught() -> None:
    pool = BlockPool(3, 4)
    pages = pool.take(2)
    with pytest.raises(AssertionError, match="2 pages asked for, 1 are free"):
        pool.take(2)
    with pytest.raises(AssertionError, match="nobody knows what it holds"):
        pool.share(pages)
    pool.release(pages)
    with pytest.raises(AssertionError, match="nobody holds it"):
        pool.release(pages)


def test_a_prefix_is_found_in_whole_pages_up_to_what_is_allowed() -> None:
    pool, ids = BlockPool(8, 4), list(range(12))
    pages = pool.take(3)
    keep_all(pool, pages, ids)
    assert pool.find(ids, 12).pages == pages
    assert pool.find(ids, 11).pages == pages[:2]
    assert pool.find([*ids[:7], 99, *ids[8:]], 12).pages == pages[:1]
    assert pool.find([99, *ids], 12).pages == []


def test_equal_pages_after_different_beginnings_are_not_confused() -> None:
    pool = BlockPool(8, 2)
    first, second = pool.take(2), pool.take(2)
    keep_all(pool, first, [1, 2, 7, 7])
    keep_all(pool, second, [3, 4, 7, 7])
    assert pool.find([1, 2, 7, 7], 4).pages == first
    assert pool.find([3, 4, 7, 7], 4).pages == second


def test_a_remembered_page_outlives_its_holders_until_it_is_needed() -> None:
    pool, ids = BlockPool(4, 2), [1, 2, 3, 4]
    pages = pool.take(2)
    keep_all(pool, pages, ids)
    pool.release(pages)
    assert pool.num_free == 4
    assert pool.find(ids, 4).pages == pages
    pool.release(pool.take(2))  # the pages that hold nothing go first
    assert pool.find(ids, 4).pages == pages
    pool.take(3)  # then the end of the prefix, which is of no use alone
    assert pool.find(ids, 4).pages == pages[:1]


def test_what_is_forgotten_is_not_found_nor_what_grows_from_it() -> None:
    pool, ids = BlockPool(4, 2), [1, 2, 3, 4]
    pages = pool.take(2)
    old = pool.keep(pages[0], pool.find([], 0).node, (1, 2))
    pool.forget_all()
    pool.keep(pages[1], old, (3, 4))
    assert pool.find(ids, 4).pages == []
    pool.release(pages)
    assert sorted(pool.take(4)) == [0, 1, 2, 3]


def test_a_pool_told_to_remember_nothing_finds_nothing() -> None:
    pool = BlockPool(4, 2, remember=False)
    keep_all(pool, pool.take(2), [1, 2, 3, 4])
    assert pool.find([1, 2, 3, 4], 4).pages == []


@given(st.integers(0, 2**32))
def test_random_walk(seed: int) -> None:
    draw = random.Random(seed)
    pool = BlockPool(12, 2)
    held: list[tuple[list[int], list[int]]] = []  # (pages, ids) of each sequence
    written: dict[int, tuple[int, ...]] = {}  # page -> the whole text up to its end
    for _ in range(60):
        if draw.random() < 0.6:
            ids = [draw.randrange(2) for _ in range(2 * draw.randint(1, 4))]
            prefix = pool.find(ids, len(ids) - 1)
            for place, page in enumerate(prefix.pages):
                assert written[page] == tuple(ids[: 2 * place + 2])
            missing = len(ids) // 2 - len(prefix.pages)
            if missing + pool.count_idle(prefix.pages) <= pool.num_free:
                pool.share(prefix.pages)
                pages, node = prefix.pages + pool.take(missing), prefix.node
                for place in range(len(prefix.pages), len(pages)):
                    written[pages[place]] = tuple(ids[: 2 * place + 2])
                    node = pool.keep(pages[place], node, tuple(ids[2 * place : 2 * place + 2]))
                held.append((pages, ids))
        elif held:
            pages, _ = held.pop(draw.randrange(len(held)))
            pool.release(pages)
        holders = Counter(page for pages, _ in held for page in pages)
        assert pool.num_free == 12 - len(holders)
        for pages, ids in held:  # nobody's pages were written by another
            assert all(written[page] == tuple(ids[: 2 * place + 2]) for place, page in enumerate(pages))
    for pages, _ in held:
        pool.release(pages)
    assert pool.num_free == 12
