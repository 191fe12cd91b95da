"""Hugging Face checkpoints, in and out: a folder of safetensors and a config.json becomes a model, and back.

Its law: in and out again is the identity, in names, shapes, dtypes and bytes; float8 comes out as what it
stood for. Loading opens the folder as a `Source`, which finds what is wrong before memory is taken, then
copies each tensor straight into its place, experts into their slices of the stack. So the peak of host memory
is the model if it is on the CPU, one file mapped (pages the system can take back), and one tensor, in float32
where it was float8. Writing holds one shard of the output.

Names are in names.py, what fits in source.py, float8 in fp8.py, files in shards.py, config.json in
config/hf.py. Checkpoints that training resumes from are native.py's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from shoal.checkpoint.ahead import read_ahead
from shoal.checkpoint.folder import replacing
from shoal.checkpoint.names import EMBEDDING, GATE_UP, Piece, published
from shoal.checkpoint.shards import INDEX, PICKLES, Progress, refuse_pickle, write_shards
from shoal.checkpoint.source import CONFIG, FLOAT8, Source, in_memory, open_source
from shoal.config.hf import to_hf
from shoal.config.model import ModelConfig
from shoal.model.offloaded import offload as offload_experts
from shoal.model.quantised import SCALE_SUFFIX, Scheme, check_quant, is_quantised, narrow, quantise
from shoal.model.transformer import Transformer
from shoal.ops.quantised import BLOCK

GENERATION_CONFIG = "generation_config.json"
COMPANIONS = [  # files that go with the weights, where there are any
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    GENERATION_CONFIG,
]
DOWNLOADED = ["*.safetensors", "*.json", *COMPANIONS]
OTHER_LAYOUTS = ["consolidated*", "*/*"]  # the same weights again, beside Hugging Face's
SHARD_BYTES = 5_000_000_000


class Share(Protocol):
    """One process's part of a model (parallel/tensor.py, parallel/expert.py)."""

    def split(self, model: Transformer) -> Transformer:
        """The model with this part of its parameters."""
        ...

    def cut(self, parameter: str, whole: Tensor) -> Tensor:
        """Of a parameter, or one expert's matrix of it, what is here."""
        ...

    def expert(self, number: int) -> int | None:
        """Where an expert is in the stack here; None if it is elsewhere."""
        ...


def load(
    path_or_id: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    download: bool = False,
    mtp: bool = True,
    quant: str | None = None,
    share: Share | None = None,
    offload: float | None = None,
    progress: Progress | None = None,
) -> Transformer:
    """The model of a checkpoint, its weights in `dtype` (None: what its config.json says).

    `mtp=False` leaves the multi-token-prediction modules out. A checkpoint that has no tensor of theirs loads
    without them too, even where its config.json counts them: transformers writes such folders, as it drops
    the modules but not the count. `model.config` says what there is: `num_nextn_predict_layers` is then 0,
    and `quantization` always None. Router correction biases stay float32.

    `quant` ("fp8", "int4") holds experts and linears quantised (model/quantised.py); what is published in
    FP8 blocks of 128 is then taken as it is, scales and all. Memory peaks at the narrow model and one tensor.
    With `share` it is one process's part of the model, and no more than that is kept.
    `offload` keeps so many GiB of its experts off the device, in host memory (model/offloaded.py).

    ValueError names the tensor or file that is missing, unknown, cut short, of another shape or dtype than
    config.json makes it, or that differs from what it must repeat: the embedding and head copied into
    prediction modules, a tied head.
    """
    source = open_source(find_folder(path_or_id, download=download), dtype=dtype, mtp=mtp)
    if (scheme := check_quant(quant)) is not None:
        quantise(source.model, scheme)
    if share is not None:
        share.split(source.model)
    if offload is not None:
        offload_experts(source.model, offload, device)
    source.model.allocate(device)
    _copy(source, source.model, progress, share)
    return source.model


def fill(model: Transformer, path_or_id: str | Path, *, progress: Progress | None = None) -> None:
    """The weights of a checkpoint into a model that is made like it: all but its angles and context may not
    differ. Weights take the model's dtype."""
    mtp = model.config.num_nextn_predict_layers > 0
    source = open_source(find_folder(path_or_id), dtype=model.head_weight().dtype, mtp=mtp)
    ours, theirs = model.state_dict(), source.model.state_dict()
    differ = [name for name in ours.keys() | theirs.keys() if _shape(ours, name) != _shape(theirs, name)]
    if differ:
        name = min(differ)
        raise ValueError(
            f"{path_or_id} holds another model: {name} is {_shape(theirs, name)} there and "
            f"{_shape(ours, name)} here; make the model by the checkpoint's config"
        )
    _copy(source, model, progress)


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None


def _copy(source: Source, model: Transformer, progress: Progress | None, share: Share | None = None) -> None:
    state = model.state_dict()
    own = {piece.stored: piece for piece in _kept(source.pieces, share) if piece.role == "own"}
    in_file_order = [own[name] for name in source.shards.table if name in own]
    # What is copied as it is, but for its dtype, is read ahead.
    plain = dict.fromkeys(
        piece.stored
        for piece in in_file_order
        if piece.parameter + SCALE_SUFFIX not in state and source.shards.table[piece.stored].dtype != FLOAT8
    )
    coming = read_ahead(map(source.shards.read, plain), next(iter(state.values())).device)
    done = 0
    for number, piece in enumerate(in_file_order, start=1):
        part = piece.of(state[piece.parameter])
        scales = state.get(piece.parameter + SCALE_SUFFIX)
        if scales is not None:
            _fill_narrow(source, piece, part, piece.of(scales), share)
        else:
            whole = next(coming) if piece.stored in plain else source.read(piece.stored, part.device)
            part.copy_(whole if share is None else share.cut(piece.parameter, whole), non_blocking=True)
        done += part.nbytes
        if progress is not None:
            progress(number, len(own), done)


def _kept(pieces: Iterable[Piece], share: Share | None) -> Iterator[Piece]:
    """The pieces that are here, experts at their places here."""
    for piece in pieces:
        place = piece.expert if share is None or piece.expert is None else share.expert(piece.expert)
        if place is not None or piece.expert is None:
            yield replace(piece, expert=place)


def _fill_narrow(source: Source, piece: Piece, values: Tensor, scales: Tensor, share: Share | None) -> None:
    """A stored tensor into quantised values and their scales: as it is, or quantised as it is read."""
    scheme: Scheme = "int4" if values.dtype == torch.uint8 else "fp8"
    stored = source.shards.table[piece.stored]
    halves_apart = piece.half is not None or not piece.parameter.endswith(GATE_UP)
    if scheme == "fp8" and stored.dtype == FLOAT8 and source.block == (BLOCK, BLOCK) and halves_apart:
        for kept, name in ((values, piece.stored), (scales, piece.stored + SCALE_SUFFIX)):
            whole = source.shards.read(name)
            part = whole if share is None else share.cut(piece.parameter, whole)
            kept.copy_(part.view_as(kept[0] if piece.half is not None else kept))
        return
    wide = source.read(piece.stored, values.device)
    wide = wide if share is None else share.cut(piece.parameter, wide)
    if not halves_apart:
        wide = wide.unflatten(-2, (2, -1))
    weight = narrow(wide, scheme)
    values.copy_(weight.values)
    scales.copy_(weight.scales)


def save(
    model: Transformer,
    folder: str | Path,
    *,
    max_shard_bytes: int = SHARD_BYTES,
    tokenizer_files: Iterable[Path] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a folder in the layout of the published checkpoints, as transformers and other engines load it.

    It appears whole or not at all, and replaces a checkpoint only if `overwrite`. Weights keep their dtypes.
    `tokenizer_files` are copied beside them. OSError where the disk is full or refuses.
    """
    if is_quantised(model):
        raise ValueError(
            "the model's weights are quantised for serving, and checkpoints hold float32, bfloat16 or "
            "float16; save it as it is loaded without quant"
        )
    state = model.state_dict()

    def part(piece: Piece) -> Tensor:
        return piece.of(state[piece.parameter])

    config = in_memory(model.config, state[EMBEDDING].dtype)
    with replacing(Path(folder), overwrite=overwrite, marker=CONFIG) as new:
        _write(new, config, state, part, tokenizer_files, max_shard_bytes, progress)


def convert(
    path_or_id: str | Path,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    download: bool = False,
    mtp: bool = True,
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """`save` of a `load`, and the tokenizer's files, for models larger than memory: one shard is held."""
    origin = find_folder(path_or_id, download=download)
    source = open_source(origin, dtype=dtype, mtp=mtp)
    state = source.model.state_dict()
    read = source.parts()

    def part(piece: Piece) -> Tensor:
        return read(piece).to(state[piece.parameter].dtype)

    companions = [origin / name for name in COMPANIONS if (origin / name).exists()]
    with replacing(Path(folder), overwrite=overwrite, marker=CONFIG) as new:
        _write(new, source.model.config, state, part, companions, max_shard_bytes, progress)


def find_folder(path_or_id: str | Path, *, download: bool = False) -> Path:
    """A local folder, or that of a hub id: fetched, or found in the hub's cache, only if `download`."""
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        if any(folder.match(pattern) for pattern in PICKLES):
            raise ValueError(refuse_pickle(folder.parent, folder.name))
        raise ValueError(f"{folder} is a file; name the folder that holds it and its {CONFIG}")
    if not download:
        raise ValueError(
            f"there is no folder {folder}; if {str(path_or_id)!r} is an id on the Hugging Face hub, "
            f"ask for it to be fetched (download=True)"
        )
    from huggingface_hub import snapshot_download  # slow to import, and seldom needed

    try:
        fetched = snapshot_download(str(path_or_id), allow_patterns=DOWNLOADED, ignore_patterns=OTHER_LAYOUTS)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())  # the hub's messages span lines
        raise ValueError(f"{str(path_or_id)!r} could not be fetched from the hub: {reason}") from error
    return Path(fetched)


def _write(
    new: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],  # for shapes and dtypes; may be on the meta device
    part: Callable[[Piece], Tensor],
    companions: Iterable[Path],
    max_shard_bytes: int,
    progress: Progress | None,
) -> None:
    for file in companions:
        if file.name in (CONFIG, INDEX) or file.suffix == ".safetensors":
            raise ValueError(f"{file} is no tokenizer file; the checkpoint has its own {file.name}")
        shutil.copyfile(file, new / file.name)
    _write_json(new / CONFIG, to_hf(config))
    if not (new / GENERATION_CONFIG).exists():
        tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        _write_json(new / GENERATION_CONFIG, {name: x for name, x in tokens.items() if x is not None})
    pieces = {piece.stored: piece for piece in published(config, state) if piece.role != "tied"}
    sizes = {name: piece.of(state[piece.parameter]).nbytes for name, piece in pieces.items()}

    def tensor(name: str) -> Tensor:
        stored = part(pieces[name])
        return stored.clone() if pieces[name].role == "copy" else stored  # a file may not hold memory twice

    write_shards(new, sizes, tensor, max_shard_bytes, progress)


def _write_json(file: Path, value: Mapping[str, object]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
