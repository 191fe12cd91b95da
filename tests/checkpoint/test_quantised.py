"""Laws of loading quantised: it is `quantise` of the model loaded, and FP8 as published is taken as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoal.checkpoint import hf
from shoal.checkpoint.shards import Shards
from shoal.model.quantised import SCALE_SUFFIX, Scheme, quantise
from tests.checkpoint.layouts import Made

STORED = ("deepseek_v3", "mixtral", "qwen2")  # experts one by one, in another's words, none and biases


@pytest.mark.parametrize("scheme", ["fp8", "int4"])
@pytest.mark.parametrize("family", STORED)
def test_loading_quantised_is_quantising_what_was_loaded(made: Made, family: str, scheme: Scheme) -> None:
    folder = made(family, torch.bfloat16)
    got, wanted = hf.load(folder, quant=scheme), quantise(hf.load(folder), scheme)
    theirs = wanted.state_dict()
    assert got.state_dict().keys() == theirs.keys()
    for name, tensor in got.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


def test_published_float8_is_taken_as_it_is(v3_fp8: Path) -> None:
    """Byte for byte, experts and ragged blocks too; what is kept wide is decoded."""
    state, shards = hf.load(v3_fp8, quant="fp8", dtype=torch.bfloat16).state_dict(), Shards(v3_fp8)
    at, attention = "model.layers.1.mlp.experts", "model.layers.1.self_attn"
    for half, name in ((0, "gate_proj"), (1, "up_proj")):
        for suffix, stack in (("", "gate_up_proj"), (SCALE_SUFFIX, f"gate_up_proj{SCALE_SUFFIX}")):
            theirs = shards.read(f"{at}.3.{name}.weight{suffix}")
            assert torch.equal(state[f"{at}.{stack}"][3, half].float(), theirs.float())
    for name in ("kv_a_proj_with_mqa.weight", f"kv_a_proj_with_mqa.weight{SCALE_SUFFIX}"):
        assert torch.equal(state[f"{attention}.{name}"].float(), shards.read(f"{attention}.{name}").float())
    assert state[f"{attention}.kv_b_proj.weight"].dtype == torch.bfloat16


def test_float8_becomes_int4_by_way_of_what_it_stands_for(v3_fp8: Path) -> None:
    got = hf.load(v3_fp8, quant="int4", dtype=torch.float32).state_dict()
    wanted = quantise(hf.load(v3_fp8, dtype=torch.float32), "int4").state_dict()
    name = "model.layers.1.mlp.experts.down_proj"
    assert torch.equal(got[name], wanted[name])


def test_a_quantised_model_is_not_saved(v3: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="quantised for serving"):
        hf.save(hf.load(v3, quant="fp8"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
