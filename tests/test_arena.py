"""The arena: what it lends never overlaps, its books are exact, and nothing that goes wrong breaks them."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from functools import partial
from itertools import count, pairwise

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from faults import Event, Stream
from interrupt import interrupted
from sidelane.errors import DriverError, LaneError
from sidelane.pipeline import arena as arena_module
from sidelane.pipeline import pool as pool_module
from sidelane.pipeline import space as space_module
from sidelane.pipeline.arena import GRANULE, Arena, Slot, available_memory, slot_bytes
from sidelane.pipeline.space import MAX_EVENTS, Block, Space, both

KIB, MIB = 1 << 10, 1 << 20


class Driver:
    """In place of `register` and `unregister`: what is pinned now, and at most."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pinned: dict[int, int] = {}
        self.peak = 0
        monkeypatch.setattr(arena_module, "register", self.register)
        monkeypatch.setattr(arena_module, "unregister", self.pinned.pop)

    def register(self, address: int, nbytes: int) -> bool:
        self.pinned[address] = nbytes
        self.peak = max(self.peak, sum(self.pinned.values()))
        return True


@pytest.fixture
def driver(monkeypatch):
    return Driver(monkeypatch)


def span(slot: Slot) -> tuple[int, int]:
    return slot.padded.data_ptr(), slot.padded.data_ptr() + slot.padded.numel()


def assert_sound(arena: Arena, slots: list[Slot]) -> None:
    """`slots` are all that is lent: disjoint, inside of what is mapped, and the books say so."""
    assert arena.held == sum(slot_bytes(slot.nbytes) for slot in slots)
    assert arena.reserved == sum(region.nbytes for region in arena._pool._regions)
    free = [(block.start, block.end) for block in arena._pool._space]
    spans = sorted([span(slot) for slot in slots] + free)
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert sum(end - start for start, end in spans) == arena.reserved
    owners = [(block.owner, block.start) for block in arena._pool._space]
    assert all(a.owner is not b.owner or a.end < b.start for a, b in pairwise(arena._pool._space)), (
        "not merged"
    )
    assert all(region.start <= start < region.start + region.nbytes for region, start in owners)


class Books(RuleBasedStateMachine):
    """Slots of all sizes taken, written, released and dropped in any order, under a limit."""

    slots = Bundle("slots")
    LIMIT = 256 * KIB + 100  # not a multiple of anything

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(self.LIMIT, pinned=False, step=64 * KIB)
        self.live: dict[int, tuple[Slot, int]] = {}
        self.guards: dict[int, Event] = {}  # by page: the last user, who waited for those before
        self.events: list[Event] = []
        self.names = count()
        self.peak = 0

    @rule(target=slots, nbytes=st.integers(0, 90 * KIB))
    def take(self, nbytes):
        slot = self.arena.take(nbytes)
        name = next(self.names)
        if slot is None:
            largest = max((block.nbytes for block in self.arena._pool._space), default=0)
            assert largest < slot_bytes(nbytes)
            return name
        assert slot.tensor.numel() == slot.nbytes == nbytes
        assert slot.tensor.data_ptr() % GRANULE == 0 and slot.padded.numel() == slot_bytes(nbytes)
        stream = Stream()
        slot.wait(stream)
        guards = {self.guards[page] for page in range(*span(slot), GRANULE) if page in self.guards}
        assert {event for event in guards if not event.reached} <= set(stream.waited)
        slot.padded.fill_(name % 251)
        self.live[name] = slot, name % 251
        self.peak = max(self.peak, sum(slot_bytes(s.nbytes) for s, _ in self.live.values()))
        return name

    @rule(name=consumes(slots), ends=st.sampled_from(["unused", "released", "done"]))
    def drop(self, name, ends):
        slot, _ = self.live.pop(name, (None, None))
        if slot is not None and ends != "unused":
            slot.released = Event(ends == "done")
            self.events.append(slot.released)
            self.guards.update(dict.fromkeys(range(*span(slot), GRANULE), slot.released))

    @rule(which=st.integers(0, 99))
    def reach(self, which):
        if self.events:
            self.events[which % len(self.events)].reached = True

    @rule()
    def trim(self):
        before = self.arena.reserved
        freed = self.arena.trim()
        used = [slot for slot, _ in self.live.values()]
        assert self.arena.reserved == before - freed
        assert all(
            any(r.start <= span(s)[0] < r.start + r.nbytes for s in used) for r in self.arena._pool._regions
        )

    @invariant()
    def sound(self):
        assert_sound(self.arena, [slot for slot, _ in self.live.values()])
        assert self.arena.reserved <= self.LIMIT and self.arena.peak == self.peak
        for slot, value in self.live.values():
            assert bool((slot.padded == value).all())


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)


# `both` joins events on a stream of the device when there are many; here they are kept.
@pytest.fixture(autouse=True, scope="module")
def _no_streams():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(space_module, "MAX_EVENTS", 1 << 30)
        yield


# Sizes and limits


@pytest.mark.parametrize("nbytes", [0, 1, 4096, 4097, 3 * MIB + 1])
def test_sizes_are_rounded_to_pages_alone(nbytes):
    arena = Arena(pinned=False, step=1)
    slot = arena.take(nbytes)
    assert arena.held == arena.reserved == arena.peak == slot_bytes(nbytes) < nbytes + 2 * GRANULE
    assert slot.tensor.shape == (nbytes,) and slot.tensor.dtype == torch.uint8


def test_the_limit_holds_and_all_of_it_can_be_used():
    arena = Arena(64 * KIB, pinned=False, step=32 * KIB)
    slots = [arena.take(16 * KIB) for _ in range(4)]
    assert arena.reserved == 64 * KIB and None not in slots and arena.take(1) is None
    del slots[1], slots[1]
    assert arena.take(16 * KIB) is not None
    slots.clear()
    whole = arena.take(64 * KIB)  # from the regions of before, unmapped, and one new region
    assert whole is not None and arena.reserved == 64 * KIB
    assert arena.take(64 * KIB + 1) is None


@pytest.mark.parametrize("limit", [0, 4095])
def test_a_limit_below_a_page_lends_nothing(limit):
    arena = Arena(limit, pinned=False)
    assert arena.take(0) is None and arena.reserved == 0


def test_repeated_steps_map_nothing_new_and_merge_back_to_whole_regions():
    arena = Arena(pinned=False, step=MIB)
    sizes = [7 * KIB * (1 + i * 13 % 29) for i in range(80)]
    reserved = []
    for _ in range(3):
        slots = [arena.take(n) for n in sizes]
        assert_sound(arena, slots)
        reserved.append(arena.reserved)
        while slots:
            slots.pop()
        assert arena.held == 0 and len(list(arena._pool._space)) == len(arena._pool._regions)
    assert len(set(reserved)) == 1 and reserved[0] < 1.1 * sum(sizes) + MIB


def test_an_arena_that_starts_small_maps_less_than_twice_what_it_lends():
    arena = Arena(pinned=False, step=MIB, first=64 * KIB)
    slots, reserved = [], [0]
    while arena.held < 8 * MIB:
        slots.append(arena.take(12 * KIB))
        assert arena.reserved <= 64 * KIB + 2.2 * arena.held
        if arena.reserved != reserved[-1]:
            reserved.append(arena.reserved)
    grown = [b - a for a, b in zip(reserved, reserved[1:], strict=False)]
    assert grown[:5] == [64 * KIB, 64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB]
    assert set(grown[5:]) == {MIB}
    assert arena.take(3 * MIB) is not None and arena.reserved == reserved[-1] + 3 * MIB


def test_the_arena_of_the_process_starts_small():
    arena = arena_module.shared.__wrapped__()
    slot = arena.take(5 * MIB)
    assert slot is not None and arena.reserved == arena_module.FIRST < arena_module.STEP


def test_the_machine_is_a_limit(monkeypatch):
    arena = Arena(pinned=False, step=64 * MIB)
    monkeypatch.setattr(arena_module, "available_memory", lambda: arena_module.RESERVE + MIB)
    assert arena.take(2 * MIB) is None
    assert arena.take(MIB) is not None and arena.reserved == MIB  # not a whole step


def test_a_mapping_that_fails_is_none():
    arena = Arena(pinned=False)
    arena_module_available = arena_module.available_memory
    assert arena_module_available() > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena_module, "available_memory", lambda: 1 << 62)
        assert arena.take(1 << 50) is None
    assert arena.take(1) is not None


@pytest.mark.parametrize("arguments", [{"limit": -1}, {"step": 0}])
def test_bad_arguments(arguments):
    with pytest.raises(LaneError):
        Arena(**arguments)
    with pytest.raises(LaneError, match="a slot of -1 bytes"):
        Arena(pinned=False).take(-1)


# Memory of the machine


def files(root, **texts):
    for name, text in texts.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_available_memory_of_control_groups(tmp_path):
    assert available_memory(tmp_path) == sys.maxsize
    files(tmp_path, proc__meminfo="MemTotal: 900 kB\nMemAvailable:     500 kB\n")
    assert available_memory(tmp_path) == 500 * KIB
    files(
        tmp_path,
        proc__self__cgroup="0::/a/b\n",
        sys__fs__cgroup__a__memory_dot_max="400000\n",
        sys__fs__cgroup__a__memory_dot_current="100000\n",
        sys__fs__cgroup__a__b__memory_dot_max="max\n",
        sys__fs__cgroup__a__b__memory_dot_current="100\n",
    )
    assert available_memory(tmp_path) == 300000
    files(tmp_path, sys__fs__cgroup__a__memory_dot_stat="anon 90000\ninactive_file 10000\n")
    assert available_memory(tmp_path) == 310000
    files(
        tmp_path,
        proc__self__cgroup="0::/a/b\n5:cpu,memory:/on/the/host\n",
        sys__fs__cgroup__memory__memory_dot_limit_in_bytes="50000\n",
        sys__fs__cgroup__memory__memory_dot_usage_in_bytes="60000\n",
        sys__fs__cgroup__memory__memory_dot_stat="inactive_file 7\ntotal_inactive_file 30000\n",
    )
    assert available_memory(tmp_path) == 20000


# Pinning


def test_regions_are_registered_once_and_unregistered_when_free(driver):
    arena = Arena(MIB, pinned=True, step=256 * KIB)
    a, b = arena.take(200 * KIB), arena.take(200 * KIB)
    assert sorted(driver.pinned.values()) == [256 * KIB] * 2 and driver.peak <= MIB
    assert all(any(s <= span(x)[0] < s + n for s, n in driver.pinned.items()) for x in (a, b))
    del a
    assert arena.trim() == 256 * KIB and len(driver.pinned) == 1
    del arena
    assert len(driver.pinned) == 1, "memory of a live slot"
    b.tensor.fill_(1)
    del b
    assert not driver.pinned


def test_the_limit_holds_while_regions_are_exchanged(driver):
    arena = Arena(MIB, pinned=True, step=256 * KIB)
    for nbytes in (100 * KIB, MIB, 10 * KIB, MIB - GRANULE, 300 * KIB):
        assert arena.take(nbytes) is not None
    assert driver.peak <= MIB


def test_a_closed_arena_lends_no_more(driver):
    arena = Arena(pinned=True, step=MIB)
    kept, dropped = arena.take(MIB), arena.take(MIB)
    del dropped
    arena.close()
    arena.close()
    assert arena.take(1) is None and arena.reserved == MIB == sum(driver.pinned.values())
    kept.tensor.fill_(1)
    del kept
    assert arena.trim() == MIB and not driver.pinned


def test_memory_outlives_its_slot_for_as_long_as_a_tensor_shows_it():
    arena = Arena(pinned=False, step=MIB)
    tensor = arena.take(MIB).tensor
    tensor.fill_(7)
    assert arena.trim() == MIB
    assert bool((tensor == 7).all())


def test_refused_registration(monkeypatch, driver):
    arena = Arena(pinned=True, step=MIB)
    slot = arena.take(100)
    monkeypatch.setattr(arena_module, "register", lambda *args: False)
    assert arena.take(2 * MIB) is None and arena.reserved == MIB

    def fail(address, nbytes):
        raise DriverError("cudaHostRegister", 801, "cudaErrorNotSupported")

    monkeypatch.setattr(arena_module, "register", fail)
    monkeypatch.setattr(arena_module, "unregister", lambda address: None)
    for _ in range(2):
        with pytest.raises(DriverError, match="cudaHostRegister -> 801"):
            arena.take(2 * MIB)
    assert_sound(arena, [slot])
    assert arena.take(100) is not None


def test_slots_first_taken_in_inference_mode_can_be_written_outside():
    arena = Arena(pinned=False)
    with torch.inference_mode():
        slot = arena.take(8)
        view = slot.tensor
    slot.tensor.copy_(torch.ones(8, dtype=torch.uint8))
    view.add_(1)
    assert slot.tensor.tolist() == [2] * 8


# Events


def test_the_next_taker_waits_for_the_last_user_and_only_then():
    arena = Arena(8 * KIB, pinned=False)
    stream = Stream()
    first = arena.take(8 * KIB)
    first.wait(stream)
    assert not stream.waited
    event = first.released = Event()
    assert first.released is event
    del first
    low, high = arena.take(KIB), arena.take(KIB)  # both halves of what the event guards
    for slot in (low, high):
        slot.wait(stream)
    assert stream.waited == [event] * 2
    del low, slot  # unused: the event of before still guards it
    high.released = Event(reached=True)
    del high
    again = arena.take(8 * KIB)
    stream.waited.clear()
    again.wait(stream)
    assert stream.waited == [event]
    again.synchronize()
    assert event.reached


def test_free_blocks_wait_whole_for_their_size():
    space, owner = Space(), object()
    blocks = [Block(owner, 4 * i, 4) for i in range(4)]
    for block in blocks:
        space.give(block)
    assert space.take(4) is blocks[0] and space.take(4) is blocks[1]  # given first, taken first
    space.give(blocks[1])
    one = space.take(12)  # fits after a merge only
    assert one is not None and (one.start, one.end, one.owner) == (4, 16, owner)
    assert space.take(4) is None and list(space) == []


def test_pieces_that_fit_together_go_before_a_large_block_is_cut():
    space, owner = Space(), object()
    for block in (Block(owner, 0, 4), Block(owner, 4, 4), Block(owner, 100, 50)):
        space.give(block)
    one = space.take(8)
    assert one is not None and (one.start, one.end) == (0, 8)
    assert [(block.start, block.end) for block in space] == [(100, 150)]


def test_trim_waits_for_users_and_growing_does_not():
    arena = Arena(8 * KIB, pinned=False, step=4 * KIB)
    slots = [arena.take(4 * KIB) for _ in range(2)]
    events = []
    for slot in slots:
        slot.released = Event()
        events.append(slot.released)
    del slot
    slots.clear()
    assert arena.take(8 * KIB) is None and not any(e.reached for e in events)
    assert arena.trim() == 8 * KIB and all(e.reached for e in events)


def test_many_events_become_one(monkeypatch):
    monkeypatch.setattr(space_module, "MAX_EVENTS", MAX_EVENTS)
    joined = []
    monkeypatch.setattr(space_module, "_join", lambda events: joined.append(events) or Event())
    events = [Event(reached=i % 2 == 0) for i in range(2 * MAX_EVENTS)]
    assert both((events[0],), ()) == both((), (events[0],)) == (events[0],)
    assert both(tuple(events[:2]), tuple(events[1:4])) == tuple(events[:4])
    assert both(tuple(events), ()) == tuple(events) and not joined
    assert both(tuple(events[:-1]), (events[-1],)) == tuple(events[1::2]) and not joined
    pending = tuple(Event() for _ in range(MAX_EVENTS + 1))
    (one,) = both(pending[:1], pending[1:])
    assert joined == [pending] and one not in pending


# Failures: the garbage collector, interrupts, forks, exit


class Cycle:
    def __init__(self, slot):
        self.slot, self.me = slot, self


def test_slots_collected_in_the_middle_of_anything():
    arena = Arena(pinned=False, step=MIB)
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for i in range(300):
            Cycle(arena.take(100 * i))
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert_sound(arena, [])


def test_threads():
    arena = Arena(64 * KIB, pinned=False, step=16 * KIB)
    failures = []

    def work(me):
        try:
            for i in range(200):
                slot = arena.take((me * 37 + i * 101) % 9000)
                if slot is not None:
                    slot.tensor.fill_(me)
                    other = arena.take(100)
                    assert bool((slot.tensor == me).all())
                    del other
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures and arena.peak <= 64 * KIB
    assert_sound(arena, [])


def attempt(action: str, arena: Arena, slots: list[Slot]) -> None:
    if action in ("read", "trim"):
        slots.clear()
    {
        "take": lambda: slots.append(arena.take(10)),
        "grow": lambda: slots.append(arena.take(6 * GRANULE)),
        "read": lambda: arena.held,
        "trim": arena.trim,
    }[action]()


@pytest.mark.parametrize("action, least", [("take", 20), ("grow", 80), ("read", 10), ("trim", 20)])
def test_an_interrupt_at_any_point_breaks_nothing(driver, monkeypatch, action, least):
    monkeypatch.setattr(arena_module, "available_memory", lambda: 1 << 40)
    for at in count():
        arena = Arena(10 * GRANULE, pinned=True, step=4 * GRANULE)
        kept = arena.take(2 * GRANULE)
        slots = [arena.take(GRANULE)]
        slots[0].released = Event()
        hit = interrupted(partial(attempt, action, arena, slots), at, arena_module, pool_module, space_module)
        kept.padded.fill_(1)
        assert_sound(arena, [kept, *slots])
        slots.clear()
        assert_sound(arena, [kept])
        assert sum(driver.pinned.values()) == arena.reserved <= 10 * GRANULE
        del kept
        arena.trim()
        whole = arena.take(10 * GRANULE)
        assert_sound(arena, [whole])
        del whole, arena
        assert not driver.pinned
        if not hit:
            break
    assert at > least


SCRIPT = """
import os, sys, torch
from sidelane.errors import OffloadError
from sidelane.pipeline import arena
from sidelane.pipeline.arena import Arena, shared
arena.register = lambda *args: True
calls = []
arena.unregister = calls.append
pinned, plain, common = Arena(pinned=True), Arena(pinned=False), shared()
a, b = pinned.take(4096), plain.take(4096)
a.tensor.fill_(1), b.tensor.fill_(2)
assert shared() is common
address = a.tensor.data_ptr()
pid = os.fork()
if pid == 0:
    code = 1
    try:
        assert shared() is not common and b.tensor.sum() == 2 * 4096
        try:
            a.tensor
        except OffloadError as error:
            assert "after a fork" in str(error)
            code = 0
        with open("/proc/self/maps") as maps:
            ranges = [line.split()[0].split("-") for line in maps]
        if any(int(low, 16) <= address < int(high, 16) for low, high in ranges):
            code = 2  # the pages were copied, or are shared
        del a, pinned
        assert not calls
    finally:
        os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert a.tensor.sum() == 4096
del a, pinned
assert len(calls) == 1
left = shared().take(10), Arena(pinned=True).take(10)  # alive when the interpreter exits
"""


def test_forks_and_exit():
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True, timeout=60
    )
    assert (run.returncode, run.stderr) == (0, "")


def test_blocks_of_different_owners_stay_apart():
    space, a, b = Space(), object(), object()
    for block in (Block(a, 0, 10), Block(b, 10, 5), Block(a, 20, 5), Block(b, 15, 5)):
        space.give(block)
    assert [(x.owner, x.start, x.nbytes) for x in space] == [(a, 0, 10), (b, 10, 10), (a, 20, 5)]
    assert space.take(11) is None
    found = space.take(6)
    assert (found.start, found.nbytes) == (0, 6)


def test_free_regions_go_when_the_machine_refuses_more():
    """No limit of the pool says so: the machine has 1 GiB, of which three free regions hold 768 MiB."""
    open_bytes = 0

    class Region:
        def __init__(self, start, nbytes):
            self.start, self.nbytes = start, nbytes

        def close(self):
            nonlocal open_bytes
            open_bytes -= self.nbytes

    def open_region(nbytes):
        nonlocal open_bytes
        if open_bytes + nbytes > 1024 * MIB:
            return None
        open_bytes += nbytes
        return Region(len(opened) << 40, opened.append(nbytes) or nbytes)

    opened = []
    pool = pool_module.Pool(open_region, lambda: None, None, 256 * MIB)
    pieces = [pool.take(256 * MIB) for _ in range(3)]
    assert all(piece is not None for piece in pieces)
    assert pool.take(900 * MIB) is None
    del pieces
    assert pool.take(900 * MIB) is not None and open_bytes == pool.reserved <= 1024 * MIB
