"""Floor: the least time that serving a load can take on the device at hand, to say how near a measurement is.

A step takes the longer of its bytes over the rate at which they can be read and its FLOPs over the matrix
rate, as in planner.py. A GPU that config/hardware.py knows has its rates there; any other device is measured:
a large product in the weights' dtype, and a buffer as large as a step's weights read again and again. (So a
small model that lives in a CPU's caches is held to the caches, not to the memory behind them.)

The law: what is ideal is assumed. Experts are touched uniformly, all sequences march in step, nothing but the
weights, the cache and the arithmetic of the published formulas costs anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shoal.analysis.planner import Load, decode_point
from shoal.config import cost
from shoal.config.cost import WeightDtype
from shoal.config.hardware import GPUS, Gpu
from shoal.config.model import ModelConfig

_SECONDS = 0.2  # that each rate is measured for
_WIDTH = {"cpu": 1024, "cuda": 8192}  # of the product that gives the matrix rate


@dataclass(frozen=True)
class Floor:
    """In seconds, for `batch` requests at a time."""

    prefill: float  # of all their prompts
    step: float  # one decoding step, in the middle of the answers
    bound: str  # of that step: memory or compute
    read: float  # bytes a second
    flops: float
    source: str  # of the two rates

    def latency(self, tokens: int) -> float:
        """From the prompts to the last token, all in step."""
        return self.prefill + (tokens - 1) * self.step


def find_floor(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    batch: int,
    prompt: int,
    tokens: int,
    cache_dtype: Literal["auto", "fp8"] = "auto",
) -> Floor:
    """Of requests with so many tokens in and out, here. Where rates are measured it takes half a second."""
    load = Load(batch, prompt, tokens, _stored_as(dtype), 8.0 * dtype.itemsize, cache_dtype)
    return floor_on(_row(config, device, dtype, load, batch), config, load, batch)


def floor_on(row: Gpu, config: ModelConfig, load: Load, batch: int) -> Floor:
    """At the rates of a row of config/hardware.py."""
    flops = batch * load.prompt * cost.flops_per_token(config, load.prompt, "prefill")
    share = 1.0  # of the routed experts, that the prompts touch
    if config.moe is not None:
        experts, top_k = config.moe.n_routed_experts, config.moe.num_experts_per_tok
        share = cost.distinct_experts(experts, top_k, batch * load.prompt) / experts
    read = sum(
        weight.count * cost.stored_bytes(weight, load.weights) * (share if weight.part == "routed" else 1)
        for weight in cost.weights(config, mtp=False)
        if weight.part != "embedding" or config.tie_word_embeddings
    )
    rate, point = row.rate(load.weights), decode_point(config, row, 1, load, batch)
    prefill = max(flops / rate, read / row.read)
    return Floor(prefill, point.floor_s, point.bound, row.read, rate, row.source)


def _stored_as(dtype: torch.dtype) -> WeightDtype:
    names: dict[torch.dtype, WeightDtype] = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    if dtype not in names:
        raise ValueError(f"the weights are {dtype}; floors are known for float32 and bfloat16")
    return names[dtype]


def _row(config: ModelConfig, device: torch.device, dtype: torch.dtype, load: Load, batch: int) -> Gpu:
    """The device, from the table or measured."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device).lower().replace(" ", "-")
        known = next((gpu for gpu in GPUS.values() if gpu.name in name), None)
        if known is not None:
            return known
    some = next(iter(GPUS.values()))  # any will do to count bytes
    touched = int(decode_point(config, some, 1, load, batch).weight_bytes)
    flops, read = measure_flops(device, dtype), measure_read(device, touched)
    source = f"measured: a product {_WIDTH[device.type]} wide, {max(touched, 1) / 2**20:,.1f} MiB read again"
    return Gpu(
        device.type,
        memory=0.0,
        bandwidth=read,
        flops={"bfloat16": flops},
        link=1.0,
        network=1.0,
        watts=0.0,
        price=None,
        source=source,
    )


def measure_flops(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of a large square product."""
    width = _WIDTH[device.type]
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * width**3 / _best(lambda: torch.mm(a, b, out=out), device)


def measure_read(device: torch.device, num_bytes: int) -> float:
    """The best rate at which a buffer of so many bytes is read again and again."""
    words = max(1, min(num_bytes, 1 << 31) // 4)
    buffer = torch.ones(words, device=device)
    return 4 * words / _best(lambda: buffer.sum(), device)


def _best(work: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of the fastest of many calls."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    fastest, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end or fastest == float("inf"):
        wait()
        start = time.perf_counter()
        work()
        wait()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest
