"""Cases of `grouped_mlp`: V2-Lite and a V3 slice, forward from 1 to 16k tokens, and forward with backward.

The V3 slice is what one of eight GPUs holds: 32 of 256 experts, with every choice local. The peer is torch's
`grouped_mm` between eager ops (sort, gather, SwiGLU, scatter, sum).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.harness import Call, Case
from shoal.ops.triton import experts

DTYPE = torch.bfloat16
Layer = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    name: str
    n_experts: int
    top_k: int
    hidden: int
    inner: int

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.inner * DTYPE.itemsize

    def flops(self, tokens: int) -> float:
        return 6.0 * tokens * self.top_k * self.hidden * self.inner


V2_LITE = Shape("V2-Lite", 64, 6, 2048, 1408)
V3_SLICE = Shape("V3 slice", 32, 8, 7168, 2048)
DECODE = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MIDDLE = (512, 1024, 2048, 4096)
MANY = (8192, 16384)
DECODE_TARGETS = dict.fromkeys((1, 2, 4, 8), "70%") | dict.fromkeys((32, 64, 128, 256), "88%")
TARGETS = {
    "V2-Lite": {512: "1.25 x", 1024: "1.40 x", 2048: "1.75 x", 8192: "500 TFLOP/s", 16384: "550 TFLOP/s"},
    "V3 slice": {512: "1.6 x", 1024: "1.6 x", 2048: "1.5 x", 8192: "590 TFLOP/s", 16384: "590 TFLOP/s"},
}
TRAINING_TARGETS = {"V2-Lite": "490 TFLOP/s", "V3 slice": "540 TFLOP/s"}


def weights(shape: Shape) -> tuple[Tensor, Tensor]:
    """Gate-up (E, 2F, D) and down (E, D, F), random."""
    E, D, inner = shape.n_experts, shape.hidden, shape.inner
    gate_up_E2FD = torch.randn(E, 2 * inner, D, device="cuda", dtype=DTYPE) / D**0.5
    return gate_up_E2FD, torch.randn(E, D, inner, device="cuda", dtype=DTYPE) / inner**0.5


def tokens(shape: Shape, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, experts and weights of `count` tokens; each token chooses K different experts at random."""
    x_TD = torch.randn(count, shape.hidden, device="cuda", dtype=DTYPE)
    experts_TK = torch.rand(count, shape.n_experts, device="cuda").topk(shape.top_k).indices
    return x_TD, experts_TK, torch.rand(count, shape.top_k, device="cuda")


def grouped_mm(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The layer in torch: grouped_mm between eager ops."""
    T, K = experts_TK.shape
    order_M = experts_TK.flatten().argsort(stable=True)
    counts_E = torch.zeros(gate_up.shape[0], dtype=torch.int32, device=x_TD.device)
    counts_E.scatter_add_(0, experts_TK.flatten(), torch.ones_like(order_M, dtype=torch.int32))
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    gate, up = F.grouped_mm(x_TD[order_M // K], gate_up.mT, offs=ends_E).chunk(2, dim=-1)
    y_MD = F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends_E)
    weighted_MD = y_MD * weights_TK.flatten()[order_M].unsqueeze(1).to(y_MD.dtype)
    out_MD = torch.empty_like(weighted_MD).index_copy(0, order_M, weighted_MD)
    return out_MD.view(T, K, -1).sum(1)


def least_bytes(shape: Shape, experts_TK: Tensor) -> float:
    """Each touched expert once, x in and y out."""
    touched = experts_TK.unique().numel()
    return touched * shape.expert_bytes + 2 * experts_TK.shape[0] * shape.hidden * DTYPE.itemsize


def _bound(side: Layer, inputs: tuple[Tensor, ...]) -> Call:
    return lambda: side(*inputs)


def forward(shape: Shape, matrices: tuple[Tensor, Tensor], count: int) -> Case:
    sets = [tokens(shape, count) for _ in range(8 if count <= 64 else 4 if count <= 1024 else 1)]
    sides = {"ours": experts.grouped_mlp, "torch grouped_mm": grouped_mm}
    return Case(
        op="experts forward",
        shape=f"{shape.name}, {count} tokens",
        flops=shape.flops(count),
        bytes=sum(least_bytes(shape, s[1]) for s in sets) / len(sets),
        calls={name: [_bound(side, (*s, *matrices)) for s in sets] for name, side in sides.items()},
        target=(DECODE_TARGETS | TARGETS[shape.name]).get(count, ""),
    )


def _step(side: Layer, inputs: tuple[Tensor, ...], dy_TD: Tensor) -> Call:
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        side(*leaves).backward(dy_TD)

    return step


def saved_bytes(side: Layer, inputs: tuple[Tensor, ...]) -> int:
    """What the backward pass keeps beside the layer's inputs."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    own = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y_TD = side(*leaves)  # alive until the hooks have run, so that no storage is counted under two names
    del y_TD
    return sum(kept.values())


def training(shape: Shape, matrices: tuple[Tensor, Tensor], count: int) -> Case:
    inputs = (*tokens(shape, count), *matrices)
    dy_TD = torch.randn_like(inputs[0])
    sides = {"ours": experts.grouped_mlp, "torch grouped_mm": grouped_mm}
    return Case(
        op="experts forward + backward",
        shape=f"{shape.name}, {count} tokens",
        flops=3 * shape.flops(count),
        bytes=3 * least_bytes(shape, inputs[1]),
        calls={name: [_step(side, inputs, dy_TD)] for name, side in sides.items()},
        target=TRAINING_TARGETS[shape.name] if count == 16384 else "",
        note="saved a token: "
        + ", ".join(
            f"{name} {saved_bytes(side, inputs) / count / 1e3:.1f} kB" for name, side in sides.items()
        ),
        graph=False,
    )


def cases() -> Iterator[Case]:
    for shape in (V2_LITE, V3_SLICE):
        matrices = weights(shape)
        for count in (*DECODE, *MIDDLE, *MANY):
            yield forward(shape, matrices, count)
        for count in (4096, 16384):
            yield training(shape, matrices, count)
