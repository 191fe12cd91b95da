"""A model over the processes of a mesh, and what the Trainer is told of them.

Every stage that trains on several goes through here, so that what is cut, and how the parts are summed, is
written once.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from shoal.batch import Batch
from shoal.checkpoint import native
from shoal.model.transformer import Transformer
from shoal.parallel.context import cut
from shoal.parallel.mesh import Mesh
from shoal.parallel.pipeline import Pipeline, keep_stages
from shoal.parallel.shard import copies, join, local, rows, shard
from shoal.train.team import Team


def make_team(model: Transformer, mesh: Mesh) -> Team:
    """Cut the model over the mesh, in place."""
    shard(keep_stages(model, mesh), mesh)
    peers = native.Peers(mesh.rank, mesh.ranks, mesh.gather, rows(model, mesh), copies(model, mesh))

    def bring(batch: Batch, device: torch.device) -> Batch:
        return cut(batch, device, mesh.devices.get_group("context"))

    return Team(
        mesh.reduce,
        local,
        peers,
        replace(peers, gather=mesh.gather_aside),
        join,
        reading=(mesh.reader, mesh.degrees.readers),
        stages=Pipeline(model, mesh) if mesh.degrees.pipeline > 1 else None,
        bring=bring if mesh.degrees.context > 1 else Batch.to,
    )
