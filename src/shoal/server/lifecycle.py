"""A server's life: bind, load, warm up, serve, drain, end.

It answers /health from the start and /ready once it has warmed up. The first SIGTERM or SIGINT lets nobody
in and lets those inside finish, for `drain_seconds`; a second one, or that deadline, cuts them. The law is
in the exit code: 0 if every request that was taken got its answer, 1 if some were cut or the engine could
not be brought back, 2 if the user's settings were wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from shoal.data.text import Tokenizer
from shoal.server.app import Service, create_app
from shoal.server.gate import Limits
from shoal.server.metrics import Metrics
from shoal.server.page import PATHS, Page, add_page
from shoal.server.process import EngineProcess
from shoal.server.prompts import Prompter
from shoal.server.worker import Build

log = logging.getLogger("shoal.server")


@dataclass(frozen=True)
class ServerSettings:
    """`port` 0 takes a free one. With `keys`, every request needs one of them."""

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    restarts: int = 3
    silence_seconds: float = 120.0
    chat_template: str | None = None
    page: Page | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port is {self.port}; it must be between 0 and 65535")
        if not all(self.keys):
            raise ValueError("an API key is empty; anybody could give that")


def run(
    build: Build,
    tokenizer: Tokenizer,
    settings: ServerSettings,
    *,
    say: Callable[[str], None],
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    on_ready: Callable[[str], None] = lambda address: None,
) -> int:
    """Serve until a signal. The exit code."""
    with bind(settings.host, settings.port) as listener:
        host, port = listener.getsockname()[:2]
        if not settings.keys and not _is_loopback(host):
            say(f"warning: {host} is open to others and no API key is set; give one with --api-key-file")
        with asyncio.Runner(loop_factory=_find_loop()) as runner:
            address = f"http://{host}:{port}"
            return runner.run(
                _serve(build, tokenizer, settings, listener, address, say, on_progress, on_ready)
            )


def bind(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, backlog=2048)
    except socket.gaierror as error:
        raise ValueError(f"host {host!r} is no address of this machine: {error.strerror}") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"port {port} on {host} is in use; choose another with --port (0 takes a free one)"
            ) from None
        raise ValueError(f"port {port} on {host} cannot be opened: {error.strerror}") from None


async def _serve(
    build: Build,
    tokenizer: Tokenizer,
    settings: ServerSettings,
    listener: socket.socket,
    address: str,
    say: Callable[[str], None],
    on_progress: Callable[[str, int, int], None],
    on_ready: Callable[[str], None],
) -> int:
    process = EngineProcess(build, restarts=settings.restarts, silence_seconds=settings.silence_seconds)
    process.on_progress = on_progress
    service = Service(
        process=process,
        prompter=Prompter.of(tokenizer, settings.chat_template),
        model=settings.model,
        metrics=Metrics(process),
        limits=settings.limits,
        created=int(time.time()),
    )
    app = create_app(service, settings.keys, frozenset() if settings.page is None else PATHS)
    watching = None
    if settings.page is not None:
        history = add_page(app, settings.page, process, service.prompter, settings.model)
        watching = asyncio.ensure_future(history.run())
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=None,
            timeout_keep_alive=75,
        )
    )
    leave, cut = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        if service.draining:
            cut.set()
        else:
            service.draining = server.should_exit = True
            leave.set()
            say(f"draining {process.num_live} requests; a second signal cuts them")

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    process.start()
    assert process.failed is not None
    serving = asyncio.ensure_future(server.serve([listener]))
    usable, leaving = (asyncio.ensure_future(event.wait()) for event in (process.usable, leave))
    ends = {serving, leaving, process.failed}
    try:
        await asyncio.wait({*ends, usable}, return_when=asyncio.FIRST_COMPLETED)
        if usable.done():
            say(f"{process.info.ledger if process.info else ''}\n{settings.model} is ready on {address}")
            on_ready(address)
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if process.failed.done():
            if process.info is None:  # it never served: what is wrong is in the settings or the checkpoint
                raise ValueError(process.failed.result())
            say(process.failed.result())
            return 1
        return 0
    finally:
        if watching is not None:
            watching.cancel()
        usable.cancel()
        leaving.cancel()
        server.should_exit = True
        await _drain(serving, cut, service)
        was_cut = process.num_live > 0
        await process.stop()
        if not serving.done():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(serving), 1.0)  # errors reach their clients
        server.force_exit = True
        await serving
        if was_cut:
            say("some requests were cut")
            raise SystemExit(1)


async def _drain(serving: asyncio.Future[None], cut: asyncio.Event, service: Service) -> None:
    ends = asyncio.ensure_future(cut.wait())
    limit = service.limits.drain_seconds if service.process.state == "ready" else 0.0
    await asyncio.wait({serving, ends}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
    ends.cancel()


class _Server(uvicorn.Server):
    """Signals are ours: uvicorn's would end the process by the signal, and know no second one."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _find_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _is_loopback(host: str) -> bool:
    return ipaddress.ip_address(host).is_loopback


class JsonLines(logging.Formatter):
    """A line of JSON an event: when, how grave, what, and its fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


def log_to_stderr(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
