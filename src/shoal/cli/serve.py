"""`shoal serve`: a checkpoint behind OpenAI's API.

The server is not handed an engine but how to build one (`Opening`): that is done, and done again after a
crash, in a process of its own. What a person sees while it loads is here; logs, as lines of JSON, are the
server's, and go to standard error like everything else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.device import Checkpoint, Device, Download, Dtype, KvCacheDtype, Offload, Quant

if TYPE_CHECKING:
    from shoal.engine import Engine, EngineSettings
    from shoal.engine.lockstep import Lockstep
    from shoal.server.page import Page
    from shoal.stages.spread import Degrees

KEY_VARIABLE = "SHOAL_API_KEY"

# What `batch` is asked as well.
ChatTemplate = Annotated[
    str | None, typer.Option(help="A Jinja file, or v2, v2.5, v3, r1, v3.1. Default: the checkpoint's.")
]
MaxSequences = Annotated[int, typer.Option(help="Requests that run at once.")]
CacheGib = Annotated[
    float | None, typer.Option(help="Memory for the cache, in GiB. Default: what the device leaves.")
]
AffinityLimit = Annotated[
    int, typer.Option(help="Requests that may pass one that waits, to run with others of its experts.")
]


@dataclass(frozen=True)
class Opening:
    """How the engine's process makes its engine. It is pickled on its way there."""

    folder: Path
    settings: EngineSettings
    device: str = "auto"
    dtype: str | None = None
    quant: str | None = None
    degrees: Degrees | None = None
    offload: float | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"--dtype is {self.dtype!r}; it must be float32 or bfloat16")

    def __call__(self, report: Callable[[str, int, int], None]) -> Engine | Lockstep:
        import torch

        from shoal.stages.llm import open_engines
        from shoal.stages.spread import Degrees

        told = 0
        report("opening", 0, 1)

        def progress(done: int, total: int, num_bytes: int) -> None:
            nonlocal told
            if done == total or done * 4 // total > told:
                told = done * 4 // total
                report("loading", done, total)

        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        return open_engines(
            self.folder,
            self.settings,
            self.degrees or Degrees(),
            device=self.device,
            dtype=dtype,
            quant=self.quant,
            offload=self.offload,
            progress=progress,
        )


def serve(
    path: Checkpoint,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The model's name. Default: its folder's, or its id.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"Keys, one a line. Or set {KEY_VARIABLE}. Without: no key is needed.")
    ] = None,
    chat_template: ChatTemplate = None,
    max_sequences: MaxSequences = 64,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; beyond that, 429.")] = 256,
    max_batch_tokens: Annotated[int, typer.Option(help="Tokens in one step.")] = 2048,
    cache_gib: CacheGib = None,
    memory: Annotated[float, typer.Option(help="Share of the GPU that may be used.")] = 0.9,
    speculate: Annotated[int, typer.Option(help="Tokens guessed ahead with the model's MTP module.")] = 0,
    affinity: AffinityLimit = 0,
    index_keys: Annotated[
        str, typer.Option(help="Of sparse attention (V3.2), in the cache: wide, or fp8 as V3.2 serves.")
    ] = "wide",
    prefix_cache: Annotated[bool, typer.Option(help="Remember the beginnings of prompts.")] = True,
    deadline: Annotated[float | None, typer.Option(help="Seconds until an answer is given up.")] = None,
    drain: Annotated[float, typer.Option(help="Seconds that SIGTERM leaves to those being served.")] = 60.0,
    max_body_mib: Annotated[float, typer.Option(help="The largest request, in MiB.")] = 16.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    device: Device = "auto",
    dtype: Dtype = None,
    quant: Quant = None,
    offload: Offload = None,
    kv_cache_dtype: KvCacheDtype = "auto",
    tensor_parallel: Annotated[
        int,
        typer.Option("--tensor-parallel-size", "-tp", help="Processes, or GPUs, that the model is cut over."),
    ] = 1,
    data_parallel: Annotated[
        int,
        typer.Option(
            "--data-parallel-size", "-dp", help="Processes, or GPUs, each with requests of its own."
        ),
    ] = 1,
    expert_parallel: Annotated[
        bool, typer.Option("--enable-expert-parallel", "-ep", help="Their experts are shared out over them.")
    ] = False,
    download: Download = False,
    ui: Annotated[
        bool,
        typer.Option("--ui", help="A page to chat on, with a map of the experts, at the address itself."),
    ] = False,
) -> None:
    """Serve a model over OpenAI's API: chat completions, completions, responses (docs/serving.md)."""
    from shoal.server import forks

    forks.prepare(["shoal.server.worker", "shoal.stages.llm", "shoal.stages.spread"])
    from shoal.checkpoint import hf
    from shoal.cli.view import say
    from shoal.data.text import Tokenizer
    from shoal.engine import EngineSettings
    from shoal.model.quantised import check_quant
    from shoal.server.gate import Limits
    from shoal.server.lifecycle import ServerSettings, log_to_stderr, run
    from shoal.stages.spread import Degrees

    if log_level not in ("debug", "info", "warning", "error"):
        raise ValueError(f"--log-level is {log_level!r}; it must be debug, info, warning or error")
    folder = hf.find_folder(path, download=download)
    tokenizer = Tokenizer.load(folder)
    settings = ServerSettings(
        model=name or (folder.resolve().name if Path(path).is_dir() else path),
        host=host,
        port=port,
        keys=_read_keys(api_key_file),
        limits=Limits(
            max_body_bytes=int(max_body_mib * 2**20),
            max_queue=max_queue,
            deadline=deadline,
            drain_seconds=drain,
        ),
        chat_template=find_template(chat_template),
        page=_page(folder) if ui else None,
    )
    opening = Opening(
        folder,
        EngineSettings(
            cache_bytes=None if cache_gib is None else int(cache_gib * 2**30),
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
            prefix_cache=prefix_cache,
            memory=memory,
            speculate=speculate,
            record_weights=ui,
            affinity=affinity,
            index_keys=index_keys,  # type: ignore[arg-type]  # EngineSettings says what it may be
            cache_dtype=kv_cache_dtype,
        ),
        device,
        dtype,
        check_quant(quant),
        Degrees(tensor_parallel, data_parallel, expert_parallel),
        offload,
    )
    log_to_stderr(log_level)

    def on_progress(what: str, done: int, total: int) -> None:
        say(f"{what} {done}/{total}" if total > 1 else what)

    def on_ready(address: str) -> None:
        if ui:
            say(f"the page: {address}/")
            _open_browser(address)

    code = run(opening, tokenizer, settings, say=say, on_progress=on_progress, on_ready=on_ready)
    if code:
        raise typer.Exit(code)


def _page(folder: Path) -> Page:
    from shoal.cli.plan import find_config, planned
    from shoal.server.page import Page

    def plan(fields: Mapping[str, str]) -> dict[str, Any]:
        return planned(str(folder), fields)

    return Page(find_config(str(folder)), plan)


def _open_browser(address: str) -> None:
    """Where somebody sits at a screen: a terminal, and a browser with windows."""
    import sys
    import webbrowser

    windows = (
        sys.platform in ("darwin", "win32") or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    )
    if windows and sys.stderr.isatty():
        webbrowser.open(address)


def find_template(name: str | None) -> str | None:
    """The text of a template that takes the place of the checkpoint's; None leaves that."""
    from shoal.data.chat import BUILT_IN

    if name is None:
        return None
    if name in BUILT_IN:
        return BUILT_IN[name]
    try:
        return Path(name).read_text("utf-8")
    except OSError as error:
        raise ValueError(
            f"--chat-template is {name!r}, neither one of {', '.join(BUILT_IN)} nor a file: {error.strerror}"
        ) from None


def _read_keys(file: Path | None) -> tuple[str, ...]:
    lines = [] if file is None else file.read_text("utf-8").splitlines()
    keys = [line.strip() for line in lines if line.strip()]
    if file is not None and not keys:
        raise ValueError(f"{file} holds no API key; write one a line")
    if KEY_VARIABLE in os.environ:
        keys.append(os.environ[KEY_VARIABLE])
    return tuple(keys)
