"""Reference of what a step leaves beside its keys and values: ids, chosen experts, and counts of them.

Shape letters: T tokens, X slots of the cache, L layers that route, E experts, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def record(
    slots_T: Tensor,
    ids_T: Tensor,
    choices_LTK: Tensor,
    ids_X: Tensor,
    experts_XLK: Tensor,
    tokens_LE: Tensor,
    touched_L: Tensor,
    num_slots: int,
) -> None:
    # 1. Beside the keys of each token.
    ids_X.index_copy_(0, slots_T, ids_T.to(ids_X.dtype))
    experts_XLK.index_copy_(0, slots_T, choices_LTK.transpose(0, 1).to(experts_XLK.dtype))
    # 2. A dropped choice or a padded row counts for nobody.
    counts_LTK = (choices_LTK >= 0) & (slots_T < num_slots).view(1, -1, 1)
    given_LE = torch.zeros_like(tokens_LE)
    given_LE.scatter_add_(1, choices_LTK.clamp(min=0).flatten(1), counts_LTK.flatten(1).to(given_LE.dtype))
    tokens_LE += given_LE
    touched_L += given_LE.count_nonzero(1)
