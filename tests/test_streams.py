"""Slots, rings and side streams, on modelled streams that run their work in any legal order."""

from __future__ import annotations

import gc
import random
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidelane.errors import LaneError, OffloadError
from sidelane.pipeline import streams as streams_module
from sidelane.pipeline.streams import HOST, HostEvent, Ring, current_stream, on, side_stream
from signals import Interrupt, interrupts

POISON = -1
GPU = torch.device("cuda", 0)


class Event:
    def __init__(self):
        self.reached = False

    def query(self):
        return self.reached

    def synchronize(self):
        raise AssertionError("the host waited")


class Stream:
    """A queue of work: (event to wait for or None, what to do)."""

    device = GPU

    def __init__(self):
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

    def __init__(self, rng, count=3):
        self.rng = rng
        self.streams = [Stream() for _ in range(count)]

    def run(self, steps=None):
        while steps is None or steps > 0:
            ready = [s for s in self.streams if s.queue and (s.queue[0][0] is None or s.queue[0][0].reached)]
            if not ready:
                assert steps is not None or not any(s.queue for s in self.streams), "deadlock"
                return
            _, work = self.rng.choice(ready).queue.pop(0)
            work()
            steps = None if steps is None else steps - 1


class Block:
    """Memory of the pool of `owner`: once dropped, the next work of that stream overwrites it."""

    def __init__(self, owner, value):
        self.cell = cell = [POISON]
        owner.enqueue(lambda: cell.__setitem__(0, value))
        weakref.finalize(self, lambda: owner.enqueue(lambda: cell.__setitem__(0, POISON)))


def read(stream, block, into, value):
    cell = block.cell
    stream.enqueue(lambda: into.append((value, cell[0])))


@settings(max_examples=300, deadline=None)
@given(
    depth=st.integers(1, 4),
    actions=st.lists(
        st.sampled_from(["write", "write", "read", "give", "drop", "sweep", "clear", "run"]), max_size=60
    ),
    rng=st.randoms(use_true_random=False),
)
def test_every_reader_gets_what_was_written(depth, actions, rng):
    device, ring = Device(rng), Ring(depth)
    live, reads = [], []
    for value, action in enumerate(actions):
        if action == "write" and ring.free:
            writer = rng.choice(device.streams)
            slot = ring.take(writer)
            assert ring.held <= depth
            if rng.random() < 0.9:  # else the writer failed
                slot.fill(Block(writer, value))
                live.append((slot, value))
        elif action == "read" and live:
            slot, value = rng.choice(live)
            reader = rng.choice(device.streams)
            read(reader, slot.open(reader), reads, value)
        elif action == "give" and live:
            live.pop(rng.randrange(len(live)))[0].give()
        elif action == "drop" and live:
            live.pop(rng.randrange(len(live)))
        elif action == "sweep":
            ring.sweep()
        elif action == "clear":
            ring.clear()
        elif action == "run":
            device.run(rng.randrange(12))
        slot = None
        assert ring.free == depth - len(live)
    live.clear()
    assert ring.free == depth
    if rng.random() < 0.5:
        ring.clear()
        assert ring.held == 0
    del ring
    device.run()
    assert all(sent == got for sent, got in reads), reads


def test_a_missing_wait_would_be_seen():
    """The model has teeth: a ring that forgets its events tears values."""
    torn = 0
    for seed in range(50):
        device = Device(random.Random(seed), 2)
        writer, reader = device.streams
        reads = []
        for value in range(4):
            block = Block(writer, value)
            reader.wait_event(writer.record_event())
            read(reader, block, reads, value)
            del block
        device.run()
        torn += any(sent != got for sent, got in reads)
    assert torn > 25


def test_a_taken_slot_waits_for_released_and_a_reader_for_ready():
    writer, reader = Stream(), Stream()
    ring = Ring(1)
    slot = ring.take(writer)
    assert not writer.queue  # nobody used it before
    slot.fill("value")
    assert slot.open(reader) == "value"
    assert [event for event, _ in reader.queue if event] == [slot.ready]
    slot.give()
    place = ring._places[0]
    (released,) = place.released
    ring.take(writer)
    waited = [event for event, _ in writer.queue if event]
    assert waited and set(waited) == {released}


def test_the_owner_waits_before_another_stream_takes_its_slot():
    first, second, reader = Stream(), Stream(), Stream()
    ring = Ring(1)
    slot = ring.take(first)
    slot.fill("value")
    slot.open(reader)
    slot.give()
    (released,) = ring._places[0].released
    ring.take(second)
    for stream in (first, second):
        assert released in [event for event, _ in stream.queue]


def test_values_are_dropped_when_their_readers_are_done():
    writer, reader = Stream(), Stream()
    ring = Ring(2)
    slot = ring.take(writer)
    slot.fill("value")
    slot.open(reader)
    slot.give()
    ring.sweep()
    assert ring.held == 1
    for event, _ in reader.queue:
        assert event is None or event is slot.ready
    for _, work in reader.queue:
        work()
    ring.sweep()
    assert ring.held == 0
    before = len(writer.queue)
    ring.clear()
    assert len(writer.queue) == before  # nothing to wait for


def test_a_ring_that_dies_waits_for_its_readers():
    writer, reader = Stream(), Stream()
    ring = Ring(1)
    slot = ring.take(writer)
    slot.fill("value")
    slot.open(reader)
    slot.give()
    before = len(writer.queue)
    gc.disable()
    try:
        del ring
    finally:
        gc.enable()
    assert any(event is not None for event, _ in writer.queue[before:])


def test_slots_are_used_in_turn():
    ring, stream = Ring(3), Stream()
    places = []
    for _ in range(7):
        slot = ring.take(stream)
        places.append(ring._places.index(slot._place))
        slot.give()
    assert places == [0, 1, 2, 0, 1, 2, 0]


def test_the_host_waits_only_while_no_slot_is_free():
    ring, stream = Ring(2), Stream()
    slots = [ring.take(stream), ring.take(stream)]
    taken = threading.Event()

    def take():
        ring.take(stream)
        taken.set()

    for release in (lambda: slots.pop().give(), slots.clear):
        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        assert not taken.wait(0.1)
        release()
        assert taken.wait(10)
        thread.join(10)
        taken.clear()
        if slots:  # what the thread took died with it
            slots.append(ring.take(stream))


def test_many_threads_share_a_ring():
    ring = Ring(2)
    inside, most, lock = 0, 0, threading.Lock()

    def work():
        nonlocal inside, most
        for _ in range(200):
            slot = ring.take(HOST)
            with lock:
                inside += 1
                most = max(most, inside)
            slot.fill(threading.get_ident())
            assert slot.open(HOST) == threading.get_ident()
            with lock:
                inside -= 1
            slot.give()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert 1 <= most <= 2 and inside == 0 and ring.free == 2


def test_no_interrupt_loses_a_slot():
    ring, hits = Ring(2), 0
    with interrupts(streams_module) as armed:
        while hits < 100:
            slot, armed.on = None, True
            try:
                slot = ring.take(HOST)
                slot.fill("value")
                slot.open(HOST)
                slot.give()
            except Interrupt:
                hits += 1
            slot, armed.on = None, False
            assert ring.free == 2
            assert not ring._lock.locked()


def test_misuse_is_an_error():
    ring = Ring(1)
    slot = ring.take(HOST)
    with pytest.raises(OffloadError, match="fill it first"):
        slot.open(HOST)
    slot.fill(1)
    slot.give()
    slot.give()  # more calls do nothing
    for call in (lambda: slot.open(HOST), lambda: slot.fill(1)):
        with pytest.raises(OffloadError, match="take another"):
            call()
    for depth in (0, -1, 1.0, True, None):
        with pytest.raises(LaneError, match="depth"):
            Ring(depth)


def test_the_cpu_in_the_place_of_a_stream():
    waited = []

    class Remote(Event):
        def synchronize(self):
            waited.append(self)

    event = Remote()
    HOST.wait_event(event)
    assert waited == [event]
    first, second = HOST.record_event(), HOST.record_event()
    assert first.query() and isinstance(first, HostEvent)
    assert 0 <= first.elapsed_time(second) < 1e3
    assert current_stream(torch.device("cpu")) is HOST
    assert side_stream(torch.device("cpu"), "encode") is HOST
    with on(HOST):
        pass


def test_side_streams_are_made_once_when_asked_for(monkeypatch):
    made = []

    class Made:
        def __init__(self, device, priority):
            made.append((device, priority))

    monkeypatch.setattr(streams_module, "_side", {})
    monkeypatch.setattr(torch.cuda, "Stream", Made)
    found = []
    start = threading.Barrier(4)

    def look():
        start.wait()
        found.append(side_stream(GPU, "encode", -1))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(set(found)) == 1 and made == [(GPU, -1)]
    others = {side_stream(GPU, "store"), side_stream(torch.device("cuda", 1), "encode", -1), found[0]}
    assert len(others) == 3


def test_the_current_stream_is_looked_up_at_each_call(monkeypatch):
    streams = iter([(1, 0, 1), (2, 0, 1)])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentStream", lambda index: next(streams), raising=False)
    monkeypatch.setattr(torch.cuda, "Stream", lambda **names: names)
    monkeypatch.setattr(streams_module, "_current", {})
    assert [current_stream(GPU)["stream_id"], current_stream(GPU)["stream_id"]] == [1, 2]
