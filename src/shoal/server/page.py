"""Page: the chat page, its files and what it asks for beside OpenAI's endpoints.

The page is static files of this package (web/), without a build step and without anything from elsewhere
(decision 0008). What it shows of a model it is told here: how the model routes, how busy the server is, and
the plan, which is handed in as a function because the planner is an instrument, and the server knows none.

The laws: a browser runs nothing but these files, and reaches nothing but this server; the policy that goes
with the page has it so, and forbids HTML made from text. The files need no key; all they ask for does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib import resources
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response

from shoal.config.hardware import GPUS
from shoal.config.model import ModelConfig
from shoal.server.errors import ApiError, invalid
from shoal.server.history import COLUMNS, History
from shoal.server.process import EngineProcess
from shoal.server.prompts import Prompter

KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
FILES = (
    *("page.html", "page.css", "icon.svg"),
    *("main.js", "api.js", "thread.js", "prose.js", "experts.js", "load.js", "plan.js", "draw.js"),
)
PATHS = frozenset({"/", *(f"/page/{name}" for name in FILES)})  # open to whoever has no key
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}

Plan = Callable[[Mapping[str, str]], dict[str, Any]]


@dataclass(frozen=True)
class Page:
    config: ModelConfig
    plan: Plan  # of the fields gpu, count, weights, batch, prompt, output; ValueError for what cannot be


def add_page(app: FastAPI, page: Page, process: EngineProcess, prompter: Prompter, model: str) -> History:
    """The page's routes. The history that they show is the caller's to run."""
    history = History(process)
    folder = resources.files("shoal.server") / "web"
    files = {name: (folder / name).read_bytes() for name in FILES}
    tags = {name: f'"{sha256(body).hexdigest()[:16]}"' for name, body in files.items()}

    def file(name: str, request: Request) -> Response:
        if name not in files:
            raise ApiError(404, f"the page has no file {name[:100]!r}")
        headers = {**HEADERS, "etag": tags[name]}
        if request.headers.get("if-none-match") == tags[name]:
            return Response(status_code=304, headers=headers)
        kind = KINDS[name.rpartition(".")[2]]
        return Response(files[name], media_type=f"{kind}; charset=utf-8", headers=headers)

    @app.get("/", include_in_schema=False)
    async def root(request: Request) -> Response:
        return file("page.html", request)

    @app.get("/page/model.json", include_in_schema=False)
    async def told() -> Response:
        return _json({"name": model, "gpus": list(GPUS), **_shape(page.config), **_speech(prompter)})

    @app.get("/page/state.json", include_in_schema=False)
    async def state(since: float = 0.0) -> Response:
        info = process.info
        what, done, total = process.progress
        return _json(
            {
                "state": process.state,
                "progress": {"what": what, "done": done, "total": total},
                "max_len": None if info is None else info.max_len,
                "max_sequences": None if info is None else info.max_sequences,
                "page_size": None if info is None else info.page_size,
                "ledger": None if info is None else info.ledger,
                "columns": ("time", *COLUMNS),
                "rows": history.since(since),
            }
        )

    @app.get("/page/heat.json", include_in_schema=False)
    async def heat(layer: int = 0) -> Response:
        layers = len(_shape(page.config)["layers"])
        if not 0 <= layer < layers:
            raise invalid(f"layer is {layer}; {layers} layers route, counted from 0", "layer")
        return _json(history.heat(layer))

    @app.get("/page/plan.json", include_in_schema=False)
    async def plan(request: Request) -> Response:
        try:
            return _json(await asyncio.to_thread(page.plan, dict(request.query_params)))
        except ValueError as error:
            raise invalid(str(error)) from error

    @app.get("/page/{name}", include_in_schema=False)
    async def asset(name: str, request: Request) -> Response:
        return file(name, request)

    return history


def _json(content: Any) -> Response:
    headers = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
    return Response(orjson.dumps(content), media_type="application/json", headers=headers)


def _shape(config: ModelConfig) -> dict[str, Any]:
    """What routes: the layers by their number in the model, and how many experts each has."""
    moe = config.moe
    if moe is None:
        return {"layers": [], "experts": 0, "top_k": 0, "shared": 0}
    layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
    return {
        "layers": layers,
        "experts": moe.n_routed_experts,
        "top_k": moe.num_experts_per_tok,
        "shared": moe.n_shared_experts,
    }


def _speech(prompter: Prompter) -> dict[str, bool]:
    """What the model's chat template can do."""
    turns = prompter.tokenizer.chat_template is not None
    return {
        "turns": turns,
        "thinks": turns and prompter.switches_thinking,
        "calls": turns and prompter.call_syntax is not None,
    }
