"""Extension, top to bottom: a checkpoint's angles are stretched, and it learns to use them on long text.

The run is stages/pretrain's in everything but its start: weights are the checkpoint's, the tokenizer too. So
the folder, its record and its exact resume are those of pretraining. Beside them:

    needle.json   the share of needles found by length and depth: before (the checkpoint as it was, read
                  beyond its length), stretched (YaRN alone, not trained), after
    needle.png    the same as a picture

The law: needles of all three are the same, and are asked through the engine, greedily.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.analysis import plots
from shoal.analysis.needle import Needle, Trial, find_needles, make_trials
from shoal.checkpoint import hf
from shoal.checkpoint.source import open_source
from shoal.config.extend import ExtendConfig, NeedleConfig, stretch
from shoal.config.model import ModelConfig, YarnScaling
from shoal.config.run import RunConfig, to_table
from shoal.data.atomic import write_atomically
from shoal.data.shard import Shard
from shoal.data.text import Tokenizer
from shoal.engine import Engine, EngineSettings, SamplingParams
from shoal.model.transformer import Transformer
from shoal.stages import pretrain
from shoal.stages.claim import CONFIG
from shoal.train.metrics import Observer, Phase
from shoal.train.trainer import Outcome

NEEDLES = "needle.json"
TRIES = 1000  # to draw a key that the haystack does not have
AT_ONCE = 8  # prompts in the engine


def run(
    config: ExtendConfig,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    observe: Observer = lambda event: None,
) -> Outcome:
    """Run a recipe in a folder, or go on with the run that is there."""
    # 1. The checkpoint, and the same model with its angles stretched.
    checkpoint = find_checkpoint(config.model)
    found = open_source(checkpoint).model.config
    plain = to_run(config, checkpoint, found)

    # 2. Before a step is taken: is there long text, and what does the model find as it is?
    def start(corpus: pretrain.Corpus) -> pretrain.Fill:
        check_text(corpus, plain, observe)
        needles = None if config.needle is None else Needles.make(config.needle, corpus, config.seed)

        def fill(model: Transformer, _: torch.Generator) -> None:
            hf.fill(model, checkpoint)
            if needles is None:
                return
            if found.rope != model.config.rope and not needles.is_told(folder, "before"):
                observe(Phase("looking for needles with the checkpoint as it was"))
                needles.tell(folder, "before", open_beyond(checkpoint, found, plain, device))
            name = "before" if found.rope == model.config.rope else "stretched"
            if not needles.is_told(folder, name):
                observe(Phase("looking for needles before training"))
                needles.tell(folder, name, model)

        return fill

    # 3. The run, as any other.
    outcome = pretrain.run(plain, folder, device=device, observe=observe, start=start)

    # 4. And after it.
    if config.needle is not None and not outcome.interrupted:
        observe(Phase("looking for needles after training"))
        corpus = pretrain.open_corpus(folder, plain)
        model = hf.load(folder / "export", device=device)
        Needles.make(config.needle, corpus, config.seed).tell(folder, "after", model)
    return outcome


def find_checkpoint(path: str) -> Path:
    """The folder of the weights: the one that is named, or the export of the run that is."""
    folder = hf.find_folder(path)
    if not (folder / CONFIG).exists():
        return folder
    if not (folder / "export").exists():
        raise ValueError(f"the run in {folder} has not finished: it has no export; go on with it first")
    return folder / "export"


def to_run(config: ExtendConfig, checkpoint: Path, model: ModelConfig) -> RunConfig:
    """The extension as a recipe of pretraining."""
    return RunConfig(
        model=stretch(model, config.yarn),
        train=config.train,
        data=replace(config.data, tokenizer=str(checkpoint)),
        seed=config.seed,
        dtype=config.dtype,
    )


def check_text(corpus: pretrain.Corpus, config: RunConfig, observe: Observer) -> None:
    """Say how much of the text is long. ValueError if none is: a longer context would not be learned."""
    scaling, seq_len = config.model.rope.scaling, config.data.seq_len
    if not isinstance(scaling, YarnScaling) or seq_len <= scaling.original_max_position_embeddings:
        return
    original = scaling.original_max_position_embeddings
    beyond = sum(count_beyond(shard, original, seq_len) for shard in corpus.train)
    if beyond == 0:
        longest = max(int(np.diff(shard.offsets).max()) for shard in corpus.train)
        raise ValueError(
            f"no document is longer than the original {original} tokens (the longest has {longest}), so "
            f"nothing of the longer context would be learned; give longer documents"
        )
    share = beyond / sum(shard.num_tokens for shard in corpus.train)
    observe(Phase(f"{share:.1%} of the tokens have more than {original} before them"))


def count_beyond(shard: Shard, original: int, seq_len: int) -> int:
    """Tokens at positions from `original` on, once documents are cut by `seq_len`."""
    whole, rest = np.divmod(np.diff(shard.offsets), seq_len)
    return int((whole * (seq_len - original) + np.maximum(rest - original, 0)).sum())


def open_beyond(
    checkpoint: Path, found: ModelConfig, run: RunConfig, device: torch.device | str
) -> Transformer:
    """The checkpoint with its own angles, and as many positions as the extended model has."""
    config = replace(found, max_position_embeddings=run.model.max_position_embeddings)
    model = Transformer(config, device="meta", dtype=getattr(torch, run.dtype))
    model.allocate(device)
    hf.fill(model, checkpoint)
    return model


class Needles:
    """The trials of a run, and what was found in them so far."""

    def __init__(self, asked: dict[str, Any], trials: Sequence[Trial], depths: Sequence[float]) -> None:
        self.asked, self.trials, self.depths = asked, trials, depths

    @classmethod
    def make(cls, config: NeedleConfig, corpus: pretrain.Corpus, seed: int) -> Needles:
        tokenizer, longest = corpus.tokenizer, config.lengths[-1]
        held_out = np.concatenate([shard.tokens[: 4 * longest] for shard in corpus.held_out.values()])
        # Documents that end inside the haystack would end the context; their marks are left out.
        marks = [token for token in (tokenizer.bos_id, tokenizer.eos_id) if token is not None]
        haystack = held_out[~np.isin(held_out, marks)].tolist()
        text, rng = tokenizer.decode(haystack), random.Random(f"needle {seed}")
        needles = [_draw(config, tokenizer, text, rng) for _ in range(config.trials)]
        depths = [n / (config.depths - 1) for n in range(config.depths)]
        trials = make_trials(needles, haystack, config.lengths, depths, bos=tokenizer.bos_id)
        return cls({"needle": to_table(config), "seed": seed}, trials, depths)

    def is_told(self, folder: Path, name: str) -> bool:
        return name in self._found(folder)

    def tell(self, folder: Path, name: str, model: Transformer) -> None:
        """Look for the needles with a model, and put what it finds beside what was found."""
        grids = self._found(folder) | {name: find_needles(self.trials, Greedy(model))}
        lengths = self.asked["needle"]["lengths"]
        told = {**self.asked, "lengths": lengths, "depths": self.depths, "found": grids}
        with write_atomically(folder / NEEDLES) as file:
            file.write(json.dumps(told).encode())
        plots.save(plots.needle_map(grids, lengths, self.depths), folder / "needle.png")

    def _found(self, folder: Path) -> dict[str, list[list[float]]]:
        if not (folder / NEEDLES).exists():
            return {}
        told = json.loads((folder / NEEDLES).read_text())
        if any(told[key] != value for key, value in self.asked.items()):
            raise ValueError(
                f"{folder / NEEDLES} was found with other needles; ask as before, or remove it to ask anew"
            )
        return told["found"]


class Greedy:
    """A model that answers through the engine."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def __call__(self, trials: Sequence[Trial]) -> list[tuple[int, ...]]:
        training = self.model.training
        self.model.eval()
        pages = max(-(-trial.length // EngineSettings.page_size) for trial in trials) + 1
        engine = Engine(self.model, EngineSettings(max_sequences=AT_ONCE, num_pages=AT_ONCE * pages))
        params = [
            SamplingParams(temperature=0, max_tokens=len(trial.answer), ignore_eos=True) for trial in trials
        ]
        done = engine.generate([list(trial.prompt) for trial in trials], params)
        self.model.train(training)
        return [completion.ids for completion in done]


def _draw(config: NeedleConfig, tokenizer: Tokenizer, haystack: str, rng: random.Random) -> Needle:
    """A fact whose question the haystack does not hold."""
    for _ in range(TRIES):
        letters = "".join(rng.choices(string.ascii_lowercase, k=config.letters))
        number = str(rng.randrange(10 ** (config.digits - 1), 10**config.digits))
        words = {
            "key": rng.choice(config.keys) if config.keys else letters,
            "value": rng.choice(config.values) if config.values else number,
        }
        question, answer = config.question.format(**words), config.answer.format(**words)
        if question.strip() not in haystack:
            break
    else:
        raise ValueError(
            f"{TRIES} keys were drawn, and all are asked in the held-out text; raise needle.letters, or name "
            f"other needle.keys"
        )
    asked, whole = tokenizer.encode(question), tokenizer.encode(question + answer)
    if whole[: len(asked)] != asked:
        raise ValueError(
            f"the tokens of needle.question {question!r} change when the answer {answer!r} follows; "
            f"begin the answer with a space"
        )
    return Needle(
        tuple(tokenizer.encode(config.fact.format(**words))), tuple(asked), tuple(whole[len(asked) :])
    )
