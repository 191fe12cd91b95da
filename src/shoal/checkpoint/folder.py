"""A folder that appears whole or not at all.

It is filled under a hidden name beside its place, put on disk with fsync, and renamed. Its one law: whatever
happens on the way (an error, a full disk, a kill), the folder that was there before is still there and still
whole. Replacing one takes two renames; a kill exactly between them leaves both under their hidden names,
`.NAME.*.old` and `.new`.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(folder: Path, *, overwrite: bool, marker: str) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` if the block ends well and goes away if it does
    not.

    A folder that holds something is refused, unless `overwrite` and it is of the same kind: it has a file
    `marker`.
    """
    folder = folder.expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not overwrite:
            raise ValueError(
                f"{folder} is not empty; choose another place, or say overwrite=True to replace it"
            )
        if not (folder / marker).is_file():
            raise ValueError(f"{folder} is not replaced: it has no {marker}, so it holds something else")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.new")
    new.mkdir()
    try:
        yield new
        for path in (*new.iterdir(), new):
            _sync(path)
        _put(new, folder)
        _sync(folder.parent)
    finally:
        if new.exists():
            shutil.rmtree(new)


def _put(new: Path, folder: Path) -> None:
    old = new.with_suffix(".old")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    if old.exists():
        shutil.rmtree(old)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
