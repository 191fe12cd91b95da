"""Cases of the ops that cost bandwidth or launches: norms, SwiGLU, RoPE, the cache's rows, the router's
logits.

Training shapes are held against the bytes each op must move, decoding shapes against the smallest launch. The
peers are eager PyTorch (the reference) and, where it fuses them too, the same by torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.harness import Case
from shoal.ops.reference import cache as reference_cache
from shoal.ops.reference import layers as reference
from shoal.ops.reference import routing as reference_routing
from shoal.ops.triton import cache, gate, norms, rotary, swiglu

DTYPE = torch.bfloat16
TOKENS = (1, 256, 16384)
EPS = 1e-6
Op = Callable[..., Any]


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=DTYPE)


def _sides(ours: Op, theirs: Op, fuse: bool) -> dict[str, Op]:
    compiled = {"compiled": torch.compile(theirs, dynamic=False)} if fuse else {}
    return {"ours": ours, "eager": theirs, **compiled}


def _forward(
    op: str,
    shape: str,
    ours: Op,
    theirs: Op,
    sets: Sequence[Sequence[Any]],
    moved: float,
    *,
    fuse: bool = False,
) -> Case:
    return Case(
        op=op,
        shape=shape,
        flops=0.0,
        bytes=moved,
        calls={name: [partial(side, *s) for s in sets] for name, side in _sides(ours, theirs, fuse).items()},
    )


def _step(side: Op, inputs: Sequence[Tensor]) -> Callable[[], None]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.no_grad():
        out = side(*leaves)
    grads = [torch.randn_like(x) for x in (out if isinstance(out, tuple) else (out,))]

    def step() -> None:
        out = side(*leaves)
        torch.autograd.grad(out if isinstance(out, tuple) else (out,), leaves, grads)

    return step


def _training(op: str, shape: str, ours: Op, theirs: Op, inputs: Sequence[Tensor], moved: float) -> Case:
    return Case(
        op=f"{op} forward + backward",
        shape=shape,
        flops=0.0,
        bytes=moved,
        calls={name: [_step(side, inputs)] for name, side in _sides(ours, theirs, fuse=True).items()},
        graph=False,
    )


def _angles(tokens: int, pairs: int) -> tuple[Tensor, Tensor]:
    angles_TR2 = 10 * torch.randn(tokens, pairs, device="cuda")
    return angles_TR2.cos(), angles_TR2.sin()


def _norms() -> Iterator[Case]:
    def alone(side: Any) -> Op:
        return lambda x, weight: side.rms_norm(x, weight, EPS)

    def added(side: Any) -> Op:
        return lambda x, y, weight: side.add_rms_norm(x, y, weight, EPS)

    for tokens in TOKENS:
        for dim in (2048, 7168):
            sets = [(_normal(tokens, dim), _normal(tokens, dim), _normal(dim)) for _ in range(4)]
            row, shape = 2.0 * tokens * dim, f"{tokens} x {dim}"
            pairs = [(x, weight) for x, _, weight in sets]
            yield _forward("rms_norm", shape, alone(norms), alone(reference), pairs, 2 * row)
            fuse = tokens > 256 and dim == 7168
            yield _forward("add_rms_norm", shape, added(norms), added(reference), sets, 4 * row, fuse=fuse)
            if fuse:
                yield _training(
                    "add_rms_norm", shape, added(norms), added(reference), sets[0], 4 * row + 4 * row
                )


def _swiglu() -> Iterator[Case]:
    for tokens in TOKENS:
        for dim in (2816, 10944):
            sets = [(_normal(tokens, dim), _normal(tokens, dim)) for _ in range(4)]
            row, shape = 2.0 * tokens * dim, f"{tokens} x {dim}"
            fuse = tokens > 256 and dim == 10944
            yield _forward("swiglu", shape, swiglu.swiglu, reference.swiglu, sets, 3 * row, fuse=fuse)
            if fuse:
                yield _training("swiglu", shape, swiglu.swiglu, reference.swiglu, sets[0], 8 * row)


def _rope() -> Iterator[Case]:
    for heads in (16, 128):
        tokens, dim = 16384, 64
        sets = [(_normal(tokens, heads, 192)[..., 128:], *_angles(tokens, dim // 2), True) for _ in range(2)]
        moved = 4.0 * tokens * heads * dim + 4.0 * tokens * dim
        yield _forward(
            "rope", f"{tokens} x {heads} x {dim}", rotary.rope, reference.rope, sets, moved, fuse=heads == 16
        )


def _cache() -> Iterator[Case]:
    for tokens in (1, 32, 256, 8192):
        for heads in (16, 128):
            rank, dim = 512, 64
            pages = _normal(4096, 64, rank + dim)
            sets = [
                (
                    _normal(tokens, heads, 192)[..., 128:],
                    _normal(tokens, rank + dim),
                    _normal(rank),
                    EPS,
                    *_angles(tokens, dim // 2),
                    pages,
                    torch.randperm(4096 * 64, device="cuda")[:tokens],
                    True,
                )
                for _ in range(4)
            ]
            yield _forward(
                "write_latent_cache",
                f"{tokens} tokens, {heads} heads",
                cache.write_latent_cache,
                reference_cache.write_latent_cache,
                sets,
                4.0 * tokens * heads * dim + 6.0 * tokens * (rank + dim) + 4.0 * tokens * dim,
            )
        groups, dim = 4, 128
        pages = _normal(4096, 64, 2, groups, dim)
        sets = [
            (
                _normal(tokens, 32, dim),
                _normal(tokens, groups, dim),
                _normal(tokens, groups, dim),
                *_angles(tokens, dim // 2),
                pages,
                torch.randperm(4096 * 64, device="cuda")[:tokens],
                False,
            )
            for _ in range(4)
        ]
        yield _forward(
            "write_kv_cache",
            f"{tokens} tokens, 32 heads of 128, 4 keys",
            cache.write_kv_cache,
            reference_cache.write_kv_cache,
            sets,
            4.0 * tokens * 32 * dim + 10.0 * tokens * groups * dim + 4.0 * tokens * dim,
        )


def _gate() -> Iterator[Case]:
    for experts, dim in ((64, 2048), (256, 7168)):
        for tokens in (1, 8, 64, 256, 1024, 16384):
            weight = _normal(experts, dim)
            sets = [(_normal(tokens, dim), weight) for _ in range(4)]
            moved = 2.0 * dim * (tokens + experts) + 4.0 * tokens * experts
            yield _forward(
                "gate_logits",
                f"{tokens} tokens, {experts} experts, D {dim}",
                gate.gate_logits,
                reference_routing.gate_logits,
                sets,
                moved,
            )
        inputs = (_normal(16384, dim), _normal(experts, dim))
        yield _training(
            "gate_logits",
            f"16384 tokens, {experts} experts, D {dim}",
            gate.gate_logits,
            reference_routing.gate_logits,
            inputs,
            2.0 * 16384 * dim * 3,
        )


def cases() -> Iterator[Case]:
    for group in (_norms, _swiglu, _rope, _cache, _gate):
        yield from group()
