"""Weights, gradients and optimizer state cut over the processes: FSDP2, a block at a time.

Each process keeps some rows of every parameter. A block's are gathered as it is entered and dropped as it is
left, forward and backward; its gradients are summed, in float32, to whoever keeps the rows. Embedding, head,
final norm, and of a prediction module what it uses outside its own forward, stay gathered from the start of
the forward pass to the end of the backward pass.

The law: gradients are sums over processes, as the objective's shares are, never means. Every element of a
parameter lives on exactly one process of those that have its layer, so the global norm is the root of the
summed squares. Buffers (the routers' correction biases) are whole on all of them, and move alike, by loads
that are summed first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from shoal.model.moe import MoE
from shoal.model.transformer import Block, PredictionModule, Transformer
from shoal.parallel.expert import spread_experts
from shoal.parallel.mesh import Mesh

Rows = tuple[int, int]  # of dimension 0 of a whole tensor: the first that is here, and how many it has


def shard(model: Transformer, mesh: Mesh) -> Transformer:
    """The model, its experts spread over the expert axis and all parameters cut over the replicas."""
    if mesh.replicas.size() == 1:
        return model
    spread_experts(model, mesh)
    for _, block in model.model.blocks():
        # A prediction module joins and norms outside its forward: only what is called whole is cut by itself.
        parts = (block.self_attn, block.mlp) if isinstance(block, PredictionModule) else (block,)
        if isinstance(block.mlp, MoE):
            _cut(block.mlp.experts, mesh.holders)
        for part in parts:
            _cut(part, mesh.replicas)
    _cut(model, mesh.replicas)
    return model


def _cut(module: nn.Module, mesh: DeviceMesh) -> None:
    cut = fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    assert isinstance(cut, FSDPModule)
    cut.set_gradient_divide_factor(1.0)
    cut.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum


def local(tensor: Tensor) -> Tensor:
    """What of a parameter or gradient is here, as a plain tensor over the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def join(parameter: Tensor, here: Tensor) -> tuple[Tensor, int]:
    """The whole of something that is cut as a parameter is, of which `here` is ours, and where ours begins.

    All processes that have a part of it must ask.
    """
    if not isinstance(parameter, DTensor):
        return here, 0
    mesh, placements, shape = parameter.device_mesh, parameter.placements, parameter.shape
    cut = DTensor.from_local(here, mesh, placements, run_check=False, shape=shape, stride=parameter.stride())
    return cut.full_tensor(), compute_local_shape_and_global_offset(shape, mesh, placements)[1][0]


def rows(model: Transformer, mesh: Mesh) -> dict[str, Rows]:
    """Which rows of each parameter's whole this process keeps, by name, and of the buffers of its layers."""
    place = mesh.devices.get_local_rank("expert")
    found: dict[str, Rows] = {}
    for name, p in model.named_parameters():
        offset = 0
        if isinstance(p, DTensor):
            offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)[1][0]
        spread = ".mlp.experts." in name
        before = place * p.shape[0] if spread else 0
        whole = p.shape[0] * mesh.degrees.expert if spread else p.shape[0]
        found[name] = (before + offset, whole)
    if mesh.degrees.pipeline > 1:
        state = model.state_dict()
        found |= {name: (0, len(state[name])) for name in state.keys() - found.keys()}
    return found


def copies(model: Transformer, mesh: Mesh) -> frozenset[str]:
    """Those of `rows` that another process has, too, and whose writing and counting is its.

    In a pipeline: buffers but for the first replica's, and an embedding that does not begin the model.
    """
    if mesh.degrees.pipeline == 1:
        return frozenset()
    parameters = dict(model.named_parameters())
    found = (
        set[str]() if mesh.replicas.get_local_rank() == 0 else model.state_dict().keys() - parameters.keys()
    )
    if not isinstance(model.model.layers[0], Block):
        found |= parameters.keys() & {"model.embed_tokens.weight"}
    return frozenset(found)
