"""What the tests of this room share: small real models with random weights, and the forward pass that has no
cache.

The weights are large enough (standard deviation 0.2 at width 64) that logits spread over several units: a
wrong position, page or mask moves the best token, where nearly flat logits would forgive it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from shoal.batch import Batch
from shoal.config.families import tiny
from shoal.model.transformer import Transformer

FAMILIES = [
    "deepseek-v3",
    "deepseek-v3.2",
    "deepseek-v2-lite",
    "nsa-27b",
    "qwen3-30b-a3b",
    "r1-distill-qwen-1.5b",
]
VOCABULARY = 512
# Two ways to the same logits differ by rounding alone: values up to 8, rounded to 2^-24 of themselves by each
# of about two hundred products, norms and sums, make 1e-4. A wrong position or page moves whole units.
TOLERANCE = 1e-4

Uncached = Callable[[Transformer, list[int]], Tensor]


@cache
def build(family: str, eos: tuple[int, ...] | None = None) -> Transformer:
    """The same weights each time, whatever ends a text."""
    model = Transformer(replace(tiny(family), initializer_range=0.2, eos_token_id=eos))
    model.init_weights(torch.Generator().manual_seed(0))
    return model.eval()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Transformer:
    """Latent attention with and without q_lora, sparse attention of both kinds, grouped attention with head
    norms and with biases."""
    return build(request.param)


@pytest.fixture
def v3() -> Transformer:
    return build("deepseek-v3")


@pytest.fixture
def uncached() -> Uncached:
    """Logits (T, V) of one whole text, in one pass that knows no cache."""

    @torch.inference_mode()
    def forward(model: Transformer, ids: list[int]) -> Tensor:
        length = len(ids)
        batch = Batch(
            ids_T=torch.tensor(ids),
            positions_T=torch.arange(length),
            cu_seqlens_S1=torch.tensor([0, length], dtype=torch.int32),
            max_seqlen=length,
        )
        return model.logits(model(batch).hidden_TD, batch)

    return forward


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Eight texts of 1 to 60 tokens; the last two begin alike."""
    draw = torch.Generator().manual_seed(1)

    def text(length: int) -> list[int]:
        return torch.randint(VOCABULARY, (length,), generator=draw).tolist()

    shared = text(24)
    return [text(length) for length in (1, 5, 17, 60, 8, 31)] + [shared + text(3), shared + text(11)]
