"""The arena on a device: pinned for real, reused without a wait of the host and never too soon."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from sidelane.errors import DriverError
from sidelane.pipeline import arena as arena_module
from sidelane.pipeline.arena import GRANULE, Arena, shared

pytestmark = pytest.mark.gpu

MIB = 1 << 20
SLEEP = 400_000_000  # cycles, 0.2 s at 2 GHz
LONG = 0.1  # seconds; shorter than SLEEP, longer than any call that does not wait for the device


@pytest.fixture
def streams(cuda):
    return torch.cuda.Stream(), torch.cuda.Stream()


def test_copies_do_not_wait_for_the_device(cuda, streams):
    slot = Arena(step=MIB).take(MIB)
    assert slot.tensor.is_pinned()
    source = torch.randint(256, (MIB,), dtype=torch.uint8, device=cuda)
    back = torch.empty_like(source)
    torch.cuda.synchronize()
    before = time.perf_counter()
    with torch.cuda.stream(streams[0]):
        torch.cuda._sleep(SLEEP)
        slot.tensor.copy_(source, non_blocking=True)
        back.copy_(slot.tensor, non_blocking=True)
    assert time.perf_counter() - before < LONG
    torch.cuda.synchronize()
    assert torch.equal(back, source) and torch.equal(slot.tensor, source.cpu())


@pytest.mark.parametrize("waits", [True, False])
def test_memory_is_lent_at_once_and_written_after_its_last_reader(cuda, streams, waits):
    arena = Arena(MIB)
    first, second = (torch.full((MIB,), n, dtype=torch.uint8, device=cuda) for n in (1, 2))
    back = torch.empty_like(first)
    slot = arena.take(MIB)
    slot.tensor.copy_(first)
    torch.cuda.synchronize()
    with torch.cuda.stream(streams[0]):
        torch.cuda._sleep(SLEEP)
        back.copy_(slot.tensor, non_blocking=True)
        slot.released = streams[0].record_event()
    address = slot.tensor.data_ptr()
    del slot
    before = time.perf_counter()
    slot = arena.take(MIB)
    assert slot.tensor.data_ptr() == address
    with torch.cuda.stream(streams[1]):
        if waits:
            slot.wait(streams[1])
        slot.tensor.copy_(second, non_blocking=True)
    assert time.perf_counter() - before < LONG
    torch.cuda.synchronize()
    assert bool((slot.tensor == 2).all())
    assert bool((back == (1 if waits else 2)).all()), "without the wait the reader must see the new bytes"


def test_one_taker_waits_for_many_users(cuda, streams):
    count = 64
    arena = Arena(count * GRANULE)
    slots = [arena.take(GRANULE) for _ in range(count)]
    backs = [torch.empty(GRANULE, dtype=torch.uint8, device=cuda) for _ in range(count)]
    for i, slot in enumerate(slots):
        slot.tensor.fill_(i)
    del slot
    users = [torch.cuda.Stream() for _ in range(8)]
    torch.cuda.synchronize()
    for i, back in enumerate(backs):
        with torch.cuda.stream(users[i % 8]):
            if i < 8:
                torch.cuda._sleep(SLEEP)
            back.copy_(slots[i].tensor, non_blocking=True)
            slots[i].released = users[i % 8].record_event()
    slots.clear()
    whole = arena.take(count * GRANULE)
    source = torch.full((count * GRANULE,), 255, dtype=torch.uint8, device=cuda)
    with torch.cuda.stream(streams[0]):
        streams[0].wait_stream(torch.cuda.current_stream())
        whole.wait(streams[0])
        whole.tensor.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    assert all(bool((back == i).all()) for i, back in enumerate(backs))
    assert bool((whole.tensor == 255).all())


def test_trim_waits_for_copies_and_unpins(cuda, streams):
    arena = Arena(step=MIB)
    slot = arena.take(MIB)
    tensor, back = slot.tensor, torch.empty(MIB, dtype=torch.uint8, device=cuda)
    tensor.fill_(5)
    torch.cuda.synchronize()
    with torch.cuda.stream(streams[0]):
        torch.cuda._sleep(SLEEP)
        back.copy_(tensor, non_blocking=True)
        slot.released = event = streams[0].record_event()
    del slot
    assert not event.query()
    assert arena.trim() == MIB and event.query()
    assert not tensor.is_pinned() and bool((back == 5).all())


def test_an_arena_dropped_in_use_waits_for_copies(cuda, streams):
    arena = Arena(step=MIB)
    slot = arena.take(MIB)
    back = torch.empty(MIB, dtype=torch.uint8, device=cuda)
    slot.tensor.fill_(6)
    torch.cuda.synchronize()
    with torch.cuda.stream(streams[0]):
        torch.cuda._sleep(SLEEP)
        back.copy_(slot.tensor, non_blocking=True)
    del slot, arena
    torch.cuda.synchronize()
    assert bool((back == 6).all())


def test_a_refused_registration_disturbs_nobody(cuda):
    arena = Arena(step=MIB)
    slot = arena.take(MIB)
    with pytest.raises(DriverError, match="cudaHostRegister"):
        arena_module.register(slot.tensor.data_ptr(), MIB)  # it is registered already
    arena_module.unregister(1 << 40)  # nothing is there
    x = torch.ones(1000, device=cuda) * 2
    torch.cuda.synchronize()
    assert float(x.sum()) == 2000


def test_registered_memory_is_what_was_asked_for(cuda):
    arena = Arena(100 * MIB)
    slots = [arena.take(n) for n in (33 * MIB + 1, 1, 50 * MIB)]
    assert arena.reserved <= 100 * MIB and arena.held < 83 * MIB + 4 * GRANULE
    assert all(slot.tensor.is_pinned() for slot in slots)
    assert arena.take(40 * MIB) is None


SCRIPT = """
import os, torch
from sidelane.pipeline.arena import Arena, shared
a, b = shared().take(1 << 20), Arena(step=1 << 20).take(1 << 20)
x = torch.full((1 << 20,), 3, dtype=torch.uint8, device="cuda")
a.tensor.copy_(x)
pid = os.fork()
if pid == 0:
    del a, b
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
y = torch.empty_like(x)
a.tensor.fill_(4)
y.copy_(a.tensor, non_blocking=True)
torch.cuda.synchronize()
assert int(y.max()) == int(y.min()) == 4
torch.cuda._sleep(200_000_000)
b.tensor.copy_(x, non_blocking=True)  # under way when the interpreter exits
"""


def test_forks_and_exit(cuda):
    quiet = "ignore::DeprecationWarning"  # of 3.12, at a fork of a process with threads
    command = [sys.executable, "-W", quiet, "-c", SCRIPT]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (run.returncode, run.stderr) == (0, "")


def test_the_shared_arena_serves_threads_of_any_device(cuda):
    slot = shared().take(100)
    other = torch.device("cuda", torch.cuda.device_count() - 1)
    x = torch.full((100,), 9, dtype=torch.uint8, device=other)
    with torch.cuda.device(other):
        slot.wait(torch.cuda.current_stream())
        slot.tensor.copy_(x, non_blocking=True)
        slot.released = torch.cuda.current_stream().record_event()
        torch.cuda.synchronize()
    assert slot.tensor.tolist() == [9] * 100
