"""LLM: a checkpoint and its tokenizer behind one object, for text in and text out in one process.

    from shoal import LLM
    llm = LLM("path/to/checkpoint")
    llm.generate(["Once upon a time"], SamplingParams(max_tokens=50))[0].text

`open_engine` is the first half of that, and what `shoal serve` runs in the engine's process. The law is the
engine's: what a prompt gets does not depend on what else is generated beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from shoal.checkpoint import hf
from shoal.checkpoint.shards import Progress
from shoal.data.chat import Message
from shoal.data.text import StopStrings, TextStream, Tokenizer
from shoal.engine import Completion, Engine, EngineSettings, SamplingParams
from shoal.engine.grammar import Vocabulary
from shoal.engine.lockstep import Lockstep
from shoal.engine.team import Team
from shoal.model.quantised import Scheme
from shoal.stages.spread import Degrees, open_spread


@dataclass(frozen=True)
class TextCompletion:
    """`text` ends before the stop string, where one ended it; `completion` has all the tokens drawn."""

    prompt_ids: tuple[int, ...]
    text: str
    finish: str
    completion: Completion


class LLM:
    def __init__(
        self,
        model: str | Path,
        *,
        device: str = "auto",
        dtype: torch.dtype | None = None,
        quant: Scheme | None = None,
        offload: float | None = None,
        download: bool = False,
        settings: EngineSettings | None = None,
        tensor_parallel: int = 1,
        data_parallel: int = 1,
        expert_parallel: bool = False,
    ) -> None:
        """The last three: over how many processes the model is cut, or, with `expert_parallel`, its experts
        are shared out. This one starts the others, or torchrun has: those then do their part in here, and end
        with the first."""
        folder = hf.find_folder(model, download=download)
        self.tokenizer = Tokenizer.load(folder)
        self.engine = open_engines(
            folder,
            settings or EngineSettings(decode_steps=1 if expert_parallel else 8),
            Degrees(tensor_parallel, data_parallel, expert_parallel),
            device=device,
            dtype=dtype,
            quant=quant,
            offload=offload,
        )

    def generate(
        self,
        prompts: Sequence[str | list[int]],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        stop: Sequence[str] = (),
    ) -> list[TextCompletion]:
        """Continue texts, or token ids; in the order of the prompts."""
        bos = self.tokenizer.adds_bos
        ids = [
            self.tokenizer.encode(prompt, bos=bos) if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
        completions = self.engine.generate(ids, params or SamplingParams(max_tokens=256))
        return [self._read(each, own, stop) for each, own in zip(completions, ids, strict=True)]

    def chat(
        self,
        conversations: Sequence[Sequence[Message]],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        stop: Sequence[str] = (),
        thinking: bool | None = None,
    ) -> list[TextCompletion]:
        """Answer conversations: lists of {"role": ..., "content": ...}."""
        prompts = [self.tokenizer.chat(messages, thinking=thinking) for messages in conversations]
        return self.generate(prompts, params, stop=stop)

    def score(
        self, texts: Sequence[str | list[int]], routing: Sequence[Tensor | None] = ()
    ) -> list[list[float]]:
        """Log-probability of each token of each text after the first.

        `routing` replays experts that were recorded over the same ids: a `completion.routing`, or what a
        server told as `routed_experts`.
        """
        bos = self.tokenizer.adds_bos
        ids = [self.tokenizer.encode(text, bos=bos) if isinstance(text, str) else text for text in texts]
        records = routing or [None] * len(ids)
        if len(records) != len(ids):
            raise ValueError(f"there are {len(ids)} texts and {len(records)} records; give one for each")
        return [self.engine.score(each, record) for each, record in zip(ids, records, strict=True)]

    def _read(self, completion: Completion, prompt: list[int], stop: Sequence[str]) -> TextCompletion:
        stream, stops = TextStream(self.tokenizer), StopStrings(stop)
        said = completion.ids[:-1] if completion.finish == "stop" else completion.ids
        text = stops.push(stream.push(said) + stream.flush())
        text += stops.flush() if stops.stopped is None else ""
        finish = completion.finish if stops.stopped is None else "stop"
        return TextCompletion(tuple(prompt), text, finish, completion)


def open_engine(
    folder: Path,
    settings: EngineSettings,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    quant: str | None = None,
    offload: float | None = None,
    progress: Progress | None = None,
) -> Engine:
    """An engine over a checkpoint's folder, which knows what its ids mean where there is a tokenizer."""
    return _load(folder, dtype, quant, offload, settings, progress, _find(device))


def open_engines(
    folder: Path,
    settings: EngineSettings,
    degrees: Degrees,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    quant: str | None = None,
    offload: float | None = None,
    progress: Progress | None = None,
) -> Engine | Lockstep:
    """The same, over as many processes as the degrees say."""
    if offload is not None and degrees.ranks > 1:
        raise ValueError(
            f"offload is {offload:g} GiB over {degrees.ranks} processes, but experts are offloaded on one "
            f"alone; leave out offload, or the parallel sizes"
        )
    load = partial(_load, folder, dtype, quant, offload)
    if degrees.ranks == 1:
        return load(settings, progress, _find(device))
    return open_spread(load, folder, degrees, settings, _find(device), progress, quant)


def _find(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _load(
    folder: Path,
    dtype: torch.dtype | None,
    quant: str | None,
    offload: float | None,
    settings: EngineSettings,
    progress: Progress | None,
    device: str,
    team: Team | None = None,
    share: hf.Share | None = None,
) -> Engine:
    """The engine of one process, with its part of the model."""
    model = hf.load(
        folder,
        device=device,
        dtype=dtype,
        mtp=settings.speculate > 0,
        quant=quant,
        offload=offload,
        progress=progress,
        share=share,
    ).eval()
    vocabulary = None
    if (folder / "tokenizer.json").is_file():
        vocabulary = read_vocabulary(Tokenizer.load(folder), model.config.vocab_size)
    return Engine(model, settings, vocabulary, team=team)


def read_vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """What the ids of a tokenizer mean, for grammars. Control tokens mean nothing there."""
    tokens = [""] * min(size, tokenizer.vocab_size)
    for token_id, token in tokenizer.spelled_tokens().items():
        if token_id < len(tokens):
            tokens[token_id] = token
    return Vocabulary(
        tuple(tokens), "byte_fallback" if tokenizer.spelling.drops_first_space else "byte_level"
    )
