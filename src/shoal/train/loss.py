"""What pretraining minimises: main loss, multi-token prediction, and what keeps experts even.

  L = CE(next token) + lambda/D * sum_k CE(token k + 2 of module k) + sum over layers of the auxiliary losses
  (DeepSeek-V3, arXiv 2412.19437, eq. 17-20 and 24-25)

The law: a term is a mean over the whole optimizer step, so how it is cut into micro-batches changes rounding
only (Switch's and GShard's losses, products of two means over a micro-batch, are the exception). The weights
of a Batch are final; a mean is over the targets whose weight is not 0.

Shape letters: T tokens, S sequences, K experts per token, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from shoal.batch import Batch
from shoal.config.model import ModelConfig
from shoal.config.run import TrainConfig
from shoal.model.transformer import Output, Transformer
from shoal.ops import api as ops
from shoal.train.auxiliary import Auxiliary, Sequences
from shoal.train.objective import Share, Step


class NextToken:
    """The objective of pretraining. `modules` is the number of prediction modules that are trained.

    Its terms: `loss`, `mtp` (mean over modules, before lambda), and of the auxiliary losses each that has a
    weight, before it, as a mean over layers: `balance` (V3's sequence-wise), `device`, `communication`,
    `switch`, `gshard`, `z`. A term of weight 0 is not computed.
    """

    def __init__(
        self,
        modules: int,
        *,
        mtp_weight: float,
        balance_weight: float = 0.0,  # of the sequence-wise loss alone, where `auxiliary` is not given
        auxiliary: Auxiliary | None = None,
    ) -> None:
        self.modules = modules if mtp_weight else 0
        self.mtp_weight = mtp_weight
        self.auxiliary = auxiliary or Auxiliary({"sequence": balance_weight})

    @staticmethod
    def of(config: ModelConfig, settings: TrainConfig) -> NextToken:
        """What a recipe asks for."""
        return NextToken(
            config.num_nextn_predict_layers,
            mtp_weight=settings.mtp_loss_weight,
            auxiliary=Auxiliary.of(settings.balance, config.moe),
        )

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
        return self.judge(model, model(batch), batch, step)

    def judge(self, model: Transformer, out: Output, batch: Batch, step: Step) -> Share:
        """Of a part of the model: its layers' balance and, of the last, the rest; 0 for what is not its."""
        tokens, targets, *ahead_targets = step.counts.clamp(min=1).unbind()
        routing, ends, before = list(out.routing), out.ends, out.before
        total = torch.zeros((), device=out.hidden_TD.device)
        terms = {"loss": total, "mtp": total} if self.modules else {"loss": total}
        if ends:
            head_VD = model.head_weight()
            total = main = cross_entropy(out.hidden_TD, head_VD, batch) / targets
            terms["loss"] = main.detach()
            mtp, ahead = main.new_zeros(()), batch
            for depth, count in enumerate(ahead_targets):
                assert ahead.targets_T is not None
                out = model.predict_ahead(out.hidden_TD, ahead.targets_T, batch, depth)
                routing += out.routing
                ahead = look_ahead(ahead)
                mtp = mtp + cross_entropy(out.hidden_TD, head_VD, ahead) / count
            if self.modules:
                mtp = mtp / self.modules
                total = total + self.mtp_weight * mtp
                terms["mtp"] = mtp.detach()
        layers = self._layers(model.config)
        if self.auxiliary.weights and layers:
            balance, told = self.auxiliary(routing, Sequences.of(batch), layers)
            total = total + balance / tokens
            terms |= {name: value / tokens for name, value in told.items()}
        experts, scores = ([getattr(r, name) for r in routing] for name in ("experts_TK", "scores_TE"))
        return Share(total, terms, tuple(experts), tuple(score.detach() for score in scores), before)

    def _layers(self, config: ModelConfig) -> int:
        """Those that route and learn, over which terms are means."""
        return sum(layer < config.num_hidden_layers + self.modules for layer in config.routed_layers)


def look_ahead(batch: Batch) -> Batch:
    """The same tokens with targets one further on; the last of a sequence has none left, and weighs 0."""
    assert batch.targets_T is not None and batch.weights_T is not None
    if batch.part is not None:  # what comes next may be elsewhere
        return batch.part.of(look_ahead(batch.part.pack))
    ends_S = batch.cu_seqlens_S1[1:].long() - 1
    # The last keeps its own target: a valid id, of its own sequence.
    next_T = torch.arange(1, batch.num_tokens + 1, device=ends_S.device).index_copy_(0, ends_S, ends_S)
    weights_T = batch.weights_T[next_T].index_fill_(0, ends_S, 0.0)
    return replace(batch, targets_T=batch.targets_T[next_T], weights_T=weights_T)


def cross_entropy(hidden_TD: Tensor, head_VD: Tensor, batch: Batch) -> Tensor:
    """Sum over tokens of weight * nll, in nats."""
    assert batch.targets_T is not None and batch.weights_T is not None
    return ops.linear_cross_entropy(hidden_TD, head_VD, batch.targets_T, batch.weights_T).total
