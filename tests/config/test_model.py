"""ModelConfig and its parts: what could not be built cannot be written down, and the message says what to do.

The law: every refusal names the field and its value. Derived figures are held to constants worked out by hand
from the formulas of the papers.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoal.config.families import family
from shoal.config.model import (
    Fp8Blocks,
    GQAConfig,
    LinearScaling,
    Llama3Scaling,
    MLAConfig,
    ModelConfig,
    RopeConfig,
    YarnScaling,
)

V3 = family("deepseek-v3").config
assert V3.moe is not None
V3_MOE = V3.moe


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        (GQAConfig(4, 2, 16), {"num_attention_heads": 5}, "num_attention_heads 5.*num_key_value_heads 2"),
        (GQAConfig(4, 2, 16), {"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        (GQAConfig(4, 2, 16), {"head_dim": 15}, "head_dim is 15.*even"),
        (V3.attention, {"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63.*even"),
        (V3.attention, {"q_lora_rank": 0}, "q_lora_rank is 0; use null"),
        (V3.attention, {"kv_lora_rank": -1}, "kv_lora_rank is -1"),
        (V3_MOE, {"num_experts_per_tok": 257}, "num_experts_per_tok is 257.*256 routed"),
        (V3_MOE, {"n_routed_experts": 255}, "255 is not divisible by n_group 8"),
        (V3_MOE, {"topk_group": 9}, "topk_group 9 exceeds n_group 8"),
        (V3_MOE, {"topk_group": 1, "num_experts_per_tok": 33}, "leaves only 32"),
        (V3_MOE, {"n_group": 256, "topk_group": 8}, "fewer than two"),
        (V3_MOE, {"topk_method": "greedy"}, "ignores groups.*n_group is 8"),
        (V3_MOE, {"topk_method": "top1"}, "topk_method is 'top1'; known are greedy"),
        (V3_MOE, {"scoring_func": "tanh"}, "scoring_func is 'tanh'"),
        (V3_MOE, {"n_shared_experts": -1}, "n_shared_experts is -1"),
        (V3_MOE, {"first_k_dense_replace": -1}, "first_k_dense_replace is -1"),
        (V3_MOE, {"moe_layer_freq": 0}, "moe_layer_freq is 0"),
        (V3_MOE, {"capacity_factor": 0.0}, "capacity_factor is 0.0.*null"),
        (V3, {"hidden_size": 0}, "hidden_size is 0"),
        (V3, {"intermediate_size": 0}, "intermediate_size is 0, but 3 layers are dense"),
        (V3, {"num_hidden_layers": 2}, "first_k_dense_replace is 3.*num_hidden_layers 2"),
        (V3, {"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
        (V3, {"eos_token_id": (1, 129280)}, "eos_token_id is 129280.*vocabulary of 129280"),
        (V3, {"bos_token_id": -1}, "bos_token_id is -1"),
        (V3, {"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        (YarnScaling(40.0, 4096), {"factor": 0.5}, "factor is 0.5"),
        (YarnScaling(40.0, 4096), {"beta_slow": 32.0}, "beta_fast 32.0 must exceed beta_slow 32.0"),
        (Llama3Scaling(8.0, 8192), {"high_freq_factor": 1.0}, "high_freq_factor 1.0 must exceed"),
        (LinearScaling(2.0), {"factor": 0.0}, "factor is 0.0"),
        (RopeConfig(), {"theta": 0.0}, "theta is 0.0"),
        (Fp8Blocks(), {"weight_block_size": (0, 128)}, r"weight_block_size is \(0, 128\)"),
    ],
)
def test_refuses_what_cannot_be_built(part: ModelConfig, changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(part, **changes)


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("deepseek-v2", 0.1147214),
        ("deepseek-v2-lite", 0.1147214),
        ("deepseek-v2.5", 0.1352338),
        ("deepseek-v3", 0.1352338),
        ("moonlight-16b-a3b", 0.0721688),
        ("llama-3.1-405b", 128**-0.5),
    ],
)
def test_softmax_scale(name: str, scale: float) -> None:
    # The constants have seven decimals, so half a unit of the last is the whole of the error.
    assert family(name).config.softmax_scale == pytest.approx(scale, abs=0.5e-7)


def test_yarn_scales_cos_and_sin_by_the_ratio_of_its_temperatures() -> None:
    yarn = YarnScaling(40.0, 4096)
    plain = 1.3688879  # 0.1 ln 40 + 1
    assert yarn.rotary_factor == pytest.approx(plain, abs=0.5e-7)
    assert replace(yarn, mscale=0.707, mscale_all_dim=0.707).rotary_factor == 1.0
    assert replace(yarn, mscale=1.0, mscale_all_dim=0.707).rotary_factor == pytest.approx(plain / 1.2608038)
    assert replace(yarn, attention_factor=2.0).rotary_factor == 2.0
    assert yarn.softmax_factor == 1.0


def test_layers_route_after_the_dense_ones_at_the_given_frequency() -> None:
    config = replace(V3, num_hidden_layers=9, moe=replace(V3_MOE, moe_layer_freq=2))
    assert [config.is_moe_layer(layer) for layer in range(10)] == [
        *(False, False, False, False, True, False, True, False, True),
        False,
    ]
    assert (config.num_moe_layers, config.num_dense_layers, config.num_cached_layers) == (3, 6, 10)
    assert not replace(config, moe=None).is_moe_layer(8)


def test_what_a_token_leaves_in_the_cache() -> None:
    assert MLAConfig(128, 512, 128, 64, 128).cache_shape == (576,)
    assert GQAConfig(64, 8, 128).cache_shape == (2, 8, 128)
