"""Documents from files: which files, in which order, and which text is held out.

Plain files (.txt, .md, .py) are one document each, or one a megabyte, cut between lines; JSON Lines (.jsonl,
.jsonl.gz, .jsonl.zst) hold one a line, in its "text". The law: the same files give the same documents in the
same order, and whether a text is held out depends on what it says, not on where it lies or in which order it
comes. What cannot be read is an error that names the file and the place; only blank documents are passed
over. Tokens are left to text.py and shard.py.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import zstandard

PLAIN = (".txt", ".md", ".py")
RECORDS = (".jsonl", ".jsonl.gz", ".jsonl.zst")

# What of the standard library is not its code: tests, other packages, an editor, and tables written as code
# (codecs, and help topics in one file of 0.7 MB that alone would decide a small held-out split).
NOT_LIBRARY = {"test", "tests", "site-packages", "dist-packages", "idlelib", "encodings", "pydoc_data"}

LONGEST_PLAIN = 1 << 20  # bytes; what a document costs in memory to encode is a hundred times its size

FEW_HELD_OUT = 8  # documents; with fewer, the share of the text they make up is left to chance


@dataclass(frozen=True)
class Document:
    text: str
    source: str  # where it came from, for people


def read_documents(patterns: Sequence[str | Path]) -> Iterator[Document]:
    """The documents of files and globs (`**` crosses folders), in the order given, a glob's files by name.

    A file named twice is read once. A pattern without a file fails at the call, a fault in a file when it is
    reached.
    """
    files = list(dict.fromkeys(file for pattern in patterns for file in _find(str(pattern))))
    return _read_all(files)


def standard_library() -> Iterator[Document]:
    """The modules of the running Python's standard library, by name: 9.2 MB in 548 files in CPython 3.11.

    Real text that every machine has. `source` is the path inside the library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in NOT_LIBRARY)
        for path in (Path(folder, name) for name in sorted(files) if name.endswith(".py")):
            if (text := _decode(path.read_bytes(), path)).strip():
                yield Document(text, path.relative_to(root).as_posix())


def split_documents(
    documents: Iterable[Document], holdout_fraction: float
) -> tuple[list[Document], list[Document]]:
    """Those to train on, and those held out: about `holdout_fraction` of the text.

    A hash of the text decides, so exact copies stay on one side. Where fewer than 8 documents would be held
    out, the tail of each one is, from the start of a line.
    """
    if not 0 < holdout_fraction < 1:
        raise ValueError(f"holdout fraction is {holdout_fraction}; it must lie between 0 and 1")
    train: list[Document] = []
    held_out: list[Document] = []
    documents = list(documents)
    few = len(documents) * holdout_fraction < FEW_HELD_OUT
    for document in documents:
        if few:
            head, tail = _cut_tail(document, holdout_fraction)
            train += [head] if head.text else []
            held_out += [tail] if tail.text else []
        else:
            (held_out if _draw(document.text) < holdout_fraction else train).append(document)
    if not train or not held_out:
        size = sum(len(document.text) for document in documents)
        raise ValueError(f"{size} characters are too few to hold out {holdout_fraction:.1%}; give more text")
    return train, held_out


def _draw(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, uniform over texts."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest()) / 2**48


def _cut_tail(document: Document, fraction: float) -> tuple[Document, Document]:
    text, source = document.text, document.source
    near = int(len(text) * (1 - fraction))
    line = text.find("\n", near) + 1
    cut = line if 0 < line < len(text) else near
    return Document(text[:cut], source), Document(text[cut:], source)


def _find(pattern: str) -> list[Path]:
    path, known = Path(pattern).expanduser(), PLAIN + RECORDS
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name its files, for example '{path}/**/*.txt'")
    if path.is_file():
        if not path.name.endswith(known):
            raise ValueError(f"cannot read {path}; convert it to one of {', '.join(known)}")
        return [path.resolve()]
    # Path.glob would walk into .git and .venv.
    matches = [match for match in map(Path, glob.glob(str(path), recursive=True)) if match.is_file()]  # noqa: PTH207
    files = sorted(match.resolve() for match in matches if match.name.endswith(known))
    if matches and not files:
        raise ValueError(f"none of the {len(matches)} files of '{pattern}' is one of {', '.join(known)}")
    if not files:
        raise ValueError(f"no such file: '{pattern}'")
    return files


def _read_all(files: Sequence[Path]) -> Iterator[Document]:
    count = 0
    for file in files:
        for document in _read(file):
            if document.text.strip():
                count += 1
                yield document
    if count == 0:
        raise ValueError(f"no text in {', '.join(map(str, files)) or 'no files'}; give files that have some")


def _read(path: Path) -> Iterator[Document]:
    return _read_records(path) if path.name.endswith(RECORDS) else _read_plain(path)


def _read_plain(path: Path) -> Iterator[Document]:
    offset = 0
    with path.open("rb") as file:
        while data := b"".join(file.readlines(LONGEST_PLAIN)):
            yield Document(_decode(data, path, offset), str(path))
            offset += len(data)


def _read_records(path: Path) -> Iterator[Document]:
    offset = 0
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                text = _decode(line, path, offset)
                offset += len(line)
                if text.strip():
                    yield _read_record(text, f"{path}:{number}")
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch or compress it again") from error


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path))
    if path.suffix == ".zst":
        decompressor = zstandard.ZstdDecompressor()
        return io.BufferedReader(decompressor.stream_reader(path.open("rb"), read_across_frames=True))
    return path.open("rb")


def _read_record(line: str, place: str) -> Document:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error}); each line must be one object") from error
    if not isinstance(record, dict) or not isinstance(text := record.get("text"), str):
        raise ValueError(f'{place} has no text; each line must be an object with a string named "text"')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place} has half a surrogate pair at character {error.start} of its text"
        ) from error
    source = record.get("source")
    return Document(text, source if isinstance(source, str) else place)


def _decode(data: bytes, path: Path, offset: int = 0) -> str:
    """`offset` is where `data` starts in the file, decompressed."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        place = offset + error.start
        raise ValueError(
            f"{path} is not UTF-8 at byte {place}; convert it, for example with iconv"
        ) from error
