"""Adapters in PEFT's layout, out: a folder that `peft.PeftModel.from_pretrained` puts on the same base model.

adapter_config.json says which weights are adapted, adapter_model.safetensors has an A and a B for each. A
Linear's are as they are here. Those of a stack of experts (E, O, I) are one pair in PEFT (target_parameters):
A (E r, I), an expert's rows together, and B (O, r E), an expert's columns r apart; two stacks of one module
are nested wrappers. The law: the adapted model's logits there are the adapted model's here.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from shoal.checkpoint.folder import replacing
from shoal.model.lora import LowRank, adapters
from shoal.model.transformer import Transformer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_adapters(model: Transformer, folder: str | Path, base: str, *, overwrite: bool = False) -> None:
    """Write a model's adapters; `base` is the checkpoint they were trained on. Whole, or not at all."""
    found = adapters(model)
    if not found:
        raise ValueError("this model has no adapters to save")
    ranks = {adapter.lora_A.shape[-2] for adapter in found.values()}
    scales = {adapter.scale for adapter in found.values()}
    assert len(ranks) == len(scales) == 1, "add_lora gives all adapters one rank and one scale"
    (rank,), (scale,) = ranks, scales
    stacks = sorted(name for name, adapter in found.items() if adapter.lora_A.ndim == 3)
    linears = sorted(found.keys() - set(stacks))
    tensors: dict[str, Tensor] = {}
    for name in linears:
        tensors |= _pair(name, found[name].lora_A, found[name].lora_B)
    for name in stacks:
        owner, _, stack = name.rpartition(".")
        # PEFT wraps the parameters of a module in the order of their names in it; the last is outermost.
        wrapped = [other for other in ("gate_up_proj", "down_proj") if f"{owner}.{other}" in stacks]
        depth = len(wrapped) - 1 - wrapped.index(stack)
        tensors |= _pair(owner + ".base_layer" * depth, *_flat(found[name]))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": linears,
        "target_parameters": stacks or None,
    }
    with replacing(Path(folder), overwrite=overwrite, marker=CONFIG) as new:
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
        (new / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


def _pair(name: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{name}.lora_A.weight": a.detach().contiguous(),
        f"{PREFIX}{name}.lora_B.weight": b.detach().contiguous(),
    }


def _flat(adapter: LowRank) -> tuple[Tensor, Tensor]:
    return adapter.lora_A.flatten(0, 1), adapter.lora_B.permute(1, 2, 0).flatten(1)
