"""What goes wrong with clients, engines and machines ends in an error that says so, or in nothing at all."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from shoal.data.text import Tokenizer
from shoal.server.errors import ApiError
from shoal.server.prompts import Prompter
from shoal.server.protocol import Message
from tests.server.conftest import MAIN, PATIENCE, Server, Start

LONG: Any = {"model": "tiny", "prompt": "def", "max_tokens": 2000, "ignore_eos": True}


@pytest.fixture(scope="module")
def frail(launch: Start) -> Server:
    """A server to be broken, in the order of the tests."""
    return launch(
        "--max-sequences", "2", "--max-queue", "1", "--max-body-mib", "2", env={"SHOAL_API_KEY": "secret"}
    )


@pytest.fixture
def key() -> dict[str, str]:
    return {"Authorization": "Bearer secret"}


def idle(server: Server) -> bool:
    return server.metric("num_requests_running") == 0 == server.metric("kv_cache_usage_perc")


def listens(server: Server) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) == 0


def read(stream: httpx.Response) -> Iterator[Any]:
    for line in stream.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_work_and_frees_its_pages(server: Server, stream: bool) -> None:
    server.wait_until(lambda: idle(server))
    ended, generated = server.metric("request_success_total"), server.metric("generation_tokens_total")
    choices = 16
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as client:
        body = json.dumps({**LONG, "stream": stream, "n": choices}).encode()
        head = ["POST /v1/completions HTTP/1.1", "host: x", "content-type: application/json"]
        head += [f"content-length: {len(body)}", "", ""]
        client.sendall("\r\n".join(head).encode() + body)
        server.wait_until(lambda: server.metric("num_requests_running") > 0)
    server.wait_until(lambda: idle(server) and server.metric("request_success_total") == ended + choices)
    assert server.metric("generation_tokens_total") - generated < choices * LONG["max_tokens"]


def test_a_slow_reader_holds_up_nobody_and_loses_nothing(server: Server) -> None:
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}, timeout=PATIENCE
    ) as slow:
        server.wait_until(lambda: server.metric("num_requests_running") == 0)  # all of it waits to be read
        assert server.ask("POST", "/v1/completions", json={**LONG, "max_tokens": 2}).status_code == 200
        chunks = list(read(slow))
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


BAD: list[tuple[str, bytes, str]] = [
    ("malformed", b'{"prompt": "x"', "not JSON"),
    ("nan", b'{"prompt": "x", "temperature": NaN}', "not JSON"),
    ("not utf-8", b'{"prompt": "\xff"}', "not JSON"),
    ("half a pair", b'{"prompt": "\\ud800"}', "not JSON"),
    ("deep", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON"),
    ("a list", b"[1]", "body"),
    ("no prompt", b"{}", "prompt is missing"),
    ("wrong type", b'{"prompt": 5}', "prompt"),
    ("text for a number", b'{"prompt": "x", "max_tokens": "5"}', "max_tokens"),
    ("huge", b'{"prompt": "x", "max_tokens": 1e300}', "max_tokens"),
    ("infinite", b'{"prompt": "x", "temperature": 1e400}', "infinity"),
    ("huge seed", b'{"prompt": "x", "seed": 99999999999999999999999}', "seed"),
    ("hot", b'{"prompt": "x", "temperature": -1}', "greater than or equal to 0"),
    ("misspelt", b'{"prompt": "x", "max_tokns": 5}', "did you mean max_tokens"),
    ("no such id", b'{"prompt": [1, 999999]}', "vocabulary"),
    ("empty", b'{"prompt": []}', "empty"),
    ("bias", b'{"prompt": "x", "logit_bias": {"abc": 1}}', "token ids"),
    ("stops", b'{"prompt": "x", "stop": "' + b"s" * 1_000_000 + b'"}', "1024"),
    ("many stops", b'{"prompt": "x", "stop": [' + b",".join([b'"s"'] * 100_000) + b"]}", "64"),
    ("too long", b'{"prompt": "' + b"word " * 20_000 + b'"}', "context is 2560 tokens"),
    ("regex", b'{"prompt": "x", "structured_outputs": {"regex": "[a"}}', "cannot be compiled"),
    ("two formats", b'{"prompt": "x", "structured_outputs": {"regex": "a", "choice": ["a"]}}', "2 formats"),
]


@pytest.mark.parametrize(("body", "says"), [each[1:] for each in BAD], ids=[each[0] for each in BAD])
def test_what_cannot_be_served_is_refused_in_openais_shape(server: Server, body: bytes, says: str) -> None:
    answer = server.ask("POST", "/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and says in error["message"]
    assert len(error["message"]) < 600


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("text/plain", 400),
        ("application/x-www-form-urlencoded", 400),  # curl's, where none is given
        ("multipart/form-data; boundary=x", 400),
        ("application/json; charset=utf-8", 200),
        ("APPLICATION/JSON", 200),
        ("", 400),
    ],
)
def test_a_body_that_is_not_json_is_refused(server: Server, kind: str, status: int) -> None:
    content = b'{"prompt": "x", "max_tokens": 1}'
    answer = server.ask("POST", "/v1/completions", content=content, headers={"content-type": kind})
    assert answer.status_code == status, answer.text
    if status == 400:
        assert answer.json()["error"]["code"] == "unsupported_content_type"


def test_hostile_schemas_are_refused(server: Server) -> None:
    deep: Any = {"type": "string"}
    for _ in range(300):
        deep = {"type": "object", "properties": {"a": deep}}
    wide = {"enum": ["x" * 1000] * 1000}
    for schema, says in ((deep, "nested deeper than 32"), (wide, "65536")):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        body = {"messages": [{"role": "user", "content": "x"}], "response_format": form}
        answer = server.ask("POST", "/v1/chat/completions", json=body)
        assert answer.status_code == 400 and says in answer.json()["error"]["message"]


def test_keys_and_bodies_are_checked_before_anything_else(frail: Server, key: dict[str, str]) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        answer = frail.ask("GET", "/v1/models", headers=headers)
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert frail.ask("GET", "/v1/models", headers=key).status_code == 200
    assert frail.ask("GET", "/health").status_code == 200
    large = frail.ask("POST", "/v1/completions", headers=key, content=b"x" * (3 << 20))
    assert large.status_code == 413
    named = frail.ask("GET", "/v1/models", headers={**key, "x-request-id": "mine"})
    assert named.headers["x-request-id"] == "mine"


def test_a_full_queue_says_when_to_come_again(frail: Server, key: dict[str, str]) -> None:
    with openai.OpenAI(base_url=f"{frail.url}/v1", api_key="secret", max_retries=0) as client:
        extra: Any = {"extra_body": {"ignore_eos": True}}
        stream = client.completions.create(
            model="tiny", prompt="x", n=3, max_tokens=2000, stream=True, **extra
        )
        with frail.held():
            answer = frail.ask("POST", "/v1/completions", headers=key, json=LONG)
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0
        assert "of at most 3" in answer.json()["error"]["message"]
        stream.close()
    too_many = frail.ask("POST", "/v1/completions", headers=key, json={**LONG, "n": 4})
    assert too_many.status_code == 400
    frail.wait_until(lambda: idle(frail))


def test_an_engine_that_is_killed_fails_its_clients_and_is_started_again(
    frail: Server, key: dict[str, str]
) -> None:
    with httpx.stream(
        "POST", f"{frail.url}/v1/completions", headers=key, json={**LONG, "stream": True}, timeout=PATIENCE
    ) as stream:
        chunks = read(stream)
        next(chunks)
        with frail.held():
            os.kill(frail.engine_pid(), signal.SIGKILL)
            last = list(chunks)[-1]
    assert last["error"]["code"] == "engine_died"
    frail.wait_until(lambda: frail.ask("GET", "/ready").status_code == 200)
    served = frail.ask("POST", "/v1/completions", headers=key, json={**LONG, "max_tokens": 2})
    assert served.status_code == 200
    assert frail.metric("engine_restarts_total") == 1


def test_sigterm_lets_requests_finish_and_exits_0(frail: Server, key: dict[str, str]) -> None:
    body = {**LONG, "stream": True, "max_tokens": 1000}
    with httpx.stream(
        "POST", f"{frail.url}/v1/completions", headers=key, json=body, timeout=PATIENCE
    ) as stream:
        chunks = read(stream)
        next(chunks)
        with frail.held():
            frail.process.send_signal(signal.SIGTERM)
            frail.wait_until(lambda: not listens(frail))
        assert list(chunks)[-1]["choices"][0]["finish_reason"] == "length"
    assert frail.process.wait(PATIENCE) == 0


@pytest.mark.slow  # a server of its own
def test_a_second_sigterm_cuts(launch: Start) -> None:
    server = launch()
    body = {**LONG, "stream": True, "max_tokens": 2500}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=PATIENCE) as stream:
        chunks = read(stream)
        next(chunks)
        with server.held():
            server.process.send_signal(signal.SIGTERM)
            server.wait_until(lambda: any("draining" in line for line in server.lines))
            server.process.send_signal(signal.SIGTERM)
            assert "error" in list(chunks)[-1]
    assert server.process.wait(PATIENCE) == 1


def _fails(checkpoint: Path, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-c", MAIN, "serve", str(checkpoint), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    return run.returncode, run.stderr


def test_a_port_in_use_is_one_line(server: Server, checkpoint: Path) -> None:
    port = server.url.rsplit(":", 1)[1]
    code, said = _fails(checkpoint, "--port", port)
    assert code == 2 and said.count("\n") == 1
    assert f"port {port} on 127.0.0.1 is in use" in said and "--port" in said


def test_a_hostile_template_does_no_harm(tokenizer: Tokenizer) -> None:
    for hostile in (
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for x in range(999999999) %}{{ x }}{% endfor %}",
    ):
        with pytest.raises(ApiError, match="chat template refused") as refusal:
            Prompter.of(tokenizer, hostile).chat([Message(role="user", content="x")])
        assert refusal.value.status == 400


def test_the_dashboard_asks_for_metrics_that_are_there(server: Server) -> None:
    file = Path(__file__).parents[2] / "deploy" / "grafana.json"
    asked = set(re.findall(r"shoal:\w+", file.read_text("utf-8")))
    server.wait_until(lambda: "shoal:expert_tokens" in server.ask("GET", "/metrics").text)
    said = server.ask("GET", "/metrics").text
    given = {name for line in said.splitlines() for name in re.findall(r"^# TYPE (\S+)", line)}
    given |= {f"{name}_bucket" for name in given} | {f"{name}_total" for name in given}
    # This model drafts nothing and offloads nothing; tests/server/test_metrics.py has those.
    assert {
        name for name in asked - given if "spec_decode" not in name and "expert_cache" not in name
    } == set()
