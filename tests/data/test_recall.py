"""Laws of text to look back in: a key has one value in a document, what is tested with is in no fact, and
other text keeps its words."""

from __future__ import annotations

import re
from itertools import pairwise, product
from pathlib import Path

import pytest

from shoal.config.extend import load_extend
from shoal.data.recall import HELD_OUT, TOLD, VALUES, find_words, recall_documents
from shoal.data.tokenizer import SMALLEST, train_tokenizer

FACT = re.compile(r"([#=][a-z]{2})([#=][a-z]{2})")
RECIPES = Path(__file__).parents[2] / "recipes" / "extend"


def test_a_key_has_one_value_in_a_document_and_another_in_the_next() -> None:
    documents = [document.text for document in recall_documents(60, (30, 300), 0)]
    assert documents == [document.text for document in recall_documents(60, (30, 300), 0)]
    assert documents != [document.text for document in recall_documents(60, (30, 300), 1)]
    told = [FACT.findall(text) for text in documents]
    assert all(len(set(facts)) == len(dict(facts)) for facts in told)
    assert sum(map(len, told)) > 2 * sum(len(dict(facts)) for facts in told), "facts are told again"
    assert len({dict(facts).get("#ba") for facts in told}) > 5
    assert {key for facts in told for key, _ in facts} == {*TOLD, *VALUES}
    assert {value for facts in told for _, value in facts} == {*TOLD, *VALUES}
    assert all(len({key[0] for key, _ in facts}) == 1 for facts in told), "a document's keys have one mark"


def test_the_words_between_are_those_given_in_their_order() -> None:
    words = [f"w{'a' * (number % 7)}{'b' * (number // 7)}c" for number in range(70)]
    for document in recall_documents(20, (30, 300), 1, words=words):
        left = FACT.sub("", document.text).split()
        places = [words.index(word) for word in left]
        assert all((after - before) % len(words) == 1 for before, after in pairwise(places))


def test_a_string_is_told_twice() -> None:
    seen: set[str] = set()
    for document in recall_documents(200, (64, 200), 0, "strings"):
        told = re.findall(r"[#=][a-z]{2}", document.text)
        assert "".join(told) == document.text
        assert 64 <= len(told) <= 200
        seen |= set(told)
        periods = [n for n in range(4, len(told) // 2 + 1) if told[:n] == told[n : 2 * n]]
        assert len(periods) == 1, "told once more, and not again"
    assert seen == {*TOLD, *HELD_OUT, *VALUES}, "every symbol has a meaning before it is tested"


def test_a_tokenizer_of_this_text_has_each_symbol_as_one_token() -> None:
    texts = [document.text for document in recall_documents(400, (30, 200), 0, "strings")]
    texts += [document.text for document in recall_documents(40, (30, 200), 0)]
    tokenizer = train_tokenizer(texts, SMALLEST + 125)
    for one, other in product(TOLD + HELD_OUT + VALUES, repeat=2):
        assert len(tokenizer.encode(one + other)) == 2
        assert tokenizer.encode("sea" + one) == tokenizer.encode("sea") + tokenizer.encode(one)


def test_recipes_ask_for_what_no_fact_has() -> None:
    needle = load_extend(RECIPES / "needle-3-long.toml").needle
    assert needle is not None
    assert needle.keys == HELD_OUT
    assert needle.values == VALUES


def test_words_alone_have_no_facts() -> None:
    for document in recall_documents(20, (30, 300), 1, "words", ["sea", "gull"]):
        assert set(document.text.split()) == {"sea", "gull"}


def test_words_are_letters() -> None:
    assert find_words("a #1 fact, it's of 20_b:\nb") == ["a", "fact", "it", "s", "of", "b", "b"]


def test_no_documents_and_no_words_are_refused() -> None:
    with pytest.raises(ValueError, match="0 documents of 20 to 100 words are asked for"):
        list(recall_documents(0, (20, 100), 0))
    with pytest.raises(ValueError, match="no words to hide facts among"):
        list(recall_documents(1, (20, 100), 0, words=[]))
