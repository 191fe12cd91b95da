"""Attention of a part of a pack: its stretches, each over what it looks back on.

A stretch of a sequence is a chunk of a prompt by another name: queries that are the last of more keys. So the
op is that of whole packs, once for each stretch. Shape letters: T tokens here, N keys, H query heads, G
key-value heads, Q and V their dims.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.batch import Part
from shoal.ops import api as ops


def attend_part(q_THQ: Tensor, k_NGQ: Tensor, v_NGV: Tensor, part: Part, scale: float) -> Tensor:
    """o_THV of the tokens here, keys and values being those that the part gathers."""
    outputs = []
    for stretch in part.stretches:
        k, v = k_NGQ, v_NGV
        if stretch.keys_N is not None:
            k, v = k.index_select(0, stretch.keys_N), v.index_select(0, stretch.keys_N)
        where = stretch.cu_seqlens_S1, stretch.max_seqlen, scale, stretch.cu_keys_S1, stretch.max_keys
        outputs.append(ops.attention(q_THQ[stretch.rows], k, v, *where))
    return torch.cat(outputs)
