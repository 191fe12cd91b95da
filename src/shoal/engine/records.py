"""Records: what lies beside the keys and values of a position: its id, and the experts it was sent to.

They are written by every step to the page and offset where the position's keys and values go. So they are
there after a prefix hit, a preemption or a chunk, whoever computed the position, and a request's records are
the rows of its own pages. The ids serve the penalties, which then need nothing from the host.

Beside them stand the counts of what each expert was given, over all steps.

Shape letters: T tokens, P pages, B pages of a sequence, N positions, L layers that route, E experts, K
experts per token.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shoal.config.model import ModelConfig
from shoal.engine import staging
from shoal.ops import api as ops
from shoal.ops.api import Routing


def count_record_bytes(config: ModelConfig, *, weights: bool = False) -> int:
    """Bytes kept for a position: its id, and its experts in each layer that routes, with their weights if
    wanted."""
    if config.moe is None:
        return 4
    return 4 + (2 + 2 * weights) * _count_layers(config) * config.moe.num_experts_per_tok


def _count_layers(config: ModelConfig) -> int:
    return sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))


def check_record(config: ModelConfig, experts_TLK: Tensor, tokens: int) -> None:
    """ValueError where this is no record of so many positions of this model; -1 is a dropped choice."""
    if config.moe is None:
        raise ValueError("routing is given, but this model routes nothing; leave it out")
    wanted = tokens, _count_layers(config), config.moe.num_experts_per_tok
    if tuple(experts_TLK.shape) != wanted:
        raise ValueError(
            f"routing has shape {tuple(experts_TLK.shape)}; this text and model need {wanted}: positions but "
            f"the last, layers that route, experts a token"
        )
    if (
        experts_TLK.numel()
        and not -1 <= int(experts_TLK.min()) <= int(experts_TLK.max()) < config.moe.n_routed_experts
    ):
        raise ValueError(
            f"routing has experts {int(experts_TLK.min())} to {int(experts_TLK.max())}; this model has 0 to "
            f"{config.moe.n_routed_experts - 1}, and -1 is a choice that was dropped"
        )


class Records:
    """With `weights` also what each chosen expert's output was multiplied by, as float16."""

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        page_size: int,
        device: torch.device,
        *,
        weights: bool = False,
    ) -> None:
        slots = (num_pages + 1) * page_size  # the last page takes what padding writes
        self.page_size, self._num_slots = page_size, num_pages * page_size
        self._ids = torch.zeros(slots, dtype=torch.int32, device=device)
        self._experts = self._weights = self._tokens_LE = self._touched_L = None
        self._sent: tuple[staging.Parcel, staging.Parcel] | None = None  # counts on their way to the host
        if config.moe is not None:
            layers, experts = _count_layers(config), config.moe.n_routed_experts
            self._experts = torch.full(
                (slots, layers, config.moe.num_experts_per_tok), -1, dtype=torch.int16, device=device
            )
            if weights:
                self._weights = torch.zeros(self._experts.shape, dtype=torch.float16, device=device)
            self._tokens_LE = torch.zeros(layers, experts, dtype=torch.int64, device=device)
            self._touched_L = torch.zeros(layers, dtype=torch.int64, device=device)

    def write(self, slots_T: Tensor, ids_T: Tensor, routings: tuple[Routing, ...]) -> None:
        """Keep what a step computed. Launches only: nothing comes back to the host."""
        if self._experts is None or self._tokens_LE is None or self._touched_L is None:
            self._ids.index_copy_(0, slots_T, ids_T.int())
            return
        choices_LTK = torch.stack([routing.experts_TK for routing in routings])
        state = self._ids, self._experts, self._tokens_LE, self._touched_L, self._num_slots
        if not ops.record_step(slots_T, ids_T, choices_LTK, *state):
            ops.record(slots_T, ids_T, choices_LTK, *state)
        if self._weights is not None:
            weights_TLK = torch.stack([routing.weights_TK for routing in routings], dim=1)
            self._weights.index_copy_(0, slots_T, weights_TLK.to(torch.float16))

    def ids(self, table_SB: Tensor, rows: list[int], length: int) -> Tensor:
        """The ids (N, `length`) at the first positions of these rows of a block table."""
        (rows_N,) = staging.send([np.array(rows)], table_SB.device)
        pages_NB = table_SB[rows_N, : -(-length // self.page_size)]
        return self._gather(self._ids, pages_NB)[:, :length].long()

    def experts(self, pages: list[int], length: int) -> Tensor:
        """The experts (N, L, K) of the first `length` positions of a sequence, int16 on the host."""
        return self.gather([(pages, 0, length)])[0].cpu()

    def gather(self, parts: list[tuple[list[int], int, int]]) -> Tensor:
        """Of sequences by their pages, positions from one to another, all end to end, on the device: experts
        (1, N, L, K) int16, or experts and the bits of their weights (2, N, L, K)."""
        assert self._experts is not None
        size, slots = self.page_size, []
        for pages, start, end in parts:
            places = np.arange(start, end)
            slots.append(np.array(pages, np.int64)[places // size] * size + places % size)
        (slots_N,) = staging.send([np.concatenate(slots)], self._experts.device)
        kept = [self._experts] if self._weights is None else [self._experts, self._weights.view(torch.int16)]
        return torch.stack([rows.index_select(0, slots_N) for rows in kept])

    def reset_counts(self) -> None:
        """Count from here on."""
        if self._tokens_LE is not None and self._touched_L is not None:
            self._tokens_LE.zero_()
            self._touched_L.zero_()
            self._sent = None

    def counts(self, *, wait: bool = True) -> tuple[Tensor | None, Tensor | None]:
        """On the host: tokens that each expert was given (L, E), and distinct experts that a step gave a
        token, in each layer (L,), summed over steps. Without `wait` as of the last such call."""
        if self._tokens_LE is None or self._touched_L is None:
            return None, None
        if wait or not self._tokens_LE.is_cuda:
            self._sent = None
            return self._tokens_LE.to("cpu", copy=True), self._touched_L.to("cpu", copy=True)
        sent = staging.Parcel(self._tokens_LE), staging.Parcel(self._touched_L)
        tokens, touched = self._sent or sent
        self._sent = sent
        return tokens.open(), touched.open()

    def _gather(self, rows: Tensor, table_SB: Tensor) -> Tensor:
        paged = rows.view(-1, self.page_size, *rows.shape[1:])
        return paged[table_SB.long()].flatten(1, 2)
