"""`shoal chat`, `generate` and `score`: a checkpoint, and text or token ids.

The JSON of `generate` and `score` is documented in docs/json.md and does not change without a new key.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.device import (
    CacheDtype,
    Checkpoint,
    Device,
    Download,
    KvCacheDtype,
    Offload,
    Quant,
    find_device,
)

if TYPE_CHECKING:
    from shoal.data.text import Tokenizer
    from shoal.engine.engine import Engine
    from shoal.engine.sequence import SamplingParams


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON (docs/json.md).")]
Ids = Annotated[str | None, typer.Option(help='Token ids in place of text: "1,2,3".')]
File = Annotated[Path | None, typer.Option(help="Read the text from a file.")]
ComputeDtype = Annotated[Dtype | None, typer.Option(help="Compute in this dtype, not the checkpoint's.")]
Temperature = Annotated[float, typer.Option(help="0 takes the best token.")]
TopP = Annotated[float, typer.Option(help="Keep the fewest tokens that reach this probability.")]
TopK = Annotated[int | None, typer.Option(help="Keep this many tokens.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same text.")]


def chat(
    path: Checkpoint,
    raw: Annotated[bool, typer.Option(help="Continue each line as text, without turns.")] = False,
    system: Annotated[str | None, typer.Option(help="Instructions put before the conversation.")] = None,
    max_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 512,
    temperature: Temperature = 0.6,
    top_p: TopP = 0.95,
    seed: Seed = None,
    device: Device = "auto",
    dtype: ComputeDtype = None,
    quant: Quant = None,
    offload: Offload = None,
    kv_cache_dtype: KvCacheDtype = "auto",
    download: Download = False,
) -> None:
    """Talk to a model, turn by turn; a base model with --raw. End with Ctrl-D."""
    from shoal.cli.chat import talk
    from shoal.cli.view import COMMAND, say
    from shoal.engine.sequence import SamplingParams

    params = SamplingParams(temperature, top_p, seed=seed, max_tokens=max_tokens)
    engine, tokenizer = _open(path, device, dtype, quant, offload, kv_cache_dtype, download)
    talk(engine, _need(tokenizer, path), params, system, raw=raw)
    say(f"On a page, with a map of its experts: {COMMAND} serve {path} --ui")


def generate(
    path: Checkpoint,
    prompt: Annotated[str | None, typer.Argument(help="The text to continue.")] = None,
    ids: Ids = None,
    file: File = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text. Repeatable.")] = None,
    device: Device = "auto",
    dtype: ComputeDtype = None,
    quant: Quant = None,
    offload: Offload = None,
    kv_cache_dtype: KvCacheDtype = "auto",
    download: Download = False,
    as_json: AsJson = False,
) -> None:
    """Continue a text, or a list of token ids."""
    from shoal.engine.sequence import SamplingParams

    params = SamplingParams(temperature, top_p, top_k, seed=seed, max_tokens=max_tokens)
    engine, tokenizer = _open(path, device, dtype, quant, offload, kv_cache_dtype, download)
    prompt_ids = _input_ids(prompt, ids, file, tokenizer, path)
    result = _generate(engine, tokenizer, prompt_ids, params, stop or [], stream=not as_json)
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
    elif tokenizer is None:
        print(",".join(map(str, result["ids"])))


def score(
    path: Checkpoint,
    text: Annotated[str | None, typer.Argument(help="The text to score.")] = None,
    ids: Ids = None,
    file: File = None,
    device: Device = "auto",
    dtype: ComputeDtype = None,
    quant: Quant = None,
    offload: Offload = None,
    kv_cache_dtype: KvCacheDtype = "auto",
    download: Download = False,
    as_json: AsJson = False,
) -> None:
    """Log-probability (natural) of each token of a text, given those before it."""
    engine, tokenizer = _open(path, device, dtype, quant, offload, kv_cache_dtype, download)
    token_ids = _input_ids(text, ids, file, tokenizer, path)
    logprobs = engine.score(token_ids)
    if as_json:
        result = {"ids": token_ids, "logprobs": [None, *logprobs], "sum": sum(logprobs)}
        print(json.dumps(result))
        return
    for token, logprob in zip(token_ids[1:], logprobs, strict=True):
        piece = "" if tokenizer is None else f"\t{json.dumps(tokenizer.decode([token]), ensure_ascii=False)}"
        print(f"{token}\t{logprob:.6f}{piece}")
    print(f"sum\t{sum(logprobs):.6f}")


def _open(
    path: str,
    device: str,
    dtype: Dtype | None,
    quant: str | None,
    offload: float | None,
    cache_dtype: CacheDtype,
    download: bool,
) -> tuple[Engine, Tokenizer | None]:
    """An engine over the checkpoint, and its tokenizer where it has one."""
    from shoal.checkpoint import hf
    from shoal.cli.view import loading
    from shoal.data.text import Tokenizer
    from shoal.engine.engine import Engine, EngineSettings

    settings = EngineSettings(cache_dtype=cache_dtype)
    folder = hf.find_folder(path, download=download)
    with loading("loading") as progress:
        model = hf.load(
            folder,
            device=find_device(device),
            dtype=torch_dtype(dtype),
            mtp=False,
            quant=quant,
            offload=offload,
            progress=progress,
        )
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").exists() else None
    return Engine(model.eval(), settings), tokenizer


def torch_dtype(dtype: Dtype | None) -> Any:
    import torch

    return None if dtype is None else getattr(torch, dtype.value)


def _need(tokenizer: Tokenizer | None, path: str) -> Tokenizer:
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer.json, so text cannot be read; give token ids with --ids")
    return tokenizer


def _input_ids(
    text: str | None, ids: str | None, file: Path | None, tokenizer: Tokenizer | None, path: str
) -> list[int]:
    """The tokens the user gave, in one of three ways. Text starts with BOS where the tokenizer has one."""
    if sum(way is not None for way in (text, ids, file)) != 1:
        raise ValueError('give one of: a text, --file FILE, --ids "1,2,3"')
    if ids is not None:
        try:
            return [int(token) for token in ids.replace(",", " ").split()]
        except ValueError:
            raise ValueError(f'--ids is {ids!r}; give whole numbers, as in "1,2,3"') from None
    if file is not None:
        text = _read_text(file)
    tokenizer = _need(tokenizer, path)
    assert text is not None
    return tokenizer.encode(text, bos=tokenizer.bos_id is not None)


def _read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 at byte {error.start}; convert it first") from None


def _generate(
    engine: Engine,
    tokenizer: Tokenizer | None,
    prompt_ids: list[int],
    params: SamplingParams,
    stops: list[str],
    *,
    stream: bool,
) -> dict[str, Any]:
    """Run one request to its end, or to a stop string; with `stream`, print its text as it comes."""
    from shoal.data.text import StopStrings, TextStream

    if stops and tokenizer is None:
        raise ValueError("--stop needs a tokenizer, and this checkpoint has none")
    request = engine.add(prompt_ids, params)
    pieces = TextStream(tokenizer) if tokenizer is not None else None
    stopper = StopStrings(stops)
    ids: list[int] = []
    logprobs: list[float] = []
    text, finish = "", None

    def emit(piece: str) -> None:
        nonlocal text
        text += piece
        if stream:
            print(piece, end="", flush=True)

    while finish is None:
        for event in engine.step():
            if event.token is None or event.logprob is None:
                raise FloatingPointError(event.error)
            ids.append(event.token)
            logprobs.append(event.logprob)
            finish = event.finish
            if pieces is not None:
                emit(stopper.push(pieces.push([event.token])))
            if stopper.stopped is not None:
                engine.cancel(request)
                finish = "stop"
    if pieces is not None and stopper.stopped is None:
        emit(stopper.push(pieces.flush()) + stopper.flush())
    if stream and pieces is not None:
        print()
    return {
        "prompt_ids": prompt_ids,
        "ids": ids,
        "logprobs": logprobs,
        "text": text if pieces is not None else None,
        "finish_reason": finish,
    }
