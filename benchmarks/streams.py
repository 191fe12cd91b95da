"""A client that costs little: so many streams over /v1/completions, counted and not read.

    python -m benchmarks.streams http://127.0.0.1:8000 --streams 128 --prompt 512 --tokens 1024

What it is for is a server's own limit, so it parses no chunk but the last: a connection a request, bytes
counted as they come, tokens taken from `usage`. It is a process of its own, of the standard library alone.
`shoal bench serve` is the client that reads what it gets.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

TAIL = 1024  # bytes that hold the last two events


@dataclass(frozen=True)
class Load:
    streams: int
    prompt: int
    tokens: int
    vocabulary: int
    seed: int = 0

    def prompts(self) -> list[list[int]]:
        draw = random.Random(self.seed)
        return [[draw.randrange(self.vocabulary) for _ in range(self.prompt)] for _ in range(self.streams)]


@dataclass(frozen=True)
class Told:
    """What came back. `seconds` run from the first request to the last byte."""

    seconds: float
    generated: int
    first_ms: float  # median
    reads: int  # times that bytes were there for a stream
    bytes: int

    @property
    def rate(self) -> float:
        return self.generated / self.seconds


class Stream(asyncio.Protocol):
    def __init__(self, request: bytes) -> None:
        self._request, self._tail = request, b""
        self.reads = self.bytes = 0
        self.first = 0.0
        self.ended: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.reads += 1
        self.bytes += len(data)
        self._tail = (self._tail + data)[-TAIL:]
        if not self.first and b"data: " in self._tail:
            self.first = time.perf_counter()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(self._tail)


def request(host: str, ids: list[int], tokens: int) -> bytes:
    told = {"prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    told |= {"stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps(told).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def count(tail: bytes) -> int:
    """Tokens of the answer that ends so. RuntimeError if it is not whole."""
    events = [part.partition(b"\n\n")[0] for part in tail.split(b"data: ") if part.startswith(b"{")]
    if b"data: [DONE]" not in tail or not events:
        raise RuntimeError(f"a stream ended early, with {tail[-300:]!r}")
    return json.loads(events[-1])["usage"]["completion_tokens"]


async def drive(url: str, load: Load) -> Told:
    where = urlsplit(url)
    host, port = where.hostname or "", where.port or 80
    requests = [request(where.netloc, ids, load.tokens) for ids in load.prompts()]
    loop = asyncio.get_running_loop()

    async def one(data: bytes) -> Stream:
        _, stream = await loop.create_connection(lambda: Stream(data), host, port)
        await stream.ended
        return stream

    start = time.perf_counter()
    streams = await asyncio.gather(*map(one, requests))
    seconds = time.perf_counter() - start
    return Told(
        seconds,
        sum(count(stream.ended.result()) for stream in streams),
        1e3 * statistics.median(stream.first - start for stream in streams),
        sum(stream.reads for stream in streams),
        sum(stream.bytes for stream in streams),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streams", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args())
    print(json.dumps(asdict(asyncio.run(drive(given.pop("url"), Load(**given))))))


if __name__ == "__main__":
    main()
