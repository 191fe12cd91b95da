"""Cases of the AdamW update: a layer's stack of experts, by what is kept of weights and moments.

The peer is torch's fused AdamW on the same dtypes where it has them, on float32 else. Bytes are what one
update must read and write; 8-bit moments count their scales.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.kernels.harness import Call, Case
from shoal.ops.api import Moments
from shoal.ops.triton import adamw

SHAPE = (64, 2816, 2048)  # gate and up of a layer of V2-Lite
RULE = (1e-4, (0.9, 0.95), 1e-8, 0.1, 7)
BYTES = {
    "bfloat16 weight, 8-bit moments": 10 + 16 / 256,
    "bfloat16 weight and moments": 14,
    "float32 master": 28,
}


def _ours(kind: str) -> Call:
    weight, grad = (torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    step = torch.full((), 5.0, device="cuda")
    master = weight.float() if kind == "float32 master" else None
    if "8-bit" in kind:
        scales = [torch.ones(weight.numel() // 256, device="cuda") for _ in range(2)]
        first = torch.randint(-127, 128, SHAPE, device="cuda", dtype=torch.int8)
        moments = Moments(first, torch.randint(0, 255, SHAPE, device="cuda", dtype=torch.uint8), *scales)
    else:
        dtype = torch.float32 if master is not None else torch.bfloat16
        moments = Moments(*(torch.rand(SHAPE, device="cuda").to(dtype) for _ in range(2)))
    factor = torch.ones((), device="cuda")
    return lambda: adamw.adamw(weight, grad, moments, master, factor, step, *RULE)


def _torch(kind: str) -> Call:
    dtype = torch.float32 if kind == "float32 master" else torch.bfloat16
    weight, grad, first, second = (torch.rand(SHAPE, device="cuda", dtype=dtype) for _ in range(4))
    step = torch.full((), 5.0, device="cuda")
    return lambda: torch._fused_adamw_(
        [weight], [grad], [first], [second], [], [step],
        lr=1e-4, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    numel = torch.Size(SHAPE).numel()
    for kind, size in BYTES.items():
        yield Case(
            op="adamw",
            shape=f"{numel / 1e6:.0f}M, {kind}",
            flops=0.0,
            bytes=size * numel,
            calls={"ours": [_ours(kind)], "torch fused": [_torch(kind)]},
            target="85%",
        )
