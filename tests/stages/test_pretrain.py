"""Laws of the pretrain stage: its folder tells the run, goes on with it, refuses another, and others can load
it."""

from __future__ import annotations

import os
import random
import signal
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.checkpoint import hf, native
from shoal.config.run import RunConfig, SourceConfig, from_table, load_recipe
from shoal.data.text import Tokenizer
from shoal.data.tokenizer import SMALLEST
from shoal.engine import Engine, EngineSettings, SamplingParams
from shoal.stages import pretrain
from shoal.stages.claim import is_begun
from shoal.train.metrics import EvaluationReport, Event, Phase, StepReport
from tests.model import parts

RECIPES = Path(__file__).parents[2] / "recipes"
RECIPE = """
seed = 5
model = {{ family = "deepseek-v3", tiny = true, vocab_size = {vocab_size} }}
data = {{ train = ["{text}"], tokens_per_batch = 128, seq_len = 32, holdout_fraction = 0.2 }}
train = {{ steps = 4, evaluate_every = 2, checkpoint_every = 2, optim = {{ lr = 0.01 }} }}
"""


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    words, rng = ["shoal", "fish", "expert", "router", "token", "sea"], random.Random(0)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(" ".join(rng.choices(words, k=8)) for _ in range(100)))
    return from_table(tomllib.loads(RECIPE.format(text=text, vocab_size=SMALLEST + 10)), "recipe")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return hf.load(folder).state_dict()


def test_a_run_is_whole_repeatable_and_loadable(config: RunConfig, tmp_path: Path) -> None:
    events: list[Event] = []
    outcome = pretrain.run(config, tmp_path / "a", observe=events.append)
    assert not outcome.interrupted
    assert load_recipe(tmp_path / "a" / "config.toml") == config
    assert [event.step for event in events if isinstance(event, StepReport)] == [1, 2, 3, 4]
    assert isinstance(events[0], Phase)
    bits = [event.bits_per_byte for event in events if isinstance(event, EvaluationReport)]
    assert bits[-1] < bits[0]  # it learns, and held-out text is what it is judged by
    export = tmp_path / "a" / "export"
    assert Tokenizer.load(export).encode("shoal") == Tokenizer.load(tmp_path / "a" / "tokenizer").encode(
        "shoal"
    )
    assert (hf.load(export).config.bos_token_id, hf.load(export).config.eos_token_id) == (0, 1)
    pretrain.run(config, tmp_path / "b")
    ours, theirs = weights(export), weights(tmp_path / "b" / "export")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_the_recipe_of_sparse_attention_trains_a_model_that_is_served(
    config: RunConfig, tmp_path: Path
) -> None:
    """recipes/nsa-tiny.toml, on less text; then greedy answers of the engine are those of whole passes."""
    sizes = ("tokens_per_batch=128", "seq_len=128", f'train=["{config.data.train[0]}"]')
    changes = [f"data.{size}" for size in sizes]
    changes += [f"model.vocab_size={config.model.vocab_size}", "train.steps=2", "train.optim.warmup_steps=1"]
    pretrain.run(load_recipe(RECIPES / "nsa-tiny.toml", changes), tmp_path / "run")
    model = hf.load(tmp_path / "run" / "export").eval()
    ids = Tokenizer.load(tmp_path / "run" / "export").encode("shoal fish router " * 20)
    assert len(ids) > 200  # of which a token reads 8 blocks of 16
    (answer,) = Engine(model, EngineSettings(num_pages=4)).generate([ids], SamplingParams(0.0, max_tokens=5))
    batch = parts.pack([*ids, *answer.ids[:-1]])
    best = model.logits(model(batch).hidden_TD, batch)[len(ids) - 1 :].argmax(1)
    assert list(answer.ids) == best.tolist()


def test_a_run_goes_on_in_its_folder_on_the_same_tokens(config: RunConfig, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, StepReport) and event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    pretrain.run(config, tmp_path / "whole")
    assert pretrain.run(config, tmp_path / "parts", observe=interrupt).interrupted
    assert not (tmp_path / "parts" / "export").exists()
    Path(config.data.train[0]).write_text("another text altogether")
    steps: list[Event] = []
    outcome = pretrain.run(config, tmp_path / "parts", observe=steps.append)
    assert [event.step for event in steps if isinstance(event, StepReport)] == [4]
    assert outcome.checkpoint == native.latest(tmp_path / "parts" / "checkpoints")
    ours, theirs = weights(tmp_path / "parts" / "export"), weights(tmp_path / "whole" / "export")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_another_run_is_refused_but_a_longer_one_goes_on(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    pretrain.run(config, folder)
    other = load_recipe(folder / "config.toml", ["train.optim.lr=0.5"])
    with pytest.raises(
        ValueError, match=r"holds another run: its train\.optim\.lr is 0\.01, here 0\.5; choose"
    ):
        pretrain.run(other, folder)
    longer = load_recipe(folder / "config.toml", ["train.steps=6"])
    assert pretrain.run(longer, folder).step == 6
    assert load_recipe(folder / "config.toml") == longer


def test_a_vocabulary_larger_than_the_data_allows_claims_no_folder(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (tmp_path / "config.toml").write_text(RECIPE.format(text=config.data.train[0], vocab_size=5000))
    with pytest.raises(ValueError, match="vocab_size is 5000, but this text has no more than"):
        pretrain.run(load_recipe(tmp_path / "config.toml"), folder)
    assert pretrain.run(config, folder).step == 4


def test_text_shorter_than_a_batch_is_refused(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(RECIPE.format(text=config.data.train[0], vocab_size=SMALLEST + 10))
    big = load_recipe(tmp_path / "config.toml", ["data.tokens_per_batch=1_000_000"])
    with pytest.raises(ValueError, match="less than a batch of 1000000; give more text"):
        pretrain.run(big, tmp_path / "run")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(config: RunConfig, tmp_path: Path) -> None:
    pretrain.run(config, tmp_path / "first")
    (tmp_path / "config.toml").write_text(RECIPE.format(text=config.data.train[0], vocab_size=100))
    small = load_recipe(tmp_path / "config.toml", [f"data.tokenizer={tmp_path / 'first' / 'tokenizer'}"])
    with pytest.raises(
        ValueError, match=f"has {SMALLEST + 10} tokens, more than the model's vocab_size of 100"
    ):
        pretrain.run(small, tmp_path / "second")


def test_sources_are_mixed_by_weight_and_a_source_without_files_is_named(
    config: RunConfig, tmp_path: Path
) -> None:
    [text] = config.data.train
    other = tmp_path / "other.py"
    other.write_text(Path(text).read_text()[::-1])
    sources = {"one": SourceConfig((text,), 0.75), "two": SourceConfig((str(other),), 0.25)}
    data = replace(config.data, train=(), sources=sources, fim_rate=0.5)
    mixed = replace(config, data=data)
    outcome = pretrain.run(mixed, tmp_path / "run")
    assert outcome.step == config.train.steps
    assert is_begun(tmp_path / "run", mixed)
    corpus = pretrain.open_corpus(tmp_path / "run", mixed)
    assert [shard.path.name for shard in corpus.train] == ["train-one.shard", "train-two.shard"]
    empty = replace(data, sources=sources | {"three": SourceConfig()})
    with pytest.raises(ValueError, match=r"data\.sources\.three\.files is empty; name some files: --set"):
        pretrain.run(replace(config, data=empty), tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


def test_held_out_text_is_judged_by_domain(config: RunConfig, tmp_path: Path) -> None:
    [text] = config.data.train
    other = tmp_path / "other.txt"
    other.write_text(Path(text).read_text()[::-1] * 2)
    sources = {"one": SourceConfig((text,), 0.75), "two": SourceConfig((str(other),), 0.25)}
    judged = replace(config.data, domains={"seen": (text,), "reversed": (str(other),)})
    mixed = replace(config.data, train=(), sources=sources)
    for data, names in ((judged, {"seen", "reversed"}), (mixed, {"one", "two"})):
        run, folder, events = replace(config, data=data), tmp_path / min(names), list[Event]()
        pretrain.run(run, folder, observe=events.append)
        last = [event for event in events if isinstance(event, EvaluationReport)][-1]
        assert last.domains.keys() == names
        # The whole is the mean of its parts, each weighed by its bytes: sums of float64 in another order.
        sizes = {name: shard.num_bytes for name, shard in pretrain.open_corpus(folder, run).held_out.items()}
        whole = sum(last.domains[name] * size for name, size in sizes.items()) / sum(sizes.values())
        assert last.bits_per_byte == pytest.approx(whole, rel=1e-12)
        assert load_recipe(folder / "config.toml") == run


def test_a_domain_without_text_is_named(config: RunConfig, tmp_path: Path) -> None:
    def run(domains: dict[str, tuple[str, ...]], validation: tuple[str, ...]) -> None:
        data = replace(config.data, domains=domains, validation=validation)
        pretrain.run(replace(config, data=data), tmp_path / "run")

    def refused(domains: dict[str, tuple[str, ...]], message: str, validation: tuple[str, ...] = ()) -> None:
        with pytest.raises(ValueError, match=message):
            run(domains, validation)
        assert not (tmp_path / "run").exists()

    refused({"en": ()}, r"data\.domains\.en is empty; name some files: --set")
    refused({"en": (str(tmp_path / "none.txt"),)}, r"data\.domains\.en: .*none\.txt")
    refused({"e n": ("a.txt",)}, "a domain is called 'e n'")
    refused({"en": ("a.txt",)}, "validation and domains are both given", ("b.txt",))
