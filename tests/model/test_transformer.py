"""Laws of the whole model: texts in a pack do not see each other, choices replay, initialisation is as
published.

Two ways to the same value in float32 change the order of sums of at most some hundred terms, a few layers
deep: tens of units of 2^-24. 1e-5 of the scale is 170 units.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shoal.batch import Batch
from shoal.config.families import tiny
from shoal.config.model import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig, YarnScaling
from shoal.model.mla import MLA
from shoal.model.rope import inverse_frequencies
from shoal.model.transformer import Output, Transformer
from tests.model import parts

CLOSE = 1e-5
V3 = ModelConfig(
    "deepseek_v3",
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    attention=MLAConfig(3, 12, 8, 4, 8, q_lora_rank=10),
    rope=RopeConfig(interleaved=True, scaling=YarnScaling(40.0, 16, mscale=1.0, mscale_all_dim=1.0)),
    moe=MoEConfig(
        8,
        3,
        10,
        n_shared_experts=1,
        first_k_dense_replace=1,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    ),
    num_nextn_predict_layers=2,
    initializer_range=0.02,
)
QWEN2 = ModelConfig(
    "qwen2",
    50,
    24,
    40,
    2,
    GQAConfig(4, 2, 6, qkv_bias=True),
    tie_word_embeddings=True,
    initializer_range=0.02,
)
CONFIGS = {"v3": V3, "qwen2": QWEN2}
configs = pytest.mark.parametrize("name", CONFIGS)
TEXTS = [parts.draw_ids(50, length, seed) for seed, length in enumerate((7, 1, 20, 4))]


def _model(name: str, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(CONFIGS[name], dtype=dtype)
    parts.fill(model)
    return model


def _assert_close(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() <= CLOSE * wanted.abs().max()


# --------------------------------------------------------------------------------------------------
# Packs


def _run(model: Transformer, texts: list[list[int]]) -> list[Output]:
    """What the model says, then what its prediction modules say, each of the hidden states of the one
    before."""
    batch = parts.pack(*texts)
    outputs = [model(batch)]
    for depth in range(model.config.num_nextn_predict_layers):
        ahead = [(text + [0] * (depth + 1))[depth + 1 :] for text in texts]
        ahead_T = parts.pack(*ahead).ids_T
        outputs.append(model.predict_ahead(outputs[-1].hidden_TD, ahead_T, batch, depth))
    return outputs


@configs
def test_a_text_in_a_pack_is_the_text_alone(name: str) -> None:
    model = _model(name)
    packed = _run(model, TEXTS)
    lengths = [len(text) for text in TEXTS]
    for output, *alone in zip(packed, *(_run(model, [text]) for text in TEXTS), strict=True):
        for rows, single in zip(output.hidden_TD.split(lengths), alone, strict=True):
            _assert_close(rows, single.hidden_TD)


@configs
def test_gradients_of_a_pack_are_the_sum_of_gradients_alone(name: str) -> None:
    model = _model(name)

    def gradients(packs: list[list[list[int]]]) -> list[Tensor]:
        model.zero_grad()
        for texts in packs:
            for output in _run(model, texts):
                model.logits(output.hidden_TD, parts.pack(*texts)).square().sum().backward(retain_graph=True)
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    together, alone = gradients([TEXTS]), gradients([[text] for text in TEXTS])
    assert len(together) == len(alone) == len(list(model.parameters()))
    for got, wanted in zip(together, alone, strict=True):
        _assert_close(got, wanted)


@configs
def test_a_later_token_changes_nothing_before_it(name: str) -> None:
    model, text = _model(name), TEXTS[2]
    changed = [*text[:-1], (text[-1] + 1) % 50]
    before, after = (model(parts.pack(ids)).hidden_TD for ids in (text, changed))
    _assert_close(after[:-1], before[:-1])
    assert (after[-1] - before[-1]).abs().max() > 0.01 * before[-1].abs().max()


@configs
def test_a_step_without_tokens(name: str) -> None:
    """A rank may have none while others do."""
    model = _model(name)
    for output in _run(model, []):
        assert output.hidden_TD.shape == (0, 24)
        assert model.logits(output.hidden_TD, parts.pack()).shape == (0, 50)


@configs
@pytest.mark.parametrize("sizes", [[[3], [1], [12, 5], []], [[7], [1], [20], [4]]])
def test_cached_is_uncached(name: str, sizes: list[list[int]]) -> None:
    model = _model(name).eval()
    with torch.inference_mode():
        cache = parts.Cache(model.config, len(TEXTS))
        got = parts.through_cache(cache, TEXTS, sizes, lambda batch, _: model(batch).hidden_TD)
        for text, hidden_TD in zip(TEXTS, got, strict=True):
            _assert_close(hidden_TD, model(parts.pack(text)).hidden_TD)


def test_prediction_modules_have_a_cache_of_their_own() -> None:
    model, text = _model("v3").eval(), TEXTS[2]
    _, *wanted = _run(model, [text])
    ahead = [[*text[1:], 0], [*text[2:], 0, 0]]

    def forward(batch: Batch, spans: dict[int, range]) -> Tensor:
        span = slice(spans[0].start, spans[0].stop)
        hidden_TD = model(batch).hidden_TD
        rows = []
        for depth in range(2):
            hidden_TD = model.predict_ahead(
                hidden_TD, torch.tensor(ahead[depth][span]), batch, depth
            ).hidden_TD
            rows.append(hidden_TD)
        return torch.stack(rows, dim=1)

    with torch.inference_mode():
        (got_T2D,) = parts.through_cache(parts.Cache(model.config, 1), [text], [[6, 3]], forward)
    for depth, output in enumerate(wanted):
        _assert_close(got_T2D[:, depth], output.hidden_TD.detach())


# --------------------------------------------------------------------------------------------------
# Layers, choices, rows


def test_which_layers_route() -> None:
    assert V3.moe is not None
    every_other = replace(
        V3, num_hidden_layers=5, moe=replace(V3.moe, first_k_dense_replace=1, moe_layer_freq=2)
    )
    model = Transformer(every_other, device="meta")
    routes = ["mlp.experts.down_proj" in dict(layer.named_parameters()) for layer in model.model.layers]
    assert routes == [False, False, True, False, True, False, True]  # the last two are prediction modules
    assert len(model.gates()) == 3


def test_recorded_choices_replay() -> None:
    model, batch = _model("v3"), parts.pack(*TEXTS)
    first = model(batch)
    assert len(first.routing) == 2
    recorded_TLK = torch.stack([routing.experts_TK for routing in first.routing], dim=1)
    again = model(replace(batch, routing=recorded_TLK))
    assert torch.equal(again.hidden_TD, first.hidden_TD)

    reversed_TLK = recorded_TLK.flip(1)
    other = model(replace(batch, routing=reversed_TLK))
    assert [torch.equal(r.experts_TK, reversed_TLK[:, layer]) for layer, r in enumerate(other.routing)] == [
        True
    ] * 2
    assert not torch.equal(other.hidden_TD, first.hidden_TD)


@pytest.mark.parametrize("name", ["v3", "qwen2"])
def test_parts_one_after_another_are_the_whole(name: str) -> None:
    """A part keeps what it needs and no more; together they have all. Recorded choices are of the whole."""
    whole, batch = _model(name), parts.pack(*TEXTS)
    blocks = whole.config.num_hidden_layers
    want = whole(batch)
    if want.routing:
        recorded_TLK = torch.stack([routing.experts_TK for routing in want.routing], dim=1).flip(1)
        batch = replace(batch, routing=recorded_TLK)
        want = whole(batch)
    stream_TD, routing, names = None, (), set[str]()
    for layers in (range(blocks - 1), range(blocks - 1, blocks)):
        part = _model(name)
        part.keep(layers)
        out = part(batch, stream_TD, layers)
        assert (out.ends, out.before) == (layers.stop == blocks, len(routing))
        stream_TD, routing, names = out.hidden_TD, routing + out.routing, names | part.state_dict().keys()
        assert [number for number, _ in part.model.blocks()][: len(layers)] == list(layers)
        assert ("model.norm.weight" in part.state_dict()) == out.ends
        assert "model.embed_tokens.weight" in part.state_dict()  # both ends read it
    assert names == whole.state_dict().keys()
    assert stream_TD is not None
    _assert_close(stream_TD, want.hidden_TD)
    assert all(torch.equal(a.experts_TK, b.experts_TK) for a, b in zip(routing, want.routing, strict=True))


def test_a_middle_part_has_blocks_alone() -> None:
    model = _model("v3")
    model.keep([1])
    assert all(name.startswith("model.layers.1.") for name in model.state_dict())


def test_logits_are_of_the_rows_asked_for() -> None:
    model, batch = _model("v3"), parts.pack(*TEXTS)
    hidden_TD = model(batch).hidden_TD
    every_TV = model.logits(hidden_TD, batch)
    assert every_TV.shape == (32, 50)
    last_S = torch.tensor([31, 6])
    _assert_close(model.logits(hidden_TD, replace(batch, last_S=last_S)), every_TV[last_S])


@configs
@torch.no_grad()
def test_logits_go_where_they_are_wanted(name: str) -> None:
    model, batch = _model(name), parts.pack(*TEXTS)
    hidden_TD, out = model(batch).hidden_TD, torch.full((40, 50), math.nan)
    got_TV = model.logits(hidden_TD, batch, out)
    assert got_TV.data_ptr() == out.data_ptr() and out[len(got_TV) :].isnan().all()
    _assert_close(got_TV, model.logits(hidden_TD, batch))
    alone_1V = model.logits(hidden_TD[:1], batch, out)
    _assert_close(alone_1V, model.logits(hidden_TD[:1], batch))


def test_a_tied_head_is_the_embedding() -> None:
    model, batch = _model("qwen2"), parts.pack(*TEXTS)
    assert "lm_head.weight" not in model.state_dict()
    assert model.head_weight() is model.model.embed_tokens.weight
    hidden_TD = model(batch).hidden_TD
    _assert_close(model.logits(hidden_TD, batch), hidden_TD @ model.model.embed_tokens.weight.t())
    assert _model("v3").head_weight() is not _model("v3").model.embed_tokens.weight


# --------------------------------------------------------------------------------------------------
# Birth


@pytest.fixture
def poison() -> Iterator[None]:
    """Fresh floating-point memory is NaN."""
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")


@configs
@pytest.mark.usefixtures("poison")
def test_init_weights(name: str) -> None:
    """Of n normal draws the standard deviation scatters by 1 / sqrt(2n) of itself, the mean by 1 /
    sqrt(n): both are held to five times that."""
    model = Transformer(CONFIGS[name])
    model.init_weights(torch.Generator().manual_seed(0))
    for tensor_name, tensor in model.state_dict().items():
        if "norm" in tensor_name:
            assert tensor.eq(1).all(), tensor_name
        elif "bias" in tensor_name:
            assert tensor.eq(0).all(), tensor_name
        else:
            n = tensor.numel()
            assert float(tensor.std()) == pytest.approx(0.02, rel=5 / math.sqrt(2 * n)), tensor_name
            assert float(tensor.mean()) == pytest.approx(0, abs=5 * 0.02 / math.sqrt(n)), tensor_name


def test_the_seed_decides_the_weights() -> None:
    def born(seed: int) -> dict[str, Tensor]:
        model = Transformer(V3)
        model.init_weights(torch.Generator().manual_seed(seed))
        return model.state_dict()

    first, again, other = born(0), born(0), born(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@configs
@pytest.mark.usefixtures("poison")
def test_from_meta_to_memory(name: str) -> None:
    born = _model(name)
    model = Transformer(CONFIGS[name], device="meta")
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.allocate("cpu")
    model.load_state_dict(born.state_dict())
    config = CONFIGS[name]
    wanted = inverse_frequencies(config.rope, config.attention.rope_dim)
    assert model.model.rotary.inverse_R2.tolist() == pytest.approx(wanted)
    batch = parts.pack(*TEXTS)
    assert torch.equal(model(batch).hidden_TD, born(batch).hidden_TD)


def test_weights_that_are_read_at_once_lie_together() -> None:
    model = Transformer(V3, device="meta")
    attentions = [block.self_attn for _, block in model.model.blocks() if isinstance(block.self_attn, MLA)]
    for attention in attentions:
        attention.lay("cpu")
    model.allocate("cpu")
    parts.fill(model)
    for attention in attentions:
        first, second = attention.q_a_proj.weight, attention.kv_a_proj_with_mqa.weight
        assert second.data_ptr() == first.data_ptr() + first.nbytes
    other, batch = Transformer(V3), parts.pack(*TEXTS)
    other.load_state_dict(model.state_dict())
    _assert_close(model(batch).hidden_TD, other(batch).hidden_TD)


def test_a_narrow_model_keeps_its_gate_bias_and_its_angles_wide() -> None:
    model = _model("v3", torch.bfloat16)
    wide = {
        name
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.dtype != torch.bfloat16
    }
    assert wide == {
        "model.rotary.inverse_R2",
        *(f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in range(1, 5)),
    }
    output = model(parts.pack(*TEXTS))
    assert output.hidden_TD.dtype == torch.bfloat16
    assert output.hidden_TD.isfinite().all()


def test_the_names_of_a_prediction_module() -> None:
    """What README_WEIGHTS of DeepSeek-V3 lists for layer 61, but for the shared embedding and head."""
    model = Transformer(tiny("deepseek-v3"), device="meta")
    layer = model.config.num_hidden_layers
    prefix = f"model.layers.{layer}."
    names = {name.removeprefix(prefix) for name in model.state_dict() if name.startswith(prefix)}
    block = {
        name.removeprefix(f"model.layers.{layer - 1}.")
        for name in model.state_dict()
        if f".{layer - 1}." in name
    }
    ahead = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
    assert names == block | ahead


@pytest.mark.parametrize(
    "name", ["deepseek-v3", "mixtral-8x7b", "deepseek-v3.2", "qwen3-30b-a3b", "switch-base-128"]
)
def test_the_beginning_of_a_model_has_a_layer_of_each_kind(name: str) -> None:
    """It is the model's own: the same modules, which give what the model's first blocks give."""
    config = replace(tiny(name), num_hidden_layers=6)
    model = Transformer(config).eval()
    parts.fill(model)
    whole = list(model.model.layers)
    short = model.beginning()
    layers = list(short.model.layers)
    assert list(model.model.layers) == whole
    assert layers == whole[: len(layers)]
    assert {type(block.mlp) for block in layers} == {type(block.mlp) for block in whole[:6]}
    assert len({type(block.mlp) for block in layers[:-1]}) < len({type(block.mlp) for block in layers})
    batch = parts.pack(parts.draw_ids(config.vocab_size, 9))
    assert len(layers) < 6
    stream_TD = model(batch, layers=range(len(layers))).hidden_TD
    torch.testing.assert_close(short(batch).hidden_TD, model.model.norm(stream_TD), rtol=CLOSE, atol=CLOSE)
