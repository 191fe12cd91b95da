"""The gate and the log, by themselves: what needs a clock or a broken client to be seen."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import httpx
import pytest

from shoal.data.text import Tokenizer
from shoal.server.app import Service, create_app
from shoal.server.gate import Gate, Limits
from shoal.server.lifecycle import JsonLines, bind
from shoal.server.metrics import Metrics
from shoal.server.process import EngineProcess, State
from shoal.server.prompts import Prompter


def _build(report: Any) -> Any:
    raise AssertionError("no engine is needed here")


def test_a_body_that_does_not_come_is_408() -> None:
    async def ask() -> list[Any]:
        async def app(scope: Any, receive: Any, send: Any) -> None:
            raise AssertionError("it was let through")

        sent: list[Any] = []

        async def receive() -> Any:
            await asyncio.sleep(60)

        async def send(event: Any) -> None:
            sent.append(event)

        metrics = Metrics(EngineProcess(_build))
        gate = Gate(app, keys=(), limits=Limits(body_seconds=0.05), metrics=metrics)
        scope = {"type": "http", "path": "/v1/completions", "method": "POST"}
        await gate({**scope, "headers": [(b"content-type", b"application/json")]}, receive, send)
        return sent

    start, body = asyncio.run(ask())
    assert start["status"] == 408
    assert "within 0.05 s" in json.loads(body["body"])["error"]["message"]


@pytest.mark.parametrize(
    ("state", "healthy"), [("loading", True), ("ready", True), ("dead", False), ("stopped", False)]
)
def test_an_engine_that_is_not_there_says_when_to_come_again(
    tokenizer: Tokenizer, state: State, healthy: bool
) -> None:
    process = EngineProcess(_build)
    process.state = state
    service = Service(process, Prompter.of(tokenizer, None), "tiny", Metrics(process), Limits(), 0)
    transport = httpx.ASGITransport(create_app(service))

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            health = await client.get("/health")
            return [health, await client.post("/v1/completions", json={"prompt": "x"})]

    health, answer = asyncio.run(ask())
    assert health.status_code == (200 if healthy else 503)
    assert answer.status_code == 503  # whatever its state: it has told nothing of itself yet
    for refused in (answer,) if healthy else (health, answer):
        assert int(refused.headers["retry-after"]) > 0


def test_a_line_of_log_is_json_with_its_fields() -> None:
    record = logging.makeLogRecord({"msg": "request", "levelname": "INFO", "request_id": "a", "status": 200})
    line = json.loads(JsonLines().format(record))
    assert (line["event"], line["level"], line["request_id"], line["status"]) == ("request", "info", "a", 200)


@pytest.mark.parametrize("limits", [{"max_body_bytes": 0}, {"deadline": -1.0}, {"max_queue": -1}])
def test_limits_are_checked(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        Limits(**limits)


def test_a_host_that_is_none_is_said() -> None:
    with pytest.raises(ValueError, match="no address of this machine"):
        bind("no.such.host.invalid", 0)
