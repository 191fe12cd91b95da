"""Cache: for each layer a tensor of pages, the same page number for a sequence in all of them.

A page holds the keys and values of consecutive positions (bytes, where they are in FP8); beside them stand
the keys of an indexer, where these are narrower than the rest. What a page holds past the end of its sequence
is never read, so pages are not cleared.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from shoal.config.cost import IndexKeys, cache_row_bytes, fp8_cache_shape, index_key_bytes
from shoal.config.model import MLAConfig, ModelConfig
from shoal.engine.settings import CacheDtype
from shoal.ops.quantised import FP8, check_index

Pages = tuple[Tensor, ...]
IndexPages = tuple[tuple[Tensor, Tensor], ...]


def count_page_bytes(
    config: ModelConfig,
    page_size: int,
    dtype: torch.dtype,
    *,
    mtp: bool = False,
    index_keys: IndexKeys = "wide",
    cache_dtype: CacheDtype = "auto",
) -> int:
    """Bytes of one page in all layers, with `mtp` in the first prediction module too."""
    if cache_dtype == "fp8":
        row = math.prod(fp8_cache_shape(config, index_keys)) + index_key_bytes(config, index_keys)
    else:
        row = cache_row_bytes(config, dtype.itemsize, index_keys)
    return (config.num_hidden_layers + mtp) * page_size * row


def make_cache(
    config: ModelConfig,
    rows: tuple[int, int],
    like: Tensor,
    mtp: bool,
    index_keys: IndexKeys,
    cache_dtype: CacheDtype,
) -> tuple[Pages, IndexPages]:
    """Pages, and positions of each: `rows`; where `like` is, and in its dtype if that is `auto`."""
    layers, device = config.num_hidden_layers + mtp, like.device
    shape, dtype = (*rows, *config.attention.cache_shape), like.dtype
    if cache_dtype == "fp8":
        shape, dtype = (*rows, *fp8_cache_shape(config, index_keys)), torch.uint8
    narrow: IndexPages = ()
    if index_keys == "fp8":
        assert isinstance(config.attention, MLAConfig) and config.attention.indexer is not None
        keys = config.attention.indexer.index_head_dim
        check_index(keys)
        if cache_dtype == "auto":
            shape = (*rows, config.attention.latent_dim)
        narrow = tuple(
            (_zeros((*rows, keys), FP8, device), _zeros(rows, torch.float32, device)) for _ in range(layers)
        )
    return tuple(_zeros(shape, dtype, device) for _ in range(layers)), narrow


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU of memory that the system clears, and gives, when it is first written: a large cache costs
    what is used of it."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
