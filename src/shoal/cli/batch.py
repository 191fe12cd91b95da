"""`shoal batch`: a file of requests in OpenAI's batch format, answered on this machine.

What was answered before an interruption is kept, and the same command goes on. Results go to the file alone.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.device import Checkpoint, Device, Download, Dtype, KvCacheDtype, Offload, Quant
from shoal.cli.serve import AffinityLimit, CacheGib, ChatTemplate, MaxSequences, Opening, find_template

if TYPE_CHECKING:
    from shoal.server.app import Service
    from shoal.server.batch import Line


def batch(
    path: Checkpoint,
    requests: Annotated[Path, typer.Argument(help='Lines of {"custom_id", "url", "body"}.')],
    out: Annotated[Path, typer.Argument(help="The file of answers. One that is there is gone on with.")],
    chat_template: ChatTemplate = None,
    max_sequences: MaxSequences = 64,
    cache_gib: CacheGib = None,
    affinity: AffinityLimit = 0,
    device: Device = "auto",
    dtype: Dtype = None,
    quant: Quant = None,
    offload: Offload = None,
    kv_cache_dtype: KvCacheDtype = "auto",
    download: Download = False,
) -> None:
    """Answer a file of requests in OpenAI's batch format, without a server."""
    import time

    from shoal.checkpoint import hf
    from shoal.cli.view import say
    from shoal.data.text import Tokenizer
    from shoal.engine import EngineSettings
    from shoal.model.quantised import check_quant
    from shoal.server.app import Service
    from shoal.server.batch import find_done, read_lines
    from shoal.server.gate import Limits
    from shoal.server.metrics import Metrics
    from shoal.server.process import EngineProcess
    from shoal.server.prompts import Prompter

    lines = read_lines(requests)
    done = find_done(out)
    left = [line for line in lines if line.custom_id not in done]
    if done:
        say(f"{len(lines) - len(left)} of {len(lines)} requests have their answer in {out}")
    if not left:
        return
    folder = hf.find_folder(path, download=download)
    settings = EngineSettings(
        cache_bytes=None if cache_gib is None else int(cache_gib * 2**30),
        max_sequences=max_sequences,
        affinity=affinity,
        decode_steps=8,  # nobody reads along
        cache_dtype=kv_cache_dtype,
    )
    process = EngineProcess(Opening(folder, settings, device, dtype, check_quant(quant), offload=offload))
    service = Service(
        process=process,
        prompter=Prompter.of(Tokenizer.load(folder), find_template(chat_template)),
        model=folder.resolve().name if Path(path).is_dir() else path,
        metrics=Metrics(process),
        limits=Limits(max_queue=1 << 20),
        created=int(time.time()),
    )
    refused = asyncio.run(_run(service, left, out, len(lines), at_once=2 * max_sequences + affinity))
    say(f"{len(left)} answers in {out}" + (f", {refused} of them errors" if refused else ""))


async def _run(service: Service, left: list[Line], out: Path, total: int, *, at_once: int) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from shoal.cli.view import console
    from shoal.server.batch import run_batch

    process = service.process
    process.start()
    assert process.failed is not None
    usable = asyncio.ensure_future(process.usable.wait())
    columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        await asyncio.wait({usable, process.failed}, return_when=asyncio.FIRST_COMPLETED)
        if process.failed.done():
            raise ValueError(process.failed.result())
        with Progress(*columns, console=console) as progress, out.open("ab") as file:
            task = progress.add_task("", total=total, completed=total - len(left))
            return await run_batch(
                service, left, file, at_once=at_once, on_done=lambda: progress.advance(task)
            )
    finally:
        usable.cancel()
        await process.stop()
