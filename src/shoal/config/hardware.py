"""GPUs as data: memory, bandwidth, rates by dtype, links, power and price, each with its source and date.

A row holds what a datasheet prints, and beside it what was measured, where somebody measured: a roofline
takes the measured figure. Dense rates, without sparsity; links in one direction. The law: no figure without a
source, and no price where none was found: whoever knows one passes it in. The printed figures were read again
in reprints of their sheets on 2026-11-24 (H200, H100, B200, L40S and 4090 agree; A100 and H800 not found).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from shoal.config.cost import PEAK_FLOPS

Rate = Literal["bfloat16", "fp8"]
NODE = 8  # GPUs that one NVLink domain joins; beyond it the network does


@dataclass(frozen=True)
class Gpu:
    """One GPU, in bytes, bytes a second, FLOPs a second, watts and dollars an hour."""

    name: str
    memory: float
    bandwidth: float
    flops: Mapping[Rate, float]
    link: float  # to the other GPUs of the node
    network: float  # to other nodes
    watts: float
    price: float | None
    source: str
    price_source: str = "none found; pass one"
    measured_bandwidth: float | None = None  # reading
    measured_flops: Mapping[Rate, float] = field(default_factory=dict[Rate, float])
    measured_source: str = ""

    @property
    def read(self) -> float:
        """Bytes a second that a step can read: measured, else printed."""
        return self.measured_bandwidth or self.bandwidth

    def rate(self, weights: str) -> float:
        """FLOPs a second for weights so stored: FP8 where the GPU has it, int4 computed in bfloat16."""
        kind: Rate = "fp8" if weights == "fp8" and "fp8" in self.flops else "bfloat16"
        return self.measured_flops.get(kind, self.flops[kind])


MARKET = "mercatus-ai.com/blog/cloud-gpu-pricing, specialised clouds, on demand, 2026-05, middle of the range"
IB = 50e9  # one 400 Gb/s card a GPU

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "h200",
            memory=141e9,
            bandwidth=4.8e12,
            flops={"bfloat16": PEAK_FLOPS["H200"], "fp8": 1979e12},
            link=450e9,
            network=IB,
            watts=700,
            price=4.00,
            source="NVIDIA H200 datasheet, SXM, 2024-11",
            price_source=MARKET,
            measured_bandwidth=4.555e12,
            measured_flops={"bfloat16": 797e12, "fp8": 1512e12},
            measured_source="Triton read kernel and 8192^3 products, torch 2.11, 2026-11-22",
        ),
        Gpu(
            "h100",
            memory=80e9,
            bandwidth=3.35e12,
            flops={"bfloat16": PEAK_FLOPS["H100"], "fp8": 1979e12},
            link=450e9,
            network=IB,
            watts=700,
            price=3.00,
            source="NVIDIA H100 datasheet, SXM, 2024-10",
            price_source=MARKET,
        ),
        Gpu(
            "h800",
            memory=80e9,
            bandwidth=3.35e12,
            flops={"bfloat16": PEAK_FLOPS["H800"], "fp8": 1979e12},
            link=200e9,
            network=IB,
            watts=700,
            price=2.00,
            source="as H100, with NVLink cut to 400 GB/s both ways: arXiv 2505.09343, section 4.1, 2025-05",
            price_source="what arXiv 2412.19437, table 1, assumes, 2024-12",
        ),
        Gpu(
            "a100",
            memory=80e9,
            bandwidth=2.039e12,
            flops={"bfloat16": PEAK_FLOPS["A100"]},
            link=300e9,
            network=25e9,
            watts=400,
            price=1.30,
            source="NVIDIA A100 80GB datasheet, SXM, 2021-06",
            price_source=MARKET,
        ),
        Gpu(
            "b200",
            memory=180e9,
            bandwidth=8.0e12,
            flops={"bfloat16": PEAK_FLOPS["B200"], "fp8": 4500e12},
            link=900e9,
            network=IB,
            watts=1000,
            price=4.60,
            source="NVIDIA HGX B200 datasheet, 2024-11",
            price_source="huggingface.co/datasets/devidasmishra/ai-inference-hardware-economics-2026",
        ),
        Gpu(
            "l40s",
            memory=48e9,
            bandwidth=0.864e12,
            flops={"bfloat16": PEAK_FLOPS["L40S"], "fp8": 733e12},
            link=32e9,
            network=25e9,
            watts=350,
            price=None,
            source="NVIDIA L40S datasheet, 2023-08; link is PCIe 4.0 x16",
        ),
        Gpu(
            "rtx-4090",
            memory=24e9,
            bandwidth=1.008e12,
            flops={"bfloat16": PEAK_FLOPS["4090"], "fp8": 330e12},
            link=32e9,
            network=12.5e9,
            watts=450,
            price=None,
            source="NVIDIA Ada architecture paper, 2022-09; link is PCIe 4.0 x16",
        ),
    )
}


def gpu(name: str) -> Gpu:
    """The row of a name. ValueError names the nearest."""
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    near = difflib.get_close_matches(name.lower(), GPUS, n=3, cutoff=0.4) or sorted(GPUS)
    raise ValueError(
        f"no GPU is named {name!r}; nearest are {', '.join(near)} (known: {', '.join(sorted(GPUS))})"
    )
