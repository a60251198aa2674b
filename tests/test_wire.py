"""The stream protocol of packets in transit, on modelled streams that run their work in any legal order."""

from __future__ import annotations

import random
import weakref
from contextlib import contextmanager

import pytest
import torch

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

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


class Block:
    """A packet in device memory; once dropped, the next work of the stream that owns it overwrites it."""

    def __init__(self, device, value=None):
        self.device = GPU
        self.cell = cell = [POISON]
        if value is not None:
            device.current.enqueue(lambda: cell.__setitem__(0, value))
        owner = device.current
        weakref.finalize(self, lambda: owner.enqueue(lambda: cell.__setitem__(0, POISON)))


class Host:
    """Stands for HostCopy: the copies are work of the current stream. Memory is a list of one value."""

    nbytes = 10

    def __init__(self, device):
        self.device = device

    def write(self, block, memory):
        source = block.cell
        self.device.current.enqueue(lambda: memory.__setitem__(0, source[0]))

    def read(self, memory, _):
        block = Block(self.device)
        target = block.cell
        self.device.current.enqueue(lambda: target.__setitem__(0, memory[0]))
        return block


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


@pytest.fixture
def model(monkeypatch):
    """Makes a `Device` the one that `wire` talks to."""

    def make(seed):
        device = Device(random.Random(seed))
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing=False: Event())
        monkeypatch.setattr(wire_module, "current_stream", lambda _: device.current)
        monkeypatch.setattr(wire_module, "on", device.stream)
        monkeypatch.setattr(wire_module, "side_stream", lambda _, role: device.side[role == "copy in"])
        monkeypatch.setattr(wire_module, "HostCopy", lambda _: Host(device))
        return device

    return make


@pytest.mark.parametrize("limit", [None, 0, 10, 25, 60])
@pytest.mark.parametrize("slots", [12, 4])
@pytest.mark.parametrize("streams", [1, 2])
def test_every_use_reads_what_was_sent_in_any_order_of_work(model, limit, slots, streams):
    for seed in range(60):
        device = model(seed)
        rng = device.rng
        budget, host = Budget(limit), Slots(slots)
        wire = Wire(budget, host.take)
        reads, transits = [], {}

        def use(value, device=device, transits=transits, reads=reads):
            with transits[value].use() as block:
                cell = block.cell
                device.current.enqueue(lambda: reads.append((value, cell[0])))

        for step in range(3):
            for value in range(12 * step, 12 * step + 12):
                device.current = device.compute[rng.randrange(streams)]
                transits[value] = wire.send(Block(device, value))
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
    assert all(t.copied is None for t in transits) and host.budget.peak == 0


def test_the_packets_that_backward_starts_with_are_not_copied_out_again(model):
    device = model(0)
    host = Slots(20)
    wire = Wire(Budget(100), host.take)
    backward(device, forward(wire, device, 20))
    assert host.budget.peak == 200
    second = forward(wire, device, 20)
    assert [t.copied is not None for t in second] == [True] * 11 + [False] * 9
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
