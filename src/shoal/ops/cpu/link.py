"""Machine code into this process: an ELF object for x86-64, its sections in memory, its references filled in.

What a linker and a loader do, as far as the CPU kernels need it. LLVM can do it too, but its library stays in
memory for good, 40 MiB that every user of a small model would carry. The object is compiled for the large
code model, where a reference is an address of 64 bits, absolute or from where it stands: two kinds of
relocation, and any other is refused.

The law: memory is written before it can be executed, never both at once.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Callable
from typing import NamedTuple

_MAGIC, _X86_64 = b"\x7fELF\x02\x01\x01", 62
_RELA, _NOBITS, _UNWIND = 4, 8, 0x70000001  # sh_type
_ALLOC = 2  # sh_flags: part of the program
_ABSOLUTE, _RELATIVE = 1, 24  # R_X86_64_64, R_X86_64_PC64
_READ_EXECUTE = mmap.PROT_READ | mmap.PROT_EXEC


class _Section(NamedTuple):
    """A section header, as the ABI orders it."""

    name: int
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entry: int


class Code:
    """The functions of an object, callable for as long as this lives.

    `resolve` names the address of what the object calls and does not have. RuntimeError where the object is
    of another machine or asks for more than is known here.
    """

    def __init__(self, image: bytes, resolve: Callable[[str], int]) -> None:
        if not image.startswith(_MAGIC) or struct.unpack_from("<H", image, 18)[0] != _X86_64:
            raise RuntimeError("the compiled kernels are no ELF object for x86-64")
        # 1. Sections that are part of the program, one after another. Unwinding is for exceptions: there are
        #    none.
        (headers,), (count,) = struct.unpack_from("<Q", image, 40), struct.unpack_from("<H", image, 60)
        sections = [
            _Section(*struct.unpack_from("<IIQQQQIIQQ", image, headers + 64 * i)) for i in range(count)
        ]
        places: dict[int, int] = {}
        end = 0
        for index, section in enumerate(sections):
            if section.flags & _ALLOC and section.type != _UNWIND:
                places[index] = -(-end // max(section.align, 1)) * max(section.align, 1)
                end = places[index] + section.size
        self._memory = mmap.mmap(-1, max(end, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        handle = ctypes.c_char.from_buffer(self._memory)
        self._base = ctypes.addressof(handle)
        del handle
        for index, place in places.items():
            section = sections[index]
            if section.type != _NOBITS:
                self._memory[place : place + section.size] = image[
                    section.offset : section.offset + section.size
                ]
        # 2. References.
        self._symbols: dict[str, int] = {}
        for section in sections:
            if section.type != _RELA or section.info not in places:
                continue
            symbols = self._addresses(image, sections, sections[section.link], places, resolve)
            for at in range(section.offset, section.offset + section.size, 24):
                offset, info, addend = struct.unpack_from("<QQq", image, at)
                place = places[section.info] + offset
                value, kind = symbols[info >> 32] + addend, info & 0xFFFFFFFF
                if kind == _RELATIVE:
                    value -= self._base + place
                elif kind != _ABSOLUTE:
                    raise RuntimeError(f"the compiled kernels have a relocation of kind {kind}, not 1 or 24")
                struct.pack_into("<Q", self._memory, place, value & (2**64 - 1))
        # 3. From now on code.
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(self._base), ctypes.c_size_t(len(self._memory)), _READ_EXECUTE):
            raise RuntimeError(f"this machine forbids new code in memory (errno {ctypes.get_errno()})")

    def __getitem__(self, name: str) -> int:
        """The address of a function."""
        return self._symbols[name]

    def _addresses(
        self,
        image: bytes,
        sections: list[_Section],
        table: _Section,
        places: dict[int, int],
        resolve: Callable[[str], int],
    ) -> list[int]:
        names = sections[table.link].offset
        addresses = []
        for at in range(table.offset, table.offset + table.size, 24):
            name, _, _, index, value, _ = struct.unpack_from("<IBBHQQ", image, at)
            text = image[names + name : image.index(b"\0", names + name)].decode()
            if index in places:
                addresses.append(self._base + places[index] + value)
                self._symbols[text] = addresses[-1]
            else:
                addresses.append(resolve(text) if text and index == 0 else 0)
        return addresses
