"""Cases of batch-invariant mode: each op of the forward path that has a form of its own there, against its
plain form in the same run. V2-Lite's shapes; the whole block is in `block`, decoding attention in
`attention`.

The plain form is the peer, so a ratio below 1 is what the mode costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.kernels import experts
from benchmarks.kernels.harness import Case
from shoal.ops import api as ops
from shoal.ops import dispatch

DTYPE = torch.bfloat16
HIDDEN, HEADS, VOCABULARY = 2048, 16, 102400


@torch.inference_mode()
def fixed(op: Callable[..., object], *arguments: Any) -> object:
    """The op in batch-invariant mode."""
    with dispatch.batch_invariant():
        return op(*arguments)


def _case(op: str, shape: str, flops: float, moved: float, call: Callable[[], object]) -> Case:
    return Case(op, shape, flops, moved, {"ours": [partial(fixed, call)], "plain": [torch.no_grad()(call)]})


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=DTYPE)


def cases() -> Iterator[Case]:
    down = _draw(HIDDEN, HEADS * 128)
    head = _draw(VOCABULARY, HIDDEN)
    shape = experts.V2_LITE
    matrices = experts.weights(shape)
    shared = _draw(2 * shape.inner, HIDDEN), _draw(2 * shape.inner, HIDDEN), _draw(HIDDEN, 2 * shape.inner)
    router = _draw(shape.n_experts, HIDDEN)
    for tokens in (1, 32, 256, 8192):
        rows, x_TD = f"{tokens} tokens", _draw(tokens, HIDDEN)
        inputs = experts.tokens(shape, tokens)
        moved = experts.least_bytes(shape, inputs[1])
        both = 2.0 * x_TD.numel() * 2
        yield _case(
            "linears, batch-invariant", rows, 2.0 * tokens * down.numel(), down.nbytes + both,
            partial(ops.linears, x_TD, (down,), (None,)),
        )  # fmt: skip
        yield _case(
            "gate, batch-invariant", rows, 2.0 * tokens * router.numel(), router.nbytes + both / 2,
            partial(ops.gate, x_TD, router, 6, scoring_func="softmax"),
        )  # fmt: skip
        yield _case(
            "mixture, batch-invariant", rows,
            shape.flops(tokens) + 2.0 * tokens * sum(matrix.numel() for matrix in shared),
            moved + sum(matrix.nbytes for matrix in shared),
            partial(ops.mixture, *inputs, *matrices, *shared),
        )  # fmt: skip
        if tokens >= 256:
            weights_T, targets_T = torch.ones(tokens, device="cuda"), torch.arange(tokens, device="cuda")
            yield _case(
                "head and log-probability, batch-invariant", rows, 2.0 * tokens * head.numel(), head.nbytes,
                partial(ops.linear_cross_entropy, x_TD, head, targets_T, weights_T),
            )  # fmt: skip
    q, k, v = _draw(4096, HEADS, 192), _draw(4096, HEADS, 192), _draw(4096, HEADS, 128)
    cu_S1 = torch.tensor([0, 4096], device="cuda", dtype=torch.int32)
    yield _case(
        "attention, batch-invariant", "4k, 16 heads", HEADS * 320.0 * 4096**2, 0.0,
        partial(ops.attention, q, k, v, cu_S1, 4096, 192**-0.5),
    )  # fmt: skip
