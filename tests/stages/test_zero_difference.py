"""The law of batch-invariant mode: what the engine said of a token, the trainer says too, bit for bit.

However the engine came by it: in chunks of a prompt, behind a prefix that was there, beside few or many
others, by pages of any size. The trainer reads the whole text at once, in a pack with all the others, with
gradients and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shoal.batch import Batch
from shoal.engine import Completion, Engine, EngineSettings, SamplingParams
from shoal.model.transformer import Transformer
from shoal.ops import api as ops
from shoal.ops import dispatch
from shoal.train import policy
from tests.engine.conftest import VOCABULARY, build
from tests.model.parts import pack

# Latent attention with and without q_lora, grouped attention with head norms, with biases, with neither;
# dense, and mixtures by softmax and sigmoid, with shared experts and without.
FAMILIES = ["deepseek-v3", "deepseek-v2-lite", "qwen3-30b-a3b", "r1-distill-qwen-1.5b", "mixtral-8x7b"]
# Chunks of at most 24 tokens, three sequences at a time, pages that end elsewhere.
CHUNKS = EngineSettings(num_pages=200, page_size=8, max_batch_tokens=24, max_sequences=3)
OTHERS = {
    "whole prompts": EngineSettings(num_pages=64, page_size=64),
    "padded steps": EngineSettings(
        num_pages=64, page_size=16, max_batch_tokens=100, buckets=(4, 8), max_sequences=8
    ),
    "without prefixes": replace(CHUNKS, prefix_cache=False, max_sequences=2),
}


def _prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)

    def text(length: int) -> list[int]:
        return torch.randint(VOCABULARY, (length,), generator=draw).tolist()

    shared = text(70)
    return [text(length) for length in (1, 5, 31, 64, 130)] + [shared + text(3), shared + text(11)]


def _generate(model: Transformer, settings: EngineSettings, temperature: float) -> list[Completion]:
    params = SamplingParams(
        max_tokens=6, temperature=temperature, seed=3, routing=model.config.moe is not None, prompt_logprobs=0
    )
    engine = Engine(model, settings)
    engine.generate(_prompts()[-1:], params)  # its prefix is there for those that follow
    return engine.generate(_prompts(), params)


def _score(model: Transformer, batch: Batch, targets_T: Tensor) -> tuple[Tensor, Tensor | None]:
    out = model(batch)
    chosen = [layer.experts_TK for layer in out.routing]
    logp_T = policy.log_probs(out.hidden_TD, model.head_weight(), targets_T)
    return logp_T, torch.stack(chosen, 1) if chosen else None


def _check(model: Transformer, done: Sequence[Completion]) -> None:
    texts = [[*prompt, *one.ids] for prompt, one in zip(_prompts(), done, strict=True)]
    batch = pack(*(text[:-1] for text in texts))
    targets_T = torch.tensor([token for text in texts for token in text[1:]])
    logp_T, experts_TLK = _score(model, batch, targets_T)
    with torch.no_grad():
        assert torch.equal(_score(model, batch, targets_T)[0], logp_T), "gradients change a bit"
    bounds = batch.cu_seqlens_S1.tolist()
    for prompt, one, start, end in zip(_prompts(), done, bounds, bounds[1:], strict=False):
        assert torch.equal(torch.tensor(one.logprobs), logp_T[start + len(prompt) - 1 : end])
        assert one.prompt_logprobs is not None
        assert torch.equal(torch.tensor(one.prompt_logprobs), logp_T[start : start + len(prompt) - 1])
        if experts_TLK is not None:
            assert one.routing is not None
            assert torch.equal(one.routing.long(), experts_TLK[start:end])


@pytest.mark.parametrize("family", FAMILIES)
def test_engine_and_trainer_agree_to_the_last_bit(family: str) -> None:
    model = build(family)
    with dispatch.batch_invariant():
        _check(model, _generate(model, CHUNKS, 1.0))


@pytest.mark.parametrize("how", OTHERS)
def test_they_agree_however_the_engine_serves(how: str) -> None:
    model = build("deepseek-v3")
    with dispatch.batch_invariant():
        _check(model, _generate(model, OTHERS[how], 0.0))


def test_without_the_mode_they_do_not() -> None:
    """Or the test above would say nothing."""
    model = build("deepseek-v3")
    with pytest.raises(AssertionError):
        _check(model, _generate(model, CHUNKS, 1.0))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_in_the_mode_has_the_plain_gradients(family: str) -> None:
    model = build(family)
    texts = _prompts()
    batch = pack(*(text[:-1] or text for text in texts))
    chosen = [layer.experts_TK for layer in model(batch).routing]
    if chosen:  # a near tie may go either way, and then gradients differ by more than rounding
        batch = replace(batch, routing=torch.stack(chosen, 1))
    grads = []
    for on in (False, True):
        with dispatch.batch_invariant(on):
            hidden_TD, targets_T = model(batch).hidden_TD, batch.ids_T.roll(-1)
            ones_T = torch.ones(batch.num_tokens)
            loss = ops.linear_cross_entropy(hidden_TD, model.head_weight(), targets_T, ones_T).total
            grads.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for plain, ours in zip(*grads, strict=True):
        assert (plain is None) == (ours is None)
        if plain is not None and ours is not None:
            # Rounding of float32 through some twenty products each way, in parts of the largest.
            assert (plain - ours).abs().max() <= 1e-3 * plain.abs().max()
