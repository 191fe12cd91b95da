"""How the indexers of sparse attention learn (DeepSeek-V3.2-Exp, section 2.1): to choose as attention would.

An indexer minimises KL(p_t || softmax(I_t)) of each token t: p is how the main attention spreads, summed over
heads and normalised, and I are the index scores. Two stages, one objective:

1. Dense warm-up (no `base`): attention reads everything, and the loss is the divergence over all positions.
Nothing but the indexers learns: hand `indexers(model)` to the Trainer as what is trainable.
2. Sparse (`base` is the objective of the model): attention reads what is chosen, and the divergence over the
chosen positions is added. The model learns from `base` alone, the indexers from the divergence alone.

The law: the divergence has no gradient outside the indexers. Layers are summed, so that each indexer learns
as if it were the only one; the term `indexer` is their mean. A prediction module's indexer learns where
`base` runs the module. Shape letters: T tokens, N positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.batch import Batch
from shoal.model.dsa import Indexer
from shoal.model.transformer import Transformer
from shoal.train.objective import Objective, Share, Step
from shoal.train.optim import Trainable


def indexers(model: Transformer) -> Trainable:
    """The parameters of the blocks' indexers, as what a Trainer trains. ValueError where there are none."""
    blocks = tuple(f"model.layers.{layer}." for layer in range(model.config.num_hidden_layers))
    found: Trainable = {
        name: None for name, _ in model.named_parameters() if ".indexer." in name and name.startswith(blocks)
    }
    if not found:
        raise ValueError(
            "no layer has an indexer to train; the model's attention needs one (deepseek-v3.2 has)"
        )
    return found


class LearnIndexers:
    """The objective of both stages. Its terms: those of `base`, and `indexer`, in nats a token and layer;
    without a `base`, that is also `loss`."""

    def __init__(self, base: Objective | None = None) -> None:
        self.base = base

    def count(self, batches: Sequence[Batch]) -> Tensor:
        """Tokens, then what `base` counts."""
        tokens = batches[0].ids_T.new_full((1,), sum(batch.num_tokens for batch in batches))
        return tokens if self.base is None else torch.cat((tokens, self.base.count(batches)))

    def compute(self, model: Transformer, batch: Batch, step: Step) -> Share:
        learners = [module for module in model.modules() if isinstance(module, Indexer)]
        if not learners:
            raise ValueError("no layer has an indexer to learn; use the objective of the model alone")
        lesson = Lesson(dense=self.base is None)
        for indexer in learners:
            indexer.teacher = lesson
        try:
            share = None
            if self.base is not None:
                share = self.base.compute(model, batch, Step(step.number, step.steps, step.counts[1:]))
            else:
                with torch.no_grad():  # but for what the lesson turns on again
                    model(batch)
        finally:
            for indexer in learners:
                indexer.teacher = None
        total = torch.stack(lesson.told).sum() / step.counts[0].clamp(min=1)
        mean = total.detach() / len(lesson.told)
        if share is None:
            return Share(total, {"loss": mean, "indexer": mean})
        return Share(share.total + total, {**share.terms, "indexer": mean}, share.experts, share.scores)


class Lesson:
    """The Teacher of one forward pass: the divergence of each layer, summed over tokens."""

    def __init__(self, *, dense: bool) -> None:
        self.dense = dense
        self.told: list[Tensor] = []

    def observe(self, scores_TN: Tensor, mass_TN: Tensor) -> None:
        self.told.append(divergence(scores_TN, mass_TN))


def divergence(scores_TN: Tensor, mass_TN: Tensor) -> Tensor:
    """Sum over tokens of KL(mass || softmax(scores)), in nats; scores are -inf where there is no mass."""
    unread_TN = scores_TN == float("-inf")
    logs_TN = scores_TN.log_softmax(-1).masked_fill(unread_TN, 0.0)
    return (torch.xlogy(mass_TN, mass_TN) - mass_TN * logs_TN).sum()
