"""Laws of Hugging Face checkpoints: in and out is the identity, transformers agrees, memory stays small.

What happens to a checkpoint that does not fit is in test_source.py and test_shards.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from shoal.checkpoint import hf
from shoal.checkpoint.fp8 import dequantise
from shoal.config.families import FAMILIES, tiny
from shoal.config.hf import from_hf
from shoal.model.transformer import Transformer
from tests.checkpoint.layouts import (
    DEEPSEEK_MOE_CONFIG,
    DTYPES,
    FP8,
    MOE_ORACLES,
    ORACLES,
    V3_CONFIG,
    VOCAB,
    Fields,
    Made,
    Tensors,
    assert_same,
    change,
    deepseek_moe_shapes,
    fill,
    make_oracle,
    quantise,
    read,
    write,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ORACLES)
def test_in_and_out_is_the_identity(family: str, dtype: torch.dtype, made: Made, tmp_path: Path) -> None:
    model = hf.load(made(family, dtype))
    assert next(model.parameters()).dtype == dtype
    hf.save(model, tmp_path / "out")
    assert_same(read(made(family, dtype)), read(tmp_path / "out"))


def test_in_and_out_is_the_identity_for_deepseek_moe_16b(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", DEEPSEEK_MOE_CONFIG, fill(deepseek_moe_shapes()))
    hf.save(hf.load(folder), tmp_path / "out")
    assert_same(read(folder), read(tmp_path / "out"))


def test_in_and_out_is_the_identity_for_v3_with_its_prediction_module(v3: Path, tmp_path: Path) -> None:
    hf.save(hf.load(v3), tmp_path / "out")
    assert_same(read(v3), read(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ORACLES)
def test_transformers_loads_what_is_saved(
    family: str, dtype: torch.dtype, made: Made, tmp_path: Path
) -> None:
    hf.save(hf.load(made(family, dtype)), tmp_path / "out", max_shard_bytes=10_000)
    auto: Any = transformers.AutoModelForCausalLM
    mine, info = auto.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    oracle = auto.from_pretrained(made(family, dtype), dtype="auto")
    ids = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        # The same program on the same bytes: equal to the last bit.
        assert torch.equal(mine(ids).logits, oracle(ids).logits)
    assert (mine.generation_config.bos_token_id, mine.generation_config.eos_token_id) == (1, 2)


def test_transformers_loads_a_v3_with_a_prediction_module_but_for_the_module(
    v3: Path, tmp_path: Path
) -> None:
    hf.save(hf.load(v3), tmp_path / "out")
    auto: Any = transformers.AutoModelForCausalLM
    _, info = auto.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    unexpected = info.pop("unexpected_keys")
    assert not any(info.values()), info
    assert unexpected
    assert all(name.startswith("model.layers.2.") for name in unexpected)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_back_as_it_was_saved(name: str, tmp_path: Path) -> None:
    config = tiny(name)
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    hf.save(model, tmp_path / "out")
    back = hf.load(tmp_path / "out")
    assert back.config == config
    assert_same(model.state_dict(), back.state_dict())


@pytest.mark.parametrize("family", MOE_ORACLES)
def test_experts_stored_as_stacks_are_the_experts_stored_one_by_one(
    family: str, made: Made, tmp_path: Path
) -> None:
    make_oracle(family, torch.float32).save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in read(tmp_path / "stacked"))
    hf.save(hf.load(tmp_path / "stacked"), tmp_path / "out")
    assert_same(read(made(family)), read(tmp_path / "out"))


def test_files_without_an_index_are_one_checkpoint(v3: Path, tmp_path: Path) -> None:
    tensors = read(v3)
    first = dict(list(tensors.items())[::2])
    rest = {name: tensor for name, tensor in tensors.items() if name not in first}
    hf.save(hf.load(write(tmp_path / "in", V3_CONFIG, first, rest)), tmp_path / "out")
    assert_same(tensors, read(tmp_path / "out"))


def test_a_tied_head_may_be_stored(made: Made, tmp_path: Path) -> None:
    def store_head(tensors: Tensors, config: Fields) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    hf.save(hf.load(change(made("qwen2"), tmp_path / "in", store_head)), tmp_path / "out")
    assert_same(read(made("qwen2")), read(tmp_path / "out"))


def test_rotary_frequencies_may_be_stored(made: Made, tmp_path: Path) -> None:
    """Llama-2 has them; the config says the same."""

    def store_frequencies(tensors: Tensors, config: Fields) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    hf.save(hf.load(change(made("llama"), tmp_path / "in", store_frequencies)), tmp_path / "out")
    assert_same(read(made("llama")), read(tmp_path / "out"))


@pytest.mark.parametrize(("stored", "wanted"), [(DTYPES[0], DTYPES[1]), (DTYPES[1], DTYPES[0])])
def test_dtype_casts_every_weight_but_the_correction_bias(
    stored: torch.dtype, wanted: torch.dtype, made: Made, tmp_path: Path
) -> None:
    model = hf.load(made("deepseek_v3", stored), dtype=wanted)
    hf.save(model, tmp_path / "out")
    expected = {
        name: tensor if name.endswith("correction_bias") else tensor.to(wanted)
        for name, tensor in read(made("deepseek_v3", stored)).items()
    }
    assert_same(expected, read(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(wanted)[6:]


def test_a_correction_bias_stored_in_bfloat16_becomes_float32(made: Made, tmp_path: Path) -> None:
    def round_bias(tensors: Tensors, config: Fields) -> None:
        tensors[name] = tensors[name].bfloat16()

    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    folder = change(made("deepseek_v3", torch.bfloat16), tmp_path / "in", round_bias)
    bias = hf.load(folder).state_dict()[name]
    assert bias.dtype == torch.float32
    assert torch.equal(bias, read(folder)[name].float())


def test_weights_say_their_dtype_where_the_config_does_not(made: Made, tmp_path: Path) -> None:
    folder = change(made("llama"), tmp_path / "in", lambda tensors, config: config.pop("dtype"))
    assert next(hf.load(folder).parameters()).dtype == torch.float32


def test_a_checkpoint_without_prediction_modules_loads_without_them(made: Made) -> None:
    """What transformers writes: the config counts one module, the weights have none."""
    folder = made("deepseek_v3")
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert hf.load(folder).config.num_nextn_predict_layers == 0


def test_prediction_modules_are_left_out_when_asked(v3: Path, tmp_path: Path) -> None:
    model = hf.load(v3, mtp=False)
    assert model.config.num_nextn_predict_layers == 0
    hf.save(model, tmp_path / "out")
    assert_same({name: x for name, x in read(v3).items() if ".layers.2." not in name}, read(tmp_path / "out"))


def test_copies_of_embedding_and_head_are_not_needed(v3: Path, tmp_path: Path) -> None:
    def drop_copies(tensors: Tensors, config: Fields) -> None:
        del tensors["model.layers.2.embed_tokens.weight"], tensors["model.layers.2.shared_head.head.weight"]

    hf.save(hf.load(change(v3, tmp_path / "in", drop_copies)), tmp_path / "out")
    assert_same(read(v3), read(tmp_path / "out"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_loads_as_what_it_stands_for(dtype: torch.dtype, v3_fp8: Path, tmp_path: Path) -> None:
    model = hf.load(v3_fp8, dtype=dtype)
    assert model.config.quantization is None
    hf.save(model, tmp_path / "out")
    stored = read(v3_fp8)
    expected: Tensors = {}
    for name, tensor in stored.items():
        if tensor.dtype == torch.float8_e4m3fn:
            tensor = dequantise(tensor, stored[f"{name}_scale_inv"], (128, 128))
        if not name.endswith("_scale_inv"):
            expected[name] = tensor if name.endswith("correction_bias") else tensor.to(dtype)
    assert_same(expected, read(tmp_path / "out"))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_scale_may_lie_in_another_file_than_its_weight(v3_fp8: Path, tmp_path: Path) -> None:
    tensors = read(v3_fp8)
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith("_scale_inv")}
    rest = {name: tensor for name, tensor in tensors.items() if name not in scales}
    folder = write(tmp_path / "in", json.loads((v3_fp8 / "config.json").read_text()), scales, rest)
    hf.save(hf.load(folder), tmp_path / "out")
    hf.save(hf.load(v3_fp8), tmp_path / "other")
    assert_same(read(tmp_path / "other"), read(tmp_path / "out"))


def test_weights_dequantised_by_somebody_else_load_under_the_old_config(v3: Path, tmp_path: Path) -> None:
    """DeepSeek's own script makes such folders: the tensors say what they are."""
    folder = change(v3, tmp_path / "in", lambda tensors, config: config.update(quantization_config=FP8))
    hf.save(hf.load(folder), tmp_path / "out")
    assert_same(read(v3), read(tmp_path / "out"))


def test_tokenizer_files_go_with_the_weights(made: Made, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    model = hf.load(made("llama"))
    hf.save(model, tmp_path / "out", tokenizer_files=[tmp_path / "tokenizer.json"])
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    with pytest.raises(ValueError, match=r"config.json is no tokenizer file"):
        hf.save(model, tmp_path / "other", tokenizer_files=[made("llama") / "config.json"])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_convert_is_save_of_load(dtype: torch.dtype | None, v3_fp8: Path, tmp_path: Path) -> None:
    hf.save(hf.load(v3_fp8, dtype=dtype), tmp_path / "one", max_shard_bytes=500_000)
    hf.convert(v3_fp8, tmp_path / "two", dtype=dtype, max_shard_bytes=500_000)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / x).iterdir()} for x in ("one", "two"))
    assert one == two


def test_convert_takes_stacks_apart_and_brings_the_tokenizer(made: Made, tmp_path: Path) -> None:
    make_oracle("mixtral", torch.float32).save_pretrained(tmp_path / "stacked", save_original_format=False)
    (tmp_path / "stacked" / "tokenizer.json").write_text("{}")
    hf.convert(tmp_path / "stacked", tmp_path / "out")
    assert_same(read(made("mixtral")), read(tmp_path / "out"))
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "stacked" / name).read_bytes()


def test_progress_counts_every_tensor_and_byte(v3: Path, tmp_path: Path) -> None:
    loading: list[tuple[int, int, int]] = []
    saving: list[tuple[int, int, int]] = []
    model = hf.load(v3, progress=lambda *state: loading.append(state))
    own = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert [done for done, _, _ in loading] == list(range(1, loading[-1][1] + 1))
    assert loading[-1][2] == own
    hf.save(model, tmp_path / "out", max_shard_bytes=500_000, progress=lambda *state: saving.append(state))
    tensors = read(v3)
    assert saving[-1] == (len(tensors), len(tensors), sum(tensor.nbytes for tensor in tensors.values()))
    assert saving == sorted(saving)


# --------------------------------------------------------------------------------------------------
# Memory, and the hub: each in a process of its own


def run(program: str, *arguments: object, **environment: str) -> str:
    process = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


PEAK = """
import sys
from pathlib import Path
from shoal.checkpoint import hf

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

def measure(work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = status("VmRSS")
    work()
    print(status("VmHWM") - before)

warm, target, *folders = map(Path, sys.argv[1:])
hf.load(warm)  # what torch imports on the way
hf.convert(warm, target)
for folder in folders:
    measure(lambda: hf.load(folder))
    measure(lambda: hf.convert(folder, target, max_shard_bytes=2**21, overwrite=True))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
def test_peak_memory_is_the_model_and_one_file(v3_fp8: Path, tmp_path: Path) -> None:
    wide = {"hidden_size": 512, "moe_intermediate_size": 512, "n_routed_experts": 16}
    fields = V3_CONFIG | wide | {"num_nextn_predict_layers": 0}
    model = Transformer(from_hf(fields), dtype=torch.bfloat16)
    model.init_weights(torch.Generator().manual_seed(0))
    model_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    hf.save(model, tmp_path / "bfloat16", max_shard_bytes=2**21)
    tensors = quantise(read(tmp_path / "bfloat16"))
    names = list(tensors)
    files = [{name: tensors[name] for name in names[start : start + 6]} for start in range(0, len(names), 6)]
    write(tmp_path / "float8", fields | {"quantization_config": FP8}, *files)
    file_bytes = max(file.stat().st_size for file in tmp_path.glob("*/*.safetensors"))
    assert 8 * file_bytes < model_bytes

    folders = [tmp_path / "bfloat16", tmp_path / "float8"]
    peaks = list(map(int, run(PEAK, v3_fp8, tmp_path / "out", *folders).split()))
    # Beside the model and the mapped file: one tensor in float32 (1 MiB), and what Python and malloc take.
    allowance = 6 * 2**20
    assert max(peaks[0::2]) < model_bytes + file_bytes + allowance < 1.5 * model_bytes
    # One shard of 2 MiB is gathered and written instead of the model.
    assert max(peaks[1::2]) < 2 * 2**21 + file_bytes + allowance < 0.75 * model_bytes


def test_a_hub_id_is_read_from_the_cache_only_when_asked(v3: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--shoal--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(v3)
    program = """
import sys
from shoal.checkpoint import hf
print(hf.find_folder("shoal/tiny", download=True))
for name, download in (("shoal/tiny", False), ("shoal/absent", True)):
    try:
        hf.find_folder(name, download=download)
    except ValueError as error:
        print(error)
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    found, unasked, absent = run(program, **environment).strip().split("\n", 2)
    assert Path(found).samefile(v3)
    assert "download=True" in unasked
    assert absent.startswith("'shoal/absent' could not be fetched from the hub")
