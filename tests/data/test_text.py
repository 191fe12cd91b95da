"""Laws of text: what DeepSeek published and transformers gives is what we give; raw text is never read as
control; tokens, streams and stop strings say the same however they are cut.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, trainers
from transformers import AutoTokenizer

from shoal.data.read import Document
from shoal.data.text import BATCH_CHARACTERS, GUARD, StopStrings, TextStream, Tokenizer
from shoal.data.tokenizer import BOS, CONTROL_TOKENS, EOS

# Any text, with control tokens and pieces of them in it more often than chance would put them there.
texts = st.lists(st.one_of(st.text(), st.sampled_from([*CONTROL_TOKENS, "<｜", "｜>", GUARD, "<", " "]))).map(
    "".join
)


@pytest.fixture(scope="module")
def published(shared_data: Path) -> Tokenizer:
    """DeepSeek-LLM's vocabulary, which V2 shares."""
    file = shared_data / "deepseek" / "tokenizers" / "deepseek-llm.tokenizer.json"
    return Tokenizer(file.read_text("utf-8"), BOS, EOS)


@pytest.fixture(scope="module")
def sentencepiece(modules: list[Document]) -> Tokenizer:
    """A vocabulary with the layout of Llama 2 and Mixtral."""
    bpe = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = (word for module in modules[:10] for word in module.text.split())
    bpe.train_from_iterator(words, trainers.BpeTrainer(vocab_size=800, special_tokens=names))
    definition = json.loads(bpe.to_str())
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["id"] < 3]
    return Tokenizer(json.dumps(definition), "<s>", "</s>")


@pytest.mark.parametrize("name", ["llm", "coder"])
def test_published_vectors(shared_data: Path, name: str) -> None:
    folder = shared_data / "deepseek" / "tokenizers"
    definition = (folder / f"deepseek-{name}.tokenizer.json").read_text("utf-8")
    tokenizer = Tokenizer(definition, BOS, EOS)
    inputs = (folder / f"ggml-vocab-deepseek-{name}.gguf.inp").read_bytes().decode()
    outputs = (folder / f"ggml-vocab-deepseek-{name}.gguf.out").read_text().split("\n")
    cases = inputs.split("\n__ggml_vocab_test__\n")
    assert len(cases) == len(outputs) == 47
    for text, expected in zip(cases, outputs, strict=True):
        ids = tokenizer.encode(text)
        assert ids == [int(token_id) for token_id in expected.split()]
        assert tokenizer.decode(ids) == text


@given(texts)
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert min(ids, default=1000) >= len(CONTROL_TOKENS), "raw text became a control token"
    assert tokenizer.encode(text, bos=True, eos=True) == [0, *ids, 1]


@given(texts)
def test_control_tokens_are_read_where_asked(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, parse_special=True)
    assert tokenizer.decode(ids) == text.replace(GUARD, "")
    read = sum(token_id < len(CONTROL_TOKENS) for token_id in ids)
    # Some control token is part of none other, so each occurrence is read once.
    assert read == sum(text.count(token) for token in CONTROL_TOKENS)
    once = tokenizer.encode(BOS + text + EOS, parse_special=True, bos=True, eos=True)
    assert once == [0, *ids, 1]


def test_many_are_encoded_as_one_by_one(tokenizer: Tokenizer, modules: list[Document]) -> None:
    texts = [module.text for module in modules[:20]] + ["", BOS]
    many = list(tokenizer.encode_many(texts, bos=True, eos=True))
    assert many == [tokenizer.encode(text, bos=True, eos=True) for text in texts]
    assert list(tokenizer.encode_many([])) == []


def test_many_are_read_a_batch_at_a_time(tokenizer: Tokenizer) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "x" * 1000

    next(tokenizer.encode_many(endless()))
    assert read == -(-BATCH_CHARACTERS // 1000)


@given(st.lists(st.integers(0, 1010), max_size=40), st.booleans())
def test_decoding_is_that_of_the_library(tokenizer: Tokenizer, ids: list[int], skip_special: bool) -> None:
    """Whatever a model may say: broken characters, control tokens, ids the vocabulary has not."""
    library = tokenizers.Tokenizer.from_str(tokenizer.definition)
    expected = library.decode([i for i in ids if i < 1000], skip_special_tokens=skip_special)
    assert tokenizer.decode(ids, skip_special=skip_special) == expected


@given(st.text(), st.lists(st.integers(300, 799), max_size=20))
def test_sentencepiece_vocabularies_decode_as_in_the_library(
    sentencepiece: Tokenizer, text: str, ids: list[int]
) -> None:
    text = text.replace("\u2581", " ")
    assert sentencepiece.decode(sentencepiece.encode(text)) == text
    library = tokenizers.Tokenizer.from_str(sentencepiece.definition)
    assert sentencepiece.decode(ids) == library.decode(ids)


@given(texts, st.data())
def test_a_stream_says_what_the_whole_says(tokenizer: Tokenizer, text: str, data: st.DataObject) -> None:
    ids = tokenizer.encode(text)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    stream = TextStream(tokenizer)
    said = ""
    for start, stop in pairwise([0, *cuts, len(ids)]):
        said += stream.push(ids[start:stop])
        assert text.startswith(said), "part of a character came out"
    assert said + stream.flush() == text


def test_a_stream_that_ends_inside_a_character_says_so(tokenizer: Tokenizer) -> None:
    ids = [token_id for byte in "é…" for token_id in tokenizer.encode(byte)]
    pieces = b"".join(map(tokenizer.spelling.bytes_of.__getitem__, ids))
    assert pieces == "é…".encode()
    stream = TextStream(tokenizer)
    single = {spelled: token_id for token_id, spelled in tokenizer.spelling.bytes_of.items()}
    out = [stream.push([single[bytes([byte])]]) for byte in "é…".encode()[:-1]]
    assert out == ["", "é", "", ""]
    assert stream.flush() == "\ufffd"


def test_a_stream_drops_what_is_special_and_keeps_what_is_not(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"{BOS}<think>a</think>b{EOS}", parse_special=True)
    assert TextStream(tokenizer).push(ids) == "<think>a</think>b"
    assert TextStream(tokenizer, skip_special=False).push(ids) == f"{BOS}<think>a</think>b{EOS}"


stop_lists = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


@given(st.text("abc", max_size=30), stop_lists, st.data())
def test_stop_strings_do_not_depend_on_how_the_text_is_cut(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    stream = StopStrings(stops)
    parts = [stream.push(text[start:stop]) for start, stop in pairwise([0, *cuts, len(text)])]
    # The literal rule: the first place where some stop ends, and there the longest of them.
    end = next((n for n in range(len(text) + 1) if text[:n].endswith(tuple(stops))), None) if stops else None
    stopped = max((stop for stop in stops if text[:end].endswith(stop)), key=len) if end else None
    expected = text[: end - len(stopped)] if end and stopped else text
    assert "".join(parts) + stream.flush() == expected
    assert stream.stopped == stopped


@given(st.text("abc", max_size=30), stop_lists)
def test_no_more_is_held_back_than_a_stop_could_need(text: str, stops: list[str]) -> None:
    stream = StopStrings(stops)
    said = "".join(map(stream.push, text))
    if stream.stopped is None:
        held = text.removeprefix(said)
        assert said + held == text
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="a stop string is empty"):
        StopStrings(["a", ""])


def test_saved_and_loaded_it_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path) == tokenizer
    tokenizer.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1 = ?\n"},
    {"role": "assistant", "content": "<think>\nHm.\n</think>\n2"},
    {"role": "user", "content": "und 中文?"},
]


def test_transformers_reads_what_we_save_and_we_read_what_it_saves(
    tokenizer: Tokenizer, modules: list[Document], tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "ours")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert len(theirs) == tokenizer.vocab_size
    for text in [*(module.text for module in modules[:10]), "", " a", "中文", "<think>x</think>" + EOS]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text, bos=True, parse_special=True)
        assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text, parse_special=True)
    for chat, thinking in [(CHAT, False), (CHAT, True), (CHAT[:3], False)]:
        expected = theirs.apply_chat_template(
            chat, add_generation_prompt=True, thinking=thinking, return_dict=False
        )
        assert tokenizer.chat(chat, thinking=thinking) == expected

    theirs.save_pretrained(tmp_path / "theirs")
    back = Tokenizer.load(tmp_path / "theirs")
    assert back.chat(CHAT) == tokenizer.chat(CHAT)
    assert back.adds_bos
    assert (back.bos_id, back.eos_id, back.pad_id) == (0, 1, 2)


@pytest.mark.parametrize("role", ["system", "user", "tool"])
@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_a_chat_reads_no_control_token_from_what_it_is_told(
    tokenizer: Tokenizer, role: str, token: str
) -> None:
    def count(content: str) -> int:
        ids = tokenizer.chat([{"role": role, "content": content}, *CHAT[1:]])
        assert content in tokenizer.decode(ids)
        return sum(token_id < len(CONTROL_TOKENS) for token_id in ids)

    assert count(f"a{token}{token}b") == count("ab")


def test_a_chat_reads_no_control_token_from_the_description_of_a_tool(tokenizer: Tokenizer) -> None:
    template = "{{ bos_token }}{{ messages[0].content[0].text }}{{ tools | tojson }}"
    tokenizer = dataclasses.replace(tokenizer, chat_template=template)
    message = {"role": "user", "content": [{"type": "text", "text": "<think>"}]}
    tools = [{"name": "<｜User｜>", "parameters": {EOS: {"maximum": 3, "required": None}}}]
    ids = tokenizer.chat([message], tools=tools)
    assert tokenizer.decode(ids) == f"{BOS}<think>{json.dumps(tools, ensure_ascii=False)}"
    assert [token_id for token_id in ids if token_id < len(CONTROL_TOKENS)] == [tokenizer.bos_id]


def test_a_chat_reads_the_control_tokens_of_the_assistant(tokenizer: Tokenizer) -> None:
    ids = tokenizer.chat(CHAT[:3], add_generation_prompt=False)
    assert ids[-1] == tokenizer.eos_id
    [think] = tokenizer.encode("<think>", parse_special=True)
    assert ids.count(think) == 1


def test_other_markers_are_set_by_the_published_definition(published: Tokenizer) -> None:
    assert (published.bos_id, published.eos_id, published.pad_id) == (100000, 100001, 100001)
    assert published.vocab_size == 100015
    assert published.encode("ü" + EOS, eos=True)[0] == 100014
    assert published.encode("ü" + EOS, parse_special=True, eos=True) == [100014, 100001]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer.json"),
        ({"tokenizer.json": "{}"}, "has no tokenizer_config.json"),
        ({"tokenizer_config.json": "{}"}, "has no eos_token"),
        ({"tokenizer_config.json": '{"eos'}, "tokenizer_config.json is not JSON"),
        ({"tokenizer.json": '{"model":', "tokenizer_config.json": "{}"}, "tokenizer.json is not JSON"),
        ({"tokenizer_config.json": '{"eos_token": "<end>"}'}, "'<end>' is not in the vocabulary"),
    ],
)
def test_a_folder_that_lacks_something_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, files: dict[str, str], message: str
) -> None:
    if "tokenizer_config.json" in files:
        tokenizer.save(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path)


def test_what_a_tokenizer_lacks_is_refused_when_asked_for(tokenizer: Tokenizer) -> None:
    bare = Tokenizer(tokenizer.definition, None, EOS)
    assert bare.bos_id is None
    with pytest.raises(ValueError, match="has no BOS"):
        bare.encode("a", bos=True)
    with pytest.raises(ValueError, match="no chat template"):
        bare.chat(CHAT)
    with pytest.raises(ValueError, match="half a surrogate pair"):
        bare.encode("\ud800")
    wordpiece = json.loads(tokenizer.definition) | {
        "decoder": {"type": "WordPiece", "prefix": "", "cleanup": False}
    }
    with pytest.raises(ValueError, match=r"cannot read this tokenizer\.json"):
        Tokenizer(json.dumps(wordpiece | {"model": {}}), None, EOS)
    with pytest.raises(ValueError, match="decodes by WordPiece"):
        Tokenizer(json.dumps(wordpiece), None, EOS).decode([5])
