"""Ranks: the processes of one engine, as each of them holds the others.

The first starts the rest on this machine and is the one whom a server or a script talks to; or torchrun has
started them all. They meet in one group for what lies on the device (gloo on a CPU, NCCL on GPUs), and in one
on gloo for what the host says, where the others wait for as long as nobody asks anything.

The law: all live, or none. Who has been started ends with the pipe it was started through, however that
closes; and when one of them ends, the first ends too, at once. An error while they are made is the first
one's to tell.
"""

from __future__ import annotations

import atexit
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal.parallel.meeting import PATIENCE, meet
from shoal.parallel.mesh import leave, started_with

Work = Callable[["Ranks"], None]  # what those do that are started: picklable, it travels to them

ENTER = "from shoal.parallel.ranks import enter; enter()"
NEVER = timedelta(days=3650)  # how long the others wait to be told something
FIRST_BYTES = 1 << 14  # of what is told, in the one message that most of it needs
FAILED = "shoal/failed"


class Ranks:
    """The processes of a group that is there, and `rank` of them, on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.ranks, self.device = dist.get_rank(), dist.get_world_size(), device
        group = dist.group.WORLD
        assert group is not None
        self.group = group
        host = dist.new_group(backend="gloo", timeout=NEVER)
        assert isinstance(host, dist.ProcessGroup)
        self._host = host
        self._first = torch.zeros(FIRST_BYTES, dtype=torch.uint8)
        self._others: list[subprocess.Popen[bytes]] = []
        self._store: dist.Store | None = None
        self._serving = self._closed = False

    # What the model asks of them (tensor.Peers)

    def sum(self, part: Tensor) -> Tensor:
        total = part.contiguous()
        dist.all_reduce(total)
        return total

    def join(self, part: Tensor) -> Tensor:
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.ranks)]
        dist.all_gather(parts, part)
        return torch.cat(parts, dim=-1)

    # What the engine asks of them (engine.team.Team, engine.lockstep.Line)

    crowd = 1

    def share(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        dist.broadcast(tensor, 0)
        return tensor

    def least(self, value: int) -> int:
        least = torch.tensor(value)
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self._host)
        return int(least)

    def collect(self, value: Any) -> list[Any] | None:
        values: list[Any] | None = None if self.rank else [None] * self.ranks
        dist.gather_object(value, values, group=self._host)
        return values

    def tell(self, call: str, *given: Any) -> None:
        self._tell((call, *given))

    def hear(self) -> tuple[Any, ...] | None:
        dist.broadcast(self._first, 0, group=self._host)
        told = self._first.numpy()
        size = int.from_bytes(told[:8].tobytes(), "little")
        if size <= FIRST_BYTES - 8:
            return pickle.loads(told[8 : 8 + size].tobytes())
        rest = torch.empty(size, dtype=torch.uint8)
        dist.broadcast(rest, 0, group=self._host)
        return pickle.loads(rest.numpy().tobytes())

    def dismiss(self) -> None:
        """The others' `hear` ends."""
        self._tell(None)

    def _tell(self, message: tuple[Any, ...] | None) -> None:
        body = pickle.dumps(message, protocol=5)
        size, told = len(body), self._first.numpy()
        told[:8] = memoryview(size.to_bytes(8, "little"))
        if size <= FIRST_BYTES - 8:
            told[8 : 8 + size] = memoryview(body)
        dist.broadcast(self._first, 0, group=self._host)
        if size > FIRST_BYTES - 8:
            dist.broadcast(torch.frombuffer(bytearray(body), dtype=torch.uint8), 0, group=self._host)

    # Their life

    def watch(self, others: list[subprocess.Popen[bytes]], store: dist.Store) -> None:
        """End with the first of those that were started to end."""
        self._others, self._store = others, store
        for rank, process in enumerate(others, start=1):
            threading.Thread(target=self._wait_for, args=(rank, process), daemon=True).start()

    def serve(self) -> None:
        """All have been made: from here on an end is an end of all."""
        self._serving = True
        ended = [process.args for process in self._others if process.poll() is not None]
        if ended:
            raise RuntimeError(
                f"{len(ended)} of {self.ranks} processes of the engine ended while they loaded"
            )

    def failure(self) -> str | None:
        """What another one failed of while it was made."""
        if self._store is None or not self._store.check([FAILED]):
            return None
        return self._store.get(FAILED).decode()

    def close(self) -> None:
        """Let the others end. The first one's call, once no more is asked, or nothing works any more."""
        if self._closed:
            return
        self._closed = True
        if not self._others and self._serving:  # torchrun's
            self.dismiss()
        for process in self._others:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._others:
            process.wait()
        if self._others:
            dist.destroy_process_group()

    def _wait_for(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if self._serving and not self._closed:
            sys.stderr.write(
                f"shoal: process {rank} of the engine ended (exit code {code}); it ends as a whole\n"
            )
            leave(1)


def start(work: Work, ranks: int, device: str, environment: Mapping[str, str] = os.environ) -> Ranks:
    """The processes of an engine: those that torchrun started, or so many more that do `work`.

    Returns in the first. Another one of torchrun's does `work`, and ends with it, in here.
    """
    if dist.is_initialized():
        raise ValueError(
            "this process has a group with others already; make one engine of several processes in a process"
        )
    if (started := started_with(environment)) > 1:
        if started != ranks:
            raise ValueError(
                f"torchrun started {started} processes, but the engine is for {ranks}; start with "
                f"--nproc-per-node {ranks}, or without torchrun"
            )
        rank = int(environment["RANK"])
        made = _meet(rank, ranks, _place(device, int(environment["LOCAL_RANK"])), meet(environment))
        if rank:
            work(made)
            leave(0)
        atexit.register(made.close)
        return made
    if device == "cuda" and torch.cuda.device_count() < ranks:
        raise ValueError(
            f"the engine is for {ranks} GPUs, but this machine has {torch.cuda.device_count()}; "
            f"ask for no more"
        )
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
    others = []
    for rank in range(1, ranks):
        process = subprocess.Popen([sys.executable, "-c", ENTER], stdin=subprocess.PIPE)
        assert process.stdin is not None
        pickle.dump(sys.path, process.stdin)
        pickle.dump((work, rank, ranks, device, store.port), process.stdin)
        process.stdin.flush()
        others.append(process)
    made = _meet(0, ranks, _place(device, 0), store)
    made.watch(others, store)
    atexit.register(made.close)
    return made


def enter() -> None:
    """The main function of those that are started. Signals are the first one's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.path[:] = pickle.load(sys.stdin.buffer)
    work, rank, ranks, device, port = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_the_pipe, daemon=True).start()
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=PATIENCE)
    try:
        work(_meet(rank, ranks, _place(device, rank), store))
    except (ValueError, OSError, RuntimeError) as error:
        with suppress(RuntimeError):  # the first one has the store
            store.set(FAILED, f"process {rank} of the engine: {error}")
        time.sleep(1)  # if it is that the first one has ended, the pipe says so by now
        traceback.print_exc()
        leave(1)
    leave(0)


def _end_with_the_pipe() -> None:
    os.read(sys.stdin.fileno(), 1)
    leave(0)


def _meet(rank: int, ranks: int, device: torch.device, store: dist.Store | None) -> Ranks:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if store is None:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    return Ranks(device)


def _place(device: str, index: int) -> torch.device:
    return torch.device("cuda", index) if device == "cuda" else torch.device(device)
