"""A checkpoint folder held against the model that its config.json describes.

Opening builds the model on the meta device and compares headers: names, shapes, dtypes, float8 scales, and
the bytes of tensors that repeat others. Its one law: what does not fit is one ValueError that names tensor
and file, and it comes before any memory is taken; a `Source` that exists can be read to the end.

What the tensors are called is names.py's, how they lie in files shards.py's, what float8 means fp8.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from shoal.checkpoint.fp8 import dequantise, scale_shape
from shoal.checkpoint.names import EMBEDDING, Piece, prediction_prefixes, present
from shoal.checkpoint.shards import Shards, Stored, read_json
from shoal.config.hf import from_hf
from shoal.config.model import ModelConfig
from shoal.model.quantised import SCALE_SUFFIX
from shoal.model.transformer import Transformer

CONFIG = "config.json"
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
FLOAT8 = "F8_E4M3"
DERIVED = ".rotary_emb.inv_freq"  # in old Llama checkpoints; they follow from the config

Block = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint in which everything was found to fit.

    `model` is on the meta device. Its config is that of memory: no float8, no modules that are left out.
    """

    model: Transformer
    pieces: tuple[Piece, ...]
    shards: Shards
    block: Block | None  # that one float8 scale covers

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """A stored tensor: mapped as it is, or dequantised to float32 on `device`."""
        tensor = self.shards.read(name)
        if self.shards.table[name].dtype != FLOAT8:
            return tensor
        assert self.block is not None
        scale = self.shards.read(name + SCALE_SUFFIX)
        return dequantise(tensor.to(device), scale.to(device), self.block)

    def parts(self) -> Callable[[Piece], Tensor]:
        """What reads pieces under their published names, whether or not they are stored so: experts that are
        stored as a stack come out of it one after the other. Holds one stored tensor."""
        stored = {piece.stored for piece in self.pieces}
        whole = {piece.parameter: piece.stored for piece in self.pieces if piece.expert is None}
        read = lru_cache(maxsize=1)(self.read)
        return lambda piece: (
            read(piece.stored) if piece.stored in stored else piece.of(read(whole[piece.parameter]))
        )


def open_source(folder: Path, *, dtype: torch.dtype | None = None, mtp: bool = True) -> Source:
    """`dtype` and `mtp` as in `hf.load`."""
    fields = read_json(folder / CONFIG)
    try:
        config = from_hf(fields)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    block = config.quantization.weight_block_size if config.quantization else None
    shards = Shards(folder)
    table, left_out = shards.table, prediction_prefixes(config)
    if mtp and any(name.startswith(left_out) for name in table):
        left_out = ()
    else:
        config = replace(config, num_nextn_predict_layers=0)
    dtype = dtype or _stated_dtype(fields, config, table)
    model = Transformer(in_memory(config, dtype), device="meta", dtype=dtype)
    state = model.state_dict()
    pieces = tuple(present(config, state, table))
    _check_names(folder, config, pieces, {k: v for k, v in table.items() if not k.startswith(left_out)})
    for piece in pieces:
        _check_tensor(piece.stored, tuple(piece.of(state[piece.parameter]).shape), table, block)
    source = Source(model, pieces, shards, block)
    _check_repeated(source)
    return source


def in_memory(config: ModelConfig, dtype: torch.dtype) -> ModelConfig:
    """The config of a model whose weights are plain tensors of `dtype`."""
    if dtype not in FLOATS.values():
        raise ValueError(f"dtype is {dtype}; weights are loaded and saved as float32, bfloat16 or float16")
    return replace(config, dtype=str(dtype).removeprefix("torch."), quantization=None)


def _stated_dtype(
    fields: Mapping[str, object], config: ModelConfig, table: Mapping[str, Stored]
) -> torch.dtype:
    """What config.json says the weights are; where it says nothing, what the embedding is."""
    stated = fields.get("dtype") or fields.get("torch_dtype")
    if stated is None and EMBEDDING in table and table[EMBEDDING].dtype in FLOATS:
        return FLOATS[table[EMBEDDING].dtype]
    return getattr(torch, config.dtype)


def _check_names(
    folder: Path, config: ModelConfig, pieces: Iterable[Piece], table: Mapping[str, Stored]
) -> None:
    wanted = {piece.stored for piece in pieces}
    missing = [piece.stored for piece in pieces if piece.stored not in table]
    if missing:
        ahead = missing[0].startswith(prediction_prefixes(config))
        way_out = "; mtp=False leaves the multi-token-prediction modules out" if ahead else ""
        raise ValueError(f"{folder} has no tensor {_first(missing)}, which its {CONFIG} calls for{way_out}")
    wanted |= {name + SCALE_SUFFIX for name in wanted}
    extra = [name for name in table if name not in wanted and not name.endswith(DERIVED)]
    if extra:
        raise ValueError(
            f"{table[extra[0]].file} has a tensor {_first(extra)}, "
            f"for which the {config.model_type} model of its {CONFIG} has no place"
        )


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def _check_tensor(
    name: str, shape: tuple[int, ...], table: Mapping[str, Stored], block: Block | None
) -> None:
    stored, scale_name = table[name], name + SCALE_SUFFIX
    scale, where = table.get(scale_name), f"{name} in {stored.file}"
    if stored.shape != shape:
        raise ValueError(f"{where} has shape {stored.shape}; by its {CONFIG} it has shape {shape}")
    if stored.dtype == FLOAT8:
        if block is None:
            raise ValueError(f"{where} is {FLOAT8}, but its {CONFIG} has no quantization_config in blocks")
        if scale is None:
            raise ValueError(f"{where} is {FLOAT8}, but there is no {scale_name} to scale it by")
        expected = scale_shape(shape, block)
        if scale.dtype != "F32" or scale.shape != expected:
            raise ValueError(
                f"{scale_name} in {scale.file} is {scale.dtype} of shape {scale.shape}; "
                f"for a weight of shape {shape} in blocks of {block} it is F32 of shape {expected}"
            )
    elif stored.dtype not in FLOATS:
        raise ValueError(
            f"{where} is {stored.dtype}; weights are {', '.join(FLOATS)}, or {FLOAT8} with scales"
        )
    elif scale is not None:
        raise ValueError(f"{scale_name} in {scale.file} has nothing to scale: {name} is {stored.dtype}")


def _check_repeated(source: Source) -> None:
    """Copies of the embedding and the head must equal them, or the model would not be what was published."""
    own = {piece.parameter: piece.stored for piece in source.pieces if piece.role == "own"}
    for piece in source.pieces:
        if piece.role == "own":
            continue
        original = own[piece.parameter]
        tensor = source.read(original)
        if torch.equal(source.read(piece.stored).to(tensor.dtype), tensor):
            continue
        way_out = "mtp=False loads without it" if piece.role == "copy" else "tie_word_embeddings is true"
        file = source.shards.table[piece.stored].file
        raise ValueError(
            f"{piece.stored} in {file} differs from {original}, which it should repeat ({way_out})"
        )
