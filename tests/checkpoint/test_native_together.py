"""Laws of checkpoints that several processes write: any number of them writes, any other number reads, and
what one could not write, none has.

The processes are threads here, each with its own Peers over one barrier: what they do with files is the
same.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from shoal.checkpoint import native
from shoal.checkpoint.native import Peers, Rows

State = dict[str, dict[str, Tensor]]


def whole(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {
            "a.weight": torch.randn(7, 3, generator=generator),
            "b.weight": torch.randn(2, generator=generator).bfloat16(),
            "bias": torch.randn(5, generator=generator),
        },
        "optimizer": {
            "step": torch.tensor(float(seed)),
            "a.weight.exp_avg": torch.randn(7, 3, generator=generator),
        },
    }


def rows_of(length: int, rank: int, ranks: int) -> Rows:
    """As FSDP cuts: chunks of the length over ranks, rounded up; the last may have none."""
    return min(rank * -(-length // ranks), length), length


def cut(state: State, rank: int, ranks: int) -> State:
    """What of a state a rank keeps: `bias` and `step` are whole everywhere."""

    def mine(name: str, tensor: Tensor) -> Tensor:
        if ".weight" not in name:
            return tensor.clone()
        start, end = (rows_of(len(tensor), n, ranks)[0] for n in (rank, rank + 1))
        return tensor[start:end].clone()

    return {
        stem: {name: mine(name, tensor) for name, tensor in group.items()} for stem, group in state.items()
    }


def together(ranks: int, work: Callable[[Peers], Any]) -> list[Any]:
    """What each of so many processes returns, or the error it met."""
    barrier, table = threading.Barrier(ranks, timeout=60), [None] * ranks

    def enter(rank: int) -> Any:
        def gather(value: Any) -> list[Any]:
            table[rank] = value
            barrier.wait()
            told = list(table)
            barrier.wait()
            return told

        lengths = {"a.weight": 7, "b.weight": 2}
        cuts = {name: rows_of(length, rank, ranks) for name, length in lengths.items()}
        try:
            return work(Peers(rank, ranks, gather, cuts))
        except (OSError, ValueError) as error:
            return error

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(enter, range(ranks)))


def save(folder: Path, step: int, ranks: int, *, keep: int = 2) -> list[Any]:
    def work(peers: Peers) -> Path:
        state = cut(whole(step), peers.rank, ranks) if ranks > 1 else whole(step)
        return native.save(folder, step, state, {"step": step}, keep=keep, peers=peers)

    return together(ranks, work)


@pytest.mark.parametrize("readers", [1, 2, 3, 5])
@pytest.mark.parametrize("writers", [1, 2, 4])
def test_any_number_reads_what_any_number_wrote(writers: int, readers: int, tmp_path: Path) -> None:
    paths = save(tmp_path, 3, writers)
    assert paths == [tmp_path / "step-000003"] * writers

    def work(peers: Peers) -> tuple[dict[str, Any], State]:
        found = cut(whole(0), peers.rank, peers.ranks)
        return native.load(paths[0], found, peers if readers > 1 else native.ALONE), found

    for rank, (state, found) in enumerate(together(readers, work)):
        assert state == {"step": 3}
        for stem, group in cut(whole(3), rank, readers).items():
            for name, tensor in group.items():
                assert torch.equal(found[stem][name], tensor), (rank, stem, name)


def test_a_row_is_written_once(tmp_path: Path) -> None:
    """The elements in all files together are those of the state."""
    save(tmp_path, 1, 4)
    counted = 0
    for file in (tmp_path / "step-000001").glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            counted += sum(opened.get_tensor(name).numel() for name in opened.keys())  # noqa: SIM118
    assert counted == sum(tensor.numel() for group in whole(1).values() for tensor in group.values())


def test_as_many_stay_as_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, 3)
    assert [path.name for path in native.find(tmp_path)] == ["step-000002", "step-000003"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("rank", [0, 2])
def test_what_one_could_not_write_none_has(rank: int, tmp_path: Path) -> None:
    """The disk of one process is full."""
    save(tmp_path, 1, 3)

    def work(peers: Peers) -> Path:
        state = cut(whole(2), peers.rank, peers.ranks)
        if peers.rank == rank:
            state["model"]["a.weight"] = Unwritable()
        return native.save(tmp_path, 2, state, {}, keep=2, peers=peers)

    found = together(3, work)
    assert all(isinstance(error, OSError) for error in found)
    assert all("step-000001 is intact" in str(error) for error in found)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


class Unwritable(Tensor):
    """As a full disk shows itself."""

    def __new__(cls) -> Unwritable:
        return torch.zeros(3, 3).as_subclass(cls)

    def detach(self) -> Tensor:
        raise OSError(28, "No space left on device")


def test_damage_in_any_file_is_seen_by_all(tmp_path: Path) -> None:
    path = save(tmp_path, 1, 3)[0]
    file = sorted(path.glob("optimizer-*"))[1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)

    def work(peers: Peers) -> Any:
        return native.load(path, cut(whole(0), peers.rank, 3), peers)

    for error in together(3, work):
        assert isinstance(error, ValueError)
        assert f"{file.name} do not match" in str(error)


def test_rows_that_no_file_has_are_missed(tmp_path: Path) -> None:
    """A manifest that is whole, but of a run with a process less."""
    path = save(tmp_path, 1, 2)[0]
    for file in path.glob("*-00002-of-00002.safetensors"):
        file.unlink()
    manifest = json.loads((path / native.MANIFEST).read_text())
    manifest["files"] = {name: told for name, told in manifest["files"].items() if "00002-of" not in name}
    (path / native.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"a\.weight in 4 of the 7 rows that are wanted from row 0 on"):
        native.load(path, whole(0))
