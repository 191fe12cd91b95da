"""Laws of extension: at factor 1 it is plain training, a stopped run goes on bit for bit, what cannot be is
refused."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.analysis.needle import Trial
from shoal.checkpoint import hf
from shoal.config.extend import ExtendConfig, NeedleConfig, load_extend, stretch
from shoal.config.families import tiny
from shoal.config.model import YarnScaling
from shoal.config.run import DataConfig, OptimConfig, TrainConfig
from shoal.data.recall import recall_documents
from shoal.model.rope import inverse_frequencies
from shoal.model.transformer import Transformer
from shoal.stages import extend
from shoal.train.metrics import Event, Phase, StepReport
from tests.model import parts

YARN = YarnScaling(4.0, 64, mscale=1.0, mscale_all_dim=1.0)
RECIPES = Path(__file__).parents[2] / "recipes" / "extend"


@pytest.fixture(scope="module")
def short(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of `start`, its angles plain and 64 positions long."""
    folder = tmp_path_factory.mktemp("short") / "checkpoint"
    config = hf.load(start).config
    rope = replace(config.rope, scaling=None)
    model = Transformer(replace(config, rope=rope, max_position_embeddings=64))
    model.init_weights(torch.Generator().manual_seed(3))
    hf.save(model, folder, tokenizer_files=[start / "tokenizer.json", start / "tokenizer_config.json"])
    return folder


@pytest.fixture
def config(short: Path, tmp_path: Path) -> ExtendConfig:
    text = tmp_path / "recall.jsonl"
    lines = [json.dumps({"text": document.text}) for document in recall_documents(60, (16, 150), 0)]
    text.write_text("\n".join(lines))
    return ExtendConfig(
        model=str(short),
        train=TrainConfig(steps=4, evaluate_every=0, checkpoint_every=1, optim=OptimConfig(lr=0.01)),
        data=DataConfig(train=(str(text),), holdout_fraction=0.3, tokens_per_batch=512, seq_len=256),
        yarn=YARN,
        needle=NeedleConfig((64, 128, 250), depths=2, trials=1, letters=3, digits=2),
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return hf.load(folder / "export").state_dict()


def test_a_run_extends_and_goes_on_bit_for_bit(config: ExtendConfig, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, StepReport) and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    events: list[Event] = []
    extend.run(config, tmp_path / "whole", observe=events.append)
    assert any("have more than 64 before them" in event.text for event in events if isinstance(event, Phase))
    assert extend.run(config, tmp_path / "parts", observe=interrupt).interrupted
    asked: list[Event] = []
    extend.run(config, tmp_path / "parts", observe=asked.append)
    assert not any("before training" in event.text for event in asked if isinstance(event, Phase))
    ours, theirs = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    extended = hf.load(tmp_path / "whole" / "export").config
    assert (extended.rope.scaling, extended.max_position_embeddings) == (YARN, 256)
    told = [json.loads((tmp_path / name / "needle.json").read_text()) for name in ("whole", "parts")]
    assert told[0] == told[1]
    assert [*told[0]["found"]] == ["before", "stretched", "after"]
    assert (tmp_path / "whole" / "needle.png").read_bytes().startswith(b"\x89PNG")
    # The next phase starts from the run's folder, and keeps its angles.
    onward = replace(config, model=str(tmp_path / "whole"), yarn=None, needle=None)
    extend.run(onward, tmp_path / "next")
    assert hf.load(tmp_path / "next" / "export").config.rope == extended.rope


def test_at_factor_one_it_is_plain_training(config: ExtendConfig, tmp_path: Path) -> None:
    data = replace(config.data, seq_len=64)
    same = replace(config, data=data, yarn=replace(YARN, factor=1.0), needle=None)
    extend.run(same, tmp_path / "stretched")
    extend.run(replace(same, yarn=None), tmp_path / "plain")
    ours, theirs = weights(tmp_path / "stretched"), weights(tmp_path / "plain")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_v3s_recipe_gives_v3s_angles() -> None:
    yarn = load_extend(RECIPES / "v3-32k.toml").yarn
    v3 = tiny("deepseek-v3")
    plain = replace(v3, rope=replace(v3.rope, scaling=None), max_position_embeddings=4096)
    extended = stretch(plain, yarn)
    assert extended.max_position_embeddings == 163840
    angles = inverse_frequencies(extended.rope, 64)
    # DeepSeek-V3's own, as its reference code computes them: kept up to pair 10, divided by 40 from 23 on.
    assert angles[10] == pytest.approx(5.623413e-2, rel=1e-6)
    assert angles[16] == pytest.approx(5.5e-3, rel=1e-6)
    assert angles[31] == pytest.approx(3.333804e-6, rel=1e-6)
    assert extended.softmax_scale / plain.softmax_scale == pytest.approx(1.8738542, rel=1e-6)
    assert load_extend(RECIPES / "v3-128k.toml").yarn is None
    assert load_extend(RECIPES / "needle-3-long.toml").data.seq_len == 2048


def test_the_engine_answers_as_the_model_does(short: Path) -> None:
    model = hf.load(short)
    prompts = [tuple((7 * n + k) % 200 for n in range(length)) for k, length in enumerate((5, 33, 60))]
    told = extend.Greedy(model)([Trial(len(ids) + 2, 0.5, ids, (0, 0)) for ids in prompts])
    for ids, answer in zip(prompts, told, strict=True):
        assert len(answer) == 2
        batch = parts.pack([*ids, answer[0]])
        best = model.logits(model(batch).hidden_TD, batch)[-2:].argmax(1)
        assert best.tolist() == list(answer)


def test_what_cannot_be_extended_is_refused(config: ExtendConfig, tmp_path: Path) -> None:
    def refused(message: str, changed: ExtendConfig) -> None:
        with pytest.raises(ValueError, match=message):
            extend.run(changed, tmp_path / "run")
        assert not (tmp_path / "run" / "config.toml").exists()

    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"shoal number {n}"}) for n in range(200)))
    refused(
        "no document is longer than the original 64 tokens",
        replace(config, data=replace(config.data, train=(str(text),))),
    )
    original = replace(YARN, original_max_position_embeddings=100)
    refused("is 100, but the model was made for 64 positions; say 64", replace(config, yarn=original))
    refused("seq_len is 256, beyond the 64 positions", replace(config, yarn=None, needle=None))
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.toml").write_text("")
    refused("has not finished: it has no export", replace(config, model=str(tmp_path / "unfinished")))
    with pytest.raises(ValueError, match=r"needle\.lengths go to 300, beyond"):
        replace(config, needle=NeedleConfig((300,)))
    with pytest.raises(ValueError, match="MLA, which this model does not have"):
        stretch(replace(tiny("llama-2-7b"), max_position_embeddings=64), YARN)
