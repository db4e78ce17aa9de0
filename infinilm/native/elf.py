"""What an ELF file says of a library without running it: exports, needs, static initializers.

Layouts are those of the System V ABI, chapters 4 and 5, for 64-bit little-endian files.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from infinilm_hookspecs import PluginError

_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_SYMBOL: Final = struct.Struct("<IBBHQQ")
_DYNAMIC: Final = struct.Struct("<qQ")
_SHT_DYNAMIC, _SHT_DYNSYM, _SHT_INIT_ARRAY = 6, 11, 14
_DT_NEEDED: Final = 1
_STB_LOCAL, _STV_DEFAULT, _STV_PROTECTED = 0, 0, 3
_COMPILERS_INITIALIZERS: Final = 1  # frame_dummy, which every library that gcc or clang links has


@dataclass(frozen=True, slots=True)
class ElfReport:
    """`exports` are the names others may bind to, `needs` the libraries it asks for.

    `num_initializers` counts the functions that run while it is opened, those of the compiler left out.
    """

    exports: tuple[str, ...]
    needs: tuple[str, ...]
    num_initializers: int


class _Section(NamedTuple):
    name: int
    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry_size: int


def read_library(path: str | Path) -> ElfReport:
    """Return what the file at `path` says. Raises `PluginError` where it is no 64-bit little-endian ELF file."""
    try:
        data = Path(path).read_bytes()
    except OSError as err:
        raise PluginError(f"backend library {str(path)!r} cannot be read: {err.strerror}") from err
    if data[:6] != b"\x7fELF\x02\x01":
        raise PluginError(f"{str(path)!r} is no 64-bit little-endian ELF file, it begins with {data[:8]!r}")
    try:
        sections = list(_sections(data))
        return ElfReport(
            exports=tuple(sorted(_exports(data, sections))),
            needs=tuple(_needs(data, sections)),
            num_initializers=max(_size_of(sections, _SHT_INIT_ARRAY) // 8 - _COMPILERS_INITIALIZERS, 0),
        )
    except (struct.error, IndexError, ValueError, OverflowError) as err:
        raise PluginError(f"{str(path)!r} is a damaged ELF file: {err}") from err


def _sections(data: bytes) -> Iterator[_Section]:
    fields = _HEADER.unpack_from(data)
    start, entry_size, count = fields[6], fields[11], fields[12]
    for index in range(count):
        yield _Section(*_SECTION.unpack_from(data, start + index * entry_size))


def _size_of(sections: list[_Section], kind: int) -> int:
    return sum(section.size for section in sections if section.kind == kind)


def _exports(data: bytes, sections: list[_Section]) -> Iterator[str]:
    for section in (its for its in sections if its.kind == _SHT_DYNSYM):
        names = sections[section.link]
        for offset in range(section.offset, section.offset + section.size, _SYMBOL.size):
            name, info, other, index, _, _ = _SYMBOL.unpack_from(data, offset)
            if index and info >> 4 != _STB_LOCAL and other & 3 in (_STV_DEFAULT, _STV_PROTECTED):
                yield _string(data, names, name)


def _needs(data: bytes, sections: list[_Section]) -> Iterator[str]:
    for section in (its for its in sections if its.kind == _SHT_DYNAMIC):
        for tag, value in _DYNAMIC.iter_unpack(data[section.offset : section.offset + section.size]):
            if tag == _DT_NEEDED:
                yield _string(data, sections[section.link], value)


def _string(data: bytes, strings: _Section, offset: int) -> str:
    start = strings.offset + offset
    return data[start : data.index(b"\0", start)].decode("utf-8", "replace")
