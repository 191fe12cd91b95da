"""The text of the experiments: English, Chinese and Python, as tokens, a share of each held out.

Python is the running one's standard library; the other two are files of the user's, jsonl or plain. Of each
domain so many bytes are read from its beginning, and what is held out are whole documents. Made once a
folder; the law of data/ holds: the same files give the same shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from shoal.data.pack import Mixture
from shoal.data.read import Document, read_documents, split_documents, standard_library
from shoal.data.shard import Shard, tokenize_documents, write_shard
from shoal.data.text import Tokenizer
from shoal.data.tokenizer import train_tokenizer

HELD_OUT = 0.03
TOKENIZER = "tokenizer"


@dataclass(frozen=True, eq=False)
class Text:
    tokenizer: Tokenizer
    train: dict[str, Shard]  # by domain
    held_out: dict[str, Shard]

    def batches(self, tokens_per_batch: int, seq_len: int, seed: int, domain: str | None = None) -> Mixture:
        """What to train on: every batch with as much of each domain, or of one alone."""
        shards = tuple(self.train.values()) if domain is None else (self.train[domain],)
        return Mixture(shards, (1.0,) * len(shards), tokens_per_batch, seq_len, seed)


def make(folder: Path, files: Mapping[str, Iterable[str]], num_bytes: int, vocab_size: int) -> Text:
    """Read `num_bytes` a domain, train a tokenizer on what is not held out, and write the shards."""
    sides = {
        name: split_documents(list(_first(documents, num_bytes)), HELD_OUT)
        for name, documents in (
            *((name, read_documents(tuple(paths))) for name, paths in files.items()),
            ("python", standard_library()),
        )
    }
    tokenizer = train_tokenizer((each.text for train, _ in sides.values() for each in train), vocab_size)
    tokenizer.save(folder / TOKENIZER)
    for name, (train, held_out) in sides.items():
        for kind, documents in (("train", train), ("held-out", held_out)):
            shard = folder / f"{kind}-{name}.shard"
            write_shard(shard, tokenize_documents(tokenizer, documents), tokenizer.vocab_size)
    return load(folder)


def load(folder: Path) -> Text:
    def shards(kind: str) -> dict[str, Shard]:
        found = sorted(folder.glob(f"{kind}-*.shard"))
        if not found:
            raise ValueError(f"{folder} has no text; make it: python -m experiments text --out {folder}")
        return {path.stem.removeprefix(f"{kind}-"): Shard.open(path) for path in found}

    return Text(Tokenizer.load(folder / TOKENIZER), shards("train"), shards("held-out"))


def _first(documents: Iterable[Document], num_bytes: int) -> Iterator[Document]:
    for document in documents:
        yield document
        num_bytes -= len(document.text.encode())
        if num_bytes <= 0:
            return
