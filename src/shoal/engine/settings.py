"""EngineSettings: how much is served at once, and in what ways.

The law: nothing here changes what a request gets, only when it gets it; but a narrow cache rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from shoal.config.cost import IndexKeys

CacheDtype = Literal["auto", "fp8"]


@dataclass(frozen=True)
class EngineSettings:
    """How much is served at once.

    The cache has `num_pages` pages; None makes as many as `cache_bytes` hold, and None of those as many as
    the share `memory` of a GPU has room for beside everything else (on a CPU 1 GiB), but no more than
    `max_sequences` of the model's longest context could fill. A step has at most `max_batch_tokens` tokens of
    `max_sequences` sequences. Requests without a seed are given one from `seed`.

    `buckets` are the sizes to which steps of nothing but decodes are padded, () none; on CUDA each replays a
    graph, and None chooses them there. `lengths` are the numbers of tokens to which other steps are padded,
    () none; on CUDA each replays graphs between its attentions (engine/pieces.py), and None chooses them
    there. `overlap` launches a step before the last one's tokens have come; None does so on CUDA. Up to
    `decode_steps` steps are launched in a row where all that run decode (engine/burst.py): the tokens of a
    request then come so many at a time, and who arrives waits for the last of them, but the host works that
    much less often. `speculate` guesses so many tokens ahead with the model's prediction module, which needs
    each step's tokens on the host: it rules out `overlap`. `record_weights` keeps the weights of the routed
    experts beside their ids, two bytes a choice more, for requests that ask where they were sent. `affinity`
    admits requests that are likely to use the same experts together, past one that waits up to so many times;
    0 goes by arrival. `index_keys` fp8 keeps the keys of a sparse attention's indexer in a byte an element,
    as V3.2 serves, and scores in FP8. `cache_dtype` fp8 keeps the cache in e4m3
    (ops/reference/narrow_rows.py), that of sparse attention with `index_keys` fp8 alone; auto in the model's
    dtype.
    """

    page_size: int = 64
    num_pages: int | None = None
    cache_bytes: int | None = None
    memory: float = 0.9
    max_batch_tokens: int = 2048
    max_sequences: int = 64
    prefix_cache: bool = True
    seed: int = 0
    buckets: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    overlap: bool | None = None
    decode_steps: int = 1
    speculate: int = 0
    record_weights: bool = False
    affinity: int = 0
    index_keys: IndexKeys = "wide"
    cache_dtype: CacheDtype = "auto"

    def __post_init__(self) -> None:
        if self.cache_dtype not in get_args(CacheDtype):
            raise ValueError(
                f"cache_dtype (--kv-cache-dtype) is {self.cache_dtype!r}; it must be one of "
                f"{', '.join(get_args(CacheDtype))}"
            )
        for name in (
            *("page_size", "num_pages", "cache_bytes", "max_batch_tokens", "max_sequences", "decode_steps"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.max_sequences > self.max_batch_tokens:
            raise ValueError(
                f"max_sequences {self.max_sequences} exceeds max_batch_tokens {self.max_batch_tokens}; "
                f"every running sequence decodes one token a step, so raise the latter or lower the former"
            )
        if self.buckets is not None and not all(0 < size <= self.max_sequences for size in self.buckets):
            raise ValueError(
                f"buckets are {self.buckets}; each must be between 1 and max_sequences {self.max_sequences}"
            )
        if self.lengths is not None and not all(each > 0 for each in self.lengths):
            raise ValueError(f"lengths are {self.lengths}; each must be at least 1")
        if not 0 < self.memory <= 1:
            raise ValueError(f"memory is {self.memory}; it must be a share of the device, at most 1")
        if self.index_keys not in get_args(IndexKeys):
            raise ValueError(f"index_keys is {self.index_keys!r}; it must be wide or fp8")
        if self.affinity < 0:
            raise ValueError(f"affinity is {self.affinity}; it must be at least 0, where 0 goes by arrival")
        if self.speculate < 0:
            raise ValueError(f"speculate is {self.speculate}; it must be at least 0, where 0 guesses nothing")
        if self.speculate and self.overlap:
            raise ValueError(
                f"overlap is True and speculate is {self.speculate}, but guesses need the last step's tokens "
                f"on the host; leave one of them out"
            )
        if self.speculate and self.decode_steps > 1:
            raise ValueError(
                f"decode_steps is {self.decode_steps} and speculate is {self.speculate}, but guesses need "
                f"each step's tokens on the host; set decode_steps to 1, or speculate to 0"
            )
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be between 0 and 2**64 - 1")
