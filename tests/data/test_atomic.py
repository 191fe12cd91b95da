"""Laws of the atomic write: the name holds the old content or the new, and nothing else is left behind.

The disk that fills up is a real limit of the kernel on the size of a file, not a stand-in.
"""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.data.atomic import write_atomically


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file grows beyond 4 KB: writing more is an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def _write(path: Path, content: bytes) -> None:
    with write_atomically(path) as file:
        file.write(content)


def _write_half(path: Path, error: type[BaseException]) -> None:
    with write_atomically(path) as file:
        file.write(b"half of the n")
        raise error


def test_the_name_holds_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "file"
    _write(path, b"old")
    _write(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    _write(path, b"old")
    with pytest.raises(error):
        _write_half(path, error)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    _write(path, b"old")
    with pytest.raises(OSError, match="File too large"):
        _write(path, bytes(1 << 20))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
