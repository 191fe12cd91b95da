"""Families: the rows are what DeepSeek published, and a tiny twin has every feature of its family.

The rows are held to DeepSeek's own files: the `config.json` of the hub and the configs of its inference code.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal.config import hf
from shoal.config.families import FAMILIES, family, tiny
from shoal.config.model import GQAConfig, MLAConfig, ModelConfig, NSAConfig, YarnScaling

DATA = Path(__file__).parents[3] / "shared" / "data" / "deepseek"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"DeepSeek's published configs are not at {DATA}")

ROWS = sorted(FAMILIES)


def test_names_are_lower_case_words() -> None:
    assert all(
        name == row.name and name == name.lower() and " " not in name for name, row in FAMILIES.items()
    )


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(ValueError, match="'DeepSeek-V3-Base'; nearest are deepseek-v3,"):
        family("DeepSeek-V3-Base")


@needs_data
@pytest.mark.parametrize(
    ("name", "folder"), [("deepseek-v2-lite", "DeepSeek-V2-Lite"), ("deepseek-v3", "DeepSeek-V3-0324")]
)
def test_a_row_is_its_hub_file(name: str, folder: str) -> None:
    published = hf.from_hf(json.loads((DATA / "configs_hf" / folder / "config.json").read_text()))
    assert published.initializer_range == 0.02  # what the file says; the paper trained with 0.006
    assert replace(published, initializer_range=0.006) == family(name).config


@needs_data
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("deepseek-v2-lite", "config_16B"),
        ("deepseek-v2.5", "config_236B"),
        ("deepseek-v3", "config_671B"),
        ("deepseek-v3.1", "config_v3.1"),
    ],
)
def test_a_row_is_its_native_config(name: str, file: str) -> None:
    native: dict[str, Any] = json.loads((DATA / "configs_native" / f"{file}.json").read_text())
    assert _native(family(name).config).items() >= native.items()


def _native(config: ModelConfig) -> dict[str, Any]:
    """The config in the words of DeepSeek's inference code; what a file leaves out is that code's default."""
    mla, moe, scaling = config.attention, config.moe, config.rope.scaling
    assert isinstance(mla, MLAConfig)
    assert moe is not None
    assert isinstance(scaling, YarnScaling)
    return {
        "vocab_size": config.vocab_size,
        "dim": config.hidden_size,
        "inter_dim": config.intermediate_size,
        "moe_inter_dim": moe.moe_intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_dense_layers": moe.first_k_dense_replace,
        "n_heads": mla.num_attention_heads,
        "n_routed_experts": moe.n_routed_experts,
        "n_shared_experts": moe.n_shared_experts,
        "n_activated_experts": moe.num_experts_per_tok,
        "n_expert_groups": moe.n_group,
        "n_limited_groups": moe.topk_group,
        "route_scale": moe.routed_scaling_factor,
        "score_func": moe.scoring_func,
        "q_lora_rank": mla.q_lora_rank or 0,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "mscale": scaling.mscale,
        "dtype": "fp8" if config.quantization else "bf16",
        "scale_fmt": config.quantization and config.quantization.scale_fmt,
    }


@pytest.mark.parametrize("name", ROWS)
def test_a_twin_has_the_features_of_its_family(name: str) -> None:
    config = family(name).config
    twin = tiny(name)
    assert twin == tiny(config)
    assert _features(twin) == _features(config)
    assert (twin.hidden_size, twin.vocab_size, twin.dtype) == (64, 512, "float32")
    assert 2 <= twin.num_hidden_layers <= 4


def _features(config: ModelConfig) -> dict[str, Any]:
    """Whatever changes which code runs, and nothing that only changes how much of it."""
    attention, moe, scaling = config.attention, config.moe, config.rope.scaling
    features: dict[str, Any] = {
        "model_type": config.model_type,
        "prediction modules": config.num_nextn_predict_layers,
        "tied": config.tie_word_embeddings,
        "rope": (config.rope.theta, config.rope.interleaved, type(scaling), getattr(scaling, "factor", None)),
        "mscale": (getattr(scaling, "mscale", None), getattr(scaling, "mscale_all_dim", None)),
        "one width": moe is not None and moe.moe_intermediate_size == config.intermediate_size,
    }
    if isinstance(attention, GQAConfig):
        heads, shared = attention.num_attention_heads, attention.num_key_value_heads
        features["grouped"] = heads > shared
        features["wide"] = heads * attention.head_dim > config.hidden_size
        features["bias and norm"] = (attention.qkv_bias, attention.o_bias, attention.qk_norm)
    elif isinstance(attention, NSAConfig):
        heads, shared = attention.num_attention_heads, attention.num_key_value_heads
        features["grouped"] = heads > shared
        features["two widths"] = attention.qk_head_dim > attention.v_head_dim
        features["forced"] = attention.select_topk > attention.select_first + attention.select_local
    else:
        features["latent"] = (attention.q_lora_rank is not None, attention.attention_bias)
    if moe is not None:
        features["rule"] = (moe.scoring_func, moe.topk_method, moe.norm_topk_prob, moe.routed_scaling_factor)
        features["choices"] = min(moe.num_experts_per_tok, 3)
        features["groups"] = moe.n_group > 1
        features["shared experts"] = moe.n_shared_experts
        features["capacity"] = (moe.capacity_factor, moe.eval_capacity_factor)
        features["dense layers"] = (moe.first_k_dense_replace > 0, moe.moe_layer_freq)
    return features
