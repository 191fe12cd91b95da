"""The compiled CPU kernels of this machine: found in the cache, or compiled into it, and loaded.

The object file lies beside the sources where that folder can be written, else in the user's cache, and is
named by a hash of the sources, of LLVM's and numba's versions and of the processor: nothing is ever out of
date, and two machines may share a folder. The first use on a machine takes some seconds, in a process of its
own; from then on 20 ms.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from shoal.ops.cpu.link import Code

_NEVER = ("numba_", "NRT_", "Py")  # what numba would call if a kernel could raise

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SLOT = {_P: "Q", _I: "q", _F: "f4x"}  # an argument in memory, 8 bytes
_TYPES = {  # the signatures of `kernels/`, as ctypes has them
    "norm_step": (_P, _I, _I, _P, _F, _P),
    "greedy_step": (_P, _P, _I, _I, _P, _P),
    "record_step": (_P, _P, _P, _P, _P, _P, _P, _I, _I, _I, _I, _I, _I, _P),
}
TEAMS = {  # of those for one thread or several, which part of how many comes last
    "latent_step": (
        *(_P, _I, _I, _P, _F, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _I, _F, _P, _P, _I),
        *(_P, _I, _I, _P, _P, _P, _P, _I, _I, _I, _I, _I, _I, _I, _I, _I, _F, _P, _P),
    ),
    "grouped_step": (
        *(_P, _I, _I, _P, _F, _P, _P, _P, _P, _P, _P, _I, _P, _P, _I, _P, _P, _I, _F, _P, _P, _I),
        *(_P, _I, _I, _P, _P, _P, _P, _I, _I, _I, _I, _I, _I, _F, _P, _P),
    ),
    "mlp_step": (_P, _I, _I, _P, _F, _P, _P, _P, _I, _P, _P),
    "moe_step": (
        *(_P, _I, _I, _P, _F, _P, _P, _I, _I, _I, _I, _I, _I, _I, _F),
        *(_P, _P, _I, _P, _P, _P, _I, _P, _P, _P, _P, _P, _P),
    ),
    "head_step": (_P, _I, _I, _P, _I, _P),
}


def supported() -> bool:
    return sys.platform == "linux" and platform.machine() == "x86_64"


def _folder() -> Path:
    beside = Path(__file__).parent / "__pycache__"
    if os.access(beside if beside.exists() else beside.parent, os.W_OK):
        return beside
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "shoal"


def _processor() -> bytes:
    """What code is made for: the name and the features of the first processor."""
    lines = Path("/proc/cpuinfo").read_bytes().partition(b"\n\n")[0].splitlines()
    told = (b"vendor_id", b"cpu family", b"model", b"stepping", b"flags")
    return b"|".join(line for line in lines if line.startswith(told))


def object_path() -> Path:
    """Where this machine's kernels are, or will be."""
    here = Path(__file__).parent
    sources = sorted([*(here / "kernels").glob("*.py"), here / "compile.py"])
    parts = [source.read_bytes() for source in sources]
    parts += [version("numba").encode(), version("llvmlite").encode(), _processor()]
    return _folder() / f"kernels-{sha256(b'|'.join(parts)).hexdigest()[:16]}.o"


def compile_kernels(path: Path) -> None:
    """Some seconds, told on stderr; of several processes that need them, one compiles and the others wait.

    RuntimeError with the compiler's last words if it fails.
    """
    import fcntl  # not everywhere, and these kernels are for Linux

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _compile(path)


def _compile(path: Path) -> None:
    sys.stderr.write("shoal: compiling kernels for this processor: some seconds, once for this machine\n")
    command = [sys.executable, "-m", "shoal.ops.cpu.compile", str(path)]
    found = str(Path(__file__).parents[3])  # this very package, however the parent found it
    paths = os.pathsep.join(filter(None, (found, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}, check=False
    )
    if done.returncode:
        raise RuntimeError(f"the CPU kernels did not compile: {done.stderr.strip().splitlines()[-1:]}")


@cache
def _code() -> Code:
    path = object_path()
    if not path.exists():
        compile_kernels(path)
    libc = ctypes.CDLL(None)

    def resolve(name: str) -> int:
        function = getattr(libc, "abort" if name.startswith(_NEVER) else name)
        return ctypes.cast(function, ctypes.c_void_p).value or 0

    return Code(path.read_bytes(), resolve)


@cache
def refusal() -> str | None:
    """Why this machine has no kernels; compiles them if it has none yet."""
    if not supported():
        return f"kernels are for x86-64 under Linux, and this is {platform.machine()} under {sys.platform}"
    try:
        _code()
    except (RuntimeError, OSError, AttributeError, PackageNotFoundError) as error:
        warnings.warn(f"{error}; decoding goes on by PyTorch, slower", RuntimeWarning, stacklevel=2)
        return str(error)
    return None


@cache
def kernel(name: str) -> Callable[..., int]:
    """A kernel by name. The interpreter's lock is released while it runs."""
    types = _TYPES[name] if name in _TYPES else (*TEAMS[name], _I, _I)
    return ctypes.CFUNCTYPE(_I, *types)(_code()[name])


@cache
def _layout(name: str) -> struct.Struct:
    return struct.Struct("=" + "".join(_SLOT[type_] for type_ in TEAMS[name]) + "q")


@cache
def _fork() -> Callable[..., None]:
    """GNU's call of a function by every thread of a team; PyTorch brings it, with the threads."""
    return ctypes.CFUNCTYPE(None, _P, _P, ctypes.c_uint, ctypes.c_uint)(("GOMP_parallel", ctypes.CDLL(None)))


def run(name: str, parts: int, *arguments: float) -> int:
    """The status of a kernel, run by that many threads of PyTorch's pool."""
    if parts == 1:
        return kernel(name)(*arguments, 0, 1)
    memory = bytearray(_layout(name).pack(*arguments, 0))
    _fork()(_code()[f"{name}_team"], ctypes.addressof(ctypes.c_char.from_buffer(memory)), parts, 0)
    return _layout(name).unpack(memory)[-1]
