"""Raw, exact and packed lanes: golden packets, round trips of every dtype and layout, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from golden import DIGEST, ENCODED, GOLDEN, assemble
from samples import bits_of, hadamard_basis
from sidelane.codec.packet import DTYPES, Packet, compact_strides
from sidelane.errors import BasisError, LaneError, PacketError
from sidelane.kernels.reference import dequantize_project_ref, project_quantize_ref
from sidelane.pipeline.lanes import ExactLane, PackedLane, RawLane, decode_packet, open_lane
from sidelane.pipeline.octets import copied, copied_by_kernel

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

LOSSY = (torch.float32, torch.float16, torch.bfloat16)
LANES = {
    "raw": RawLane(),
    "exact": ExactLane(),
    "packed": PackedLane(),
    "basis": PackedLane(basis=hadamard_basis()),
}


def values(dtype: torch.dtype, *shape: int) -> Tensor:
    """Ordinary numbers for the floats that lanes code, arbitrary bits for everything else."""
    if dtype in LOSSY:
        return torch.randn(shape).to(dtype)
    if dtype == torch.bool:
        return torch.rand(shape) > 0.5
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8).view(dtype)


LAYOUTS = {
    "contiguous": lambda dtype: values(dtype, 6, 5, 4),
    "transposed": lambda dtype: values(dtype, 6, 5, 4).transpose(0, 2),
    "channels_last": lambda dtype: values(dtype, 2, 4, 3, 4).permute(0, 3, 1, 2),
    "sliced": lambda dtype: values(dtype, 6, 9, 4)[1:5, 2::3],
    "sliced_last": lambda dtype: values(dtype, 6, 9, 12)[:, :, 3:7],
    "strided": lambda dtype: values(dtype, 64)[1::3],
    "expanded": lambda dtype: values(dtype, 6, 1, 4).expand(6, 7, 4),
    "expanded_scalar": lambda dtype: values(dtype, 1)[0].expand(3, 4),
    "size_one": lambda dtype: values(dtype, 1, 5, 1, 4),
    "scalar": lambda dtype: values(dtype, 3)[1],
    "empty": lambda dtype: values(dtype, 4, 4)[:0],
    "large": lambda dtype: values(dtype, 1200, 4),
}


def rounding_bound(x: Tensor, bits: int) -> float:
    """Largest error of the group code: half of the widest scale that a group of `x` can have, and rounding
    to the dtype of `x`; see `group_quantize_pack_ref`."""
    wide = x.double()
    low, top = wide.min().item(), wide.max().item()
    span = top - low + abs(low) * 2.0**-9 + 2.0**-23
    scale = span / (2**bits - 1) * (1 + 2.0**-9) + 2.0**-24
    return scale / 2 + max(abs(low), abs(top)) * torch.finfo(x.dtype).eps


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_packets(name):
    lane, x = ENCODED[name]
    packet = lane.encode(x)
    if name == "basis":
        packet = packet.with_(digest=DIGEST)
    assert packet.to_bytes().hex() == assemble(name).hex()


@pytest.mark.kernel
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_packets_of_kernels(name, device):
    lane, x = ENCODED[name]
    packet = lane.encode(x.to(device))
    assert packet.device.type == device.type
    y = lane.decode(packet)
    expected = lane.decode(packet.to("cpu"))
    assert y.device.type == device.type
    if name == "basis":  # the sums of a matrix product depend on their order
        torch.testing.assert_close(y.cpu(), expected, rtol=1e-5, atol=1e-5)
        packet = packet.with_(digest=DIGEST)
    else:
        assert torch.equal(bits_of(y.cpu()), bits_of(expected))
    assert packet.to_bytes().hex() == assemble(name).hex()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_packets_decode(name):
    lane, x = ENCODED[name]
    packet = Packet.from_bytes(assemble(name))
    if name == "basis":
        packet = packet.with_(digest=hadamard_basis().digest)
    y = lane.decode(packet)
    assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, x.stride())
    if packet.lane == "packed":
        finite = x.isfinite()
        assert torch.equal(bits_of(y[~finite]), bits_of(x[~finite]))
        worst = {"groups": 8 / 2, "symmetric": 32 / 2, "basis": 0.41}[name]  # half a step of each code
        assert (y - x)[finite].abs().max() <= worst * 1.01
    else:
        assert torch.equal(bits_of(y), bits_of(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lane", LANES)
def test_round_trip(lane, dtype, layout):
    x = LAYOUTS[layout](dtype)
    before = bits_of(x).clone()
    sent = LANES[lane].encode(x)
    packet = Packet.from_bytes(sent.to_bytes())
    y = LANES[lane].decode(packet)
    assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, compact_strides(x))
    assert torch.equal(bits_of(x), before)
    assert torch.equal(bits_of(LANES[lane].decode(sent)), bits_of(y))
    if packet.lane in ("raw", "exact"):
        assert packet.rel_error == 0
        assert torch.equal(bits_of(y), before)
    elif packet.digest == bytes(32):
        assert (y.double() - x.double()).abs().max() <= rounding_bound(x, packet.bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_code_is_reached(dtype):
    """So that the round trips above are those of the codes and not of raw copies."""
    x = LAYOUTS["large"](dtype)
    packets = {name: lane.encode(x) for name, lane in LANES.items()}
    assert [packet.lane for packet in packets.values()] == ["raw", "exact", "packed", "packed"]
    assert packets["basis"].digest == hadamard_basis().digest
    assert packets["packed"].digest == bytes(32)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex32], ids=str)
def test_exact_codes_complex_parts(dtype):
    x = (
        torch.randn(4096, 2)
        .to(torch.float32 if dtype == torch.complex64 else torch.float16)
        .view(dtype)[:, 0]
    )
    packet = ExactLane().encode(x)
    assert packet.lane == "exact"
    assert torch.equal(bits_of(ExactLane().decode(packet)), bits_of(x))


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("kind", ["conj", "neg", "conj_transposed"])
def test_lazy_bits_are_resolved(lane, kind):
    z = torch.randn(6, 8, dtype=torch.complex64)
    x = {"conj": z.conj(), "neg": z.conj().imag, "conj_transposed": z.mH}[kind]
    assert x.is_conj() or x.is_neg()
    y = LANES[lane].decode(LANES[lane].encode(x))
    assert not (y.is_conj() or y.is_neg())
    plain = x.resolve_conj().resolve_neg()
    assert torch.equal(bits_of(y), bits_of(LANES[lane].decode(LANES[lane].encode(plain))))
    if x.is_complex() or LANES[lane].exact:
        assert torch.equal(bits_of(y), bits_of(plain))


@st.composite
def strided(draw):
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    strides = draw(st.lists(st.integers(0, 40), min_size=len(shape), max_size=len(shape)))
    offset = draw(st.integers(0, 7))
    return torch.randn(offset + 1 + 40 * 4 * 4).as_strided(shape, strides, offset)


@settings(max_examples=60, deadline=None)
@given(strided())
@pytest.mark.parametrize("lane", LANES)
def test_any_strides(lane, x):
    packet = LANES[lane].encode(x)
    y = LANES[lane].decode(packet)
    assert y.shape == x.shape and y.stride() == compact_strides(x)
    if packet.lane != "packed":
        assert torch.equal(y, x)
    elif packet.digest == bytes(32):
        assert (y - x).abs().max() <= rounding_bound(x, 8)


def test_huge_expanded_views():
    x = torch.randn(3, 1).expand(3, 1 << 40)
    for lane in LANES.values():
        y = lane.decode(Packet.from_bytes(lane.encode(x).to_bytes()))
        assert y.shape == x.shape
        assert torch.equal(y[:, 0], x[:, 0])


def test_autograd_stays_outside():
    for x in (torch.nn.Parameter(torch.randn(512)), torch.randn(512, requires_grad=True) * 2):
        for lane in LANES.values():
            assert not lane.decode(lane.encode(x)).requires_grad


@pytest.mark.parametrize("lane", LANES)
def test_packets_and_tensors_do_not_share_memory(lane):
    x = torch.randn(256, 4)
    packet = LANES[lane].encode(x)
    data = packet.to_bytes()
    first = LANES[lane].decode(packet)
    kept = first.clone()
    x.fill_(7)
    first.fill_(7)
    assert packet.to_bytes() == data
    assert torch.equal(LANES[lane].decode(packet), kept)


@pytest.mark.parametrize("dtype", LOSSY, ids=str)
@pytest.mark.parametrize("lane", [LANES["packed"], LANES["basis"], PackedLane(bits=2, symmetric=True)])
def test_values_that_are_not_finite(lane, dtype):
    x = torch.randn(400, 4).to(dtype)
    special = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=dtype)
    x[17, :3], x[399, 2], x[200, 1] = special, special[1], -special[0]
    packet = lane.encode(x)
    assert packet.lane == "packed"
    y = lane.decode(packet)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y[x.isinf()], x[x.isinf()])
    assert y[x.isfinite()].isfinite().all()
    if lane.basis is not None:
        assert torch.equal(bits_of(y[~x.isfinite()]), bits_of(x[~x.isfinite()]))


def test_exact_never_costs_one_percent():
    noise = torch.randint(-(2**31), 2**31 - 1, (50_000,), dtype=torch.int32)
    for x in (
        noise.view(torch.float32),
        noise.view(torch.bfloat16),
        noise.view(torch.float16),
        torch.zeros(1),
    ):
        packet = ExactLane().encode(x)
        assert sum(s.numel() for s in packet.sections.values()) <= 1.01 * packet.raw_nbytes
        assert torch.equal(bits_of(ExactLane().decode(packet)), bits_of(x))


def test_exact_makes_ordinary_numbers_smaller():
    assert ExactLane().encode(torch.randn(100_000).bfloat16()).ratio > 1.3
    assert ExactLane().encode(torch.randn(100_000)).ratio > 1.1


def test_lossy_code_that_is_not_smaller_is_raw():
    x = torch.tensor([1.0, float("nan"), -0.0])
    packet = PackedLane().encode(x)
    assert (packet.lane, packet.rel_error) == ("raw", 0.0)
    assert torch.equal(bits_of(PackedLane().decode(packet)), bits_of(x))


# Basis


@pytest.mark.parametrize("width", [None, 7])
def test_basis_code_is_the_reference(width):
    basis = hadamard_basis()
    x = torch.randn(3, 100, 4, dtype=torch.float32) * 2 + basis.mean
    x[1, 5, 2] = float("nan")
    lane = PackedLane(basis=basis, width=width)
    packet = Packet.from_bytes(lane.encode(x).to_bytes())
    q = basis.quantizer(width)
    assert packet.sections["codes"].numel() == -(-300 // 8) * sum(q.widths)
    finite = torch.where(x.isfinite().all(-1, keepdim=True), x, 0.0).view(-1, 4)
    codes, _ = project_quantize_ref(finite, q.components, q.offset, q.inv_scale, q.levels)
    expected = dequantize_project_ref(codes, q.components, q.scale, q.bias, torch.float32).view_as(x)
    expected[1, 5] = x[1, 5]
    assert torch.equal(bits_of(lane.decode(packet)), bits_of(expected))


def test_basis_error_is_that_of_its_scales():
    """Rows in the span of the components and inside the clip range: |error| <= half the scales, projected."""
    basis = hadamard_basis()
    q = basis.quantizer()
    limit = q.scale * q.levels / 2
    z = (torch.rand(500, 3) * 2 - 1) * limit
    x = z @ q.components.t() + basis.mean
    y = PackedLane(basis=basis).decode(PackedLane(basis=basis).encode(x))
    bound = (q.components.abs() @ q.scale) / 2 + 1e-5
    assert ((y - x).abs() <= bound).all()


@pytest.mark.parametrize(
    ("x", "fit"),
    [
        (torch.randn(300, 4), True),
        (torch.randn(160), False),
        (torch.randn(30, 20, 4).transpose(0, 1), True),
        (torch.randn(40, 1, 4).expand(40, 9, 4), True),
        (torch.randn(300, 4).t(), False),
        (torch.randn(4, 4, 4, 4).to(memory_format=torch.channels_last), False),
        (torch.randn(300, 8), False),
        (torch.randn(300, 1).expand(300, 4), False),
        (torch.randn(300, 4).double(), False),
        (torch.randn(300, 4)[:0], False),
        (torch.tensor(1.0), False),
    ],
)
def test_tensors_that_fit_the_basis(x, fit):
    lane = PackedLane(basis=hadamard_basis())
    assert (lane.for_tensor(x).basis is not None) == fit
    packet = lane.encode(x)
    assert (packet.digest == hadamard_basis().digest) == (fit and packet.lane == "packed")
    assert lane.decode(packet).shape == x.shape


def test_basis_of_a_packet():
    x, basis = torch.randn(300, 4), hadamard_basis()
    packet = PackedLane(basis=basis).encode(x)
    with pytest.raises(BasisError, match=f"{basis.digest.hex()}, none was given: pass basis="):
        decode_packet(packet)
    with pytest.raises(BasisError, match="pass basis="):
        decode_packet(packet, hadamard_basis(widths=(5, 4, 3, 1)))
    assert decode_packet(packet, basis).shape == x.shape
    assert decode_packet(RawLane().encode(x), basis).shape == x.shape


# Choice of lanes


def test_open_lane():
    assert open_lane("raw") == RawLane()
    assert open_lane("exact") == ExactLane()
    assert open_lane("packed", bits=4, group=128) == PackedLane(bits=4, group=128)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("fast", {}, "unknown lane 'fast': use one of raw, exact, packed, video-cpu, video, dual"),
        ("raw", {"bits": 4}, "lane 'raw' has no option 'bits': it has no options; lane 'packed' has it"),
        ("raw", {"finer": 4}, "lane 'raw' has no option 'finer': it has no options"),
        (
            "packed",
            {"bit": 4},
            "lane 'packed' has no option 'bit': it has bits, group, symmetric, seed, basis, width",
        ),
        ("packed", {"bits": 3}, "bits=3 is not one of (2, 4, 8)"),
        ("packed", {"group": 48}, "group=48 is not one of (32, 64, 128, 256)"),
        ("packed", {"seed": "x"}, "seed='x' is neither None nor an integer"),
        ("packed", {"width": 4}, "width=4 needs a basis; for groups use bits"),
        ("packed", {"basis": 4}, "basis is a int: pass a Basis"),
        ("packed", {"basis": hadamard_basis(), "width": 13}, "width=13 is no integer of 1..12"),
        ("packed", {"basis": hadamard_basis(), "width": 4.0}, "width=4.0 is no integer of 1..12"),
    ],
)
def test_open_lane_refuses(name, options, text):
    with pytest.raises(LaneError) as caught:
        open_lane(name, **options)
    assert str(caught.value) == text


def chain(lane):
    while lane is not None:
        yield lane
        lane = lane.finer()


def test_finer_lanes_of_groups():
    steps = list(chain(PackedLane(bits=2, group=32, symmetric=True, seed=3)))
    assert [getattr(lane, "bits", None) for lane in steps] == [2, 4, 8, None]
    assert all((lane.group, lane.symmetric, lane.seed) == (32, True, 3) for lane in steps[:3])
    assert steps[-1] == ExactLane()
    assert list(chain(RawLane())) == [RawLane()]


def test_finer_lanes_of_a_basis():
    steps = list(chain(PackedLane(basis=hadamard_basis(16, widths=(3, 2)))))
    assert [lane.width for lane in steps if getattr(lane, "basis", None)] == [None, 5, 7, 9, 11, 12]
    assert [lane.bits for lane in steps[6:-1]] == [2, 4, 8]
    full = PackedLane(basis=hadamard_basis(4, widths=(6,) * 4))
    assert list(chain(full)) == [full, PackedLane(bits=8), ExactLane()]


def test_finer_has_less_error():
    x = torch.randn(400, 4) + hadamard_basis().mean
    for start in (PackedLane(bits=2), PackedLane(basis=hadamard_basis())):
        errors = [float((lane.decode(lane.encode(x)) - x).norm()) for lane in chain(start)]
        assert errors[-1] == 0
        assert sorted(errors, reverse=True)[0] == errors[0] > errors[-2]


# Refusals


class Labelled(torch.Tensor):
    pass


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(
    "x",
    [
        torch.eye(3).to_sparse(),
        torch.empty(3, device="meta"),
        torch.zeros(3).as_subclass(Labelled),
        torch.empty(4, dtype=torch.bits8),
        [1.0, 2.0],
    ],
    ids=["sparse", "meta", "subclass", "bits8", "list"],
)
def test_tensors_without_dense_elements(lane, x):
    with pytest.raises(LaneError) as caught:
        LANES[lane].encode(x)
    assert "\n" not in str(caught.value)


def test_packets_of_other_lanes():
    x = torch.randn(4096)
    exact, packed = ExactLane().encode(x), PackedLane().encode(x)
    for lane, packet in ((RawLane(), exact), (RawLane(), packed), (ExactLane(), packed)):
        with pytest.raises(PacketError, match="'lane'"):
            lane.decode(packet)
    with pytest.raises(PacketError, match="'lane'"):
        decode_packet(packed.with_(lane="fast"))


def section(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.uint8)


LIES = [
    ("raw", "data", {"shape": (81, 4)}),
    ("raw", "data", {"shape": (1 << 50, 4)}),
    ("raw", "data", {"dtype": torch.float64}),
    ("raw", "sections", {"sections": {"date": section(8192)}}),
    ("raw", "params", {"params": (1,)}),
    ("exact", "base", {"shape": (1 << 50, 4)}),
    ("exact", "dtype", {"dtype": torch.float64}),
    ("exact", "params", {"params": (8,)}),
    ("exact", "planes", {"params": (1,)}),
    ("exact", "shape", {"shape": (0, 4)}),
    ("packed", "codes", {"shape": (1 << 50, 4)}),
    ("packed", "codes", {"bits": 4}),
    ("packed", "bits", {"bits": 3}),
    ("packed", "params", {"params": (63, 0)}),
    ("packed", "params", {"params": (64, 2)}),
    ("packed", "sections", {"params": (64, 1)}),
    ("packed", "scale", {"params": (32, 0)}),
    ("packed", "dtype", {"dtype": torch.int32}),
    ("packed", "shape", {"shape": (0, 4)}),
    ("basis", "shape", {"shape": (256, 8), "strides": (8, 1)}),
    ("basis", "shape", {"shape": (1 << 50, 4)}),
    ("basis", "shape", {"shape": (0, 4)}),
    ("basis", "codes", {"shape": (900, 4)}),
    ("basis", "codes", {"bits": 9}),
    ("basis", "bits", {"bits": 13}),
    ("basis", "params", {"params": (1,)}),
    ("basis", "dtype", {"dtype": torch.int32}),
]


@pytest.mark.parametrize(("lane", "field", "changes"), LIES)
def test_lying_fields(lane, field, changes):
    packet = LANES[lane].encode(torch.randn(512, 4))
    with pytest.raises(PacketError) as caught:
        decode_packet(packet.with_(**changes), hadamard_basis())
    assert caught.value.field == field


def with_section(packet: Packet, name: str, part: Tensor) -> Packet:
    return packet.with_(sections=packet.sections | {name: part.reshape(-1).view(torch.uint8)})


def test_lying_escapes():
    exact = ExactLane().encode(torch.exp(torch.randn(4096) * 3))
    assert exact.sections["escapes"].numel() > 0
    for packet, name, part in [
        (exact, "escapes", exact.sections["escapes"][1:]),
        (exact, "escapes", torch.zeros(4097, dtype=torch.uint8)),
        (exact, "ends", torch.zeros(4, dtype=torch.int32)),
    ]:
        with pytest.raises(PacketError):
            decode_packet(with_section(packet, name, part))


@pytest.mark.parametrize("rows", [[-1, 3], [3, 3], [4, 3], [3, 400], [3], [3, 4, 5]])
def test_lying_rows(rows):
    x = torch.randn(400, 4)
    x[3, 0] = x[5, 1] = float("inf")
    packet = PackedLane(basis=hadamard_basis()).encode(x)
    with pytest.raises(PacketError, match="'rows'"):
        decode_packet(with_section(packet, "rows", torch.tensor(rows, dtype=torch.int32)), hadamard_basis())


def test_bools_are_zero_or_one():
    packet = RawLane().encode(torch.tensor([True, False, True]))
    y = decode_packet(with_section(packet, "data", torch.tensor([2, 0, 255], dtype=torch.uint8)))
    assert y.view(torch.uint8).tolist() == [1, 0, 1]


@pytest.mark.usefixtures("each_device")
@pytest.mark.parametrize("copier", [copied, copied_by_kernel])
@pytest.mark.parametrize("nbytes, offset", [(0, 0), (1, 0), (4096, 0), (4104, 8), (4104, 1), (4099, 3)])
def test_bytes_are_copied(copier, nbytes: int, offset: int) -> None:
    data = torch.randint(256, (offset + nbytes,), dtype=torch.uint8)[offset:]
    expected, copy = data.tolist(), copier(data)
    data.bitwise_not_()
    assert copy.dtype == torch.uint8 and copy.tolist() == expected


def test_bytes_at_an_odd_address_that_begin_their_storage_are_copied() -> None:
    data = torch.frombuffer(bytearray(range(65)), dtype=torch.uint8, offset=1)
    assert data.storage_offset() == 0 and copied_by_kernel(data).tolist() == list(range(1, 65))
