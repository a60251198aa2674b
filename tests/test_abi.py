"""The driver tables agree with themselves, with known numbers and (marker abi_probe) with the C headers."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidelane.codec._abi import NVENC_VERSIONS, Abi, load
from sidelane.errors import AbiError

TABLES = ("cuda", *(f"{lib}-{v}" for lib in ("cuvid", "nvenc") for v in ("11.1", "12.1", "13.0")))
API_VERSIONS = {"11.1": 11 | 1 << 24, "12.1": 12 | 1 << 24, "13.0": 13}

# Structure revisions of API 11.1, 12.1 and 13.0; a star stands for bit 31 of the version word.
REVISIONS = {
    "NV_ENC_CAPS_PARAM": "1 1 1",
    "NV_ENC_CREATE_BITSTREAM_BUFFER": "1 1 1",
    "NV_ENC_RC_PARAMS": "1 1 1",
    "NV_ENC_CONFIG": "7* 8* 9*",
    "NV_ENC_INITIALIZE_PARAMS": "5* 6* 7*",
    "NV_ENC_RECONFIGURE_PARAMS": "1* 1* 2*",
    "NV_ENC_PRESET_CONFIG": "4* 4* 5*",
    "NV_ENC_PIC_PARAMS": "4* 6* 7*",
    "NV_ENC_LOCK_BITSTREAM": "1 1* 2*",
    "NV_ENC_MAP_INPUT_RESOURCE": "4 4 4",
    "NV_ENC_REGISTER_RESOURCE": "3 4 5",
    "NV_ENC_SEQUENCE_PARAM_PAYLOAD": "1 1 1",
    "NV_ENC_OPEN_ENCODE_SESSION_EX_PARAMS": "1 1 1",
    "NV_ENC_ENCODE_OUT_PARAMS": "1 1 1",
    "NV_ENCODE_API_FUNCTION_LIST": "2 2 2",
}

SIZES = {
    ("nvenc-11.1", "NV_ENC_CONFIG"): 3584,
    ("nvenc-13.0", "NV_ENC_CONFIG"): 3584,
    ("nvenc-11.1", "NV_ENC_INITIALIZE_PARAMS"): 1808,
    ("nvenc-12.1", "NV_ENC_INITIALIZE_PARAMS"): 1808,
    ("nvenc-13.0", "NV_ENC_INITIALIZE_PARAMS"): 1800,
    ("nvenc-11.1", "NV_ENC_PIC_PARAMS"): 3344,
    ("nvenc-13.0", "NV_ENC_PIC_PARAMS"): 3360,
    ("nvenc-11.1", "NV_ENC_CODEC_PIC_PARAMS"): 1536,
    ("nvenc-12.1", "NV_ENC_CODEC_PIC_PARAMS"): 1552,
    ("nvenc-13.0", "NV_ENC_CODEC_PIC_PARAMS"): 1544,
    ("nvenc-12.1", "NV_ENC_LOCK_BITSTREAM"): 1552,
    ("nvenc-13.0", "NV_ENC_LOCK_BITSTREAM"): 1544,
    ("nvenc-13.0", "NV_ENCODE_API_FUNCTION_LIST"): 2552,
    ("cuvid-13.0", "CUVIDPICPARAMS"): 4280,
    ("cuvid-13.0", "CUVIDDECODECREATEINFO"): 176,
    ("cuvid-11.1", "CUVIDSOURCEDATAPACKET"): 32,
}

OFFSETS = {
    ("nvenc-11.1", "NV_ENC_PIC_PARAMS", "qpDeltaMap"): 1696,
    ("nvenc-12.1", "NV_ENC_PIC_PARAMS", "qpDeltaMap"): 1712,
    ("nvenc-13.0", "NV_ENC_CONFIG", "encodeCodecConfig"): 168,
    ("nvenc-13.0", "NV_ENC_CONFIG_HEVC", "outputBitDepth"): 200,
    ("nvenc-13.0", "NV_ENC_LOCK_BITSTREAM", "bitstreamBufferPtr"): 56,
    ("nvenc-13.0", "NV_ENC_REGISTER_RESOURCE", "registeredResource"): 32,
    ("nvenc-13.0", "NV_ENC_MAP_INPUT_RESOURCE", "mappedResource"): 24,
    ("nvenc-11.1", "NV_ENCODE_API_FUNCTION_LIST", "nvEncOpenEncodeSessionEx"): 240,
    ("cuvid-13.0", "CUVIDPROCPARAMS", "output_stream"): 56,
    ("cuvid-13.0", "CUVIDPARSERPARAMS", "pfnSequenceCallback"): 48,
}


def table(name: str) -> dict[str, Any]:
    text = (resources.files("sidelane.codec") / "abi" / f"{name}.json").read_text()
    found: dict[str, Any] = json.loads(text)
    return found


def bytes_set_by(record: Any, path: str, value: int) -> bytes:
    """The memory of `record` after the assignment `record.path = value`."""
    *outer, last = path.split(".")
    inner = record
    for name in outer:
        inner = getattr(inner, name)
    setattr(inner, last, value)
    return bytes(record)


@pytest.mark.parametrize("name", TABLES)
def test_every_structure_has_the_size_and_offsets_of_its_table(name: str) -> None:
    abi = load(name)
    for struct, entry in table(name)["structs"].items():
        built = abi.struct(struct)
        assert ctypes.sizeof(built) == entry["size"], struct
        assert ctypes.alignment(built) == entry["align"], struct
        for field, _, offset, *_ in entry["fields"]:
            if "." not in field:
                assert getattr(built, field).offset == offset, f"{struct}.{field}"


@pytest.mark.parametrize("name", TABLES)
def test_fields_of_a_table_do_not_overlap(name: str) -> None:
    abi = load(name)
    for struct, entry in table(name)["structs"].items():
        if entry["kind"] == "union":
            continue
        spans = set()
        for field, _, offset, *_ in entry["fields"]:
            group = field.partition(".")[0]
            at = getattr(abi.struct(struct), group)
            spans.add((at.offset, at.offset + at.size, group))
            assert at.offset <= offset < at.offset + at.size, f"{struct}.{field}"
        words = {
            (offset, offset + ctypes.sizeof(abi._type(word)), f"word {offset}")
            for field, word, offset, *_ in entry.get("bits", ())
            if "." not in field
        }
        ordered = sorted(spans | words)
        assert ordered[0][0] == 0 or struct == "NV_ENC_TIME_CODE", struct
        assert ordered[-1][1] <= entry["size"], struct
        for (_, end, before), (start, _, after) in pairwise(ordered):
            assert end <= start, f"{struct}: {before} overlaps {after}"


@pytest.mark.parametrize("version", API_VERSIONS)
def test_version_words(version: str) -> None:
    abi = load(f"nvenc-{version}")
    for struct, revisions in REVISIONS.items():
        revision = revisions.split()[list(API_VERSIONS).index(version)]
        word = API_VERSIONS[version] | int(revision.rstrip("*")) << 16 | 7 << 28
        word |= (1 << 31) * revision.endswith("*")
        assert abi.struct(struct)().version == word, struct
    versioned = {s for s, entry in table(f"nvenc-{version}")["structs"].items() if "version" in entry}
    assert versioned == set(REVISIONS)


def test_known_numbers() -> None:
    for (name, struct), size in SIZES.items():
        assert ctypes.sizeof(load(name).struct(struct)) == size, (name, struct)
    for (name, struct, field), offset in OFFSETS.items():
        assert getattr(load(name).struct(struct), field).offset == offset, (name, struct, field)
    abi = load("nvenc-13.0")
    assert abi.struct("NV_ENC_CONFIG")().version == 0xF009000D
    assert abi.number("NVENCAPI_VERSION") == 13
    assert abi.number("NV_ENC_BUFFER_FORMAT_YUV444_10BIT") == 0x100000
    assert abi.number("NV_ENC_CAPS_NUM_ENCODER_ENGINES") == 49
    assert abi.enumerator("NVENCSTATUS", 8) == "NV_ENC_ERR_INVALID_PARAM"
    assert abi.enumerator("NVENCSTATUS", 4711) == "4711"
    guid = abi.guid("NV_ENC_CODEC_HEVC_GUID")
    assert (guid.Data1, guid.Data2, guid.Data3) == (0x790CDC88, 0x4522, 0x4D7B)
    assert list(guid.Data4) == [0x94, 0x25, 0xBD, 0xA9, 0x97, 0x5F, 0x76, 0x03]


def test_nested_structures_are_born_with_their_versions() -> None:
    abi = load("nvenc-13.0")
    preset = abi.struct("NV_ENC_PRESET_CONFIG")()
    assert preset.presetCfg.version == abi.struct("NV_ENC_CONFIG")().version
    assert preset.presetCfg.rcParams.version == abi.struct("NV_ENC_RC_PARAMS")().version
    change = abi.struct("NV_ENC_RECONFIGURE_PARAMS")(forceIDR=1)
    assert change.reInitEncodeParams.version == abi.struct("NV_ENC_INITIALIZE_PARAMS")().version
    assert change.forceIDR == 1


@pytest.mark.parametrize("name", TABLES)
def test_a_bit_field_sets_its_bits_and_no_others(name: str) -> None:
    abi = load(name)
    for struct, entry in table(name)["structs"].items():
        for field, _, offset, first, width in entry.get("bits", ()):
            born = int.from_bytes(bytes(abi.struct(struct)()), "little")
            after = bytes_set_by(abi.struct(struct)(), field, (1 << width) - 1)
            mask = ((1 << width) - 1) << (8 * offset + first)
            assert int.from_bytes(after, "little") ^ born == mask, f"{struct}.{field}"


@given(split=st.integers(0, 15), vidmem=st.integers(0, 1), slices=st.integers(0, 1))
def test_bit_fields_of_one_word_are_independent(split: int, vidmem: int, slices: int) -> None:
    params = load("nvenc-13.0").struct("NV_ENC_INITIALIZE_PARAMS")()
    params.enableOutputInVidmem, params.splitEncodeMode, params.reportSliceOffsets = vidmem, split, slices
    assert (params.enableOutputInVidmem, params.splitEncodeMode) == (vidmem, split)
    assert int.from_bytes(bytes(params)[68:72], "little") == slices | split << 5 | vidmem << 9


def test_output_in_device_memory() -> None:
    """What it needs is in every table: a flag that moves, a usage, a byte format, the head of the buffer."""
    for version, bit in (("11.1", 5), ("12.1", 9), ("13.0", 9)):
        abi = load(f"nvenc-{version}")
        params = abi.struct("NV_ENC_INITIALIZE_PARAMS")(enableOutputInVidmem=1)
        assert int.from_bytes(bytes(params)[68:72], "little") == 1 << bit
        assert abi.number("NV_ENC_OUTPUT_BITSTREAM") == 2
        assert abi.number("NV_ENC_BUFFER_FORMAT_U8") == 0x40000000
        head = abi.struct("NV_ENC_ENCODE_OUT_PARAMS")
        assert (ctypes.sizeof(head), head.bitstreamSizeInBytes.offset) == (256, 4)


def test_a_value_too_wide_for_a_bit_field_is_refused() -> None:
    params = load("nvenc-13.0").struct("NV_ENC_INITIALIZE_PARAMS")()
    for value in (16, -1):
        with pytest.raises(ValueError, match=r"bit-field splitEncodeMode holds 0\.\.15"):
            params.splitEncodeMode = value


@pytest.mark.parametrize("name", TABLES)
def test_a_misspelled_field_is_refused(name: str) -> None:
    abi = load(name)
    for struct in abi.structs:
        with pytest.raises(AttributeError):
            abi.struct(struct)().misspelled = 1


def test_members_of_anonymous_members() -> None:
    abi = load("cuvid-13.0")
    info = abi.struct("CUVIDDECODECREATEINFO")()
    info.display_area.bottom = 0x1234
    assert bytes(info)[86:88] == b"\x34\x12"
    picture = abi.struct("CUVIDPICPARAMS")()
    assert ctypes.addressof(picture.CodecSpecific.hevc) - ctypes.addressof(picture) == 184
    assert ctypes.sizeof(picture.CodecSpecific) == 4096


def made(size: int, fields: list[list[Any]], kind: str = "struct") -> Abi:
    entry = {"kind": kind, "size": size, "align": 4, "fields": fields}
    return Abi("made", {"library": "x", "structs": {"S": entry}, "enums": {}})


@pytest.mark.parametrize(
    ("size", "fields", "problem"),
    [
        (8, [["a", "u32", 0], ["b", "u32", 2]], "overlaps"),
        (8, [["a", "u32", 0], ["b", "u32", 8]], "built as 12 bytes"),
        (12, [["a", "u32", 0], ["b", "u32", 6]], "is built at 8, the table says 6"),
        (8, [["a", "u64", 0]], "aligned to 8, the table says 8 aligned to 4"),
        (8, [["a", "T", 0]], "has no struct 'T'"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(size: int, fields: list[list[Any]], problem: str) -> None:
    with pytest.raises(AbiError, match=problem):
        made(size, fields).struct("S")


def test_unknown_names_are_refused() -> None:
    abi = load("cuvid-13.0")
    for ask in (abi.struct, abi.enum, abi.number, abi.prototype, abi.callback, abi.guid):
        with pytest.raises(AbiError, match=r"cuvid-13\.0 has no \w+ 'nothing'"):
            ask("nothing")
    with pytest.raises(AbiError, match=r"no table 'nvenc-1\.0'"):
        load("nvenc-1.0")


@pytest.mark.parametrize("name", TABLES)
def test_every_prototype_can_be_bound(name: str) -> None:
    abi = load(name)
    for function in table(name)["functions"]:
        assert issubclass(abi.prototype(function), ctypes._CFuncPtr)  # type: ignore[arg-type, attr-defined]


@pytest.mark.parametrize("version", NVENC_VERSIONS)
def test_every_nvenc_function_is_a_slot_or_an_export(version: str) -> None:
    slots = load(f"nvenc-{version}").struct("NV_ENCODE_API_FUNCTION_LIST")
    for function in table(f"nvenc-{version}")["functions"]:
        assert hasattr(slots, function) or function.startswith("NvEncodeAPI"), function


def test_importing_builds_and_opens_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, sidelane\n"
        "assert not any(m.startswith('sidelane.codec._') for m in sys.modules), 'driver imported'\n"
        "import sidelane.codec.nvdec\n"
        "from sidelane.codec import _abi, _driver\n"
        "assert not _abi._tables and not _driver._libraries, 'nvdec opens the driver at import'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


# Debian's libffmpeg-nvenc-dev has the headers of API 11.1 and the CUDA declarations NVENC needs.
HEADERS = {
    "nvenc-11.1": "ffnvcodec/nvEncodeAPI.h",
    "cuvid-11.1": "ffnvcodec/dynlink_nvcuvid.h",
    "cuda": "ffnvcodec/dynlink_cuda.h",
}


def probe(name: str, folder: Path) -> list[str]:
    """Compile and run a C program that prints what `table(name)` claims, one fact per line."""
    lines = [
        f'#include "{HEADERS["cuda"]}"',
        f'#include "{HEADERS[name]}"',
        "#include <stdio.h>",
        "#include <string.h>",
        "#define SIZE(x) printf(#x \" size %zu\\n\", sizeof(x))",
        "#define FIELD(s, f) printf(#s \" \" #f \" %zu %zu\\n\", offsetof(s, f), sizeof(((s *)0)->f))",
        "#define NUMBER(x) printf(#x \" %u\\n\", (unsigned)(x))",
        "static void hex(const void *p, size_t n)",
        '{ for (size_t i = 0; i < n; i++) printf("%02x", ((const unsigned char *)p)[i]); puts(""); }',
        "int main(void) {",
    ]  # fmt: skip
    data = table(name)
    for struct, entry in data["structs"].items():
        lines.append(f"SIZE({struct});")
        lines += [f"FIELD({struct}, {field[0]});" for field in entry["fields"]]
        if "version" in entry:
            lines.append(f"NUMBER({struct}_VER);")
        for field, *_ in entry.get("bits", ()):
            lines.append(f"{{ {struct} s; memset(&s, 0, sizeof s); s.{field} = ~0;")
            lines.append(f'printf("{struct} {field} "); hex(&s, sizeof s); }}')
    for enum in data["enums"].values():
        lines += [f"NUMBER({constant});" for constant in enum]
    lines += [f"NUMBER({constant});" for constant in data.get("constants", {})]
    for guid in data.get("guids", {}):
        lines.append(f'printf("{guid} "); hex(&{guid}, sizeof {guid});')
    source, program = folder / "probe.c", folder / "probe"
    source.write_text("\n".join([*lines, "return 0; }", ""]))
    subprocess.run(["gcc", "-w", "-o", str(program), str(source)], check=True)
    run = subprocess.run([str(program)], check=True, capture_output=True, text=True)
    return run.stdout.splitlines()


def claims(name: str) -> list[str]:
    """The same lines as `probe`, from the table and the classes built from it."""
    abi, data = load(name), table(name)
    lines = []
    for struct, entry in data["structs"].items():
        lines.append(f"{struct} size {ctypes.sizeof(abi.struct(struct))}")
        for field, kind, offset, *length in entry["fields"]:
            size = ctypes.sizeof(abi._type(kind)) * (length[0] if length else 1)
            lines.append(f"{struct} {field} {offset} {size}")
        if "version" in entry:
            lines.append(f"{struct}_VER {entry['version']}")
        for field, _, _, _, width in entry.get("bits", ()):
            zeroed = abi.struct(struct).from_buffer(bytearray(entry["size"]))
            lines.append(f"{struct} {field} {bytes_set_by(zeroed, field, (1 << width) - 1).hex()}")
    for enum in data["enums"].values():
        lines += [f"{constant} {value}" for constant, value in enum.items()]
    lines += [f"{constant} {value}" for constant, value in data.get("constants", {}).items()]
    lines += [f"{guid} {text}" for guid, text in data.get("guids", {}).items()]
    return lines


@pytest.mark.abi_probe
@pytest.mark.parametrize("name", HEADERS)
def test_tables_agree_with_the_c_headers(name: str, tmp_path: Path) -> None:
    if shutil.which("gcc") is None or not Path("/usr/include", HEADERS[name]).exists():
        pytest.fail("this test needs gcc and libffmpeg-nvenc-dev; leave it out with -m 'not abi_probe'")
    assert probe(name, tmp_path) == claims(name)
