"""The laws of replicas: the same beginning goes to the same replica, each answers as one process does, and
one that dies is replaced while the others serve.

Ray is an extra (`pip install 'shoal[ray]'`) and no part of the development environment. Slow: Ray starts some
ten processes, and each replica is a server.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from shoal import LLM, SamplingParams
from tests.tiny_checkpoint import write_checkpoint

ray = pytest.importorskip("ray", reason="needs the extra `ray` (some 320 MB)")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Ray's own
]
ROOT = Path(__file__).parent.parent
PROMPTS = [f"{number} def add(a, b):\n    return a + b\n" * 16 for number in range(32)]
PATIENCE = 600.0  # seconds; a machine may be full of other work


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def url(checkpoint: Path) -> Iterator[str]:
    from deploy.ray_serve import Settings, build

    serve = pytest.importorskip("ray.serve")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "src"), *filter(None, sys.path)])
    environment = {
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        # A replica that is asked for its load must answer in 0.1 s, or another is taken.
        "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "60",
        "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "60",
    }
    ray.init("local", num_cpus=4, include_dashboard=False, runtime_env={"env_vars": environment})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    options = "--cache-gib 0.02 --device cpu"
    given = {"checkpoint": str(checkpoint), "replicas": 2, "max_sequences": 4, "options": options}
    serve.run(build(Settings.model_validate(given)))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def ask(url: str, prompt: str, **more: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 8, "ignore_eos": True, **more}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE)


def wait_until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, f"after {PATIENCE:.0f} s still not: {what}"
        time.sleep(0.2)


def find_servers(checkpoint: Path) -> list[psutil.Process]:
    """The `shoal serve` of each replica."""
    words = ["serve", str(checkpoint)]
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [])[3:5] == words
    ]


def test_a_prefix_stays_with_its_replica_and_answers_are_those_of_one(url: str, checkpoint: Path) -> None:
    """What follows a beginning goes where that went, and finds it cached."""
    homes = [ask(url, text).headers["x-replica"] for text in PROMPTS]
    assert len(set(homes)) == 2  # that 32 prompts go to one of two by chance: 1 in 2 ** 31
    for text, home in zip(PROMPTS[:6], homes, strict=False):
        for tail in ("return", "x = 1"):
            longer = ask(url, text + tail)
            assert longer.status_code == 200 and longer.headers["x-replica"] == home
            assert longer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    wish = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for text, done in zip(PROMPTS[:6], LLM(checkpoint).generate(PROMPTS[:6], wish), strict=True):
        assert ask(url, text).json()["choices"][0]["text"] == done.text


def test_streams_errors_and_what_has_no_prompt_pass_through(url: str) -> None:
    text = PROMPTS[0]
    whole = ask(url, text).json()["choices"][0]["text"]
    body = {"model": "tiny", "prompt": text, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    body["stream"] = True
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]" and len(lines) > 1
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines) == whole
    assert httpx.get(f"{url}/v1/models", timeout=PATIENCE).json()["data"][0]["id"] == "tiny"
    refused = ask(url, text, max_tokens=-1)
    assert refused.status_code == 400 and "max_tokens" in refused.json()["error"]["message"]
    assert httpx.post(f"{url}/v1/completions", content=b"{", timeout=PATIENCE).status_code == 400


@pytest.mark.parametrize("whose", ["the replica", "its server"])
def test_one_that_is_killed_is_replaced_while_the_other_serves(
    url: str, checkpoint: Path, whose: str
) -> None:
    """A replica's end is its server's, and the other way round. Their requests go to the one that is left,
    those of that one stay, and prompts that nobody has read reach the new one."""
    text = {ask(url, prompt).headers["x-replica"]: prompt for prompt in PROMPTS}
    assert len(text) == 2
    before = find_servers(checkpoint)
    assert len(before) == 2
    psutil.Process(before[0].ppid() if whose == "the replica" else before[0].pid).kill()
    wait_until(lambda: before[0] not in find_servers(checkpoint), "the server of a killed replica ends")

    def answered(prompt: str) -> str:
        while (answer := ask(url, prompt)).status_code == 503:  # the router has not heard of it yet
            assert answer.json()["error"]["code"] == "replica_ended" and "retry-after" in answer.headers
        assert answer.status_code == 200
        return answer.headers["x-replica"]

    now = {replica: answered(prompt) for replica, prompt in text.items()}
    (left,) = {replica for replica in text if now[replica] == replica}
    assert set(now.values()) == {left}
    fresh = (f"{whose} {number} " * 40 for number in itertools.count())

    def replaced() -> bool:
        assert answered(text[left]) == left
        return answered(next(fresh)) not in text

    wait_until(replaced, "a new replica answers")
    assert len(find_servers(checkpoint)) == 2


def test_nobody_is_left_behind(url: str, checkpoint: Path) -> None:
    """Last of all: where Ray ends, every server ends."""
    serve = pytest.importorskip("ray.serve")
    serve.shutdown()
    wait_until(lambda: not find_servers(checkpoint), "all servers end")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "checkpoint"),
        ({"checkpoint": "x", "replica": "2"}, "replica"),
        ({"checkpoint": "x", "replicas": "0"}, "replicas"),
        ({"checkpoint": "x", "options": "--port=80"}, "--port"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, str], said: str) -> None:
    from deploy.ray_serve import Settings

    with pytest.raises(ValueError, match=said):
        Settings.model_validate(given)
