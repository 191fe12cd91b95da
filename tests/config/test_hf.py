"""config.json: what is written reads back equal, transformers reads the same model, no key is passed over.

The oracle is transformers' own config classes: what they write we read, from what we write they build a model
whose tensors are ours, and what a file leaves out is what they would fill in.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from shoal.config.dialects import DIALECTS
from shoal.config.families import FAMILIES, family, tiny
from shoal.config.hf import IGNORED, from_hf, to_hf
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
from shoal.model.transformer import Transformer

DATA = Path(__file__).parents[3] / "shared" / "data" / "deepseek" / "configs_hf"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"DeepSeek's published configs are not at {DATA}")

V3_MOE, QWEN3_MOE = family("deepseek-v3").config.moe, family("qwen3-30b-a3b").config.moe
assert V3_MOE is not None
assert QWEN3_MOE is not None

ROWS = list(FAMILIES)
# One name for each config, the first: some models differ by their weights alone.
FULL = {name: config for config, name in {family(name).config: name for name in reversed(ROWS)}.items()}
TINY = {name: twin for twin, name in {tiny(name): name for name in reversed(ROWS)}.items()}
V3 = TINY["deepseek-v3"]
VARIANTS = {
    "several ends": replace(V3, eos_token_id=(1, 2)),
    "no ends": replace(V3, bos_token_id=None, eos_token_id=None),
    "two prediction modules": replace(V3, num_nextn_predict_layers=2),
    "halves rotated": replace(V3, rope=replace(V3.rope, interleaved=False)),
    "dense latent": replace(V3, moe=None),
    "biased latent": replace(V3, attention=MLAConfig(4, 32, 16, 8, 16, q_lora_rank=24, attention_bias=True)),
    "float8": replace(V3, dtype="bfloat16", quantization=Fp8Blocks((64, 32), "ue8m0")),
    "tied": replace(TINY["r1-distill-qwen-1.5b"], tie_word_embeddings=True),
    "biased": replace(TINY["llama-3-8b"], attention=GQAConfig(4, 2, 16, qkv_bias=True, o_bias=True)),
    "stretched": replace(TINY["llama-3-8b"], rope=RopeConfig(scaling=LinearScaling(2.0))),
    "yarn": replace(
        TINY["qwen3-30b-a3b"], rope=RopeConfig(1e6, scaling=YarnScaling(4.0, 64, attention_factor=1.5))
    ),
    "bands": replace(TINY["mixtral-8x7b"], rope=RopeConfig(1e6, scaling=Llama3Scaling(8.0, 64, 2.0, 5.0))),
    "dense first": replace(TINY["qwen3-30b-a3b"], moe=replace(QWEN3_MOE, first_k_dense_replace=1)),
    "frequency": replace(V3, num_hidden_layers=5, moe=replace(V3_MOE, moe_layer_freq=2)),
}
CONFIGS = {
    **FULL,
    **{f"tiny {name}": twin for name, twin in TINY.items()},
    **VARIANTS,
}
# What transformers has a class for and computes as we do; it does not know of moe_layer_freq.
IN_TRANSFORMERS = {
    name: config
    for name, config in (TINY | VARIANTS).items()
    if config.model_type in CONFIG_MAPPING and name != "frequency"
}


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name: str) -> None:
    assert from_hf(json.loads(json.dumps(to_hf(CONFIGS[name])))) == CONFIGS[name]


@needs_data
@pytest.mark.parametrize("folder", ["DeepSeek-V2-Lite", "DeepSeek-V3-0324"])
def test_published_files_survive(folder: str) -> None:
    raw = _published(folder)
    written = to_hf(from_hf(raw))
    # As transformers 5 puts it: the two rotary keys are one table, and dtype has lost its prefix.
    scaling = {"rope_type" if key == "type" else key: value for key, value in raw.pop("rope_scaling").items()}
    raw["rope_parameters"] = {"rope_theta": raw.pop("rope_theta"), **scaling}
    raw["dtype"] = raw.pop("torch_dtype")
    assert raw.pop("attention_dropout") == 0.0
    assert {key: written.get(key) for key in raw if key not in IGNORED} == {
        key: value for key, value in raw.items() if key not in IGNORED
    }


@needs_data
def test_deepseek_v4_is_refused_with_its_reasons() -> None:
    with pytest.raises(
        ValueError, match=r"'deepseek_v4' is not supported.*compress_ratios.*hc_mult.*fp4|FP4"
    ):
        from_hf(_published("DeepSeek-V4-Flash"))


def _published(folder: str) -> dict[str, Any]:
    return json.loads((DATA / folder / "config.json").read_text())


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
@pytest.mark.parametrize("whole", [False, True], ids=["what differs", "every key"])
def test_reads_what_transformers_writes(name: str, whole: bool) -> None:
    theirs = _their_config(IN_TRANSFORMERS[name])
    assert from_hf(json.loads(theirs.to_json_string(use_diff=not whole))) == IN_TRANSFORMERS[name]


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
def test_transformers_builds_the_same_model(name: str) -> None:
    config = IN_TRANSFORMERS[name]
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(_their_config(config))
    shapes = {key: tensor.shape for key, tensor in theirs.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    # Prediction modules are not in transformers' model; it makes them apart, to draft with.
    main = replace(config, num_nextn_predict_layers=0)
    ours = Transformer(main, device="meta").state_dict()
    assert shapes == {key: tensor.shape for key, tensor in ours.items()}


@pytest.mark.parametrize(
    "name", [name for name, config in IN_TRANSFORMERS.items() if config.moe or config.rope.scaling]
)
def test_transformers_reads_the_numbers_that_shape_no_tensor(name: str) -> None:
    config = IN_TRANSFORMERS[name]
    theirs, moe, scaling = _their_config(config), config.moe, config.rope.scaling
    assert theirs.rope_parameters["rope_theta"] == config.rope.theta
    assert theirs.rope_parameters.get("factor") == (scaling.factor if scaling else None)
    assert (theirs.rms_norm_eps, theirs.max_position_embeddings) == (
        config.rms_norm_eps,
        config.max_position_embeddings,
    )
    if isinstance(config.attention, MLAConfig):
        assert getattr(theirs, "rope_interleave", True) == config.rope.interleaved
    if moe is None:
        return
    assert theirs.num_experts_per_tok == moe.num_experts_per_tok
    assert getattr(theirs, "norm_topk_prob", moe.norm_topk_prob) == moe.norm_topk_prob
    assert getattr(theirs, "routed_scaling_factor", 1.0) == moe.routed_scaling_factor
    assert (getattr(theirs, "n_group", 1), getattr(theirs, "topk_group", 1)) == (moe.n_group, moe.topk_group)


def _their_config(config: ModelConfig) -> Any:
    return AutoConfig.for_model(**to_hf(config))


@pytest.mark.parametrize("model_type", sorted(set(DIALECTS) - {"deepseek", "nsa"}))
def test_what_a_file_leaves_out_is_the_default_of_its_class(model_type: str) -> None:
    # V2's class has no default for how many experts a token takes, so that alone is given.
    bare = {"num_experts_per_tok": 6} if model_type == "deepseek_v2" else {}
    theirs = AutoConfig.for_model(model_type, **bare)
    assert from_hf({"model_type": model_type, **bare}) == from_hf(
        json.loads(theirs.to_json_string(use_diff=False))
    )


def test_both_layouts_say_the_same() -> None:
    old = to_hf(V3)
    parameters = old.pop("rope_parameters")
    old["rope_theta"] = parameters.pop("rope_theta")
    old["rope_scaling"] = {"type": parameters.pop("rope_type"), **parameters}
    old["torch_dtype"] = f"torch.{old.pop('dtype')}"
    assert from_hf(old) == V3


def test_the_older_layout_is_written_for_deepseek_moe() -> None:
    raw = to_hf(TINY["deepseek-moe-16b"])
    assert (raw["rope_theta"], raw["rope_scaling"]) == (10000.0, None)
    assert {"rope_parameters", "head_dim", "capacity_factor"}.isdisjoint(raw)


def test_other_names_of_a_key() -> None:
    raw = to_hf(V3)
    raw["num_mtp_layers"] = raw.pop("num_nextn_predict_layers")
    raw["num_local_experts"] = raw.pop("n_routed_experts")
    assert from_hf(raw) == V3
    with pytest.raises(
        ValueError, match="num_local_experts is 16 but n_routed_experts, the same, is 8; keep one"
    ):
        from_hf(raw | {"n_routed_experts": 8})


NEUTRAL = {
    "qwen2": {
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_window_layers": 21,
        "use_mrope": False,
    },
    "llama": {"mlp_bias": False, "pretraining_tp": 2, "rope_scaling": None, "pad_token_id": 0},
    "qwen3_moe": {"mlp_only_layers": [], "decoder_sparse_step": 1, "router_aux_loss_coef": 0.01},
    "olmoe": {"clip_qkv": None, "attention_dropout": 0.0},
    "deepseek_v3": {"ep_size": 1, "seq_aux": True, "aux_loss_alpha": 0.001, "head_dim": 8, "qk_head_dim": 24},
}
TWINS = {config.model_type: config for config in TINY.values()}


@pytest.mark.parametrize("model_type", NEUTRAL)
def test_keys_that_change_nothing(model_type: str) -> None:
    assert from_hf(to_hf(TWINS[model_type]) | NEUTRAL[model_type]) == TWINS[model_type]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"hiden_size": 64}, "unknown key 'hiden_size' = 64.*nearest known is 'hidden_size'"),
    ("llama", {"hidden_size": "64"}, "hidden_size is '64'.*must be an integer"),
    ("llama", {"hidden_size": None}, "hidden_size is None"),
    ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1.*true or false"),
    ("llama", {"eos_token_id": ["</s>"]}, "eos_token_id is .*an integer"),
    ("llama", {"mlp_bias": True}, "mlp_bias is True.*only False"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'.*only 'silu'"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    ("llama", {"head_dim": None, "num_attention_heads": 6}, "hidden_size 64 .*num_attention_heads 6"),
    ("llama", {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is 1"),
    ("llama", {"dtype": "float8"}, "dtype is 'float8'"),
    ("llama", {"torch_dtype": "bfloat16"}, "gives dtype twice, as 'float32' and 'bfloat16'"),
    ("llama", {"rope_theta": 1.0}, "gives rope_theta twice, as 1.0 and"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "both rope_scaling and rope_parameters"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "type": "yarn"}}, "rope_type twice"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factr": 2.0}},
        "'yarn' has no factr; known are factor",
    ),
    ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "needs a factor"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": "2"}}, "factor of .* is '2'"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
        "truncate is False",
    ),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "must be a number"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ("llama", {"rope_parameters": 10000.0}, "rope_parameters is 10000.0.*a table"),
    (
        "llama",
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quant_method is 'gptq'.*not quantised",
    ),
    ("llama", {"quantization_config": {"bits": 4}}, "quant_method is None"),
    ("deepseek_v3", {"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, "fmt is 'e5m2'"),
    (
        "deepseek_v3",
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}},
        "weight_block_size is None",
    ),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .*full_attention"),
    ("qwen2", {"attention_bias": False}, "attention_bias is False.*only True"),
    ("mixtral", {"sliding_window": 4096}, "sliding_window is 4096"),
    ("mixtral", {"router_jitter_noise": 0.01}, "router_jitter_noise is 0.01"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers is \[1\].*first"),
    ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers is 1.*in a list"),
    ("deepseek", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'.*only 'softmax'"),
    ("deepseek", {"num_experts_per_tok": None}, "no num_experts_per_tok"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is true.*does not scale"),
    ("deepseek_v2", {"topk_method": "noaux"}, "topk_method is 'noaux'; known are greedy"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method is 'greedy'.*only 'noaux_tc'"),
    ("deepseek_v3", {"num_key_value_heads": 1}, "num_key_value_heads is 1.*make it 4"),
    ("deepseek_v3", {"head_dim": 24}, "head_dim is 24.*make it 8"),
    ("deepseek_v3", {"num_experts_per_tok": 1}, "norm_topk_prob is true with num_experts_per_tok 1"),
    (
        "deepseek_v3",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale_all_dim": 1.0}},
        "one of mscale and mscale_all_dim",
    ),
]


@pytest.mark.parametrize(("model_type", "changes", "words"), REFUSED)
def test_refuses(model_type: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_hf(to_hf(TWINS[model_type]) | changes)


def test_refuses_model_types_it_does_not_know() -> None:
    for raw, words in (
        ({}, "None"),
        ({"model_type": "gpt2"}, "Known are llama"),
        ({"model_type": "deepseek_v4"}, "compress_ratios"),
    ):
        with pytest.raises(
            ValueError, match=rf"model_type .* is not supported.*{words}|{words} is not supported"
        ):
            from_hf(raw)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (replace(V3, model_type="llama"), "llama config.json cannot say latent attention"),
        (replace(TINY["llama-3-8b"], model_type="deepseek_v3"), "cannot say grouped-query attention"),
        (replace(TINY["nsa-27b"], model_type="llama"), "cannot say native sparse attention"),
        (replace(TINY["mixtral-8x7b"], moe=None), "cannot say a dense model"),
        (replace(TINY["mixtral-8x7b"], model_type="llama"), "cannot say moe ="),
        (replace(V3, model_type="deepseek_v2"), "no deepseek_v2 config.json says this model"),
        (replace(TINY["llama-3-8b"], num_nextn_predict_layers=1), "cannot say num_nextn_predict_layers = 1"),
        (
            replace(TINY["llama-3-8b"], attention=GQAConfig(4, 2, 16, qkv_bias=True)),
            "cannot say attention = .*o_bias=False",
        ),
    ],
)
def test_refuses_to_write_what_would_read_back_otherwise(config: ModelConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        to_hf(config)
