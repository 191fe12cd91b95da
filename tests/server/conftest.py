"""What the tests of this room share: a real server, in processes of its own, over a tiny model.

The server is `shoal serve` as a user starts it, on a free port of 127.0.0.1; one serves all tests that do it
no harm. Other work may hold the machine at any moment: tests wait for what must come, for PATIENCE at most,
and never say how soon.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from benchmarks.server import children
from shoal.data.text import Tokenizer
from tests.tiny_checkpoint import write_checkpoint

MAIN = "import sys; sys.argv[0] = 'shoal'; from shoal.cli import main; main()"
PATIENCE = 600.0  # seconds


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@dataclass
class Server:
    process: subprocess.Popen[str]
    reader: threading.Thread = field(init=False)
    url: str = ""
    lines: list[str] = field(default_factory=list)

    def ask(self, method: str, path: str, **how: Any) -> httpx.Response:
        return httpx.request(method, f"{self.url}{path}", timeout=PATIENCE, **how)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        text = self.ask("GET", "/metrics").text
        values = re.findall(rf"^shoal:{name}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, values))

    def wait_until(self, holds: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < end, f"not within {PATIENCE} s; log: {self.lines[-5:]}"
            time.sleep(0.02)

    def engine_pid(self) -> int:
        """The child of the fork server."""
        forks = next(pid for pid in children(self.process.pid) if b"forkserver" in _command(pid))
        return next(iter(children(forks)))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Its engine computes nothing meanwhile, so that no request ends by itself."""
        pid = self.engine_pid()
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):  # it was ended
                os.kill(pid, signal.SIGCONT)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


Start = Callable[..., Server]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(checkpoint)


@pytest.fixture(scope="session")
def launch(checkpoint: Path) -> Iterator[Start]:
    """Start a server and wait until it is ready; with `ready=False`, until it has bound its port."""
    servers: list[Server] = []

    def start(*arguments: str, ready: bool = True, env: dict[str, str] | None = None) -> Server:
        command = [sys.executable, "-c", MAIN, "serve", str(checkpoint), "--port", "0", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        server = Server(process)
        servers.append(server)
        assert process.stderr is not None
        server.reader = threading.Thread(
            target=lambda: server.lines.extend(process.stderr or ()), daemon=True
        )
        server.reader.start()
        if ready:
            server.wait_until(lambda: process.poll() is not None or bool(_address(server)))
            assert process.poll() is None, server.lines
            server.url = _address(server)
        return server

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait(PATIENCE)
        server.reader.join(PATIENCE)
        assert server.process.stderr is not None
        server.process.stderr.close()


def _address(server: Server) -> str:
    found = [match[1] for line in server.lines if (match := re.search(r"ready on (http://\S+)", line))]
    return found[0] if found else ""


@pytest.fixture(scope="session")
def server(launch: Start) -> Server:
    """For every test that leaves it as it was."""
    return launch("--max-sequences", "16", "--max-queue", "64")


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE
    ) as client:
        yield client


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        yield client
