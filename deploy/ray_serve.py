"""Replicas of `shoal serve` over Ray Serve: a request goes where the beginning of its prompt is cached.

    serve run deploy.ray_serve:build checkpoint=/models/v2-lite replicas=2 gpus=1 options="--dtype bfloat16"

Ray places replicas on the nodes of its cluster, makes another for one that dies, holds the queue and probes
the load. A replica is `shoal serve` as it is, a process of its own on a free port of its node. What is here
passes requests on, and tells Ray's router what a prompt begins with. The law: an answer is what its server
said, byte for byte, and not much later; `x-replica` says whose it was.
"""

# No `from __future__ import annotations`: Ray reads what `build` takes from its signature.

import asyncio
import json
import os
import random
import re
import shlex
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from shoal.server.errors import ApiError

# `shoal serve`, for as long as there is somebody who holds the other end of its standard input: a replica
# that is killed takes its server with it.
SERVER = """
import os, signal, sys, threading

def follow():
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=follow, daemon=True).start()
from shoal.cli import main
main()
"""
BEGINNING = ("tools", "instructions", "messages", "prompt", "input")  # of a request, in a template's order
PASSED = ("authorization", "content-type", "accept", "x-request-id")  # of a request's headers
KEPT = ("content-type", "retry-after", "www-authenticate")  # of an answer's; x-request-id is Ray's to give
BLOCK = 64  # characters
PAUSE = 0.05  # seconds between two pieces of a stream: what Ray asks for is by the piece


class Settings(BaseModel):
    """What `serve run` is given as `name=value`. `gpus` and `cpus` are each replica's."""

    model_config = ConfigDict(extra="forbid")
    checkpoint: str
    replicas: int = Field(1, ge=1)
    gpus: float = Field(0, ge=0)
    cpus: float = Field(1, ge=0)
    max_sequences: int = Field(64, ge=1)
    options: str = ""

    @field_validator("options")
    @classmethod
    def _are_the_servers(cls, options: str) -> str:
        for own in ("--host", "--port", "--max-sequences"):
            if any(word.split("=")[0] == own for word in shlex.split(options)):
                raise ValueError(f"options has {own}, which is set here; leave it out (max_sequences=N is)")
        return options


@dataclass(frozen=True)
class Call:
    """A request on its way to a replica. `beginnings` are `find_beginnings`' of its prompt."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    beginnings: tuple[int, ...]


@dataclass(frozen=True)
class Head:
    """How an answer begins; its body follows."""

    status: int
    headers: dict[str, str]


def find_beginnings(body: bytes) -> tuple[int, ...]:
    """A number for each beginning of a request's prompt that is some whole blocks long, the shortest first.

    Prompts that begin alike have numbers that begin alike. None for what has no prompt, or cannot be read.
    """
    try:
        fields = json.loads(body)
    except ValueError:
        return ()
    if not isinstance(fields, dict):
        return ()
    text = json.dumps([fields[name] for name in BEGINNING if name in fields], ensure_ascii=False)
    numbers, last = [], 0
    for end in range(BLOCK, len(text) + 1, BLOCK):
        last = hash((last, text[end - BLOCK : end]))
        numbers.append(last)
    return tuple(numbers)


class PrefixRouter(RequestRouter):
    """First the replicas that have read the longest beginning of the prompt, where that is at least `share`
    of it and they do not lead the idlest by more than `lead` requests; then the others. Of each Ray takes
    the least loaded that is not full.

    Its memory is of what it has sent: the last `capacity` beginnings.
    """

    def initialize_state(self, share: float = 0.1, lead: int = 16, capacity: int = 1 << 17) -> None:
        self._share, self._lead, self._capacity = share, lead, capacity
        self._readers: OrderedDict[int, set[ReplicaID]] = OrderedDict()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Must not raise: Ray would leave the request without an answer."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # before it is asked again where all are full
        loads = {
            replica.replica_id: self.replica_queue_len_cache.get(replica.replica_id) or 0
            for replica in candidate_replicas
        }
        able = {name for name, load in loads.items() if load <= min(loads.values()) + self._lead}
        readers = self._find_readers(_beginnings(pending_request), able)
        mixed = random.sample(candidate_replicas, len(candidate_replicas))  # of equals Ray takes the first
        return [
            [replica for replica in mixed if replica.replica_id in readers],
            [replica for replica in mixed if replica.replica_id not in readers],
        ]

    def _find_readers(self, beginnings: tuple[int, ...], able: set[ReplicaID]) -> set[ReplicaID]:
        readers, read = set[ReplicaID](), 0
        for beginning in beginnings:
            if not (here := self._readers.get(beginning, set()) & able):
                break
            readers, read = here, read + 1
        return readers if read >= self._share * len(beginnings) else set()

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        for beginning in reversed(_beginnings(pending_request)):  # so that a longer one is forgotten first
            self._readers.setdefault(beginning, set()).add(replica_id)
            self._readers.move_to_end(beginning)
        while len(self._readers) > self._capacity:
            self._readers.popitem(last=False)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        here = {replica.replica_id for replica in replicas}
        for readers in self._readers.values():
            readers &= here


def _beginnings(request: PendingRequest) -> tuple[int, ...]:
    return request.args[0].beginnings


@serve.deployment
class Replica:
    """One `shoal serve`. Made once that is ready; RuntimeError with its last words where it ends instead.

    It ends with its server, so Ray makes another.
    """

    def __init__(self, checkpoint: str, options: list[str]) -> None:
        self.name = serve.get_replica_context().replica_id.unique_id
        self._leaving = False
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER, "serve", checkpoint, "--port", "0", *options],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        said: list[str] = []
        url = None
        assert self._server.stderr is not None
        while url is None and (line := self._server.stderr.readline()):
            sys.stderr.write(line)
            said = [*said[-9:], line.strip()]
            url = re.search(r"ready on (http://\S+)", line)
        if url is None:
            raise RuntimeError(f"shoal serve ended: {' '.join(said)}")
        self._client = httpx.AsyncClient(
            base_url=url[1], timeout=None, limits=httpx.Limits(max_connections=None)
        )
        for watch in (self._copy_log, self._end_with_it):
            threading.Thread(target=watch, daemon=True).start()

    async def answer(self, call: Call) -> AsyncIterator[Head | bytes]:
        request = self._client.stream(call.method, call.path, headers=call.headers, content=call.body)
        async with request as answer:
            kept = {name: answer.headers[name] for name in KEPT if name in answer.headers}
            yield Head(answer.status_code, {**kept, "x-replica": self.name})
            async for piece in _gather(answer.aiter_raw()):
                yield piece

    def __del__(self) -> None:
        self._leaving = True
        self._server.terminate()
        self._server.wait()

    def _copy_log(self) -> None:
        assert self._server.stderr is not None
        for line in self._server.stderr:
            sys.stderr.write(line)

    def _end_with_it(self) -> None:
        code = self._server.wait()
        if not self._leaving:
            sys.stderr.write(f"shoal serve ended with exit code {code}, and so does its replica\n")
            sys.stderr.flush()
            os._exit(1)


async def _gather(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The first at once; then, each PAUSE, what has come since."""
    come: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def read() -> None:
        try:
            async for part in parts:
                come.put_nowait(part)
        finally:
            come.put_nowait(None)

    reading = asyncio.create_task(read())
    try:
        ended = False
        while not ended:
            pieces = [await come.get()]
            while not come.empty():
                pieces.append(come.get_nowait())
            ended = pieces[-1] is None
            if piece := b"".join(part for part in pieces if part is not None):
                yield piece
            if not ended:
                await asyncio.sleep(PAUSE)
        await reading  # raises what ended it
    finally:
        reading.cancel()


app = FastAPI(openapi_url=None)


@serve.deployment
@serve.ingress(app)
class Front:
    """Behind Ray's proxy: reads a request so far that it can be routed."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._answer = replicas.answer.options(stream=True)

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def pass_on(self, request: Request) -> Response:
        body = await request.body()
        headers = {name: request.headers[name] for name in PASSED if name in request.headers}
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        answer = self._answer.remote(Call(request.method, path, headers, body, find_beginnings(body)))
        try:
            head = await anext(answer)
        except (RayError, httpx.TransportError) as error:
            ended = ApiError(
                503,
                f"the replica ended before it answered ({type(error).__name__}); ask again",
                code="replica_ended",
                retry_after=1,
            )
            return JSONResponse(ended.body, ended.status, ended.headers)
        return StreamingResponse(answer, head.status, head.headers)


def build(settings: Settings) -> serve.Application:
    """The application. Its parts have their prefix memory in one place: one Front."""
    replicas = Replica.options(
        num_replicas=settings.replicas,
        max_ongoing_requests=settings.max_sequences,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        request_router_config=RequestRouterConfig(request_router_class=PrefixRouter),
    ).bind(
        settings.checkpoint, ["--max-sequences", str(settings.max_sequences), *shlex.split(settings.options)]
    )
    return Front.options(max_ongoing_requests=4096, ray_actor_options={"num_cpus": 0}).bind(replicas)
