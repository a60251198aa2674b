"""NVENC code under faults: every call fails in every documented way and order; nothing may leak or hang."""

from __future__ import annotations

import ctypes
import gc
import random
import resource
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from itertools import cycle
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)

from emulated import EmulatedDriver, build, canned, canned_stream, installed, one_frame, random_surface
from sidelane.codec import _driver, _nvenc
from sidelane.codec._abi import NVENC_VERSIONS
from sidelane.codec._nvenc import Memory, Session, open_session
from sidelane.codec._nvenc_config import Coding
from sidelane.codec._nvenc_ring import Surface
from sidelane.codec.nvenc import Encoder, encode_nvenc, release_idle_encoders
from sidelane.codec.nvenc_pool import EncoderPool
from sidelane.errors import DriverError, LaneError, LaneUnavailable, SpaceError
from sidelane.layout import NV12, SurfaceLayout

LAYOUT = one_frame(NV12, 160, 48, frames=3)
LARGE = one_frame(NV12, 192, 64, frames=2)
SOURCES = [random_surface(LAYOUT, seed) for seed in range(4)]
EVERY = (3, 4, 5, 6, 8, 9, 10, 12, 15, 20, 22)  # any call may return these
CALLS = {  # and beside them
    "nvEncOpenEncodeSessionEx": (1, 2, 21),
    "nvEncGetEncodeGUIDCount": (),
    "nvEncGetEncodeGUIDs": (),
    "nvEncGetEncodeCaps": (),
    "nvEncGetEncodePresetConfigEx": (),
    "nvEncInitializeEncoder": (),
    "nvEncSetIOCudaStreams": (),
    "nvEncGetSequenceParams": (11, 14),
    "nvEncCreateBitstreamBuffer": (11,),
    "nvEncRegisterResource": (11, 23),
    "nvEncMapInputResource": (11, 16, 24),
    "nvEncEncodePicture": (11, 17, 18, 25),
    "nvEncLockBitstream": (11, 13),
    "nvEncUnlockBitstream": (11,),
    "nvEncReconfigureEncoder": (11,),
    "nvEncUnmapInputResource": (11, 25),
    "nvEncUnregisterResource": (24,),
    "nvEncDestroyBitstreamBuffer": (),
    "nvEncDestroyEncoder": (),
    "NvEncodeAPIGetMaxSupportedVersion": (),
    "NvEncodeAPICreateInstance": (),
}
CUDA_CALLS = (
    *("cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuStreamCreate", "cuStreamWaitEvent"),
    *("cuEventCreate", "cuEventRecord", "cuEventDestroy_v2", "cuMemAlloc_v2", "cuStreamDestroy_v2"),
    *("cuStreamSynchronize", "cuMemcpyDtoHAsync_v2", "cuMemcpyDtoDAsync_v2", "cuMemcpyHtoDAsync_v2"),
)
# Not called where streams stay in the memory of the device, and only there.
OF_THE_HOST = ("nvEncCreateBitstreamBuffer", "nvEncLockBitstream", "nvEncUnlockBitstream")
OF_THE_HOST += ("nvEncDestroyBitstreamBuffer",)
OF_THE_DEVICE = CUDA_CALLS[-4:]
INITIALIZING = ("nvEncGetEncodePresetConfigEx", "nvEncInitializeEncoder", "nvEncSetIOCudaStreams")
SOAK_SECONDS = 60
# The driver is done with the handle whatever it returns.
FINAL = ("nvEncDestroyEncoder", "cuEventDestroy_v2", "cuStreamDestroy_v2")


@pytest.fixture(scope="module", autouse=True)
def _quick_garbage_collections() -> Iterator[None]:
    """What lives before the tests need not be looked at by each of them."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedDriver]:
    monkeypatch.setattr(_nvenc, "OPEN_WAITS", (0.0005,))
    monkeypatch.setattr(_nvenc, "BUSY_WAITS", (0.0005,) * 4)
    with installed(build()) as emulated:
        yield emulated


def use_the_host() -> None:
    """A bit of everything; the results must be right."""
    with Encoder(LARGE, qp=30, device="cuda:0") as encoder:
        encoder.reconfigure(LAYOUT)
        for qp in (30, 20):
            encoder.set_qp(qp)
            jobs = []
            for source in SOURCES[:2]:
                surface = encoder.acquire(timeout=10)
                surface.tensor.copy_(source)
                jobs.append(encoder.submit(surface))
            del surface
            for job, source in zip(jobs, SOURCES, strict=False):
                assert list(job.result(timeout=10).pictures) == canned(source, LAYOUT, qp)
        assert encoder.encode_stream(SOURCES[2]).numpy().tobytes() == canned_stream(SOURCES[2], LAYOUT, 20)


def use_the_device() -> None:
    """The same with streams that stay on the device."""
    out = torch.zeros(2000, dtype=torch.uint8)
    with Encoder(LARGE, qp=30, device="cuda:0", on_device=True) as encoder:
        encoder.reconfigure(LAYOUT)
        for one in (out, None, out[:50]):
            surface = encoder.acquire(timeout=10)
            surface.tensor.copy_(SOURCES[0])
            job = encoder.submit_stream(surface, out=one)
            try:
                stream = job.result(timeout=10)
            except SpaceError as error:
                assert one is not None and len(one) == 50
                stream = error.stream
            assert stream.numpy().tobytes() == canned_stream(SOURCES[0], LAYOUT, 30)


USES = {"host": use_the_host, "device": use_the_device}


def called_by(use: str, calls: Iterable[str]) -> list[tuple[str, str]]:
    left_out = OF_THE_DEVICE if use == "host" else OF_THE_HOST
    return [(use, call) for call in calls if call not in left_out]


@cache
def times_called(use: str) -> dict[str, int]:
    with installed(build()) as driver:
        USES[use]()
        return {call: driver.calls(call) for call in (*CALLS, *CUDA_CALLS)}


def outcome(call: str, status: int, api: str, *, once: bool) -> type[Exception] | None:
    """What a fault must end in; None where the facts say to go on."""
    if (call, status) in (("nvEncEncodePicture", 18), ("nvEncLockBitstream", 13)):
        return None if once else DriverError
    if (call, status) == ("nvEncGetSequenceParams", 14):
        return None if once else DriverError
    if (call, status) == ("nvEncGetEncodeCaps", 8):
        return None if once else LaneUnavailable
    if call in ("nvEncOpenEncodeSessionEx", "NvEncodeAPICreateInstance") and status == 15:
        return None if once and api != NVENC_VERSIONS[-1] else DriverError  # the next older API is tried
    if call == "nvEncOpenEncodeSessionEx" and status in (10, 21):
        return None if once else LaneUnavailable
    if call in ("nvEncOpenEncodeSessionEx", "NvEncodeAPIGetMaxSupportedVersion") and status in (1, 2):
        return LaneUnavailable
    if call in INITIALIZING and status in (12, 22):
        return LaneUnavailable
    return DriverError


def run(work: Callable[[], None]) -> Exception | None:
    """The error of `work` without what its traceback keeps alive."""
    try:
        work()
    except (LaneError, DriverError) as error:
        return error.with_traceback(None)
    return None


def check_fault(driver: EmulatedDriver, use: str, api: str, call: str, status: int, *, once: bool) -> None:
    error = run(USES[use])
    want = outcome(call, status, api, once=once)
    if call == "nvEncGetEncodeCaps" and status == 8:  # it depends on what was asked
        assert error is None or isinstance(error, LaneError)
    elif want is None:
        assert error is None
    else:
        late = str(error).startswith("this encoder failed (")  # the thread that collects was faster
        assert type(error) is (LaneError if late else want), error
        assert f"{call} -> {status} (" in str(error), error
    del error
    if driver.live():  # tracebacks may hold memory in cycles
        gc.collect()
    assert driver.live() == {}


@pytest.mark.parametrize(("use", "call"), [*called_by("host", CALLS), *called_by("device", CALLS)])
def test_every_fault_of_nvenc_ends_well(driver: EmulatedDriver, use: str, call: str) -> None:
    last = times_called(use)[call] - 1
    assert last >= 0
    early = [(status, 0, False) for status in {*EVERY, *CALLS[call]}]
    late = [
        (status, skip, after) for status in (10, 20) for skip in (last // 2, last) for after in (False, True)
    ]
    for (status, skip, after), api in zip(early + late, cycle(NVENC_VERSIONS), strict=False):
        driver.reset()
        driver.speak(api)
        driver.fail(call, status, skip=skip, after=after or call in FINAL)
        check_fault(driver, use, api, call, status, once=True)


@pytest.mark.parametrize(
    ("use", "call"),
    [(use, call) for use in USES for use, call in called_by(use, CALLS) if call not in FINAL],
)
def test_a_call_that_always_fails(driver: EmulatedDriver, use: str, call: str) -> None:
    for status, api in zip(sorted({*EVERY, *CALLS[call]}), cycle(NVENC_VERSIONS), strict=False):
        driver.reset()
        driver.speak(api)
        driver.fail(call, status, times=1 << 30)
        check_fault(driver, use, api, call, status, once=False)


@pytest.mark.parametrize(("use", "call"), [*called_by("host", CUDA_CALLS), *called_by("device", CUDA_CALLS)])
def test_every_fault_of_cuda_ends_well(driver: EmulatedDriver, use: str, call: str) -> None:
    last = times_called(use)[call] - 1
    assert last >= 0
    for status in (2, 201, 700, 999):
        for skip in {0, last // 2, last}:
            driver.reset()
            _driver._contexts.clear()
            driver.fail(call, status, skip=skip, after=call in FINAL)
            check_fault(driver, use, NVENC_VERSIONS[0], call, status, once=True)


def test_no_context_can_be_bound(driver: EmulatedDriver) -> None:
    driver.fail("cuCtxPushCurrent_v2", 201, times=1 << 30)
    with pytest.raises(DriverError, match=r"cuCtxPushCurrent_v2 -> 201 .*no CUDA context"):
        Encoder(LAYOUT, device="cuda:0")


def test_the_drivers_own_words_are_reported(driver: EmulatedDriver) -> None:
    driver.fail("nvEncRegisterResource", 23)
    with pytest.raises(DriverError) as caught:
        Encoder(LAYOUT, device="cuda:0")
    assert str(caught.value) == (
        "nvEncRegisterResource -> 23 (NV_ENC_ERR_RESOURCE_REGISTER_FAILED): fault on order"
    )


def test_a_failed_encoder_delivers_what_came_before(driver: EmulatedDriver) -> None:
    driver.set(slow_us=3000)
    encoder = Encoder(LAYOUT, device="cuda:0")
    good, bad = encoder.acquire(), encoder.acquire()
    for surface, source in ((good, SOURCES[0]), (bad, SOURCES[1])):
        surface.tensor.copy_(source)
    first = encoder.submit(good)
    driver.fail("nvEncEncodePicture", 20)
    with pytest.raises(DriverError, match="nvEncEncodePicture -> 20"):
        encoder.submit(bad)
    assert list(first.result(timeout=10).pictures) == canned(SOURCES[0], LAYOUT)
    for call in (encoder.acquire, lambda: encoder.submit(bad), lambda: encoder.encode(SOURCES[0])):
        with pytest.raises(
            LaneError, match=r"this encoder failed \(nvEncEncodePicture -> 20 .*make a new one"
        ):
            call()
    encoder.close()


def test_nobody_waits_for_a_surface_of_a_failed_encoder(driver: EmulatedDriver) -> None:
    driver.set(slow_us=20_000)
    driver.fail("nvEncLockBitstream", 20, after=True)
    with Encoder(one_frame(NV12, 160, 48), device="cuda:0", surfaces=1) as encoder:
        job = encoder.submit(encoder.acquire())
        with pytest.raises(LaneError, match=r"this encoder failed \(nvEncLockBitstream -> 20"):
            encoder.acquire(timeout=30)
        with pytest.raises(DriverError, match="nvEncLockBitstream -> 20"):
            job.result(timeout=10)


def test_a_picture_that_comes_out_of_turn_is_not_taken_for_another(
    driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = one_frame(NV12, 160, 48)
    with Encoder(layout, device="cuda:0") as encoder:
        encode = Session.encode

        def misnumber(self: Session, mapped: int, pitch: int, output: int, stamp: int, qp_map: Any) -> None:
            encode(self, mapped, pitch, output, stamp + 1, qp_map)

        monkeypatch.setattr(Session, "encode", misnumber)
        with pytest.raises(DriverError, match="picture 1 came out where 0 was due"):
            encoder.encode(random_surface(layout))


def send_through(pool: EncoderPool, count: int) -> None:
    """Encode surfaces with a pool; the streams must be right."""
    jobs = []
    for i in range(count):
        surface = pool.acquire(timeout=10)
        surface.tensor.copy_(SOURCES[i % 4])
        jobs.append(pool.submit_stream(surface))
    for i, job in enumerate(jobs):
        assert job.result(timeout=10).numpy().tobytes() == canned_stream(SOURCES[i % 4], LAYOUT)


def faults_of_a_pool(on_device: bool) -> tuple[str, ...]:
    common = ("nvEncMapInputResource", "nvEncEncodePicture", "nvEncUnmapInputResource")
    return common + (OF_THE_DEVICE if on_device else ("nvEncLockBitstream", "nvEncUnlockBitstream"))


@pytest.mark.parametrize(
    ("on_device", "call"), [(where, call) for where in (False, True) for call in faults_of_a_pool(where)]
)
def test_a_pool_lives_through_every_single_fault(driver: EmulatedDriver, on_device: bool, call: str) -> None:
    with EncoderPool(LAYOUT, device="cuda:0", on_device=on_device) as pool:
        for status, skip in ((20, 0), (5, 4), (20, 11)):
            driver.fail(call, status, skip=skip)
            send_through(pool, 9)
        assert pool.sessions == 3


def test_a_lost_gpu_ends_the_pool_with_an_error(driver: EmulatedDriver) -> None:
    with (
        pytest.raises(DriverError, match="cuStreamWaitEvent -> 700"),
        EncoderPool(LAYOUT, device="cuda:0") as pool,
    ):
        driver.fail("cuStreamWaitEvent", 700, times=1 << 30)
        list(pool.encode(SOURCES))


class EncoderMachine(RuleBasedStateMachine):
    """Any order of the public calls, with faults: right bytes or a typed error, and everything given back."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.driver = self.stack.enter_context(installed(build()))
        self.encoder: Encoder | None = None
        self.held: list[Surface] = []
        self.jobs: list[tuple[Future[Any], bytes]] = []
        self.faults = False

    @precondition(lambda self: self.encoder is None)
    @rule(
        api=st.sampled_from(NVENC_VERSIONS),
        qp=st.sampled_from([None, 25]),
        surfaces=st.integers(1, 3),
        on_device=st.booleans(),
    )
    def open(self, api: str, qp: int | None, surfaces: int, on_device: bool) -> None:
        self.driver.speak(api)
        self.qp, self.surfaces, self.taken, self.on_device = qp, surfaces, 0, on_device
        self.layout = LARGE
        self.encoder = self.attempt(
            lambda: Encoder(LARGE, qp=qp, device="cuda:0", surfaces=surfaces, on_device=on_device)
        )

    @precondition(lambda self: self.encoder is not None)
    @rule()
    def acquire(self) -> None:
        free = self.taken < self.surfaces
        surface = self.attempt(lambda: self.encoder.acquire(timeout=10 if free else 0))
        if surface is not None:
            assert free
            self.taken += 1
            self.held.append(surface)

    @precondition(lambda self: self.held)
    @rule(seed=st.integers(0, 3), room=st.sampled_from([None, 0, 60, 1000]), again=st.booleans())
    def submit(self, seed: int, room: int | None, again: bool) -> None:
        surface, source = self.held.pop(0), random_surface(self.layout, seed)
        surface.tensor.copy_(source)
        want = canned_stream(source, self.layout, self.qp)
        out = None if room is None else torch.zeros(room, dtype=torch.uint8)
        if room is None and not self.on_device:
            work: Callable[[], Any] = lambda: self.encoder.submit(surface)  # noqa: E731
        else:
            work = lambda: self.encoder.submit_stream(surface, out=out)  # noqa: E731
        if (job := self.attempt(work)) is not None:
            self.taken -= 1
            self.jobs.append((job, want))
        if again:
            with pytest.raises(LaneError):
                work()
        if self.faults:
            self.settle()

    @precondition(lambda self: self.held)
    @rule()
    def forget_a_surface(self) -> None:
        self.held.pop()

    @precondition(lambda self: self.jobs)
    @rule()
    def wait(self) -> None:
        job, want = self.jobs.pop(0)
        try:
            got = self.attempt(lambda: job.result(timeout=10), (SpaceError,))
        except SpaceError as error:
            got = error.stream
        if got is not None:
            assert (got.numpy().tobytes() if isinstance(got, torch.Tensor) else got.stream()) == want

    @precondition(lambda self: self.encoder is not None)
    @rule(qp=st.integers(0, 51))
    def change_qp(self, qp: int) -> None:
        if self.attempt(lambda: (self.encoder.set_qp(qp), True)) is not None:
            self.qp = qp

    @precondition(lambda self: self.encoder is not None)
    @rule(layout=st.sampled_from([LARGE, LAYOUT]))
    def change_size(self, layout: SurfaceLayout) -> None:
        if self.attempt(lambda: (self.encoder.reconfigure(layout), True)) is not None:
            assert layout == self.layout or not self.taken
            self.layout = layout

    @precondition(lambda self: self.encoder is not None)
    @rule()
    def close(self) -> None:
        encoder, self.encoder = self.encoder, None
        self.attempt(encoder.close)
        with pytest.raises(LaneError):
            encoder.acquire(timeout=0)
        for surface in self.held:
            surface.tensor.fill_(1)
        self.held.clear()

    @rule(
        call=st.sampled_from([c for c in (*CALLS, *OF_THE_DEVICE) if c not in FINAL]),
        status=st.sampled_from((5, 8, 13, 18, 20)),
        skip=st.integers(0, 5),
    )
    def order_a_fault(self, call: str, status: int, skip: int) -> None:
        self.settle()  # or it would be a matter of time which call is hit
        self.faults = True
        self.driver.fail(call, status, skip=skip)

    def settle(self) -> None:
        for job, _ in self.jobs:
            job.exception(timeout=10)

    @invariant()
    def no_rule_is_broken(self) -> None:
        assert self.driver.violation() == ""
        assert self.driver.context_depth() == 0

    def attempt(self, work: Callable[[], Any], through: tuple[type[Exception], ...] = ()) -> Any:
        """The result, or None for a typed error other than those let `through`."""
        try:
            return work()
        except through:
            raise
        except LaneError:
            return None
        except DriverError:
            assert self.faults
            return None

    def teardown(self) -> None:
        if self.encoder is not None:
            self.close()
        self.jobs.clear()
        self.stack.close()


class SessionMachine(RuleBasedStateMachine):
    """Any order of the raw calls: the driver refuses what is wrong, and closing gives everything back."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.driver = self.stack.enter_context(installed(build()))
        self.session: Session | None = None
        self.registered: list[int] = []
        self.mapped: list[int] = []
        self.outputs: list[int] = []

    @precondition(lambda self: self.session is None)
    @rule(api=st.sampled_from(NVENC_VERSIONS), on_device=st.booleans())
    def open(self, api: str, on_device: bool) -> None:
        self.driver.speak(api)
        self.session, self.initialized = open_session(0), False
        self.coding = Coding(NV12, 160, 48, 30, max_width=192, max_height=64, on_device=on_device)

    @precondition(lambda self: self.session is not None)
    @rule(data=st.data())
    def call(self, data: st.DataObject) -> None:
        pick: Callable[[list[int]], int] = lambda some: data.draw(st.sampled_from([*some, 0xBAD]))  # noqa: E731
        session, coding = self.session, self.coding
        assert session is not None
        larger = replace(coding, width=192, height=64)
        steps: dict[str, Callable[[], Any]] = {
            "initialize": lambda: session.initialize(coding),
            "register": lambda: self.registered.append(session.register(Memory(0, 96 * 256), 0, 256)),
            "register output": lambda: self.registered.append(session.register_output(Memory(0, 9999))),
            "map": lambda: self.mapped.append(session.map(pick(self.registered))),
            "unmap": lambda: session.unmap(data.draw(st.sampled_from(self.registered or [0]))),
            "unregister": lambda: session.unregister(pick(self.registered)),
            "output": lambda: self.outputs.append(session.create_output()),
            "encode": lambda: session.encode(pick(self.mapped), 256, pick(self.outputs + self.mapped), 7),
            "collect": lambda: session.collect(pick(self.outputs), 7, ctypes.string_at),
            "reconfigure": lambda: session.reconfigure(data.draw(st.sampled_from([coding, larger]))),
            "set_qp": lambda: session.reconfigure(replace(session.coding, qp=20)),
            "headers": session.headers,
        }
        name = data.draw(st.sampled_from(sorted(steps)))
        if (name == "unmap" and not self.registered) or (name == "initialize") == self.initialized:
            return
        try:
            steps[name]()
            self.initialized = True
        except DriverError as error:
            assert error.name.startswith("NV_ENC_ERR_")
        self.registered = [r for r in self.registered if r in session._maps]

    @precondition(lambda self: self.session is not None)
    @rule()
    def close(self) -> None:
        session, self.session = self.session, None
        assert session is not None
        try:
            session.close()
        finally:
            session.close()
        self.registered, self.mapped, self.outputs = [], [], []
        if self.driver.live():
            gc.collect()
        assert self.driver.live() == {}

    def teardown(self) -> None:
        if self.session is not None:
            self.close()
        self.driver.reset()
        self.stack.close()


few = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestEncoderMachine = EncoderMachine.TestCase
TestEncoderMachine.settings = few
TestSessionMachine = SessionMachine.TestCase
TestSessionMachine.settings = few


@pytest.mark.soak
@pytest.mark.timeout(120)
def test_a_minute_of_faults_leaves_nothing_behind(driver: EmulatedDriver) -> None:
    """Sixty seconds of encoding with a fault now and then; handles, threads and memory stay flat."""
    draw, end = random.Random(0), time.monotonic() + SOAK_SECONDS
    peaks: list[int] = []
    rounds, threads = 0, threading.active_count()
    while time.monotonic() < end:
        driver.speak(NVENC_VERSIONS[rounds % 3])
        on_device = rounds % 2 == 1
        with EncoderPool(LAYOUT, device="cuda:0", on_device=on_device) as pool:
            for _ in range(20):
                if draw.random() < 0.3:
                    driver.fail(draw.choice(faults_of_a_pool(on_device)), 20, skip=draw.randrange(20))
                send_through(pool, 12)
        encode_nvenc(SOURCES[0], LAYOUT, device="cuda:0")
        encode_nvenc(random_surface(LARGE), LARGE, device="cuda:0")
        release_idle_encoders()
        gc.collect()
        assert driver.live() == {} and driver.violation() == ""
        assert threading.active_count() == threads
        rounds += 1
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    settled = peaks[len(peaks) // 4]
    assert peaks[-1] - settled < 4096, f"{peaks[-1] - settled} KiB more after {rounds} rounds"
