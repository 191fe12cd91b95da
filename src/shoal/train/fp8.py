"""FP8 products in training, as DeepSeek-V3 does them (arXiv 2412.19437, section 3.3), in part.

`multiply_in_fp8` is f(model) -> model: it swaps the product of every linear and of the experts, and nothing
else. Weights, gradients, the optimizer and checkpoints stay what they were: weights are quantised as used.
Forward and the gradient of the inputs are FP8; the gradient of the weights is not, since there both operands
would be quantised anew along the tokens, which costs more than it saves, by what others report.

Kept as they are: embedding, head, router, norms, the core of attention, and an indexer, which ranks by small
differences.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from shoal.model.dsa import Indexer
from shoal.model.layers import Linear
from shoal.model.moe import Experts
from shoal.model.transformer import Transformer
from shoal.ops import quantised as ops


def multiply_in_fp8(model: Transformer, *, keep: bool = False) -> Transformer:
    """`keep`: weights are quantised once a pass for both directions, and a byte an element is held in
    between; else again for the backward pass."""
    kept: set[nn.Module | None] = {model.lm_head}
    for module in model.modules():
        if isinstance(module, Indexer):
            kept.update(module.modules())
    for module in model.modules():
        if module in kept:
            continue
        if isinstance(module, Linear):
            module.product = partial(_product, keep=keep)
        elif isinstance(module, Experts):
            module.product = partial(ops.fp8_grouped_mlp, keep=keep)
    return model


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, *, keep: bool) -> Tensor:
    y = ops.fp8_linear(x, weight, keep=keep)
    return y if bias is None else y + bias
