"""What distillation on logits minimises: the cross-entropy of a student with its teacher's best tokens.

  L = - sum over tokens of share * sum_k p_k log q_k

with p the teacher's probabilities of its K best tokens, made to add up to 1. Up to a constant, the teacher's
entropy, this is KL(p || q) (Hinton et al. 2015, arXiv 1503.02531).

The student's T x V logits never exist. Since the p_k add up to 1,
  - sum_k p_k log q_k = nll(target) + logit(target) - sum_k p_k logit_k,
where the first term is `ops.linear_cross_entropy` and the others read K + 1 rows of the head for each token.
The law: teacher and student share a vocabulary, and nothing else; either may be of any family.

Shape letters: T tokens, D hidden, V vocabulary, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shoal.batch import Batch
from shoal.model.transformer import Transformer
from shoal.ops import api as ops
from shoal.train.objective import Share, Step


@dataclass(frozen=True, eq=False)
class TaughtBatch(Batch):
    """Text with what a teacher makes of it."""

    kept_TK: Tensor | None = None  # int64: the teacher's best tokens
    probs_TK: Tensor | None = None  # float32: its probabilities of them, adding up to 1


@torch.no_grad()
def teach(teacher: Transformer, batch: Batch, keep: int, rows_at_once: int = 1024) -> TaughtBatch:
    """Add the teacher's `keep` best tokens to a batch. The logits of some rows are held at a time."""
    size = teacher.config.vocab_size
    if not 1 <= keep <= size:
        raise ValueError(f"{keep} of the teacher's tokens are to be kept; it has {size}, keep 1 at least")
    hidden_TD, head_VD = teacher(replace(batch, routing=None)).hidden_TD, teacher.head_weight()
    kept = [(rows_tD @ head_VD.t()).float().topk(keep) for rows_tD in hidden_TD.split(rows_at_once)]
    return TaughtBatch(
        **vars(batch),
        kept_TK=torch.cat([best.indices for best in kept]),
        probs_TK=torch.cat([best.values.softmax(-1) for best in kept]),
    )


def soft_cross_entropy(
    hidden_TD: Tensor,
    head_VD: Tensor,
    targets_T: Tensor,
    weights_T: Tensor,
    kept_TK: Tensor,
    probs_TK: Tensor,
) -> Tensor:
    """Sum over tokens of weight * -sum_k p_k log q_k. Differentiable in hidden and head."""
    hard = ops.linear_cross_entropy(hidden_TD, head_VD, targets_T, weights_T).total
    rows_TXD = head_VD[torch.cat((targets_T.unsqueeze(1), kept_TK), 1)]
    logits_TX = torch.einsum("td,txd->tx", hidden_TD, rows_TXD).to(hard.dtype)
    away_T = logits_TX[:, 0] - (probs_TK * logits_TX[:, 1:]).sum(-1)
    return hard + (weights_T * away_T).sum()


class Distillation:
    """The objective over TaughtBatches: `soft` of the teacher's distribution, the rest of the text itself.

    Its terms: `loss`, and `teacher` and `text`, nats a token. Prediction modules do not learn.
    """

    def __init__(self, soft: float = 1.0) -> None:
        if not 0 < soft <= 1:
            raise ValueError(f"soft is {soft}; it is the teacher's share of the loss, above 0 and at most 1")
        self.soft = soft

    def count(self, batches: Sequence[Batch]) -> Tensor:
        counted = [batch.weights_T.count_nonzero() for batch in batches if batch.weights_T is not None]
        return torch.stack(counted).sum(0, keepdim=True)

    def compute(self, model: Transformer, batch: Batch, step: Step) -> Share:
        assert isinstance(batch, TaughtBatch) and batch.targets_T is not None and batch.weights_T is not None
        assert batch.kept_TK is not None and batch.probs_TK is not None
        tokens = step.counts[0].clamp(min=1)
        out, head_VD = model(batch), model.head_weight()
        soft = (
            soft_cross_entropy(
                out.hidden_TD, head_VD, batch.targets_T, batch.weights_T, batch.kept_TK, batch.probs_TK
            )
            / tokens
        )
        text = (
            ops.linear_cross_entropy(out.hidden_TD, head_VD, batch.targets_T, batch.weights_T).total / tokens
        )
        total = self.soft * soft + (1 - self.soft) * text
        terms = {"loss": total.detach(), "teacher": soft.detach(), "text": text.detach()}
        return Share(total, terms, tuple(layer.experts_TK for layer in out.routing))
