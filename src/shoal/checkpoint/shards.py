"""Safetensors files of a folder: read as one table of tensors, written as shards with an index.

Opening reads headers only, so what is wrong with a folder (a file cut short, an index that names what is not
there, pickles) is known before any memory is taken. Its one law: reading maps one file at a time and copies
nothing, so a folder of any size costs its largest file in mapped pages, which the system takes back when it
needs them.

Which tensors there should be, and what they mean, is names.py's and source.py's business.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

Progress = Callable[[int, int, int], None]  # (tensors done, tensors in all, bytes done)


@dataclass(frozen=True)
class Stored:
    """What the header of a file says of a tensor; `dtype` in safetensors' words: F32, BF16, F8_E4M3 ..."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_json(file: Path) -> dict[str, object]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file.parent} has no {file.name}; it is not a Hugging Face checkpoint") from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{file} is not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds {type(value).__name__}; it must hold one JSON object")
    return value


class Shards:
    """All tensors of a folder by name, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.table: dict[str, Stored] = {}
        index = _read_index(folder)
        for file in sorted({folder / name for name in index.values()}) if index else _unindexed_files(folder):
            for name, stored in _read_header(file).items():
                if name in self.table:
                    raise ValueError(
                        f"{name} is in two files, {self.table[name].file} and {file}; keep one of them"
                    )
                self.table[name] = stored
        for name, file in index.items():
            if name not in self.table or self.table[name].file.name != file:
                raise ValueError(f"{folder / INDEX} places {name} in {file}, which does not have it")
        self._file: Path | None = None

    def read(self, name: str) -> Tensor:
        """The tensor as stored, a view of the mapped file; the map lives as long as the view."""
        file = self.table[name].file
        if file != self._file:
            self._open, self._file = _open(file), file
        return self._open.get_tensor(name)


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; the index of its folder names it. Fetch it again") from None
    except SafetensorError as error:
        size = file.stat().st_size
        raise ValueError(
            f"{file}, {size} bytes, is cut short or no safetensors file ({error}); fetch it again"
        ) from error


def _read_header(file: Path) -> dict[str, Stored]:
    with _open(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
        return {name: Stored(file, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name to file name; empty where there is no index."""
    file = folder / INDEX
    if not file.exists():
        return {}
    places = read_json(file).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{file} has no weight_map that says which file holds which tensor")
    for name in places.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{file} names {name!r}; it may only name files of its own folder")
    return places


def _unindexed_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        raise ValueError(
            refuse_pickle(folder, pickles[0]) if pickles else f"{folder} has no *.safetensors files"
        )
    return files


def refuse_pickle(folder: Path, name: str) -> str:
    """Why a pickle is not read, and the way out."""
    return (
        f"{folder} has its weights as a pickle ({name}); reading one runs whatever code it holds, so only "
        f"safetensors are read. Where you trust the file, rewrite it with transformers: "
        f'AutoModelForCausalLM.from_pretrained("{folder}").save_pretrained("{folder}-safetensors")'
    )


def write_shards(
    folder: Path,
    sizes: Mapping[str, int],
    tensor: Callable[[str], Tensor],
    max_shard_bytes: int,
    progress: Progress | None = None,
) -> None:
    """Write the tensors that `sizes` names, with their bytes, in that order; hold one shard at a time."""
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it must be positive")
    groups = _group(sizes, max_shard_bytes)
    places: dict[str, str] = {}
    written = 0
    for number, names in enumerate(groups, start=1):
        shard = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else SINGLE
        _write_file(folder / shard, {name: tensor(name).cpu().contiguous() for name in names})
        places |= dict.fromkeys(names, shard)
        written += sum(sizes[name] for name in names)
        if progress is not None:
            progress(len(places), len(sizes), written)
    if len(groups) > 1:
        index = {"metadata": {"total_size": written}, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _group(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Cut the names into runs of at most `limit` bytes. A tensor larger than that is alone."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room or not groups:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def _write_file(file: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # it wraps the system's own, a full disk among them
        raise OSError(f"could not write {file}: {error}") from error
