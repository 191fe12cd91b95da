"""The law of batch-invariant mode: what the engine said of a token, the trainer says too, bit for bit.

However the engine came by it: in chunks of a prompt, behind a prefix that was there, beside few or many
others, by pages of any size. The trainer reads the whole text at once, in a pack with all the others, with
gradients and without.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shoal.batch import Batch
from shoal.config.families import tiny
from shoal.engine import Completion, Engine, EngineSettings, SamplingParams
from shoal.model.transformer import Transformer
from shoal.ops import api as ops
from shoal.ops import dispatch
from shoal.train import policy
from tests.engine.conftest import VOCABULARY, build
from tests.model.parts import pack
from tests.ops.parts import scalars_in_arrays

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


def _prompts(*longer: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)

    def text(length: int) -> list[int]:
        return torch.randint(VOCABULARY, (length,), generator=draw).tolist()

    shared = text(70)
    lengths = (1, 5, 31, 64, 130, *longer)
    return [text(length) for length in lengths] + [shared + text(3), shared + text(11)]


def _generate(
    model: Transformer, settings: EngineSettings, temperature: float, prompts: list[list[int]] | None = None
) -> list[Completion]:
    prompts = prompts or _prompts()
    params = SamplingParams(
        max_tokens=6, temperature=temperature, seed=3, routing=model.config.moe is not None, prompt_logprobs=0
    )
    engine = Engine(model, settings)
    engine.generate(prompts[-1:], params)  # its prefix is there for those that follow
    return engine.generate(prompts, params)


def _score(model: Transformer, batch: Batch, targets_T: Tensor) -> tuple[Tensor, Tensor | None]:
    out = model(batch)
    chosen = [layer.experts_TK for layer in out.routing]
    logp_T = policy.log_probs(out.hidden_TD, model.head_weight(), targets_T)
    return logp_T, torch.stack(chosen, 1) if chosen else None


def _check(model: Transformer, done: Sequence[Completion], prompts: list[list[int]] | None = None) -> None:
    prompts, device = prompts or _prompts(), model.head_weight().device
    texts = [[*prompt, *one.ids] for prompt, one in zip(prompts, done, strict=True)]
    batch = pack(*(text[:-1] for text in texts)).to(device)
    targets_T = torch.tensor([token for text in texts for token in text[1:]], device=device)
    logp_T, experts_TLK = _score(model, batch, targets_T)
    with torch.no_grad():
        assert torch.equal(_score(model, batch, targets_T)[0], logp_T), "gradients change a bit"
    logp_T = logp_T.cpu()
    bounds = batch.cu_seqlens_S1.tolist()
    for prompt, one, start, end in zip(prompts, done, bounds, bounds[1:], strict=False):
        assert torch.equal(torch.tensor(one.logprobs), logp_T[start + len(prompt) - 1 : end])
        assert one.prompt_logprobs is not None
        assert torch.equal(torch.tensor(one.prompt_logprobs), logp_T[start : start + len(prompt) - 1])
        if experts_TLK is not None:
            assert one.routing is not None
            assert torch.equal(one.routing.long(), experts_TLK[start:end].cpu())


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["chunks", *OTHERS])
def test_and_so_on_a_gpu(how: str, family: str, dtype: torch.dtype) -> None:
    """Also with a text longer than two pieces of attention and than a warp's tokens of the router."""
    config = replace(tiny(family), initializer_range=0.2, max_position_embeddings=8192)
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    model = model.to("cuda", dtype).eval()
    prompts = _prompts(300, 5000)
    settings = replace({"chunks": CHUNKS, **OTHERS}[how], num_pages=2000)
    with dispatch.batch_invariant():
        _check(model, _generate(model, settings, 1.0, prompts), prompts)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
@scalars_in_arrays
@pytest.mark.parametrize("family", ["deepseek-v3", "qwen3-30b-a3b"])
def test_and_so_by_kernels_in_the_interpreter(family: str) -> None:
    """Two layers and short texts: every kernel of either side, without a compiler's say in the order."""
    config = replace(tiny(family), num_hidden_layers=2, num_nextn_predict_layers=0, initializer_range=0.2)
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    prompts = [list(range(9)), [7, 8]]
    settings = replace(CHUNKS, max_batch_tokens=6)
    with dispatch.using("triton"), dispatch.batch_invariant():
        _check(model.eval(), _generate(model, settings, 1.0, prompts), prompts)


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
