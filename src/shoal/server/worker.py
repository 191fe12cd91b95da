"""The engine's process: builds an engine, then steps it for whoever holds the other end of a socket.

It is a process of its own so that neither a long step nor a crash of the device touches the clients'
connections, and so that text and HTTP cost the engine no time. Frames are a length and a pickle, of tuples of
plain values: the two ends are the same program on the same machine, and nothing a client sends is unpickled.

The law: it never decides. It adds and cancels what it is told, reports every event and, each second and when
work begins or is done, how it is; when the other end is gone, so is it. Signals are the parent's business.
"""

from __future__ import annotations

import gc
import pickle
import select
import signal
import socket
import struct
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, Protocol

from shoal.engine import Engine, Event, SamplingParams
from shoal.engine.events import Routed
from shoal.engine.lockstep import Lockstep
from shoal.engine.stats import Stats

LENGTH = struct.Struct("!I")
BEAT_SECONDS = 1.0
COMPILING_SECONDS = 0.005  # between two looks at what is being compiled, where there is nothing else to do
STATS_SECONDS = 0.25  # between two reports while it works


class Report(Protocol):
    """How far the loading is: `report("loading", 3, 10)`."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


Build = Callable[[Report], Engine | Lockstep]  # picklable: it travels to the process that calls it


@dataclass(frozen=True)
class EngineInfo:
    """What the server must know of an engine to refuse what it could never serve."""

    max_len: int  # positions of prompt and answer together
    vocab_size: int
    eos_ids: frozenset[int]
    max_sequences: int
    num_pages: int
    page_size: int
    ledger: str  # what memory goes where, for a person

    @classmethod
    def of(cls, engine: Engine | Lockstep) -> EngineInfo:
        eos = engine.config.eos_token_id
        return cls(
            max_len=engine.ledger.longest,
            vocab_size=engine.config.vocab_size,
            eos_ids=frozenset(eos if isinstance(eos, tuple) else () if eos is None else (eos,)),
            max_sequences=engine.places * engine.settings.max_sequences,
            num_pages=engine.places * engine.pool.num_pages,
            page_size=engine.settings.page_size,
            ledger=str(engine.ledger),
        )


Rest = tuple[Any, ...]  # of an event, in the order of process.Token, from its top on


def frame(message: tuple[Any, ...]) -> bytes:
    body = pickle.dumps(message, protocol=5)
    return LENGTH.pack(len(body)) + body


def work(end: socket.socket, build: Build) -> None:
    """The process's main function."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end.setblocking(True)

    def report(what: str, done: int, total: int) -> None:
        end.sendall(frame(("loading", what, done, total)))

    try:
        engine = build(report)
        _warm_up(engine, lambda what: report(what, 0, 1))
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        end.sendall(frame(("failed", f"{error}" or type(error).__name__, isinstance(error, ValueError))))
        return
    gc.freeze()  # a full collection of torch's heap, 150 ms, would come between two tokens
    try:
        end.sendall(frame(("ready", EngineInfo.of(engine))))
        _Loop(end, engine).run()
    except (BrokenPipeError, ConnectionResetError):
        return  # the server is gone, and nobody waits for an answer


def _warm_up(engine: Engine | Lockstep, tell: Callable[[str], None]) -> None:
    """What the first request would wait for. A CPU compiles nothing: one answer shows that it can."""
    if engine.runner.device.type == "cpu":
        tell("answering once")
        engine.generate([[0]], SamplingParams(max_tokens=1))
        engine.forget_prefixes()
    else:
        engine.warm_up(tell)


class _Loop:
    def __init__(self, end: socket.socket, engine: Engine | Lockstep) -> None:
        self.end, self.engine = end, engine
        self._buffer = bytearray()
        self._request_of: dict[int, int] = {}  # the server's key -> the engine's request
        self._key_of: dict[int, int] = {}
        self._silent: set[int] = set()  # requests of which nothing was told yet
        self._told = 0.0
        self._told_busy = False
        self._compilers = ThreadPoolExecutor(2, "grammar")
        self._compiling: dict[int, tuple[Future[Any], list[int], SamplingParams]] = {}  # by the server's key

    def run(self) -> None:
        while self._listen():
            self._admit_compiled()
            worked = self.engine.busy
            events = self.engine.step() if worked else []
            busy = self.engine.busy
            # Told before the events of the step, so that whoever has the last answer reads it counted.
            turned = busy != self._told_busy or worked != busy
            if turned or time.monotonic() - self._told > STATS_SECONDS:
                self._told, self._told_busy = time.monotonic(), busy
                self.end.sendall(frame(("stats", plain(self.engine.stats(wait=turned)))))
            if events:
                self.end.sendall(frame(self._tell(events)))

    def _listen(self) -> bool:
        """Take what the server has sent; wait for it where there is nothing else to do. False at its end."""
        wait = 0.0 if self.engine.busy else COMPILING_SECONDS if self._compiling else BEAT_SECONDS
        while select.select([self.end], [], [], wait)[0]:
            data = self.end.recv(1 << 20)
            if not data:
                return False
            self._buffer += data
            self._read()
            wait = 0.0
        return True

    def _read(self) -> None:
        while len(self._buffer) >= LENGTH.size:
            (size,) = LENGTH.unpack_from(self._buffer)
            if len(self._buffer) < LENGTH.size + size:
                return
            message = pickle.loads(self._buffer[LENGTH.size : LENGTH.size + size])
            del self._buffer[: LENGTH.size + size]
            if message[0] == "add":
                self._take(*message[1:])
            else:
                assert message[0] == "cancel"
                self._compiling.pop(message[1], None)
                request = self._request_of.get(message[1])
                if request is not None:
                    self.engine.cancel(request)

    def _take(self, key: int, ids: list[int], params: SamplingParams) -> None:
        """A request with a grammar waits until that is compiled, in a thread: nobody waits for it."""
        if params.grammar is None:
            self._add(key, ids, params)
        else:
            compiled = self._compilers.submit(self.engine.admission.prepare, params)
            self._compiling[key] = compiled, ids, params

    def _admit_compiled(self) -> None:
        done = [key for key, (compiled, *_) in self._compiling.items() if compiled.done()]
        for key in done:
            compiled, ids, params = self._compiling.pop(key)
            error = compiled.exception()
            if error is None:
                self._add(key, ids, params)
            elif isinstance(error, ValueError):
                self.end.sendall(frame(("refused", key, str(error))))
            else:
                raise error

    def _add(self, key: int, ids: list[int], params: SamplingParams) -> None:
        try:
            request = self.engine.add(ids, params)
        except ValueError as error:
            self.end.sendall(frame(("refused", key, str(error))))
            return
        self._request_of[key], self._key_of[request] = request, key
        self._silent.add(request)

    def _tell(self, events: list[Event]) -> tuple[Any, ...]:
        """Columns, as most events are a token and its probability; what else one says, by its place."""
        keys = [self._key_of[event.request] for event in events]
        rest: dict[int, Rest] = {}
        for place, event in enumerate(events):
            more = event.finish is not None or event.top or event.routed is not None
            if not more and event.request not in self._silent:
                continue
            self._silent.discard(event.request)
            rest[place] = (
                *(event.top, event.finish, event.cached, event.began),
                *(event.prompt_logprobs, event.prompt_tops, event.error, _pack(event.routed)),
            )
            if event.finish is not None:
                del self._key_of[event.request], self._request_of[keys[place]]
        return "events", keys, [event.token for event in events], [event.logprob for event in events], rest


def _pack(routed: Routed | None) -> tuple[int, tuple[int, ...], bytes, bytes | None] | None:
    """Where it starts, its shape, and the bytes of experts and weights."""
    if routed is None:
        return None
    weights = None if routed.weights is None else routed.weights.numpy().tobytes()
    return routed.start, tuple(routed.experts.shape), routed.experts.numpy().tobytes(), weights


def plain(stats: Stats) -> dict[str, Any]:
    """Stats, with lists for tensors."""
    values = {field.name: getattr(stats, field.name) for field in fields(stats)}
    values["max_violation"] = stats.max_violation
    for name in ("expert_tokens", "experts_touched", "max_violation"):
        if values[name] is not None:
            values[name] = values[name].tolist()
    return values
