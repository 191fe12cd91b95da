"""Laws of grouped-query attention: it is the textbook's, with every family's biases and norms, cached or
not.

The modules run in float64 here, where the two sides differ by roundings of 2^-53 over sums of some hundred
terms: within 1e-12 of the scale.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shoal.batch import Batch
from shoal.config.model import GQAConfig, ModelConfig
from shoal.model.gqa import GQA
from shoal.model.rope import Angles
from tests.model import parts

EXACT = 1e-12
HIDDEN, EPS = 20, 1e-3
PLAIN = GQAConfig(num_attention_heads=6, num_key_value_heads=2, head_dim=4)
SHAPES = {
    "grouped": PLAIN,
    "multi-head": replace(PLAIN, num_key_value_heads=6),
    "multi-query": replace(PLAIN, num_key_value_heads=1),
    "qwen2": replace(PLAIN, qkv_bias=True),
    "llama with biases": replace(PLAIN, qkv_bias=True, o_bias=True),
    "qwen3": replace(PLAIN, qk_norm="head"),
    "olmoe": replace(PLAIN, num_key_value_heads=6, qk_norm="all"),
}
shapes = pytest.mark.parametrize("shape", SHAPES)


def _layer(shape: str) -> tuple[GQA, ModelConfig]:
    config = ModelConfig("llama", 7, HIDDEN, 8, 1, SHAPES[shape], rms_norm_eps=EPS)
    layer = GQA(config, SHAPES[shape], 0, device=None, dtype=torch.float64)
    parts.fill(layer)
    return layer, config


def _hidden(tokens: int, seed: int = 1) -> Tensor:
    return torch.randn(tokens, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _angles(batch: Batch) -> Angles:
    """Two pairs, turning by 1 and by 0.1 a position."""
    angles_TR2 = batch.positions_T.double().unsqueeze(1) * torch.tensor([1.0, 0.1], dtype=torch.float64)
    return Angles(angles_TR2.cos(), angles_TR2.sin())


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().sum() / len(x) + EPS).sqrt() * weight


def _turn(x_Q: Tensor, position: int) -> Tensor:
    (a, b, c, d), slow, fast = x_Q, 0.1 * position, 1.0 * position
    turned = (
        a * math.cos(fast) - c * math.sin(fast),
        b * math.cos(slow) - d * math.sin(slow),
        a * math.sin(fast) + c * math.cos(fast),
        b * math.sin(slow) + d * math.cos(slow),
    )
    return torch.stack(turned)


def _literal(layer: GQA, gqa: GQAConfig, x_TD: Tensor) -> Tensor:
    weights = {name: tensor.detach() for name, tensor in layer.state_dict().items()}

    def product(name: str, x: Tensor) -> Tensor:
        biased = gqa.o_bias if name == "o_proj" else gqa.qkv_bias
        return weights[f"{name}.weight"] @ x + (weights[f"{name}.bias"] if biased else 0.0)

    def heads(name: str, x_D: Tensor, position: int | None) -> list[Tensor]:
        """Of q, k or v; normalised and turned, but for v, which has no position."""
        x_X = product(f"{name}_proj", x_D)
        if name != "v" and gqa.qk_norm == "all":
            x_X = _norm(x_X, weights[f"{name}_norm.weight"])
        each = list(x_X.split(gqa.head_dim))
        if name != "v" and gqa.qk_norm == "head":
            each = [_norm(head, weights[f"{name}_norm.weight"]) for head in each]
        return each if position is None else [_turn(head, position) for head in each]

    queries = [heads("q", x_D, t) for t, x_D in enumerate(x_TD)]
    keys = [heads("k", x_D, t) for t, x_D in enumerate(x_TD)]
    values = [heads("v", x_D, None) for x_D in x_TD]
    rows = []
    for t in range(len(x_TD)):
        outputs = []
        for h in range(gqa.num_attention_heads):
            g = h * gqa.num_key_value_heads // gqa.num_attention_heads
            weight = [math.exp(float(queries[t][h] @ keys[j][g]) / 2) for j in range(t + 1)]  # 4^-0.5
            outputs.append(sum(weight[j] * values[j][g] for j in range(t + 1)) / sum(weight))
        rows.append(product("o_proj", torch.cat(outputs)))
    return torch.stack(rows)


def test_what_is_stored() -> None:
    matrices = {f"{name}_proj.weight" for name in "qkvo"}
    biases = {f"{name}_proj.bias" for name in "qkv"}
    extra = {
        "qwen2": biases,
        "llama with biases": biases | {"o_proj.bias"},
        "qwen3": {"q_norm.weight", "k_norm.weight"},
        "olmoe": {"q_norm.weight", "k_norm.weight"},
    }
    for shape in SHAPES:
        assert set(_layer(shape)[0].state_dict()) == matrices | extra.get(shape, set())


@shapes
def test_gqa_is_the_textbook(shape: str) -> None:
    layer, _ = _layer(shape)
    x_TD, batch = _hidden(13), parts.pack([0] * 13)
    wanted_TD = _literal(layer, SHAPES[shape], x_TD)
    got_TD = layer(x_TD, _angles(batch), batch)
    assert (got_TD - wanted_TD).abs().max() <= EXACT * wanted_TD.abs().max()


@shapes
@pytest.mark.parametrize("sizes", [[[], []], [[5, 3, 4], [2]], [[11], [6]]])
def test_cached_is_uncached(shape: str, sizes: list[list[int]]) -> None:
    layer, config = _layer(shape)
    texts = [_hidden(17, 1), _hidden(9, 2)]

    def forward(batch: Batch, spans: dict[int, range]) -> Tensor:
        x_TD = torch.cat([texts[s][span.start : span.stop] for s, span in spans.items()])
        return layer(x_TD, _angles(batch), batch)

    cache = parts.Cache(config, 2, dtype=torch.float64)
    got = parts.through_cache(cache, [[0] * len(text) for text in texts], sizes, forward)
    for text, y_TD in zip(texts, got, strict=True):
        batch = parts.pack([0] * len(text))
        wanted_TD = layer(text, _angles(batch), batch)
        assert (y_TD - wanted_TD).abs().max() <= EXACT * wanted_TD.abs().max()
