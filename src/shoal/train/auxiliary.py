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

import torch
from torch import Tensor

from shoal.config.model import MoEConfig
from shoal.config.run import BalanceConfig
from shoal.ops.api import Routing


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
        self, routing: Sequence[Routing], cu_seqlens_S1: Tensor, layers: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What is differentiated, and each loss before its weight as a mean over `layers`: sums over tokens.

        Of some of the layers, their share of both.
        """
        total, terms = torch.zeros((), device=cu_seqlens_S1.device), {}
        for name, weight in self.weights.items():
            values = [self._of(name, layer, cu_seqlens_S1) for layer in routing]
            value = torch.stack(values).sum() if values else torch.zeros_like(total)
            total = total + weight * value
            terms["balance" if name == "sequence" else name] = value.detach() / layers
        return total, terms

    def _of(self, name: str, routing: Routing, cu_seqlens_S1: Tensor) -> Tensor:
        match name:
            case "sequence":
                return sequence_balance(routing, cu_seqlens_S1)
            case "device":
                return device_balance(routing, cu_seqlens_S1, self.devices)
            case "communication":
                return communication_balance(routing, cu_seqlens_S1, self.devices, self.limit)
            case "switch":
                return switch_balance(routing)
            case "gshard":
                return switch_balance(routing._replace(experts_TK=routing.experts_TK[:, :1]))
            case _:
                return z_loss(routing)


def sequence_balance(routing: Routing, cu_seqlens_S1: Tensor) -> Tensor:
    """Sum over sequences of length * sum_i f_i P_i, for one layer: the number of tokens where all is even.

    length * P_i is a plain sum over the sequence's tokens, so f is spread to them and the whole is one dot
    product. Sequences weigh by length: one of three tokens cannot be even over 64 experts.
    """
    sequence_T, f_SE = _loads(routing, cu_seqlens_S1)
    return (f_SE[sequence_T] * _shares(routing)).sum()


def device_balance(routing: Routing, cu_seqlens_S1: Tensor, devices: int) -> Tensor:
    """Sum over sequences of length * sum_d f'_d P'_d."""
    sequence_T, f_SE = _loads(routing, cu_seqlens_S1)
    f_SD = f_SE.unflatten(1, (devices, -1)).mean(-1)
    return (f_SD[sequence_T] * _device_shares(routing, devices)).sum()


def communication_balance(routing: Routing, cu_seqlens_S1: Tensor, devices: int, limit: int) -> Tensor:
    """Sum over sequences of length * sum_d f''_d P''_d; a token goes to at most `limit` devices."""
    experts_TK, scores_TE = routing.experts_TK, routing.scores_TE
    device_TK = torch.where(experts_TK < 0, -1, experts_TK // (scores_TE.shape[1] // devices))
    # Column 0 takes what was dropped; a device counts once however many of its experts a token chose.
    sent_TD = scores_TE.new_zeros(len(experts_TK), devices + 1).scatter_(1, device_TK + 1, 1.0)[:, 1:]
    sequence_T, lengths_S = _sequences(cu_seqlens_S1, len(experts_TK))
    f_SD = sent_TD.new_zeros(len(lengths_S), devices).index_add_(0, sequence_T, sent_TD)
    f_SD = f_SD * (devices / limit) / lengths_S.unsqueeze(1)
    return (f_SD[sequence_T] * _device_shares(routing, devices)).sum()


def switch_balance(routing: Routing) -> Tensor:
    """Tokens * sum_i f_i P_i over the micro-batch."""
    T = routing.scores_TE.shape[0]
    whole_S1 = torch.tensor([0, T], dtype=torch.int32, device=routing.scores_TE.device)
    return sequence_balance(routing, whole_S1)


def z_loss(routing: Routing) -> Tensor:
    """Sum over tokens of logsumexp(logits)^2."""
    assert routing.logits_TE is not None, "a gate returns its logits"
    return routing.logits_TE.logsumexp(-1).square().sum()


def _sequences(cu_seqlens_S1: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """The sequence of each token, and the length of each sequence."""
    lengths_S = cu_seqlens_S1.long().diff()
    index_S = torch.arange(len(lengths_S), device=lengths_S.device)
    return index_S.repeat_interleave(lengths_S, output_size=T), lengths_S


def _loads(routing: Routing, cu_seqlens_S1: Tensor) -> tuple[Tensor, Tensor]:
    """The sequence of each token, and f of each sequence: an expert's share of its choices, times E."""
    (T, K), E = routing.experts_TK.shape, routing.scores_TE.shape[1]
    sequence_T, lengths_S = _sequences(cu_seqlens_S1, T)
    counts_SE = count_assignments(routing.experts_TK, E, sequence_T, len(lengths_S))
    return sequence_T, counts_SE.to(routing.scores_TE.dtype) / lengths_S.unsqueeze(1) * (E / K)


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
