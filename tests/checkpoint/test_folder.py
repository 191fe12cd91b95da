"""Laws of a folder that appears whole or not at all.

They are held on the checkpoints that are written with it.
"""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from shoal.checkpoint import hf
from tests.checkpoint.layouts import Made


def test_a_folder_in_use_is_replaced_only_when_told(made: Made, tmp_path: Path) -> None:
    model, out = hf.load(made("llama")), tmp_path / "out"
    out.mkdir()  # an empty one is no loss
    hf.save(model, out)
    (out / "stale.json").write_text("{}")
    with pytest.raises(ValueError, match="is not empty"):
        hf.save(model, out)
    hf.save(model, out, overwrite=True)
    assert not (out / "stale.json").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    with pytest.raises(ValueError, match=r"no config.json"):
        hf.save(model, tmp_path / "home", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "out"]


def test_a_full_disk_leaves_the_old_checkpoint(made: Made, tmp_path: Path) -> None:
    model, out = hf.load(made("llama")), tmp_path / "out"
    hf.save(model, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # a file may not grow beyond: as if full
    try:
        with pytest.raises(OSError, match=r"could not write \S*model.safetensors"):
            hf.save(model, out, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
