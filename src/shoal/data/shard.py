"""A corpus as tokens on disk: one file, written once, then mapped into memory and read at random.

Beside the tokens of each document it keeps how many bytes of text they stand for, so that losses can be told
in bits per byte. The law: what is read is what was written; a file that is cut short, or no shard, is refused
when opened.

Layout, little-endian: HEADER; the tokens, 2 bytes each if the vocabulary allows and else 4, padded to 8;
where each document starts and, last, where they end (documents + 1 x 8 bytes); the bytes of text of each
(documents x 8). Documents come from read.py and their tokens from text.py; batches are made in pack.py.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, tee
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal.data.atomic import write_atomically
from shoal.data.fim import BEGIN, END, FIM, HOLE
from shoal.data.read import Document
from shoal.data.text import Tokenizer

MAGIC = b"SHOAL 01"
WHOLE = FIM(0.0)
HEADER = np.dtype(
    [("magic", "S8"), ("vocab_size", "<u8"), ("token_bytes", "<u8"), ("documents", "<u8"), ("tokens", "<u8")]
)


@dataclass(frozen=True, eq=False)
class TokenizedDocument:
    ids: Sequence[int]
    num_bytes: int  # of its text in UTF-8


@dataclass(frozen=True, eq=False)
class Shard:
    """Documents 0 to n-1; document d is `tokens[offsets[d]:offsets[d + 1]]`. The arrays are the file."""

    path: Path
    vocab_size: int
    tokens: NDArray[np.unsignedinteger]
    offsets: NDArray[np.int64]  # (documents + 1,)
    byte_lengths: NDArray[np.int64]  # (documents,)

    @classmethod
    def open(cls, path: str | Path) -> Shard:
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"no such shard: {path}; write it with `shoal data`")
        data = (
            np.asarray(np.memmap(path, np.uint8, mode="r")) if path.stat().st_size else np.empty(0, np.uint8)
        )
        if data.size < HEADER.itemsize or data[: len(MAGIC)].tobytes() != MAGIC:
            raise ValueError(f"{path} is not a shard of this version; write it again with `shoal data`")
        _, vocab_size, width, documents, tokens = data[: HEADER.itemsize].view(HEADER)[0].tolist()
        start_offsets = HEADER.itemsize + -(-tokens * width // 8) * 8
        start_bytes = start_offsets + 8 * (documents + 1)
        end = start_bytes + 8 * documents
        if data.size != end:
            raise ValueError(f"{path} has {data.size} bytes where {end} were written; write it again")
        return cls(
            path,
            vocab_size,
            data[HEADER.itemsize : HEADER.itemsize + tokens * width].view(f"<u{width}"),
            data[start_offsets:start_bytes].view("<i8"),
            data[start_bytes:].view("<i8"),
        )

    @property
    def num_documents(self) -> int:
        return len(self.byte_lengths)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_bytes(self) -> int:
        """Of the text of all documents, in UTF-8."""
        return int(self.byte_lengths.sum())


def tokenize_documents(
    tokenizer: Tokenizer, documents: Iterable[Document], fim: FIM = WHOLE
) -> Iterator[TokenizedDocument]:
    """Each document between BOS, where the tokenizer has one, and EOS; so every byte of text is predicted.

    Those that `fim` cuts are told as prefix, suffix and middle, with its three tokens before each.
    """
    marks = _fim_ids(tokenizer) if fim.rate else []
    layouts, texts = tee(_lay_out(document.text, fim) for document in documents)
    many = tokenizer.encode_many(piece for pieces in texts for piece in pieces)
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for pieces in layouts:
        ids = [next(many) for _ in pieces]
        if len(pieces) > 1:
            ids = [[mark, *piece] for mark, piece in zip(marks, ids, strict=True)]
        size = sum(len(piece.encode()) for piece in pieces)
        yield TokenizedDocument([*before, *chain.from_iterable(ids), tokenizer.eos_id], size)


def _lay_out(text: str, fim: FIM) -> tuple[str, ...]:
    cut = fim.cut(text)
    return (text,) if cut is None else (cut[0], cut[2], cut[1])


def _fim_ids(tokenizer: Tokenizer) -> list[int]:
    ids = [tokenizer.encode(token, parse_special=True) for token in (BEGIN, HOLE, END)]
    if any(len(each) != 1 for each in ids):
        raise ValueError(
            f"this tokenizer has no {BEGIN}, {HOLE} and {END}; set the fill-in-the-middle rate to 0"
        )
    return [each[0] for each in ids]


def write_shard(path: str | Path, documents: Iterable[TokenizedDocument], vocab_size: int) -> None:
    """Write a shard; `path` appears when it is whole. Memory is two numbers a document."""
    token = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    ends, byte_lengths = array("q", [0]), array("q")
    with write_atomically(Path(path)) as file:
        file.seek(HEADER.itemsize)
        for document in documents:
            ids = np.asarray(document.ids, np.int64)
            if ids.size == 0 or ids.min() < 0 or ids.max() >= vocab_size:
                raise ValueError(
                    f"document {len(byte_lengths)} has {ids.size} tokens, from {ids.min(initial=0)} to "
                    f"{ids.max(initial=0)}; it needs one at least, all below vocab_size {vocab_size}"
                )
            file.write(ids.astype(token).tobytes())
            ends.append(ends[-1] + ids.size)
            byte_lengths.append(document.num_bytes)
        if not byte_lengths:
            raise ValueError(f"no documents to write to {path}; give some text")
        file.write(bytes(-ends[-1] * token.itemsize % 8))
        file.write(np.asarray(ends, "<i8").tobytes() + np.asarray(byte_lengths, "<i8").tobytes())
        file.seek(0)
        header = (MAGIC, vocab_size, token.itemsize, len(byte_lengths), ends[-1])
        file.write(np.array(header, HEADER).tobytes())
