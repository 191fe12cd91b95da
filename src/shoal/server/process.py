"""EngineProcess: the server's end of the engine. It starts the process, talks to it, and starts it again.

The laws: a request that was taken ends, with a finish, a refusal or an error, whatever becomes of the
process; and a ticket that is closed costs the engine nothing more. A process that dies, or that says
nothing for `silence_seconds` once it serves, fails its requests at once and is started again, after a pause
that doubles; after `restarts` deaths without a request served in between, no more.

What a reader does not take in time is kept for it, several tokens in one batch: nobody waits for a slow
one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import multiprocessing
import pickle
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from shoal.engine import SamplingParams
from shoal.server.errors import ApiError
from shoal.server.forks import METHOD
from shoal.server.worker import LENGTH, Build, EngineInfo, frame, work

log = logging.getLogger("shoal.server")

State = Literal["loading", "ready", "dead", "stopped"]


class Token(NamedTuple):
    """An event of the engine (engine.Event) for one part of a ticket; the first says how that began."""

    part: int
    token: int | None
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()
    finish: str | None = None
    cached: int = 0
    began: float | None = None
    prompt_logprobs: tuple[float, ...] | None = None
    prompt_tops: tuple[tuple[tuple[int, float], ...], ...] | None = None
    error: str | None = None
    routed: tuple[int, tuple[int, ...], bytes, bytes | None] | None = None  # worker._pack


@dataclass
class Ticket:
    """Requests of the engine that belong to one request of a client: its prompts, and n of each."""

    process: EngineProcess
    keys: dict[int, int] = field(default_factory=dict)  # of those that live -> part
    failure: ApiError | None = None
    _mail: list[Token] = field(default_factory=list)
    _reader: asyncio.Future[None] | None = None  # who waits

    async def receive(self) -> list[Token]:
        """What has come since the last time; waits until there is something. Raises what went wrong."""
        if not self._mail and self.failure is None:
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        if self.failure is not None:
            raise self.failure
        mail, self._mail = self._mail, []
        return mail

    def close(self, part: int | None = None) -> None:
        """Cancel a part, or all that still live."""
        for key, own in list(self.keys.items()):
            if part is None or own == part:
                del self.keys[key]
                self.process.forget(key)

    def put(self, token: Token) -> None:
        self._mail.append(token)
        self._wake()

    def fail(self, failure: ApiError) -> None:
        self.failure = failure
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class EngineProcess:
    def __init__(self, build: Build, *, restarts: int = 3, silence_seconds: float = 120.0) -> None:
        self._build, self._restarts, self._silence = build, restarts, silence_seconds
        self.state: State = "loading"
        self.info: EngineInfo | None = None
        self.stats: dict[str, Any] = {}  # worker.plain
        self.past_stats: dict[str, float] = {}  # sums over the processes that ended
        self.progress: tuple[str, int, int] = ("starting", 0, 1)
        self.deaths = 0
        self.failed: asyncio.Future[str] | None = None  # done when it will not be started again
        self.usable = asyncio.Event()
        self.on_progress: Callable[[str, int, int], None] = lambda what, done, total: None
        self._keys = itertools.count()
        self._tickets: dict[int, Ticket] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._process: Any = None
        self._heard = 0.0
        self._in_a_row = 0  # deaths, with no request served in between
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def num_live(self) -> int:
        return len(self._tickets)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        self.failed = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.create_task(self._supervise()), asyncio.create_task(self._watch())]

    async def stop(self) -> None:
        """End the process. It loses what it was doing."""
        self.state = "stopped"
        self._fail_all(ApiError(503, "the server has been stopped; ask again", code="stopped"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._writer is not None:
            self._writer.close()
        if self._process is not None:
            await asyncio.to_thread(self._process.join, 5)
            if self._process.is_alive():
                self._process.kill()
                await asyncio.to_thread(self._process.join)

    def submit(self, parts: Sequence[tuple[list[int], SamplingParams]]) -> Ticket:
        """Hand requests to the engine. ApiError 503 while there is none."""
        if self.state != "ready" or self._writer is None:
            raise ApiError(
                503, f"the engine is {self.state}; ask again soon", code="engine_unavailable", retry_after=5
            )
        ticket = Ticket(self)
        for part, (ids, params) in enumerate(parts):
            key = next(self._keys)
            ticket.keys[key] = part
            self._tickets[key] = ticket
            self._writer.write(frame(("add", key, ids, params)))
        return ticket

    def forget(self, key: int) -> None:
        if self._tickets.pop(key, None) is not None and self._writer is not None:
            self._writer.write(frame(("cancel", key)))

    async def _supervise(self) -> None:
        assert self.failed is not None
        while True:
            reason = await self._live()
            self.state = "dead"
            self.usable.clear()
            self.deaths += 1
            self._in_a_row += 1
            self._sum_up()
            if reason is not None and self.info is None:  # it never came up: another try would end alike
                self.failed.set_result(reason)
                return
            reason = reason or "the engine's process ended"
            log.error("engine died", extra={"reason": reason, "requests": len(self._tickets)})
            self._fail_all(
                ApiError(503, f"{reason}; it is being started again", code="engine_died", retry_after=5)
            )
            if self._in_a_row > self._restarts:
                self.failed.set_result(f"{reason}, {self._in_a_row} times in a row")
                return
            await asyncio.sleep(min(30.0, 0.25 * 2**self._in_a_row))
            self.state = "loading"

    async def _live(self) -> str | None:
        """One life of the process: why it ended, where it said so."""
        context = multiprocessing.get_context(METHOD)
        ours, theirs = socket.socketpair()
        self._process = context.Process(target=work, args=(theirs, self._build), daemon=True)
        await asyncio.to_thread(self._process.start)
        theirs.close()
        self._heard = time.monotonic()
        reader, self._writer = await asyncio.open_connection(sock=ours)
        try:
            while True:
                (size,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
                message = pickle.loads(await reader.readexactly(size))
                self._heard = time.monotonic()
                if message[0] == "failed":
                    return message[1]
                self._take(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            await asyncio.to_thread(self._process.join, 5)
            return None if self.info is not None else f"exit code {self._process.exitcode} while loading"
        finally:
            self._writer.close()
            self._writer = None

    def _take(self, message: tuple[Any, ...]) -> None:
        match message[0]:
            case "events":
                _, keys, tokens, logprobs, rest = message
                for place, key in enumerate(keys):
                    ticket = self._tickets.get(key)
                    if ticket is None:
                        continue
                    more = rest.get(place, ())
                    token = Token(ticket.keys[key], tokens[place], logprobs[place], *more)
                    if token.finish is not None:
                        del self._tickets[key], ticket.keys[key]
                    ticket.put(token)
                self._in_a_row = 0
            case "stats":
                self.stats = message[1]
            case "loading":
                self.progress = message[1:]
                self.on_progress(*message[1:])
            case "refused":
                ticket = self._tickets.pop(message[1], None)
                if ticket is not None:
                    del ticket.keys[message[1]]
                    ticket.fail(ApiError(400, message[2]))
            case "ready":
                self.info, self.state = message[1], "ready"
                self.usable.set()

    async def _watch(self) -> None:
        """A process that serves speaks every second; one that is silent for long hangs."""
        while True:
            await asyncio.sleep(min(1.0, self._silence / 4))
            if self.state == "ready" and time.monotonic() - self._heard > self._silence:
                log.error("engine hangs", extra={"silent_seconds": time.monotonic() - self._heard})
                self._process.kill()
                self._heard = time.monotonic()

    def _sum_up(self) -> None:
        for name, value in self.stats.items():
            if isinstance(value, int | float):
                self.past_stats[name] = self.past_stats.get(name, 0) + value
        self.stats = {}

    def _fail_all(self, failure: ApiError) -> None:
        tickets, self._tickets = self._tickets, {}
        for ticket in {id(ticket): ticket for ticket in tickets.values()}.values():
            ticket.keys.clear()
            ticket.fail(failure)
