"""Loss-free balancing: after each optimizer step every expert's bias moves against its load.

  b_i += u * sign(mean load - load_i)      (arXiv 2408.15664, algorithm 1; DeepSeek-V3, section 2.1.2)

The law: loads are counted over all micro-batches of the step, by the trainer alone, so evaluation and
recomputation never move a bias. Every layer that routes is counted, prediction modules included; those
without a correction bias are measured only. The bias is `e_score_correction_bias` of each gate: it chooses
experts and has no gradient.

MaxVio, the measure, is (largest load - mean) / mean of a layer: 0 when even, E/K - 1 when all tokens go one
way. Shape letters: L layers that route, E experts, T tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.model.transformer import Transformer
from shoal.train.loss import count_assignments
from shoal.train.objective import Reduce, alone


class Balancer:
    """Counts the experts' loads of a step and, when it is over, moves the biases of a model."""

    def __init__(self, model: Transformer, update_speed: float) -> None:
        self.update_speed = update_speed
        self.gates = model.gates()
        experts = model.config.moe.n_routed_experts if model.config.moe else 0
        device = self.gates[0].weight.device if self.gates else None
        self.load_LE = torch.zeros(len(self.gates), experts, dtype=torch.int64, device=device)

    def count(self, experts: Sequence[Tensor]) -> None:
        """Add a micro-batch's choices, (T, K) a layer. Prediction modules that did not run have none."""
        if experts:
            experts_LTK = torch.stack(tuple(experts))
            L, T, K = experts_LTK.shape
            layer = torch.arange(L, device=experts_LTK.device).repeat_interleave(T, output_size=L * T)
            self.load_LE[:L] += count_assignments(experts_LTK.view(L * T, K), self.load_LE.shape[1], layer, L)

    @torch.no_grad()
    def update(self, reduce: Reduce = alone) -> Tensor:
        """Move the biases by the loads of all processes since the last update; return those loads (L, E)."""
        load_LE = reduce(self.load_LE)
        self.load_LE = torch.zeros_like(load_LE)
        # Below or above the mean, asked in integers: E * load against the sum has no rounding.
        below_LE = torch.sign(load_LE.sum(-1, keepdim=True) - load_LE.shape[1] * load_LE)
        move_LE = self.update_speed * below_LE.float()
        for gate, move_E in zip(self.gates, move_LE, strict=True):
            if gate.e_score_correction_bias is not None:
                gate.e_score_correction_bias.add_(move_E)
        return load_LE


def max_violation(load_LE: Tensor) -> Tensor:
    """MaxVio of each layer, (L,) float32; 0 for a layer that saw no token."""
    if load_LE.numel() == 0:
        return torch.zeros(0)
    mean_L = load_LE.float().mean(-1)
    return (load_LE.amax(-1) - mean_L) / mean_L.clamp(min=1e-9)
