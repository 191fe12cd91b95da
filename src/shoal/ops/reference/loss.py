"""Reference of output head and cross-entropy in one, a chunk of tokens at a time.

With p = softmax(h W^T), the gradient of w * nll is w (p - onehot): known as soon as the logits are, so both
gradients are made in the forward pass and the logits of a chunk are dropped before the next. The backward
pass only scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_ELEMENTS = 1 << 20  # logits held at once: 4 MiB of float32, about what a core's caches hold


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        weights_T: Tensor,
        need_hidden: bool,
        need_weight: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden_TD.dtype, torch.float32)
        nll_T = torch.empty(hidden_TD.shape[0], dtype=wide, device=hidden_TD.device)
        dhidden_TD = torch.empty_like(hidden_TD) if need_hidden else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=wide) if need_weight else None
        minus_one_11 = nll_T.new_full((1, 1), -1.0)
        chunk = chunk_rows(weight_VD)
        for start in range(0, hidden_TD.shape[0], chunk):
            rows = slice(start, start + chunk)
            hidden, target_t1 = hidden_TD[rows], targets_T[rows].unsqueeze(1)
            # 1. Logits, 2. their log-softmax, 3. the loss of each token.
            log_p_tV = torch.mm(hidden, weight_VD.t()).to(wide).log_softmax(-1)
            nll_T[rows] = -log_p_tV.gather(1, target_t1).squeeze(1)
            if dhidden_TD is None and dweight_VD is None:
                continue
            # 4. p - onehot, in place. The token's weight joins on the narrow side of each product.
            weight_t1 = weights_T[rows].unsqueeze(1).to(hidden.dtype)
            dlogits_tV = log_p_tV.exp_().scatter_add_(1, target_t1, minus_one_11.expand_as(target_t1))
            dlogits_tV = dlogits_tV.to(hidden.dtype)
            if dhidden_TD is not None:
                torch.mm(dlogits_tV, weight_VD, out=dhidden_TD[rows]).mul_(weight_t1)
            if dweight_VD is not None:
                dweight_VD.addmm_(dlogits_tV.t().to(wide), (hidden * weight_t1).to(wide))
        ctx.save_for_backward(dhidden_TD, None if dweight_VD is None else dweight_VD.to(weight_VD.dtype))
        ctx.mark_non_differentiable(nll_T)
        return torch.dot(nll_T, weights_T.to(wide)), nll_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, dnll_T: Tensor) -> tuple[Tensor | None, ...]:
        return (
            *(None if grad is None else grad * dtotal.to(grad.dtype) for grad in ctx.saved_tensors),
            *(None,) * 4,
        )


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, weights_T: Tensor
) -> tuple[Tensor, Tensor]:
    check_targets(targets_T, weight_VD)
    # Asked here, where the caller's grad mode is known: scoring makes no gradients.
    need_hidden, need_weight = (torch.is_grad_enabled() and x.requires_grad for x in (hidden_TD, weight_VD))
    return _LinearCrossEntropy.apply(hidden_TD, weight_VD, targets_T, weights_T, need_hidden, need_weight)


def chunk_rows(weight_VD: Tensor) -> int:
    """Rows whose logits are held at once."""
    return max(1, _CHUNK_ELEMENTS // weight_VD.shape[0])


def check_targets(targets_T: Tensor, weight_VD: Tensor) -> None:
    """Refuse ids outside of the vocabulary, where checking costs nothing."""
    if targets_T.device.type == "cpu" and targets_T.numel():
        low, high = int(targets_T.min()), int(targets_T.max())
        if low < 0 or high >= weight_VD.shape[0]:
            raise ValueError(
                f"linear_cross_entropy: targets span {low} to {high}, outside the vocabulary of "
                f"{weight_VD.shape[0]}; give a position that does not count a weight of 0 and any valid id"
            )
