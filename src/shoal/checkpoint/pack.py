"""A pack: some experts of a checkpoint in a folder of their own, to be put into another of the same base.

    experts.safetensors   their matrices, under the names of the published checkpoint
    manifest.json         which they are, their shapes and dtype, and the hash of the base

The base is all but the routed experts: fine-tunes that train experts alone (ESFT) share it to the bit. Its
law: a pack goes only where its base is, and what was cut out and put back is the same bytes. Prediction
modules are no part of either.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.checkpoint.folder import replacing
from shoal.checkpoint.names import DOWN, GATE_UP, Piece, published
from shoal.checkpoint.shards import read_json
from shoal.config.model import ModelConfig
from shoal.model.transformer import Transformer

MANIFEST, TENSORS = "manifest.json", "experts.safetensors"
FORMAT = "shoal expert pack 1"


@dataclass(frozen=True)
class Pack:
    """A pack that was read. `experts` are by block."""

    base: str
    experts: Mapping[int, tuple[int, ...]]
    tensors: Mapping[str, Tensor]


def base_hash(model: Transformer) -> str:
    """SHA-256 of every tensor but the routed experts and prediction modules: name, dtype, shape, bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.endswith((GATE_UP, DOWN)) or _is_ahead(model.config, name):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def extract(
    model: Transformer, experts: Mapping[int, Sequence[int]], folder: Path, *, overwrite: bool = False
) -> Pack:
    """Write these experts of these blocks as a pack. ValueError for a block or expert that is not there."""
    chosen = _check(model.config, experts)
    state = model.state_dict()
    tensors = {
        piece.stored: piece.of(state[piece.parameter]).detach().cpu().contiguous().clone()
        for piece in _pieces(model)
        if piece.expert in chosen.get(_block(piece.parameter), ())
    }
    pack = Pack(base_hash(model), chosen, tensors)
    moe = model.config.moe
    assert moe is not None
    manifest = {
        "format": FORMAT,
        "base": pack.base,
        "experts": {str(block): list(each) for block, each in chosen.items()},
        "model_type": model.config.model_type,
        "n_routed_experts": moe.n_routed_experts,
        "hidden_size": model.config.hidden_size,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch."),
    }
    with replacing(folder, overwrite=overwrite, marker=MANIFEST) as new:
        save_file(tensors, new / TENSORS, metadata={"format": "pt"})
        (new / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return pack


def read_pack(folder: Path) -> Pack:
    """ValueError where the folder holds no pack, or one that is cut short."""
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{folder / MANIFEST} is of format {manifest.get('format')!r}; known is {FORMAT!r}")
    try:
        tensors = load_file(folder / TENSORS)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{folder / TENSORS} is missing or cut short ({error}); extract it again") from error
    experts = manifest["experts"]
    assert isinstance(experts, dict)
    return Pack(str(manifest["base"]), {int(block): tuple(each) for block, each in experts.items()}, tensors)


@torch.no_grad()
def graft(model: Transformer, pack: Pack) -> Transformer:
    """Put the experts of a pack in the place of the model's own. ValueError if its base is another."""
    own = base_hash(model)
    if own != pack.base:
        raise ValueError(
            f"the pack was cut from base {pack.base}, and this checkpoint's is {own}; an expert reads what "
            f"its own base writes, so graft it into a checkpoint of that base (in the same dtype)"
        )
    chosen = _check(model.config, pack.experts)
    state = model.state_dict()
    for piece in _pieces(model):
        if piece.expert not in chosen.get(_block(piece.parameter), ()):
            continue
        place, tensor = piece.of(state[piece.parameter]), pack.tensors.get(piece.stored)
        if tensor is None or tensor.shape != place.shape or tensor.dtype != place.dtype:
            told = "missing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(
                f"{piece.stored} of the pack is {told}; the model's is {place.dtype} of shape "
                f"{tuple(place.shape)}"
            )
        place.copy_(tensor)
    return model


def _pieces(model: Transformer) -> list[Piece]:
    return [
        piece
        for piece in published(model.config, model.state_dict())
        if piece.role == "own" and piece.expert is not None and not _is_ahead(model.config, piece.parameter)
    ]


def _check(config: ModelConfig, experts: Mapping[int, Sequence[int]]) -> dict[int, tuple[int, ...]]:
    count = config.moe.n_routed_experts if config.moe else 0
    blocks = [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
    for block, each in experts.items():
        if block not in blocks:
            raise ValueError(f"block {block} has no routed experts; those that have are {blocks}")
        if wrong := [expert for expert in each if not 0 <= expert < count]:
            raise ValueError(f"block {block} has no expert {wrong[0]}; they are 0 to {count - 1}")
    if not any(experts.values()):
        raise ValueError("no expert is named; a pack holds one or more")
    return {block: tuple(sorted(set(each))) for block, each in sorted(experts.items()) if each}


def _block(name: str) -> int:
    return int(name.split(".")[2])


def _is_ahead(config: ModelConfig, name: str) -> bool:
    parts = name.split(".")
    return parts[1] == "layers" and int(parts[2]) >= config.num_hidden_layers
