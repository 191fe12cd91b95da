"""Laws of a team: readers take what one alone would, each something, and nothing twice."""

from __future__ import annotations

import pytest

from shoal.train.team import ALONE, Team


@pytest.mark.parametrize("readers", [1, 2, 4])
def test_readers_together_take_the_batches_of_one(readers: int) -> None:
    for first in (0, 12, 13):
        assert list(ALONE.mine(first, 4)) == list(range(first, first + 4))
        taken = [Team(reading=(reader, readers)).mine(first, 4) for reader in range(readers)]
        assert sorted(n for share in taken for n in share) == list(range(first, first + 4))
        assert {len(share) for share in taken} == {4 // readers}


@pytest.mark.parametrize("items", [0, 1, 5, 6])
def test_readers_share_evenly_and_each_item_is_one_readers(items: int) -> None:
    shares = [list(Team(reading=(reader, 3)).share(range(items))) for reader in range(3)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(item for share in shares for item, mine in share if mine) == list(range(items))
