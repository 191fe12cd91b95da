"""Reference of what a token leaves in the paged cache when it is made: rotate, normalise, write.

The plain ops, one after the other; their cast points are these ops'. Nothing here has a gradient: a cache is
for serving.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.ops.reference.attention import write_cache
from shoal.ops.reference.layers import rms_norm, rope


@torch.no_grad()
def write_latent_cache(
    q_THR: Tensor,
    kv_TL: Tensor,
    weight_C: Tensor,
    eps: float,
    cos_TR2: Tensor,
    sin_TR2: Tensor,
    pages: Tensor,
    slots_T: Tensor,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    latent_TC, key_TR = kv_TL.split((weight_C.shape[0], q_THR.shape[2]), dim=-1)
    # 1. One rotation for the heads' queries and the key they share.
    rope_TXR = rope(torch.cat((q_THR, key_TR.unsqueeze(1)), dim=1), cos_TR2, sin_TR2, interleaved)
    q_THR, key_T1R = rope_TXR.split((q_THR.shape[1], 1), dim=1)
    # 2. The row of the cache.
    rows_TL = torch.cat((rms_norm(latent_TC, weight_C, eps), key_T1R.squeeze(1)), dim=-1)
    write_cache(pages, slots_T, rows_TL)
    return q_THR, rows_TL


@torch.no_grad()
def write_kv_cache(
    q_THQ: Tensor,
    k_TGQ: Tensor,
    v_TGQ: Tensor,
    cos_TR2: Tensor,
    sin_TR2: Tensor,
    pages: Tensor,
    slots_T: Tensor,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    q_THQ = rope(q_THQ, cos_TR2, sin_TR2, interleaved)
    k_TGQ = rope(k_TGQ, cos_TR2, sin_TR2, interleaved)
    write_cache(pages, slots_T, torch.stack((k_TGQ, v_TGQ), dim=1))
    return q_THQ, k_TGQ
