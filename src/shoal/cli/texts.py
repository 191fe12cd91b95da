"""Texts that a command is given by name: `--text en=a.txt --text code='*.py'` become batches, a domain each.

The law: every byte counted is a byte predicted. A domain is cut to its limit by characters before it is
tokenised, so bits per byte are those of exactly the text that was read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from shoal.batch import Batch
from shoal.data.pack import evaluation_batches
from shoal.data.read import Document, read_documents
from shoal.data.shard import Shard, TokenizedDocument, tokenize_documents
from shoal.data.text import Tokenizer

BATCH = 4096  # tokens of a pass


@dataclass(frozen=True, eq=False)
class Text:
    """What one domain is made of."""

    name: str
    batches: tuple[Batch, ...]
    num_tokens: int
    num_bytes: int

    def on(self, device: torch.device) -> Iterator[Batch]:
        for batch in self.batches:
            yield batch.to(device)


def read_texts(given: Sequence[str], tokenizer: Tokenizer, *, limit: int, seq_len: int) -> list[Text]:
    """A Text a name, in the order given; a pattern without a name belongs to `text`.

    About `limit` tokens each. ValueError for a name without text, or a limit that holds no sequence.
    """
    if limit < 2:
        raise ValueError(f"--limit is {limit}; a text has 2 tokens or more")
    patterns: dict[str, list[str]] = {}
    for each in given:
        name, equals, pattern = each.partition("=")
        if equals and not (name and pattern):
            raise ValueError(f"--text is {each!r}; give it as NAME=FILES, or FILES alone")
        patterns.setdefault(name if equals else "text", []).append(pattern if equals else each)
    return [_read(name, files, tokenizer, limit, seq_len) for name, files in patterns.items()]


def _read(name: str, files: list[str], tokenizer: Tokenizer, limit: int, seq_len: int) -> Text:
    documents: list[TokenizedDocument] = []
    room = limit
    for document in read_documents(files):
        whole = Document(
            document.text[: 6 * room], document.source
        )  # few tokens are longer than 6 characters
        documents += tokenize_documents(tokenizer, [whole])
        room -= len(documents[-1].ids)
        if room <= 0:
            break
    tokens = sum(len(document.ids) for document in documents)
    if tokens < 2:
        raise ValueError(f"--text {name}: {', '.join(files)} holds no text")
    shard = Shard(
        path=Path(name),  # of no file: it lives in memory
        vocab_size=tokenizer.vocab_size,
        tokens=np.concatenate([np.asarray(document.ids, np.uint32) for document in documents]),
        offsets=np.fromiter(accumulate((len(d.ids) for d in documents), initial=0), np.int64),
        byte_lengths=np.array([document.num_bytes for document in documents], np.int64),
    )
    batches = tuple(evaluation_batches(shard, max(BATCH, seq_len), seq_len))
    return Text(name, batches, tokens, shard.num_bytes)
