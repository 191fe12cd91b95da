"""Laws of native sparse attention in the model: the formulas, a pack is its texts, cached is uncached.

The formulas are written out here from arXiv 2502.11089, section 3, token by token, on the module's weights.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shoal.config.families import tiny
from shoal.config.model import ModelConfig, NSAConfig
from shoal.model.nsa import NSA, Compressor
from shoal.model.transformer import Transformer
from tests.model import parts

EXACT = 1e-11  # of float64: some hundred terms in several products after one another, each good to 1e-16
CLOSE = 1e-5  # where steps differ in size: gates of experts are float32's, as in test_dsa.py
NSA_TINY = NSAConfig(4, 2, 24, 16, 8, 4, 8, 4, sliding_window=12)


def _config(**changes: int) -> ModelConfig:
    config = tiny("nsa-27b")
    assert config.attention == NSA_TINY
    return replace(config, attention=replace(NSA_TINY, **changes))


def _model(config: ModelConfig, seed: int = 0) -> Transformer:
    model = Transformer(config, dtype=torch.float64)
    parts.fill(model, seed)
    return model.eval()


def _logits(model: Transformer, *texts: list[int]) -> Tensor:
    batch = parts.pack(*texts)
    return model.logits(model(batch).hidden_TD, batch)


TEXTS = [parts.draw_ids(512, 61, 0), parts.draw_ids(512, 5, 1), parts.draw_ids(512, 40, 2)]


def _compress(part: Compressor, x_LX: Tensor) -> Tensor:
    flat = torch.cat([x_X + place_X for x_X, place_X in zip(x_LX, part.position, strict=True)])
    return part.down_proj.weight @ torch.nn.functional.silu(part.up_proj.weight @ flat)


@torch.no_grad()
def test_the_module_is_the_papers_formulas() -> None:
    model = _model(_config())
    layer, n = model.model.layers[0].self_attn, 61
    assert isinstance(layer, NSA)
    x_TD = torch.randn(n, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    batch = parts.pack([0] * n)
    angles = model.model.rotary(batch.positions_T)

    def turn(x_Q: Tensor, t: int) -> Tensor:
        a, b, cos, sin = x_Q[:12], x_Q[12:], angles.cos_TR2[t].double(), angles.sin_TR2[t].double()
        return torch.cat((a * cos - b * sin, b * cos + a * sin))

    q_THQ = layer.q_proj(x_TD).view(n, 4, 24)
    k_T3GQ, v_T3GV = layer.k_proj(x_TD).view(n, 3, 2, 24), layer.v_proj(x_TD).view(n, 3, 2, 16)
    gates_T3H = layer.g_proj(x_TD).sigmoid().view(n, 3, 4)
    entries = [
        [_compress(part, x_T3GX[4 * j : 4 * j + 8, 0, g]) for g in range(2)]
        for part, x_T3GX in ((layer.k_compress, k_T3GQ), (layer.v_compress, v_T3GV))
        for j in range((n - 8) // 4 + 1)
    ]
    half = len(entries) // 2
    keys, values = entries[:half], entries[half:]
    rows = []
    for t in range(n):
        heads: list[Tensor] = []
        complete = [j for j in range(half) if 4 * j + 7 <= t]
        queries = [turn(q_THQ[t, h], t) for h in range(4)]
        shares = {
            h: torch.tensor(
                [float(queries[h] @ turn(keys[j][h // 2], 4 * j + 7)) * 24**-0.5 for j in complete],
                dtype=torch.float64,
            ).softmax(0)
            for h in range(4)
        }
        for h in range(4):
            g, own = h // 2, t // 8
            compressed = sum(
                (s * values[j][g] for s, j in zip(shares[h], complete, strict=True)), torch.zeros(16)
            )
            value = [0.0] * (own + 1)
            for h2 in (2 * g, 2 * g + 1):
                for share, j in zip(shares[h2], complete, strict=True):
                    for block in (4 * j // 8, (4 * j + 4) // 8):
                        value[min(block, own)] += float(share) if block <= own else 0.0
            forced = {0, own, own - 1}
            best = sorted(range(own + 1), key=lambda b: (b not in forced, -value[b], b))[:4]
            read = [m for m in range(t + 1) if m // 8 in best]

            def attend(branch: int, places: list[int], q_Q: Tensor, g: int) -> Tensor:
                logits = [q_Q @ turn(k_T3GQ[m, branch, g], m) * 24**-0.5 for m in places]
                weights = torch.stack(logits).softmax(0)
                return weights @ v_T3GV[places, branch, g]

            window = list(range(max(0, t - 11), t + 1))
            gates = gates_T3H[t, :, h]
            heads.append(
                gates[0] * compressed
                + gates[1] * attend(1, read, queries[h], g)
                + gates[2] * attend(2, window, queries[h], g)
            )
        rows.append(layer.o_proj.weight @ torch.cat(heads))
    wanted_TD, got_TD = torch.stack(rows), layer(x_TD, angles, batch)
    assert (got_TD - wanted_TD).abs().max() <= EXACT * wanted_TD.abs().max()


def test_a_pack_is_its_texts_and_a_token_sees_no_later_one() -> None:
    model = _model(_config())
    together = _logits(model, *TEXTS)
    alone = torch.cat([_logits(model, text) for text in TEXTS])
    assert (together - alone).abs().max() <= CLOSE * alone.abs().max()
    changed = _logits(model, [*TEXTS[0][:50], *TEXTS[2][:11]])
    assert (changed[:50] - together[:50]).abs().max() <= CLOSE * together.abs().max()


@pytest.mark.parametrize("page_size", [4, 16, 3])
@pytest.mark.parametrize("sizes", [[[], [], []], [[33, 9], [3], [40]], [[60], [5], [13, 14]]])
def test_cached_is_uncached(sizes: list[list[int]], page_size: int) -> None:
    """Chunks that begin where all blocks are read and go on where some are; blocks that end across chunks."""
    model = _model(_config())
    cache = parts.Cache(model.config, 3, page_size=page_size, dtype=torch.float64)
    cache.free += range(49, 49 + 40)
    cache.pages = tuple(torch.cat((page, page.clone())) for page in cache.pages)
    with torch.inference_mode():
        got = parts.through_cache(
            cache, TEXTS, sizes, lambda batch, _: model.logits(model(batch).hidden_TD, batch)
        )
    for text, logits_TV in zip(TEXTS, got, strict=True):
        wanted_TV = _logits(model, text)
        assert (logits_TV - wanted_TV).abs().max() <= CLOSE * wanted_TV.abs().max()


def test_every_parameter_learns() -> None:
    model = _model(_config()).train()
    _logits(model, *TEXTS).square().mean().backward()
    for name, parameter in model.named_parameters():
        if ".self_attn." in name:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compress_block": 6}, "compress_block is 6, no multiple of compress_stride 4"),
        ({"select_block": 10}, "select_block is 10"),
        ({"select_topk": 2}, "of select_topk 2"),
        ({"select_local": 0}, "select_local 0"),
        ({"qk_head_dim": 7}, "qk_head_dim is 7"),
        ({"num_key_value_heads": 3}, "not divisible"),
        ({"sliding_window": 0}, "sliding_window is 0"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(NSA_TINY, **changes)
