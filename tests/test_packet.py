"""The packet format: its bytes, its one form, and what it refuses."""

from __future__ import annotations

import struct
from math import inf, nan

import pytest
import torch
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from sidelane.codec.packet import (
    DTYPES,
    LANES,
    MAX_SECTIONS,
    Packet,
    Sections,
    compact_strides,
    flatten,
)
from sidelane.errors import PacketError
from sidelane.layout import FORMATS, MAPPINGS

# Checksums computed with another implementation of CRC-32C, in test_golden_checksums.
GOLDEN = bytes.fromhex(
    "89534c414e450d0a 0100 0000 d0000000 4801000000000000"  # magic, version, reserved, bytes of header, all
    "02 02 01 01 04 01 02 02"  # lane, dtype, stride class, mapping, bits, surface, ndim, sections
    "000000000000c03f"  # rel_error
    "40000000 01000000 00000000 00000000 00000000 00000000 00000000 00000000"  # params
    "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"  # digest
    "0300000000000000 0200000000000000 0100000000000000 0300000000000000"  # shape, strides
    "636f64657300000000000000 06b12524 0001000000000000 0500000000000000"  # name, CRC-32C, offset, length
    "7363616c6500000000000000 b1c9c028 4001000000000000 0800000000000000"
    "3a331bc0 00000000"  # CRC-32C of the header, zero
    + "00" * 48
    + "0001020304"
    + "00" * 59
    + "0000803f 00000040"
)


def sample() -> Packet:
    return Packet(
        lane="packed",
        dtype=torch.bfloat16,
        shape=(3, 2),
        strides=(1, 3),
        sections={
            "codes": torch.arange(5, dtype=torch.uint8),
            "scale": torch.tensor([1.0, 2.0]).view(torch.uint8),
        },
        params=(64, 1),
        bits=4,
        surface="nv12",
        mapping="token_rows",
        digest=bytes(range(32)),
        rel_error=0.125,
    )


def with_header_crc(data: bytes | bytearray) -> bytes:
    """`data` with the checksum of its header made right."""
    out = bytearray(data)
    end = struct.unpack_from("<I", out, 12)[0] - 8
    struct.pack_into("<I", out, end, crc32c(memoryview(out)[:end]))
    return bytes(out)


def crc32c_bitwise(data: bytes) -> int:
    """CRC-32C by its definition, RFC 3720 appendix B.4: polynomial 0x1EDC6F41, bits reflected."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_golden_bytes():
    assert sample().to_bytes() == GOLDEN
    assert sample().nbytes == len(GOLDEN)


def test_golden_checksums():
    codes, scale, header = struct.unpack_from("<I", GOLDEN, 148)[0], *struct.unpack_from("<I", GOLDEN, 180), 0
    assert codes == crc32c_bitwise(GOLDEN[256:261])
    assert scale == crc32c_bitwise(GOLDEN[320:328])
    assert struct.unpack_from("<II", GOLDEN, 200) == (crc32c_bitwise(GOLDEN[:200]), header)


def test_bytes_give_the_packet_back():
    packet = Packet.from_bytes(GOLDEN)
    expected = sample()
    for name in ("lane", "dtype", "shape", "strides", "bits", "surface", "mapping", "digest", "rel_error"):
        assert getattr(packet, name) == getattr(expected, name), name
    assert packet.params == (64, 1, 0, 0, 0, 0, 0, 0)
    assert packet.numbers(2) == (64, 1)
    assert list(packet.sections) == ["codes", "scale"]
    assert all(torch.equal(packet.sections[name], section) for name, section in expected.sections.items())
    assert packet.to_bytes() == GOLDEN


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_bytes_of_any_buffer(kind):
    assert Packet.from_bytes(kind(GOLDEN)).to_bytes() == GOLDEN


def test_sections_are_copies():
    data = bytearray(GOLDEN)
    packet = Packet.from_bytes(data)
    data[256] = 99
    assert packet.section("codes").tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("surface", ["", *FORMATS])
@pytest.mark.parametrize("mapping", ["", *MAPPINGS])
def test_enumerations_survive(lane, surface, mapping):
    packet = Packet.from_bytes(sample().with_(lane=lane, surface=surface, mapping=mapping).to_bytes())
    assert (packet.lane, packet.surface, packet.mapping) == (lane, surface, mapping)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_survive(dtype):
    assert Packet.from_bytes(sample().with_(dtype=dtype).to_bytes()).dtype == dtype


def test_rel_error_survives():
    for value in (0.0, 1e-300, nan):
        assert repr(Packet.from_bytes(sample().with_(rel_error=value).to_bytes()).rel_error) == repr(value)


# Strides


@st.composite
def strided(draw, dtype=torch.int32):
    """Tensors of 0..5 dimensions with permuted, sliced, expanded, overlapping and empty ones among them."""
    shape = draw(st.lists(st.integers(0, 4), max_size=5))
    strides = draw(st.lists(st.integers(0, 70), min_size=len(shape), max_size=len(shape)))
    offset = draw(st.integers(0, 5))
    storage = torch.arange(offset + 1 + 70 * 3 * 5, dtype=dtype)
    return storage.as_strided(shape, strides, offset)


@given(strided())
def test_flatten_and_unflatten(tensor):
    packet = Packet.like("raw", tensor)
    flat = flatten(tensor)
    assert flat.shape == (packet.flat_numel,) and flat.is_contiguous()
    back = packet.unflatten(flat)
    assert torch.equal(back, tensor)
    assert back.stride() == compact_strides(tensor) == compact_strides(back)


@given(strided())
def test_memory_order_is_kept(tensor):
    strides = compact_strides(tensor)
    for a in range(tensor.ndim):
        for b in range(tensor.ndim):
            if min(tensor.shape[a], tensor.shape[b]) > 1 and tensor.stride(a) < tensor.stride(b):
                assert strides[a] < strides[b]


@given(st.lists(st.integers(0, 4), max_size=5), st.randoms(use_true_random=False))
def test_dense_strides_are_compact(shape, random):
    tensor = torch.empty(shape)
    assert compact_strides(tensor) == tensor.stride()
    order = list(range(len(shape)))
    random.shuffle(order)
    permuted = tensor.permute(order)
    assert flatten(permuted).untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


@given(strided())
def test_headers_of_strided_tensors(tensor):
    packet = Packet.like("raw", tensor)
    back = Packet.from_bytes(packet.to_bytes())
    assert (back.shape, back.strides) == (packet.shape, packet.strides)


def test_expanded_dimensions_count_once():
    packet = Packet.like("raw", torch.zeros(3, 1).expand(3, 1 << 40))
    assert packet.strides == (1, 0)
    assert (packet.flat_numel, packet.raw_nbytes) == (3, 12)
    assert packet.unflatten(torch.zeros(3)).shape == (3, 1 << 40)


# Refusals


def test_truncated():
    for length in range(len(GOLDEN)):
        with pytest.raises(PacketError):
            Packet.from_bytes(GOLDEN[:length])


def test_extended():
    with pytest.raises(PacketError, match="'length'"):
        Packet.from_bytes(GOLDEN + b"\0")


def test_every_flipped_bit_is_found():
    for i in range(8 * len(GOLDEN)):
        data = bytearray(GOLDEN)
        data[i // 8] ^= 1 << i % 8
        with pytest.raises(PacketError):
            Packet.from_bytes(data)


@pytest.mark.parametrize(
    ("field", "offset", "value"),
    [
        ("magic", 0, b"PK"),
        ("version", 8, b"\2\0"),
        ("version", 10, b"\1\0"),
        ("length", 16, struct.pack("<Q", 2**63)),
        ("lane", 24, b"\x09"),
        ("dtype", 25, b"\xff"),
        ("stride class", 26, b"\0"),
        ("mapping", 27, b"\4"),
        ("surface", 29, b"\x20"),
        ("header length", 30, b"\3"),
        ("header length", 31, b"\1"),
        ("rel_error", 32, struct.pack("<d", -1.0)),
        ("rel_error", 32, struct.pack("<d", -0.0)),
        ("rel_error", 32, struct.pack("<d", inf)),
        ("shape", 104, struct.pack("<q", -3)),
        ("shape", 104, struct.pack("<q", 2**62)),
        ("strides", 104, struct.pack("<q", 4)),
        ("strides", 120, struct.pack("<q", 2)),
        ("strides", 120, struct.pack("<q", -1)),
        ("stride class", 120, struct.pack("<2q", 0, 1)),
        ("section name", 136, b"co es"),
        ("section name", 136, bytes(12)),
        ("section name", 136, b"c\xf6des"),
        ("section name", 136, b"scale"),
        ("codes", 152, struct.pack("<Q", 257)),
        ("codes", 152, struct.pack("<Q", 320)),
        ("codes", 160, struct.pack("<Q", 2**64 - 1)),
        ("codes", 160, struct.pack("<Q", 4)),
        ("scale", 192, struct.pack("<Q", 9)),
        ("header checksum", 204, b"\1"),
        ("scale", 300, b"\1"),
        ("scale", 320, b"\1"),
    ],
)
def test_a_lying_header(field, offset, value):
    """Each with the header checksum made right, so that the field itself is what is refused."""
    data = bytearray(GOLDEN)
    data[offset : offset + len(value)] = value
    data = with_header_crc(data) if offset < 200 and field not in ("magic", "version", "length") else data
    with pytest.raises(PacketError) as caught:
        Packet.from_bytes(data)
    assert caught.value.field == field
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 100, 2**32 - 1])
def test_a_lying_header_length(size):
    data = bytearray(GOLDEN)
    struct.pack_into("<I", data, 12, size)
    with pytest.raises(PacketError, match="header"):
        Packet.from_bytes(data)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("lane", {"lane": "fast"}),
        ("dtype", {"dtype": torch.quint8}),
        ("surface", {"surface": "yuyv"}),
        ("mapping", {"mapping": "spiral"}),
        ("bits", {"bits": 256}),
        ("params", {"params": (0,) * 9}),
        ("params", {"params": (2**32,)}),
        ("params", {"params": (-1,)}),
        ("digest", {"digest": b"short"}),
        ("rel_error", {"rel_error": -0.5}),
        ("ndim", {"strides": (1,)}),
        ("ndim", {"shape": (1,) * 65, "strides": (1,) * 65}),
        ("strides", {"strides": (4, 1)}),
        ("dtype", {"dtype": "float32"}),
        ("section name", {"sections": {"far_too_long_": torch.empty(0, dtype=torch.uint8)}}),
        ("codes", {"sections": {"codes": torch.zeros(4)}}),
        ("codes", {"sections": {"codes": torch.zeros(8, dtype=torch.uint8)[::2]}}),
        (
            "sections",
            {"sections": {f"s{i}": torch.empty(0, dtype=torch.uint8) for i in range(MAX_SECTIONS + 1)}},
        ),
    ],
)
def test_fields_the_format_cannot_hold(field, changes):
    with pytest.raises(PacketError) as caught:
        sample().with_(**changes).to_bytes()
    assert caught.value.field == field


def test_too_many_sections_in_bytes():
    sections = {f"s{i}": torch.empty(0, dtype=torch.uint8) for i in range(MAX_SECTIONS)}
    packet = sample().with_(sections=sections)
    assert list(Packet.from_bytes(packet.to_bytes()).sections) == list(sections)


# Sections


def test_section_checks_its_size():
    packet = sample()
    assert packet.section("scale", torch.float32, 2).tolist() == [1.0, 2.0]
    with pytest.raises(PacketError, match="'scale': section has 8 bytes, expected 12"):
        packet.section("scale", torch.float32, 3)
    with pytest.raises(PacketError, match="'codes': section has 5 bytes"):
        packet.section("codes", torch.float32)
    with pytest.raises(PacketError, match="'offset': section is missing"):
        packet.section("offset")
    with pytest.raises(PacketError, match="'sections'"):
        packet.check_sections("codes")
    with pytest.raises(PacketError, match="'params'"):
        packet.numbers(1)


def test_section_at_an_odd_address():
    memory = torch.zeros(9, dtype=torch.uint8)
    memory[1:] = torch.tensor([1.0, 2.0]).view(torch.uint8)
    packet = sample().with_(sections={"scale": memory[1:]})
    assert packet.section("scale", torch.float32, 2).tolist() == [1.0, 2.0]


def test_sections_of_one_buffer_are_like_others():
    packet, buffer = sample(), torch.full((300,), 99, dtype=torch.uint8)
    parts = packet.sections
    buffer[:5], buffer[256:264] = parts["codes"], parts["scale"]
    one = packet.with_(sections=Sections(("codes", "scale"), (0, 256), (5, 8), buffer))
    assert one.to_bytes() == packet.to_bytes() and one.nbytes == packet.nbytes
    assert one.device == packet.device and list(one.sections) == list(parts) and len(one.sections) == 2
    assert all(part.data_ptr() - buffer.data_ptr() in (0, 256) for part in one.sections.values())
    with pytest.raises(PacketError, match="'offset': section is missing"):
        one.section("offset")


def test_ratio_counts_the_whole_packet():
    tensor = torch.zeros(1000)
    packet = Packet.like("raw", tensor).with_(sections={"data": tensor.view(torch.uint8)})
    assert packet.raw_nbytes == 4000
    assert packet.nbytes == len(packet.to_bytes())
    assert packet.ratio == 4000 / packet.nbytes


def test_repr_leaves_payload_out():
    assert "sections" not in repr(sample())


def test_repr_shows_the_size_and_what_is_used():
    packet = Packet.like("raw", torch.zeros(2, 3))
    text = f"shape=(2, 3), strides=(3, 1), rel_error=0.0, nbytes={packet.nbytes})"
    assert repr(packet) == f"Packet(lane='raw', dtype=torch.float32, {text}"
    assert repr(Packet.from_bytes(packet.to_bytes())) == repr(packet)
    shown = repr(sample())
    assert f"nbytes={sample().nbytes}" in shown and "digest=0001020304050607," in shown
    assert f"bits={sample().bits}" in shown and "params=" in shown
