"""Laws of latent attention: it is the paper's equations, and its absorbed form over a cache is its
expanded form.

The modules run in float64 here, where the two sides differ by roundings of 2^-53 over sums of some hundred
terms: within 1e-12 of the scale. One test repeats the equality in float32, the precision of tests against
other programs.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shoal.batch import Batch, Chunk
from shoal.config.model import MLAConfig, ModelConfig, RopeConfig, YarnScaling
from shoal.model.mla import MLA
from shoal.model.rope import Angles
from tests.model import parts

EXACT = 1e-12
HIDDEN, VOCAB = 24, 7
# Odd dims wherever oddness is allowed, none of them equal.
PLAIN = MLAConfig(3, kv_lora_rank=9, qk_nope_head_dim=5, qk_rope_head_dim=4, v_head_dim=7)
SHAPES = {
    "plain": PLAIN,
    "q_lora": replace(PLAIN, q_lora_rank=11),
    "biases": replace(PLAIN, q_lora_rank=11, attention_bias=True),
    "biases, no q_lora": replace(PLAIN, attention_bias=True),
    "one head": replace(PLAIN, num_attention_heads=1),
}
shapes = pytest.mark.parametrize("shape", SHAPES)
V2 = YarnScaling(40.0, 4096, mscale=0.707, mscale_all_dim=0.707)


def _config(mla: MLAConfig, rope: RopeConfig) -> ModelConfig:
    return ModelConfig("deepseek_v3", VOCAB, HIDDEN, 8, 1, mla, rope, rms_norm_eps=0.5)


def _layer(shape: str, rope: RopeConfig, dtype: torch.dtype = torch.float64) -> tuple[MLA, ModelConfig]:
    config = _config(SHAPES[shape], rope)
    layer = MLA(config, SHAPES[shape], 0, device=None, dtype=dtype)
    parts.fill(layer)
    return layer, config


def _hidden(tokens: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, HIDDEN, dtype=torch.float64, generator=generator).to(dtype)


def _angles(batch: Batch, dtype: torch.dtype = torch.float64) -> Angles:
    """Two pairs, turning by 1 and by 0.1 a position."""
    angles_TR2 = batch.positions_T.double().unsqueeze(1) * torch.tensor([1.0, 0.1], dtype=torch.float64)
    return Angles(angles_TR2.cos().to(dtype), angles_TR2.sin().to(dtype))


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm with the released code's 1e-6, whatever the config's rms_norm_eps."""
    return x / (x.square().sum() / len(x) + 1e-6).sqrt() * weight


def _turn(x_R: Tensor, position: int, interleaved: bool) -> Tensor:
    out_R = torch.empty_like(x_R)
    for pair, angle in enumerate((1.0 * position, 0.1 * position)):
        a, b = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 2)
        out_R[a] = x_R[a] * math.cos(angle) - x_R[b] * math.sin(angle)
        out_R[b] = x_R[a] * math.sin(angle) + x_R[b] * math.cos(angle)
    return out_R


def _literal(layer: MLA, mla: MLAConfig, x_TD: Tensor, scale: float, interleaved: bool) -> Tensor:
    """DeepSeek-V2 eq. 9-19 (arXiv 2405.04434) for one sequence, token by token and head by head."""
    weights = {name: tensor.detach() for name, tensor in layer.state_dict().items()}
    N, V, H = mla.qk_nope_head_dim, mla.v_head_dim, mla.num_attention_heads

    def product(name: str, x: Tensor) -> Tensor:
        biased = mla.attention_bias and name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")
        return weights[f"{name}.weight"] @ x + (weights[f"{name}.bias"] if biased else 0.0)

    queries, keys, values = [], [], []
    for t, x_D in enumerate(x_TD):
        q_X = (
            product("q_proj", x_D)
            if mla.q_lora_rank is None
            else product("q_b_proj", _norm(product("q_a_proj", x_D), weights["q_a_layernorm.weight"]))
        )
        compressed_X = product("kv_a_proj_with_mqa", x_D)
        latent_C = _norm(compressed_X[: mla.kv_lora_rank], weights["kv_a_layernorm.weight"])
        k_rope_R = _turn(compressed_X[mla.kv_lora_rank :], t, interleaved)
        kv_X = product("kv_b_proj", latent_C)
        queries.append([])
        keys.append([])
        values.append([])
        for h in range(H):
            q_Q = q_X[h * mla.qk_head_dim : (h + 1) * mla.qk_head_dim]
            kv_h = kv_X[h * (N + V) : (h + 1) * (N + V)]
            queries[t].append(torch.cat((q_Q[:N], _turn(q_Q[N:], t, interleaved))))
            keys[t].append(torch.cat((kv_h[:N], k_rope_R)))
            values[t].append(kv_h[N:])
    rows = []
    for t in range(len(x_TD)):
        heads = []
        for h in range(H):
            weight = [math.exp(scale * float(queries[t][h] @ keys[j][h])) for j in range(t + 1)]
            heads.append(sum(weight[j] * values[j][h] for j in range(t + 1)) / sum(weight))
        rows.append(product("o_proj", torch.cat(heads)))
    return torch.stack(rows)


@shapes
@pytest.mark.parametrize("interleaved", [True, False])
def test_mla_is_the_equations_of_the_paper(shape: str, interleaved: bool) -> None:
    layer, _ = _layer(shape, RopeConfig(interleaved=interleaved, scaling=V2))
    x_TD, batch = _hidden(13), parts.pack([0] * 13)
    scale = 9**-0.5 * (0.1 * 0.707 * math.log(40) + 1) ** 2
    wanted_TD = _literal(layer, SHAPES[shape], x_TD, scale, interleaved)
    got_TD = layer(x_TD, _angles(batch), batch)
    assert (got_TD - wanted_TD).abs().max() <= EXACT * wanted_TD.abs().max()


SIZES = {"token by token": [[], []], "chunks": [[5, 3, 4], [2]], "prompts, then tokens": [[11], [6]]}


@shapes
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, EXACT), (torch.float32, 1e-5)])
def test_absorbed_is_expanded(shape: str, sizes: str, dtype: torch.dtype, limit: float) -> None:
    """In float32 three products of up to 24 terms change their order: each moves a result by some units of
    2^-24, and a score of size 10, exponentiated, by tens of them. 1e-5 is 170 units."""
    layer, config = _layer(shape, RopeConfig(interleaved=True), dtype)
    texts = [_hidden(17, 1, dtype), _hidden(9, 2, dtype)]

    def forward(batch: Batch, spans: dict[int, range]) -> Tensor:
        x_TD = torch.cat([texts[s][span.start : span.stop] for s, span in spans.items()])
        return layer(x_TD, _angles(batch, dtype), batch)

    cache = parts.Cache(config, 2, dtype=dtype)
    got = parts.through_cache(cache, [[0] * len(text) for text in texts], SIZES[sizes], forward)
    for text, y_TD in zip(texts, got, strict=True):
        batch = parts.pack([0] * len(text))
        wanted_TD = layer(text, _angles(batch, dtype), batch)
        assert (y_TD - wanted_TD).abs().max() <= limit * wanted_TD.abs().max()


LONG = {
    "a chunk after a long context": [[3, 40, 37], [1, 1]],
    "two chunks in a step, decodes between": [[1, 40, 1, 33], [5, 45], [20, 1, 1]],
    "the first chunk of a prompt beside decodes": [[2], [1, 1], [35]],
}


@pytest.mark.parametrize("sizes", LONG)
@pytest.mark.parametrize("step", [None, 7])
def test_a_chunk_expanded_beside_decodes_is_the_whole(
    sizes: str, step: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every way to cut a mixed step gives what one pass over each text gives; `step` positions a piece."""
    layer, config = _layer("q_lora", RopeConfig(interleaved=True))
    if step is not None:
        monkeypatch.setattr("shoal.model.mla.PIECE_KEYS", step * 3)
    texts = [_hidden(sum(each) + 3, seed) for seed, each in enumerate(LONG[sizes])]
    expanded: list[int] = []

    def forward(batch: Batch, spans: dict[int, range]) -> Tensor:
        assert batch.kv is not None
        if batch.kv.has_prefix:
            expanded.extend(chunk.new for chunk in batch.kv.chunks if layer.expands(chunk))
        x_TD = torch.cat([texts[s][span.start : span.stop] for s, span in spans.items()])
        return layer(x_TD, _angles(batch), batch)

    cache = parts.Cache(config, len(texts), page_size=8, dtype=torch.float64)
    # Texts that begin later than others: a prompt read while its neighbours decode.
    warm = {s: each[:1] for s, each in enumerate(LONG[sizes]) if len(each) > 1}
    for s, (size,) in warm.items():
        batch = cache.feed({s: [0] * size})
        layer(texts[s][:size], _angles(batch), batch)
    rows: list[list[Tensor]] = [[] for _ in texts]
    turns = [each[1:] if s in warm else each for s, each in enumerate(LONG[sizes])]
    turns = [[*each, 1, 1, 1] for each in turns]
    done = [warm[s][0] if s in warm else 0 for s in range(len(texts))]
    for turn in range(max(map(len, turns))):
        now = {s: range(done[s], done[s] + each[turn]) for s, each in enumerate(turns) if turn < len(each)}
        batch = cache.feed({s: [0] * len(span) for s, span in now.items()})
        for s, y in zip(now, forward(batch, now).split([len(span) for span in now.values()]), strict=True):
            rows[s].append(y)
            done[s] = now[s].stop
    assert expanded
    for s, text in enumerate(texts):
        batch = parts.pack([0] * len(text))
        wanted_TD = layer(text, _angles(batch), batch)[-sum(turns[s]) :]
        assert (torch.cat(rows[s]) - wanted_TD).abs().max() <= EXACT * wanted_TD.abs().max()


@pytest.mark.parametrize(
    ("prefix", "new"), [(0, 32), (0, 31), (30_000, 171), (30_000, 170), (100, 64), (4096, 2048)]
)
def test_a_chunk_is_expanded_where_that_takes_fewer_flops(prefix: int, new: int) -> None:
    """Counted pair by pair, for V3's dims."""
    published = MLAConfig(128, 512, 128, 64, 128)
    config = _config(published, RopeConfig(interleaved=True))
    layer = MLA(config, published, 0, device=torch.device("meta"), dtype=torch.float32)
    pairs = (
        sum(prefix + i for i in range(new)) + new / 2
    )  # a query and itself count half, as in n (p + n / 2)
    absorbed, expanded = pairs * (512 + 64 + 512), pairs * (192 + 128) + prefix * 512 * 256
    assert layer.expands(Chunk(0, 0, new, prefix + new)) == (new >= 32 and expanded < absorbed)


def test_the_cache_keeps_the_normal_latent_and_the_turned_key() -> None:
    layer, config = _layer("q_lora", RopeConfig(interleaved=True))
    cache = parts.Cache(config, 1, page_size=4, dtype=torch.float64)
    x_TD, batch = _hidden(6), cache.feed({0: [0] * 6})
    layer(x_TD, _angles(batch), batch)
    assert batch.kv is not None
    rows_TL = cache.pages[0].flatten(0, 1)[batch.kv.slots_T]
    assert rows_TL.shape == (6, 9 + 4)
    compressed_TX = x_TD @ layer.kv_a_proj_with_mqa.weight.t()
    for t, row_L in enumerate(rows_TL):
        latent_C = _norm(compressed_TX[t, :9], layer.kv_a_layernorm.weight)
        wanted_L = torch.cat((latent_C, _turn(compressed_TX[t, 9:], t, interleaved=True)))
        assert (row_L - wanted_L).abs().max() <= EXACT * wanted_L.abs().max()
    unwritten = cache.pages[0].numel() - rows_TL.numel()
    assert int(cache.pages[0].isnan().sum()) == unwritten


@pytest.mark.parametrize(
    ("scaling", "wanted"),
    [(V2, 0.1147214), (replace(V2, mscale=1.0, mscale_all_dim=1.0), 0.1352338), (None, 0.0721688)],
)
def test_softmax_scale_of_the_released_models(scaling: YarnScaling | None, wanted: float) -> None:
    published = MLAConfig(16, 512, 128, 64, 128)
    config = _config(published, RopeConfig(interleaved=True, scaling=scaling))
    layer = MLA(config, published, 0, device=torch.device("meta"), dtype=torch.float32)
    assert layer.scale == pytest.approx(wanted, abs=5e-8)
