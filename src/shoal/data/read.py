"""Documents from files: which files, in which order, and which text is held out.

Plain files (.txt, .md, .py) are one document each, or one a megabyte, cut between lines; JSON Lines (.jsonl,
.jsonl.gz, .jsonl.zst) hold one a line, in its "text"; Parquet, and the .arrow files of Hugging Face datasets
(`save_to_disk`), one a row, in its column "text". The law: the same files give the same documents in the same
order, and whether a text is held out depends on what it says, not on where it lies or in which order it
comes. What cannot be read is an error that names the file and the place, or, for a caller who hands in a
`Reading`, is counted, quoted and skipped; blank documents are passed over. One document is in memory at a
time, of tables a few hundred. Tokens are left to text.py and shard.py.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

PLAIN = (".txt", ".md", ".py")
RECORDS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET, ARROW = ".parquet", ".arrow"
ROWS = 256  # decoded at a time

# What of the standard library is not its code: tests, other packages, an editor, and tables written as code
# (codecs, and help topics in one file of 0.7 MB that alone would decide a small held-out split).
NOT_LIBRARY = {"test", "tests", "site-packages", "dist-packages", "idlelib", "encodings", "pydoc_data"}

LONGEST_PLAIN = 1 << 20  # bytes; what a document costs in memory to encode is a hundred times its size

FEW_HELD_OUT = 8  # documents; with fewer, the share of the text they make up is left to chance


@dataclass(frozen=True)
class Document:
    text: str
    source: str  # where it came from, for people


@dataclass
class Reading:
    """How far a reader has come, and what it could not read: filled while it reads."""

    num_bytes: int = 0  # of the files, compressed as they are
    bad: int = 0
    quotes: list[str] = field(default_factory=list)  # of the first bad ones: what, where, first bytes

    def skip(self, fault: ValueError, data: bytes) -> None:
        self.bad += 1
        if len(self.quotes) < QUOTED:
            self.quotes.append(f"{fault}: {data[:QUOTED_BYTES]!r}")


QUOTED, QUOTED_BYTES = 20, 60


def read_documents(patterns: Sequence[str | Path], reading: Reading | None = None) -> Iterator[Document]:
    """The documents of files and globs (`**` crosses folders), in the order given, a glob's files by name.

    A file named twice is read once. A pattern without a file fails at the call. A fault in a file fails when
    it is reached; with a `Reading`, the record (of a damaged archive, its rest) is skipped and noted there.
    """
    return _read_some(find_files(patterns), reading)


def read_files(files: Sequence[Path], reading: Reading | None = None) -> Iterator[Document]:
    """As `read_documents`, of files that were found, and no text at all is no fault."""
    before, counted = 0, Reading() if reading is None else reading
    for file in files:
        for document in _read(file, counted, before, strict=reading is None):
            if document.text.strip():
                yield document
        before += file.stat().st_size
        counted.num_bytes = before


def find_files(patterns: Sequence[str | Path], more: Sequence[str] = ()) -> list[Path]:
    """The files that `read_documents` reads, in its order; `more` are endings to find besides."""
    known = (*PLAIN, *RECORDS, PARQUET, ARROW, *more)
    return list(dict.fromkeys(file for pattern in patterns for file in _find(str(pattern), known)))


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, decompressed by its ending."""
    with path.open("rb") as raw, _decompress(raw, path) as lines:
        yield from lines


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


def _find(pattern: str, known: tuple[str, ...]) -> list[Path]:
    path = Path(pattern).expanduser()
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


def _read_some(files: Sequence[Path], reading: Reading | None) -> Iterator[Document]:
    document = None
    for document in read_files(files, reading):
        yield document
    if document is None:
        raise ValueError(f"no text in {', '.join(map(str, files)) or 'no files'}; give files that have some")


def _read(path: Path, reading: Reading, before: int, *, strict: bool) -> Iterator[Document]:
    """`before` is the size of the files read before this one."""
    if path.name.endswith((PARQUET, ARROW)):
        parts = _read_table(path, reading, before)
    elif path.name.endswith(RECORDS):
        parts = _read_lines(path, reading, before)
    else:
        parts = _read_plain(path, reading, before)
    for part in parts:
        if isinstance(part, Document):
            yield part
        elif strict:
            raise part.fault from part.fault.__cause__
        else:
            reading.skip(part.fault, part.data)


@dataclass(frozen=True)
class _Bad:
    fault: ValueError
    data: bytes


def _read_plain(path: Path, reading: Reading, before: int) -> Iterator[Document | _Bad]:
    offset = 0
    with path.open("rb") as file:
        while data := b"".join(file.readlines(LONGEST_PLAIN)):
            try:
                yield Document(_decode(data, path, offset), str(path))
            except ValueError as fault:
                yield _Bad(fault, data)
            offset += len(data)
            reading.num_bytes = before + offset


def _read_lines(path: Path, reading: Reading, before: int) -> Iterator[Document | _Bad]:
    offset, line = 0, b""
    try:
        with path.open("rb") as raw, _decompress(raw, path) as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    text = _decode(line, path, offset)
                    if text.strip():
                        yield _read_record(text, f"{path}:{number}")
                except ValueError as fault:
                    yield _Bad(fault, line)
                offset += len(line)
                reading.num_bytes = before + raw.tell()
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        fault = ValueError(f"{path} is damaged ({error}); fetch or compress it again")
        fault.__cause__ = error
        yield _Bad(fault, line)


def _decompress(raw: BinaryIO, path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if path.suffix == ".zst":
        decompressor = zstandard.ZstdDecompressor()
        return io.BufferedReader(decompressor.stream_reader(raw, read_across_frames=True))
    return raw


def _read_table(path: Path, reading: Reading, before: int) -> Iterator[Document | _Bad]:
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow to be read: pip install 'shoal[data]'") from error
    row, batches = 0, _parquet_batches if path.name.endswith(PARQUET) else _arrow_batches
    try:
        with path.open("rb") as file:
            for batch, read in batches(file, path.stat().st_size):
                for record in batch.to_pylist():
                    row += 1
                    try:
                        yield _as_document(record, f"{path}:{row}")
                    except ValueError as fault:
                        yield _Bad(fault, repr(record).encode())
                reading.num_bytes = before + read
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        fault = ValueError(f"{path} is damaged ({error}); fetch it again")
        fault.__cause__ = error
        yield _Bad(fault, b"")


def _parquet_batches(file: BinaryIO, size: int) -> Iterator[tuple[Any, int]]:
    """Some rows, and how many bytes of the file they and those before are, about."""
    from pyarrow import parquet

    opened, rows = parquet.ParquetFile(file), 0
    columns = [name for name in ("text", "source") if name in opened.schema_arrow.names]
    for batch in opened.iter_batches(ROWS, columns=columns):
        rows += batch.num_rows
        yield batch, size * rows // max(opened.metadata.num_rows, 1)


def _arrow_batches(file: BinaryIO, size: int) -> Iterator[tuple[Any, int]]:
    """The same of a stream of record batches, which `datasets` writes a thousand rows long."""
    from pyarrow import ipc

    with ipc.open_stream(file) as stream:
        names = [name for name in ("text", "source") if name in stream.schema.names]
        for batch in stream:
            for first in range(0, batch.num_rows, ROWS):
                yield batch.select(names).slice(first, ROWS), file.tell()


def _read_record(line: str, place: str) -> Document:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON ({error}); each line must be one object") from error
    document = _as_document(record, place)
    try:
        document.text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place} has half a surrogate pair at character {error.start} of its text"
        ) from error
    return document


def _as_document(record: object, place: str) -> Document:
    if not isinstance(record, dict) or not isinstance(text := record.get("text"), str):
        raise ValueError(f'{place} has no text; each record must be an object with a string named "text"')
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
