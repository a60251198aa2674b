"""Sessions of NVENC that change their frame size instead of being opened anew, on the emulated driver."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from emulated import EmulatedDriver, build, canned, canned_stream, installed, one_frame, random_surface
from sidelane.codec import nvenc
from sidelane.codec._abi import NVENC_VERSIONS
from sidelane.codec.hevc import decode_hevc, encode_hevc
from sidelane.codec.nvenc import Encoder, encode_nvenc
from sidelane.codec.nvenc_pool import EncoderPool
from sidelane.errors import LaneError, LaneUnavailable
from sidelane.layout import NV12, P010, YUV444_10

SMALL, WIDE, TALL = one_frame(NV12, 160, 48), one_frame(NV12, 320, 48), one_frame(NV12, 160, 96)
LARGE = one_frame(NV12, 640, 480)


@pytest.fixture
def driver() -> Iterator[EmulatedDriver]:
    with installed(build()) as emulated:
        yield emulated


@pytest.mark.parametrize(
    ("api", "on_device"), [*((api, False) for api in NVENC_VERSIONS), (NVENC_VERSIONS[0], True)]
)
def test_one_session_codes_frames_of_many_sizes(driver: EmulatedDriver, api: str, on_device: bool) -> None:
    driver.speak(api)
    driver.real_hevc()
    sizes = [(160, 144, 1), (322, 180, 2), (130, 144, 1)]
    first = one_frame(YUV444_10, 160, 144)
    with Encoder(first, qp=20, device="cuda:0", max_size=(322, 180), on_device=on_device) as encoder:
        for width, height, frames in sizes:
            layout = one_frame(YUV444_10, width, height, frames=frames)
            encoder.reconfigure(layout)
            source = random_surface(layout, width)
            stream = encoder.encode_stream(source).numpy().tobytes()
            want = encode_hevc(source, layout, qp=20)
            assert torch.equal(decode_hevc(stream, layout), decode_hevc(want, layout))
    assert driver.calls("nvEncOpenEncodeSessionEx") == 1
    assert driver.calls("nvEncReconfigureEncoder") == len(sizes) - 1  # the first is what it was opened for


def test_surfaces_are_registered_anew_in_their_memory(driver: EmulatedDriver) -> None:
    two = one_frame(NV12, 160, 48, frames=2)
    with Encoder(SMALL, device="cuda:0", max_size=(640, 480)) as encoder:
        taken = driver.calls("cuMemAlloc_v2")
        for layout, more in ((LARGE, 2), (SMALL, 0), (two, 0), (WIDE, 0), (LARGE, 0)):
            before = driver.calls("nvEncRegisterResource")
            encoder.reconfigure(layout)
            taken += more
            assert driver.calls("cuMemAlloc_v2") == taken
            assert driver.calls("nvEncRegisterResource") - before == 2 * layout.frames
            for seed in range(3):
                source = random_surface(layout, seed)
                assert list(encoder.encode(source).pictures) == canned(source, layout)
    assert driver.calls("nvEncUnregisterResource") == driver.calls("nvEncRegisterResource")


def test_a_layout_of_the_same_frames_needs_no_call(driver: EmulatedDriver) -> None:
    other = one_frame(NV12, 160, 48, pitch=512)
    with Encoder(SMALL, device="cuda:0") as encoder:
        encoder.reconfigure(SMALL)
        assert driver.calls("nvEncUnregisterResource") == driver.calls("nvEncReconfigureEncoder") == 0
        encoder.reconfigure(other)  # another pitch is a matter of registration alone
        source = random_surface(other)
        assert list(encoder.encode(source).pictures) == canned(source, other)
        assert driver.calls("nvEncUnregisterResource") == 2
    assert driver.calls("nvEncReconfigureEncoder") == 0


def test_what_was_submitted_before_is_delivered_first(driver: EmulatedDriver) -> None:
    driver.set(slow_us=2000)
    source = random_surface(LARGE)
    with Encoder(LARGE, device="cuda:0", surfaces=3) as encoder:
        jobs = []
        for _ in range(3):
            surface = encoder.acquire()
            surface.tensor.copy_(source)
            jobs.append(encoder.submit(surface))
        encoder.reconfigure(SMALL)
        assert all(job.done() for job in jobs)
        assert [list(job.result().pictures) for job in jobs] == [canned(source, LARGE)] * 3
        small = random_surface(SMALL)
        assert encoder.encode_stream(small).numpy().tobytes() == canned_stream(small, SMALL)


def test_surfaces_that_are_acquired_have_to_be_submitted_first(driver: EmulatedDriver) -> None:
    with Encoder(LARGE, device="cuda:0") as encoder:
        surface = encoder.acquire()
        with pytest.raises(LaneError, match="submit the surfaces that are acquired, then reconfigure"):
            encoder.reconfigure(SMALL)
        encoder.submit(surface).result()  # nothing has changed
        encoder.reconfigure(SMALL)
        with pytest.raises(LaneError, match="not acquired from this encoder"):
            encoder.submit(surface)


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        (
            one_frame(NV12, 322, 48),
            r"'nv12' up to 320x144 cannot change to 'nv12' 322x48, pitch 512: open another",
        ),
        (one_frame(NV12, 320, 146), "cannot change to 'nv12' 320x146"),
        (one_frame(NV12, 128, 48), "cannot change to 'nv12' 128x48"),  # less than the GPU takes
        (one_frame(P010, 160, 48), "cannot change to 'p010' 160x48"),
        (one_frame(NV12, 160, 48, pitch=160), "160x48, pitch 160"),
    ],
)
def test_what_a_session_cannot_change_to(driver: EmulatedDriver, layout: object, problem: str) -> None:
    with Encoder(SMALL, device="cuda:0", max_size=(320, 144)) as encoder:
        assert not encoder.takes(layout)  # type: ignore[arg-type]
        with pytest.raises(LaneError, match=problem):
            encoder.reconfigure(layout)  # type: ignore[arg-type]
        assert list(encoder.encode(random_surface(SMALL)).pictures) == canned(random_surface(SMALL), SMALL)
    assert driver.calls("nvEncReconfigureEncoder") == 0


def test_a_gpu_that_keeps_the_size_of_a_session(driver: EmulatedDriver) -> None:
    driver.set(resize=0)
    with pytest.raises(LaneUnavailable, match="does not change the frame size of a session"):
        Encoder(SMALL, device="cuda:0", max_size=(320, 48))
    with Encoder(LARGE, device="cuda:0") as encoder, pytest.raises(LaneError, match="open another encoder"):
        encoder.reconfigure(SMALL)
    with pytest.raises(LaneUnavailable, match="8194x48 is outside"):
        driver.set(resize=1)
        Encoder(SMALL, device="cuda:0", max_size=(8194, 48))


def test_encoders_of_a_pool_keep_their_layout(driver: EmulatedDriver) -> None:
    with EncoderPool(LARGE, device="cuda:0") as pool, pytest.raises(LaneError, match="open another encoder"):
        pool._encoders[0].reconfigure(SMALL)


def test_closed_and_failed_encoders(driver: EmulatedDriver) -> None:
    encoder = Encoder(LARGE, device="cuda:0")
    encoder.close()
    with pytest.raises(LaneError, match="this encoder is closed"):
        encoder.reconfigure(SMALL)
    with Encoder(LARGE, device="cuda:0") as encoder:
        driver.fail("nvEncLockBitstream", 20)
        encoder.submit(encoder.acquire()).exception(timeout=10)
        with pytest.raises(LaneError, match=r"this encoder failed \(nvEncLockBitstream -> 20"):
            encoder.reconfigure(SMALL)
        with pytest.raises(LaneError, match="this encoder failed"):
            encoder.acquire(timeout=10)


def test_idle_sessions_are_changed_instead_of_opened(driver: EmulatedDriver) -> None:
    def encode(layout: object, qp: int | None = None) -> None:
        source = random_surface(layout)  # type: ignore[arg-type]
        stream = encode_nvenc(source, layout, qp=qp, device="cuda:0")  # type: ignore[arg-type]
        assert stream == canned_stream(source, layout, qp)  # type: ignore[arg-type]

    for layout in (LARGE, SMALL, WIDE, TALL, LARGE):
        encode(layout)
    assert driver.calls("nvEncInitializeEncoder") == 1
    assert driver.calls("nvEncReconfigureEncoder") == 4
    for qp in (20, 20, 30):
        encode(SMALL, qp)  # no lossless session becomes one with a QP
    assert driver.calls("nvEncInitializeEncoder") == 2
    assert driver.calls("nvEncReconfigureEncoder") == 5
    encode(WIDE, 30)  # wider than the session can become
    assert driver.calls("nvEncInitializeEncoder") == 3
    encode(SMALL, 30)  # the one that needs no change is found, not the wider one
    assert driver.calls("nvEncReconfigureEncoder") == 5
    assert driver.live()["session"] == nvenc.IDLE_ENCODERS


@pytest.mark.parametrize(
    "call", ["nvEncReconfigureEncoder", "nvEncUnregisterResource", "nvEncGetSequenceParams"]
)
def test_a_session_that_cannot_be_changed_after_all_is_replaced(driver: EmulatedDriver, call: str) -> None:
    encode_nvenc(random_surface(LARGE), LARGE, device="cuda:0")
    driver.fail(call, 8)
    source = random_surface(SMALL)
    assert encode_nvenc(source, SMALL, device="cuda:0") == canned_stream(source, SMALL)
    assert driver.calls("nvEncInitializeEncoder") == 2
    assert driver.live()["session"] == 1
