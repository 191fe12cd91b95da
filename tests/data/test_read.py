"""Laws of reading: every container gives the same documents, every fault is named with its place, and the
split into training and held-out text loses nothing, ignores order, and keeps copies together.
"""

from __future__ import annotations

import ast
import gzip
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from shoal.data.read import (
    LONGEST_PLAIN,
    Document,
    Reading,
    read_documents,
    split_documents,
    standard_library,
)

RECORDS = [{"text": "one\r\ntwo", "source": "a:b"}, {"text": "中文\u2028é"}, {"text": "three", "lang": "en"}]
LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()

documents_strategy = st.lists(st.builds(Document, st.text(max_size=40), st.text(max_size=3)), max_size=30)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.jsonl.zst", zstandard.compress(LINES[:20]) + zstandard.compress(LINES[20:])),  # two frames
        ("blank.jsonl", b"\n" + LINES.replace(b"\n", b"\n  \n")),
    ],
)
def test_records_are_the_same_from_every_container(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    documents = list(read_documents([tmp_path / name]))
    assert [document.text for document in documents] == [record["text"] for record in RECORDS]
    assert documents[0].source == "a:b"
    assert documents[1].source.startswith(str(tmp_path / name))


def test_a_plain_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    data = "\ufefftab\t\r\nno newline at the end 中".encode()
    (tmp_path / "a.txt").write_bytes(data)
    [document] = read_documents([tmp_path / "a.txt"])
    assert document.text.encode() == data


def test_a_long_plain_file_is_cut_between_lines(tmp_path: Path) -> None:
    lines = [f"line {n} of a long book, in which one word is é\n" for n in range(60_000)]
    text = "".join(lines)
    (tmp_path / "a.txt").write_text(text, "utf-8")
    documents = list(read_documents([tmp_path / "a.txt"]))
    assert "".join(document.text for document in documents) == text
    assert [document.text[-1] for document in documents] == ["\n", "\n", "\n"]
    assert all(len(document.text.encode()) <= LONGEST_PLAIN + len(lines[-1]) + 1 for document in documents)
    (tmp_path / "a.txt").write_bytes(text.encode() + b"\xff")
    with pytest.raises(ValueError, match=f"is not UTF-8 at byte {len(text.encode())}"):
        list(read_documents([tmp_path / "a.txt"]))


def test_order_is_that_of_patterns_then_names_and_no_file_comes_twice(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "c.py", "deep/er/a.txt", "image.png", ".hidden/a.txt", "[x].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "blank.txt").write_text(" \n")
    patterns = [tmp_path / "c.py", tmp_path / "[x].txt", f"{tmp_path}/**/*", tmp_path / "c.py"]
    texts = [document.text for document in read_documents(patterns)]
    assert texts == ["c.py", "[x].txt", "a.md", "b.txt", "deep/er/a.txt"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"fine \xff", "a.txt is not UTF-8 at byte 5"),
        ("a.jsonl", LINES + b'{"text": "\xff"}', f"a.jsonl is not UTF-8 at byte {len(LINES) + 10}"),
        (
            "a.jsonl.gz",
            gzip.compress(LINES + b"\xc3", mtime=0),
            f"a.jsonl.gz is not UTF-8 at byte {len(LINES)}",
        ),
        ("a.jsonl", LINES + b'{"content": "x"}', "a.jsonl:4 has no text"),
        ("a.jsonl", b'["text"]\n', "a.jsonl:1 has no text"),
        ("a.jsonl", LINES + b'{"text": "cut', "a.jsonl:4 is not JSON"),
        ("a.jsonl", b'{"text": "x\\ud800"}\n', "a.jsonl:1 has half a surrogate pair at character 1"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-12], "a.jsonl.gz is damaged"),
        ("a.jsonl.zst", b"no archive at all", "a.jsonl.zst is damaged"),
        ("a.txt", b" \n\n", "no text in "),
        ("a.jsonl", b'{"text": " "}\n', "no text in "),
    ],
)
def test_a_fault_in_a_file_is_named_with_its_place(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(message)):
        list(read_documents([tmp_path / name]))


def test_a_pattern_without_files_fails_at_the_call(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    for pattern, message in [
        ("none.txt", "no such file: '"),
        ("*.txt", "no such file: '"),
        ("a.png", "cannot read "),
        ("*.png", "none of the 1 files of '"),
        (".", "is a folder; name its files"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            read_documents([tmp_path / pattern])
        assert str(tmp_path) in str(caught.value)


def test_the_published_sample_reads_the_same_from_both_containers(shared_data: Path) -> None:
    sample = shared_data / "pretrain" / "tiny-mixed.jsonl"
    documents = list(read_documents([f"{sample}.gz"]))
    assert documents == list(read_documents([f"{sample}.zst"]))
    assert len(documents) == 341


def test_the_standard_library_is_code_without_tests() -> None:
    documents = list(standard_library())
    assert documents == list(standard_library())
    assert sum(len(document.text) for document in documents) > 5_000_000
    sources = {document.source for document in documents}
    assert len(sources) == len(documents) >= 400
    assert {"json/decoder.py", "argparse.py"} <= sources
    assert not [source for source in sources if {"test", "tests", "site-packages"} & set(source.split("/"))]
    for document in documents[:50]:
        ast.parse(document.text)


def test_a_share_of_the_documents_is_held_out_by_their_text() -> None:
    documents = [Document(f"text {n}", str(n)) for n in range(10_000)]
    train, held_out = split_documents(documents, 0.05)
    assert sorted(train + held_out, key=lambda document: int(document.source)) == documents
    # Binomial: 500 with a standard deviation of 22; five of them happen once in a million texts, and these
    # are fixed.
    assert abs(len(held_out) - 500) < 110
    moved = [Document(document.text, "elsewhere") for document in reversed(documents)]
    assert {d.text for d in split_documents(moved, 0.05)[1]} == {d.text for d in held_out}


@given(documents_strategy, st.randoms())
def test_the_split_conserves_text_ignores_order_and_keeps_copies_together(
    documents: list[Document], random: object
) -> None:
    documents = [document for document in documents if document.text.strip()] + [
        Document(f"line {n}\nline\n", "") for n in range(40)
    ]
    documents += documents[:5]
    train, held_out = split_documents(documents, 0.3)
    assert Counter(train + held_out) == Counter(documents)
    assert not {d.text for d in train} & {d.text for d in held_out}
    random.shuffle(documents)  # pyright: ignore[reportAttributeAccessIssue]
    again = split_documents(documents, 0.3)
    assert [Counter(side) for side in again] == [Counter(train), Counter(held_out)]


@given(st.text(min_size=1))
def test_of_few_documents_the_tail_of_each_is_held_out(text: str) -> None:
    documents = [Document(text, "a"), Document("line\n" * 20, "b")]
    train, held_out = split_documents(documents, 0.1)
    for document in documents:
        parts = [part.text for part in train + held_out if part.source == document.source]
        assert "".join(parts) == document.text
    assert next(part.text for part in held_out if part.source == "b") == "line\n"


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2.0])
def test_an_impossible_fraction_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=f"holdout fraction is {fraction}"):
        split_documents([Document("a", "")] * 100, fraction)


def test_too_little_text_to_hold_out_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("1 characters are too few to hold out 5.0%")):
        split_documents([Document("a", "")], 0.05)


def test_what_cannot_be_read_is_counted_quoted_and_skipped(tmp_path: Path) -> None:
    damaged = gzip.compress(LINES * 3000, mtime=0)[:-12]
    (tmp_path / "a.jsonl").write_bytes(
        b"no JSON\n" + LINES + b'{"text": 1}\n' + b'{"text": "\xff"}\n' + LINES
    )
    (tmp_path / "b.jsonl.gz").write_bytes(damaged)
    (tmp_path / "c.txt").write_bytes(b"bad \xff")
    (tmp_path / "d.txt").write_bytes(b"good")
    reading = Reading()
    documents = list(read_documents([tmp_path / "*"], reading))
    assert [d.text for d in documents[:6]] == 2 * [record["text"] for record in RECORDS]
    assert documents[-1].text == "good"
    assert len(documents) > 2 * 3 + 1
    assert reading.bad == 5
    places = [
        "a.jsonl:1 is not JSON",
        "a.jsonl:5 has no text",
        "a.jsonl is not UTF-8 at byte",
        "b.jsonl.gz is damaged",
        "c.txt is not UTF-8 at byte 4",
    ]
    assert all(place in quote for place, quote in zip(places, reading.quotes, strict=True))
    assert reading.quotes[0].endswith(": b'no JSON\\n'")
    assert reading.num_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_read_as_their_lines_do(kind: str, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    file = tmp_path / f"a.{kind}"
    rows = [{"text": record["text"], "source": record.get("source"), "more": 1} for record in RECORDS]
    table = pyarrow.Table.from_pylist(
        [*rows, {"text": None, "source": "x", "more": 1}, {"text": "last", "more": 2}]
    )
    if kind == "parquet":
        parquet.write_table(table, file, row_group_size=2)
    else:
        with ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, 2)
    reading = Reading()
    documents = list(read_documents([file], reading))
    assert [document.text for document in documents] == [*(record["text"] for record in RECORDS), "last"]
    assert documents[0].source == "a:b"
    assert (reading.bad, reading.num_bytes) == (1, file.stat().st_size)
    assert f"a.{kind}:4 has no text" in reading.quotes[0]
    with pytest.raises(ValueError, match=rf"a\.{kind}:4 has no text"):
        list(read_documents([file]))
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="is damaged"):
        list(read_documents([file]))


def test_a_dataset_of_hugging_face_is_read_from_its_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    texts = [f"text {n}" for n in range(700)]
    datasets.Dataset.from_dict({"text": texts, "id": texts}).save_to_disk(tmp_path / "set", num_shards=2)
    assert [each.text for each in read_documents([str(tmp_path / "set" / "*.arrow")])] == texts


def test_parquet_without_its_library_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=re.escape("pip install 'shoal[data]'")):
        list(read_documents([tmp_path / "a.parquet"], Reading()))
