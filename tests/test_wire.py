"""The stream protocol of packets in transit, on modelled streams that run their work in any legal order."""

from __future__ import annotations

import random
import types
import weakref
from contextlib import contextmanager
from itertools import count

import pytest
import torch

from faults import Countdown
from interrupt import interrupted
from sidelane.pipeline import copies as copies_module
from sidelane.pipeline import waits as waits_module
from sidelane.pipeline import wire as wire_module
from sidelane.pipeline.budget import Budget
from sidelane.pipeline.tiers import Pinned
from sidelane.pipeline.wire import Wire

GPU = torch.device("cuda", 0)
POISON = -1


class Event:
    def __init__(self):
        self.reached = False

    def query(self):
        return self.reached

    def elapsed_time(self, end):
        return 0.0


class Stream:
    """A queue of work: (event to wait for or None, what to do)."""

    def __init__(self, device=GPU):
        self.device = device
        self.queue = []

    def enqueue(self, work):
        self.queue.append((None, work))

    def wait_event(self, event):
        self.queue.append((event, lambda: None))

    def record_event(self, event=None):
        event = event or Event()
        self.enqueue(lambda: setattr(event, "reached", True))
        return event


class Device:
    """Streams whose work is done when the test says so, in an order that a random number decides."""

    def __init__(self, rng):
        self.rng = rng
        self.compute = [Stream(), Stream()]
        self.side = (Stream(), Stream())
        self.torn = []
        self.current = self.compute[0]

    def run(self, steps=None):
        streams = [*self.compute, *self.side]
        while steps is None or steps > 0:
            ready = [s for s in streams if s.queue and (s.queue[0][0] is None or s.queue[0][0].reached)]
            if not ready:
                assert steps is not None or not any(s.queue for s in streams), "deadlock"
                return
            _, work = self.rng.choice(ready).queue.pop(0)
            work()
            steps = None if steps is None else steps - 1

    def run_until(self, event):
        """Wait on the host."""
        while not event.reached:
            self.run(1)

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


class Block:
    """A packet in device memory; once dropped, the next work of the stream that owns it overwrites it, and a
    copy into it after that is torn."""

    size = 16

    def __init__(self, device, value=None):
        self.device = GPU
        self.cell = cell = [POISON]
        self.freed = freed = []
        self.model = device
        # Until the stream gets here, the memory is written for those that had it before.
        device.current.enqueue(lambda: cell.__setitem__(0, POISON if value is None else value))
        owner = device.current

        def free():
            cell[0] = POISON
            freed.append(True)

        weakref.finalize(self, lambda: owner.enqueue(free))

    def copy_(self, memory):
        cell, freed, torn = self.cell, self.freed, self.model.torn

        def work():
            if freed:
                torn.append(memory[0])
            cell[0] = memory[0]

        self.model.current.enqueue(work)
        return self


class Late:
    """A packet of `value` whose size is known when it is written."""

    nbytes = 16

    def __init__(self, device, value):
        self.device = GPU
        self.owner = device.current
        self.block = Block(device, value)
        self.ready = self.owner.record_event()
        self.waits = 0
        self._device = device

    def settle(self):
        """As `LatePacket.settle`, a smaller block."""
        if isinstance(self.block, Block) and self.block.size == 16:
            self.waits += not self.ready.reached
            self._device.run_until(self.ready)
            with self._device.stream(self.owner):
                block, source = Block(self._device), self.block.cell
                target = block.cell
                self.owner.enqueue(lambda: target.__setitem__(0, source[0]))
            block.size = 10
            self.block = block
        return self.block


class Gathered:
    """A packet of values that the stream which was current at first adds while it is open, as a `Bundle`."""

    nbytes = 16

    def __init__(self, device):
        self.device = GPU
        self.owner = device.current
        self.block = Block(device, ())
        self.ready = Event()
        self._count = 0

    def add(self, value):
        """Its position, or None."""
        if self.ready.reached or self._count == 3:
            return None
        cell = self.block.cell
        self.owner.enqueue(lambda: cell.__setitem__(0, (*cell[0], value)))
        self._count += 1
        return self._count - 1

    def settle(self):
        self.ready.reached = True
        return self.block


class Part:
    """The home of a value in it."""

    def __init__(self, transit, number):
        self.transit, self.number = transit, number

    @contextmanager
    def use(self):
        with self.transit.use() as block:
            yield block


class Host:
    """Stands for PacketLayout: the copies are work of the current stream. Memory is a list of one value."""

    nbytes = 10

    def __init__(self, device):
        self.device = device

    def write(self, block, memory):
        source = block.cell
        self.device.current.enqueue(lambda: memory.__setitem__(0, source[0]))

    def read_to(self, buffer, memory):
        return buffer.copy_(memory)


class Slots:
    """Stands for the arena: `count` cells of memory, handed out again once their slot is dropped."""

    def __init__(self, count):
        self.budget = Budget(10 * count)
        self.free = [([POISON], None) for _ in range(count)]

    def take(self, nbytes):
        claim = self.budget.claim(nbytes)
        return Pinned(HostSlot(self), claim) if claim else None


class HostSlot:
    def __init__(self, slots):
        self.tensor, self.released = slots.free.pop(0)
        self.slots = slots

    def wait(self, stream):
        if self.released is not None:
            stream.wait_event(self.released)

    def __del__(self):
        self.slots.free.append((self.tensor, self.released))


def on_modelled_streams(monkeypatch, device, empty):
    """Copies run on the streams of `device`, into memory that `empty` makes on the current one."""
    monkeypatch.setattr(copies_module, "current_stream", lambda _: device.current)
    monkeypatch.setattr(copies_module, "on", device.stream)
    monkeypatch.setattr(copies_module, "side_stream", lambda _, role: device.side[role == "copy in"])
    monkeypatch.setattr(copies_module, "torch", types.SimpleNamespace(empty=empty, uint8=torch.uint8))


@pytest.fixture
def model(monkeypatch):
    """Makes a `Device` the one that the modules talk to."""

    def make(seed):
        device = Device(random.Random(seed))
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing=False: Event())
        monkeypatch.setattr(wire_module, "current_stream", lambda _: device.current)
        monkeypatch.setattr(wire_module, "PacketLayout", lambda _: Host(device))
        on_modelled_streams(monkeypatch, device, lambda nbytes, **_: Block(device))
        return device

    return make


@pytest.mark.parametrize(("limit", "ahead"), [(None, 0), (0, 0), (10, 0), (25, 0), (60, 0), (60, 100)])
@pytest.mark.parametrize("slots", [12, 4])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize(("late", "gathered"), [(0, 0), (0.5, 0), (1, 0), (0, 1), (0.4, 0.5)])
def test_every_use_reads_what_was_sent_in_any_order_of_work(
    model, monkeypatch, limit, ahead, slots, streams, late, gathered
):
    """`ahead`: bytes that backward may always hold; with less it drops what forward has left."""
    monkeypatch.setattr(wire_module, "AHEAD", ahead)
    monkeypatch.setattr(wire_module, "BACKWARD", 0.6)
    for seed in range(40):
        device = model(seed)
        rng = device.rng
        budget, host = Budget(limit), Slots(slots)
        wire = Wire(budget, host.take, host.budget.claim)
        reads, transits, told, last = [], {}, [], None

        def use(value, device=device, transits=transits, reads=reads):
            transit = transits[value]
            with transit.use() as block:
                cell, number = block.cell, transit.number if isinstance(transit, Part) else None
                device.current.enqueue(
                    lambda: reads.append((value, cell[0] if number is None else cell[0][number]))
                )

        for step in range(3):
            for value in range(12 * step, 12 * step + 12):
                device.current = device.compute[rng.randrange(streams)]
                transits[value] = None
                if rng.random() < gathered:
                    transit = last and last[1]()
                    number = last[0].add(value) if transit and last[0].owner == device.current else None
                    if number is None:
                        bundle = Gathered(device)
                        transit = wire.send_late(bundle, told.append)
                        last = (bundle, weakref.ref(transit)) if transit else None
                        number = bundle.add(value) if transit else None
                    if number is not None:
                        transits[value] = Part(transit, number)
                        del transit
                        device.run(rng.randrange(8))
                        continue
                packet = Late(device, value) if rng.random() < late else Block(device, value)
                if isinstance(packet, Late):
                    transits[value] = wire.send_late(packet, told.append)
                    packet = packet.settle() if transits[value] is None else None
                if packet is not None:
                    transits[value] = wire.send(packet)
                del packet
                if transits[value] is None:
                    del transits[value]
                    assert not host.free and limit is not None
                device.run(rng.randrange(8))
                if transits and rng.random() < 0.2:
                    use(rng.choice(list(transits)))
                if transits and rng.random() < 0.1:
                    del transits[rng.choice(list(transits))]
            order = sorted(transits, reverse=True)
            if rng.random() < 0.5:
                rng.shuffle(order)
            for value in order:
                device.current = device.compute[rng.randrange(streams)]
                for _ in range(rng.choice((0, 1, 1, 2))):
                    use(value)
                    device.run(rng.randrange(12))
                if rng.random() < 0.7:
                    del transits[value]
        device.run()
        assert reads and all(sent == got for sent, got in reads), (seed, reads)
        assert not device.torn
        assert limit is None or budget.peak <= limit
        transits.clear()
        assert (budget.held, host.budget.held, len(host.free)) == (0, 0, slots)


def forward(wire, device, values):
    transits = [wire.send(Block(device, i)) for i in range(values)]
    device.run()
    return transits


def backward(device, transits):
    while transits:
        with transits.pop().use():
            pass
        device.run()


def test_packets_are_fetched_ahead_in_reverse_order(model):
    device = model(0)
    wire = Wire(Budget(40), Slots(8).take)
    backward(device, forward(wire, device, 8))
    assert (wire.fetched, wire.prefetched) == (0, 4)


def test_without_room_to_fetch_ahead_every_packet_is_fetched_on_demand(model):
    device = model(0)
    wire = Wire(Budget(10), Slots(8).take)
    backward(device, forward(wire, device, 8))
    assert (wire.fetched, wire.prefetched) == (7, 0)


def test_nothing_leaves_a_device_without_limit(model):
    device = model(0)
    host = Slots(0)
    transits = forward(Wire(Budget(), host.take), device, 8)
    assert all(t.stored is None for t in transits) and host.budget.peak == 0


def test_the_packets_that_backward_starts_with_are_not_copied_out_again(model):
    device = model(0)
    host = Slots(20)
    wire = Wire(Budget(100), host.take)
    backward(device, forward(wire, device, 20))
    assert host.budget.peak == 200
    second = forward(wire, device, 20)
    assert [t.stored is not None for t in second] == [True] * 11 + [False] * 9
    assert host.budget.held == 110
    backward(device, second)
    assert (wire.fetched, host.budget.held) == (0, 0)


def test_a_longer_pass_than_the_last_copies_out_late(model):
    device = model(0)
    wire = Wire(Budget(100), Slots(40).take)
    backward(device, forward(wire, device, 10))
    transits = forward(wire, device, 30)
    assert sum(t.local is not None for t in transits) == 10
    backward(device, transits)


def test_a_full_host_is_told_unless_the_packet_stays(model):
    device = model(0)
    wire = Wire(Budget(100), Slots(3).take)
    transits = [wire.send(Block(device, i)) for i in range(4)]
    assert [t is None for t in transits] == [False] * 3 + [True]


def test_nodes_that_want_the_same_packet_share_one_fetched_copy(model):
    device = model(0)
    wire = Wire(Budget(60), Slots(12).take)
    transits = forward(wire, device, 12)
    while transits:
        for _ in range(3):
            with transits[-1].use():
                pass
            device.run()
        transits.pop()
    assert wire.fetched + wire.prefetched == 6


def test_a_graph_that_is_kept_goes_on_being_fetched_ahead(model):
    device = model(0)
    wire = Wire(Budget(60), Slots(40).take)
    transits = forward(wire, device, 40)
    for transit in reversed(transits):
        with transit.use():
            pass
        device.run()
    assert wire.fetched == 0 and wire.prefetched == 34


def late_wire(device, limit, slots=20):
    host = Slots(slots)
    return Wire(Budget(limit), host.take, host.budget.claim), host


def test_a_late_packet_is_copied_out_when_its_size_has_become_known(model):
    device, told = model(0), []
    wire, host = late_wire(device, 400)
    first = wire.send_late(Late(device, 1), told.append)
    assert first.stored is None and not told
    second = wire.send_late(Late(device, 2), told.append)
    assert first.stored is None and not told
    device.run()
    third = wire.send_late(Late(device, 3), told.append)
    assert (first.stored is None, second.stored is None, third.stored is None) == (False, False, True)
    assert len(told) == 2 and host.budget.held == 2 * 10 + 16  # what is late holds a promise


def test_the_host_waits_when_more_than_the_bound_is_unknown(model):
    device = model(0)
    wire, _ = late_wire(device, 4 * 16 * 3)
    packets = [Late(device, i) for i in range(6)]
    transits = [wire.send_late(packet, lambda _: None) for packet in packets]
    assert [packet.waits for packet in packets] == [1, 1, 0, 0, 0, 0]
    assert [t.stored is not None for t in transits] == [True, True, False, False, False, False]


def test_a_full_device_waits_for_sizes_before_it_gives_up(model):
    device = model(0)
    wire, host = late_wire(device, 40)
    wire._unknown = 1000
    packets = [Late(device, i) for i in range(8)]
    transits = [wire.send_late(packet, lambda _: None) for packet in packets]
    assert all(transits) and all(packet.waits for packet in packets[:5])
    device.run()
    wire.settle()
    assert host.budget.held == 80 and wire._budget.held <= 40  # as much as the packets are long, no promises
    backward(device, transits)


def test_settled_packets_take_the_room_that_they_need(model):
    device = model(0)
    wire, host = late_wire(device, 400)
    transits = [wire.send_late(Late(device, i), lambda _: None) for i in range(6)]
    assert (host.budget.held, wire._budget.held) == (96, 96)
    wire.settle()
    assert (host.budget.held, wire._budget.held) == (60, 60)
    assert len(transits) == 6


def test_of_late_packets_too_those_that_backward_starts_with_stay(model):
    device = model(0)
    wire, host = late_wire(device, 100, 40)
    for copied in (20, 11):
        transits = []
        for i in range(20):
            transits.append(wire.send_late(Late(device, i), lambda _: None))
            device.run()
        wire.settle()
        assert sum(t.stored is not None for t in transits) == copied
        backward(device, transits)


def test_a_use_before_the_size_is_known_waits_for_it(model):
    device = model(0)
    wire, host = late_wire(device, 400)
    packets = [Late(device, i) for i in range(4)]
    transits = [wire.send_late(packet, lambda _: None) for packet in packets]
    reads = []
    with transits[3].use() as block:
        cell = block.cell
        device.current.enqueue(lambda: reads.append(cell[0]))
    device.run()
    assert reads == [3] and wire.fetched == 0 and host.budget.held == 40
    backward(device, transits)


def test_a_late_packet_that_dies_leaves_nothing(model):
    device, told = model(0), []
    wire, host = late_wire(device, 400)
    for i in range(8):
        assert wire.send_late(Late(device, i), told.append)
    device.run()
    wire.settle()
    assert not told and host.budget.held == wire._budget.held == 0 and not wire._late


def test_without_room_or_promise_a_late_packet_is_not_taken(model):
    device = model(0)
    for limit, slots in ((10, 20), (400, 1)):
        wire, host = late_wire(device, limit, slots)
        assert wire.send_late(Late(device, 1), lambda _: None) is None
        assert host.budget.held == wire._budget.held == 0
    wire, _ = late_wire(device, None, 0)
    transit = wire.send_late(Late(device, 1), lambda _: None)
    wire.settle()
    assert transit.local is not None and transit.stored is None


@pytest.mark.parametrize("where", ["settle", "take", "store", "tell"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_while_a_size_is_learned_may_be_followed_by_another_go(model, monkeypatch, where, error):
    device = model(0)
    wire, host = late_wire(device, 400)
    fail = Countdown(error)
    packets = [Late(device, i) for i in range(3)]
    owner, name = {
        "settle": (Late, "settle"),
        "take": (wire, "_take"),
        "store": (Host, "write"),
        "tell": (None, ""),
    }[where]
    if owner is not None:
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (fail(), call(*args))[1])
    transits = [wire.send_late(packet, lambda _: fail() if where == "tell" else None) for packet in packets]
    fail.left = 1
    with pytest.raises(error):
        wire.settle()
    fail.left = -1
    reads = []
    for i in (2, 1, 0):
        with transits[i].use() as block:
            cell = block.cell
            device.current.enqueue(lambda i=i, cell=cell, reads=reads: reads.append((i, cell[0])))
        device.run()
    assert reads == [(2, 2), (1, 1), (0, 0)]
    transits.clear()
    del block
    assert host.budget.held == wire._budget.held == 0


def test_nothing_is_kept_of_passes_that_are_over(model):
    device = model(0)
    wire, _ = late_wire(device, 200)
    for _ in range(3):
        packets = [Late(device, i) if i % 2 else Block(device, i) for i in range(8)]
        send = [wire.send, lambda packet: wire.send_late(packet, lambda _: None)]
        transits = [send[i % 2](packet) for i, packet in enumerate(packets)]
        del packets
        device.run()
        backward(device, transits)
    last = wire.send(Block(device, 0))
    queues = (wire._used, wire._ahead, wire._leaving, wire._held, wire._late)
    assert last is not None and sum(map(len, queues)) == 1


def test_gradients_take_the_room_of_what_is_fetched_ahead(model, monkeypatch):
    """Of 93 bytes, as many are left free as the weights have that were saved after the packet in use."""
    monkeypatch.setattr(wire_module, "AHEAD", 0)
    held = {}
    for weights in (0, 1):
        device = model(0)
        wire, _ = late_wire(device, 100, 60)
        transits = []
        for i in range(40):
            transits.append(wire.send(Block(device, i)))
            wire.expect_gradient(weights)
            device.run()
        held[weights] = []
        while transits:
            with transits.pop().use():
                pass
            device.run()
            held[weights].append(wire._budget.held)
    assert held[0][:31] == [80] * 31
    assert all(73 - i <= nbytes <= 93 - i for i, nbytes in enumerate(held[1][:31]))


def test_backward_starts_with_less_than_forward_may_hold(model, monkeypatch):
    """What has been copied out leaves when backward begins, down to what it may hold, the oldest first."""
    monkeypatch.setattr(wire_module, "AHEAD", 0)
    device = model(0)
    wire = Wire(Budget(160), Slots(40).take)
    for _ in range(2):
        transits = forward(wire, device, 40)
        device.run()
        assert wire._budget.held == 160
        with transits.pop().use():
            assert wire._budget.held == 150
        assert [t.local is not None for t in transits[23:27]] == [False, False, True, True]
        backward(device, transits)


def test_the_packet_that_backward_asks_for_first_is_not_dropped(model, monkeypatch):
    monkeypatch.setattr(wire_module, "AHEAD", 0)
    device = model(0)
    wire = Wire(Budget(160), Slots(16).take)
    transits = forward(wire, device, 16)
    with transits[0].use():
        assert wire.fetched == 0 and transits[1].local is None


def test_an_interrupt_at_any_point_loses_no_late_packet(model):
    for at in count():
        device = model(at)
        wire, host = late_wire(device, 400)
        transits = []

        def send(wire=wire, device=device, transits=transits):
            for i in range(3):
                transits.append(wire.send_late(Late(device, i), lambda _: None))
            wire.settle()

        hit = interrupted(send, at, wire_module, copies_module, waits_module)
        reads = []
        for i in reversed(range(len(transits))):
            with transits[i].use() as block:
                cell = block.cell
                device.current.enqueue(lambda i=i, cell=cell, reads=reads: reads.append((i, cell[0])))
            del block
            device.run()
        assert reads == [(i, i) for i in reversed(range(len(transits)))], at
        transits.clear()
        assert host.budget.held == wire._budget.held == 0, at
        if not hit:
            break
    assert at > 40


@pytest.mark.parametrize("stream", [0, 1])
def test_an_interrupt_at_any_point_of_a_use_tears_nothing(model, stream):
    for at in count():
        device = model(at)
        wire, host = late_wire(device, 40, 60)
        transits = forward(wire, device, 12)
        with transits.pop().use():
            pass
        device.current = device.compute[stream]
        reads = []

        def use(device=device, transits=transits, reads=reads):
            for i in (6, 5, 4):
                with transits[i].use() as block:
                    cell = block.cell
                    entry = [i]
                    device.current.enqueue(lambda entry=entry, cell=cell: entry.append(cell[0]))
                reads.append(entry)  # what a node has read that was interrupted is lost

        hit = interrupted(use, at, wire_module, copies_module, waits_module)
        if at % 2:
            use()
        transits.clear()
        device.run()
        assert not device.torn and all(i == got for i, got in reads), at
        assert host.budget.held == wire._budget.held == 0, at
        if not hit:
            break
    assert at > 100


def test_memory_that_runs_out_while_more_is_fetched_ahead_tears_nothing(model, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("no memory")

    for seed in range(30):
        device = model(seed)
        wire, host = late_wire(device, 40, 60)
        transits = forward(wire, device, 12)
        for _ in range(2):
            with transits.pop().use():
                pass
        ahead = max(i for i, transit in enumerate(transits) if transit.local and transit.local._unwaited)
        del transits[ahead + 1 :]  # there is room to fetch more
        device.current = device.compute[1]
        monkeypatch.setattr(copies_module.torch, "empty", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError), transits[ahead].use():
            pass
        transits.clear()
        device.run()
        assert not device.torn and host.budget.held == wire._budget.held == 0, seed


def test_waits_for_copies_are_counted(model):
    device = model(0)
    wire, _ = late_wire(device, 10, 60)
    transits = forward(wire, device, 3)
    wire.waits._fold(block=False)
    assert not wire.waits._marks
    with transits[0].use():
        assert len(wire.waits._marks) == 1
    device.run()
    wire.waits._fold(block=False)
    with transits[0].use():
        assert not wire.waits._marks  # it is there
