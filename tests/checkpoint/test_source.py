"""Laws of opening a checkpoint: what does not fit its config.json is one ValueError, naming tensor and file.

Each case spoils one thing of a checkpoint that loads.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoal.checkpoint import hf
from tests.checkpoint.layouts import Edit, Fields, Made, Tensors, change

GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"  # (136, 200)
FILE = r"\S*/in/model.safetensors"

MISFITS: dict[str, tuple[Edit, str]] = {
    "missing": (lambda t, c: t.pop(GATE), rf"/in has no tensor {GATE}, which its config.json calls for$"),
    "missing head": (lambda t, c: t.pop("lm_head.weight"), r"no tensor lm_head.weight"),
    "missing of a prediction module": (
        lambda t, c: t.pop("model.layers.2.enorm.weight"),
        r"no tensor model.layers.2.enorm.weight, .*; mtp=False leaves",
    ),
    "extra": (
        lambda t, c: t.update({"model.layers.1.surprise": torch.ones(1)}),
        rf"{FILE} has a tensor model.layers.1.surprise, for which the deepseek_v3 model",
    ),
    "shape": (
        lambda t, c: t.update({GATE: torch.ones(5, 200)}),
        rf"{GATE} in {FILE} has shape \(5, 200\); by its config.json it has shape \(136, 200\)",
    ),
    "dtype": (
        lambda t, c: t.update({GATE: torch.ones(136, 200, dtype=torch.int8)}),
        rf"{GATE} in {FILE} is I8; weights are F32, BF16, F16",
    ),
    "another vocabulary": (
        lambda t, c: c.update(vocab_size=60),
        rf"model.embed_tokens.weight in {FILE} has shape \(64, 200\); .* \(60, 200\)",
    ),
    "more experts": (
        lambda t, c: c.update(n_routed_experts=8),
        r"no tensor \S*experts.4.gate_proj.weight \(and 23 more\)",
    ),
    "fewer experts": (
        lambda t, c: c.update(n_routed_experts=2, n_group=1),
        r"has a tensor \S*experts.[23].\S* \(and 11 more\)",
    ),
    "no prediction modules": (
        lambda t, c: c.update(num_nextn_predict_layers=0),
        r"has a tensor model.layers.2.",
    ),
    "config": (lambda t, c: c.update(num_hidden_layers="2"), r"/in/config.json: .*num_hidden_layers"),
}


@pytest.mark.parametrize(("edit", "message"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_named(edit: Edit, message: str, v3: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        hf.load(change(v3, tmp_path / "in", edit))


DOWN = "model.layers.0.mlp.down_proj.weight"  # (200, 296): 2 x 3 blocks
SCALE = f"{DOWN}_scale_inv"

FLOAT8_MISFITS: dict[str, tuple[Edit, str]] = {
    "no scale": (lambda t, c: t.pop(SCALE), rf"{DOWN} in {FILE} is F8_E4M3, but there is no {SCALE}"),
    "shape": (
        lambda t, c: t.update({SCALE: torch.ones(2, 2)}),
        rf"{SCALE} in {FILE} is F32 of shape \(2, 2\); .* \(200, 296\) .* F32 of shape \(2, 3\)",
    ),
    "dtype": (
        lambda t, c: t.update({SCALE: torch.ones(2, 3, dtype=torch.bfloat16)}),
        rf"{SCALE} in {FILE} is BF16 of shape \(2, 3\)",
    ),
    "scale of a bfloat16 weight": (
        lambda t, c: t.update({DOWN: t[DOWN].bfloat16()}),
        rf"{SCALE} in {FILE} has nothing to scale: {DOWN} is BF16",
    ),
    "scale of nothing": (
        lambda t, c: t.update({"model.layers.0.mlp.lost.weight_scale_inv": torch.ones(1, 1)}),
        rf"{FILE} has a tensor model.layers.0.mlp.lost.weight_scale_inv",
    ),
    "config": (
        lambda t, c: c.pop("quantization_config"),
        rf"in {FILE} is F8_E4M3, but its config.json has no quantization_config",
    ),
}


@pytest.mark.parametrize(("edit", "message"), FLOAT8_MISFITS.values(), ids=FLOAT8_MISFITS)
def test_float8_that_does_not_fit_is_named(edit: Edit, message: str, v3_fp8: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        hf.load(change(v3_fp8, tmp_path / "in", edit))


def test_a_tied_head_that_differs_is_named(made: Made, tmp_path: Path) -> None:
    def store_another_head(tensors: Tensors, config: Fields) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    folder = change(made("qwen2"), tmp_path / "in", store_another_head)
    with pytest.raises(ValueError, match=rf"lm_head.weight in {FILE} differs .*tie_word_embeddings"):
        hf.load(folder)


@pytest.mark.parametrize("copy", ["embed_tokens.weight", "shared_head.head.weight"])
def test_copies_that_differ_are_named(copy: str, v3: Path, tmp_path: Path) -> None:
    def spoil(tensors: Tensors, config: Fields) -> None:
        tensors[f"model.layers.2.{copy}"][-1, -1] += 1

    folder = change(v3, tmp_path / "in", spoil)
    with pytest.raises(ValueError, match=rf"model.layers.2.{copy} in {FILE} differs .*mtp=False"):
        hf.load(folder)
    hf.load(folder, mtp=False)


def test_a_dtype_that_weights_cannot_have_is_refused(made: Made) -> None:
    with pytest.raises(ValueError, match=r"torch.int8; .* float32, bfloat16 or float16"):
        hf.load(made("llama"), dtype=torch.int8)
