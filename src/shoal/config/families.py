"""Named models: each is a row of data, told by what differs from the row it descends from.

A row says what is built (a ModelConfig) and what its authors printed about it, so that `cost` can be held to
the papers. `tiny` shrinks any row to a twin for a laptop that keeps every structural feature. Rows are for
training from scratch too: DeepSeek's have the initialisation of the papers (0.006), not the 0.02 of their
`config.json` files, which `hf.from_hf` reads as it stands.

What is left to others: what the fields mean (model.py), counting them (cost.py), `config.json` (hf.py).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from shoal.config.model import (
    Attention,
    Fp8Blocks,
    GQAConfig,
    IndexerConfig,
    Llama3Scaling,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    NSAConfig,
    RopeConfig,
    YarnScaling,
)


@dataclass(frozen=True)
class Figure:
    """A parameter count as printed, and which of the two embedding matrices (input, head) it counts.

    The sources seldom say; `embeddings` is the choice under which the exact count gives the printed digits.
    """

    text: str
    embeddings: Literal["both", "head", "neither"] = "both"


@dataclass(frozen=True)
class Family:
    """A row. Figures leave out prediction modules, and are None where nothing was printed for this shape."""

    name: str
    config: ModelConfig
    total: Figure | None
    active: Figure | None
    source: str


def sized(row: ModelConfig, hidden: int, intermediate: int, layers: int, attention: Attention) -> ModelConfig:
    """The row at another size."""
    return replace(
        row,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        attention=attention,
    )


# --------------------------------------------------------------------------------------------------
# DeepSeek LLM and DeepSeekMoE: Llama's attention, rotary halves

LLM_7B = ModelConfig(
    model_type="llama",
    vocab_size=102400,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=30,
    attention=GQAConfig(num_attention_heads=32, num_key_value_heads=32, head_dim=128),
    bos_token_id=100000,
    eos_token_id=100001,
)
LLM_67B = sized(LLM_7B, 8192, 22016, 95, GQAConfig(64, 8, 128))
MOE_16B = replace(
    sized(LLM_7B, 2048, 10944, 28, GQAConfig(16, 16, 128)),
    model_type="deepseek",
    moe=MoEConfig(
        n_routed_experts=64,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        n_shared_experts=2,
        first_k_dense_replace=1,
    ),
)

# The paper prints no expert width for 145B. Its 144.6B parameters are 61 layers x 132 experts x 3 x 4096 x
# width and 5.3B of the rest, so 1408. The dense layer is 1368 for each expert a token activates, as in 16B.
MOE_145B = replace(
    sized(MOE_16B, 4096, 16 * 1368, 62, GQAConfig(32, 32, 128)),
    moe=MoEConfig(128, 12, 1408, n_shared_experts=4, first_k_dense_replace=1),
)

# The validation models of section 4.1. Their 1.89B expert parameters are 9 layers x 64 experts x 3 x 1280 x
# width: 856 is the only multiple of 8 that rounds to it, and four times that is a full feed-forward.
MOE_2B = replace(
    sized(MOE_16B, 1280, 4 * 856, 9, GQAConfig(10, 10, 128)),
    vocab_size=8192,
    moe=MoEConfig(63, 7, 856, n_shared_experts=1),
    max_position_embeddings=2048,
    bos_token_id=0,
    eos_token_id=1,
)
MOE_2B_DENSE = replace(MOE_2B, model_type="llama", moe=None)
MOE_2B_SWITCH = replace(MOE_2B, moe=MoEConfig(16, 1, 4 * 856))
MOE_2B_GSHARD = replace(MOE_2B, moe=MoEConfig(16, 2, 4 * 856, norm_topk_prob=True))
# The other rules, in the same shape: the Hash layer of the paper's Table 1, whose one expert counts in full;
# experts that choose; and experts cut into segments, of which a second gate wakes two of four.
MOE_2B_HASH = replace(MOE_2B, moe=MoEConfig(16, 1, 4 * 856, topk_method="hash", norm_topk_prob=True))
MOE_2B_NOISY = replace(MOE_2B, moe=MoEConfig(16, 2, 4 * 856, norm_topk_prob=True, noisy_gate=True))
MOE_2B_CHOICE = replace(MOE_2B, moe=MoEConfig(16, 2, 4 * 856, topk_method="expert_choice"))
MOE_2B_SEGMENTS = replace(MOE_2B, moe=MoEConfig(64, 4, 856, topk_method="segments", n_group=16, topk_group=2))

# --------------------------------------------------------------------------------------------------
# DeepSeek-V2, V3 and their kin: latent attention

V2_LITE = replace(
    MOE_16B,
    model_type="deepseek_v2",
    num_hidden_layers=27,
    attention=MLAConfig(
        num_attention_heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    ),
    rope=RopeConfig(
        interleaved=True,
        scaling=YarnScaling(40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707),
    ),
    max_position_embeddings=163840,
)
V2 = replace(
    sized(V2_LITE, 5120, 12288, 60, MLAConfig(128, 512, 128, 64, 128, q_lora_rank=1536)),
    moe=MoEConfig(
        n_routed_experts=160,
        num_experts_per_tok=6,
        moe_intermediate_size=1536,
        n_shared_experts=2,
        first_k_dense_replace=1,
        topk_method="group_limited_greedy",
        n_group=8,
        topk_group=3,
        routed_scaling_factor=16.0,
    ),
)
V25 = replace(
    V2, rope=RopeConfig(interleaved=True, scaling=YarnScaling(40.0, 4096, mscale=1.0, mscale_all_dim=1.0))
)
V3_MOE = MoEConfig(
    n_routed_experts=256,
    num_experts_per_tok=8,
    moe_intermediate_size=2048,
    n_shared_experts=1,
    first_k_dense_replace=3,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    n_group=8,
    topk_group=4,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
)
V3 = replace(
    V25,
    model_type="deepseek_v3",
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    num_hidden_layers=61,
    moe=V3_MOE,
    num_nextn_predict_layers=1,
    bos_token_id=0,
    eos_token_id=1,
    quantization=Fp8Blocks(),
)
V31 = replace(V3, quantization=Fp8Blocks(scale_fmt="ue8m0"))
V32 = replace(
    V31,
    model_type="deepseek_v32",
    attention=MLAConfig(128, 512, 128, 64, 128, q_lora_rank=1536, indexer=IndexerConfig(64, 128, 2048)),
)
MOONLIGHT = replace(
    V2_LITE,
    model_type="deepseek_v3",
    vocab_size=163840,
    intermediate_size=11264,
    rope=RopeConfig(theta=50000.0, interleaved=True),
    moe=replace(
        V3_MOE,
        n_routed_experts=64,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        n_shared_experts=2,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.446,
    ),
    rms_norm_eps=1e-5,
    max_position_embeddings=8192,
    initializer_range=0.02,
    bos_token_id=163584,
    eos_token_id=163585,
)

# The model of the NSA paper, section 4.1. It prints no width of experts: 1536 gives its 27B (27.4B without
# the embeddings). Its "3B active" is met by the experts alone (2.7B): 64 heads of 192 and 128 add 1.9B.
NSA_27B = replace(
    sized(MOE_16B, 2560, 8 * 1536, 30, NSAConfig(64, 4, 192, 128)),
    model_type="nsa",
    moe=MoEConfig(72, 6, 1536, n_shared_experts=2, first_k_dense_replace=1),
    max_position_embeddings=8192,
)

# --------------------------------------------------------------------------------------------------
# The models DeepSeek distilled into, and those it is measured against

LLAMA_2_7B = ModelConfig(
    model_type="llama",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    attention=GQAConfig(32, 32, 128),
    rms_norm_eps=1e-5,
    initializer_range=0.02,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA_2_13B = sized(LLAMA_2_7B, 5120, 13824, 40, GQAConfig(40, 40, 128))
LLAMA_2_70B = sized(LLAMA_2_7B, 8192, 28672, 80, GQAConfig(64, 8, 128))
LLAMA_3_8B = replace(
    LLAMA_2_7B,
    vocab_size=128256,
    intermediate_size=14336,
    attention=GQAConfig(32, 8, 128),
    rope=RopeConfig(theta=500000.0),
    max_position_embeddings=8192,
    bos_token_id=128000,
    eos_token_id=128001,
)
LLAMA_3_70B = sized(LLAMA_3_8B, 8192, 28672, 80, GQAConfig(64, 8, 128))
LLAMA_31_ROPE = RopeConfig(theta=500000.0, scaling=Llama3Scaling(8.0, original_max_position_embeddings=8192))
LLAMA_31_8B = replace(LLAMA_3_8B, rope=LLAMA_31_ROPE, max_position_embeddings=131072)
LLAMA_31_70B = replace(LLAMA_3_70B, rope=LLAMA_31_ROPE, max_position_embeddings=131072)
LLAMA_31_405B = sized(LLAMA_31_8B, 16384, 53248, 126, GQAConfig(128, 8, 128))
QWEN_1_5B = ModelConfig(
    model_type="qwen2",
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    attention=GQAConfig(12, 2, 128, qkv_bias=True),
    max_position_embeddings=131072,
    initializer_range=0.02,
    bos_token_id=151646,
    eos_token_id=151643,
)
QWEN_7B = replace(sized(QWEN_1_5B, 3584, 18944, 28, GQAConfig(28, 4, 128, qkv_bias=True)), vocab_size=152064)
QWEN_14B = replace(
    sized(QWEN_7B, 5120, 13824, 48, GQAConfig(40, 8, 128, qkv_bias=True)),
    rope=RopeConfig(theta=1e6),
    rms_norm_eps=1e-5,
)
QWEN_32B = replace(QWEN_14B, intermediate_size=27648, num_hidden_layers=64)
MIXTRAL = replace(
    LLAMA_2_7B,
    model_type="mixtral",
    intermediate_size=14336,
    attention=GQAConfig(32, 8, 128),
    rope=RopeConfig(theta=1e6),
    moe=MoEConfig(8, 2, 14336, norm_topk_prob=True),
    max_position_embeddings=32768,
)
OLMOE = replace(
    sized(LLAMA_2_7B, 2048, 1024, 16, GQAConfig(16, 16, 128, qk_norm="all")),
    model_type="olmoe",
    vocab_size=50304,
    moe=MoEConfig(64, 8, 1024),
    bos_token_id=None,
    eos_token_id=50279,
)
QWEN3_30B = ModelConfig(
    model_type="qwen3_moe",
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=48,
    attention=GQAConfig(32, 4, 128, qk_norm="head"),
    rope=RopeConfig(theta=1e6),
    moe=MoEConfig(128, 8, 768, norm_topk_prob=True),
    max_position_embeddings=40960,
    initializer_range=0.02,
    bos_token_id=151643,
    eos_token_id=151645,
)

# Switch and GShard are encoder-decoders of T5's parts. These rows are decoders of our parts in their shapes,
# with their routing rule and capacity, and every second layer routed; no published total applies. The 2N/E
# places of GShard are factor 1 of T x K / E; its weak second choices are kept by chance.
SWITCH_MOE = MoEConfig(128, 1, 2048, moe_layer_freq=2, capacity_factor=1.25, eval_capacity_factor=2.0)
SWITCH_BASE = replace(
    sized(MOE_16B, 768, 2048, 12, GQAConfig(12, 12, 64)),
    vocab_size=32128,
    moe=SWITCH_MOE,
    max_position_embeddings=512,
    initializer_range=0.02,
    bos_token_id=0,
    eos_token_id=1,
)
GSHARD_MOE = MoEConfig(2048, 2, 8192, moe_layer_freq=2, norm_topk_prob=True, capacity_factor=1.0)
GSHARD = replace(
    sized(SWITCH_BASE, 1024, 8192, 36, GQAConfig(16, 16, 128)),
    moe=replace(GSHARD_MOE, eval_capacity_factor=1.0, random_second=True),
)

# --------------------------------------------------------------------------------------------------
# The table

V2_TOTAL, V2_ACTIVE = Figure("236B"), Figure("21B")
LITE_ACTIVE = Figure("2.4B", "head")
V3_TOTAL, V3_ACTIVE = Figure("671B"), Figure("37B", "head")
LLM, MOE, V2_PAPER, CODER = "arXiv 2401.02954", "arXiv 2401.06066", "arXiv 2405.04434", "arXiv 2406.11931"
R1, LLAMA_2, LLAMA_3 = "arXiv 2501.12948", "arXiv 2307.09288", "arXiv 2407.21783"

ROWS = (
    Family("deepseek-llm-7b", LLM_7B, Figure("7B"), None, LLM),
    Family("deepseek-llm-67b", LLM_67B, Figure("67B"), None, LLM),
    Family("deepseek-moe-2b", MOE_2B, Figure("2.0B"), Figure("0.3B"), MOE),
    Family("deepseek-moe-2b-dense", MOE_2B_DENSE, Figure("0.2B"), None, MOE),
    Family("deepseek-moe-2b-switch", MOE_2B_SWITCH, Figure("2.0B"), Figure("0.2B"), MOE),
    Family("deepseek-moe-2b-gshard", MOE_2B_GSHARD, Figure("2.0B"), Figure("0.3B"), MOE),
    Family("deepseek-moe-2b-noisy", MOE_2B_NOISY, None, None, "arXiv 1701.06538"),
    Family("deepseek-moe-2b-hash", MOE_2B_HASH, Figure("2.0B"), Figure("0.2B"), MOE),
    Family("deepseek-moe-2b-expert-choice", MOE_2B_CHOICE, None, None, "arXiv 2202.09368"),
    Family("deepseek-moe-2b-segments", MOE_2B_SEGMENTS, None, None, "none; a rule to compare with"),
    Family("deepseek-moe-16b", MOE_16B, Figure("16.4B"), Figure("2.8B"), MOE),
    Family("deepseek-moe-145b", MOE_145B, Figure("144.6B"), Figure("22.2B"), MOE),
    Family("deepseek-v2", V2, V2_TOTAL, V2_ACTIVE, V2_PAPER),
    Family("deepseek-v2-lite", V2_LITE, Figure("15.7B"), LITE_ACTIVE, V2_PAPER),
    Family("deepseek-v2.5", V25, V2_TOTAL, V2_ACTIVE, "model card"),
    Family("deepseek-coder-v2", V2, V2_TOTAL, V2_ACTIVE, CODER),
    Family("deepseek-coder-v2-lite", V2_LITE, Figure("16B"), LITE_ACTIVE, CODER),
    Family("deepseek-v3", V3, V3_TOTAL, V3_ACTIVE, "arXiv 2412.19437"),
    Family("deepseek-v3.1", V31, V3_TOTAL, V3_ACTIVE, "model card"),
    Family("deepseek-v3.2-exp", V32, None, None, "model card"),  # 671B is the name of V3, without indexers
    Family("deepseek-v3.2", V32, None, None, "arXiv 2512.02556"),
    Family("nsa-27b", NSA_27B, Figure("27B", "neither"), None, "arXiv 2502.11089"),
    Family("deepseek-r1", V3, V3_TOTAL, V3_ACTIVE, R1),
    Family("deepseek-r1-zero", V3, V3_TOTAL, V3_ACTIVE, R1),
    Family(
        "moonlight-16b-a3b",
        MOONLIGHT,
        Figure("15.29B", "neither"),
        Figure("2.24B", "neither"),
        "arXiv 2502.16982",
    ),
    Family("r1-distill-qwen-1.5b", QWEN_1_5B, Figure("1.5B", "head"), None, R1),
    Family("r1-distill-qwen-7b", QWEN_7B, Figure("7B"), None, R1),
    Family("r1-distill-qwen-14b", QWEN_14B, Figure("14B"), None, R1),
    Family("r1-distill-qwen-32b", QWEN_32B, Figure("32B"), None, R1),
    Family("r1-distill-llama-8b", LLAMA_31_8B, Figure("8B"), None, R1),
    Family("r1-distill-llama-70b", LLAMA_31_70B, Figure("70B"), None, R1),
    Family("llama-2-7b", LLAMA_2_7B, Figure("7B"), None, LLAMA_2),
    Family("llama-2-13b", LLAMA_2_13B, Figure("13B"), None, LLAMA_2),
    Family("llama-2-70b", LLAMA_2_70B, None, None, LLAMA_2),  # 68.98B: "70B" is a name, not a count
    Family("llama-3-8b", LLAMA_3_8B, Figure("8B"), None, LLAMA_3),
    Family("llama-3-70b", LLAMA_3_70B, Figure("70B"), None, LLAMA_3),
    Family("llama-3.1-405b", LLAMA_31_405B, Figure("405B"), None, LLAMA_3),
    Family("mixtral-8x7b", MIXTRAL, Figure("46.7B"), Figure("12.9B"), "release note of Mixtral 8x7B"),
    Family("olmoe-1b-7b", OLMOE, Figure("6.9B"), Figure("1.3B"), "arXiv 2409.02060"),
    Family("qwen3-30b-a3b", QWEN3_30B, Figure("30.5B"), Figure("3.3B"), "model card"),
    Family("switch-base-128", SWITCH_BASE, None, None, "arXiv 2101.03961"),
    Family("gshard-2048e-36l", GSHARD, None, None, "arXiv 2006.16668"),
)

FAMILIES: Mapping[str, Family] = MappingProxyType({row.name: row for row in ROWS})


def family(name: str) -> Family:
    if name in FAMILIES:
        return FAMILIES[name]
    near = difflib.get_close_matches(name.lower(), FAMILIES, n=3, cutoff=0.3) or sorted(FAMILIES)
    raise ValueError(f"no family is named {name!r}; nearest are {', '.join(near)}")


# --------------------------------------------------------------------------------------------------
# Twins

TINY_CONTEXT = 64  # positions before any scaling


def tiny(model: str | ModelConfig) -> ModelConfig:
    """The twin of a family for tests and laptops: 64 wide, 2 to 4 layers, 512 tokens, float32.

    Kept: the form of attention (latent, grouped, biased, normed, heads wider than the model), dense layers,
    every routing rule with its groups, capacity and shared experts, prediction modules, rotary scaling (of a
    context of 64, so that tests reach beyond it), weight tying. Left out: FP8 storage.
    """
    config = family(model).config if isinstance(model, str) else model
    scaling = config.rope.scaling
    if isinstance(scaling, YarnScaling | Llama3Scaling):
        scaling = replace(scaling, original_max_position_embeddings=TINY_CONTEXT)
    return replace(
        config,
        vocab_size=512,
        hidden_size=64,
        intermediate_size=_tiny_intermediate_size(config),
        num_hidden_layers=_tiny_layers(config.moe),
        attention=_tiny_attention(config),
        rope=replace(config.rope, scaling=scaling),
        moe=_tiny_moe(config.moe),
        max_position_embeddings=int(TINY_CONTEXT * (scaling.factor if scaling else 4)),
        initializer_range=0.02,  # the papers' 0.006 suits a model a hundred times as wide
        bos_token_id=None if config.bos_token_id is None else 0,
        eos_token_id=None if config.eos_token_id is None else 1,
        dtype="float32",
        quantization=None,
    )


def _tiny_layers(moe: MoEConfig | None) -> int:
    return 2 if moe is None else min(moe.first_k_dense_replace, 1) + 2 * moe.moe_layer_freq


def _tiny_intermediate_size(config: ModelConfig) -> int:
    """The experts' width where it was that: in the files of Mixtral and OLMoE both are one key."""
    moe = config.moe
    return 48 if moe is not None and moe.moe_intermediate_size == config.intermediate_size else 128


def _tiny_attention(config: ModelConfig) -> Attention:
    attention = config.attention
    if isinstance(attention, NSAConfig):  # a key and a value of different dims; every branch leaves some out
        return NSAConfig(4, 2, 24, 16, 8, 4, 8, 4, sliding_window=12)
    if isinstance(attention, MLAConfig):
        q_lora_rank = None if attention.q_lora_rank is None else 24
        indexer = None if attention.indexer is None else IndexerConfig(8, 16, 24)  # fewer than the context
        return MLAConfig(4, 32, 16, 8, 16, q_lora_rank, attention.attention_bias, indexer)
    heads, shared = attention.num_attention_heads, attention.num_key_value_heads
    return replace(
        attention,
        num_attention_heads=4,
        num_key_value_heads=4 if shared == heads else min(shared, 2),
        head_dim=32 if heads * attention.head_dim > config.hidden_size else 16,
    )


def _tiny_moe(moe: MoEConfig | None) -> MoEConfig | None:
    if moe is None:
        return None
    grouped = moe.n_group > 1
    return replace(
        moe,
        n_routed_experts=16 if grouped else 8,
        num_experts_per_tok=4 if moe.topk_method == "segments" else min(moe.num_experts_per_tok, 3),
        moe_intermediate_size=48,
        first_k_dense_replace=min(moe.first_k_dense_replace, 1),
        n_group=4 if grouped else 1,
        topk_group=2 if grouped else 1,
    )
