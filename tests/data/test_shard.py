"""Laws of a shard: what is read is what was written, in the narrowest type that holds it, and a file that is
no whole shard is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.data.read import Document
from shoal.data.shard import Shard, TokenizedDocument, tokenize_documents, write_shard
from shoal.data.text import Tokenizer


@given(
    st.lists(st.lists(st.integers(0, 257), min_size=1, max_size=9), min_size=1, max_size=9),
    st.sampled_from([(258, 2), (1 << 16, 2), ((1 << 16) + 1, 4), (129_280, 4)]),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], sizes: tuple[int, int]
) -> None:
    vocab_size, width = sizes
    documents = [*documents, [vocab_size - 1]]
    path = tmp_path_factory.mktemp("shard") / "train.shard"
    write_shard(path, (TokenizedDocument(ids, 3 * len(ids)) for ids in documents), vocab_size)
    shard = Shard.open(path)
    assert shard.vocab_size == vocab_size
    assert shard.tokens.dtype == np.dtype(f"u{width}")
    assert [shard.tokens[a:b].tolist() for a, b in zip(shard.offsets, shard.offsets[1:])] == documents  # noqa: B905
    assert shard.byte_lengths.tolist() == [3 * len(ids) for ids in documents]
    assert (shard.num_documents, shard.num_tokens) == (len(documents), sum(map(len, documents)))
    assert shard.num_bytes == 3 * shard.num_tokens


def test_real_text_comes_back_and_its_bytes_are_counted(
    tokenizer: Tokenizer, modules: list[Document], tmp_path: Path
) -> None:
    write_shard(tmp_path / "a", tokenize_documents(tokenizer, modules), tokenizer.vocab_size)
    shard = Shard.open(tmp_path / "a")
    ids = [shard.tokens[a:b].tolist() for a, b in zip(shard.offsets[:-1], shard.offsets[1:], strict=True)]
    assert {(document[0], document[-1]) for document in ids} == {(tokenizer.bos_id, tokenizer.eos_id)}
    assert [tokenizer.decode(document[1:-1]) for document in ids] == [module.text for module in modules]
    assert shard.byte_lengths.tolist() == [len(module.text.encode()) for module in modules]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "document 1 has 0 tokens"),
        ([3, 10], "document 1 has 2 tokens, from 0 to 10; it needs one at least, all below vocab_size 10"),
        ([-1], "document 1 has 1 tokens, from -1"),
    ],
)
def test_a_document_that_cannot_be_kept_is_refused(tmp_path: Path, ids: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        write_shard(tmp_path / "a", [TokenizedDocument([1], 1), TokenizedDocument(ids, 0)], 10)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_shard_of_before(tmp_path: Path) -> None:
    def documents() -> Iterator[TokenizedDocument]:
        yield TokenizedDocument([2], 1)
        raise KeyboardInterrupt

    write_shard(tmp_path / "a", [TokenizedDocument([1], 1)], 10)
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "a", documents(), 10)
    assert Shard.open(tmp_path / "a").tokens.tolist() == [1]
    with pytest.raises(ValueError, match="no documents to write"):
        write_shard(tmp_path / "a", [], 10)
    assert Shard.open(tmp_path / "a").tokens.tolist() == [1]


def test_a_file_that_is_no_whole_shard_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(ValueError, match="no such shard"):
        Shard.open(path)
    write_shard(path, [TokenizedDocument([1, 2, 3], 5)], 10)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=re.escape(str(path))):
            Shard.open(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match=f"has {len(whole) + 1} bytes where {len(whole)} were written"):
        Shard.open(path)
    path.write_bytes(b"PK" + whole[2:])
    with pytest.raises(ValueError, match="is not a shard"):
        Shard.open(path)
