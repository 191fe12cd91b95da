"""Loss-free balancing: the routers' correction biases, moved by the loads of a step once it is over.

- `sign`: b_i += u * sign(mean load - load_i)   (arXiv 2408.15664, algorithm 1; DeepSeek-V3, section 2.1.2)
- `quantile`: b_i is solved for. An expert is chosen by the tokens where b_i > c_t - s_ti, with c_t the best
  biased score that was not chosen; the K/E quantile of c_t - s_ti over the step's tokens gives it an even
  share of them. Then all are centred. (Kimi K3's rule, which has no step size.)

The law: loads are counted over all micro-batches and processes of the step, by the trainer alone, so
evaluation and recomputation never move a bias. Every layer that routes is counted, prediction modules
included; those without a correction bias are measured only. The bias chooses experts and has no gradient.

MaxVio, the measure, is (largest load - mean) / mean of a layer: 0 when even, E/K - 1 when all tokens go one
way. Shape letters: L layers that route, E experts, T tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.config.model import MoEConfig
from shoal.config.run import BalanceConfig
from shoal.model.moe import Gate, MoE
from shoal.model.transformer import Transformer
from shoal.train.auxiliary import count_assignments
from shoal.train.objective import Reduce, alone


class Balancer:
    """Counts the experts' loads of a step and, when it is over, moves the biases of a model.

    Loads are of all layers of the model, and biases move where their gates are: a process may have some.
    """

    def __init__(self, model: Transformer, settings: BalanceConfig) -> None:
        self.settings = settings
        self.moe = model.config.moe
        places = {layer: place for place, layer in enumerate(model.config.routed_layers)}
        self.gates = {
            places[n]: block.mlp.gate for n, block in model.model.blocks() if isinstance(block.mlp, MoE)
        }
        experts = self.moe.n_routed_experts if self.moe else 0
        device = next(model.parameters()).device
        self.load_LE = torch.zeros(len(places), experts, dtype=torch.int64, device=device)
        self.needs: list[list[Tensor]] = [[] for _ in places]  # c - s of each micro-batch, (T, E)

    def count(self, experts: Sequence[Tensor], scores: Sequence[Tensor] = (), before: int = 0) -> None:
        """Add a micro-batch's choices, (T, K) a layer, and for `quantile` its scores, (T, E); of the layers
        that route from number `before` on.

        Prediction modules that did not run have none.
        """
        if not experts:
            return
        experts_LTK = torch.stack(tuple(experts))
        L, T, K = experts_LTK.shape
        layer = torch.arange(L, device=experts_LTK.device).repeat_interleave(T, output_size=L * T)
        counted_LE = count_assignments(experts_LTK.view(L * T, K), self.load_LE.shape[1], layer, L)
        self.load_LE[before : before + L] += counted_LE
        if self.settings.bias_rule == "quantile":
            if len(scores) != L:
                raise ValueError(
                    "balance.bias_rule is 'quantile', but the objective gives no scores; use 'sign' with it"
                )
            for place, scores_TE in enumerate(scores, before):
                bias_E = self.gates[place].e_score_correction_bias
                if bias_E is not None:
                    best = (scores_TE + bias_E).topk(K + 1, dim=-1).values
                    self.needs[place].append(best[:, -1:] - scores_TE)

    @torch.no_grad()
    def update(self, reduce: Reduce = alone, *, moving: bool = True) -> Tensor:
        """End the step: move the biases, where they are `moving`; the loads of all processes, (L, E)."""
        load_LE = reduce(self.load_LE)
        self.load_LE = torch.zeros_like(load_LE)
        needs, self.needs = self.needs, [[] for _ in self.needs]
        if moving and self.moe is not None and self.moe.has_correction_bias:
            if self.settings.bias_rule == "sign":
                # Below or above the mean, asked in integers: E * load against the sum has no rounding.
                below_LE = torch.sign(load_LE.sum(-1, keepdim=True) - load_LE.shape[1] * load_LE)
                for place, gate in self.gates.items():
                    self._bias(gate).add_(self.settings.bias_update_speed * below_LE[place].float())
            else:
                # Asked together: whoever has no gate of a layer has no token of it, and counts none.
                for place in load_LE.sum(-1).nonzero().flatten().tolist():
                    here = [load_LE.new_empty(0, load_LE.shape[1], dtype=torch.float32), *needs[place]]
                    bias_E = self._solve(self.moe, torch.cat(here), reduce)
                    if place in self.gates:
                        self._bias(self.gates[place]).copy_(bias_E)
        return load_LE

    @staticmethod
    def _bias(gate: Gate) -> Tensor:
        assert gate.e_score_correction_bias is not None, "a gate has the bias of its config"
        return gate.e_score_correction_bias

    @staticmethod
    def _solve(moe: MoEConfig, need_TE: Tensor, reduce: Reduce) -> Tensor:
        """The bias that gives each expert K/E of the step's tokens, those of all processes."""
        T, E = int(reduce(torch.tensor(len(need_TE), device=need_TE.device))), need_TE.shape[1]
        share = T * moe.num_experts_per_tok // E
        # Between the last token that is to choose the expert and the first that is not.
        places = [min(max(n, 1), T) for n in (share, share + 1)]
        bias_E = kth_smallest(need_TE, places, reduce).mean(0)
        return bias_E - bias_E.mean()


def kth_smallest(values_TE: Tensor, places: Sequence[int], reduce: Reduce = alone) -> Tensor:
    """For each place k, counted from 1, the k-th smallest of each column over all processes: (k, E).

    By bisection over the 2^32 float32 there are, in their order: a number's bits are an integer that orders
    positive ones, and negative ones once all but the sign is turned round. Only counts travel, 32 times, and
    the answer is one of the values, whatever the processes.
    """
    bits_TE = values_TE.float().view(torch.int32)
    keys_TE = (bits_TE ^ ((bits_TE >> 31) & 0x7FFFFFFF)).long()
    low_kE = keys_TE.new_full((len(places), values_TE.shape[1]), -(2**31))
    high_kE = low_kE + (2**32 - 1)
    want_k1 = torch.tensor(places, device=values_TE.device).unsqueeze(1)
    for _ in range(32):
        middle_kE = (low_kE + high_kE) >> 1
        up_to_kE = reduce(torch.stack([(keys_TE <= middle_E).sum(0) for middle_E in middle_kE]))
        enough_kE = up_to_kE >= want_k1
        high_kE = torch.where(enough_kE, middle_kE, high_kE)
        low_kE = torch.where(enough_kE, low_kE, middle_kE + 1)
    low_kE = low_kE.int()
    return (low_kE ^ ((low_kE >> 31) & 0x7FFFFFFF)).view(torch.float32)


class GateNoise:
    """Normal noise of one spread on a router's logits. (Shazeer's spread is learned: `noisy_gate`.)"""

    def __init__(self, spread: float, generator: torch.Generator) -> None:
        self.spread = spread
        self.generator = generator

    def __call__(self, logits_TE: Tensor) -> Tensor:
        noise_TE = torch.empty_like(logits_TE).normal_(generator=self.generator)
        return logits_TE + self.spread * noise_TE


def add_noise(model: Transformer, spread: float, generator: torch.Generator) -> Transformer:
    """The model, its routers noisy while it trains, and those that draw by themselves given what from."""
    for gate in model.gates():
        gate.generator = generator
        gate.perturb = GateNoise(spread, generator) if spread else None
    return model
