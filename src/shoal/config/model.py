"""What a model is: one frozen dataclass, made of the parts that families differ in.

Every family this project loads is a value of `ModelConfig`; V2 and V3 differ by fields, never by class.
Field names are those of DeepSeek's `config.json` wherever it has one. A config that exists is consistent:
each part refuses, when it is made, what could not be built, with the value, the limit and the fix.

What is left to others: reading and writing `config.json` (hf.py), the named models (families.py), what a
config costs (cost.py). Nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from shoal.config.require import require


def _require_positive(part: object, *fields: str) -> None:
    for field in fields:
        value = getattr(part, field)
        require(value > 0, f"{type(part).__name__}.{field} is {value}; it must be positive")


@dataclass(frozen=True)
class YarnScaling:
    """YaRN: low frequencies are divided by `factor`, high ones kept, a ramp between (arXiv 2309.00071).

    `mscale` and `mscale_all_dim` are DeepSeek's two temperatures. Their ratio scales cos and sin (1.0 in
    every released model); `mscale_all_dim`, squared, scales the softmax of MLA. Where a family has neither,
    cos and sin are scaled by `attention_factor`, by default 0.1 ln(factor) + 1.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        require(
            self.factor >= 1.0, f"YaRN factor is {self.factor}; it stretches a context, so it is at least 1"
        )
        _require_positive(self, "original_max_position_embeddings", "beta_fast", "beta_slow")
        require(
            self.beta_fast > self.beta_slow,
            f"YaRN beta_fast {self.beta_fast} must exceed beta_slow {self.beta_slow}",
        )

    def _magnitude(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1.0 else 1.0

    @property
    def rotary_factor(self) -> float:
        """Multiplies cos and sin."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    @property
    def softmax_factor(self) -> float:
        """Multiplies the softmax scale of MLA."""
        return self._magnitude(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling: wavelengths above original/low_freq_factor are stretched, below original/high
    kept.
    """

    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        _require_positive(self, "factor", "original_max_position_embeddings", "low_freq_factor")
        require(
            self.high_freq_factor > self.low_freq_factor,
            f"Llama-3 scaling: high_freq_factor {self.high_freq_factor} must exceed "
            f"low_freq_factor {self.low_freq_factor}",
        )


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every frequency divided by `factor` (arXiv 2306.15595)."""

    factor: float

    def __post_init__(self) -> None:
        _require_positive(self, "factor")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding. `interleaved`: pairs are (0,1), (2,3) ... as in DeepSeek-V2 and later; otherwise the
    two halves of the vector are paired, as in Llama, DeepSeek-LLM and DeepSeekMoE-16B."""

    theta: float = 10000.0
    interleaved: bool = False
    scaling: YarnScaling | Llama3Scaling | LinearScaling | None = None

    def __post_init__(self) -> None:
        _require_positive(self, "theta")


@dataclass(frozen=True)
class IndexerConfig:
    """DeepSeek sparse attention (V3.2, arXiv 2512.02556, section 2.1): a small scorer of `index_n_heads`
    heads picks the `index_topk` positions that latent attention reads for a token."""

    index_n_heads: int
    index_head_dim: int
    index_topk: int

    def __post_init__(self) -> None:
        _require_positive(self, "index_n_heads", "index_head_dim", "index_topk")


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    With an `indexer` it is sparse: a token reads the positions that the indexer picks.
    """

    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    attention_bias: bool = False
    indexer: IndexerConfig | None = None

    def __post_init__(self) -> None:
        _require_positive(self, "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
        _require_positive(self, "qk_rope_head_dim")
        require(
            self.q_lora_rank is None or self.q_lora_rank > 0, f"q_lora_rank is {self.q_lora_rank}; use null"
        )
        require(
            self.qk_rope_head_dim % 2 == 0,
            f"qk_rope_head_dim is {self.qk_rope_head_dim}; RoPE rotates pairs, so it must be even",
        )
        require(
            self.indexer is None or self.q_lora_rank is not None,
            "an indexer reads the query latent, but q_lora_rank is null; give it a rank",
        )
        require(
            self.indexer is None or self.indexer.index_head_dim >= self.qk_rope_head_dim,
            f"index_head_dim is {self.indexer and self.indexer.index_head_dim}; the indexer rotates its "
            f"first qk_rope_head_dim elements, so it must be at least {self.qk_rope_head_dim}",
        )

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rope_dim(self) -> int:
        return self.qk_rope_head_dim

    @property
    def cache_shape(self) -> tuple[int, ...]:
        """Elements cached per token and layer: the normalised latent, the rotated shared key, the indexer's
        key."""
        return (self.latent_dim + (self.indexer.index_head_dim if self.indexer else 0),)

    @property
    def latent_dim(self) -> int:
        """What attention reads of a cached row."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True)
class GQAConfig:
    """Grouped-query attention; multi-head when the two head counts are equal.

    `qk_norm`: RMSNorm of q and k before RoPE, over each head (Qwen3) or over all heads at once (OLMoE).
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["head", "all"] | None = None

    def __post_init__(self) -> None:
        _require_positive(self, "num_attention_heads", "num_key_value_heads", "head_dim")
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} is not divisible by "
            f"num_key_value_heads {self.num_key_value_heads}; make it a multiple",
        )
        require(
            self.head_dim % 2 == 0, f"head_dim is {self.head_dim}; RoPE rotates pairs, so it must be even"
        )

    @property
    def rope_dim(self) -> int:
        return self.head_dim

    @property
    def cache_shape(self) -> tuple[int, ...]:
        """Elements cached per token and layer: keys, then values, of every key-value head."""
        return (2, self.num_key_value_heads, self.head_dim)


@dataclass(frozen=True)
class NSAConfig:
    """Native sparse attention (arXiv 2502.11089, section 3): grouped queries, three branches, a gate of each.

    - Compression: `compress_block` keys become one by an MLP, every `compress_stride` of them.
    - Selection: of the blocks of `select_block` tokens the `select_topk` that compression scores highest for
    a group of heads, among them always the first `select_first` and the last `select_local`.
    - Window: the last `sliding_window` tokens.
    """

    num_attention_heads: int
    num_key_value_heads: int
    qk_head_dim: int
    v_head_dim: int
    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    select_topk: int = 16
    select_first: int = 1
    select_local: int = 2
    sliding_window: int = 512

    def __post_init__(self) -> None:
        _require_positive(self, "num_attention_heads", "num_key_value_heads", "qk_head_dim", "v_head_dim")
        _require_positive(self, "compress_block", "compress_stride", "select_block", "sliding_window")
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads {self.num_attention_heads} is not divisible by "
            f"num_key_value_heads {self.num_key_value_heads}; make it a multiple",
        )
        require(
            self.qk_head_dim % 2 == 0,
            f"qk_head_dim is {self.qk_head_dim}; RoPE rotates pairs, so it must be even",
        )
        for field in ("compress_block", "select_block"):
            value = getattr(self, field)
            require(
                value % self.compress_stride == 0,
                f"{field} is {value}, no multiple of compress_stride {self.compress_stride}; scores of "
                f"compressed keys become scores of blocks stride by stride, so make it one",
            )
        forced = self.select_first + self.select_local
        require(
            min(self.select_first, self.select_local - 1) >= 0 and forced <= self.select_topk,
            f"select_first {self.select_first} and select_local {self.select_local} of select_topk "
            f"{self.select_topk} blocks; a token's own block counts as local, so select_local is at least 1, "
            f"and both together at most select_topk",
        )

    @property
    def rope_dim(self) -> int:
        return self.qk_head_dim

    @property
    def row_dim(self) -> int:
        """A key and a value of one head."""
        return self.qk_head_dim + self.v_head_dim

    @property
    def cache_shape(self) -> tuple[int, ...]:
        """Elements cached per token and layer: a key and a value of every key-value head, for each branch,
        and the compressed ones of the block that ends with the token."""
        return (4, self.num_key_value_heads, self.row_dim)


TopkMethod = Literal["greedy", "group_limited_greedy", "noaux_tc", "hash", "expert_choice", "segments"]


@dataclass(frozen=True)
class MoEConfig:
    """The feed-forward of a mixture-of-experts layer and the rule that picks experts for a token.

    - `scoring_func`: softmax over all routed experts, or a sigmoid of each.
    - `topk_method`: `greedy`; `group_limited_greedy` (V2: keep the `topk_group` groups with the largest
      maximum); `noaux_tc` (V3: selection by score + `e_score_correction_bias`, groups by the sum of their two
      best); `hash` (arXiv 2106.04426: the token's id decides, the gate only weighs); `expert_choice` (arXiv
      2202.09368: each expert takes the T * K / E tokens of a batch that score it highest, so a token may get
      none or many, and depends on later ones); `segments` (a group is an expert, cut into segments, and has a
      gate of its own: `topk_group` experts are chosen, then the best segments in each; weights are the
      products of both softmaxes).
    - `norm_topk_prob`: divide the chosen weights by their sum. `routed_scaling_factor` multiplies them last.
    - `noisy_gate`: while it trains, a router's logits have normal noise whose spread is softplus(x W_noise),
      learned with them (Shazeer, arXiv 1701.06538, eq. 4). `random_second`: while it trains, a second choice
      of weight w is kept with probability min(1, 2 w) (GShard, arXiv 2006.16668, algorithm 1).
    - `capacity_factor`: an expert takes at most ceil(factor * T * K / E) of a training batch's T tokens, at
      least 4; first choices come before second, earlier tokens before later; what overflows is dropped
      (Switch, GShard). `eval_capacity_factor` is the same outside training. None, DeepSeek's rule, never
      drops.
    """

    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_shared_experts: int = 0
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    scoring_func: Literal["softmax", "sigmoid"] = "softmax"
    topk_method: TopkMethod = "greedy"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    noisy_gate: bool = False
    random_second: bool = False

    def __post_init__(self) -> None:
        _require_positive(
            self, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_layer_freq"
        )
        _require_positive(self, "n_group", "topk_group", "routed_scaling_factor")
        experts, top_k = self.n_routed_experts, self.num_experts_per_tok
        require(
            self.n_shared_experts >= 0, f"n_shared_experts is {self.n_shared_experts}; it cannot be negative"
        )
        require(
            self.first_k_dense_replace >= 0,
            f"first_k_dense_replace is {self.first_k_dense_replace}; it cannot be negative",
        )
        require(
            top_k <= experts,
            f"num_experts_per_tok is {top_k} but there are {experts} routed experts; "
            f"set it to at most {experts}, or n_routed_experts to at least {top_k}",
        )
        require(
            self.scoring_func in ("softmax", "sigmoid"),
            f"scoring_func is {self.scoring_func!r}; known are 'softmax' and 'sigmoid'",
        )
        methods = get_args(TopkMethod)
        require(
            self.topk_method in methods,
            f"topk_method is {self.topk_method!r}; known are {', '.join(methods)}",
        )
        require(
            experts % self.n_group == 0,
            f"n_routed_experts {experts} is not divisible by n_group {self.n_group}; groups are equal blocks",
        )
        require(
            self.topk_group <= self.n_group, f"topk_group {self.topk_group} exceeds n_group {self.n_group}"
        )
        method = self.topk_method
        reachable = experts // self.n_group * self.topk_group
        require(
            not self.is_grouped or top_k <= reachable,
            f"num_experts_per_tok is {top_k} but topk_group {self.topk_group} of {self.n_group} groups "
            f"leaves only {reachable} experts to choose from",
        )
        require(
            self.is_grouped or self.n_group == 1,
            f"topk_method {method!r} ignores groups, but n_group is {self.n_group}; "
            f"use 'group_limited_greedy' or 'noaux_tc', or set n_group to 1",
        )
        require(
            self.topk_method != "noaux_tc" or experts // self.n_group >= 2,
            f"topk_method 'noaux_tc' scores a group by its two best experts, but {experts} experts in "
            f"{self.n_group} groups leaves fewer than two in each",
        )
        require(
            method != "segments" or top_k % self.topk_group == 0,
            f"num_experts_per_tok is {top_k}, not a multiple of topk_group {self.topk_group}; "
            f"'segments' takes as many segments of each chosen expert",
        )
        require(
            method not in ("segments", "expert_choice") or self.scoring_func == "softmax",
            f"topk_method {method!r} is defined on softmax scores, but scoring_func is {self.scoring_func!r}",
        )
        require(
            method != "expert_choice" or not self.norm_topk_prob,
            "norm_topk_prob is true, but by 'expert_choice' a token may have no expert; set it to false",
        )
        require(
            not self.noisy_gate or method in ("greedy", "group_limited_greedy", "noaux_tc"),
            f"noisy_gate is true, but topk_method {method!r} does not choose by one gate's logits; set it to "
            f"false",
        )
        require(
            not self.random_second or (top_k == 2 and method == "greedy"),
            f"random_second is true, but it is of 'greedy' with 2 experts a token, not of {method!r} with "
            f"{top_k}; set it to false",
        )
        for field in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, field)
            require(
                value is None or method not in ("hash", "expert_choice"),
                f"{field} is {value}, but topk_method {method!r} drops nothing; set it to null",
            )
            require(
                value is None or value > 0, f"{field} is {value}; it must be positive, or null to never drop"
            )

    @property
    def is_grouped(self) -> bool:
        return self.topk_method in ("group_limited_greedy", "noaux_tc", "segments")

    @property
    def is_causal(self) -> bool:
        """Whether a token's experts depend on no later token."""
        return self.topk_method != "expert_choice"

    @property
    def has_correction_bias(self) -> bool:
        return self.topk_method == "noaux_tc"

    @property
    def shared_intermediate_size(self) -> int:
        """Shared experts are one fused SwiGLU of this width."""
        return self.n_shared_experts * self.moe_intermediate_size


Attention = MLAConfig | GQAConfig | NSAConfig


@dataclass(frozen=True)
class Fp8Blocks:
    """Weights stored as float8 e4m3 with one float32 scale a block (`weight_scale_inv`, which multiplies)."""

    weight_block_size: tuple[int, int] = (128, 128)
    scale_fmt: Literal["ue8m0"] | None = None

    def __post_init__(self) -> None:
        require(
            min(self.weight_block_size) > 0,
            f"weight_block_size is {self.weight_block_size}; use positive sizes",
        )


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: embedding, `num_hidden_layers` pre-norm blocks, final norm, output head.

    `model_type` is the `config.json` dialect it is read from and written to; no computation depends on it.
    `intermediate_size` is the width of dense SwiGLU layers. `num_nextn_predict_layers` counts the
    multi-token-prediction modules after the last block. `initializer_range` is the standard deviation of
    every matrix at birth (0.006 in DeepSeek's papers; their `config.json` files say 0.02).
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    attention: Attention
    rope: RopeConfig = RopeConfig()
    moe: MoEConfig | None = None
    num_nextn_predict_layers: int = 0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    initializer_range: float = 0.006
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    quantization: Fp8Blocks | None = None

    def __post_init__(self) -> None:
        _require_positive(self, "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings")
        _require_positive(self, "rms_norm_eps", "initializer_range")
        require(self.num_nextn_predict_layers >= 0, "num_nextn_predict_layers cannot be negative")
        require(
            self.intermediate_size > 0 or self.num_dense_layers == 0,
            f"intermediate_size is {self.intermediate_size}, but {self.num_dense_layers} layers are dense",
        )
        moe = self.moe
        require(
            moe is None or moe.first_k_dense_replace <= self.num_hidden_layers,
            f"first_k_dense_replace is {moe and moe.first_k_dense_replace}, "
            f"more than num_hidden_layers {self.num_hidden_layers}",
        )
        for name, token in (("bos_token_id", self.bos_token_id), ("eos_token_id", self.eos_token_id)):
            for value in token if isinstance(token, tuple) else (token,):
                require(
                    value is None or 0 <= value < self.vocab_size,
                    f"{name} is {value}, outside the vocabulary of {self.vocab_size}",
                )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer` routes. MTP modules, numbered from `num_hidden_layers`, follow the same
        rule.
        """
        moe = self.moe
        return moe is not None and layer >= moe.first_k_dense_replace and layer % moe.moe_layer_freq == 0

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """All that route, by number: blocks, then MTP modules."""
        return tuple(layer for layer in range(self.num_cached_layers) if self.is_moe_layer(layer))

    @property
    def num_moe_layers(self) -> int:
        return sum(self.is_moe_layer(layer) for layer in range(self.num_hidden_layers))

    @property
    def num_dense_layers(self) -> int:
        return self.num_hidden_layers - self.num_moe_layers

    @property
    def num_cached_layers(self) -> int:
        """Layers that keep keys and values: the blocks, then the MTP modules."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    @property
    def softmax_scale(self) -> float:
        """What attention logits are multiplied by: head_dim^-0.5, and YaRN's temperature where MLA has
        one.
        """
        if isinstance(self.attention, GQAConfig):
            return self.attention.head_dim**-0.5
        if isinstance(self.attention, NSAConfig):
            return self.attention.qk_head_dim**-0.5
        scaling = self.rope.scaling
        factor = scaling.softmax_factor if isinstance(scaling, YarnScaling) else 1.0
        return self.attention.qk_head_dim**-0.5 * factor
