"""Native checkpoints: all that a run needs to go on as if it had never stopped, in a folder `step-000100`.

The law: a name that starts with `step-` is a whole checkpoint. It is written under a hidden name, synced file
by file, then renamed; it is removed the same way round. A kill or a full disk at any moment leaves the one
before.

Format: safetensors and JSON, not torch's distributed checkpoint, whose metadata is a pickle (decisions 0003,
0005). Each file is held against a SHA-256 on load. A run of several processes writes together (`Peers`): each
a file a group with the rows it keeps, which the file's own metadata tells, and the first what all share.
Reading takes the rows it wants from whichever files have them, so the number of processes may change.

Which tensors there are is the trainer's to say. Checkpoints for everybody else's tools are hf.py's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shoal.checkpoint.folder import replacing

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
ROWS = "rows"  # in the metadata of a file of several processes: name -> Rows, as JSON
_NAME = re.compile(r"step-(\d{6,})")

Tensors = Mapping[str, Mapping[str, Tensor]]  # file stem -> name -> tensor
Rows = tuple[int, int]  # of dimension 0 of a whole tensor: the first that is here, and how many it has


@dataclass(frozen=True, eq=False)
class Peers:
    """The processes that keep a run's state together, and this one among them."""

    rank: int = 0
    ranks: int = 1
    # A small object of each process, by rank, for each of them; until all have come, they wait.
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    # By parameter, which rows are here. A tensor of the state whose name starts with a parameter's is cut as
    # it is; all others are whole, and the same everywhere.
    rows: Mapping[str, Rows] = field(default_factory=dict)
    copies: AbstractSet[str] = frozenset()  # those of them that are another's to write, and to count

    def rows_of(self, name: str) -> Rows | None:
        """Those of a tensor of the state: `NAME`, or `NAME.exp_avg` and the like."""
        found = self.rows.get(name)
        return self.rows.get(name.rpartition(".")[0]) if found is None else found

    def writes(self, name: str, tensor: Tensor) -> bool:
        if self.rows_of(name) is None:
            return self.rank == 0
        copied = name in self.copies or name.rpartition(".")[0] in self.copies
        return self.ranks == 1 or (tensor.numel() > 0 and not copied)


ALONE = Peers()


def save(
    folder: Path,
    step: int,
    tensors: Tensors,
    state: Mapping[str, Any],
    *,
    keep: int,
    peers: Peers = ALONE,
) -> Path:
    """Write `folder`/step-N and leave at most `keep` checkpoints up to it. `state` is what JSON can hold.

    Of several processes each calls it, on one file system. OSError, of all, where the disk is full or refuses
    one; then nothing has changed.
    """
    path = folder / f"step-{step:06d}"
    errors = [error for error in peers.gather(_write(folder, path, tensors, state, peers)) if error]
    if errors:
        before = latest(folder)
        rest = f"{before} is intact" if before else "there is none before it"
        raise OSError(f"checkpoint {path} could not be saved ({errors[0]}); {rest}") from errors[0]
    if peers.rank == 0:
        older = [old for old in find(folder) if _step(old) < step]
        for old in older[: max(0, len(older) - (keep - 1))]:
            _remove(old)
    return path


def _write(
    folder: Path, path: Path, tensors: Tensors, state: Mapping[str, Any], peers: Peers
) -> OSError | None:
    """This process's part; the first one's begins and ends the folder. What went wrong, if something did.

    They meet twice: when the folder is there, and when all have written. Nobody leaves the others waiting.
    """
    if peers.rank > 0:
        work = peers.gather(None)[0]
        if work is not None:
            peers.gather(_try_groups(work, tensors, peers))
        return None
    begun = False
    try:
        clear_leftovers(folder)
        with replacing(path, overwrite=True, marker=MANIFEST) as work:
            begun = True
            peers.gather(work)
            parts = peers.gather(_try_groups(work, tensors, peers))
            for _, error in parts:
                if error is not None:
                    raise error
            (work / STATE).write_text(json.dumps(state), encoding="utf-8")
            files = {STATE: _fingerprint(work / STATE)}
            for written, _ in parts:
                files |= written
            manifest = {"format": FORMAT, "files": dict(sorted(files.items()))}
            (work / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    except OSError as error:
        if not begun:
            peers.gather(None)
        return error
    return None


def _try_groups(work: Path, tensors: Tensors, peers: Peers) -> tuple[dict[str, Any], OSError | None]:
    """Write a file a group, and give their fingerprints, or what stood in the way."""
    files: dict[str, Any] = {}
    try:
        for stem, group in tensors.items():
            mine = {name: tensor for name, tensor in group.items() if peers.writes(name, tensor)}
            if not mine and peers.ranks > 1:
                continue
            number = "" if peers.ranks == 1 else f"-{peers.rank + 1:05d}-of-{peers.ranks:05d}"
            file = work / f"{stem}{number}.safetensors"
            told = {name: rows for name in mine if (rows := peers.rows_of(name))}
            _write_tensors(file, mine, {ROWS: json.dumps(told)} if told else None)
            if peers.rank > 0:  # the first process's are put on disk with the folder
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
            files[file.name] = _fingerprint(file)
    except OSError as error:
        return files, error
    return files, None


def load(path: Path, tensors: Tensors, peers: Peers = ALONE) -> dict[str, Any]:
    """Check every byte of a checkpoint, copy it into `tensors` in place, and return its `state`.

    Several processes check some files each. Whatever number of them wrote it, each takes its own rows, and
    together they have a place for every tensor.
    """
    damage = [error for error in peers.gather(_damage(path, peers)) if error]
    if damage:
        raise ValueError(f"{damage[0]}; {_way_out(path)}")
    for stem, group in tensors.items():
        _read_group(path, stem, group, peers)
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def stored(path: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of a group that is not cut, as they were written; `load` has checked them."""
    found: dict[str, Tensor] = {}
    for file in _files(path, stem):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in sorted(opened.keys())}
    return found


def find(folder: Path) -> list[Path]:
    """Every checkpoint of a folder, oldest step first."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), key=_step)


def latest(folder: Path) -> Path | None:
    return next(reversed(find(folder)), None)


def verify(path: Path, peers: Peers = ALONE) -> None:
    """ValueError, naming the file, unless every file of a checkpoint, or of a process's share of them, is as
    it was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format"], dict(manifest["files"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"checkpoint {path} is damaged: {MANIFEST} cannot be read ({error})") from None
    if version != FORMAT:
        raise ValueError(f"checkpoint {path} has format {version}; this version of shoal reads {FORMAT}")
    for name, written in [*files.items()][peers.rank :: peers.ranks]:
        if not (path / name).is_file():
            raise ValueError(f"checkpoint {path} is damaged: {name} is missing")
        size = (path / name).stat().st_size
        if size != written["bytes"]:
            raise ValueError(
                f"checkpoint {path} is damaged: {name} has {size} of its {written['bytes']} bytes"
            )
        if _fingerprint(path / name) != written:
            raise ValueError(f"checkpoint {path} is damaged: the bytes of {name} do not match their SHA-256")


def _damage(path: Path, peers: Peers) -> str | None:
    try:
        verify(path, peers)
    except ValueError as error:
        return str(error)
    return None


def _way_out(path: Path) -> str:
    for older in reversed([other for other in find(path.parent) if _step(other) < _step(path)]):
        try:
            verify(older)
        except ValueError:  # damaged too: look further back
            continue
        return f"{older} is whole: remove {path} to resume from there"
    return "no earlier checkpoint is whole"


def _files(path: Path, stem: str) -> list[Path]:
    """The file of a group, or those of several processes."""
    file = path / f"{stem}.safetensors"
    return [file] if file.exists() else sorted(path.glob(f"{stem}-*-of-*.safetensors"))


def _read_group(path: Path, stem: str, group: Mapping[str, Tensor], peers: Peers) -> None:
    with ExitStack() as stack:
        pieces: dict[str, list[tuple[Any, Rows | None]]] = {}
        for name in _files(path, stem):
            file = stack.enter_context(safe_open(name, framework="pt"))
            rows = json.loads((file.metadata() or {}).get(ROWS, "{}"))
            for key in sorted(file.keys()):
                pieces.setdefault(key, []).append((file, rows.get(key)))
        wanted = set[str]().union(*peers.gather(list(group)))
        _check_names(path, stem, pieces.keys(), wanted)
        for name, tensor in group.items():
            _read(
                f"checkpoint {path} is of another run: {stem} has {name}", name, tensor, pieces[name], peers
            )


def _read(error: str, name: str, tensor: Tensor, pieces: list[tuple[Any, Rows | None]], peers: Peers) -> None:
    """Fill a tensor, or the rows of it that are here, from whichever pieces have them."""
    file, cut = pieces[0]
    shape = file.get_slice(name).get_shape()
    dtype = (file.get_slice(name)[:0] if shape else file.get_tensor(name)).dtype
    if cut:
        shape[0] = cut[1]
    ours = peers.rows_of(name)
    wanted = [*tensor.shape]
    if ours:
        wanted[0] = ours[1]
    if (shape, dtype) != (wanted, tensor.dtype):
        raise ValueError(f"{error} as {dtype} {tuple(shape)}; this run has {tensor.dtype} {tuple(wanted)}")
    if not shape:
        tensor.detach().copy_(file.get_tensor(name))
        return
    start, found = (ours[0] if ours else 0), 0
    for file, cut in pieces:
        first = cut[0] if cut else 0
        low = max(first, start)
        high = min(first + file.get_slice(name).get_shape()[0], start + len(tensor))
        if low < high:
            tensor.detach()[low - start : high - start].copy_(
                file.get_slice(name)[low - first : high - first]
            )
            found += high - low
    if found != len(tensor):
        raise ValueError(f"{error} in {found} of the {len(tensor)} rows that are wanted from row {start} on")


def _check_names(path: Path, stem: str, stored: AbstractSet[str], wanted: AbstractSet[str]) -> None:
    lacking, extra = wanted - stored, stored - wanted
    if lacking or extra:
        what = f"lacks {min(lacking)}" if lacking else f"has {min(extra)}, for which this run has no place"
        raise ValueError(f"checkpoint {path} is of another run: {stem} {what}")


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None, f"{path} is no checkpoint"
    return int(match[1])


def _write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None) -> None:
    try:
        save_file({name: tensor.detach() for name, tensor in tensors.items()}, file, metadata)
    except SafetensorError as error:  # it wraps the system's own, a full disk among them
        raise OSError(f"could not write {file.name}: {error}") from error


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _remove(path: Path) -> None:
    """Unname, then delete: a kill in between leaves no half of a checkpoint under its name."""
    hidden = path.with_name(f".{path.name}.old")
    path.rename(hidden)
    shutil.rmtree(hidden)


def clear_leftovers(folder: Path) -> None:
    """Delete what a killed process left half-written or half-removed."""
    for hidden in (*folder.glob(".step-*.new"), *folder.glob(".step-*.old")):
        shutil.rmtree(hidden)
