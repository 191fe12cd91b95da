"""What pretraining minimises: main loss, multi-token prediction, and balance within a sequence.

  L = CE(next token) + lambda/D * sum_k CE(token k + 2 of module k) + alpha * sum over layers of L_balance
  (DeepSeek-V3, arXiv 2412.19437, eq. 17-20 and 24-25)

The law: a term is a mean over the whole optimizer step, so how it is cut into micro-batches changes rounding
only. The weights of a Batch are final; a mean is over the targets whose weight is not 0.

L_balance is sum_i f_i P_i of each sequence, not of the pack: f_i is expert i's share of the choices times the
number of experts, P_i its mean share of the scores. Choices are the real assignments, which implementations
count, where eq. 18 prints a top-k of unbiased scores. Sequences weigh by length: one of three tokens cannot
be even over 64 experts.

Shape letters: T tokens, S sequences, E experts, K experts per token, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shoal.batch import Batch
from shoal.model.transformer import Transformer
from shoal.ops import api as ops
from shoal.ops.api import Routing
from shoal.train.objective import Share, Step


class NextToken:
    """The objective of pretraining. `modules` is the number of prediction modules that are trained.

    Its terms: `loss`, `mtp` (mean over modules, before lambda), `balance` (mean over layers, before alpha: 1
    where every sequence is even). A term of weight 0 is not computed.
    """

    def __init__(self, modules: int, *, mtp_weight: float, balance_weight: float) -> None:
        self.modules = modules if mtp_weight else 0
        self.mtp_weight = mtp_weight
        self.balance_weight = balance_weight

    def count(self, batches: Sequence[Batch]) -> Tensor:
        """Tokens, targets that count, and the same for each prediction module: (2 + modules,) int64."""
        counted = []
        for batch in batches:
            assert batch.weights_T is not None
            counted.append(batch.weights_T.new_full((), batch.num_tokens, dtype=torch.int64))
            for depth in range(self.modules + 1):
                ahead = look_ahead(batch) if depth else batch
                assert ahead.weights_T is not None
                counted.append(ahead.weights_T.count_nonzero())
                batch = ahead
        return torch.stack(counted).view(-1, self.modules + 2).sum(0)

    def compute(self, model: Transformer, batch: Batch, step: Step) -> Share:
        tokens, targets, *ahead_targets = step.counts.clamp(min=1).unbind()
        out, head_VD = model(batch), model.head_weight()
        routing = list(out.routing)
        total = main = cross_entropy(out.hidden_TD, head_VD, batch) / targets
        terms = {"loss": main.detach()}
        if self.modules:
            mtp, ahead = main.new_zeros(()), batch
            for depth, count in enumerate(ahead_targets):
                assert ahead.targets_T is not None
                out = model.predict_ahead(out.hidden_TD, ahead.targets_T, batch, depth)
                routing += out.routing
                ahead = look_ahead(ahead)
                mtp = mtp + cross_entropy(out.hidden_TD, head_VD, ahead) / count
            mtp = mtp / self.modules
            total = total + self.mtp_weight * mtp
            terms["mtp"] = mtp.detach()
        if self.balance_weight and routing:
            balance = main.new_zeros(())
            for layer in routing:
                balance = balance + sequence_balance(layer, batch.cu_seqlens_S1) / tokens
            total = total + self.balance_weight * balance
            terms["balance"] = balance.detach() / len(routing)
        return Share(total, terms, tuple(layer.experts_TK for layer in routing))


def look_ahead(batch: Batch) -> Batch:
    """The same tokens with targets one further on; the last of a sequence has none left, and weighs 0."""
    assert batch.targets_T is not None and batch.weights_T is not None
    ends_S = batch.cu_seqlens_S1[1:].long() - 1
    # The last keeps its own target: a valid id, of its own sequence.
    next_T = torch.arange(1, batch.num_tokens + 1, device=ends_S.device).index_copy_(0, ends_S, ends_S)
    weights_T = batch.weights_T[next_T].index_fill_(0, ends_S, 0.0)
    return replace(batch, targets_T=batch.targets_T[next_T], weights_T=weights_T)


def cross_entropy(hidden_TD: Tensor, head_VD: Tensor, batch: Batch) -> Tensor:
    """Sum over tokens of weight * nll, in nats."""
    assert batch.targets_T is not None and batch.weights_T is not None
    return ops.linear_cross_entropy(hidden_TD, head_VD, batch.targets_T, batch.weights_T).total


def sequence_balance(routing: Routing, cu_seqlens_S1: Tensor) -> Tensor:
    """Sum over sequences of length * sum_i f_i P_i, for one layer: the number of tokens where all is even.

    length * P_i is a plain sum over the sequence's tokens, so f is spread to them and the whole is one dot
    product. Gradient flows through the scores; f is a count and has none. A dropped choice is no assignment.
    """
    experts_TK, _, scores_TE = routing
    (T, K), E = experts_TK.shape, scores_TE.shape[1]
    lengths_S = cu_seqlens_S1.long().diff()
    index_S = torch.arange(len(lengths_S), device=lengths_S.device)
    sequence_T = index_S.repeat_interleave(lengths_S, output_size=T)
    counts_SE = count_assignments(experts_TK, E, sequence_T, len(lengths_S))
    f_SE = counts_SE.to(scores_TE.dtype) / lengths_S.unsqueeze(1) * (E / K)
    shares_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    return (f_SE[sequence_T] * shares_TE).sum()


def count_assignments(experts_TK: Tensor, E: int, row_T: Tensor, rows: int) -> Tensor:
    """How often the tokens of each row choose each expert: (rows, E) int64. A dropped choice (-1) is none."""
    # Column 0 takes what was dropped. Nothing waits for the device.
    index_TK = row_T.unsqueeze(1) * (E + 1) + experts_TK + 1
    counts = torch.zeros(rows * (E + 1), dtype=torch.int64, device=experts_TK.device)
    counts.scatter_add_(0, index_TK.flatten(), torch.ones_like(index_TK).flatten())
    return counts.view(rows, E + 1)[:, 1:]
