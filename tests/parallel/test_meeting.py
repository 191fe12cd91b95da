"""The law of the meeting: whoever comes finds the store of this start, whatever earlier starts have left."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore, TCPStore

from shoal.parallel.meeting import PLACE, WORD, meet, meet_over

HOST = "localhost"


@pytest.fixture
def dead() -> Iterator[int]:
    """A port at which nobody is, nor comes meanwhile: it is held, and not listened at."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.mark.parametrize("left", ["nothing", "the dead", "somebody else"])
def test_all_find_the_store_of_this_start(left: str, dead: int) -> None:
    old = HashStore()
    old.set_timeout(timedelta(seconds=240))
    other = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    other.set(WORD, "theirs")
    if left != "nothing":
        old.set(PLACE, f"{dead if left == 'the dead' else other.port} ours")
    with ThreadPoolExecutor(2) as threads:
        early = threads.submit(meet_over, old, HOST, 1)  # what was left is all that it finds
        with pytest.raises(TimeoutError):
            early.result(0.5)
        first = meet_over(old, HOST, 0)
        first.set("told", "by the first")
        assert early.result(240).get("told") == b"by the first"
        late = threads.submit(meet_over, old, HOST, 2).result(240)
        assert late.get("told") == b"by the first"
    assert not other.check(["told"])


def test_who_was_not_started_by_an_agent_meets_as_torch_does() -> None:
    assert meet({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": HOST, "MASTER_PORT": "1"}) is None
