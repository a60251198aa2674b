"""The stream protocol of packets in transit, on modelled streams that run their work in any legal order."""

from __future__ import annotations

import random
import weakref
from contextlib import contextmanager

import pytest
import torch

from sidelane.codec.packet import Packet
from sidelane.pipeline import wire as wire_module
from sidelane.pipeline.stash import Budget
from sidelane.pipeline.wire import GRANULE, HostCopy, Wire, pinned_blocks

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
    """Stands for HostCopy: the copies are work of the current stream."""

    nbytes = 10

    def __init__(self, device):
        self.device = device
        self.cell = [POISON]

    def write(self, block):
        source, target = block.cell, self.cell
        self.device.current.enqueue(lambda: target.__setitem__(0, source[0]))

    def read(self, _):
        block = Block(self.device)
        source, target = self.cell, block.cell
        self.device.current.enqueue(lambda: target.__setitem__(0, source[0]))
        return block


@pytest.fixture
def model(monkeypatch):
    """Makes a `Device` the one that `wire` talks to."""

    def make(seed):
        device = Device(random.Random(seed))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: device.current)
        monkeypatch.setattr(torch.cuda, "stream", device.stream)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing=False: Event())
        monkeypatch.setattr(wire_module, "side_streams", lambda _: device.side)
        return device

    return make


@pytest.mark.parametrize("limit", [None, 0, 10, 25, 60])
@pytest.mark.parametrize("keep_last", [0, 2])
@pytest.mark.parametrize("streams", [1, 2])
def test_every_use_reads_what_was_sent_in_any_order_of_work(model, limit, keep_last, streams):
    for seed in range(60):
        device = model(seed)
        rng = device.rng
        budget, host = Budget(limit), Budget()
        wire = Wire(budget, keep_last)
        transits, reads = {}, []

        def use(value, device=device, transits=transits, reads=reads):
            with transits[value].use() as block:
                cell = block.cell
                device.current.enqueue(lambda: reads.append((value, cell[0])))

        for value in range(12):
            device.current = device.compute[rng.randrange(streams)]
            transits[value] = wire.send(Block(device, value), Host(device), host.claim(10))
            device.run(rng.randrange(8))
            if rng.random() < 0.2:
                use(rng.choice(list(transits)))
            if rng.random() < 0.1:
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
        assert (budget.held, host.held) == (0, 0)


def test_packets_are_fetched_ahead_in_reverse_order(model):
    device = model(0)
    wire = Wire(Budget(), keep_last=0)
    host = Budget()
    transits = [wire.send(Block(device, i), Host(device), host.claim(10)) for i in range(8)]
    device.run()
    wire.send(Block(device, 8), Host(device), host.claim(10))  # retires those that are out
    for transit in reversed(transits):
        with transit.use():
            pass
        device.run()
    assert (wire.fetched, wire.prefetched) == (1, 7)


def test_copies_that_have_left_are_dropped_but_for_the_newest(model):
    device = model(0)
    budget, host = Budget(), Budget()
    wire = Wire(budget, keep_last=2)
    transits = [wire.send(Block(device, i), Host(device), host.claim(10)) for i in range(5)]
    assert budget.held == 50  # still on their way
    device.run()
    transits.append(wire.send(Block(device, 5), Host(device), host.claim(10)))
    assert budget.held == 30  # two kept, one on its way


def test_pinned_blocks_are_powers_of_two_that_add_up():
    for nbytes in (0, 1, GRANULE, GRANULE + 1, 5 * GRANULE, 100_000_000, (1 << 30) + 1):
        blocks = pinned_blocks(nbytes)
        assert all(n & (n - 1) == 0 for n in blocks) and blocks == sorted(blocks, reverse=True)
        assert nbytes <= sum(blocks) < nbytes + GRANULE


def test_sections_cross_pinned_blocks(monkeypatch):
    """Pageable blocks stand for pinned ones."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **kw: empty(*size, **kw))
    sizes = {"a": 3, "empty": 0, "b": 3 * GRANULE + 17, "c": 1000}
    sections = {name: torch.randint(0, 256, (n,), dtype=torch.uint8) for name, n in sizes.items()}
    packet = Packet("raw", torch.uint8, (8,), (1,), sections)
    host = HostCopy(packet)
    assert host.nbytes <= host.pinned < host.nbytes + GRANULE
    host.write(packet)
    back = host.read(torch.device("cpu"))
    assert back.sections.keys() == sections.keys()
    for name, part in sections.items():
        assert torch.equal(back.sections[name], part)
    assert (back.lane, back.dtype, back.shape) == (packet.lane, packet.dtype, packet.shape)
