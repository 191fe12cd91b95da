"""What the processes of an engine do in tests: real ranks over gloo, each with its part of the model.

Each function runs in every process (work.launch); what the first returns is what a user would get.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from shoal.checkpoint import hf
from shoal.config.families import tiny
from shoal.config.model import ModelConfig
from shoal.engine import Completion, Engine, EngineSettings, SamplingParams
from shoal.engine.lockstep import Apart, Lockstep, Place
from shoal.model.quantised import Scheme, quantise
from shoal.model.transformer import Transformer
from shoal.parallel.expert import ExpertShare
from shoal.parallel.ranks import Ranks
from shoal.parallel.tensor import TensorShare

PLAIN = EngineSettings(page_size=8, num_pages=64, max_batch_tokens=64, max_sequences=4)


@dataclass(frozen=True)
class Case:
    """A model, and a way to serve it."""

    family: str
    changes: dict[str, Any] = field(default_factory=dict)
    settings: EngineSettings = PLAIN
    quant: Scheme | None = None

    @property
    def config(self) -> ModelConfig:
        return replace(tiny(self.family), initializer_range=0.2, **self.changes)

    def model(self) -> Transformer:
        model = Transformer(self.config)
        model.init_weights(torch.Generator().manual_seed(0))
        return model.eval()


def prompts(vocabulary: int) -> list[list[int]]:
    """Texts of 1 to 60 tokens; the last two begin alike."""
    draw = torch.Generator().manual_seed(1)

    def text(length: int) -> list[int]:
        return torch.randint(vocabulary, (length,), generator=draw).tolist()

    shared = text(24)
    return [text(1), text(60), text(17), shared + text(3), shared + text(11)]


def params() -> list[SamplingParams]:
    """Greedy and sampled, with what needs the logits of a prompt, the ids that were said, and the experts."""
    return [
        SamplingParams(temperature=0, max_tokens=10),
        SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=2, logprobs=3),
        SamplingParams(seed=5, temperature=0.7, top_p=0.9, max_tokens=9),
        SamplingParams(seed=3, repetition_penalty=1.2, max_tokens=11),
        SamplingParams(temperature=0, max_tokens=8),
    ]


class Served(NamedTuple):
    completions: list[Completion]
    scores: list[float]


def serve(engine: Engine | Lockstep) -> Served:
    texts = prompts(engine.config.vocab_size)
    wishes = params()
    if engine.config.moe is not None:
        wishes[-1] = replace(wishes[-1], routing=True)
    return Served(engine.generate(texts, wishes), engine.score(texts[1]))


def serve_cut(cases: dict[str, Case], folder: Path | None = None) -> dict[str, Served]:
    """Of each case what all processes serve as one; from a checkpoint of it, where there is a folder."""
    ranks = Ranks(torch.device("cpu"))
    served: dict[str, Served] = {}
    for name, case in cases.items():
        share = TensorShare(ranks)
        if folder is None:
            model = share.split(case.model())
        else:
            model = hf.load(folder / name, share=share, dtype=torch.float32).eval()
        engine = Engine(model, case.settings, team=ranks)
        if ranks.rank:
            engine.runner.follow()
        else:
            served[name] = serve(engine)
            ranks.dismiss()
    return served


def serve_in_lockstep(cases: dict[str, Case], folder: Path | None = None) -> dict[str, Any]:
    """Of each case what is served by processes that share experts alone, and how they were used."""
    ranks = Ranks(torch.device("cpu"))
    served: dict[str, Any] = {}
    for name, case in cases.items():
        experts = case.config.moe
        assert experts is not None
        share = ExpertShare(ranks.group, experts.n_routed_experts)
        if folder is None:
            model = case.model()
            if case.quant is not None:
                quantise(model, case.quant)
            share.split(model)
        else:
            model = hf.load(folder / name, share=share, dtype=torch.float32, quant=case.quant).eval()
        place = Place(Engine(model, case.settings, team=Apart(ranks)), ranks)
        if ranks.rank:
            place.follow()
        else:
            engine = Lockstep(place)
            served[name] = serve(engine), engine.stats()
            again = engine.add([1, 2, 3], SamplingParams(max_tokens=50, ignore_eos=True))
            engine.step()
            assert engine.cancel(again) and engine.busy
            (event,) = [event for _ in range(2) for event in engine.step() if event.finish]
            assert (event.request, event.finish, engine.busy) == (again, "cancelled", False)
            stats = engine.stats()
            assert not engine.cancel(again) and stats.pages_free == stats.pages
            ranks.dismiss()
    return served
