"""Where the processes of a run meet: a store that belongs to this very start of it.

torchrun keeps one store for all its starts of a run. In it lie the addresses of processes that were killed,
so that after a restart gloo and NCCL may call the dead: the connection is refused, or nobody comes and all
wait (pytorch issue 135712; in 2.11, 5 of 9 restarts on gloo). The number of the start cannot tell old
from new, as agents count on their own.

So the first process opens a store of its own and leaves its address, with a word drawn for it, in torchrun's.
The law: a store is used only if it knows the word that was left with its address. An old address has nobody
behind it, or somebody who does not know the word; then the next one is waited for.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Mapping
from datetime import timedelta

from torch.distributed import Store, TCPStore

PLACE, WORD = "shoal/meeting", "shoal/word"
PATIENCE = timedelta(minutes=5)  # for all processes to have come


def meet(environment: Mapping[str, str] = os.environ) -> Store | None:
    """The store of this start, the same in all its processes; None where torchrun keeps none for them."""
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    return meet_over(TCPStore(host, port, is_master=False, timeout=PATIENCE), host, int(environment["RANK"]))


def meet_over(old: Store, host: str, rank: int) -> Store:
    """The store of this start, found through one that earlier starts have written to.

    `host` is where rank 0 runs. TimeoutError where it does not come.
    """
    if rank == 0:
        word = secrets.token_hex(8)
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
        store.set(WORD, word)
        old.set(PLACE, f"{store.port} {word}")
        return store
    deadline = time.monotonic() + PATIENCE.total_seconds()
    while time.monotonic() < deadline:
        port, word = old.get(PLACE).decode().split()
        if (found := _knock(host, int(port), word)) is not None:
            return found
        time.sleep(0.1)
    raise TimeoutError(f"process 0 of the run did not open a store on {host} within {PATIENCE}")


def _knock(host: str, port: int, word: str) -> Store | None:
    """The store at an address, if one is there that knows the word."""
    try:
        # TCPStore would call a dead address again and again until its own patience ends.
        socket.create_connection((host, port), timeout=5).close()
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
        known = store.check([WORD]) and store.get(WORD).decode() == word
    except (OSError, RuntimeError):  # nobody, or somebody else
        return None
    store.set_timeout(PATIENCE)
    return store if known else None
