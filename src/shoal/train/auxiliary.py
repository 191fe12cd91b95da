"""The auxiliary losses against uneven experts, each as its paper has it: V2's three, Switch, GShard, z-loss.

The law: all but z are scaled to be 1 where every expert has the same load, whatever the numbers of experts
and choices, so a weight means the same in each. They come as sums over tokens, which add up over packs.

- sequence (V3 eq. 17-20; V2 eq. 23-25, the expert level): sum_i f_i P_i of each sequence, not of the pack.
- device (V2 eq. 26-28): the same over groups of experts that live together, f' their mean, P' their sum.
- communication (V2 eq. 29-31): f'' is the share of tokens that are sent to a device, times D / M.
- switch (arXiv 2101.03961, eq. 4-6), gshard (2006.16668): f and P over the micro-batch; gshard counts each
  token's first choice alone. z (ST-MoE, 2202.08906, eq. 5): logsumexp(logits)^2 of each token.

f is a count and has no gradient; P is a mean of scores, divided by their sum where a sigmoid made them.
Choices are the real assignments; a dropped one is none. Shape letters: T tokens, S sequences, E experts, K
experts per token, D devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.batch import Batch
from shoal.config.model import MoEConfig
from shoal.config.run import BalanceConfig
from shoal.ops.api import Routing
from shoal.train.objective import Reduce, alone


class Sequences(NamedTuple):
    """Where tokens stand, of sequences that may go on elsewhere."""

    index_T: Tensor  # int64: the sequence of each
    lengths_S: Tensor  # of the whole sequences
    reduce: Reduce = alone  # the sum of what is counted over their tokens here and elsewhere

    @staticmethod
    def of(batch: Batch) -> Sequences:
        lengths_S = batch.cu_seqlens_S1.long().diff()
        if batch.part is not None:
            return Sequences(batch.part.sequence_T, lengths_S, batch.part.reduce)
        index_S = torch.arange(len(lengths_S), device=lengths_S.device)
        return Sequences(index_S.repeat_interleave(lengths_S, output_size=batch.num_tokens), lengths_S)

    def merged(self) -> Sequences:
        """One, of all tokens."""
        return Sequences(torch.zeros_like(self.index_T), self.lengths_S.sum().unsqueeze(0), self.reduce)


class Auxiliary:
    """The losses that have a weight, each summed over layers.

    `devices`, and `limit`, the most of them that a token is sent to, are those of V2's two.
    """

    def __init__(self, weights: Mapping[str, float], devices: int = 1, limit: int = 1) -> None:
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.devices, self.limit = devices, limit

    @staticmethod
    def of(settings: BalanceConfig, moe: MoEConfig | None) -> Auxiliary:
        """What a recipe asks of a model."""
        if moe is None:
            return Auxiliary({})
        names = ("sequence", "device", "communication", "switch", "gshard", "z")
        weights = {name: getattr(settings, f"{name}_loss") for name in names}
        devices = settings.devices or moe.n_group
        limit = moe.topk_group if devices == moe.n_group else devices
        grouped = settings.device_loss or settings.communication_loss
        if grouped and (devices < 2 or moe.n_routed_experts % devices):
            raise ValueError(
                f"train.balance.devices is {devices}; the {moe.n_routed_experts} experts must lie on at "
                f"least 2 devices, and as many on each"
            )
        return Auxiliary(weights, devices, min(limit, moe.num_experts_per_tok))

    def __call__(
        self, routing: Sequence[Routing], sequences: Sequences, layers: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What is differentiated, and each loss before its weight as a mean over `layers`: sums over tokens.

        Of some of the layers, their share of both.
        """
        total, terms = torch.zeros((), device=sequences.index_T.device), {}
        for name, weight in self.weights.items():
            values = [self._of(name, layer, sequences) for layer in routing]
            value = torch.stack(values).sum() if values else torch.zeros_like(total)
            total = total + weight * value
            terms["balance" if name == "sequence" else name] = value.detach() / layers
        return total, terms

    def _of(self, name: str, routing: Routing, sequences: Sequences) -> Tensor:
        match name:
            case "sequence":
                return sequence_balance(routing, sequences)
            case "device":
                return device_balance(routing, sequences, self.devices)
            case "communication":
                return communication_balance(routing, sequences, self.devices, self.limit)
            case "switch":
                return switch_balance(routing, sequences)
            case "gshard":
                return switch_balance(routing._replace(experts_TK=routing.experts_TK[:, :1]), sequences)
            case _:
                return z_loss(routing)


def sequence_balance(routing: Routing, sequences: Sequences) -> Tensor:
    """Sum over sequences of length * sum_i f_i P_i, for one layer: the number of tokens where all is even.

    length * P_i is a plain sum over the sequence's tokens, so f is spread to them and the whole is one dot
    product. Sequences weigh by length: one of three tokens cannot be even over 64 experts.
    """
    f_SE = _loads(routing, sequences)
    return (f_SE[sequences.index_T] * _shares(routing)).sum()


def device_balance(routing: Routing, sequences: Sequences, devices: int) -> Tensor:
    """Sum over sequences of length * sum_d f'_d P'_d."""
    f_SD = _loads(routing, sequences).unflatten(1, (devices, -1)).mean(-1)
    return (f_SD[sequences.index_T] * _device_shares(routing, devices)).sum()


def communication_balance(routing: Routing, sequences: Sequences, devices: int, limit: int) -> Tensor:
    """Sum over sequences of length * sum_d f''_d P''_d; a token goes to at most `limit` devices."""
    experts_TK, scores_TE = routing.experts_TK, routing.scores_TE
    device_TK = torch.where(experts_TK < 0, -1, experts_TK // (scores_TE.shape[1] // devices))
    # Column 0 takes what was dropped; a device counts once however many of its experts a token chose.
    sent_TD = scores_TE.new_zeros(len(experts_TK), devices + 1).scatter_(1, device_TK + 1, 1.0)[:, 1:]
    index_T, lengths_S, reduce = sequences
    sent_SD = reduce(sent_TD.new_zeros(len(lengths_S), devices).index_add_(0, index_T, sent_TD))
    f_SD = sent_SD * (devices / limit) / lengths_S.unsqueeze(1)
    return (f_SD[index_T] * _device_shares(routing, devices)).sum()


def switch_balance(routing: Routing, sequences: Sequences) -> Tensor:
    """Tokens * sum_i f_i P_i over the micro-batch."""
    return sequence_balance(routing, sequences.merged())


def z_loss(routing: Routing) -> Tensor:
    """Sum over tokens of logsumexp(logits)^2."""
    assert routing.logits_TE is not None, "a gate returns its logits"
    return routing.logits_TE.logsumexp(-1).square().sum()


def _loads(routing: Routing, sequences: Sequences) -> Tensor:
    """f of each sequence (S, E): an expert's share of its choices, times E."""
    K, E, (index_T, lengths_S, reduce) = routing.experts_TK.shape[1], routing.scores_TE.shape[1], sequences
    counts_SE = reduce(count_assignments(routing.experts_TK, E, index_T, len(lengths_S)))
    return counts_SE.to(routing.scores_TE.dtype) / lengths_S.unsqueeze(1) * (E / K)


def _shares(routing: Routing) -> Tensor:
    return routing.scores_TE / routing.scores_TE.sum(-1, keepdim=True)


def _device_shares(routing: Routing, devices: int) -> Tensor:
    return _shares(routing).unflatten(1, (devices, -1)).sum(-1)


def count_assignments(experts_TK: Tensor, E: int, row_T: Tensor, rows: int) -> Tensor:
    """How often the tokens of each row choose each expert: (rows, E) int64. A dropped choice (-1) is none."""
    # Column 0 takes what was dropped. Nothing waits for the device.
    index_TK = row_T.unsqueeze(1) * (E + 1) + experts_TK + 1
    counts = torch.zeros(rows * (E + 1), dtype=torch.int64, device=experts_TK.device)
    counts.scatter_add_(0, index_TK.flatten(), torch.ones_like(index_TK).flatten())
    return counts.view(rows, E + 1)[:, 1:]
