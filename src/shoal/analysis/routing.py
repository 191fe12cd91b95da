"""Where the tokens of a text go: the load of every expert, with the routers as trained or without their bias.

The law: watching changes nothing. The model is run in evaluation mode on the text, and left as it was found.

Shape letters: L layers that route, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from shoal.batch import Batch
from shoal.model.transformer import Transformer


@torch.inference_mode()
def expert_load(model: Transformer, batches: Iterable[Batch]) -> Tensor:
    """How many of the text's choices each expert got, (L, E) int64; a layer's row sums to tokens * K less
    drops.
    """
    training = model.training
    model.eval()
    try:
        loads = [
            torch.stack(
                [_count(routing.experts_TK, routing.scores_TE.shape[1]) for routing in model(batch).routing]
            )
            for batch in batches
        ]
    finally:
        model.train(training)
    return torch.stack(loads).sum(0)


def _count(experts_TK: Tensor, n_experts: int) -> Tensor:
    return torch.bincount(experts_TK.flatten() + 1, minlength=n_experts + 1)[1:]


@contextmanager
def without_correction_bias(model: Transformer) -> Iterator[None]:
    """Within the block the routers choose by their scores alone, as if nothing had balanced them."""
    biases = [
        gate.e_score_correction_bias for gate in model.gates() if gate.e_score_correction_bias is not None
    ]
    kept = [bias.clone() for bias in biases]
    try:
        for bias in biases:
            bias.zero_()
        yield
    finally:
        for bias, old in zip(biases, kept, strict=True):
            bias.copy_(old)
