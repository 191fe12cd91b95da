"""Laws of packs: what is cut out and put back is the same bytes, and only where its base is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.checkpoint import hf, pack
from shoal.config.families import tiny
from shoal.model.transformer import Transformer

BLOCKS = (1, 2)


def build(seed: int = 0, dtype: torch.dtype = torch.float32, family: str = "deepseek-v3") -> Transformer:
    model = Transformer(tiny(family), dtype=dtype)
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


def tuned(dtype: torch.dtype = torch.float32) -> Transformer:
    """The same base, some experts trained."""
    model = build(dtype=dtype)
    with torch.no_grad():
        for block, expert in ((1, 3), (2, 0), (2, 5)):
            experts = model.model.layers[block].get_submodule("mlp.experts")
            for _, stack in experts.named_parameters():
                stack[expert] += 0.01
    return model


def same(one: Transformer, other: Transformer) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fine_tune_is_its_base_and_a_pack(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tuned(dtype)
    assert not same(build(dtype=dtype), model)
    pack.extract(model, {1: [3], 2: [5, 0]}, tmp_path / "pack")
    assert same(pack.graft(build(dtype=dtype), pack.read_pack(tmp_path / "pack")), model)


def test_back_again_is_the_base_and_files_are_the_same_bytes(tmp_path: Path) -> None:
    base, model = build(), tuned()
    pack.extract(base, {1: [3], 2: [0, 5]}, tmp_path / "old")
    pack.graft(model, pack.read_pack(tmp_path / "old"))
    hf.save(base, tmp_path / "base")
    hf.save(model, tmp_path / "back")
    names = [f"{name}/model.safetensors" for name in ("base", "back")]
    assert (tmp_path / names[0]).read_bytes() == (tmp_path / names[1]).read_bytes()


def test_names_are_the_checkpoints_own(tmp_path: Path) -> None:
    made = pack.extract(build(), {1: [3]}, tmp_path / "pack")
    assert sorted(made.tensors) == [
        f"model.layers.1.mlp.experts.3.{part}_proj.weight" for part in ("down", "gate", "up")
    ]
    manifest = json.loads((tmp_path / "pack" / "manifest.json").read_text())
    assert manifest["base"] == pack.base_hash(build())
    assert manifest["experts"] == {"1": [3]}


def test_another_base_is_refused_with_both_hashes(tmp_path: Path) -> None:
    pack.extract(build(), {1: [3]}, tmp_path / "pack")
    held, other = pack.read_pack(tmp_path / "pack"), build(seed=1)
    with pytest.raises(ValueError, match="base") as refusal:
        pack.graft(other, held)
    assert held.base in str(refusal.value)
    assert pack.base_hash(other) in str(refusal.value)
    with pytest.raises(ValueError, match="base"):
        pack.graft(build(dtype=torch.bfloat16), held)


def test_the_base_is_all_but_experts_and_prediction_modules() -> None:
    model, own = build(), pack.base_hash(build())
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.experts.down_proj").add_(1)
        model.get_parameter("model.layers.3.eh_proj.weight").add_(1)
    assert pack.base_hash(model) == own
    for name in ("model.layers.1.mlp.gate.weight", "lm_head.weight", "model.norm.weight"):
        changed = build()
        with torch.no_grad():
            changed.get_parameter(name)[0] += 1
        assert pack.base_hash(changed) != own, name


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        ({0: [1]}, "block 0 has no routed"),
        ({1: [99]}, "no expert 99"),
        ({}, "no expert is named"),
        ({1: []}, "named"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, experts: dict[int, list[int]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pack.extract(build(), experts, tmp_path / "pack")
    assert not (tmp_path / "pack").exists()


def test_a_pack_cut_short_is_refused(tmp_path: Path) -> None:
    pack.extract(build(), {1: [3]}, tmp_path / "pack")
    file = tmp_path / "pack" / "experts.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut short"):
        pack.read_pack(tmp_path / "pack")
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        pack.read_pack(tmp_path)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    pack.extract(build(), {1: [3]}, tmp_path / "pack")
    held = pack.read_pack(tmp_path / "pack")
    tensors = {name: tensor.double() for name, tensor in held.tensors.items()}
    with pytest.raises(ValueError, match="float64"):
        pack.graft(build(), replace(held, tensors=tensors))
