"""Pretraining, top to bottom: a recipe becomes a tokenizer, batches, a model, and a checkpoint to load.

Read this second, after model/transformer.py: each part is named here once, in the order it is needed. The
law: a run is told by its folder. Started again there, it goes on from its last checkpoint on the same tokens;
a recipe that would make it another run is refused. Until config.toml is there, nothing is begun. Over how
many processes it is spread may change each time: under torchrun all run this file, on one file system, and
the first of them writes.

    config.toml        the resolved recipe         metrics.jsonl            a line a step and an evaluation
    tokenizer/         as transformers reads it    checkpoints/step-000100  to go on from, bit for bit
    data/*.shard       the text as tokens          export/                  the model, for everybody's tools
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from shoal.checkpoint import hf, native
from shoal.config.run import DataConfig, RunConfig, to_table
from shoal.data.fim import FIM
from shoal.data.pack import Mixture, Packer, evaluation_batches
from shoal.data.read import Document, read_documents, split_documents, standard_library
from shoal.data.shard import Shard, tokenize_documents, write_shard
from shoal.data.text import Tokenizer
from shoal.data.tokenizer import train_tokenizer
from shoal.model.transformer import Transformer
from shoal.stages.claim import claim, is_begun
from shoal.train.fp8 import multiply_in_fp8
from shoal.train.metrics import Observer, Phase
from shoal.train.objective import Objective
from shoal.train.optim import Trainable
from shoal.train.recompute import recompute
from shoal.train.team import ALONE
from shoal.train.trainer import Evaluation, Outcome, Trainer

if TYPE_CHECKING:
    from shoal.parallel.mesh import Mesh

TOKENIZER = "tokenizer"
SHARDS = ("data/train.shard", "data/held-out.shard")  # of text that has no names


@dataclass(frozen=True, eq=False)
class Corpus:
    """The text of a run, as tokens."""

    tokenizer: Tokenizer
    train: tuple[Shard, ...]  # one a source
    held_out: dict[str, Shard]  # by domain; one that has no name is called ""

    def evaluations(self, config: DataConfig) -> dict[str, Evaluation]:
        return {name: _evaluation(shard, config) for name, shard in self.held_out.items()}


Fill = Callable[[Transformer, torch.Generator], None]  # gives a model its first weights


def at_birth(_: Corpus) -> Fill:
    return Transformer.init_weights


class Lesson(NamedTuple):
    """What is minimised, and what of the model learns; None: as the Trainer has it by itself."""

    objective: Objective | None = None
    trainable: Trainable | None = None


def run(
    config: RunConfig,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    observe: Observer = lambda event: None,
    start: Callable[[Corpus], Fill] = at_birth,
    lesson: Callable[[Transformer], Lesson] = lambda model: Lesson(),
) -> Outcome:
    """Run a recipe in a folder, or go on with the run that is there.

    `start` may look at the text, and refuse it, before the folder is this run's. `lesson` is asked once the
    model has its weights.
    """
    if config.parallel.ranks == 1 and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _run(config, folder, torch.device(device), observe, None, start, lesson)
    from shoal.parallel.mesh import open_mesh  # seconds of torch that one process need not load

    with open_mesh(config.parallel, str(device)) as mesh:
        assert mesh is not None
        watch = observe if mesh.rank == 0 else lambda event: None
        return _run(config, folder, mesh.device, watch, mesh, start, lesson)


def _run(
    config: RunConfig,
    folder: Path,
    device: torch.device,
    observe: Observer,
    mesh: Mesh | None,
    start: Callable[[Corpus], Fill],
    lesson: Callable[[Transformer], Lesson],
) -> Outcome:
    # 1. The text: a tokenizer, and what it makes of the documents to train on and of those held out.
    first = mesh is None or mesh.rank == 0
    if first and not is_begun(folder, config):
        make_corpus(folder, config, observe)
    if mesh is not None:
        mesh.gather("the text is there")
    corpus = open_corpus(folder, config)
    data = config.data
    cut = (data.tokens_per_batch, data.seq_len, config.seed)
    weights = tuple(source.weight for source in data.sources.values())
    packer = Mixture(corpus.train, weights, *cut) if weights else Packer(corpus.train[0], *cut)

    fill = start(corpus)

    # 2. The recipe. With it the folder is this run's.
    if first:
        claim(folder, config)

    # 3. The model: built without memory, then given it, then filled. Its control tokens are the tokenizer's.
    tokens = {"bos_token_id": corpus.tokenizer.bos_id, "eos_token_id": corpus.tokenizer.eos_id}
    built = replace(config.model, **tokens)
    model = Transformer(built, device="meta", dtype=getattr(torch, config.dtype))
    model.allocate(device)
    generator = torch.Generator(device).manual_seed(config.seed)
    fill(model, generator)
    recompute(model, config.train.recompute, [generator])
    if config.precision == "fp8":
        multiply_in_fp8(model, config.keeps)
    team = ALONE
    if mesh is not None:
        from shoal.stages.team import make_team  # as above

        team = make_team(model, mesh)
    if not first:  # the weights are the same everywhere; what is drawn from here on is not
        generator.manual_seed(generator.initial_seed() + (team.rank << 32))
    torch.manual_seed(generator.initial_seed())  # what a library draws is the same in every start, too

    # 4. The loop, from the last checkpoint or the start.
    objective, trainable = lesson(model)
    trainer = Trainer(
        model,
        packer.batch,
        config.train,
        folder,
        generator=generator,
        objective=objective,
        trainable=trainable,
        team=team,
        evaluation=corpus.evaluations(data),
        recipe=to_table(config),
        observe=observe,
    )
    trainer.resume()
    outcome = trainer.run()

    # 5. What others load.
    if not outcome.interrupted:
        observe(Phase("writing the model for other tools"))
        files = sorted((folder / TOKENIZER).iterdir())
        if mesh is not None and first:
            model = Transformer(built, device="meta", dtype=getattr(torch, config.dtype))
            model.allocate("cpu")
            native.load(outcome.checkpoint, {"model": model.state_dict()})
        if first:
            hf.save(model, folder / "export", tokenizer_files=files, overwrite=True)
        if mesh is not None:
            mesh.gather("the model is there")
    return outcome


def open_corpus(folder: Path, config: RunConfig) -> Corpus:
    train = tuple(Shard.open(folder / shard) for shard in _train_shards(config.data))
    held_out = {name: Shard.open(folder / shard) for name, shard in _held_out_shards(config.data).items()}
    return Corpus(Tokenizer.load(folder / TOKENIZER), train, held_out)


def make_corpus(folder: Path, config: RunConfig, observe: Observer) -> Corpus:
    """Read the text, train or take the tokenizer, and put it and the tokens into the folder."""
    observe(Phase("reading the text"))
    train, held_out = split(config)
    if config.data.tokenizer is None:
        observe(Phase(f"training a tokenizer of {config.model.vocab_size} tokens"))
        texts = (document.text for documents in train for document in documents)
        tokenizer = train_tokenizer(texts, config.model.vocab_size)
    else:
        tokenizer = Tokenizer.load(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer of {config.data.tokenizer} has {tokenizer.vocab_size} tokens, more than the "
            f"model's vocab_size of {config.model.vocab_size}; raise model.vocab_size to at least that"
        )
    tokenizer.save(folder / TOKENIZER)
    observe(Phase("turning the text into tokens"))
    fim = FIM(config.data.fim_rate, config.seed)
    for shard, documents in zip(_train_shards(config.data), train, strict=True):
        write_shard(folder / shard, tokenize_documents(tokenizer, documents, fim), tokenizer.vocab_size)
    for name, shard in _held_out_shards(config.data).items():
        write_shard(folder / shard, tokenize_documents(tokenizer, held_out[name]), tokenizer.vocab_size)
    return open_corpus(folder, config)


def split(config: RunConfig) -> tuple[list[list[Document]], dict[str, list[Document]]]:
    """The documents to train on, a list a source, and those held out, a list a domain."""
    data = config.data
    unnamed = [f"data.sources.{name}.files" for name, source in data.sources.items() if not source.files]
    unnamed += [f"data.domains.{name}" for name, files in data.domains.items() if not files]
    if unnamed:
        raise ValueError(f"{unnamed[0]} is empty; name some files: --set '{unnamed[0]}=[\"*.txt\"]'")
    if data.sources:
        sources = {name: list(read_documents(source.files)) for name, source in data.sources.items()}
    else:
        sources = {"": list(read_documents(data.train) if data.train else standard_library())}
    if data.domains:
        return list(sources.values()), {name: _read_domain(name, data) for name in data.domains}
    if data.validation:
        return list(sources.values()), {"": list(read_documents(data.validation))}
    sides = {name: split_documents(documents, data.holdout_fraction) for name, documents in sources.items()}
    return [train for train, _ in sides.values()], {name: held_out for name, (_, held_out) in sides.items()}


def _read_domain(name: str, data: DataConfig) -> list[Document]:
    try:
        return list(read_documents(data.domains[name]))
    except ValueError as error:
        raise ValueError(f"data.domains.{name}: {error}") from error


def _evaluation(held_out: Shard, data: DataConfig) -> Evaluation:
    return Evaluation(
        lambda: evaluation_batches(held_out, data.tokens_per_batch, data.seq_len), held_out.num_bytes
    )


def _train_shards(data: DataConfig) -> list[str]:
    return [f"data/train-{name}.shard" for name in data.sources] or [SHARDS[0]]


def _held_out_shards(data: DataConfig) -> dict[str, str]:
    """By domain: those that are named, else a share of each source, unless one text serves for all."""
    names = data.domains or ({} if data.validation else data.sources)
    return {name: f"data/held-out-{name}.shard" for name in names} or {"": SHARDS[1]}
