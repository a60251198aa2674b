"""C declarations of the NVENC interface written from the driver tables, for the emulated driver.

The compiler places every member by its own rules and refuses what is not where the table says. Beside the
declarations come, for every structure, the bits that its layout reserves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from itertools import groupby
from typing import Any

TYPES = {"u8": "uint8_t", "u16": "uint16_t", "u32": "uint32_t", "u64": "uint64_t", "ptr": "void *"} | {
    f"i{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)
}
SIZES = {"u8": 1, "u16": 2, "u32": 4, "u64": 8, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "ptr": 8}


def header(version: str, public: bool = False) -> str:
    """The header of API `version`, "13.0" for example; with `public` on top of NVIDIA's own (11.1 alone)."""
    text = (resources.files("sidelane.codec") / "abi" / f"nvenc-{version}.json").read_text()
    table = json.loads(text)
    major, minor = table["api"]
    lines = ["#pragma once", "#include <stddef.h>", "#include <stdint.h>"]
    lines += [f"#define API_CODE {major << 4 | minor}", f"#define CREATE_INSTANCE {entry_point(version)}"]
    if public:
        lines += ["#include <ffnvcodec/dynlink_cuda.h>", "#include <ffnvcodec/nvEncodeAPI.h>"]
    else:
        lines += declarations(table)
    lines.append("struct span { uint32_t offset, size; uint8_t mask; };")
    for name in table["structs"]:
        spans = "".join(f"{{{at}, {size}, {mask}}}, " for at, size, mask in _spans(reserved(table, name)))
        lines.append(
            f"__attribute__((unused)) static const struct span {name}_reserved[] = {{{spans}{{0}}}};"
        )
    return "\n".join([*lines, ""])


def entry_point(version: str) -> str:
    """Name of the function that hands out the function list of `version`."""
    return f"create_instance_{version.replace('.', '_')}"


def declarations(table: dict[str, Any]) -> Iterator[str]:
    for name, values in table["enums"].items():
        body = ", ".join(f"{key} = {value}" for key, value in values.items())
        yield f"typedef enum {{ {body} }} {name};"
    for name, value in table["constants"].items():
        yield f"#define {name} {value}u"
    for name, entry in table["structs"].items():
        yield from _declaration(name, entry)
    for name, raw in table["guids"].items():
        numbers = ", ".join(f"0x{byte:02x}" for byte in bytes.fromhex(raw))
        yield f"static const union {{ uint8_t raw[16]; GUID guid; }} {name}_BYTES = {{{{{numbers}}}}};"
        yield f"#define {name} {name}_BYTES.guid"


def _declaration(name: str, entry: dict[str, Any]) -> Iterator[str]:
    members = [
        ((offset, -1), _member(field, kind, *length)) for field, kind, offset, *length in entry["fields"]
    ]
    members += [
        ((offset, first), f"{TYPES[word]} {field} : {width};")
        for field, word, offset, first, width in entry.get("bits", ())
    ]
    if entry["kind"] == "union":  # of the members that the table leaves out
        members.append(((0, 64), f"uint64_t space[{entry['size'] // 8}];"))
    yield f"typedef {entry['kind']} {{ {' '.join(text for _, text in sorted(members))} }} {name};"
    yield f'_Static_assert(sizeof({name}) == {entry["size"]}, "size of {name}");'
    yield f'_Static_assert(_Alignof({name}) == {entry["align"]}, "alignment of {name}");'
    for field, _, offset, *_ in entry["fields"]:
        yield f'_Static_assert(offsetof({name}, {field}) == {offset}, "{name}.{field}");'
    if "version" in entry:
        yield f"#define {name}_VER {entry['version']}u"


def _member(field: str, kind: str, length: int | None = None) -> str:
    return f"{TYPES.get(kind, kind)} {field}{'' if length is None else f'[{length}]'};"


def reserved(table: dict[str, Any], name: str) -> bytes:
    """One byte per byte of structure `name` with the bits set that must be zero."""
    entry = table["structs"][name]
    mask = bytearray(entry["size"])
    fields = entry["fields"][:1] if entry["kind"] == "union" else entry["fields"]
    for field, kind, offset, *length in fields:
        element = bytes(SIZES[kind]) if kind in SIZES else reserved(table, kind)
        if field.startswith("reserved"):
            element = b"\xff" * len(element)
        mask[offset : offset + len(element) * (length or [1])[0]] = element * (length or [1])[0]
    for field, _, offset, first, width in entry.get("bits", ()):
        if field.startswith("reserved"):
            bits = int.from_bytes(mask[offset : offset + 4], "little") | (1 << width) - 1 << first
            mask[offset : offset + 4] = bits.to_bytes(4, "little")
    return bytes(mask)


def _spans(mask: bytes) -> Iterator[tuple[int, int, int]]:
    """(offset, size, bits) of the runs of equal bytes that are not zero."""
    at = 0
    for byte, run in groupby(mask):
        size = len(list(run))
        if byte:
            yield at, size, byte
        at += size
