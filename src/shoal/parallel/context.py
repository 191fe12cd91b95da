"""Sequences over several processes: each has a share of the positions of every sequence of a pack.

A sequence is cut into 2C pieces of one length, and each of C processes has two of them, the f-th from either
end: one looks back on little, one on much, and all have as many pairs of query and key, whatever the lengths
of documents. f is (rank + s) mod C for sequence s: what a length leaves over goes to each in turn.

What a token is to others is gathered in each layer: of latent attention the C + R elements of its row (576 in
V2 and V3; keys and values of all heads are 5,120 in V2-Lite, 40,960 in V3), else its keys and values. The
gradient of a row goes back to where the row is, and is summed there in float32, in the order of the
processes. All else is of single tokens, or is said of whole sequences and asks `batch.Part`. The price beside
a ring, which would pass rows on piece by piece: a process makes keys and values of all that it looks back on,
(3C + 1) / 4C of the pack on average, and holds them, one layer at a time.

Shape letters: T tokens here, S sequences, N keys here, P processes, X whatever a row has.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoal.batch import Batch, Part, Stretch
from shoal.ops.invariance import is_batch_invariant


def cut(pack: Batch, device: torch.device, group: dist.ProcessGroup) -> Batch:
    """This process's part of a pack that all of the group have, on the device. It asks for the boundaries: a
    pack that is on the host costs no wait."""
    if is_batch_invariant():
        raise ValueError(
            "batch-invariant mode is on, in which a sequence is read whole, but parallel.context spreads it "
            f"over {group.size()} processes; set SHOAL_BATCH_INVARIANT to 0 or parallel.context to 1"
        )
    assert pack.part is None and pack.kv is None and pack.last_S is None
    cu_S1 = pack.cu_seqlens_S1.cpu().long()
    pieces = [_pieces(cu_S1, rank, group.size()) for rank in range(group.size())]
    # 1. Where each row of the pack is when all have sent theirs, filled up to the most that one has.
    rows = [torch.cat((late.rows, early.rows)) for late, early in pieces]
    most = max(map(len, rows))
    place_T = torch.empty(pack.num_tokens, dtype=torch.int64)
    for rank, theirs in enumerate(rows):
        place_T[theirs] = rank * most + torch.arange(len(theirs))
    # 2. Late pieces look back on all that is gathered, early ones on the beginnings of it.
    late, early = pieces[group.rank()]
    keys = _spans(cu_S1[:-1], late.ends_S)
    begins = _spans(keys.cu_S1[:-1], early.ends_S)
    place_N = place_T[keys.rows].to(device)
    middle = len(late.rows)
    sequence_S = torch.arange(pack.num_sequences)
    part = Part(
        pack=pack.to(device),
        rows_T=rows[group.rank()].to(device),
        sequence_T=torch.cat([sequence_S.repeat_interleave(p.cu_S1.diff()) for p in (late, early)]).to(
            device
        ),
        stretches=(
            _stretch(slice(0, middle), late, None, keys, device),
            _stretch(slice(middle, None), early, begins.rows, begins, device),
        ),
        gather=lambda rows_TX: _Gather.apply(rows_TX, place_N, most, group),
        reduce=lambda tensor: _sum(tensor, group),
    )
    return part.of(part.pack)


class _Spans(NamedTuple):
    """Rows from so many places, so many from each."""

    rows: Tensor  # int64
    cu_S1: Tensor  # int64: their boundaries
    most: int


def _spans(first_S: Tensor, lengths_S: Tensor) -> _Spans:
    cu_S1 = F.pad(lengths_S.cumsum(0), (1, 0))
    rows = torch.arange(int(cu_S1[-1])) + (first_S - cu_S1[:-1]).repeat_interleave(lengths_S)
    return _Spans(rows, cu_S1, int(lengths_S.max()))


class _Piece(NamedTuple):
    """A piece of each sequence: its rows of the pack, and how much of the sequence there is up to its end."""

    rows: Tensor
    cu_S1: Tensor
    most: int
    ends_S: Tensor


def _pieces(cu_S1: Tensor, rank: int, ranks: int) -> tuple[_Piece, _Piece]:
    """The late and the early one of a process."""
    lengths_S = cu_S1.diff()
    early_S = (rank + torch.arange(len(lengths_S))) % ranks

    def piece(number_S: Tensor) -> _Piece:
        begins_S, ends_S = (n_S * lengths_S // (2 * ranks) for n_S in (number_S, number_S + 1))
        return _Piece(*_spans(cu_S1[:-1] + begins_S, ends_S - begins_S), ends_S)

    return piece(2 * ranks - 1 - early_S), piece(early_S)


def _stretch(
    rows: slice, piece: _Piece, keys_N: Tensor | None, keys: _Spans, device: torch.device
) -> Stretch:
    return Stretch(
        rows,
        piece.cu_S1.int().to(device),
        piece.most,
        None if keys_N is None else keys_N.to(device),
        keys.cu_S1.int().to(device),
        keys.most,
    )


def _sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = tensor.detach().clone()
    dist.all_reduce(total, group=group)
    return total


class _Gather(torch.autograd.Function):
    """Rows of all processes, of which `place_N` are wanted of those that `most` from each would be."""

    @staticmethod
    def forward(ctx: Any, rows_TX: Tensor, place_N: Tensor, most: int, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(place_N)
        ctx.how = len(rows_TX), most, group
        all_X = rows_TX.new_empty(group.size() * most, rows_TX.shape[1])
        dist.all_gather_into_tensor(all_X, _filled(rows_TX, most), group=group)
        return all_X.index_select(0, place_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NX: Tensor) -> tuple[Tensor | None, ...]:
        (place_N,), (tokens, most, group) = ctx.saved_tensors, ctx.how
        sent_X = grad_NX.new_zeros(group.size() * most, grad_NX.shape[1]).index_copy_(0, place_N, grad_NX)
        received_X = torch.empty_like(sent_X)
        dist.all_to_all_single(received_X, sent_X, group=group)
        received_PTX = received_X.unflatten(0, (group.size(), most))[:, :tokens]
        wide = torch.promote_types(grad_NX.dtype, torch.float32)
        return received_PTX.sum(0, dtype=wide).to(grad_NX.dtype), None, None, None


def _filled(rows_TX: Tensor, most: int) -> Tensor:
    """With zeros up to `most` rows."""
    return F.pad(rows_TX, (0, 0, 0, most - len(rows_TX))).contiguous()
