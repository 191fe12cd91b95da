"""Gate: what every request passes before it is read, as plain ASGI around the application.

It names each request (`x-request-id`, the client's own if it sent a short one), checks its key, reads its
body within a size and a time, writes one line of log when it is done, and counts. The law: what is refused
here has cost no more than its headers and the bytes allowed.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import orjson

from shoal.server.errors import ApiError
from shoal.server.metrics import Metrics

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("shoal.server")

OPEN = frozenset({"/health", "/ready", "/version", "/metrics", "/openapi.json", "/docs"})
QUIET = frozenset(
    {"/health", "/ready", "/metrics", "/page/state.json", "/page/heat.json"}
)  # asked every few seconds: no line of log
_ID = re.compile(rb"[\x21-\x7e]{1,128}")


@dataclass(frozen=True)
class Limits:
    """`max_queue` requests may wait beyond those the engine runs; `deadline` seconds serve one, None any."""

    max_body_bytes: int = 16 * 1024 * 1024
    body_seconds: float = 30.0
    max_queue: int = 256
    deadline: float | None = None
    drain_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "body_seconds", "deadline", "drain_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        if self.max_queue < 0:
            raise ValueError(f"max_queue is {self.max_queue}; it cannot be negative")


class Gate:
    def __init__(
        self,
        app: App,
        *,
        keys: tuple[str, ...],
        limits: Limits,
        metrics: Metrics,
        opened: frozenset[str] = frozenset(),
    ) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._open = OPEN | opened
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, path = time.monotonic(), scope["path"]
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        name = given if _ID.fullmatch(given) else secrets.token_hex(8).encode()
        scope.setdefault("state", {})["request_id"] = name.decode()
        status = 0

        async def answer(event: Event) -> None:
            nonlocal status
            if event["type"] == "http.response.start":
                status = event["status"]
                event["headers"] = [*event.get("headers", ()), (b"x-request-id", name)]
            await send(event)

        try:
            try:
                self._check_key(path, headers)
                body = await self._read(scope, headers, receive)
            except ApiError as error:
                await refuse(error, answer)
                return
            if body is None:
                status = 499
                return
            await self._app(scope, _replay(body, receive), answer)
        finally:
            route = scope.get("route")
            label = route.path if route is not None else "unknown"
            self._metrics.http.labels(label, str(status)).inc()
            if path not in QUIET:
                fields = {"request_id": name.decode(), "method": scope["method"], "path": path}
                seconds = round(time.monotonic() - start, 4)
                log.info("request", extra={**fields, "status": status, "seconds": seconds})

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if not self._keys or path in self._open:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        # Every key is compared, and each in constant time, so that time tells nothing of any
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as: Authorization: Bearer KEY",
                code="invalid_api_key",
            )

    async def _read(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body; None if the client left."""
        if scope["method"] in ("GET", "HEAD"):
            return b""
        most = self._limits.max_body_bytes
        length = headers.get(b"content-length", b"")
        too_large = ApiError(413, f"the body is larger than {most} bytes; send less, or raise --max-body-mib")
        if length.isdigit() and int(length[:20]) > most:
            raise too_large
        _check_type(headers)
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    event = await receive()
                    if event["type"] == "http.disconnect":
                        return None
                    part = event.get("body", b"")
                    size += len(part)
                    if size > most:
                        raise too_large
                    parts.append(part)
                    if not event.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            seconds = self._limits.body_seconds
            raise ApiError(408, f"the body did not arrive within {seconds:g} s; send it faster") from None


def _check_type(headers: dict[bytes, bytes]) -> None:
    """A body says that it is JSON, which no page of another site can have a browser send unasked. Status and
    code are OpenAI's own.
    """
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json" and not kind.endswith(b"+json"):
        told = kind[:80].decode("latin-1") or "of no type"
        raise ApiError(
            400,
            f"the body is said to be {told}; send JSON, as content-type: application/json",
            code="unsupported_content_type",
        )


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Event:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def refuse(error: ApiError, send: Send) -> None:
    body = orjson.dumps(error.body)
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
