"""Cases of the router with the permutation: 64 and 256 experts, 1 to 16k tokens, in a CUDA graph.

The peer is torch's eager route (the reference) with a sort and a count; the router alone stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.harness import Case
from shoal.ops.reference import routing as reference
from shoal.ops.triton import permutation, routing


@dataclass(frozen=True)
class Router:
    name: str
    n_experts: int
    top_k: int
    scoring_func: str
    groups: tuple[int, int]
    has_bias: bool
    norm: bool


ROUTERS = (
    Router("64 experts, softmax", 64, 6, "softmax", (1, 1), False, False),
    Router("256 experts, V3", 256, 8, "sigmoid", (8, 4), True, True),
)


def _route(side: Any, router: Router, logits_TE: Tensor, bias_E: Tensor | None) -> tuple[Tensor, ...]:
    return side.route(
        logits_TE,
        router.top_k,
        router.scoring_func,
        bias_E,
        *router.groups,
        router.norm,
        1.0,
        None,
    )


def _both(router: Router, logits_TE: Tensor, bias_E: Tensor | None) -> None:
    experts_TK = _route(routing, router, logits_TE, bias_E)[0]
    permutation.group_by_expert(experts_TK, router.n_experts, 16 if len(logits_TE) <= 256 else 128)


def _eager(router: Router, logits_TE: Tensor, bias_E: Tensor | None) -> None:
    flat_M = _route(reference, router, logits_TE, bias_E)[0].flatten()
    flat_M.argsort(stable=True)
    torch.zeros(router.n_experts, dtype=torch.int64, device="cuda").scatter_add_(
        0, flat_M, torch.ones_like(flat_M)
    )


def cases() -> Iterator[Case]:
    for router in ROUTERS:
        bias_E = torch.randn(router.n_experts, device="cuda") * 0.1 if router.has_bias else None
        for count in (1, 8, 32, 128, 256, 1024, 4096, 8192, 16384):
            logits_TE = torch.randn(count, router.n_experts, device="cuda")
            yield Case(
                op="routing + permutation",
                shape=f"{router.name}, {count} tokens",
                flops=0.0,
                bytes=8.0 * logits_TE.numel() + 24.0 * count * router.top_k,
                calls={
                    "ours": [partial(_both, router, logits_TE, bias_E)] * 10,
                    "ours, route alone": [partial(_route, routing, router, logits_TE, bias_E)] * 10,
                    "torch": [partial(_eager, router, logits_TE, bias_E)] * 10,
                },
                target="8 us" if count <= 256 else "5% of the layer" if count == 8192 else "",
            )
