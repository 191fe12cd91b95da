"""Native checkpoints: all that a run needs to go on as if it had never stopped, in a folder `step-000100`.

The law: a name that starts with `step-` is a whole checkpoint. It is written under a hidden name, synced file
by file, then renamed; it is removed the same way round. A kill or a full disk at any moment leaves the one
before.

Format: safetensors and JSON, not torch's distributed checkpoint (DCP). DCP keeps its metadata as a pickle,
which runs code when read, has no checksums, and no atomic folder; what it would add, saving by shards and
reading them back in another layout, is slices of the same tensors, which safetensors reads too. Each file is
held against a SHA-256 on load.

Which tensors there are is the trainer's to say. Checkpoints for everybody else's tools are hf.py's.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shoal.checkpoint.folder import replacing

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
_NAME = re.compile(r"step-(\d{6,})")

Tensors = Mapping[str, Mapping[str, Tensor]]  # file stem -> name -> tensor


def save(folder: Path, step: int, tensors: Tensors, state: Mapping[str, Any], *, keep: int) -> Path:
    """Write `folder`/step-N and leave at most `keep` checkpoints up to it. `state` is what JSON can hold.

    OSError where the disk is full or refuses; then nothing has changed.
    """
    path = folder / f"step-{step:06d}"
    try:
        clear_leftovers(folder)
        with replacing(path, overwrite=True, marker=MANIFEST) as work:
            for stem, group in tensors.items():
                _write_tensors(work / f"{stem}.safetensors", group)
            (work / STATE).write_text(json.dumps(state), encoding="utf-8")
            files = {file.name: _fingerprint(file) for file in sorted(work.iterdir())}
            (work / MANIFEST).write_text(
                json.dumps({"format": FORMAT, "files": files}, indent=1), encoding="utf-8"
            )
    except OSError as error:
        before = latest(folder)
        rest = f"{before} is intact" if before else "there is none before it"
        raise OSError(f"checkpoint {path} could not be saved ({error}); {rest}") from error
    older = [old for old in find(folder) if _step(old) < step]
    for old in older[: max(0, len(older) - (keep - 1))]:
        _remove(old)
    return path


def load(path: Path, tensors: Tensors) -> dict[str, Any]:
    """Check every byte of a checkpoint, copy it into `tensors` in place, and return its `state`."""
    try:
        verify(path)
    except ValueError as error:
        raise ValueError(f"{error}; {_way_out(path)}") from None
    for stem, group in tensors.items():
        with safe_open(path / f"{stem}.safetensors", framework="pt") as file:
            _check_names(path, stem, set(file.keys()), group)
            for name, tensor in group.items():
                stored = file.get_tensor(name)
                if (stored.shape, stored.dtype) != (tensor.shape, tensor.dtype):
                    raise ValueError(
                        f"checkpoint {path} is of another run: {stem} has {name} as {stored.dtype} "
                        f"{tuple(stored.shape)}; this run has {tensor.dtype} {tuple(tensor.shape)}"
                    )
                tensor.detach().copy_(stored)
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def find(folder: Path) -> list[Path]:
    """Every checkpoint of a folder, oldest step first."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), key=_step)


def latest(folder: Path) -> Path | None:
    return next(reversed(find(folder)), None)


def verify(path: Path) -> None:
    """ValueError, naming the file, unless every file of a checkpoint is as it was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format"], dict(manifest["files"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"checkpoint {path} is damaged: {MANIFEST} cannot be read ({error})") from None
    if version != FORMAT:
        raise ValueError(f"checkpoint {path} has format {version}; this version of shoal reads {FORMAT}")
    for name, written in files.items():
        if not (path / name).is_file():
            raise ValueError(f"checkpoint {path} is damaged: {name} is missing")
        size = (path / name).stat().st_size
        if size != written["bytes"]:
            raise ValueError(
                f"checkpoint {path} is damaged: {name} has {size} of its {written['bytes']} bytes"
            )
        if _fingerprint(path / name) != written:
            raise ValueError(f"checkpoint {path} is damaged: the bytes of {name} do not match their SHA-256")


def _way_out(path: Path) -> str:
    for older in reversed([other for other in find(path.parent) if _step(other) < _step(path)]):
        try:
            verify(older)
        except ValueError:  # damaged too: look further back
            continue
        return f"{older} is whole: remove {path} to resume from there"
    return "no earlier checkpoint is whole"


def _check_names(path: Path, stem: str, stored: set[str], group: Mapping[str, Tensor]) -> None:
    lacking, extra = group.keys() - stored, stored - group.keys()
    if lacking or extra:
        what = f"lacks {min(lacking)}" if lacking else f"has {min(extra)}, for which this run has no place"
        raise ValueError(f"checkpoint {path} is of another run: {stem} {what}")


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None, f"{path} is no checkpoint"
    return int(match[1])


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        save_file({name: tensor.detach() for name, tensor in tensors.items()}, file)
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
