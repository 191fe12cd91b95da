"""The application: OpenAI's endpoints over an engine process.

Each endpoint reads a request (protocol.py), makes a job of it (jobs.py), and writes what comes out
(writing.py, responses.py), whole or as server-sent events. The laws: what a client gets is an answer or one
error in OpenAI's shape, never a stack trace; and a client that leaves, at whatever moment, ends its work.
"""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Protocol, TypeVar

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from shoal.server import replies
from shoal.server.answers import Job, Piece, Tally, serve
from shoal.server.errors import ApiError, invalid
from shoal.server.gate import Gate, Limits
from shoal.server.jobs import chat_job, completion_job, encode_prompts
from shoal.server.metrics import Metrics
from shoal.server.process import EngineProcess
from shoal.server.prompts import Prompter
from shoal.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponsesRequest,
    TokenizeRequest,
)
from shoal.server.responses import ResponseWriter, to_chat
from shoal.server.worker import EngineInfo
from shoal.server.writing import ChatWriter, Chunk, CompletionWriter

T = TypeVar("T")
VERSION = metadata.version("shoal")
DONE = b"data: [DONE]\n\n"


@dataclass
class Service:
    """What the endpoints share."""

    process: EngineProcess
    prompter: Prompter
    model: str
    metrics: Metrics
    limits: Limits
    created: int
    draining: bool = False

    @property
    def info(self) -> EngineInfo:
        info = self.process.info
        if info is None or self.process.state != "ready":
            state = self.process.state
            raise ApiError(
                503, f"the engine is {state}; ask again soon", code="engine_unavailable", retry_after=5
            )
        return info

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model:
            raise ApiError(
                404,
                f"there is no model {name[:200]!r} here, only {self.model!r}",
                code="model_not_found",
                param="model",
            )

    def admit(self, job: Job) -> None:
        if self.draining:
            raise ApiError(503, "the server is shutting down; ask another", code="draining", retry_after=5)
        room, wanted, live = (
            self.info.max_sequences + self.limits.max_queue,
            len(job.parts),
            self.process.num_live,
        )
        if wanted > room:
            raise invalid(f"the request has {wanted} choices; at most {room} fit here, send fewer", "n")
        if live + wanted > room:
            self.metrics.rejections.labels("queue_full").inc()
            raise ApiError(
                429,
                f"{live} requests are being served or wait, of at most {room}; ask again later",
                code="queue_full",
                retry_after=1,
            )

    def serve(self, job: Job, tally: Tally) -> AsyncGenerator[list[Piece], None]:
        return serve(job, self.process, self.prompter.tokenizer, self.metrics, tally)


class Writer(Protocol):
    def chunks(self, piece: Piece) -> list[Chunk]: ...
    def take(self, piece: Piece) -> object: ...
    def whole(self, tally: Tally) -> dict[str, Any]: ...


async def collect(service: Service, job: Job, writer: Writer) -> dict[str, Any]:
    """The whole answer."""
    service.admit(job)
    tally = Tally()
    async with asyncio.timeout(service.limits.deadline), aclosing(service.serve(job, tally)) as batches:
        async for pieces in batches:
            for piece in pieces:
                writer.take(piece)
    return writer.whole(tally)


class _Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


class _StrictRequest(Request):
    """Reads JSON as the standard has it: no NaN, no broken UTF-8, no nesting that overflows a stack."""

    async def json(self) -> Any:
        return orjson.loads(await self.body())


class _StrictRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return strictly


class EventStream(Response):
    """Chunks as server-sent events. A client that leaves ends them; one that reads slowly is waited for."""

    def __init__(self, chunks: AsyncGenerator[bytes, None], first: bytes, deadline: float | None) -> None:
        self.status_code, self.background = 200, None
        self._chunks, self._first, self._deadline = chunks, first, deadline
        self.init_headers({"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await _until_gone(receive, self._pump(send))

    async def _pump(self, send: Send) -> None:
        async def write(data: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            async with asyncio.timeout(self._deadline), aclosing(self._chunks):
                await write(self._first)
                async for chunk in self._chunks:
                    await write(chunk)
        except ApiError as error:
            await write(_event(error.body))
        except TimeoutError:
            await write(_event(_too_long(self._deadline).body))
        await write(b"", more=False)


def create_app(service: Service, keys: tuple[str, ...] = (), opened: frozenset[str] = frozenset()) -> FastAPI:
    """`opened` are paths, beside its own, that need no key."""
    app = FastAPI(title="Shoal", version=VERSION, docs_url=None, redoc_url=None)
    app.router.route_class = _StrictRoute
    app.add_middleware(Gate, keys=keys, limits=service.limits, metrics=service.metrics, opened=opened)  # type: ignore[arg-type]
    _add_errors(app)
    _add_answers(app, service)
    _add_state(app, service)
    return app


def _documented(model: type) -> dict[int | str, dict[str, Any]]:
    error = {"model": replies.ErrorBody}
    event = {"type": "object", "properties": {"data": {"type": "string"}, "event": {"type": "string"}}}
    stream = {"text/event-stream": {"schema": event}}
    return {200: {"model": model, "content": stream}, "4XX": error, "5XX": error}


def _add_answers(app: FastAPI, service: Service) -> None:
    tokenizer = service.prompter.tokenizer

    async def answer(
        request: Request, job: Job, writer: Writer, chunks: AsyncGenerator[bytes, None] | None
    ) -> Response:
        deadline = service.limits.deadline
        service.admit(job)
        try:
            if chunks is None:
                whole = await _until_gone(request.receive, collect(service, job, writer))
                return _gone() if whole is None else _Json(whole)
            async with asyncio.timeout(deadline):
                first = await _until_gone(request.receive, anext(chunks))
        except TimeoutError:
            raise _too_long(deadline) from None
        return _gone() if first is None else EventStream(chunks, first, deadline)

    async def events(
        job: Job, writer: ChatWriter | CompletionWriter, usage: bool
    ) -> AsyncGenerator[bytes, None]:
        tally = Tally()
        async with aclosing(service.serve(job, tally)) as batches:
            async for pieces in batches:
                if written := b"".join(_event(chunk) for piece in pieces for chunk in writer.chunks(piece)):
                    yield written
        yield (_event(writer.last(tally)) if usage else b"") + DONE

    @app.post("/v1/chat/completions", responses=_documented(replies.ChatCompletion))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        job = chat_job(body, service.prompter, service.info)
        writer = ChatWriter(body, job.parts[0][0], service.model, VERSION, tokenizer)
        usage = body.stream_options is not None and body.stream_options.include_usage
        return await answer(request, job, writer, events(job, writer, usage) if body.stream else None)

    @app.post("/v1/completions", responses=_documented(replies.TextCompletion))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        job = completion_job(body, service.prompter, service.info)
        prompts = encode_prompts(body, service.prompter)
        writer = CompletionWriter(body, prompts, service.model, VERSION, tokenizer)
        usage = body.stream_options is not None and body.stream_options.include_usage
        return await answer(request, job, writer, events(job, writer, usage) if body.stream else None)

    @app.post("/v1/responses", responses=_documented(replies.ResponseObject))
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        service.check_model(body.model)
        job = chat_job(to_chat(body), service.prompter, service.info)
        writer = ResponseWriter(body, service.model)

        async def named() -> AsyncGenerator[bytes, None]:
            tally, begun = Tally(), False
            async with aclosing(service.serve(job, tally)) as batches:
                async for pieces in batches:
                    chunks = [] if begun else writer.begin()
                    begun = True
                    chunks += [chunk for piece in pieces for chunk in writer.chunks(piece)]
                    if chunks:
                        yield b"".join(_named_event(chunk) for chunk in chunks)
            yield b"".join(_named_event(chunk) for chunk in writer.end(tally))

        return await answer(request, job, writer, named() if body.stream else None)

    @app.post("/tokenize", responses=_documented(replies.Tokens))
    async def tokenize(body: TokenizeRequest) -> Response:
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("give a prompt or messages, one of them", "prompt")
        if body.prompt is not None:
            ids = service.prompter.text(body.prompt, framed=body.add_special_tokens)
        else:
            ids = service.prompter.chat(
                body.messages or [],
                body.tools or [],
                body.chat_template_kwargs,
                add_generation_prompt=body.add_generation_prompt,
            ).ids
        strings = [tokenizer.decode([token]) for token in ids] if body.return_token_strs else None
        most = service.info.max_len
        return _Json({"count": len(ids), "max_model_len": most, "tokens": ids, "token_strs": strings})

    @app.post("/detokenize", responses=_documented(replies.Text))
    async def detokenize(body: DetokenizeRequest) -> Response:
        service.check_model(body.model)
        return _Json({"prompt": tokenizer.decode(body.tokens)})


def _add_state(app: FastAPI, service: Service) -> None:
    error = {"model": replies.ErrorBody}

    @app.get("/v1/models", responses={200: {"model": replies.ModelList}, "4XX": error, "5XX": error})
    async def models() -> Response:
        return _Json({"object": "list", "data": [_card(service)]})

    @app.get(
        "/v1/models/{name:path}", responses={200: {"model": replies.ModelCard}, "4XX": error, "5XX": error}
    )
    async def model(name: str) -> Response:
        service.check_model(name)
        return _Json(_card(service))

    @app.get("/health", responses={503: error})
    async def health() -> Response:
        """200 while the engine loads or serves, 503 while it is dead."""
        state = service.process.state
        if state in ("dead", "stopped"):
            raise ApiError(503, f"the engine is {state}", code="engine_unavailable", retry_after=5)
        return _Json({"status": state})

    @app.get("/ready", responses={503: error})
    async def ready() -> Response:
        """200 once the engine has warmed up, and until the server drains."""
        if service.draining or service.process.state != "ready":
            state = "draining" if service.draining else service.process.state
            raise ApiError(503, f"the server is {state}", code="not_ready", retry_after=5)
        return _Json({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(), media_type="text/plain; version=0.0.4")

    @app.get("/version")
    async def version() -> Response:
        return _Json({"version": VERSION})


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def known(request: Request, error: ApiError) -> Response:
        return _Json(error.body, error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def misread(request: Request, error: RequestValidationError) -> Response:
        return await known(request, explain(error.errors()))

    @app.exception_handler(Exception)
    async def ours(request: Request, error: Exception) -> Response:  # and starlette raises it, for the log
        return await known(request, ApiError(500, "the server made a mistake; its log says which"))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        answer = await known(request, ApiError(error.status_code, str(error.detail)))
        for name, value in (error.headers or {}).items():
            answer.headers[name] = value
        return answer


_NO_FIELDS = frozenset({"body", "str", "int", "constrained-str", "constrained-int"})  # in pydantic's places


def explain(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Of what pydantic found wrong, the first, in one line."""
    # Of a field that may be of several types each has its say; the one whose type it was knows better
    first = next((each for each in errors if not each["type"].endswith("_type")), errors[0])
    place = [str(step) for step in first["loc"] if step not in _NO_FIELDS and "[" not in str(step)]
    name = ".".join(place) or "body"
    value = repr(first.get("input"))
    value = value if len(value) <= 80 else value[:77] + "..."
    if first["type"] == "json_invalid":
        return invalid(f"the body is not JSON at byte {place[-1] if place else 0}: {first['ctx']['error']}")
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place[-1], ChatRequest.model_fields | CompletionRequest.model_fields)
        hint = f"did you mean {near[0]}?" if near else "leave it out"
        return invalid(f"{name} is not a field that this endpoint knows; {hint}", name)
    if first["type"] == "missing":
        return invalid(f"{name} is missing; give it", name)
    return invalid(f"{name} is {value}; {first['msg'][:1].lower()}{first['msg'][1:]}", name)


def _card(service: Service) -> dict[str, Any]:
    return {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "shoal",
        "max_model_len": service.info.max_len,
    }


def _event(chunk: Chunk) -> bytes:
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def _named_event(chunk: Chunk) -> bytes:
    return b"event: " + chunk["type"].encode() + b"\n" + _event(chunk)


def _too_long(deadline: float | None) -> ApiError:
    return ApiError(
        504, f"the answer took longer than {deadline} s; ask for fewer tokens, or raise --deadline"
    )


def _gone() -> Response:
    return Response(status_code=499)  # nobody reads it


async def _until_gone(receive: Receive, work: Awaitable[T]) -> T | None:
    """The result of the work; None if the client left first, and the work was ended."""

    async def wait() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing, gone = asyncio.ensure_future(work), asyncio.ensure_future(wait())
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        return doing.result() if doing.done() else None
    finally:
        for task in (doing, gone):
            task.cancel()
        await asyncio.gather(doing, gone, return_exceptions=True)
