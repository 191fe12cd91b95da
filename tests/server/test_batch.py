"""Laws of the batch: each request has one answer, the server's own; an interrupted run goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal.server.batch import find_done, read_lines
from tests.server.conftest import MAIN, Server

CHAT = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 6}
TEXT = {"prompt": "def add", "temperature": 0, "max_tokens": 6}
REQUESTS: list[Any] = [
    {"custom_id": "chat", "method": "POST", "url": "/v1/chat/completions", "body": CHAT},
    {"custom_id": "text", "method": "POST", "url": "/v1/completions", "body": TEXT},
    {"custom_id": "wrong", "method": "POST", "url": "/v1/completions", "body": {"prompts": "x"}},
    {
        "custom_id": "new",
        "method": "POST",
        "url": "/v1/responses",
        "body": {"input": "hi", "max_output_tokens": 3},
    },
]


def write(file: Path, entries: list[Any]) -> Path:
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), "utf-8")
    return file


def test_a_run_that_was_cut_goes_on_and_says_what_the_server_says(
    server: Server, checkpoint: Path, tmp_path: Path
) -> None:
    requests, out = write(tmp_path / "in.jsonl", REQUESTS), tmp_path / "out.jsonl"
    kept = {"id": "x", "custom_id": "new", "response": {"status_code": 200, "body": {}}, "error": None}
    out.write_text(json.dumps(kept) + '\n{"id": "cut sho', "utf-8")
    command = [sys.executable, "-c", MAIN, "batch", str(checkpoint), str(requests), str(out)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stderr
    answers = {entry["custom_id"]: entry for entry in map(json.loads, out.read_text("utf-8").splitlines())}
    assert answers.keys() == {"chat", "text", "wrong", "new"} and answers["new"] == kept
    for name, path, body in (("chat", "chat/completions", CHAT), ("text", "completions", TEXT)):
        theirs = server.ask("POST", f"/v1/{path}", json=body).json()
        ours = answers[name]["response"]
        assert ours["status_code"] == 200 and ours["body"]["choices"] == theirs["choices"]
    assert answers["wrong"]["response"]["status_code"] == 400
    assert "prompt" in answers["wrong"]["response"]["body"]["error"]["message"]


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "line 1"), ('{"url": "x", "body": {}}', "custom_id"), ("[1]", "line 1")],
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "in.jsonl").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=says):
        read_lines(tmp_path / "in.jsonl")


def test_ids_are_not_used_twice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 2: custom_id 'text'"):
        read_lines(write(tmp_path / "in.jsonl", [REQUESTS[1], REQUESTS[1]]))
    assert find_done(tmp_path / "none.jsonl") == set()
