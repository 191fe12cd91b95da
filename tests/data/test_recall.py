"""Laws of text to look back in: a key has one value in a document, what is tested with is in no fact, and
other text keeps its words."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from shoal.config.extend import load_extend
from shoal.data.recall import ALL, HELD_OUT, TOLD, Form, find_words, recall_documents
from shoal.data.tokenizer import SMALLEST, train_tokenizer

FACT = re.compile(r"(#[a-z]{2})([0-9]{2})")
RECIPES = Path(__file__).parents[2] / "recipes" / "extend"


def test_a_key_has_one_value_in_a_document_and_another_in_the_next() -> None:
    documents = [document.text for document in recall_documents(60, (30, 300), 0)]
    assert documents == [document.text for document in recall_documents(60, (30, 300), 0)]
    assert documents != [document.text for document in recall_documents(60, (30, 300), 1)]
    told = [FACT.findall(text) for text in documents]
    assert all(len(set(facts)) == len(dict(facts)) for facts in told)
    assert sum(map(len, told)) > 2 * sum(len(dict(facts)) for facts in told), "facts are told again"
    assert len({dict(facts).get("#ba") for facts in told}) > 5
    assert {key for facts in told for key, _ in facts} == set(TOLD.keys)
    assert not {value for facts in told for _, value in facts} & set(HELD_OUT.values)


def test_the_words_between_are_those_given_in_their_order() -> None:
    words = [f"w{'a' * (number % 7)}{'b' * (number // 7)}c" for number in range(70)]
    for document in recall_documents(20, (30, 300), 1, words=words):
        left = FACT.sub("", document.text).split()
        places = [words.index(word) for word in left]
        assert all((after - before) % len(words) == 1 for before, after in pairwise(places))


def test_strings_come_again_before_the_next() -> None:
    seen: set[str] = set()
    for document in recall_documents(200, (40, 200), 0, "strings"):
        told = re.findall(r"#[a-z]{2}|[0-9]{2}", document.text)
        assert "".join(told) == document.text
        seen |= set(told)
        units = re.findall(r"#[a-z]{2}(?:[0-9]{2})?", document.text)
        assert 40 <= len(units) <= 200
        assert any(units[:period] == units[period : 2 * period] for period in range(3, 11))
    assert seen == {*ALL.keys, *ALL.values}, "every symbol has a meaning before it is tested"


def test_a_list_tells_its_facts_in_any_order() -> None:
    followers: list[int] = []  # how many facts come after the first, in each document
    for document in recall_documents(100, (40, 60), 0, "lists"):
        told = FACT.findall(document.text)
        assert "".join(map("".join, told)) == document.text
        assert len(set(told)) == len(dict(told)) <= 10
        followers.append(len({after for before, after in pairwise(told) if before == told[0]}))
    assert min(followers) == 1 and max(followers) > 4, "from nearly a string to no order at all"


def test_a_tokenizer_of_this_text_has_each_symbol_as_one_token() -> None:
    forms: tuple[Form, ...] = ("strings", "lists", "facts")
    texts = [document.text for form in forms for document in recall_documents(400, (30, 200), 0, form)]
    tokenizer = train_tokenizer(texts, SMALLEST + 120)
    assert all(len(tokenizer.encode(key + value)) == 2 for key in ALL.keys for value in ALL.values[::7])


def test_recipes_ask_for_what_no_fact_has() -> None:
    needle = load_extend(RECIPES / "needle-3-long.toml").needle
    assert needle is not None
    assert (needle.keys, needle.values) == HELD_OUT
    assert set(load_extend(RECIPES / "needle-2-facts.toml").data.sources) == {"strings", "lists", "facts"}


def test_words_have_no_marks_and_no_digits() -> None:
    assert find_words("a #1 fact, of 20:\nb") == ["a", "fact,", "of", ":", "b"]


def test_no_documents_and_no_words_are_refused() -> None:
    with pytest.raises(ValueError, match="0 documents of 20 to 100 words are asked for"):
        list(recall_documents(0, (20, 100), 0))
    with pytest.raises(ValueError, match="no words to hide facts among"):
        list(recall_documents(1, (20, 100), 0, words=[]))
