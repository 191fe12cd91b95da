"""Expert-specialised fine-tuning (ESFT, arXiv 2407.01906): train only the experts that a task uses.

1. Score each expert on the task's data: by its mean gate value ("gate", eq. 6) or its share of the choices
("token", eq. 7). 2. In each layer take the best until their scores reach `share` of the layer's total (eq.
8). 3. Only their rows of the stacks learn (`Trainable` of train/optim). Routers differ in what their weights
add up to, so a `share` is of the layer's sum: on V2-Lite, whose gate scores add up to 0.39, the paper's 0.1
of gate values is 0.26 here; its 0.2 of tokens is 0.2.

The law: what is chosen depends on the router's records alone; no weight is looked at.

Shape letters: T tokens, L layers that route, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from shoal.batch import Batch
from shoal.model.moe import MoE
from shoal.model.transformer import Transformer

Score = Literal["gate", "token"]


@torch.no_grad()
def score_experts(model: Transformer, batches: Iterable[Batch], score: Score) -> Tensor:
    """(L, E) float64: each expert's part in each layer, summing to 1 over its experts."""
    total_LE: Tensor | None = None
    for batch in batches:
        per_layer = []
        for routing in model(batch).routing:
            kept_TK = routing.experts_TK >= 0
            values_TK = (routing.weights_TK if score == "gate" else kept_TK).double() * kept_TK
            scores_E = values_TK.new_zeros(routing.scores_TE.shape[1])
            scores_E.index_add_(0, routing.experts_TK.clamp(min=0).flatten(), values_TK.flatten())
            per_layer.append(scores_E)
        if not per_layer:
            raise ValueError("this model routes nothing, so no expert can be chosen")
        stacked_LE = torch.stack(per_layer)
        total_LE = stacked_LE if total_LE is None else total_LE + stacked_LE
    if total_LE is None:
        raise ValueError("there is no text to score the experts on")
    return total_LE / total_LE.sum(-1, keepdim=True)


def choose_experts(scores_LE: Tensor, share: float) -> list[Tensor]:
    """For each layer the fewest experts, best first, whose scores reach `share` of the layer's total."""
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must be above 0 and at most 1, where 1 trains every expert")
    chosen = []
    for scores_E in scores_LE:
        values_E, order_E = scores_E.sort(descending=True, stable=True)
        before_E = values_E.cumsum(0) - values_E
        chosen.append(order_E[: int((before_E < share * scores_E.sum() * (1 - 1e-12)).sum())])
    return chosen


def trainable_experts(model: Transformer, chosen: list[Tensor]) -> dict[str, Tensor | None]:
    """What learns: the chosen rows of each layer's stacks."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, MoE) and not _is_ahead(model, name)
    ]
    assert len(names) == len(chosen)
    return {
        f"{name}.experts.{stack}": rows
        for name, rows in zip(names, chosen, strict=True)
        for stack in ("gate_up_proj", "down_proj")
    }


def _is_ahead(model: Transformer, name: str) -> bool:
    """Whether a name is of a prediction module, which the main model's records do not tell of."""
    return int(name.split(".")[2]) >= model.config.num_hidden_layers
