"""Reference of what a token leaves in the paged cache when it is made: rotate, normalise, write.

The plain ops, one after the other; their cast points are these ops'. Which ops is told: `invariant` hands in
those whose sums do not depend on the batch. Nothing here has a gradient: a cache is for serving.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shoal.ops.reference.layers import rms_norm, rope
from shoal.ops.reference.narrow_rows import keep_rows

Op = Callable[..., Tensor]


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
    *,
    norm: Op = rms_norm,
    turn: Op = rope,
) -> tuple[Tensor, Tensor]:
    latent_TC, key_TR = kv_TL.split((weight_C.shape[0], q_THR.shape[2]), dim=-1)
    # 1. One rotation for the heads' queries and the key they share.
    rope_TXR = turn(torch.cat((q_THR, key_TR.unsqueeze(1)), dim=1), cos_TR2, sin_TR2, interleaved)
    turned_THR, key_T1R = rope_TXR.split((q_THR.shape[1], 1), dim=1)
    q_THR.copy_(turned_THR)
    # 2. The row of the cache.
    rows_TL = torch.cat((norm(latent_TC, weight_C, eps), key_T1R.squeeze(1)), dim=-1)
    return q_THR, keep_rows(pages, slots_T, rows_TL, weight_C.shape[0])


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
    *,
    turn: Op = rope,
) -> tuple[Tensor, Tensor, Tensor]:
    q_THQ = turn(q_THQ, cos_TR2, sin_TR2, interleaved)
    k_TGQ = turn(k_TGQ, cos_TR2, sin_TR2, interleaved)
    k_TGQ, v_TGQ = keep_rows(pages, slots_T, torch.stack((k_TGQ, v_TGQ), dim=1), k_TGQ.shape[2]).unbind(1)
    return q_THQ, k_TGQ, v_TGQ


@torch.no_grad()
def latent_queries(
    q_THQ: Tensor,
    kv_TL: Tensor,
    norm_C: Tensor,
    eps: float,
    cos_TR2: Tensor,
    sin_TR2: Tensor,
    kv_b: Tensor,
    pages: Tensor,
    slots_T: Tensor,
    interleaved: bool,
    *,
    write: Callable[..., tuple[Tensor, Tensor]] = write_latent_cache,
    multiply: Op = torch.bmm,
) -> Tensor:
    rotated = kv_TL.shape[1] - norm_C.shape[0]
    q_THN, q_THR = q_THQ.split((q_THQ.shape[2] - rotated, rotated), dim=-1)
    # 1. Rotate, and keep the row.
    q_THR, _ = write(q_THR.clone(), kv_TL, norm_C, eps, cos_TR2, sin_TR2, pages, slots_T, interleaved)
    # 2. W_UK of each head.
    w_HNC = kv_b.unflatten(0, (q_THQ.shape[1], -1))[:, : q_THN.shape[2]]
    q_THC = multiply(q_THN.transpose(0, 1), w_HNC).transpose(0, 1)
    return torch.cat((q_THC, q_THR), dim=-1)


def latent_values(o_THC: Tensor, kv_b: Tensor, value_dim: int, *, multiply: Op = torch.bmm) -> Tensor:
    w_HVC = kv_b.unflatten(0, (o_THC.shape[1], -1))[:, -value_dim:]
    return multiply(o_THC.transpose(0, 1), w_HVC.transpose(1, 2)).transpose(0, 1)


def keys_and_values(kv_THX: Tensor, shared_TR: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    own_THN, v_THV = kv_THX.split((kv_THX.shape[2] - value_dim, value_dim), dim=-1)
    shared_THR = shared_TR.unsqueeze(1).expand(-1, kv_THX.shape[1], -1)
    return torch.cat((own_THN, shared_THR), dim=-1), v_THV
