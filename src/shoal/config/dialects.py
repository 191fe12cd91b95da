"""The dialects of `config.json`: for each `model_type` its keys, and what they mean to a ModelConfig.

A dialect is a row of DIALECTS: the keys that shape its computation, with the defaults of its class in
transformers (for `deepseek`, which has none, of the model's own code); the keys of which it knows one value;
and a small function each way between keys and the parts of a model that differ, attention and experts.

The law: a default is the class's own, never ours. What all dialects share is left to hf.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal.config.model import (
    Attention,
    GQAConfig,
    IndexerConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    NSAConfig,
)

Fields = Mapping[str, Any]
Values = Mapping[str, tuple[Any, ...]]

# Called the same in the files of DeepSeek and in MoEConfig; the second row begins with V2.
DEEPSEEK_MOE = (
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "moe_layer_freq",
    "norm_topk_prob",
    "scoring_func",
)
DEEPSEEK_GROUPS = ("topk_method", "n_group", "topk_group", "routed_scaling_factor")
CAPACITY = ("capacity_factor", "eval_capacity_factor")  # ours, in `deepseek` files of models that drop tokens
CHANCE = ("noisy_gate", "random_second")  # ours too
LATENT = (
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "attention_bias",
)
INDEXER = ("index_n_heads", "index_head_dim", "index_topk")
BRANCHES = tuple(field.name for field in dataclasses.fields(NSAConfig))


@dataclass(frozen=True)
class Dialect:
    """One `model_type`. `defaults` are the keys it reads; `fixed`, others and the values they may have."""

    architecture: str
    defaults: Fields
    read: Callable[[Fields], tuple[Attention, MoEConfig | None]]
    write: Callable[[ModelConfig], dict[str, Any]]
    fixed: Values = field(default_factory=dict[str, tuple[Any, ...]])
    rope_theta: float = 10000.0


# --------------------------------------------------------------------------------------------------
# Attention and experts


def _read_gqa(fields: Fields, *, qkv_bias: bool, o_bias: bool, qk_norm: Any = None) -> GQAConfig:
    hidden, heads, head_dim = fields["hidden_size"], fields["num_attention_heads"], fields.get("head_dim")
    if set(fields.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"layer_types is {fields['layer_types']}; every layer must be full_attention")
    if head_dim is None:
        if heads < 1 or hidden % heads:
            raise ValueError(
                f"hidden_size {hidden} is not num_attention_heads {heads} whole heads; give head_dim"
            )
        head_dim = hidden // heads
    shared = fields["num_key_value_heads"]
    return GQAConfig(heads, heads if shared is None else shared, head_dim, qkv_bias, o_bias, qk_norm)


def _read_mla(fields: Fields) -> MLAConfig:
    mla = MLAConfig(fields["num_attention_heads"], **{key: fields[key] for key in LATENT})
    # Keys that repeat what others say: where they say something else, transformers computes something else.
    for key, value in (
        ("num_key_value_heads", mla.num_attention_heads),
        ("qk_head_dim", mla.qk_head_dim),
        ("head_dim", mla.qk_rope_head_dim),
    ):
        if fields[key] not in (None, value):
            raise ValueError(
                f"{key} is {fields[key]} in config.json, but the other keys make it {value}; remove it"
            )
    return mla


ATTENTION = {
    MLAConfig: "latent attention",
    GQAConfig: "grouped-query attention",
    NSAConfig: "native sparse attention",
}


def _write_mla(config: ModelConfig) -> dict[str, Any]:
    mla = config.attention
    if not isinstance(mla, MLAConfig):
        raise ValueError(
            f"a {config.model_type} config.json cannot say {ATTENTION[type(mla)]}; change model_type"
        )
    heads = mla.num_attention_heads
    return {"num_attention_heads": heads, "num_key_value_heads": heads} | {k: getattr(mla, k) for k in LATENT}


def _write_gqa(config: ModelConfig, *keys: str) -> dict[str, Any]:
    gqa = config.attention
    if not isinstance(gqa, GQAConfig):
        raise ValueError(
            f"a {config.model_type} config.json cannot say {ATTENTION[type(gqa)]}; change model_type"
        )
    said = {**dataclasses.asdict(gqa), "attention_bias": gqa.qkv_bias}
    return {key: said[key] for key in ("num_attention_heads", "num_key_value_heads", *keys)}


def _read_deepseek_moe(fields: Fields, **rule: Any) -> MoEConfig | None:
    """None where no layer would route: files of V2 and V3 say a dense model with `first_k_dense_replace`."""
    blocks = fields["num_hidden_layers"] + fields.get("num_nextn_predict_layers", 0)
    if fields["n_routed_experts"] is None or fields["first_k_dense_replace"] >= blocks:
        return None
    keys = [key for key in (*DEEPSEEK_MOE, *DEEPSEEK_GROUPS, *CAPACITY, *CHANCE) if key in fields]
    said = {key: fields[key] for key in keys if fields[key] is not None}
    if "num_experts_per_tok" not in said:
        raise ValueError(
            "config.json has routed experts but no num_experts_per_tok; say how many a token takes"
        )
    moe = MoEConfig(**said, **rule)
    if moe.norm_topk_prob and moe.num_experts_per_tok == 1 and moe.topk_method != "hash":
        raise ValueError(
            "norm_topk_prob is true with num_experts_per_tok 1; DeepSeek's code leaves a single weight as it "
            "is, transformers makes it 1. Set norm_topk_prob to false"
        )
    return moe


def _write_deepseek_moe(config: ModelConfig, *keys: str) -> dict[str, Any]:
    if config.moe is None:
        return {"first_k_dense_replace": config.num_hidden_layers + config.num_nextn_predict_layers}
    return {key: getattr(config.moe, key) for key in (*DEEPSEEK_MOE, *keys)}


def _read_softmax_moe(
    fields: Fields, experts: str, width: str = "moe_intermediate_size", **rule: Any
) -> MoEConfig:
    return MoEConfig(fields[experts], fields["num_experts_per_tok"], fields[width], **rule)


def _write_softmax_moe(config: ModelConfig, experts: str, *keys: str) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        raise ValueError(f"a {config.model_type} config.json cannot say a dense model; change model_type")
    said = {**dataclasses.asdict(moe), experts: moe.n_routed_experts}
    return {key: said[key] for key in (experts, "num_experts_per_tok", *keys)}


# --------------------------------------------------------------------------------------------------
# Dialects


def _read_llama(fields: Fields) -> tuple[GQAConfig, None]:
    bias = fields["attention_bias"]
    return _read_gqa(fields, qkv_bias=bias, o_bias=bias), None


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return _write_gqa(config, "head_dim", "attention_bias")


def _read_qwen2(fields: Fields) -> tuple[GQAConfig, None]:
    return _read_gqa(fields, qkv_bias=True, o_bias=False), None


def _write_qwen2(config: ModelConfig) -> dict[str, Any]:
    return _write_gqa(config, "head_dim")


def _read_qwen3_moe(fields: Fields) -> tuple[GQAConfig, MoEConfig]:
    bias: bool = fields["attention_bias"]
    dense: list[int] = fields["mlp_only_layers"] or []
    if sorted(dense) != list(range(len(dense))):
        raise ValueError(f"mlp_only_layers is {dense}; dense layers must be the first ones, 0 to k - 1")
    moe = _read_softmax_moe(
        fields, "num_experts", norm_topk_prob=fields["norm_topk_prob"], first_k_dense_replace=len(dense)
    )
    return _read_gqa(fields, qkv_bias=bias, o_bias=bias, qk_norm="head"), moe


def _write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    dense = config.moe.first_k_dense_replace if config.moe else 0
    return (
        _write_gqa(config, "head_dim", "attention_bias")
        | _write_softmax_moe(config, "num_experts", "moe_intermediate_size", "norm_topk_prob")
        | {"mlp_only_layers": list(range(dense))}
    )


def _read_mixtral(fields: Fields) -> tuple[GQAConfig, MoEConfig]:
    moe = _read_softmax_moe(fields, "num_local_experts", "intermediate_size", norm_topk_prob=True)
    return _read_gqa(fields, qkv_bias=False, o_bias=False), moe


def _write_mixtral(config: ModelConfig) -> dict[str, Any]:
    return _write_gqa(config, "head_dim") | _write_softmax_moe(config, "num_local_experts")


def _read_olmoe(fields: Fields) -> tuple[GQAConfig, MoEConfig]:
    bias, norm = fields["attention_bias"], fields["norm_topk_prob"]
    moe = _read_softmax_moe(fields, "num_experts", "intermediate_size", norm_topk_prob=norm)
    return _read_gqa(fields, qkv_bias=bias, o_bias=bias, qk_norm="all"), moe


def _write_olmoe(config: ModelConfig) -> dict[str, Any]:
    return _write_gqa(config, "attention_bias") | _write_softmax_moe(config, "num_experts", "norm_topk_prob")


def _read_deepseek(fields: Fields) -> tuple[GQAConfig, MoEConfig | None]:
    bias = fields["attention_bias"]
    return _read_gqa(fields, qkv_bias=bias, o_bias=bias), _read_deepseek_moe(fields)


def _write_deepseek(config: ModelConfig) -> dict[str, Any]:
    ours = [
        key
        for key in (*DEEPSEEK_GROUPS, *CHANCE)
        if config.moe and getattr(config.moe, key) != getattr(MoEConfig, key)
    ]
    written = _write_gqa(config, "attention_bias", "head_dim") | _write_deepseek_moe(config, *CAPACITY, *ours)
    if written["head_dim"] * written["num_attention_heads"] == config.hidden_size:
        del written["head_dim"]
    return {key: value for key, value in written.items() if value is not None}


def _read_deepseek_v2(fields: Fields) -> tuple[MLAConfig, MoEConfig | None]:
    if fields["norm_topk_prob"]:
        raise ValueError(
            "norm_topk_prob is true in a deepseek_v2 config.json: DeepSeek's code then normalises and does "
            "not scale, transformers scales and does not normalise. Set it to false"
        )
    return _read_mla(fields), _read_deepseek_moe(fields)


def _write_deepseek_v2(config: ModelConfig) -> dict[str, Any]:
    return _write_mla(config) | _write_deepseek_moe(config, *DEEPSEEK_GROUPS)


def _read_deepseek_v3(fields: Fields) -> tuple[MLAConfig, MoEConfig | None]:
    moe = _read_deepseek_moe(fields, scoring_func="sigmoid", topk_method="noaux_tc")
    return _read_mla(fields), moe


def _write_deepseek_v3(config: ModelConfig) -> dict[str, Any]:
    ahead = {"num_nextn_predict_layers": config.num_nextn_predict_layers}
    return _write_deepseek_v2(config) | ahead | {"rope_interleave": config.rope.interleaved}


def _read_deepseek_v32(fields: Fields) -> tuple[MLAConfig, MoEConfig | None]:
    if set(fields["layer_types"] or ()) - {"indexed_attention"}:
        raise ValueError(f"layer_types is {fields['layer_types']}; every layer must be indexed_attention")
    dense, blocks = fields["first_k_dense_replace"], fields["num_hidden_layers"]
    kinds = ["dense"] * min(dense, blocks) + ["sparse"] * (blocks - dense)
    if fields["mlp_layer_types"] not in (None, kinds):
        raise ValueError(
            f"mlp_layer_types is {fields['mlp_layer_types']}, but first_k_dense_replace is {dense}; remove it"
        )
    mla, moe = _read_deepseek_v3(fields)
    return dataclasses.replace(mla, indexer=IndexerConfig(**{key: fields[key] for key in INDEXER})), moe


def _write_deepseek_v32(config: ModelConfig) -> dict[str, Any]:
    written, mla = _write_deepseek_v3(config), config.attention
    if not isinstance(mla, MLAConfig) or mla.indexer is None:
        raise ValueError("a deepseek_v32 config.json cannot say full attention; use model_type deepseek_v3")
    return written | {key: getattr(mla.indexer, key) for key in INDEXER}


def _read_nsa(fields: Fields) -> tuple[NSAConfig, MoEConfig | None]:
    heads, shared = fields["num_attention_heads"], fields["num_key_value_heads"]
    said = {key: fields[key] for key in BRANCHES} | {
        "num_key_value_heads": heads if shared is None else shared
    }
    return NSAConfig(**said), _read_deepseek_moe(fields)


def _write_nsa(config: ModelConfig) -> dict[str, Any]:
    nsa = config.attention
    if not isinstance(nsa, NSAConfig):
        raise ValueError(
            f"an nsa config.json cannot say attention by {type(nsa).__name__}; change model_type"
        )
    return dataclasses.asdict(nsa) | _write_deepseek_moe(config)


BASE: Fields = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA: Fields = {**BASE, "head_dim": None, "attention_bias": False}
QWEN2: Fields = {
    **BASE,
    "head_dim": None,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "sliding_window": 4096,  # without effect while use_sliding_window is false, as it must be
    "layer_types": None,
}
QWEN3_MOE: Fields = {
    **QWEN2,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": False,
    "mlp_only_layers": None,
    "attention_bias": False,
}
MIXTRAL: Fields = {
    **BASE,
    "head_dim": None,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
OLMOE: Fields = {
    **BASE,
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": 50279,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "attention_bias": False,
}
DEEPSEEK: Fields = {
    **BASE,
    "vocab_size": 102400,
    "num_hidden_layers": 30,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "attention_bias": False,
    "head_dim": None,  # ours, as are capacities and groups: written where the original cannot say the model
    "n_routed_experts": None,
    "n_shared_experts": None,
    "num_experts_per_tok": None,
    "moe_intermediate_size": 1407,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "capacity_factor": None,
    "eval_capacity_factor": None,
    "noisy_gate": False,
    "random_second": False,
    "topk_method": None,
    "n_group": None,
    "topk_group": None,
    "routed_scaling_factor": None,
}
DEEPSEEK_V2: Fields = {
    **LLAMA,
    "vocab_size": 102400,
    "qk_head_dim": None,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": None,
    "moe_intermediate_size": 1407,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "topk_method": "greedy",
    "n_group": None,
    "topk_group": None,
    "routed_scaling_factor": 1.0,
}
DEEPSEEK_V3: Fields = {
    **{key: value for key, value in DEEPSEEK_V2.items() if key != "topk_method"},
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "rope_interleave": True,
    "num_nextn_predict_layers": 1,
}

DEEPSEEK_V32: Fields = {
    **{key: value for key, value in DEEPSEEK_V3.items() if key != "rope_interleave"},
    "max_position_embeddings": 163840,
    "num_nextn_predict_layers": 0,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
    "layer_types": None,
    "mlp_layer_types": None,
}

NSA: Fields = {  # a dialect of our own: no model of the kind was published
    **{
        key: value
        for key, value in DEEPSEEK.items()
        if key not in ("attention_bias", "head_dim", *CAPACITY, *CHANCE, *DEEPSEEK_GROUPS)
    },
    **dataclasses.asdict(NSAConfig(32, 32, 192, 128)),
    "num_key_value_heads": None,
}
BIASED: Values = {"attention_bias": (True,)}  # q, k and v always have a bias
UNBIASED: Values = {"attention_bias": (False,)}
SOFTMAX: Values = {"scoring_func": ("softmax",)}

DIALECTS: Mapping[str, Dialect] = {
    "llama": Dialect("LlamaForCausalLM", LLAMA, _read_llama, _write_llama),
    "qwen2": Dialect("Qwen2ForCausalLM", QWEN2, _read_qwen2, _write_qwen2, BIASED),
    "qwen3_moe": Dialect("Qwen3MoeForCausalLM", QWEN3_MOE, _read_qwen3_moe, _write_qwen3_moe),
    "mixtral": Dialect(
        "MixtralForCausalLM", MIXTRAL, _read_mixtral, _write_mixtral, UNBIASED, rope_theta=1e6
    ),
    "olmoe": Dialect("OlmoeForCausalLM", OLMOE, _read_olmoe, _write_olmoe),
    "deepseek": Dialect("DeepseekForCausalLM", DEEPSEEK, _read_deepseek, _write_deepseek, SOFTMAX),
    "deepseek_v2": Dialect(
        "DeepseekV2ForCausalLM",
        DEEPSEEK_V2,
        _read_deepseek_v2,
        _write_deepseek_v2,
        SOFTMAX,
    ),
    "deepseek_v3": Dialect(
        "DeepseekV3ForCausalLM",
        DEEPSEEK_V3,
        _read_deepseek_v3,
        _write_deepseek_v3,
        {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    ),
    "deepseek_v32": Dialect(
        "DeepseekV32ForCausalLM",
        DEEPSEEK_V32,
        _read_deepseek_v32,
        _write_deepseek_v32,
        {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "rope_interleave": (True,)},
    ),
    "nsa": Dialect("NSAForCausalLM", NSA, _read_nsa, _write_nsa, SOFTMAX),
}
