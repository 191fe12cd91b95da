"""Cases of sampling: 1 to 256 rows of V3's vocabulary, by what is asked of them.

The peer is the reference on the GPU, which ranks by topk and waits for the host, so it is timed eagerly; ours
is replayed in a CUDA graph, as a server runs it. Logits are normal of standard deviation 2: flat, so that
top-p keeps thousands of tokens, which is the hard case.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.harness import Case, time_us
from shoal.ops.reference import sampling as reference
from shoal.ops.triton import sampling

VOCAB = 129_280
WISHES = {  # temperature, top_k, top_p, min_p
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (0.7, 0, 1.0, 0.0),
    "top-k 50": (1.0, 50, 1.0, 0.0),
    "top-p 0.95": (1.0, 0, 0.95, 0.0),
    "top-k 50, top-p 0.9, min-p 0.05": (0.7, 50, 0.9, 0.05),
}


def _rows(count: int, wish: tuple[float, int, float, float]) -> tuple[Tensor, ...]:
    temperature, top_k, top_p, min_p = wish
    return (
        torch.full((count,), temperature, device="cuda"),
        torch.full((count,), top_k, dtype=torch.int32, device="cuda"),
        torch.full((count,), top_p, dtype=torch.float64, device="cuda"),
        torch.full((count,), min_p, device="cuda"),
        torch.rand(count, dtype=torch.float64, device="cuda"),
    )


def cases() -> Iterator[Case]:
    for count in (1, 32, 256):
        logits_SV = 2 * torch.randn(count, VOCAB, device="cuda", dtype=torch.bfloat16)
        for name, wish in WISHES.items():
            rows = _rows(count, wish)
            eager = time_us([partial(reference.sample, logits_SV, *rows, None)], graph=False, budget_ms=40)
            yield Case(
                op="sample",
                shape=f"{count} rows, {name}",
                flops=0.0,
                bytes=2.0 * count * VOCAB,
                calls={"ours": [partial(sampling.sample, logits_SV, *rows, None)] * 4},
                note=f"the reference, eager: {eager:.0f} us",
            )
        ids_SN = torch.randint(0, VOCAB, (count, 2048), device="cuda")
        lengths_S = torch.full((count,), 2048, device="cuda")
        factors = (torch.full((count,), x, device="cuda") for x in (1.1, 0.1, 0.2))
        penalties = (lengths_S, lengths_S // 2, *factors)
        yield Case(
            op="penalise",
            shape=f"{count} rows, 2048 ids",
            flops=0.0,
            bytes=6.0 * count * VOCAB,
            calls={
                "ours": [partial(sampling.penalise, logits_SV, ids_SN, *penalties)] * 4,
                "eager": [partial(reference.penalise, logits_SV, ids_SN, *penalties)] * 4,
            },
        )
