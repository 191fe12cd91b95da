"""Laws of the files: a damaged folder is named before it is read, shards keep their limit.

The folders are V3's, whole or in three shards that a test may spoil.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from shoal.checkpoint import hf
from tests.checkpoint.layouts import V3_CONFIG, assert_same, read, write


@pytest.fixture
def sharded(v3: Path, tmp_path: Path) -> Path:
    hf.save(hf.load(v3), tmp_path / "sharded", max_shard_bytes=500_000)
    return tmp_path / "sharded"


@pytest.mark.parametrize("bytes_left", [0, 7, 100, -1])
def test_a_file_cut_short_is_named(bytes_left: int, sharded: Path) -> None:
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:bytes_left])
    with pytest.raises(ValueError, match=rf"{file.name}, \d+ bytes, is cut short"):
        hf.load(sharded)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(ValueError, match=rf"{file.name} is missing"):
        hf.load(sharded)


INDICES: dict[str, tuple[Callable[[dict[str, str]], None], str]] = {
    "of another tensor": (lambda places: places.update(ghost=min(places.values())), "places ghost in model-"),
    "outside": (lambda places: places.update(ghost="../other/model.safetensors"), "of its own folder"),
    "empty": (lambda places: places.clear(), "has no weight_map"),
}


@pytest.mark.parametrize(("edit", "message"), INDICES.values(), ids=INDICES)
def test_an_index_that_does_not_fit_is_named(
    edit: Callable[[dict[str, str]], None], message: str, sharded: Path
) -> None:
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    edit(index["weight_map"])
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message) as caught:
        hf.load(sharded)
    assert str(file) in str(caught.value)


def test_a_tensor_in_two_files_is_named(v3: Path, tmp_path: Path) -> None:
    tensors = read(v3)
    folder = write(tmp_path / "in", V3_CONFIG, tensors, {"model.norm.weight": tensors["model.norm.weight"]})
    with pytest.raises(ValueError, match=r"model.norm.weight is in two files, \S*part-0\S* and \S*part-1"):
        hf.load(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(V3_CONFIG))
    torch.save({}, tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=rf"{name}.*only\s+safetensors.*save_pretrained"):
            hf.load(path)


def test_a_place_that_is_no_checkpoint_is_named(v3: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no folder \S*nowhere.*download=True"):
        hf.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no config.json"):
        hf.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not readable as JSON"):
        hf.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(V3_CONFIG))
    with pytest.raises(ValueError, match=r"has no \*.safetensors"):
        hf.load(tmp_path)
    with pytest.raises(ValueError, match=r"model.safetensors is a file; name the folder"):
        hf.load(v3 / "model.safetensors")


def test_shards_keep_their_limit_and_the_index_knows_them(v3: Path, sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    tensors = read(v3)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    held: dict[str, str] = {}
    for file in sorted(sharded.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
        held |= dict.fromkeys(names, file.name)
        assert sum(tensors[name].nbytes for name in names) <= 500_000
    assert held == index["weight_map"]
    assert_same(tensors, read(sharded))


def test_a_tensor_larger_than_a_shard_is_alone_in_one(v3: Path, tmp_path: Path) -> None:
    hf.save(hf.load(v3), tmp_path / "out", max_shard_bytes=1)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(read(v3))
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        hf.save(hf.load(v3), tmp_path / "none", max_shard_bytes=0)
