"""Laws of the loader of CPU kernels: the object that was compiled, or an error that says why not."""

from __future__ import annotations

import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from shoal.ops.cpu import load
from shoal.ops.cpu.link import Code

pytestmark = pytest.mark.skipif(not load.supported(), reason="the kernels are for x86-64 under Linux")


def image() -> bytearray:
    assert load.refusal() is None
    return bytearray(load.object_path().read_bytes())


def test_what_is_missing_is_asked_for_by_name() -> None:
    asked: list[str] = []

    def resolve(name: str) -> int:
        asked.append(name)
        return 0

    code = Code(bytes(image()), resolve)
    assert "memset" in asked
    assert code["latent_step"] != code["moe_step"]
    with pytest.raises(KeyError):
        code["no_such_kernel"]


def test_another_machine_is_refused() -> None:
    broken = image()
    struct.pack_into("<H", broken, 18, 183)  # AArch64
    with pytest.raises(RuntimeError, match="x86-64"):
        Code(bytes(broken), lambda _: 0)
    with pytest.raises(RuntimeError, match="ELF"):
        Code(b"not an object", lambda _: 0)


def test_an_unknown_relocation_is_refused() -> None:
    broken = image()
    (headers,), (count,) = struct.unpack_from("<Q", broken, 40), struct.unpack_from("<H", broken, 60)
    for at in range(headers, headers + 64 * count, 64):
        _, kind, _, _, offset, _ = struct.unpack_from("<IIQQQQ", broken, at)
        if kind == 4:  # relocations
            struct.pack_into("<I", broken, offset + 8, 37)
    with pytest.raises(RuntimeError, match="kind 37"):
        Code(bytes(broken), lambda _: 0)


def test_who_waits_for_another_process_compiles_nothing(tmp_path: Path) -> None:
    import fcntl

    path = tmp_path / "kernels.o"
    with ThreadPoolExecutor(1) as threads:
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            waiting = threads.submit(load.compile_kernels, path)
            path.write_bytes(b"theirs")
        waiting.result()
    assert path.read_bytes() == b"theirs"


def test_llvm_is_not_loaded_to_decode() -> None:
    assert load.refusal() is None
    assert "llvmlite" not in sys.modules


def test_without_the_compiler_pytorch_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(load, "version", missing)
    monkeypatch.setattr(load, "_code", load._code.__wrapped__)  # what is loaded already stays loaded
    with pytest.warns(RuntimeWarning, match="numba"):
        assert load.refusal.__wrapped__() is not None
