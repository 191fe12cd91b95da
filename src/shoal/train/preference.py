"""What a reward model minimises: the better of two answers is to be worth more.

  pairwise   L = - mean over pairs of log sigmoid(r(better) - r(worse))     (Bradley and Terry 1952; the loss
             of InstructGPT, arXiv 2203.02155, section 3.5, one pair a prompt)
  pointwise  L = - mean over answers of log sigmoid(r) or log sigmoid(-r)   for the better, for the worse

r is the logit of one token after the answer's last (stages/appraise says why). The law: a pair's two answers
are neighbours in a batch, the better first, and see nothing of each other.

Shape letters: S texts, two a pair; P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from shoal.batch import Batch
from shoal.model.transformer import Transformer
from shoal.train.objective import Share, Step

Kind = Literal["pointwise", "pairwise"]


def preference_loss(values_S: Tensor, kind: Kind) -> Tensor:
    """(P,): what each pair adds, before the mean."""
    better_P, worse_P = values_S.view(-1, 2).unbind(1)
    if kind == "pairwise":
        return -logsigmoid(better_P - worse_P)
    return -(logsigmoid(better_P) + logsigmoid(-worse_P)) / 2


class Preference:
    """The objective over batches of pairs whose `last_S` are the rows of the answers' ends. Its terms:
    `loss`, `right` (the share of pairs told apart: ties are not), `margin` (of the better over the worse)."""

    def __init__(self, kind: Kind, token: int) -> None:
        self.kind: Kind = kind
        self.token = token

    def count(self, batches: Sequence[Batch]) -> Tensor:
        """Pairs: (1,) int64."""
        pairs = sum(batch.num_sequences for batch in batches) // 2
        return torch.tensor([pairs], device=batches[0].ids_T.device)

    def compute(self, model: Transformer, batch: Batch, step: Step) -> Share:
        assert batch.last_S is not None
        out = model(batch)
        values_S = (out.hidden_TD[batch.last_S] @ model.head_weight()[self.token]).float()
        pairs = step.counts[0].clamp(min=1)
        total = preference_loss(values_S, self.kind).sum() / pairs
        margin_P = values_S.detach().view(-1, 2).diff(dim=1).neg()
        terms = {
            "loss": total.detach(),
            "right": (margin_P > 0).float().sum() / pairs,
            "margin": margin_P.sum() / pairs,
        }
        return Share(total, terms, tuple(layer.experts_TK for layer in out.routing))
