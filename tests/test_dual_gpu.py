"""Both lanes on a real device: no order of streams changes what arrives, and copies go to their place."""

from __future__ import annotations

import pytest
import torch

from samples import bits_of
from sidelane.errors import LaneError, PacketError
from sidelane.pipeline.arena import shared
from sidelane.pipeline.dual import DualLane
from sidelane.pipeline.dual_wire import DualWire, Parcel
from sidelane.pipeline.lanes import open_lane
from sidelane.pipeline.throttle import TokenBucket

pytestmark = pytest.mark.gpu

SLEEP = 20_000_000  # cycles, 10 ms at 2 GHz
LANES = {"exact": {}, "packed": {"bits": 8}}


class Slow:
    """A lane that sleeps on the device before each encode and decode."""

    def __init__(self, lane) -> None:
        self.name, self.exact, self._lane = lane.name, lane.exact, lane

    def encode(self, tensor):
        torch.cuda._sleep(SLEEP)
        return self._lane.encode(tensor)

    def decode(self, packet):
        torch.cuda._sleep(SLEEP)
        return self._lane.decode(packet)

    def finer(self):
        return self._lane.finer()


def same(a, b) -> bool:
    return torch.equal(bits_of(a), bits_of(b))


@pytest.mark.parametrize("name", LANES)
@pytest.mark.parametrize("rate", [None, 5e9])
def test_what_arrives_is_what_the_lanes_give_alone(cuda, name, rate) -> None:
    lane = open_lane(name, **LANES[name])
    x = torch.randn(8192, 512, device=cuda).bfloat16()
    with DualWire(
        DualLane(lane, 0.4), cuda, block=1 << 20, wire=None if rate is None else TokenBucket(rate)
    ) as wire:
        parcel = wire.send(x)
        assert {packet.lane for packet in parcel.packets} == {"raw", name}
        assert all(part.is_pinned() for packet in parcel.packets for part in packet.sections.values())
        y = wire.receive(parcel)
    first = 0
    for packet in parcel.packets:
        part = slice(first, first + packet.flat_numel)
        first += packet.flat_numel
        want = x.view(-1)[part].view(packet.shape)
        want = want if packet.lane == "raw" else lane.decode(lane.encode(want))
        assert same(y.view(-1)[part], want.view(-1))


@pytest.mark.parametrize("name", LANES)
def test_the_source_is_read_after_what_wrote_it_and_before_what_writes_it_next(cuda, name) -> None:
    lane = Slow(open_lane(name, **LANES[name]))
    with DualWire(DualLane(lane, 0.5), cuda, block=1 << 19, workers=2) as wire:
        for value in (1.0, 2.0, 3.0):
            x = torch.zeros(2048, 512, device=cuda, dtype=torch.bfloat16)
            torch.cuda._sleep(SLEEP)
            x.fill_(value)
            parcel = wire.send(x)
            x.fill_(-1.0)
            del x
            out = torch.empty(2048, 512, device=cuda, dtype=torch.bfloat16)
            torch.cuda._sleep(SLEEP)
            out.fill_(-2.0)
            y = wire.receive(parcel, out)
            assert y.data_ptr() == out.data_ptr()
            torch.testing.assert_close(y, torch.full_like(y, value), rtol=0, atol=0.01)


def test_raw_parts_take_no_memory_but_their_place(cuda) -> None:
    x = torch.randn(8 << 20, device=cuda)
    with DualWire(DualLane(open_lane("exact"), 0.0), cuda) as wire:
        parcel = wire.send(x)
        out = torch.empty_like(x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        wire.receive(parcel, out)
        assert torch.cuda.max_memory_allocated() == before
    assert same(out, x)


def test_host_memory_goes_back_with_the_parcel(cuda) -> None:
    x = torch.randn(4 << 20, device=cuda).bfloat16()
    with DualWire(DualLane(open_lane("exact")), cuda, block=1 << 20) as wire:
        before = shared().held
        parcel = wire.send(x)
        assert shared().held > before
        wire.receive(parcel)
        del parcel
        assert shared().held == before


def test_a_damaged_part_is_an_error_and_the_wire_goes_on(cuda) -> None:
    x = torch.randn(4096, 512, device=cuda).bfloat16()
    with DualWire(DualLane(open_lane("exact")), cuda, block=1 << 19) as wire:
        parcel = wire.send(x)
        packets = [p.with_(params=(7,)) if p.lane == "exact" else p for p in parcel.packets]
        with pytest.raises(PacketError, match="zero planes"):
            wire.receive(Parcel(parcel.like, tuple(packets)))
        assert same(wire.receive(parcel), x)


def test_a_throttled_copy_between_host_and_device(cuda) -> None:
    x = torch.randn(1 << 20, device=cuda)
    host, back = torch.empty(1 << 20, pin_memory=True), torch.empty_like(x)
    wire = TokenBucket(10e9)
    wire.copy(x, host).synchronize()
    event = wire.copy(host, back)
    torch.cuda.current_stream().wait_event(event)
    assert same(back, x)
    assert same(host.to(cuda), x)
    with pytest.raises(LaneError, match="not pinned"):
        wire.copy(x, torch.empty(1 << 20))


def test_a_throttled_copy_waits_for_the_source(cuda) -> None:
    x = torch.zeros(1 << 20, device=cuda)
    host = torch.empty(1 << 20, pin_memory=True)
    torch.cuda._sleep(SLEEP)
    x.fill_(3.0)
    TokenBucket(25e9).copy(x, host).synchronize()
    assert (host == 3.0).all()
