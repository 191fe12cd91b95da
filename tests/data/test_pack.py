"""Laws of packing: no token is lost or used twice, documents never touch, every target is the true next
token, and a batch is a function of (seed, step) alone.

Tokens of these shards are numbered 0, 1, 2 ... through all documents, so that a token says where it came
from.
"""

from __future__ import annotations

from itertools import count, islice, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shoal.batch import Batch
from shoal.data.pack import Packer, evaluation_batches
from shoal.data.read import Document
from shoal.data.shard import Shard, TokenizedDocument, tokenize_documents, write_shard
from shoal.data.text import Tokenizer


def numbered_shard(folder: Path, lengths: list[int]) -> Shard:
    numbers = count()
    documents = [TokenizedDocument(list(islice(numbers, length)), 2 * length) for length in lengths]
    write_shard(folder / "shard", documents, sum(lengths))
    return Shard.open(folder / "shard")


def sequences(batch: Batch, of: Tensor) -> list[list[int]]:
    return [of[a:b].tolist() for a, b in pairwise(batch.cu_seqlens_S1.tolist())]


def assert_well_formed(batch: Batch, shard: Shard, seq_len: int) -> None:
    """What holds of every batch, whoever cut it."""
    assert batch.targets_T is not None
    assert batch.weights_T is not None
    wholes = [list(range(a, b)) for a, b in pairwise(shard.offsets.tolist())]
    document_of = {token: whole for whole in wholes for token in whole}
    ids = sequences(batch, batch.ids_T)
    for sequence in ids:
        assert 0 < len(sequence) <= seq_len
        assert sequence == list(range(sequence[0], sequence[0] + len(sequence)))
        assert document_of[sequence[0]] is document_of[sequence[-1]]
    assert sequences(batch, batch.positions_T) == [list(range(len(sequence))) for sequence in ids]
    assert batch.max_seqlen == max(map(len, ids))
    last = torch.tensor([document_of[token][-1] == token for token in batch.ids_T.tolist()])
    assert torch.equal(batch.weights_T, (~last).float())
    assert torch.equal(batch.targets_T, torch.where(last, batch.ids_T, batch.ids_T + 1))
    assert (batch.ids_T.dtype, batch.positions_T.dtype) == (torch.int64, torch.int64)
    assert (batch.targets_T.dtype, batch.cu_seqlens_S1.dtype) == (torch.int64, torch.int32)
    # A sequence starts where the batch, a document, or a full sequence before it makes it start.
    for before, after in pairwise(ids):
        assert document_of[after[0]][0] == after[0] or (len(before) == seq_len and after[0] == before[-1] + 1)


@st.composite
def packings(draw: st.DrawFn) -> tuple[list[int], int, int, int]:
    """Lengths of documents, tokens of a batch, longest sequence, seed."""
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=20).filter(lambda x: sum(x) > 1))
    tokens_per_batch = draw(st.integers(2, sum(lengths)))
    seed = draw(st.one_of(st.integers(0, 5), st.just(2**64 - 1)))
    return lengths, tokens_per_batch, draw(st.integers(2, tokens_per_batch)), seed


@given(packings())
def test_every_epoch_is_every_document_once(
    tmp_path_factory: pytest.TempPathFactory, packing: tuple[list[int], int, int, int]
) -> None:
    lengths, tokens_per_batch, seq_len, seed = packing
    shard = numbered_shard(tmp_path_factory.mktemp("pack"), lengths)
    packer = Packer(shard, tokens_per_batch, seq_len, seed)
    assert packer.steps_per_epoch == sum(lengths) / tokens_per_batch
    total = shard.num_tokens
    batches = [packer.batch(step) for step in range(-(-2 * total // tokens_per_batch))]
    for batch in batches:
        assert batch.num_tokens == tokens_per_batch
        assert_well_formed(batch, shard, seq_len)
    stream = torch.cat([batch.ids_T for batch in batches]).tolist()
    wholes = [list(range(a, b)) for a, b in pairwise(shard.offsets.tolist())]
    for epoch in (stream[:total], stream[total : 2 * total]):
        assert sorted(epoch) == list(range(total))
        starts = [epoch.index(whole[0]) for whole in wholes]
        assert [
            epoch[start : start + len(whole)] for start, whole in zip(starts, wholes, strict=True)
        ] == wholes


@given(packings(), st.lists(st.integers(0, 200), min_size=1, max_size=5))
def test_a_batch_depends_on_seed_and_step_alone(
    tmp_path_factory: pytest.TempPathFactory, packing: tuple[list[int], int, int, int], steps: list[int]
) -> None:
    lengths, tokens_per_batch, seq_len, seed = packing
    shard = numbered_shard(tmp_path_factory.mktemp("pack"), lengths)
    used = Packer(shard, tokens_per_batch, seq_len, seed)
    for step in steps:
        here = used.batch(step)
        fresh = Packer(Shard.open(shard.path), tokens_per_batch, seq_len, seed).batch(step)
        for name in ("ids_T", "positions_T", "cu_seqlens_S1", "targets_T", "weights_T"):
            assert torch.equal(getattr(here, name), getattr(fresh, name))
        assert here.max_seqlen == fresh.max_seqlen


def test_the_order_is_that_of_every_other_version(tmp_path: Path) -> None:
    """A run begun on one version of numpy or of this file must go on with the same text on the next."""
    packer = Packer(numbered_shard(tmp_path, [1] * 8), 8, 2, seed=5)
    orders = [packer.batch(epoch).ids_T.tolist() for epoch in range(3)]
    assert orders == [
        [2, 4, 3, 1, 5, 0, 6, 7],
        [7, 4, 5, 1, 6, 0, 2, 3],
        [3, 5, 2, 7, 1, 0, 6, 4],
    ]


def test_seeds_and_epochs_have_orders_of_their_own(tmp_path: Path) -> None:
    shard = numbered_shard(tmp_path, [1] * 30)
    orders = {
        tuple(Packer(shard, 30, 2, seed).batch(epoch).ids_T.tolist())
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16  # of 30! orders, so no two meet by chance


@given(packings())
def test_evaluation_sees_the_text_once_in_order_whatever_the_batch(
    tmp_path_factory: pytest.TempPathFactory, packing: tuple[list[int], int, int, int]
) -> None:
    lengths, tokens_per_batch, seq_len, _ = packing
    shard = numbered_shard(tmp_path_factory.mktemp("pack"), lengths)
    batches = list(evaluation_batches(shard, tokens_per_batch, seq_len))
    for batch in batches:
        assert batch.num_tokens <= tokens_per_batch
        assert_well_formed(batch, shard, seq_len)
    assert torch.cat([batch.ids_T for batch in batches]).tolist() == list(range(shard.num_tokens))
    [whole] = evaluation_batches(shard, shard.num_tokens + seq_len, seq_len)
    cut = [sequence for batch in batches for sequence in sequences(batch, batch.ids_T)]
    assert cut == sequences(whole, whole.ids_T)
    # No room is wasted: the first sequence of a batch would not have fitted in the one before.
    for before, after in pairwise(batches):
        assert before.num_tokens + int(after.cu_seqlens_S1[1]) > tokens_per_batch


def test_every_byte_of_real_text_is_predicted_once(
    tokenizer: Tokenizer, modules: list[Document], tmp_path: Path
) -> None:
    write_shard(tmp_path / "a", tokenize_documents(tokenizer, modules), tokenizer.vocab_size)
    shard = Shard.open(tmp_path / "a")
    predicted: list[int] = []
    for batch in evaluation_batches(shard, 4096, 256):
        assert batch.targets_T is not None
        assert batch.weights_T is not None
        predicted += batch.targets_T[batch.weights_T > 0].tolist()
    text = tokenizer.decode(predicted, skip_special=True)
    assert text == "".join(module.text for module in modules)
    assert len(text.encode()) == shard.num_bytes
    assert predicted.count(tokenizer.eos_id) == len(modules)


def test_what_cannot_be_packed_is_refused_with_both_numbers(tmp_path: Path) -> None:
    shard = numbered_shard(tmp_path, [5, 6])
    with pytest.raises(
        ValueError, match="has 11 tokens, less than a batch of 12; give more text or a smaller"
    ):
        Packer(shard, 12, 4, 0)
    for make in (lambda: Packer(shard, 4, 5, 0), lambda: next(evaluation_batches(shard, 4, 5))):
        with pytest.raises(ValueError, match="seq_len is 5 and tokens_per_batch 4"):
            make()
    with pytest.raises(ValueError, match="seq_len is 1"):
        Packer(shard, 4, 1, 0)
    with pytest.raises(ValueError, match="seed is -1"):
        Packer(shard, 4, 2, -1)
