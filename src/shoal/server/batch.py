"""A file of requests, answered without HTTP: OpenAI's batch format, a line in, a line out.

It goes the way of the server's endpoints, over the same engine process, so a line's answer is what the server
would have sent. The law: a run that was interrupted goes on where it stopped. Each answer is one whole line,
written when it is there; a line cut short by a kill is taken away, and what has an answer is not asked again.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson
from pydantic import ValidationError

from shoal.server.app import VERSION, Service, collect, explain
from shoal.server.errors import ApiError, invalid
from shoal.server.jobs import chat_job, completion_job, encode_prompts
from shoal.server.protocol import ChatRequest, CompletionRequest, ResponsesRequest
from shoal.server.responses import ResponseWriter, to_chat
from shoal.server.writing import ChatWriter, CompletionWriter, new_id


@dataclass(frozen=True)
class Line:
    custom_id: str
    url: str
    body: dict[str, Any]


def read_lines(file: Path) -> list[Line]:
    """The requests of a file. ValueError names the line that is none."""
    lines: list[Line] = []
    seen: set[str] = set()
    for number, text in enumerate(file.read_bytes().splitlines(), start=1):
        if not text.strip():
            continue
        try:
            entry = orjson.loads(text)
            line = Line(entry["custom_id"], entry["url"], entry["body"])
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} line {number} is no request ({error!r}); it needs custom_id, url and body"
            ) from None
        if not isinstance(line.custom_id, str) or line.custom_id in seen:
            raise ValueError(f"{file} line {number}: custom_id {line.custom_id!r} must be a text of its own")
        seen.add(line.custom_id)
        lines.append(line)
    return lines


def find_done(out: Path) -> set[str]:
    """The ids that a file of answers has; what was cut short at its end is taken away."""
    if not out.exists():
        return set()
    data = out.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(out, whole)
    return {orjson.loads(line)["custom_id"] for line in data[:whole].splitlines() if line.strip()}


async def run_batch(
    service: Service, lines: list[Line], out: BinaryIO, *, at_once: int, on_done: Callable[[], None]
) -> int:
    """Answer every line; how many were refused. ApiError 503 if the engine is lost for good."""
    room, refused = asyncio.Semaphore(at_once), 0
    failed = service.process.failed
    assert failed is not None

    async def one(line: Line) -> None:
        nonlocal refused
        async with room:
            while True:
                try:
                    status, body = 200, await answer(service, line)
                except ApiError as error:
                    if error.status == 503 and not failed.done():  # the engine is being started again
                        await service.process.usable.wait()
                        await asyncio.sleep(0.1)
                        continue
                    status, body = error.status, error.body
                break
        if status == 503:
            raise ApiError(503, failed.result())
        refused += status != 200
        response = {"status_code": status, "request_id": new_id("req"), "body": body}
        entry = {"id": new_id("batch_req"), "custom_id": line.custom_id, "response": response, "error": None}
        out.write(orjson.dumps(entry) + b"\n")
        out.flush()
        on_done()

    async with asyncio.TaskGroup() as group:
        for line in lines:
            group.create_task(one(line))
    return refused


async def answer(service: Service, line: Line) -> dict[str, Any]:
    """What the endpoint `line.url` sends for its body."""
    tokenizer, info = service.prompter.tokenizer, service.info
    try:
        match line.url:
            case "/v1/chat/completions":
                chat = ChatRequest.model_validate({**line.body, "stream": False})
                job = chat_job(chat, service.prompter, info)
                writer: Any = ChatWriter(chat, job.parts[0][0], service.model, VERSION, tokenizer)
            case "/v1/completions":
                text = CompletionRequest.model_validate({**line.body, "stream": False})
                job = completion_job(text, service.prompter, info)
                prompts = encode_prompts(text, service.prompter)
                writer = CompletionWriter(text, prompts, service.model, VERSION, tokenizer)
            case "/v1/responses":
                newer = ResponsesRequest.model_validate({**line.body, "stream": False})
                job = chat_job(to_chat(newer), service.prompter, info)
                writer = ResponseWriter(newer, service.model)
            case other:
                raise invalid(
                    f"url is {other!r}; it must be that of chat completions, completions or responses"
                )
    except ValidationError as error:
        raise explain(error.errors()) from None
    return await collect(service, job, writer)
