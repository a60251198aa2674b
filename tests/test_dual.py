"""The dual lane and its wire: formula, packets, exactness, bounds, two lanes at once, failures."""

from __future__ import annotations

import threading
from dataclasses import replace
from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from samples import bits_of, hadamard_basis
from sidelane.codec.packet import DTYPES, Packet, flatten
from sidelane.errors import BasisError, DriverError, LaneError, PacketError, SidelaneError
from sidelane.pipeline.chain import Chain
from sidelane.pipeline.compress import compress, decompress, relative_error
from sidelane.pipeline.dual import BLOCK, DualLane, dual_rate, dual_share, parts_of
from sidelane.pipeline.dual_wire import DualWire, Parcel
from sidelane.pipeline.lanes import ExactLane, PackedLane, RawLane, decode_packet, open_lane
from sidelane.pipeline.throttle import TokenBucket

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

RATES = st.floats(1e8, 1e12)
RATIOS = st.floats(1.0, 30.0)
WAIT = 20.0  # seconds after which a thread that waits for another gives the test up


def same(a, b) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits_of(a), bits_of(b))


# The share


@given(RATES, RATES, RATIOS)
def test_the_share_keeps_the_rate_of_the_formula(wire: float, lane: float, ratio: float) -> None:
    share = dual_share(wire, lane, ratio)
    assert 0 <= share <= 1
    busy = max((1 - share + share / ratio) / wire, share / lane)  # seconds per raw byte
    assert 1 / busy == pytest.approx(dual_rate(wire, lane, ratio), rel=1e-5)


def test_the_formula_in_numbers() -> None:
    assert dual_rate(3e9, 5e9, 4.0) == pytest.approx(6.75e9)  # 3 + 5 * 3/4
    assert dual_share(3e9, 5e9, 4.0) == pytest.approx(5 / 6.75)
    assert dual_rate(1e9, 5e9, 4.0) == pytest.approx(4e9)
    assert dual_share(1e9, 5e9, 4.0) == 1.0


@pytest.mark.parametrize(
    "numbers", [(0, 1, 2), (1, -1, 2), (1, 1, 0.9), (inf, 1, 2), (1, nan, 2), (1, 1, nan), ("a", 1, 2)]
)
def test_rates_that_are_none(numbers) -> None:
    with pytest.raises(LaneError, match="finite number"):
        dual_share(*numbers)
    with pytest.raises(LaneError, match="finite number"):
        dual_rate(*numbers)


# The lane

LAYOUTS = {
    "rows": lambda: torch.randn(300, 48),
    "permuted": lambda: torch.randn(6, 48, 70).permute(2, 0, 1),
    "sliced": lambda: torch.randn(900, 64)[:, 5:40],
    "expanded": lambda: torch.randn(300, 1, 48).expand(300, 5, 48),
    "long rows": lambda: torch.randn(2, 9000),
    "flat": lambda: torch.randn(9001),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("lane", [ExactLane(), PackedLane()], ids=["exact", "packed"])
def test_a_packet_of_two_parts(lane, dtype, layout) -> None:
    x = LAYOUTS[layout]().to(dtype)
    dual = DualLane(lane, 0.4)
    packet = Packet.from_bytes(dual.encode(x).to_bytes())
    assert packet.lane == "dual"
    data, part = parts_of(packet)
    y = dual.decode(packet)
    assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, Packet.like("raw", x).strides)
    assert dual.exact == lane.exact
    flat, raw = flatten(x), data.numel() // x.itemsize
    assert abs(part.flat_numel / flat.numel() - 0.4) <= max(BLOCK, 70) / flat.numel()
    assert same(flatten(y)[:raw], flat[:raw])
    assert same(flatten(y)[raw:], flatten(lane.decode(lane.encode(flat[raw:].view(part.shape)))))
    if lane.exact:
        assert same(y, x) and packet.rel_error == 0
    else:
        assert packet.rel_error != packet.rel_error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_exact_for_every_dtype_and_share(dtype, share) -> None:
    x = torch.randint(0, 2, (200, 96 * dtype.itemsize), dtype=torch.uint8).view(dtype)
    dual = DualLane(share=share)
    assert same(dual.decode(Packet.from_bytes(dual.encode(x).to_bytes())), x)


def test_a_packet_does_not_follow_its_tensor() -> None:
    x = torch.randn(64, 32)
    expected, packet = x.clone(), DualLane(share=0.5).encode(x)
    x.zero_()
    assert torch.equal(decode_packet(packet), expected)


@pytest.mark.parametrize("x", [torch.empty(0, 8), torch.tensor(1.5), torch.randn(3)], ids=["0", "1", "3"])
def test_small_tensors(x) -> None:
    dual = DualLane(share=0.5)
    assert same(dual.decode(dual.encode(x)), x)


def test_special_values_cross_in_both_parts() -> None:
    x = torch.randn(256, 64)
    x[::7] = torch.tensor([nan, inf, -inf, -0.0] * 16)
    assert same(DualLane(share=0.5).decode(DualLane(share=0.5).encode(x)), x)


def test_whole_tensors_take_the_packets_of_one_lane() -> None:
    x = torch.randn(256, 64).bfloat16()
    assert DualLane(share=0.0).encode(x).lane == "raw"
    assert DualLane(share=1.0).encode(x).lane == "exact"
    noise = torch.randint(-(2**15), 2**15, (256, 64), dtype=torch.int16).view(torch.bfloat16)
    assert DualLane(share=0.5).encode(noise).lane == "raw"


def test_the_basis_of_the_coded_part() -> None:
    basis = hadamard_basis(16, (8,) * 12)
    x = torch.randn(400, 16)
    dual = DualLane(PackedLane(basis=basis), 0.5)
    packet = dual.encode(x)
    assert packet.digest == basis.digest
    assert same(dual.decode(packet), decode_packet(packet, basis))
    with pytest.raises(BasisError):
        decode_packet(packet)


def test_a_video_part() -> None:
    x = (torch.randn(600, 64).cumsum(0) / 20).bfloat16()
    packet = open_lane("dual", lane=open_lane("video-cpu"), share=0.5).encode(x)
    y = decompress(Packet.from_bytes(packet.to_bytes()))
    assert same(y[:300], x[:300])
    assert 0 < relative_error(x.view(-1), y.view(-1)) < 0.02


@pytest.mark.parametrize("bound", [0.2, 1e-2, 1e-4, 0.0])
def test_a_bound_holds_over_the_whole(bound) -> None:
    x = torch.randn(512, 64)
    packet = compress(x, lane=DualLane(PackedLane(bits=2), 0.7), max_rel_error=bound)
    assert packet.rel_error <= bound
    assert relative_error(x.view(-1), decompress(packet).view(-1)) <= bound


def test_finer_lanes_end_exact() -> None:
    lane, steps = DualLane(PackedLane(bits=2), 0.3), 0
    while (finer := lane.finer()) is not None:
        lane, steps = finer, steps + 1
        assert isinstance(lane, DualLane) and lane.share == 0.3
    assert lane.exact and steps == 3


def test_through_a_chain() -> None:
    tensors = [torch.randn(256, 64).bfloat16() for _ in range(6)]
    with Chain(DualLane(share=0.5), depth=2) as chain:
        for x, y in zip(tensors, chain.stream(tensors), strict=True):
            assert same(x, y)


@pytest.mark.parametrize(
    "options",
    [{"share": 1.5}, {"share": nan}, {"share": "a"}, {"share": True}, {"lane": "exact"}, {"lane": ExactLane}],
)
def test_bad_options(options) -> None:
    with pytest.raises(LaneError, match="share=|lane="):
        open_lane("dual", **options)


def test_a_lane_that_is_none_of_those_in_a_packet() -> None:
    with pytest.raises(LaneError, match="lane="):
        DualLane(DualLane())


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (4, 0),
        (4, 4),
        (4, 9),
        (4, 3),
        (5, 0),
        (5, 1),
        (5, 256 * 64),
        (6, 1),
        (6, 2**32 - 1),
        (7, 63),
        (7, 2**32 - 1),
        (0, 9),
    ],
)
def test_params_that_do_not_fit(at, value) -> None:
    packet = DualLane(share=0.5).encode(torch.randn(256, 64).bfloat16())
    params = list(packet.params)
    params[at] = value
    with pytest.raises(PacketError):
        decode_packet(packet.with_(params=tuple(params)))


@pytest.mark.parametrize("name", ["raw", "codes", "planes"])
def test_sections_that_are_missing_or_cut(name) -> None:
    packet = DualLane(share=0.5).encode(torch.randn(256, 64).bfloat16())
    without = {key: section for key, section in packet.sections.items() if key != name}
    for sections in (without, packet.sections | {name: packet.sections[name][:-64]}):
        with pytest.raises(PacketError, match=name):
            decode_packet(packet.with_(sections=sections))


def test_other_lanes_refuse_it() -> None:
    packet = DualLane(share=0.5).encode(torch.randn(256, 64).bfloat16())
    for lane in (RawLane(), ExactLane(), PackedLane()):
        with pytest.raises(PacketError, match="dual"):
            lane.decode(packet)


# The wire


class Recorder(TokenBucket):
    """A wire that remembers what crosses it, in order, and may wait before."""

    def __init__(self) -> None:
        super().__init__(1e12)
        self.crossed: list[int] = []
        self.before = lambda nbytes: None

    def copy(self, source, target, *, chunk=None, stream=None, ready=None):
        self.before(source.numel())
        self.crossed.append(source.numel())
        target.copy_(source)


class Broken:
    """A lane that fails from its n-th call on."""

    name, exact = "broken", True

    def __init__(self, error, after: int = 0) -> None:
        self.error, self.after, self.calls = error, after, 0

    def encode(self, tensor):
        self.calls += 1
        if self.calls > self.after:
            raise self.error
        return ExactLane().encode(tensor)

    def decode(self, packet):
        return ExactLane().decode(packet)

    def finer(self):
        return None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("block", [1 << 13, 1 << 24])
def test_there_and_back(layout, share, block) -> None:
    x = LAYOUTS[layout]().bfloat16()
    with DualWire(DualLane(share=share), "cpu", block=block) as wire:
        parcel = wire.send(x)
        y = wire.receive(parcel)
    assert same(x, y) and y.stride() == Packet.like("raw", x).strides
    assert sum(packet.flat_numel for packet in parcel.packets) == flatten(x).numel()
    assert parcel.ratio >= 1 and parcel.nbytes < x.nbytes * 1.01


def test_it_arrives_in_place() -> None:
    whole = torch.zeros(600, 64)
    x = torch.randn(400, 64)
    with DualWire(DualLane(share=0.5), "cpu", block=1 << 14) as wire:
        y = wire.receive(wire.send(x), whole[100:500])
    assert y.data_ptr() == whole[100:].data_ptr()
    assert same(whole[100:500], x) and not whole[:100].any() and not whole[500:].any()


def test_packets_of_any_lane_make_a_parcel() -> None:
    parts = [torch.randn(200, 64).bfloat16() for _ in range(5)]
    lanes = [RawLane(), ExactLane(), DualLane(share=0.4), PackedLane(), DualLane(PackedLane(), 0.4)]
    packets = tuple(lane.encode(x) for lane, x in zip(lanes, parts, strict=True))
    whole = torch.cat(parts)
    with DualWire(DualLane(), "cpu", wire=Recorder()) as wire:
        y = wire.receive(Parcel(Packet.like("raw", whole), packets))
    for lane, packet, part in zip(lanes, packets, y.split(200), strict=True):
        assert same(part, lane.decode(packet))


def test_the_wire_carries_raw_bytes_while_the_lane_encodes() -> None:
    """Encoding goes on only after the wire carried raw bytes: one after the other, this would not end."""
    wire, raw = Recorder(), threading.Event()
    wire.before = lambda nbytes: raw.set()

    class Patient(Broken):
        def encode(self, tensor):
            assert raw.wait(WAIT)
            return ExactLane().encode(tensor)

    x = torch.randn(512, 64).bfloat16()
    with DualWire(DualLane(Patient(None), 0.5), "cpu", wire=wire) as dual:
        parcel = dual.send(x)
    assert [packet.lane for packet in parcel.packets] == ["raw", "exact"]


def test_the_wire_carries_raw_bytes_while_the_lane_decodes(monkeypatch) -> None:
    """Decoding ends only after the wire carried more than the coded part."""
    x = torch.randn(512, 64).bfloat16()
    wire, raw = Recorder(), threading.Event()
    with DualWire(DualLane(share=0.5), "cpu", wire=wire) as dual:
        parcel = dual.send(x)
        wire.crossed.clear()
        wire.before = lambda nbytes: raw.set() if wire.crossed else None

        def patient(packet, basis):
            assert raw.wait(WAIT)
            return decode_packet(packet, basis)

        monkeypatch.setattr("sidelane.pipeline.dual_wire.decode_packet", patient)
        assert same(dual.receive(parcel), x)


def test_coded_parts_cross_first_as_far_as_there_is_room(monkeypatch) -> None:
    """Decoders that wait for the last raw piece hold up all coded parts but two, and nothing else."""
    x = torch.randn(4096, 64).bfloat16()
    wire, raw = Recorder(), threading.Event()
    with DualWire(DualLane(share=0.5), "cpu", wire=wire, block=1 << 16, depth=2) as dual:
        parcel = dual.send(x)
        assert [packet.lane for packet in parcel.packets] == ["raw", "exact"] * 8
        wire.crossed.clear()

        def before(nbytes):
            if len(wire.crossed) == 2 + 7:
                raw.set()

        def patient(packet, basis):
            assert raw.wait(WAIT)
            return decode_packet(packet, basis)

        wire.before = before
        monkeypatch.setattr("sidelane.pipeline.dual_wire.decode_packet", patient)
        assert same(dual.receive(parcel), x)
    lanes = ["raw" if n == 1 << 15 else "exact" for n in wire.crossed]
    assert lanes == ["exact"] * 2 + ["raw"] * 8 + ["exact"] * 6


def test_the_wire_takes_its_time() -> None:
    """Both directions through a slow wire: the bytes of the packets at its rate, whichever lane they take."""
    x = torch.randn(4096, 64).bfloat16()
    bucket = TokenBucket(20e6, burst=0)
    with DualWire(DualLane(share=0.5), "cpu", wire=bucket, block=1 << 16) as dual:
        begin = bucket.take(0)
        parcel = dual.send(x)
        middle = bucket.take(0)
        dual.receive(parcel)
        end = bucket.take(0)
    assert middle - begin >= parcel.nbytes / 20e6
    assert end - middle >= parcel.nbytes / 20e6


@pytest.mark.parametrize(
    "error", [LaneError("no"), DriverError("cuvidCreate", 2, "OUT_OF_MEMORY"), torch.OutOfMemoryError("no")]
)
@pytest.mark.parametrize("after", [0, 3])
def test_raw_takes_over_what_the_lane_cannot(error, after) -> None:
    x = torch.randn(1024, 64).bfloat16()
    with DualWire(DualLane(Broken(error, after), 0.5), "cpu", block=1 << 14, workers=1, depth=1) as wire:
        parcel = wire.send(x)
        assert wire.fallbacks == 8 - after
        assert [packet.lane for packet in parcel.packets].count("exact") == after
        assert same(wire.receive(parcel), x)


def test_what_is_not_smaller_goes_raw() -> None:
    noise = torch.randint(-(2**15), 2**15, (512, 64), dtype=torch.int16).view(torch.bfloat16)
    with DualWire(DualLane(share=0.5), "cpu", block=1 << 14) as wire:
        parcel = wire.send(noise)
        assert {packet.lane for packet in parcel.packets} == {"raw"} and not wire.fallbacks
        assert same(wire.receive(parcel), noise)


@pytest.mark.parametrize("depth", [1, 6])
def test_other_errors_of_a_lane_are_raised_and_nothing_hangs(depth) -> None:
    x = torch.randn(1024, 64).bfloat16()
    with DualWire(
        DualLane(Broken(ZeroDivisionError("lane"), 2), 0.5), "cpu", block=1 << 13, depth=depth
    ) as wire:
        with pytest.raises(ZeroDivisionError):
            wire.send(x)
        wire._encode = ExactLane().encode
        assert same(wire.receive(wire.send(x)), x)


def test_an_error_of_the_wire_is_raised_and_nothing_hangs() -> None:
    x = torch.randn(1024, 64).bfloat16()
    wire = Recorder()
    with DualWire(DualLane(share=0.5), "cpu", wire=wire, block=1 << 13, depth=1) as dual:
        parcel = dual.send(x)

        def cut(nbytes):
            if len(wire.crossed) > 5:
                raise OSError("cut")

        wire.before = cut
        wire.crossed.clear()
        with pytest.raises(OSError, match="cut"):
            dual.send(x)
        wire.crossed.clear()
        with pytest.raises(OSError, match="cut"):
            dual.receive(parcel)
        wire.before = lambda nbytes: None
        assert same(dual.receive(parcel), x)


@pytest.mark.parametrize("depth", [1, 6])
def test_damaged_packets_are_errors_and_nothing_hangs(depth) -> None:
    x = torch.randn(1024, 64).bfloat16()
    with DualWire(DualLane(share=0.5), "cpu", block=1 << 13, depth=depth) as wire:
        parcel = wire.send(x)
        bad = [p.with_(params=(7,)) if p.lane == "exact" else p for p in parcel.packets]
        with pytest.raises(PacketError, match="zero planes"):
            wire.receive(replace(parcel, packets=tuple(bad)))
        with pytest.raises(PacketError, match="do not hold"):
            wire.receive(replace(parcel, packets=parcel.packets[1:]))
        with pytest.raises(PacketError, match="not every packet"):
            wire.receive(replace(parcel, like=parcel.like.with_(dtype=torch.float16)))
        assert same(wire.receive(parcel), x)


def test_a_bound_holds_over_all_parts() -> None:
    x = torch.randn(2048, 64)
    with DualWire(DualLane(PackedLane(bits=2), 0.6), "cpu", block=1 << 15, max_rel_error=0.01) as wire:
        y = wire.receive(wire.send(x))
    assert 0 < relative_error(x.view(-1), y.view(-1)) <= 0.01


@pytest.mark.parametrize(
    "out",
    [
        torch.empty(64, 512).t(),
        torch.empty(512, 64, dtype=torch.float16),
        torch.empty(512, 128)[:, ::2],
        torch.empty(511, 64),
        torch.empty(512, 64, requires_grad=True),
    ],
    ids=["order", "dtype", "gaps", "shape", "gradient"],
)
def test_destinations_that_do_not_fit(out) -> None:
    with DualWire(DualLane(), "cpu") as wire, pytest.raises(LaneError, match="out is not"):
        wire.receive(wire.send(torch.randn(512, 64)), out)
    with DualWire(DualLane(), "cpu") as wire, pytest.raises(LaneError, match="out is a int"):
        wire.receive(wire.send(torch.randn(512, 64)), 5)


@pytest.mark.parametrize(
    "options", [{"block": 0}, {"workers": 0}, {"depth": 1.5}, {"device": "nope"}, {"wire": 5}]
)
def test_bad_options_of_the_wire(options) -> None:
    with pytest.raises(SidelaneError, match=next(iter(options))):
        DualWire(DualLane(), **({"device": "cpu"} | options))
    with pytest.raises(LaneError, match="DualLane"):
        DualWire(ExactLane(), "cpu")
    with DualWire(DualLane(), "cpu") as wire, pytest.raises(LaneError, match="NoneType is no Parcel"):
        wire.receive(None)


def test_a_closed_wire() -> None:
    wire = DualWire(DualLane(), "cpu")
    parcel = wire.send(torch.randn(512, 64))
    wire.close()
    wire.close()
    with pytest.raises(LaneError, match="closed"):
        wire.send(torch.randn(4))
    with pytest.raises(LaneError, match="closed"):
        wire.receive(parcel)
