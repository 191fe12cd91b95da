"""Laws of native checkpoints: what goes in comes out, a name means whole, and a failure leaves the one
before."""

from __future__ import annotations

import json
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.checkpoint import native

State = dict[str, dict[str, torch.Tensor]]


def tensors(seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {
            "a.weight": torch.randn(33, 65, generator=generator),
            "narrow": torch.randn(7, generator=generator).bfloat16(),
            "empty": torch.empty(0, 4),
        },
        "optimizer": {
            "step": torch.tensor(float(seed)),
            "a.exp_avg": torch.randn(33, 65, generator=generator),
        },
        "generators": {"run": torch.Generator().manual_seed(seed).get_state()},
    }


def blank() -> State:
    return {stem: {n: torch.zeros_like(t) for n, t in group.items()} for stem, group in tensors().items()}


def assert_equal(ours: State, theirs: State) -> None:
    for stem, group in theirs.items():
        for name, tensor in group.items():
            assert torch.equal(ours[stem][name], tensor), name


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"step": 3, "tokens": 1 << 40, "recipe": {"lr": 1e-3, "name": "é\n"}}
    path = native.save(tmp_path, 3, tensors(), facts, keep=1)
    assert path == tmp_path / "step-000003"
    found = blank()
    assert native.load(path, found) == facts
    assert_equal(found, tensors())


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    path = native.save(tmp_path, 1, tensors(), {}, keep=1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}


def test_latest_is_the_largest_step_and_keep_counts_back_from_it(tmp_path: Path) -> None:
    assert native.latest(tmp_path / "nothing") is None
    for step in (1, 5, 999_999, 1_000_000):
        native.save(tmp_path, step, tensors(step), {}, keep=2)
        assert native.latest(tmp_path) == tmp_path / f"step-{step:06d}"
    assert [path.name for path in native.find(tmp_path)] == ["step-999999", "step-1000000"]
    assert len(list(tmp_path.iterdir())) == 2


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    for seed in (1, 2):
        path = native.save(tmp_path, 4, tensors(seed), {}, keep=1)
    found = blank()
    native.load(path, found)
    assert_equal(found, tensors(2))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["cut", "flip", "missing"])
def test_any_damage_is_refused_by_name_and_the_last_whole_one_offered(
    name: str, damage: str, tmp_path: Path
) -> None:
    first, second, third = (
        native.save(tmp_path, step, tensors(), {"step": step}, keep=5) for step in (1, 2, 3)
    )
    for path in (second, third):
        file = path / name
        data = bytearray(file.read_bytes())
        if damage == "cut":
            file.write_bytes(data[: len(data) // 2])
        elif damage == "flip":
            data[len(data) // 2] ^= 0x10
            file.write_bytes(data)
        else:
            file.unlink()
    # A bit flipped in the manifest may be one of a file's checksum: then that file is named.
    named = "" if (name, damage) == ("manifest.json", "flip") else name.split(".")[0]
    with pytest.raises(ValueError, match=f"checkpoint {third} is damaged: .*{named}") as error:
        native.load(third, blank())
    assert f"{first} is whole: remove {third} to resume from there" in str(error.value)
    found = blank()
    assert native.load(first, found) == {"step": 1}
    assert_equal(found, tensors())


def test_where_none_is_whole_it_says_so(tmp_path: Path) -> None:
    path = native.save(tmp_path, 1, tensors(), {}, keep=1)
    (path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="no earlier checkpoint is whole"):
        native.load(path, blank())


def test_a_format_of_the_future_is_not_guessed_at(tmp_path: Path) -> None:
    path = native.save(tmp_path, 1, tensors(), {}, keep=1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(ValueError, match="has format 2; this version of shoal reads 1"):
        native.load(path, blank())


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = native.save(tmp_path, 1, tensors(), {}, keep=1)
    more, fewer, other, narrow = blank(), blank(), blank(), blank()
    more["model"]["b"] = torch.zeros(1)
    del fewer["model"]["narrow"]
    # Shapes that torch would broadcast, and a dtype that it would cast, in silence.
    other["model"]["a.weight"] = torch.zeros(2, 33, 65)
    narrow["model"]["a.weight"] = torch.zeros(33, 65, dtype=torch.bfloat16)
    for into, message in (
        (more, "model lacks b"),
        (fewer, "model has narrow, for which this run has no place"),
        (other, r"a\.weight as torch.float32 \(33, 65\); this run has torch.float32 \(2, 33, 65\)"),
        (narrow, r"this run has torch.bfloat16 \(33, 65\)"),
    ):
        with pytest.raises(ValueError, match=message):
            native.load(path, into)


def test_what_a_killed_process_left_is_ignored_and_cleared(tmp_path: Path) -> None:
    native.save(tmp_path, 1, tensors(), {}, keep=2)
    for name in (".step-000002.ab12cd34.new", ".step-000000.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    assert native.latest(tmp_path) == tmp_path / "step-000001"
    native.save(tmp_path, 2, tensors(), {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mount.returncode:
        pytest.skip(f"no right to mount a small disk: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def assert_only_the_first_is_left(folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == ["step-000001"]
    found = blank()
    native.load(folder / "step-000001", found)
    assert_equal(found, tensors(1))


def test_a_full_disk_leaves_the_checkpoint_before(small_disk: Path) -> None:
    native.save(small_disk, 1, tensors(1), {}, keep=1)
    with pytest.raises(OSError, match=r"No space left on device.*; .*step-000001 is intact"):
        native.save(small_disk, 2, tensors(2), {}, keep=1)
    assert_only_the_first_is_left(small_disk)
    with pytest.raises(OSError, match="No space left"):  # nor is room lost by trying
        native.save(small_disk, 3, tensors(3), {}, keep=1)
    assert_only_the_first_is_left(small_disk)


@pytest.mark.parametrize("limit", [0, 100, 5_000, 9_000, 17_000])
def test_a_write_that_fails_anywhere_leaves_the_checkpoint_before(limit: int, tmp_path: Path) -> None:
    """A limit on the size of a file stands in for the disk: it stops the model, the optimizer, or the
    state."""
    native.save(tmp_path, 1, tensors(1), {}, keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (limit, hard)
    )  # Python ignores the signal; writes fail with EFBIG
    try:
        with pytest.raises(OSError, match=r"step-000002 could not be saved .*; .*step-000001 is intact"):
            native.save(tmp_path, 2, tensors(2), {"long": "x" * 20_000}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_only_the_first_is_left(tmp_path)


def test_the_first_save_that_fails_says_there_is_none_before(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="there is none before it"):
        native.save(tmp_path / "checkpoints", 1, tensors(), {}, keep=1)
