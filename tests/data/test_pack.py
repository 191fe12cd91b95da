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
from shoal.data.fim import BEGIN, END, FIM, HOLE
from shoal.data.pack import Mixture, Packer, evaluation_batches
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


@given(packings(), packings(), st.sampled_from([(1.0, 1.0), (0.7, 0.3), (1, 2.5)]), st.integers(0, 40))
def test_a_mixture_keeps_its_weights_and_its_order(
    tmp_path_factory: pytest.TempPathFactory,
    one: tuple[list[int], int, int, int],
    other: tuple[list[int], int, int, int],
    weights: tuple[float, float],
    first: int,
) -> None:
    """Each source's tokens come in its own stream, none lost at a step's edge, in proportion to the token."""
    folders = [tmp_path_factory.mktemp("mix") for _ in range(2)]
    shards = [
        numbered_shard(folder, [*part[0], 30]) for folder, part in zip(folders, (one, other), strict=True)
    ]
    size = max(shard.vocab_size for shard in shards)
    for shard in shards:  # one vocabulary
        documents = [
            TokenizedDocument(shard.tokens[a:b].tolist(), 1) for a, b in pairwise(shard.offsets.tolist())
        ]
        write_shard(shard.path, documents, size)
    shards = [Shard.open(shard.path) for shard in shards]
    mixture = Mixture((shards[0], shards[1]), weights, 16, 8, seed=3)
    batches = [mixture.batch(step) for step in range(first, first + 6)]
    taken: list[list[int]] = [[], []]
    for step, batch in enumerate(batches, start=first):
        assert batch.num_tokens == 16
        assert int(batch.cu_seqlens_S1[-1]) == 16
        assert sequences(batch, batch.positions_T) == [
            list(range(len(s))) for s in sequences(batch, batch.ids_T)
        ]
        counts = [
            after - before
            for before, after in zip(mixture._given(step), mixture._given(step + 1), strict=True)
        ]
        for source, part in zip(taken, batch.ids_T.split(counts), strict=True):
            source += part.tolist()
    share = weights[0] / sum(weights)
    assert abs(len(taken[0]) - share * 16 * 6) <= 1
    for shard, source, start in zip(shards, taken, mixture._given(first), strict=True):
        alone = Packer(shard, 8, 8, 3).stretch(start, start + len(source))
        assert source == alone.ids_T.tolist()
    again = Mixture((shards[0], shards[1]), weights, 16, 8, seed=3).batch(first + 5)
    assert torch.equal(again.ids_T, batches[-1].ids_T)


def test_an_epoch_of_many_documents_is_found_by_blocks(tmp_path: Path) -> None:
    lengths = [1 + n % 3 for n in range(5000)]
    packer = Packer(numbered_shard(tmp_path, lengths), 700, 16, seed=2)
    total = packer.shard.num_tokens
    stream = torch.cat([packer.batch(step).ids_T for step in range(-(-total // 700))]).tolist()[:total]
    assert sorted(stream) == list(range(total))
    long = packer.stretch(0, 3 * total)
    assert long.ids_T.tolist()[:total] == stream
    assert torch.equal(long.ids_T.bincount(), torch.full((total,), 3))
    assert packer._epoch(0).order.dtype.itemsize == 4


def test_fill_in_the_middle_keeps_every_byte_and_depends_on_seed_and_text(
    tokenizer: Tokenizer, modules: list[Document], tmp_path: Path
) -> None:
    def tokens(documents: list[Document], fim: FIM) -> list[list[int]]:
        return [list(document.ids) for document in tokenize_documents(tokenizer, documents, fim)]

    whole, cut = tokens(modules, FIM()), tokens(modules, FIM(0.5, seed=1))
    marks = [tokenizer.encode(token, parse_special=True)[0] for token in (BEGIN, HOLE, END)]
    changed = [n for n, ids in enumerate(cut) if ids != whole[n]]
    # Binomial: 30 of 60 with a standard deviation of 3.9; this draw is fixed.
    assert 15 < len(changed) < 45
    for n in changed:
        places = [cut[n].index(mark) for mark in marks]
        assert places == sorted(places)
        assert places[0] == 1
        assert (cut[n][0], cut[n][-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        prefix, suffix, middle = (
            tokenizer.decode(cut[n][a + 1 : b]) for a, b in pairwise([*places, len(cut[n]) - 1])
        )
        assert prefix + middle + suffix == modules[n].text
    assert tokens(modules[::-1], FIM(0.5, seed=1)) == cut[::-1]
    assert tokens(modules, FIM(0.5, seed=2)) != cut
    sizes = [document.num_bytes for document in tokenize_documents(tokenizer, modules, FIM(1.0))]
    assert sizes == [len(module.text.encode()) for module in modules]
    with pytest.raises(ValueError, match=r"rate is 1\.5"):
        FIM(1.5)


def test_a_mixture_that_cannot_be_is_refused(tmp_path: Path) -> None:
    shard = numbered_shard(tmp_path, [50, 60])
    for weights, message in [
        ((1.0,), "2 sources have 1 weights"),
        ((1.0, -1.0), "each is positive"),
        ((1.0, 0.01), "source 1 has a weight of 0.01"),
    ]:
        with pytest.raises(ValueError, match=message):
            Mixture((shard, shard), weights, 64, 8, 0)
