"""The same model on a GPU: kernels chosen by the dispatcher, held against the references on the CPU.

Small shapes of every family's structure, float32, so that the two sides differ by the order of sums alone;
TF32 is off.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.batch import Batch
from shoal.config.families import tiny
from shoal.config.run import DataConfig, OptimConfig, RunConfig, TrainConfig
from shoal.engine.engine import Engine, EngineSettings
from shoal.engine.sequence import SamplingParams
from shoal.model.transformer import Transformer
from shoal.ops import dispatch
from shoal.stages import pretrain
from shoal.train.loss import NextToken
from shoal.train.objective import Step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
FAMILIES = ("deepseek-v3", "deepseek-v2-lite", "deepseek-moe-16b", "qwen3-30b-a3b", "mixtral-8x7b")


def twins(family: str) -> tuple[Transformer, Transformer]:
    """The same weights on the CPU and on the GPU."""
    config = replace(tiny(family), initializer_range=0.1)
    host = Transformer(config)
    host.init_weights(torch.Generator().manual_seed(0))
    device = Transformer(config, device="cuda")
    device.load_state_dict(host.state_dict())
    return host, device


def pack(device: str) -> Batch:
    lengths = (1, 63, 257)
    ids = torch.randint(0, 512, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    return Batch(
        ids_T=ids.to(device),
        positions_T=torch.cat([torch.arange(n) for n in lengths]).to(device),
        cu_seqlens_S1=torch.tensor([0, 1, 64, 321], dtype=torch.int32, device=device),
        max_seqlen=257,
        targets_T=ids.roll(-1).to(device),
        weights_T=torch.ones(len(ids), device=device),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_cpu(family: str) -> None:
    assert "triton" in dispatch.explain(
        "route", torch.zeros(1, 4, device="cuda"), 2, "softmax", None, 1, 1, False, 1.0, None
    )
    host, device = twins(family)
    losses = []
    for model, where in ((host, "cpu"), (device, "cuda")):
        batch = pack(where)
        modules = model.config.num_nextn_predict_layers
        objective = NextToken(modules, mtp_weight=0.3, balance_weight=1e-2)
        found = objective.compute(model, batch, Step(0, 1, objective.count([batch])))
        found.total.backward()
        losses.append(found.total.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    theirs = dict(device.named_parameters())
    for name, parameter in host.named_parameters():
        assert parameter.grad is not None
        other = theirs[name].grad
        assert other is not None, name
        # Float32 sums of some hundred terms in two orders, through up to four layers.
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(other.cpu(), parameter.grad, atol=1e-3 * scale + 1e-8, rtol=0, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_says_what_it_says_on_the_cpu(family: str) -> None:
    host, device = twins(family)
    prompts = [[5, 9, 33, 17], list(range(40, 120)), [7]]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    settings = EngineSettings(page_size=16, num_pages=64, max_batch_tokens=32, max_sequences=4)
    expected = Engine(host.eval(), settings).generate(prompts, params)
    found = Engine(device.eval(), settings).generate(prompts, params)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.ids == theirs.ids
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)


def test_a_run_trains_and_resumes_on_the_gpu(tmp_path: Path) -> None:
    def config(steps: int) -> RunConfig:
        return RunConfig(
            model=replace(tiny("deepseek-v3"), vocab_size=512, initializer_range=0.02),
            data=DataConfig(train=(json.decoder.__file__, json.__file__), tokens_per_batch=512, seq_len=64),
            train=TrainConfig(
                steps=steps,
                checkpoint_every=10,
                evaluate_every=10,
                optim=OptimConfig(optimizer="muon", lr=5e-3, schedule="constant"),
            ),
        )

    pretrain.run(config(10), tmp_path / "run", device="cuda")
    outcome = pretrain.run(config(20), tmp_path / "run", device="cuda")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    assert outcome.step == len(losses) == 20
    assert losses[-1] < losses[0] - 0.3
