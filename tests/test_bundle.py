"""Packets in bundles come back as they were sent, and a bundle lives as long as one of them."""

from __future__ import annotations

import threading
from weakref import ref

import pytest
import torch

from faults import Countdown
from sidelane.pipeline import bundle as bundle_module
from sidelane.pipeline.budget import Budget
from sidelane.pipeline.bundle import LEAST, SHARE, Bundle, Bundles, Part
from sidelane.pipeline.lanes import decode_packet, open_lane
from sidelane.pipeline.moves import Moves, Parcel
from sidelane.pipeline.streams import HOST
from sidelane.pipeline.tiers import Pinned
from sidelane.pipeline.wire import Transit, Wire

FIRST = bundle_module.FIRST
LANE = open_lane("packed", bits=4)
NUMEL = 4096
NBYTES = LANE.encode(torch.zeros(NUMEL)).sections.buffer.numel()
FOUR = 4 * NBYTES * SHARE  # a device budget of which a bundle takes four packets


@pytest.fixture(autouse=True)
def _large_from_the_first_on(monkeypatch):
    monkeypatch.setattr(bundle_module, "FIRST", 1)


def tensors(count):
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(NUMEL, generator=generator) for _ in range(count)]


def bundles(limit=FOUR, host=None):
    device, memory = Budget(limit), Budget(host)
    wire = Wire(device, lambda nbytes: Pinned.take(memory, nbytes), lambda n: Pinned.promise(memory, n))
    return Bundles(wire, limit), wire, device, memory


def moves(limit=FOUR, host=None):
    device, memory = Budget(limit), Budget(host)
    carrier = Moves(device, lambda nbytes: Pinned.take(memory, nbytes), lambda n: Pinned.promise(memory, n))
    return carrier.bundles, carrier, device, memory


def transit_of(part):
    return part._bundle


def opened(home):
    with home.use() as packet:
        return decode_packet(packet)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 90])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("carrier", [bundles, moves])
@pytest.mark.parametrize("first", [1, FIRST])
def test_every_packet_comes_back(monkeypatch, count, order, carrier, first):
    monkeypatch.setattr(bundle_module, "FIRST", first)
    sent, found = tensors(count), {}
    through, _, device, memory = carrier()
    for _ in range(2):  # the second time the first bundles leave earlier
        homes = [through.send(LANE.encode(x)) for x in sent]
        assert device.held <= FOUR
        for i in range(count)[::order]:
            found[i] = opened(homes[i])
            homes[i] = None
        for i, x in enumerate(sent):
            assert torch.equal(found[i], LANE.decode(LANE.encode(x)))
        assert (device.held, memory.held) == (0, 0)
    assert count < 90 or memory.peak > 0


@pytest.mark.parametrize("carrier", [bundles, moves])
def test_packets_that_follow_each_other_share_a_home(carrier):
    through, _, _, _ = carrier()
    parts = [through.send(LANE.encode(x)) for x in tensors(9)]
    transits = [transit_of(part) for part in parts]
    assert [transits.index(t) for t in transits] == [0, 0, 0, 0, 4, 4, 4, 4, 8]


@pytest.mark.parametrize("carrier", [bundles, moves])
def test_the_first_bundles_of_a_pass_are_small(monkeypatch, carrier):
    monkeypatch.setattr(bundle_module, "FIRST", FIRST)
    through, _, device, _ = carrier()
    for _ in range(2):
        parts = [through.send(LANE.encode(x)) for x in tensors(13)]
        transits = [transit_of(part) for part in parts]
        assert [transits.index(t) for t in transits] == [0, 1, 2, 2, 4, 4, 4, 4, 8, 8, 8, 8, 12]
        assert all(
            torch.equal(opened(part), LANE.decode(LANE.encode(x)))
            for part, x in zip(parts, tensors(13), strict=True)
        )
        parts, transits = [], []
        assert device.held == 0


@pytest.mark.parametrize("carrier", [bundles, moves])
def test_what_does_not_share_leaves_a_bundle_closed(carrier):
    through, _, _, _ = carrier()
    first, second = tensors(2)
    part = through.send(LANE.encode(first))
    alone = through.send(open_lane("raw").encode(second))
    last = through.send(LANE.encode(second))
    assert isinstance(alone, Transit | Parcel) and transit_of(part) is not transit_of(last)


def test_parcels_of_bundles_are_fetched_in_reverse_order():
    through, carrier, device, _ = moves(limit=2 * FOUR // SHARE)
    parts = [through.send(LANE.encode(x)) for x in tensors(40)]
    parts.append(through.send(open_lane("raw").encode(tensors(1)[0])))  # behind what was open
    numbers = [p.number if isinstance(p, Parcel) else transit_of(p).close().number for p in parts]
    assert numbers == sorted(numbers) and len(set(numbers)) > 4


def test_a_bundle_that_finds_no_room_on_the_host_stays_on_the_device():
    """The budget has room, the machine has none."""
    through, carrier, device, memory = moves()
    carrier._take = lambda nbytes: None
    sent = tensors(3)
    parts = [through.send(LANE.encode(x)) for x in sent]
    carrier.room(FOUR)  # asks for more than there is: closes the bundle
    assert all(torch.equal(opened(p), LANE.decode(LANE.encode(x))) for p, x in zip(parts, sent, strict=True))
    assert (device.held, memory.held) == (3 * NBYTES, 0)
    parts.clear()
    assert device.held == 0


def test_what_a_budget_has_no_room_for_sends_the_open_bundle_off():
    through, carrier, device, memory = moves()
    part = through.send(LANE.encode(tensors(1)[0]))
    claim = carrier.room(FOUR)
    assert claim is not None and device.held == FOUR and memory.held > 0
    assert torch.equal(opened(part), LANE.decode(LANE.encode(tensors(1)[0])))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_bundle_that_failed_to_leave_can_be_sent_again(error):
    through, carrier, device, memory = moves()
    parts = [through.send(LANE.encode(x)) for x in tensors(3)]
    take, fail = carrier._take, Countdown(error)
    carrier._take = lambda nbytes: (fail(), take(nbytes))[1]
    fail.left = 0
    with pytest.raises(error):
        carrier.room(FOUR)
    fail.left = -1
    assert torch.equal(opened(parts[1]), LANE.decode(LANE.encode(tensors(3)[1])))
    parts.clear()
    assert (device.held, memory.held) == (0, 0)


@pytest.mark.parametrize("limit", [None, 0, LEAST * NBYTES * SHARE - 1])
def test_without_room_for_two_packets_there_are_no_bundles(limit):
    through, _, _, _ = bundles(limit)
    assert isinstance(through.send(LANE.encode(tensors(1)[0])), Transit)


@pytest.mark.parametrize("carrier", [bundles, moves])
def test_without_room_in_the_host_budget_a_packet_is_refused(carrier):
    through, _, device, memory = carrier(host=4096)
    alone = through.send(LANE.encode(tensors(1)[0]))
    assert isinstance(alone, Transit | Parcel)  # a bundle would not fit
    assert through.send(LANE.encode(tensors(1)[0])) is None
    assert device.held == NBYTES and memory.held == 4096


def test_a_bundle_dies_with_its_last_packet():
    through, wire, device, memory = bundles()
    parts = [through.send(LANE.encode(x)) for x in tensors(4)]
    kept = parts.pop(1)
    parts.clear()
    wire.settle()
    assert device.held == 4 * NBYTES
    opened(kept)
    del kept
    assert (device.held, memory.held, wire.transits.held) == (0, 0, 0)


def test_a_dead_bundle_is_not_added_to():
    through, wire, device, memory = bundles()
    part = through.send(LANE.encode(tensors(1)[0]))
    del part
    part = through.send(LANE.encode(tensors(2)[1]))
    assert torch.equal(opened(part), LANE.decode(LANE.encode(tensors(2)[1])))


def test_a_use_closes_the_bundle():
    through, wire, _, _ = bundles()
    first = through.send(LANE.encode(tensors(1)[0]))
    opened(first)
    second = through.send(LANE.encode(tensors(1)[0]))
    assert transit_of(first) is not transit_of(second)


def test_nothing_is_lost_between_adding_and_closing():
    """Threads add while another closes: what has a position is in the bundle."""
    for _ in range(50):
        bundle, buffers = Bundle(HOST, 1 << 30), [torch.full((256,), i % 256) for i in range(64)]
        places, start = {}, threading.Barrier(5)

        def add(share, bundle=bundle, buffers=buffers, places=places, start=start):
            start.wait()
            for i in range(share, 64, 4):
                if (number := bundle.add(buffers[i])) is not None:
                    places[i] = number

        threads = [threading.Thread(target=add, args=(share,)) for share in range(4)]
        for thread in threads:
            thread.start()
        start.wait()
        packet = bundle.settle()
        for thread in threads:
            thread.join()
        assert len(places) == len(packet.sections)
        assert all(packet.sections[str(number)] is buffers[i] for i, number in places.items())
        assert bundle.add(buffers[0]) is None


def test_parts_are_homes_without_memory_of_their_own():
    through, wire, _, _ = bundles()
    packet = LANE.encode(tensors(1)[0])
    part = through.send(packet)
    assert isinstance(part, Part)
    with part.use() as found:
        assert found.nbytes == packet.nbytes and found.sections["codes"].data_ptr() == (
            packet.sections["codes"].data_ptr()
        )


@pytest.mark.parametrize("carrier", [bundles, moves])
def test_what_has_left_frees_the_memory_that_it_was_encoded_to(carrier):
    through, _, device, memory = carrier()
    packets = [LANE.encode(x) for x in tensors(80)]
    parts = [through.send(packet) for packet in packets]
    buffers = [ref(packet.sections.buffer) for packet in packets]
    packets.clear()
    alive = sum(buffer() is not None for buffer in buffers)
    assert len(parts) == 80 and 0 < alive * NBYTES <= device.held <= FOUR


@pytest.mark.parametrize("carrier", [bundles, moves])
@pytest.mark.parametrize("left", [False, True])
def test_nobody_holds_the_memory_of_a_dead_bundle(carrier, left):
    through, where, device, _ = carrier()
    packets = [LANE.encode(x) for x in tensors(3)]
    parts = [through.send(packet) for packet in packets]
    buffers = [ref(packet.sections.buffer) for packet in packets]
    packets.clear()
    if left:
        (where.room if carrier is moves else where._make_room)(FOUR)
    else:
        parts.clear()
    assert not any(buffer() is not None for buffer in buffers)


@pytest.mark.parametrize("carrier", [bundles, moves])
def test_a_bundle_opened_while_another_is_closed_is_not_lost(carrier):
    """A thread sends while another is about to close what was open before."""
    through, _, _, _ = carrier()
    first, later = through.send(LANE.encode(tensors(1)[0])), []
    bundle = through._open()
    close = bundle.close

    def slow():
        bundle.close = close
        close()
        thread.start()
        thread.join(0.2)  # it comes to its end only after us

    thread = threading.Thread(target=lambda: later.append(through.send(LANE.encode(tensors(1)[0]))))
    bundle.close = slow
    through.close()
    thread.join()
    last = through.send(LANE.encode(tensors(1)[0]))
    assert transit_of(later[0]) is transit_of(last) is not transit_of(first)


def test_what_is_fetched_on_demand_stays_within_the_budget():
    through, carrier, device, _ = moves()
    parts = [through.send(LANE.encode(x)) for x in tensors(32)]
    carrier.room(FOUR)
    for part in parts:  # in the order that fetching ahead does not help
        opened(part)
    assert carrier.fetched == 8 and device.held <= FOUR
