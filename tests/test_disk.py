"""The disk tier: bytes come back as they were, memory and file are bounded, and a failing disk is told."""

from __future__ import annotations

import errno
import gc
import os
import resource
import subprocess
import sys
import threading
from contextlib import contextmanager
from itertools import count

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from torch import Tensor

from faults import Event, Stream
from interrupt import interrupted
from sidelane.errors import LaneError, OffloadError
from sidelane.pipeline import arena as arena_module
from sidelane.pipeline import blockfile as blockfile_module
from sidelane.pipeline import disk as disk_module
from sidelane.pipeline import pool as pool_module
from sidelane.pipeline.arena import slot_bytes
from sidelane.pipeline.blockfile import BlockFile
from sidelane.pipeline.disk import Disk, Spill

KIB = 1 << 10


@pytest.fixture(autouse=True, scope="module")
def _small_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_module, "STEP", 64 * KIB)
        yield


@pytest.fixture(params=["disk", "memory"])
def folder(request, tmp_path):
    """Of a file system with direct transfers, and of one that may have none."""
    return str(tmp_path) if request.param == "disk" else "/dev/shm"


def noise(nbytes: int) -> Tensor:
    return torch.randint(256, (nbytes,), dtype=torch.uint8)


def put(disk: Disk, data: Tensor, ready: Event | None = None) -> Spill:
    spill = disk.place(data.numel())
    spill.slot.synchronize()
    spill.slot.tensor.copy_(data)
    spill.write(ready)
    return spill


def settle(disk: Disk) -> None:
    """Wait until all threads are done with all transfers."""
    while disk._finish_write():
        pass
    for pool in (disk._writers, disk._readers):
        meeting = threading.Barrier(pool._max_workers + 1)
        for _ in range(pool._max_workers):
            pool.submit(meeting.wait)
        meeting.wait(60)


class Gate:
    """Holds back all writes to files until it is opened."""

    def __init__(self, monkeypatch):
        self.opened, self.entered = threading.Event(), threading.Semaphore(0)
        write = BlockFile.write

        def wait(file, data, offset):
            self.entered.release()
            self.opened.wait()
            write(file, data, offset)

        monkeypatch.setattr(BlockFile, "write", wait)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


def test_bytes_come_back(folder):
    disk = Disk(folder)
    data = [noise(n) for n in (0, 1, 4096, 4097, 300_001)]
    spills = [put(disk, x) for x in data]
    settle(disk)
    assert all(spill.slot is None and spill.error is None for spill in spills)
    assert disk.held == sum(slot_bytes(x.numel()) for x in data) == disk.bytes_written <= disk.size
    for _ in range(2):
        for x, spill in zip(data, spills, strict=True):
            assert torch.equal(spill.load().tensor, x) and spill.nbytes == x.numel()
    assert disk.bytes_read == 2 * disk.bytes_written
    spills.clear()
    del spill
    assert disk.held == disk._staging.held == 0
    size = disk.size
    assert disk.trim() == size and disk.size == 0


def test_direct_transfers_where_the_file_system_has_them(tmp_path):
    disk = Disk(str(tmp_path))
    data = noise(10_000)
    spill = put(disk, data)
    settle(disk)
    with open(tmp_path / "probe", "wb") as probe:
        try:
            os.close(os.open(probe.name, os.O_RDWR | os.O_DIRECT))
            expected = True
        except OSError:
            expected = False
    assert disk.direct == expected and torch.equal(spill.load().tensor, data)


def test_a_refused_direct_transfer_is_made_through_the_page_cache(tmp_path, monkeypatch):
    disk = Disk(str(tmp_path))
    disk._file.direct = True
    calls = []

    def refuse_once(*args):
        calls.append(args)
        if len(calls) == 1:
            raise OSError(errno.EINVAL, "no direct transfers")
        return pwritev(*args)

    pwritev = os.pwritev
    monkeypatch.setattr(blockfile_module.os, "pwritev", refuse_once)
    data = noise(5000)
    spill = put(disk, data)
    settle(disk)
    assert len(calls) == 2 and not disk.direct and spill.error is None
    assert torch.equal(spill.load().tensor, data)


def test_short_transfers_are_continued(tmp_path, monkeypatch):
    disk = Disk(str(tmp_path))
    pwritev, preadv = os.pwritev, os.preadv
    monkeypatch.setattr(blockfile_module.os, "pwritev", lambda fd, b, at: pwritev(fd, [b[0][:4096]], at))
    monkeypatch.setattr(blockfile_module.os, "preadv", lambda fd, b, at: preadv(fd, [b[0][:8192]], at))
    data = noise(50_000)
    spill = put(disk, data)
    settle(disk)
    assert torch.equal(spill.load().tensor, data)


def test_the_file_has_no_name_and_goes_with_its_last_user(tmp_path):
    def files():
        return [x for x in os.listdir("/proc/self/fd") if str(tmp_path) in read_link(x)]

    def read_link(name):
        try:
            return os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            return ""

    disk = Disk(str(tmp_path))
    spill = put(disk, noise(100))
    assert not os.listdir(tmp_path) and len(files()) == 1
    data = spill.load().tensor.clone()
    settle(disk)
    del disk
    assert torch.equal(spill.load().tensor, data) and len(files()) == 1
    del spill
    gc.collect()
    deadline = threading.Event()
    for _ in range(100):  # the threads of the tier end on their own
        if not files():
            break
        deadline.wait(0.05)
    assert not files()


class Contents(RuleBasedStateMachine):
    """Spills written, read ahead, loaded and dropped in any order, the file and the staging memory small."""

    spills = Bundle("spills")
    LIMIT, IN_FLIGHT = 200 * KIB, 64 * KIB

    def __init__(self):
        super().__init__()
        self.disk = Disk(limit=self.LIMIT, in_flight=self.IN_FLIGHT, threads=1)
        self.live: dict[int, tuple[Spill, Tensor]] = {}
        self.names = count()

    @rule(target=spills, nbytes=st.integers(0, 60 * KIB))
    def place(self, nbytes):
        name = next(self.names)
        spill = self.disk.place(nbytes)
        if spill is None:
            assert self.disk.error is None  # the limit, and nothing else
            return name
        data = torch.full((nbytes,), name % 251, dtype=torch.uint8)
        spill.slot.tensor.copy_(data)
        spill.write()
        self.live[name] = spill, data
        return name

    @rule(name=spills)
    def load(self, name):
        if name in self.live:
            spill, data = self.live[name]
            assert torch.equal(spill.load().tensor, data)

    @rule(name=spills)
    def fetch(self, name):
        if name in self.live:
            self.live[name][0].fetch()

    @rule(name=consumes(spills))
    def drop(self, name):
        self.live.pop(name, None)

    @rule()
    def trim(self):
        self.disk.trim()

    @invariant()
    def bounded(self):
        assert self.disk.size <= self.LIMIT and self.disk._staging.reserved <= self.IN_FLIGHT
        used = sum(slot_bytes(spill.nbytes) for spill, _ in self.live.values())
        assert self.disk.held >= used  # writes under way hold the room of spills that are gone
        settle(self.disk)
        assert self.disk.held == used

    def teardown(self):
        for spill, data in self.live.values():
            assert torch.equal(spill.load().tensor, data)
        self.disk.close()


TestContents = Contents.TestCase
TestContents.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


# Back pressure


def test_place_waits_for_writes_when_staging_memory_is_full(tmp_path, gate):
    disk = Disk(str(tmp_path), in_flight=32 * KIB)
    data = [noise(16 * KIB) for _ in range(3)]
    spills = [put(disk, x) for x in data[:2]]
    assert disk.seconds_waited == 0
    gate.entered.acquire()
    third = []
    thread = threading.Thread(target=lambda: third.append(put(disk, data[2])))
    thread.start()
    thread.join(0.1)
    assert thread.is_alive() and disk._staging.reserved == 32 * KIB
    gate.opened.set()
    thread.join()
    assert disk.seconds_waited > 0 and disk._staging.reserved == 32 * KIB
    for x, spill in zip(data, spills + third, strict=True):
        assert torch.equal(spill.load().tensor, x)


def test_staging_memory_in_the_hands_of_callers_is_not_waited_for(tmp_path):
    disk = Disk(str(tmp_path), in_flight=32 * KIB)
    waiting = [disk.place(16 * KIB) for _ in range(2)]
    assert disk.place(1) is None and disk.error is None and disk.held == 32 * KIB
    del waiting
    spill = put(disk, data := noise(32 * KIB))
    settle(disk)
    assert disk.place(33 * KIB) is None, "more than there is"
    loaded = [spill.load() for _ in range(3)]  # into memory beside the staging memory
    assert all(torch.equal(slot.tensor, data) for slot in loaded)
    assert disk._staging.reserved == 32 * KIB and disk._spare.reserved == 64 * KIB
    del loaded
    assert disk.place(1) is not None and disk._spare.reserved == 0


def test_reads_ahead_make_room_for_what_is_needed_now(tmp_path):
    disk = Disk(str(tmp_path), in_flight=32 * KIB)
    data = [noise(16 * KIB) for _ in range(4)]
    spills = [put(disk, x) for x in data]
    settle(disk)
    for spill in spills:
        spill.fetch()
        spill.fetch()
    assert disk._staging.held == 32 * KIB and disk._spare.reserved == 0
    for x, spill in zip(data[::-1], spills[::-1], strict=True):
        assert torch.equal(spill.load().tensor, x)
    assert disk._spare.reserved == 0 and disk.bytes_read <= 6 * 16 * KIB
    assert disk._staging.held == 0


def test_a_read_ahead_is_used(tmp_path):
    disk = Disk(str(tmp_path))
    spill = put(disk, data := noise(10_000))
    settle(disk)
    spill.fetch()
    assert torch.equal(spill.load().tensor, data) and disk.bytes_read == slot_bytes(10_000)


# Bytes that are still in memory


def test_bytes_on_their_way_are_given_from_memory(tmp_path, gate):
    disk = Disk(str(tmp_path))
    ready, stream = Event(), Stream()
    spill = put(disk, data := noise(5000), ready)
    slot = spill.load(stream)
    assert slot is spill.slot and stream.waited == [ready] and torch.equal(slot.tensor, data)
    slot.released = Event()
    assert spill.load(stream) is slot and stream.waited == [ready, ready, slot.released]
    gate.opened.set()
    settle(disk)
    assert ready.reached and spill.slot is None and disk.bytes_read == 0
    assert torch.equal(slot.tensor, data), "held by its reader"


def test_what_dies_before_it_is_written_is_not(tmp_path, gate):
    disk = Disk(str(tmp_path), threads=1)
    first = put(disk, noise(100))
    gate.entered.acquire()
    for _ in range(5):
        put(disk, noise(100))
    assert disk.held == 6 * 4096
    gate.opened.set()
    settle(disk)
    assert disk.held == disk.bytes_written == 4096 and first.error is None


# A disk that fails


@contextmanager
def file_size_limit(nbytes: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_when_asked_for_room(folder):
    disk = Disk(folder)
    with file_size_limit(40 * KIB):
        spill = put(disk, data := noise(30 * KIB))
        assert disk.size == 32 * KIB and disk.error is None  # not a whole step
        assert disk.place(30 * KIB) is None and disk.error.errno == errno.EFBIG
        assert torch.equal(spill.load().tensor, data)
        settle(disk)
        del spill
        assert disk.place(30 * KIB) is not None and disk.error is None, "there is room again"
    assert disk.place(60 * KIB) is not None


def test_some_of_the_disk_is_left_alone(tmp_path, monkeypatch):
    disk = Disk(str(tmp_path))
    monkeypatch.setattr(disk_module, "RESERVE", 1 << 60)
    assert disk.place(1) is None and disk.error.errno == errno.ENOSPC
    assert disk.size == disk.held == disk._staging.held == 0


def test_a_write_that_fails_leaves_the_bytes_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(blockfile_module, "_fallocate", lambda *args: errno.EOPNOTSUPP)
    disk = Disk(str(tmp_path))
    for code, again in ((errno.ENOSPC, True), (errno.EIO, False)):

        def fail(*args, code=code):
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(blockfile_module.os, "pwritev", fail)
            spill = put(disk, data := noise(5000))
            settle(disk)
        assert spill.error.errno == disk.error.errno == code
        for _ in range(2):
            assert torch.equal(spill.load().tensor, data)
        assert (disk.place(1) is not None) == again
        del spill
        assert disk.held == disk._staging.held == 0


def test_an_event_that_fails_is_told(tmp_path):
    class Broken(Event):
        def synchronize(self):
            raise RuntimeError("the device is lost")

    disk = Disk(str(tmp_path))
    spill = put(disk, noise(10), Broken())
    settle(disk)
    assert str(spill.error) == "the device is lost" and disk.error is None
    with pytest.raises(RuntimeError, match="device is lost"):
        spill.load()
    del spill
    assert disk.held == disk._staging.held == 0


@pytest.mark.parametrize("harm", ["flip", "cut", "fail"])
def test_bytes_that_cannot_be_read_back_are_an_error(tmp_path, monkeypatch, harm):
    disk = Disk(str(tmp_path))
    disk._file.direct = disk._file._set_direct(False)
    spill = put(disk, data := noise(10_000))
    settle(disk)
    fd = disk._file._file.fileno()
    if harm == "flip":
        os.pwrite(fd, bytes([int(data[500]) ^ 1]), 500)
        problem = "changed on the disk"
    elif harm == "cut":
        os.ftruncate(fd, 5000)
        problem = "ended after 4096 of 12288 bytes"
    else:

        def fail(*args):
            raise OSError(errno.EIO, "bad sector")

        monkeypatch.setattr(blockfile_module.os, "preadv", fail)
        problem = "bad sector"
    for ahead in (False, True):
        if ahead:
            spill.fetch()
        with pytest.raises(OffloadError, match=problem):
            spill.load()
    if harm == "flip":
        os.pwrite(fd, bytes([int(data[500])]), 500)
        assert torch.equal(spill.load().tensor, data)
    assert disk._staging.held == 0


@pytest.mark.parametrize(
    "arguments, problem",
    [
        ({"folder": "/nowhere/at/all"}, "folder='/nowhere/at/all' takes no file"),
        ({"folder": 3}, "folder=3 is not the name of a folder"),
        ({"folder": "a\0b"}, "takes no file"),
        ({"limit": -1}, "limit=-1"),
        ({"in_flight": 4095}, "in_flight=4095"),
        ({"threads": 0}, "threads=0"),
    ],
)
def test_bad_arguments(arguments, problem):
    with pytest.raises(LaneError) as caught:
        Disk(**arguments)
    assert problem in str(caught.value) and "\n" not in str(caught.value)


# Closing, forks, interrupts


def test_closing_finishes_writes_and_refuses_more(tmp_path):
    disk = Disk(str(tmp_path))
    spill = put(disk, noise(10_000))
    disk.close()
    disk.close()
    assert disk.bytes_written == slot_bytes(10_000) and disk.place(1) is None
    spill.fetch()
    with pytest.raises(OffloadError, match="disk tier was closed"):
        spill.load()
    del spill
    assert disk.held == disk._staging.reserved == 0


SCRIPT = """
import os, sys, torch
from sidelane.errors import OffloadError
from sidelane.pipeline.disk import Disk
disk = Disk(sys.argv[1])
spill = disk.place(5000)
spill.slot.tensor.fill_(7)
spill.write()
while disk._finish_write():
    pass
pid = os.fork()
if pid == 0:
    code = 1
    try:
        assert disk.place(1) is None
        spill.fetch()
        try:
            spill.load()
        except OffloadError:
            code = 0
        del spill, disk
    finally:
        os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert bool((spill.load().tensor == 7).all())
last = disk.place(1 << 20)  # still to be written when the interpreter exits
last.write()
"""


def test_forks_and_exit(tmp_path):
    run = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("ahead", [False, True])
def test_an_interrupt_at_any_point_breaks_nothing(tmp_path, monkeypatch, ahead):
    monkeypatch.setattr(arena_module, "available_memory", lambda: 1 << 40)
    disk = Disk(str(tmp_path), limit=80 * KIB, in_flight=32 * KIB)
    kept = put(disk, data := noise(20 * KIB))
    settle(disk)

    def use():
        spill = put(disk, data)
        settle(disk)
        if ahead:
            spill.fetch()
        assert torch.equal(spill.load().tensor, data)

    for at in count():
        hit = interrupted(use, at, disk_module, blockfile_module, pool_module, arena_module)
        while disk._drop_ahead():
            pass
        settle(disk)  # also what was begun and not noted
        if hit and disk.held + disk._staging.held > slot_bytes(data.numel()):
            gc.collect()  # a traceback may be part of a cycle
        assert disk.held == slot_bytes(data.numel()) and disk._staging.held == 0, at
        assert torch.equal(kept.load().tensor, data)
        if not hit:
            break
    assert at > 80


def test_threads(tmp_path):
    disk = Disk(str(tmp_path), limit=400 * KIB, in_flight=64 * KIB, threads=2)
    failures = []

    def work(me):
        try:
            generator = torch.Generator().manual_seed(me)
            for i in range(40):
                data = torch.randint(256, (100 + 997 * i % 9000,), dtype=torch.uint8, generator=generator)
                if (spill := disk.place(data.numel())) is None:
                    continue
                spill.slot.tensor.copy_(data)
                spill.write()
                if i % 3:
                    spill.fetch()
                assert torch.equal(spill.load().tensor, data)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    settle(disk)
    assert disk.held == disk._staging.held == 0
