"""Planner: whether a model fits on some GPUs, how it is laid out, how fast it can be, and what that costs.

Everything is arithmetic on a ModelConfig (config/cost.py) and a Gpu (config/hardware.py); nothing is loaded.
A step takes the longer of its bytes over the memory bus and its FLOPs over the matrix rate, then what the
links carry, nothing of it overlapped: that is the floor. Of routed experts only the distinct ones that the
step's tokens touch are read. What is predicted is the floor and what the engine adds to it, as measured.

The law: a floor uses only figures with a source; what was fitted to a measurement says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from shoal.config import cost
from shoal.config.cost import WeightDtype
from shoal.config.hardware import NODE, Gpu
from shoal.config.model import MLAConfig, ModelConfig, NSAConfig

Layout = Literal["whole", "expert parallel", "tensor parallel"]

USABLE = 0.9  # of a GPU's memory, as the engine takes it
CHUNK = 8192  # tokens of the largest step, as the engine has it
LADDER = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# What the engine adds to the floor of a decoding step, a layer, and a layer and sequence. Fitted to the five
# steps of benchmarks/results/2026-11-24-h200-decode.md (27 layers, batch 1 to 256), met within 12%.
STEP_OVERHEAD, SEQUENCE_OVERHEAD = 30e-6, 0.8e-6
PREFILL_SHARE = 0.66  # of the floor that the engine reaches on four prompts of 4K, same file
# What DeepSeek reports of V3's training on 2,048 H800: share of the bfloat16 rate, causal attention counted
# once (arXiv 2505.09343, table 4). Its other figures say the same: 180,000 hours for 1e12 tokens (arXiv
# 2412.19437, table 1) at 250 GFLOPs each (2505.09343, table 2) are 39.0% of 989.5 TFLOP/s.
TRAINING_MFU = 0.3894
STATE_BYTES = 16  # a parameter: bfloat16 weight and gradient, float32 master and two moments


@dataclass(frozen=True)
class Load:
    """What is asked of a server: sequences at once, over all GPUs, of so many tokens in and out."""

    batch: int | None = None  # None: as many as fit, up to 256 a GPU
    prompt: int = 1024
    output: int = 128
    weights: WeightDtype = "bfloat16"
    cache_bits: float = 16.0  # of an element of the cache
    cache_dtype: Literal["auto", "fp8"] = "auto"  # "fp8": as the engine lays it out, whatever cache_bits says

    def __post_init__(self) -> None:
        if self.cache_dtype not in ("auto", "fp8"):
            raise ValueError(
                f"cache_dtype (--kv-cache-dtype) is {self.cache_dtype!r}; it must be auto or fp8"
            )
        for name in ("prompt", "output"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 token or more")
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch is {self.batch}; it must be 1 or more")
        if not 1 <= self.cache_bits <= 32:
            raise ValueError(f"cache_bits is {self.cache_bits}; an element takes 1 to 32 bits")

    @property
    def context(self) -> float:
        """Tokens that a decoding step looks back on, on average over an answer."""
        return self.prompt + self.output / 2


@dataclass(frozen=True)
class Memory:
    """Of the fullest GPU, in bytes."""

    weights: float
    cache: float
    activations: float
    limit: float

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.activations

    @property
    def fits(self) -> bool:
        return self.total <= self.limit


@dataclass(frozen=True)
class Point:
    """One decoding step of a batch."""

    batch: int
    experts: float  # distinct, in a layer
    weight_bytes: float  # read on a GPU
    cache_bytes: float
    memory_s: float
    compute_s: float
    link_s: float
    overhead_s: float

    @property
    def floor_s(self) -> float:
        return max(self.memory_s, self.compute_s) + self.link_s

    @property
    def predicted_s(self) -> float:
        return self.floor_s + self.overhead_s

    @property
    def bound(self) -> str:
        return "memory" if self.memory_s >= self.compute_s else "compute"


@dataclass(frozen=True)
class Serving:
    """How a load is served, and what it comes to. Rates are tokens a second over all GPUs, as predicted."""

    layout: Layout
    count: int
    degree: int  # GPUs that hold the model together; the rest repeat them
    memory: Memory
    room: int  # sequences of the load that fit beside the weights
    point: Point | None  # of the load's batch; None where it does not fit
    ladder: tuple[Point, ...]  # of every batch that fits
    prefill_floor: float
    prefill: float
    output: float | None  # tokens a second, prompts read in between
    joules_per_token: float | None  # of output, at full power
    dollars_per_million: float | None  # of output; None without a price


@dataclass(frozen=True)
class Training:
    tokens: float
    flops_per_token: float
    mfu: float
    gpu_hours: float
    days: float
    megawatt_hours: float
    dollars: float | None
    state_bytes: int
    gpus_for_states: int


def plan_serving(config: ModelConfig, gpu: Gpu, count: int, load: Load) -> Serving:
    """The layout that serves the load fastest among those that fit; else the one nearest to fitting."""
    if count < 1:
        raise ValueError(f"count is {count}; there must be 1 GPU or more")
    longest = load.prompt + load.output
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"prompt and output are {longest:,} tokens; this model reads {config.max_position_embeddings:,}"
        )
    plans = [_serve(config, gpu, count, load, *each) for each in _layouts(config, count)]
    fitting = [plan for plan in plans if plan.point is not None]
    if not fitting:
        return min(plans, key=lambda plan: plan.memory.total)
    return max(fitting, key=lambda plan: plan.output or 0.0)


def fewest(config: ModelConfig, gpu: Gpu, load: Load) -> int:
    """The least power of two of GPUs that serves the load."""
    count = 1
    while count <= 1024:
        if plan_serving(config, gpu, count, load).point is not None:
            return count
        count *= 2
    raise ValueError(
        f"the load does not fit on 1,024 x {gpu.name}; lower the batch ({load.batch}) or the context"
    )


def plan_training(
    config: ModelConfig,
    gpu: Gpu,
    count: int,
    tokens: float,
    *,
    context: int = 4096,
    mfu: float = TRAINING_MFU,
) -> Training:
    """Hours, energy and money of training on so many tokens at a share `mfu` of the printed bfloat16 rate."""
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu is {mfu}; it is a share of the GPU's rate, above 0 and at most 1")
    if tokens <= 0:
        raise ValueError(f"tokens is {tokens}; training takes more than none")
    flops = cost.flops_per_token(config, context, "training", mtp=True)
    hours = tokens * flops / (gpu.flops["bfloat16"] * mfu) / 3600
    state = STATE_BYTES * cost.params(config).total
    return Training(
        tokens=tokens,
        flops_per_token=flops,
        mfu=mfu,
        gpu_hours=hours,
        days=hours / count / 24,
        megawatt_hours=hours * gpu.watts / 1e6,
        dollars=None if gpu.price is None else hours * gpu.price,
        state_bytes=state,
        gpus_for_states=math.ceil(state / (USABLE * gpu.memory)),
    )


def decode_point(
    config: ModelConfig,
    gpu: Gpu,
    count: int,
    load: Load,
    batch: int,
    layout: Layout = "whole",
    degree: int = 1,
) -> Point:
    """A decoding step of `batch` sequences over all GPUs, each looking back on `load.context` tokens.

    `degree` GPUs hold the model together, and `count / degree` such groups share the batch.
    """
    whole = math.ceil(batch / (count // degree))  # sequences of a group: those whose tokens its experts see
    slices = degree if layout == "tensor parallel" else 1
    own = whole if layout == "tensor parallel" else math.ceil(whole / degree)  # sequences that one GPU holds
    experts, weights = 0.0, 0.0
    if config.moe is not None:
        experts = cost.distinct_experts(config.moe.n_routed_experts, config.moe.num_experts_per_tok, whole)
    for weight, stored in _stored(config, load.weights):
        if weight.part == "routed":
            assert config.moe is not None
            weights += stored * experts / config.moe.n_routed_experts / degree
        elif weight.part != "embedding" or config.tie_word_embeddings:
            weights += stored / slices
    cache = own * _looked_back_on(config, load, slices)
    flops = own / slices * cost.flops_per_token(config, round(load.context), "decode")
    link = gpu.link if degree <= NODE else gpu.network
    return Point(
        batch=batch,
        experts=experts,
        weight_bytes=weights,
        cache_bytes=cache,
        memory_s=(weights + cache) / gpu.read,
        compute_s=flops / gpu.rate(load.weights),
        link_s=_sent(config, degree, own, load, layout) / link,
        overhead_s=config.num_hidden_layers * (STEP_OVERHEAD + own / slices * SEQUENCE_OVERHEAD),
    )


def _layouts(config: ModelConfig, count: int) -> Iterator[tuple[Layout, int]]:
    """Every layout that `count` GPUs allow, and how many hold the model together."""
    yield "whole", 1
    for degree in range(2, count + 1):
        if count % degree:
            continue
        if config.moe is not None and config.moe.n_routed_experts >= degree:
            yield "expert parallel", degree
        if degree <= NODE and config.attention.num_attention_heads % degree == 0:
            yield "tensor parallel", degree


def _serve(config: ModelConfig, gpu: Gpu, count: int, load: Load, layout: Layout, degree: int) -> Serving:
    # 1. What a GPU holds, and so how many sequences there is room for.
    slices = degree if layout == "tensor parallel" else 1
    weights = sum(
        stored / (degree if weight.part == "routed" else slices)
        for weight, stored in _stored(config, load.weights)
    )
    a_sequence = (load.prompt + load.output) * _cache_bytes(config, load, slices)
    limit = USABLE * gpu.memory
    own_at_most = 256 * slices
    activations = cost.step_bytes(config, CHUNK, min(CHUNK, own_at_most), 2, context=round(load.context))
    own_room = max(0, int((limit - weights - activations) // a_sequence))
    room = own_room * count // slices
    batch = load.batch or max(1, min(room, 256 * count))
    own = math.ceil(batch * slices / count)
    memory = Memory(weights, own * a_sequence, activations, limit)

    # 2. Steps, by batch.
    def at(size: int) -> Point:
        return decode_point(config, gpu, count, load, size, layout, degree)

    sizes = sorted({size for size in LADDER if size <= room} | ({batch} if batch <= room else set()))
    point = at(batch) if batch <= room else None

    # 3. Prompts: a step reads every weight it touches, and computes.
    flops = load.prompt * cost.flops_per_token(config, load.prompt, "prefill")
    together = max(1, CHUNK // load.prompt)  # prompts a step and device
    read = weights / gpu.read
    link = gpu.link if degree <= NODE else gpu.network
    sent = _sent(config, degree, together * load.prompt, load, layout) / link
    seconds = max(together * flops / gpu.rate(load.weights) / slices, read) + sent
    prefill_floor = count // slices * together * load.prompt / seconds

    # 4. What comes out, and what it takes: a request's share of prompts read and steps taken.
    prefill, output, joules, dollars = PREFILL_SHARE * prefill_floor, None, None, None
    if point is not None:
        a_request = load.prompt / prefill + load.output * point.predicted_s / batch
        output = load.output / a_request
        joules = count * gpu.watts / output
        dollars = None if gpu.price is None else count * gpu.price / 3600 / output * 1e6
    return Serving(
        layout=layout,
        count=count,
        degree=degree,
        memory=memory,
        room=room,
        point=point,
        ladder=tuple(map(at, sizes)),
        prefill_floor=prefill_floor,
        prefill=prefill,
        output=output,
        joules_per_token=joules,
        dollars_per_million=dollars,
    )


def _stored(config: ModelConfig, dtype: WeightDtype) -> Iterator[tuple[cost.Weight, int]]:
    """Each kind of tensor, without prediction modules, and the bytes of all of that kind."""
    for weight in cost.weights(config, mtp=False):
        yield weight, weight.count * cost.stored_bytes(weight, dtype)


def _cache_bytes(config: ModelConfig, load: Load, slices: int) -> float:
    """Of one token on one GPU. Tensor parallelism splits key-value heads; a latent row it repeats."""
    if load.cache_dtype == "fp8":
        whole = float(cost.kv_bytes_per_token(config, "fp8"))
    else:
        whole = cost.kv_bytes_per_token(config, "bfloat16") * load.cache_bits / 16
    attention = config.attention
    return whole if isinstance(attention, MLAConfig) else whole / min(slices, attention.num_key_value_heads)


def _looked_back_on(config: ModelConfig, load: Load, slices: int) -> float:
    """Bytes of its cache that a token reads: all, or what sparse attention picks, and what it picks by."""
    attention, whole = config.attention, _cache_bytes(config, load, slices)
    if isinstance(
        attention, NSAConfig
    ):  # a row is four keys and values, of which it reads one of some tokens
        return whole / 4 * cost.tokens_read(attention, load.context, average=False)
    indexer = attention.indexer if isinstance(attention, MLAConfig) else None
    if indexer is None or load.context <= indexer.index_topk:
        return load.context * whole
    keys = indexer.index_head_dim / attention.cache_shape[0]  # of a row of the cache
    return whole * (load.context * keys + indexer.index_topk * (1 - keys))


def _sent(config: ModelConfig, degree: int, tokens: int, load: Load, layout: Layout) -> float:
    """Bytes that leave a GPU for `tokens` of its own in all layers.

    Experts: a copy of a token to each choice (in FP8 where weights are), and a bfloat16 result back. Tensors:
    two sums a layer around a ring.
    """
    away = (degree - 1) / degree
    if layout == "expert parallel":
        assert config.moe is not None
        choice = config.hidden_size * ((1 if load.weights == "fp8" else 2) + 2)
        return config.num_moe_layers * tokens * config.moe.num_experts_per_tok * choice * away
    if layout == "tensor parallel":
        return config.num_hidden_layers * 2 * 2 * away * tokens * config.hidden_size * 2
    return 0.0
