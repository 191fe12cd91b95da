"""Cases of the output head with cross-entropy: V2-Lite's and V3's vocabularies, forward and backward.

The peer is eager PyTorch as everyone writes it: logits in the model's dtype, cross_entropy of them in
float32. Beside the time stands what each needs at its highest, gradients included. The floor is the three
products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.harness import Case
from shoal.ops.triton import loss

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
TARGET = "1.3 x eager, 10% of its memory"


def eager(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, weights_T: Tensor) -> Tensor:
    nll_T = F.cross_entropy(F.linear(hidden_TD, weight_VD).float(), targets_T, reduction="none")
    return (nll_T * weights_T).sum()


def ours(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, weights_T: Tensor) -> Tensor:
    return loss.linear_cross_entropy(hidden_TD, weight_VD, targets_T, weights_T)[0]


def _step(side: Callable[..., Tensor], inputs: Inputs) -> Callable[[], None]:
    hidden_TD, weight_VD, targets_T, weights_T = inputs
    hidden_TD, weight_VD = hidden_TD.detach().requires_grad_(), weight_VD.detach().requires_grad_()

    def step() -> None:
        torch.autograd.grad(side(hidden_TD, weight_VD, targets_T, weights_T), (hidden_TD, weight_VD))

    return step


def peak_bytes(step: Callable[[], None]) -> int:
    """The most that a step holds at once, beside what was there before it."""
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def cases() -> Iterator[Case]:
    for tokens, vocab, dim in ((4096, 102_400, 2048), (16384, 129_280, 2048), (4096, 129_280, 7168)):
        inputs = (
            torch.randn(tokens, dim, device="cuda", dtype=torch.bfloat16),
            torch.randn(vocab, dim, device="cuda", dtype=torch.bfloat16) / dim**0.5,
            torch.randint(0, vocab, (tokens,), device="cuda"),
            torch.ones(tokens, device="cuda"),
        )
        steps = {name: _step(side, inputs) for name, side in (("ours", ours), ("eager", eager))}
        peaks = {name: peak_bytes(step) for name, step in steps.items()}
        torch.cuda.empty_cache()
        share = peaks["ours"] / peaks["eager"]
        yield Case(
            op="linear_cross_entropy forward + backward",
            shape=f"T {tokens}, V {vocab}, D {dim}",
            flops=6.0 * tokens * vocab * dim,
            bytes=2.0 * vocab * dim * 2,
            calls={name: [step] for name, step in steps.items()},
            target=TARGET if tokens == 16384 else "",
            note=", ".join(f"{name} {peak / 1e9:.2f} GB" for name, peak in peaks.items()) + f" ({share:.1%})",
            graph=False,
        )
