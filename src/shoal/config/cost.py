"""What a config costs: parameters, FLOPs per token, cache and weight bytes, as pure functions of ModelConfig.

Every figure comes from one list, `weights`: each tensor of the model, its shape, how many there are and how
many of them one token reads. The law: the list is the model's state dict, known without building it.

Conventions, since papers differ and seldom say:
- Active parameters are those a token's pass reads: all but the routed experts it was not sent to. Both
  embedding matrices count, and so do prediction modules where they are asked for.
- A multiply-add is 2 FLOPs. Products with weights and the two of attention count; norms, softmax, rotations
  and the embedding look-up do not. Backward is twice forward. Experts with a capacity drop no token here.

What is left to others: speed, and what fits on which machine (analysis/planner).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from shoal.config.model import Fp8Blocks, GQAConfig, MLAConfig, ModelConfig, NSAConfig

Part = Literal["embedding", "attention", "dense", "routed", "shared", "router", "norms", "head", "mtp"]
Phase = Literal["training", "prefill", "decode"]
CacheDtype = Literal["float32", "bfloat16", "float16", "fp8"]
IndexKeys = Literal["wide", "fp8"]  # of an indexer, in the cache
WeightDtype = Literal["float32", "bfloat16", "float16", "fp8", "int4"]

# Dense bfloat16 FLOPs a second, by what a device's name contains: NVIDIA's datasheets, of SXM parts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
INT4_GROUP = 128  # weights of a row that share one bfloat16 scale
FP8_GROUP = 128  # numbers of a cached row that share one float32 scale


@dataclass(frozen=True)
class Weight:
    """`count` tensors of one shape, `active` of them read by a token.

    `storage`: `low` where FP8 and int4 checkpoints quantise, `plain` where they keep bfloat16, or `float32`.
    `uses`: how often a token is multiplied by each, where that is not once.
    """

    part: Part
    shape: tuple[int, ...]
    count: int = 1
    active: int = 1
    storage: Literal["low", "plain", "float32"] = "low"
    uses: float = 1.0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def weights(config: ModelConfig, *, mtp: bool = True) -> Iterator[Weight]:
    """Every tensor of the model, in the order of its forward pass. A tied head is the embedding, listed once.

    `mtp=False`, here and below, leaves the prediction modules out, as published counts do.
    """
    hidden, table = config.hidden_size, (config.vocab_size, config.hidden_size)
    yield Weight("embedding", table, storage="plain")
    for layer in range(config.num_hidden_layers):
        yield from _block(config, layer)
    yield _norms(hidden)
    if not config.tie_word_embeddings:
        yield Weight("head", table, storage="plain")
    for module in range(config.num_nextn_predict_layers if mtp else 0):
        for weight in _block(config, config.num_hidden_layers + module):
            yield replace(weight, part="mtp")
        yield replace(_norms(hidden, 3), part="mtp")  # of the embedding, of the hidden state, before the head
        yield Weight("mtp", (hidden, 2 * hidden), storage="plain")


def _norms(size: int, count: int = 1) -> Weight:
    return Weight("norms", (size,), count, count, storage="plain")


def _block(config: ModelConfig, layer: int) -> Iterator[Weight]:
    attention, moe = config.attention, config.moe
    yield _norms(config.hidden_size, 2)
    match attention:
        case MLAConfig():
            yield from _latent_attention(config.hidden_size, attention)
        case NSAConfig():
            yield from _native_sparse_attention(config.hidden_size, attention)
        case GQAConfig():
            yield from _grouped_attention(config.hidden_size, attention)
    if moe is None or not config.is_moe_layer(layer):
        yield from _swiglu("dense", config.hidden_size, config.intermediate_size)
        return
    experts, top_k = moe.n_routed_experts, moe.num_experts_per_tok
    yield Weight("router", (experts, config.hidden_size), storage="plain")
    if moe.topk_method == "segments":
        yield Weight("router", (moe.n_group, config.hidden_size), storage="plain")
    if moe.noisy_gate:
        yield Weight("router", (experts, config.hidden_size), storage="plain")
    if moe.has_correction_bias:
        yield Weight("router", (experts,), storage="float32")
    yield from _swiglu("routed", config.hidden_size, moe.moe_intermediate_size, experts, top_k)
    if moe.n_shared_experts:
        yield from _swiglu("shared", config.hidden_size, moe.shared_intermediate_size)


def _swiglu(part: Part, hidden: int, width: int, count: int = 1, active: int = 1) -> Iterator[Weight]:
    yield Weight(part, (width, hidden), 2 * count, 2 * active)  # gate and up
    yield Weight(part, (hidden, width), count, active)


def _linear(rows: int, columns: int, *, bias: bool = False) -> Iterator[Weight]:
    yield Weight("attention", (rows, columns))
    if bias:
        yield Weight("attention", (rows,), storage="plain")


def _latent_attention(hidden: int, mla: MLAConfig) -> Iterator[Weight]:
    heads, bias = mla.num_attention_heads, mla.attention_bias
    if mla.q_lora_rank is None:
        yield from _linear(heads * mla.qk_head_dim, hidden)
    else:
        yield from _linear(mla.q_lora_rank, hidden, bias=bias)
        yield _norms(mla.q_lora_rank)
        yield from _linear(heads * mla.qk_head_dim, mla.q_lora_rank)
    yield from _linear(mla.kv_lora_rank + mla.qk_rope_head_dim, hidden, bias=bias)
    yield _norms(mla.kv_lora_rank)
    yield from _linear(heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank)
    yield from _linear(hidden, heads * mla.v_head_dim, bias=bias)
    if mla.indexer is not None and mla.q_lora_rank is not None:
        scorers, dim = mla.indexer.index_n_heads, mla.indexer.index_head_dim
        yield from _linear(scorers * dim, mla.q_lora_rank)
        yield from _linear(dim, hidden)
        yield _norms(dim, 2)  # a LayerNorm: its weight and its bias
        yield Weight("attention", (scorers, hidden), storage="plain")


def _grouped_attention(hidden: int, gqa: GQAConfig) -> Iterator[Weight]:
    queries, keys = gqa.num_attention_heads * gqa.head_dim, gqa.num_key_value_heads * gqa.head_dim
    for rows in (queries, keys, keys):
        yield from _linear(rows, hidden, bias=gqa.qkv_bias)
    yield from _linear(hidden, queries, bias=gqa.o_bias)
    if gqa.qk_norm == "head":
        yield _norms(gqa.head_dim, 2)
    elif gqa.qk_norm == "all":
        yield _norms(queries)
        yield _norms(keys)


def _native_sparse_attention(hidden: int, nsa: NSAConfig) -> Iterator[Weight]:
    heads, groups = nsa.num_attention_heads, nsa.num_key_value_heads
    yield from _linear(heads * nsa.qk_head_dim, hidden)
    yield from _linear(3 * groups * nsa.qk_head_dim, hidden)
    yield from _linear(3 * groups * nsa.v_head_dim, hidden)
    yield Weight("attention", (3 * heads, hidden), storage="plain")  # the gates
    yield from _linear(hidden, heads * nsa.v_head_dim)
    for dim in (nsa.qk_head_dim, nsa.v_head_dim):  # what compresses: its positions, its MLP
        yield Weight("attention", (nsa.compress_block, dim), storage="plain", uses=0.0)
        often = groups / nsa.compress_stride
        yield Weight("attention", (dim, nsa.compress_block * dim), uses=often)
        yield Weight("attention", (dim, dim), uses=often)


@dataclass(frozen=True)
class Parameters:
    """Elements of the state dict by part, and how many of all of them one token reads."""

    embedding: int
    attention: int
    dense: int
    routed: int
    shared: int
    router: int
    norms: int
    head: int
    mtp: int
    total: int
    active: int


def params(config: ModelConfig, *, mtp: bool = True) -> Parameters:
    sizes: dict[Part, int] = dict.fromkeys(get_args(Part), 0)
    active = 0
    for weight in weights(config, mtp=mtp):
        sizes[weight.part] += weight.count * weight.numel
        active += weight.active * weight.numel
    return Parameters(**sizes, total=sum(sizes.values()), active=active)


def flops_per_token(
    config: ModelConfig, context: int, phase: Phase = "training", *, mtp: bool = False
) -> float:
    """FLOPs for one token, on average over what the phase does with `context` tokens.

    - `training`: forward and backward over a sequence of `context`; token t sees t tokens.
    - `prefill`: forward over a prompt of `context` with nothing cached; the head reads the last token only.
    - `decode`: one more token that sees `context` tokens, itself included. MLA is absorbed: each token seen
      costs a head 2C + R, not N + R + V; the halves of `kv_b_proj`, on the query's side, cost what they did.
    - With an indexer, a context beyond its `index_topk` is scored whole, and attended to, absorbed, where it
      chose; a shorter one is attended to whole and not scored.
    - Native sparse attention reads its compressed keys, the selected blocks and the window; the scores of
      blocks are those of the compressed keys.

    With `mtp`, each prediction module adds its block and one more pass of the head.
    """
    if context < 1:
        raise ValueError(f"context is {context}; a token sees at least itself, so use 1 or more")
    modules = config.num_nextn_predict_layers if mtp else 0
    linear = sum(
        weight.active * weight.numel * weight.uses
        for weight in weights(config, mtp=mtp)
        if _multiplies(weight)
    )
    head = (1 + modules) * config.vocab_size * config.hidden_size
    pairs = (config.num_hidden_layers + modules) * _pairs(config, context, phase)
    if phase == "prefill":
        head /= context
    return 2 * (linear + head + pairs) * (3 if phase == "training" else 1)


def peak_flops(device: str) -> float | None:
    """A device's dense bfloat16 rate by its name; None where it is not in the table."""
    return next((rate for name, rate in PEAK_FLOPS.items() if name in device), None)


def _multiplies(weight: Weight) -> bool:
    """Whether every token is multiplied by it. The embedding is looked up; the head is counted apart."""
    return len(weight.shape) == 2 and weight.part not in ("embedding", "head")


def _pairs(config: ModelConfig, context: int, phase: Phase) -> float:
    """Multiply-adds of attention for one token in one layer."""
    attention, decode = config.attention, phase == "decode"
    if isinstance(attention, NSAConfig):
        return tokens_read(attention, context, average=not decode) * _pair(config, absorbed=False)
    seen = context if decode else (context + 1) / 2
    indexer = attention.indexer if isinstance(attention, MLAConfig) else None
    if indexer is None or context <= indexer.index_topk:
        return seen * _pair(config, absorbed=decode)
    top_k = indexer.index_topk
    read = top_k if decode else top_k * (1 - (top_k - 1) / (2 * context))  # token t reads min(t, top_k)
    return seen * indexer.index_n_heads * (indexer.index_head_dim + 1) + read * _pair(config, absorbed=True)


def tokens_read(nsa: NSAConfig, context: float, *, average: bool) -> float:
    """Keys that native sparse attention reads for the last of `context` tokens, or on average for each.

    (s - l) / d + 1 compressed ones, up to n l' in selected blocks, up to w in the window.
    """

    def seen(most: float) -> float:
        """Of the last `most` tokens, as many as there are."""
        most = min(context, most)
        return most * (1 - (most - 1) / (2 * context)) if average else most

    length, stride = nsa.compress_block, nsa.compress_stride
    entries = max(0, (context - length) // stride + 1)
    compressed = float(entries)
    if average:  # entry j is seen by the last context - j stride - length + 1 tokens
        compressed *= (context - length + 1 - stride * (entries - 1) / 2) / context
    return compressed + seen(nsa.select_topk * nsa.select_block) + seen(nsa.sliding_window)


def _pair(config: ModelConfig, *, absorbed: bool) -> int:
    """Multiply-adds of attention for one query token and one token that it sees, in one layer."""
    attention = config.attention
    if isinstance(attention, GQAConfig):
        return attention.num_attention_heads * 2 * attention.head_dim
    if isinstance(attention, NSAConfig):
        return attention.num_attention_heads * attention.row_dim
    if absorbed:
        return attention.num_attention_heads * (2 * attention.kv_lora_rank + attention.qk_rope_head_dim)
    return attention.num_attention_heads * (attention.qk_head_dim + attention.v_head_dim)


def kv_bytes_per_token(
    config: ModelConfig, dtype: CacheDtype = "bfloat16", *, mtp: bool = False, index_keys: IndexKeys = "wide"
) -> int:
    """Cache that one token keeps, over all layers; `mtp` adds those of the prediction modules.

    With `index_keys` fp8 an indexer's key is a byte an element and a float32 scale: 132 bytes in V3.2.
    ValueError for the cache in `fp8`, or for such keys, where there is none.
    """
    layers = config.num_cached_layers if mtp else config.num_hidden_layers
    if _known(dtype, *BYTES, "fp8") == "fp8":
        return layers * (math.prod(fp8_cache_shape(config, index_keys)) + index_key_bytes(config, index_keys))
    return layers * cache_row_bytes(config, BYTES[dtype], index_keys)


def cache_row_bytes(config: ModelConfig, dtype_bytes: int, index_keys: IndexKeys = "wide") -> int:
    """The same of one layer. ValueError for narrow keys of an indexer that is not there."""
    attention = config.attention
    if index_keys == "wide":
        return math.prod(attention.cache_shape) * dtype_bytes
    keys = index_key_bytes(config, index_keys)
    assert isinstance(attention, MLAConfig)
    return attention.latent_dim * dtype_bytes + keys


def index_key_bytes(config: ModelConfig, index_keys: IndexKeys) -> int:
    """Per token and layer, beside a row of the cache: 0 for wide keys, which are in it."""
    if index_keys == "wide":
        return 0
    attention = config.attention
    if not isinstance(attention, MLAConfig) or attention.indexer is None:
        raise ValueError("index_keys is 'fp8', but the model's attention has no indexer; leave it at 'wide'")
    return attention.indexer.index_head_dim + BYTES["float32"]


def fp8_cache_shape(config: ModelConfig, index_keys: IndexKeys = "wide") -> tuple[int, ...]:
    """Bytes cached per token and layer in FP8: e4m3, and a float32 scale for each 128 numbers.

    A latent row (C + 4 ceil(C / 128) + 2 R,) keeps its rotated key in bfloat16; keys and values are (2, G,
    Q + 4 ceil(Q / 128)). ValueError for NSA, for an indexer whose keys are wide, as these lie in the latent's
    row, and for rows whose scales would not be aligned.
    """
    attention = config.attention
    if isinstance(attention, NSAConfig):
        raise ValueError(
            "the cache is asked for in fp8, but this model's sparse attention reads it as it is; leave "
            "cache_dtype (--kv-cache-dtype) at auto"
        )
    if isinstance(attention, MLAConfig) and attention.indexer and index_keys == "wide":
        raise ValueError(
            "the cache is asked for in fp8, but the wide keys of this model's sparse attention lie in its "
            "rows; ask for index_keys (--index-keys) fp8 too, or leave cache_dtype (--kv-cache-dtype) at auto"
        )
    numbers, behind = (
        (attention.kv_lora_rank, attention.qk_rope_head_dim)
        if isinstance(attention, MLAConfig)
        else (attention.head_dim, 0)
    )
    if numbers % 4:
        raise ValueError(
            f"the cache is asked for in fp8, but a row has {numbers} numbers; their float32 scales want a "
            f"multiple of 4, so leave cache_dtype (--kv-cache-dtype) at auto"
        )
    row = numbers + 4 * math.ceil(numbers / FP8_GROUP) + 2 * behind
    return (row,) if isinstance(attention, MLAConfig) else (2, attention.num_key_value_heads, row)


def weight_bytes(config: ModelConfig, dtype: WeightDtype, *, mtp: bool = True) -> int:
    """Bytes of the weights when stored in `dtype`.

    `fp8` and `int4` apply to the matrices of attention and feed-forward. Embedding, head, gate, norms, biases
    and the joints of prediction modules stay bfloat16; `e_score_correction_bias` is always float32. `fp8` has
    a float32 scale for each 128 x 128 block (or the config's own size), `int4` a bfloat16 scale for each 128
    weights of a row and no zero points. Ragged edges have whole scales.
    """
    blocks = (config.quantization or Fp8Blocks()).weight_block_size
    return sum(weight.count * stored_bytes(weight, dtype, blocks) for weight in weights(config, mtp=mtp))


def stored_bytes(weight: Weight, dtype: WeightDtype, blocks: tuple[int, int] = (128, 128)) -> int:
    """Bytes of one tensor, as `weight_bytes` counts it."""
    _known(dtype, *BYTES, "fp8", "int4")
    if weight.storage == "float32":
        return 4 * weight.numel
    if weight.storage == "plain" or dtype in BYTES:
        return BYTES.get(dtype, BYTES["bfloat16"]) * weight.numel
    rows, columns = weight.shape
    if dtype == "fp8":
        return weight.numel + 4 * math.ceil(rows / blocks[0]) * math.ceil(columns / blocks[1])
    return rows * (math.ceil(columns / 2) + 2 * math.ceil(columns / INT4_GROUP))


def distinct_experts(experts: int, top_k: int, tokens: int) -> float:
    """Experts that so many tokens touch in a layer, on average, if each picks its K alike: E(1 - (1-K/E)^T).

    Skewed routers touch fewer.
    """
    return experts * (1 - (1 - top_k / experts) ** tokens)


def step_bytes(
    config: ModelConfig,
    tokens: int,
    drawn: int,
    dtype_bytes: int,
    *,
    context: int | None = None,
    in_pieces: bool = False,
) -> int:
    """What a step of serving holds at its fullest beside weights and cache, `drawn` of its tokens drawn from.

    `context` is the longest that is served, by default the model's; `in_pieces` leaves what is not attention
    to the graphs that hold it (engine/pieces.py). Logits are held in float32 thrice while
    they are drawn from, and their cumulative sum in float64.
    """
    drawing = drawn * config.vocab_size * (3 * 4 + 8)
    if in_pieces:
        forward = tokens * _attending(config) * dtype_bytes
    else:
        forward = forward_bytes(config, tokens, 0, dtype_bytes, context=context)
    return max(forward, _head_bytes(config, tokens, drawn, dtype_bytes) + drawing)


def _head_bytes(config: ModelConfig, tokens: int, drawn: int, dtype_bytes: int) -> int:
    return (drawn * config.vocab_size + tokens * config.hidden_size) * dtype_bytes


def forward_bytes(
    config: ModelConfig, tokens: int, drawn: int, dtype_bytes: int, *, context: int | None = None
) -> int:
    """What the model itself holds of a step, up to the logits of `drawn` tokens: what a graph of it keeps.

    Summed tensor by tensor in the widest layer; an upper bound by a little, since PyTorch frees as it goes.
    """
    moe = config.moe
    # 1. Elements a token in the widest of: attention, routed experts with the shared ones, a dense layer.
    feeding = 3 * config.intermediate_size
    if moe is not None:
        routed = moe.num_experts_per_tok * (moe.moe_intermediate_size + config.hidden_size)
        feeding = max(feeding, routed + 3 * moe.shared_intermediate_size + 2 * config.hidden_size)
    layer = tokens * (max(_attending(config), feeding) + 3 * config.hidden_size) * dtype_bytes
    layer += tokens * _index_bytes(config.attention, context or config.max_position_embeddings, dtype_bytes)
    # 2. The head.
    return max(layer, _head_bytes(config, tokens, drawn, dtype_bytes))


def _attending(config: ModelConfig) -> int:
    """Elements that attention holds of a token."""
    attention = config.attention
    if isinstance(attention, MLAConfig):
        heads = attention.num_attention_heads
        query, value = attention.qk_head_dim, attention.v_head_dim
        row = attention.kv_lora_rank + attention.qk_rope_head_dim
        expanded = heads * (3 * query + attention.qk_nope_head_dim + 2 * value) + 2 * row
        absorbed = heads * (query + row + 2 * attention.kv_lora_rank + value) + 2 * row
        return max(expanded, absorbed)
    if isinstance(attention, NSAConfig):
        # Queries twice, three outputs and their sum, keys and values of four sets, their windows of l tokens.
        heads, groups, row = attention.num_attention_heads, attention.num_key_value_heads, attention.row_dim
        gathered = attention.compress_block // attention.compress_stride * groups * row
        outputs = heads * (2 * attention.qk_head_dim + 4 * attention.v_head_dim)
        return outputs + 4 * groups * row + 2 * gathered
    width = attention.num_attention_heads + 2 * attention.num_key_value_heads
    return attention.head_dim * (2 * width + attention.num_attention_heads)


def _index_bytes(attention: object, context: int, dtype_bytes: int) -> int:
    """What an indexer holds of a token while attention waits: its queries, a float32 score for each position
    of the context, and the choice as positions and as slots (int64, and what turns one into the other)."""
    indexer = attention.indexer if isinstance(attention, MLAConfig) else None
    if indexer is None or context <= indexer.index_topk:
        return 0
    queries = 3 * indexer.index_n_heads * indexer.index_head_dim * dtype_bytes
    return queries + 4 * context + 5 * 8 * indexer.index_topk


def _known(dtype: str, *choices: str) -> str:
    if dtype not in choices:
        raise ValueError(f"dtype is {dtype!r}; known here are {', '.join(choices)}")
    return dtype
