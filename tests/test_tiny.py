"""The whole system in small, end to end and on real text: the file that must pass first.

Text -> tokenizer -> batches -> a tiny V3, trained -> checkpoint -> transformers, and the engine -> text.
About half a minute on two cores; nothing in it stands in for a part that the real thing has.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.checkpoint import hf
from shoal.config.families import tiny
from shoal.config.run import DataConfig, OptimConfig, RunConfig, TrainConfig
from shoal.data.baselines import baselines
from shoal.data.text import Tokenizer
from shoal.engine.engine import Engine, EngineSettings
from shoal.engine.sequence import SamplingParams
from shoal.stages import pretrain, quickstart
from shoal.train.metrics import Event, StepReport

STEPS = 60
SOURCES = (argparse.__file__, json.decoder.__file__, json.encoder.__file__)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return RunConfig(
        model=replace(tiny("deepseek-v3"), vocab_size=512, hidden_size=96, initializer_range=0.02),
        data=DataConfig(train=SOURCES, holdout_fraction=0.1, tokens_per_batch=1024, seq_len=128),
        train=TrainConfig(
            steps=STEPS,
            evaluate_every=30,
            checkpoint_every=20,
            optim=OptimConfig(optimizer="muon", lr=5e-3, warmup_steps=5, schedule="linear"),
        ),
    )


@pytest.fixture(scope="module")
def finished(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    outcome = pretrain.run(config, folder)
    assert (outcome.step, outcome.interrupted) == (STEPS, False)
    return folder


def test_training_learns_and_says_so(config: RunConfig, finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    held_out = [line["bits_per_byte"] for line in lines if line["kind"] == "evaluation"]
    assert losses[0] == pytest.approx(math.log(config.model.vocab_size), abs=0.3)  # born knowing nothing
    assert losses[-1] < losses[0] - 1.5
    assert held_out[-1] < held_out[0]


def test_the_summary_holds_the_model_against_compressors(config: RunConfig, finished: Path) -> None:
    summary = quickstart.summarise(config, finished)
    text = b"".join(document.text.encode() for document in pretrain.split(config)[1][""])
    ids = Tokenizer.load(finished / "export").encode_many([text.decode()], bos=True, eos=True)
    assert 0 < summary.bits_per_byte < summary.baselines.unigram
    assert summary.baselines == baselines(text)
    assert len(next(ids)) > 2
    for picture in summary.pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 5_000  # an empty figure of this size has less
    for prompt, written in summary.samples:
        assert prompt in text.decode()
        assert written


def test_transformers_reads_what_was_trained(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs: Any = AutoModelForCausalLM.from_pretrained(finished / "export")
    ids = AutoTokenizer.from_pretrained(finished / "export")("def add(self, other):").input_ids
    assert ids == Tokenizer.load(finished / "export").encode("def add(self, other):", bos=True)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
    engine = Engine(hf.load(finished / "export", mtp=False).eval(), EngineSettings(num_pages=8))
    ours = torch.tensor(engine.score(ids))
    # Two float32 forward passes of a model this small differ by some 1e-6.
    torch.testing.assert_close(
        ours, expected[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1), atol=1e-4, rtol=0
    )


def test_the_engine_continues_a_text_as_transformers_does(finished: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.load(finished / "export")
    prompts = [tokenizer.encode(text, bos=True) for text in ("class ", "    def __init__(self", "import")]
    model = hf.load(finished / "export", mtp=False).eval()
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    together = Engine(model, EngineSettings(num_pages=16)).generate(prompts, params)
    theirs: Any = AutoModelForCausalLM.from_pretrained(finished / "export")
    for ids, completion in zip(prompts, together, strict=True):
        made = theirs.generate(
            torch.tensor([ids]), max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=2
        )
        assert list(completion.ids) == made[0, len(ids) :].tolist()


def test_a_second_start_has_nothing_left_to_train(config: RunConfig, finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    events: list[Event] = []
    outcome = pretrain.run(config, finished, observe=events.append)
    assert outcome.step == STEPS
    assert not any(isinstance(event, StepReport) for event in events)
    assert (finished / "metrics.jsonl").read_bytes() == before
