"""Driver ABIs as data: ctypes structures, prototypes and numbers built from the tables in abi/*.json.

A table holds what the C headers of one API version define on 64-bit Linux:

- structs: size, alignment, version word where there is one; fields [name, type, offset, array length];
  bits [name, word type, word offset, first bit, width]. A dotted name is a member of an anonymous member.
- enums, constants: numbers. guids: the 16 bytes in memory as hex.
- functions, callbacks: [return type, argument types...].

Types are u8..u64, i8..i64, ulong, ptr, str (char pointer) and structure names (by value); `*` is a pointer.
Nothing is read or built before it is asked for; a class that differs from its table is never handed out.
"""

from __future__ import annotations

import ctypes
import json
import struct
import threading
from collections.abc import Callable, Iterable
from importlib import resources
from typing import Any, NamedTuple

from sidelane.errors import AbiError

NVENC_VERSIONS = ("13.0", "12.1", "11.1")  # newest first
CUVID_VERSION = "13.0"  # its additions to older drivers' layouts sit in space that stays zero

_lock = threading.RLock()  # one class per structure, whichever thread asks first
_tables: dict[str, Abi] = {}

_SCALARS: dict[str, type[Any]] = {
    "u8": ctypes.c_uint8,
    "u16": ctypes.c_uint16,
    "u32": ctypes.c_uint32,
    "u64": ctypes.c_uint64,
    "i8": ctypes.c_int8,
    "i16": ctypes.c_int16,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "ulong": ctypes.c_ulong,
    "ptr": ctypes.c_void_p,
    "str": ctypes.c_char_p,
}


class Record(ctypes.Structure):
    """Base of all driver structures: born zeroed with version words set; unknown field names are refused."""

    __slots__ = ()
    _template_: bytes

    def __init__(self, **values: object) -> None:
        super().__init__()
        ctypes.memmove(ctypes.byref(self), self._template_, len(self._template_))
        for name, value in values.items():
            setattr(self, name, value)


class Choice(ctypes.Union):
    """Base of all driver unions."""

    __slots__ = ()
    _template_: bytes


class Abi:
    """One table: structures, numbers and prototypes by name. Raises AbiError for a name it does not have."""

    def __init__(self, name: str, table: dict[str, Any]) -> None:
        self.name = name
        self.soname: str = table["library"]
        self._table = table
        self._types: dict[str, type[Any]] = {}
        self._numbers: dict[str, int] = dict(table.get("constants", {}))
        for enum in table["enums"].values():
            self._numbers |= enum

    @property
    def structs(self) -> Iterable[str]:
        """Names of the structures and unions."""
        return self._section("structs").keys()

    def struct(self, name: str) -> type[Any]:
        """The ctypes class of structure or union `name`; its instances are born with their version word."""
        with _lock:
            if name not in self._types:
                self._types[name] = self._build_entry(name, self._entry("structs", name))
            return self._types[name]

    def number(self, name: str) -> int:
        """Value of enumerator or constant `name`."""
        if name not in self._numbers:
            raise AbiError(f"{self.name} has no number '{name}'")
        return self._numbers[name]

    def enum(self, name: str) -> dict[str, int]:
        """All enumerators of enumeration `name`."""
        return dict(self._entry("enums", name))

    def enumerator(self, enum: str, value: int) -> str:
        """Name of `value` in enumeration `enum`; the number itself when it has none."""
        return next((name for name, v in self._entry("enums", enum).items() if v == value), str(value))

    def guid(self, name: str) -> Any:
        """GUID `name` as a structure, to be passed by value."""
        raw = bytes.fromhex(self._entry("guids", name))
        return self.struct("GUID").from_buffer_copy(raw)

    def prototype(
        self, function: str, *, addresses: bool = False, hold_gil: bool = False
    ) -> Callable[[int], Callable[..., Any]]:
        """Maps an address to a callable with the signature of `function`.

        Calls release the GIL unless `hold_gil`. With `addresses` pointers are plain integers, unchecked.
        """
        result, *arguments = (self._type(t) for t in self._entry("functions", function))
        if addresses:
            arguments = [ctypes.c_void_p if issubclass(a, ctypes._Pointer) else a for a in arguments]
        return (ctypes.PYFUNCTYPE if hold_gil else ctypes.CFUNCTYPE)(result, *arguments)

    def callback(self, name: str) -> Callable[[Callable[..., int]], Any]:
        """Maps a Python function to a C function pointer of callback type `name`."""
        result, *arguments = (self._type(t) for t in self._entry("callbacks", name))
        return ctypes.CFUNCTYPE(result, *arguments)

    def _section(self, section: str) -> dict[str, Any]:
        found: dict[str, Any] = self._table.get(section, {})
        return found

    def _entry(self, section: str, name: str) -> Any:
        found = self._section(section).get(name)
        if found is None:
            raise AbiError(f"{self.name} has no {section[:-1]} '{name}'")
        return found

    def _type(self, name: str) -> type[Any]:
        if name.endswith("*"):
            return ctypes.POINTER(self._type(name[:-1]))
        return _SCALARS.get(name) or self.struct(name)

    def _build_entry(self, name: str, entry: dict[str, Any]) -> type[Any]:
        fields = [_Field(*f) for f in entry["fields"]]
        bits = [_Bits(*b) for b in entry.get("bits", ())]
        built = self._build(name, entry["kind"] == "union", fields, bits, entry["size"], entry["align"])
        if "version" in entry:
            template = bytearray(built._template_)
            struct.pack_into("<I", template, built.version.offset, entry["version"])
            built._template_ = bytes(template)
        return built

    def _build(
        self, name: str, union: bool, fields: list[_Field], bits: list[_Bits], size: int, align: int
    ) -> type[Any]:
        """The checked class of `size` bytes; raises AbiError where ctypes would place anything elsewhere."""
        members = [_Member(f.name, self._sized(f), f.offset) for f in fields if "." not in f.name]
        dotted = [f.name for f in fields if "." in f.name] + [b.name for b in bits if "." in b.name]
        for group in dict.fromkeys(d.partition(".")[0] for d in dotted):
            members.append(self._group(name, group, fields, bits))
        own_bits = [b for b in bits if "." not in b.name]
        for offset, word in dict.fromkeys((b.offset, b.word) for b in own_bits):
            members.append(_Member(f"_bits{offset}", _SCALARS[word], offset))
        placed = _fill_union(members, size, align) if union else _fill_struct(name, members, size)
        body: dict[str, Any] = {"__slots__": (), "_fields_": [(m.name, m.type) for m in placed]}
        body |= {b.name: b.descriptor() for b in own_bits}
        built = type(name, (Choice if union else Record,), body)
        _check(built, placed, size, align)
        template = bytearray(size)
        for m in members if not union else ():
            if issubclass(m.type, Record):
                template[m.offset : m.offset + ctypes.sizeof(m.type)] = m.type._template_
        built._template_ = bytes(template)  # type: ignore[attr-defined]
        return built

    def _sized(self, field: _Field) -> type[Any]:
        element = self._type(field.type)
        return element if field.length is None else element * field.length

    def _group(self, owner: str, group: str, fields: list[_Field], bits: list[_Bits]) -> _Member:
        """The anonymous member whose parts are `group.*` in the table, as a structure or union of its own."""
        mine = [f for f in fields if f.name.startswith(f"{group}.")]
        my_bits = [b for b in bits if b.name.startswith(f"{group}.")]
        start = min([f.offset for f in mine] + [b.offset for b in my_bits])
        skip = len(group) + 1
        inner = [f._replace(name=f.name[skip:], offset=f.offset - start) for f in mine]
        inner_bits = [b._replace(name=b.name[skip:], offset=b.offset - start) for b in my_bits]
        spans = [(f.offset, self._sized(f)) for f in inner]
        spans += [(b.offset, _SCALARS[b.word]) for b in inner_bits]
        align = max(ctypes.alignment(t) for _, t in spans)
        size = -(-max(at + ctypes.sizeof(t) for at, t in spans) // align) * align
        union = len(inner) > 1 and all(f.offset == 0 for f in inner)
        return _Member(group, self._build(f"{owner}.{group}", union, inner, inner_bits, size, align), start)


class _Field(NamedTuple):
    name: str
    type: str
    offset: int
    length: int | None = None


class _Bits(NamedTuple):
    name: str
    word: str
    offset: int
    first: int
    width: int

    def descriptor(self) -> property:
        word, name, first, top = f"_bits{self.offset}", self.name, self.first, (1 << self.width) - 1

        def get(record: Any) -> int:
            return int(getattr(record, word)) >> first & top

        def put(record: Any, value: int) -> None:
            if not 0 <= value <= top:
                raise ValueError(f"bit-field {name} holds 0..{top}, not {value}")
            setattr(record, word, getattr(record, word) & ~(top << first) | value << first)

        return property(get, put)


class _Member(NamedTuple):
    name: str
    type: type[Any]
    offset: int


def _fill_struct(name: str, members: list[_Member], size: int) -> list[_Member]:
    """Members by offset with every gap named, so that nothing depends on the padding ctypes would choose."""
    placed: list[_Member] = []
    end = 0
    for member in sorted(members, key=lambda m: m.offset):
        if member.offset < end:
            raise AbiError(f"{name}.{member.name} at {member.offset} overlaps the field before it")
        if member.offset > end:
            placed.append(_Member(f"_gap{end}", ctypes.c_uint8 * (member.offset - end), end))
        placed.append(member)
        end = member.offset + ctypes.sizeof(member.type)
    if end < size:
        placed.append(_Member(f"_gap{end}", ctypes.c_uint8 * (size - end), end))
    return placed


def _fill_union(members: list[_Member], size: int, align: int) -> list[_Member]:
    """Members and the space of those the table leaves out."""
    word = _SCALARS[f"u{8 * align}"]
    return [*members, _Member("_space", word * (size // align), 0)]


def _check(built: type[Any], placed: list[_Member], size: int, align: int) -> None:
    for member in placed:
        at = getattr(built, member.name).offset
        if at != member.offset:
            raise AbiError(f"{built.__name__}.{member.name} is built at {at}, the table says {member.offset}")
    if ctypes.sizeof(built) != size or ctypes.alignment(built) != align:
        got = f"{ctypes.sizeof(built)} bytes aligned to {ctypes.alignment(built)}"
        raise AbiError(f"{built.__name__} is built as {got}, the table says {size} aligned to {align}")


def load(name: str) -> Abi:
    """Table `name`: "cuda", "cuvid-13.0", "nvenc-12.1", ... Raises AbiError if there is none."""
    with _lock:
        if name not in _tables:
            file = resources.files("sidelane.codec") / "abi" / f"{name}.json"
            if not file.is_file():
                raise AbiError(f"there is no table '{name}'; NVENC has {', '.join(NVENC_VERSIONS)}")
            _tables[name] = Abi(name, json.loads(file.read_text(encoding="utf-8")))
        return _tables[name]
