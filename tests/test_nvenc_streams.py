"""Streams that NVENC leaves in memory of the caller, of the host or of the device, on the emulated driver."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from emulated import EmulatedDriver, build, canned_stream, installed, one_frame, random_surface
from sidelane.codec._abi import NVENC_VERSIONS
from sidelane.codec.hevc import decode_hevc, encode_hevc
from sidelane.codec.nvenc import OUTPUTS, Encoder
from sidelane.codec.nvenc_pool import EncoderPool
from sidelane.codec.packet import Packet
from sidelane.errors import DriverError, LaneError, LaneUnavailable, SpaceError
from sidelane.layout import NV12, P010, YUV444_10
from sidelane.pipeline.lanes import decode_packet, open_lane

LAYOUT = one_frame(NV12, 160, 48, frames=3)
SOURCE = random_surface(LAYOUT)
STREAM = canned_stream(SOURCE, LAYOUT)
POISON = 0xA5
PLACES = pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])


@pytest.fixture
def driver() -> Iterator[EmulatedDriver]:
    with installed(build()) as emulated:
        yield emulated


def poisoned(nbytes: int) -> torch.Tensor:
    return torch.full((nbytes,), POISON, dtype=torch.uint8)


@pytest.mark.parametrize("api", NVENC_VERSIONS)
@pytest.mark.parametrize(("format", "qp"), [(NV12, None), (YUV444_10, 30)])
@PLACES
def test_streams_are_those_of_the_software_encoder(
    driver: EmulatedDriver, api: str, qp: int | None, format: object, on_device: bool
) -> None:
    driver.speak(api)
    driver.real_hevc()
    layout = one_frame(format, 178, 150, frames=2)  # type: ignore[arg-type]
    source = random_surface(layout)
    with Encoder(layout, qp=qp, device="cuda:0", on_device=on_device) as encoder:
        assert encoder.api == api
        stream = encoder.encode_stream(source).numpy().tobytes()
    assert torch.equal(decode_hevc(stream, layout), decode_hevc(encode_hevc(source, layout, qp=qp), layout))


@PLACES
@pytest.mark.parametrize("spare", [0, 1, 1000])
def test_a_stream_is_written_to_its_destination_and_not_beyond(
    driver: EmulatedDriver, on_device: bool, spare: int
) -> None:
    memory = poisoned(64 + len(STREAM) + spare + 64)
    out = memory[64 : 64 + len(STREAM) + spare]
    with Encoder(LAYOUT, device="cuda:0", on_device=on_device) as encoder:
        stream = encoder.encode_stream(SOURCE, out=out)
    assert stream.numpy().tobytes() == STREAM
    assert stream.data_ptr() == out.data_ptr()
    assert (memory[:64] == POISON).all() and (memory[64 + len(STREAM) :] == POISON).all()


@PLACES
@pytest.mark.parametrize("missing", [1, 5, 6, 40, len(STREAM) // 2, len(STREAM)])
def test_a_destination_that_is_too_small_loses_nothing(
    driver: EmulatedDriver, on_device: bool, missing: int
) -> None:
    room = len(STREAM) - missing
    memory = poisoned(room + 64)
    with Encoder(LAYOUT, device="cuda:0", on_device=on_device, surfaces=1) as encoder:
        for _ in range(2 * OUTPUTS):
            with pytest.raises(
                SpaceError, match=f"takes {len(STREAM)} bytes, its destination holds {room}"
            ) as e:
                encoder.encode_stream(SOURCE, out=memory[:room])
            assert e.value.stream.numpy().tobytes() == STREAM
        assert not encoder.failed
        assert encoder.encode_stream(SOURCE).numpy().tobytes() == STREAM
    assert (memory[room:] == POISON).all()


@PLACES
def test_destinations_in_flight_keep_apart(driver: EmulatedDriver, on_device: bool) -> None:
    driver.set(slow_us=500)
    sources = [random_surface(LAYOUT, seed) for seed in range(8)]
    arena = poisoned(8 * 512)
    with Encoder(LAYOUT, device="cuda:0", on_device=on_device, surfaces=4) as encoder:
        jobs = []
        for number, source in enumerate(sources):
            surface = encoder.acquire(timeout=10)
            surface.tensor.copy_(source)
            jobs.append(encoder.submit_stream(surface, out=arena[number * 512 : (number + 1) * 512]))
        for job, source in zip(jobs, sources, strict=True):
            assert job.result().numpy().tobytes() == canned_stream(source, LAYOUT)


@PLACES
@pytest.mark.parametrize(
    "out",
    [
        torch.zeros(9, dtype=torch.int8),
        torch.zeros(9, 2, dtype=torch.uint8),
        torch.zeros(9, dtype=torch.uint8)[::2],
    ],
    ids=["dtype", "shape", "stride"],
)
def test_wrong_destinations(driver: EmulatedDriver, on_device: bool, out: torch.Tensor) -> None:
    with Encoder(LAYOUT, device="cuda:0", on_device=on_device, surfaces=1) as encoder:
        surface = encoder.acquire()
        for submit in (
            lambda: encoder.submit_stream(surface, out=out),
            lambda: encoder.encode_stream(SOURCE, out=out),
            lambda: encoder.submit_stream(surface, qp_map=torch.zeros(1)),
        ):
            with pytest.raises(LaneError, match=r"pass contiguous torch.uint8 \[bytes\] on cpu|qp_map=True"):
                submit()
        encoder.submit_stream(surface).result()  # it is still acquired


def test_an_encoder_without_bitstreams_in_host_memory(driver: EmulatedDriver) -> None:
    with Encoder(LAYOUT, device="cuda:0", on_device=True) as encoder:
        surface = encoder.acquire()
        with pytest.raises(LaneError, match="leaves its streams on the device: use submit_stream"):
            encoder.submit(surface)
        with pytest.raises(LaneError, match="use submit_stream"):
            encoder.encode(SOURCE)
    assert driver.calls("nvEncCreateBitstreamBuffer") == driver.calls("nvEncLockBitstream") == 0
    assert driver.calls("nvEncRegisterResource") == OUTPUTS + 2 * LAYOUT.frames
    with (
        EncoderPool(LAYOUT, device="cuda:0", on_device=True, sessions=1) as pool,
        pytest.raises(LaneError, match="use submit_stream"),
    ):
        pool.submit(pool.acquire())


@pytest.mark.parametrize("api", NVENC_VERSIONS)
def test_a_driver_that_writes_to_host_memory_alone(driver: EmulatedDriver, api: str) -> None:
    driver.speak(api)
    driver.set(vidmem=0)
    with pytest.raises(
        LaneUnavailable,
        match="nvEncInitializeEncoder -> 12 .*: no bitstreams in device memory; leave streams in host memory",
    ):
        Encoder(LAYOUT, device="cuda:0", on_device=True)
    assert driver.live() == {}
    Encoder(LAYOUT, device="cuda:0").close()


def test_a_picture_that_was_cut_is_noticed(driver: EmulatedDriver) -> None:
    layout = one_frame(NV12, 160, 48)
    room = 2 * 160 * 72
    plain = len(canned_stream(random_surface(layout), layout)) - 6 - 5  # without headers and end
    with Encoder(layout, device="cuda:0", on_device=True) as encoder:
        driver.set(padding=room - plain - 1)  # the largest picture there is room for
        assert encoder.encode_stream(random_surface(layout)).numel() == room - 1 + 6 + 5
        driver.set(padding=room - plain + 1)
        with pytest.raises(
            DriverError, match=f"picture 1 has {room + 1} bytes in a buffer of {room}: it is cut"
        ):
            encoder.encode_stream(random_surface(layout))


def test_device_outputs_are_mapped_for_every_picture(driver: EmulatedDriver) -> None:
    with Encoder(LAYOUT, device="cuda:0", on_device=True, surfaces=1) as encoder:
        for _ in range(5):
            assert encoder.encode_stream(SOURCE).numpy().tobytes() == STREAM
    pictures = 5 * LAYOUT.frames
    assert driver.calls("nvEncMapInputResource") == driver.calls("nvEncUnmapInputResource") == 2 * pictures
    assert driver.calls("cuMemcpyDtoHAsync_v2") == pictures  # of the sizes
    assert driver.calls("cuMemAlloc_v2") == OUTPUTS + 1


@PLACES
def test_a_pool_writes_streams_of_all_engines(driver: EmulatedDriver, on_device: bool) -> None:
    sources = [random_surface(LAYOUT, seed) for seed in range(9)]
    outs = [poisoned(len(STREAM)) for _ in sources]
    with EncoderPool(LAYOUT, device="cuda:0", on_device=on_device) as pool:
        for round in range(3):
            driver.fail("nvEncEncodePicture", 20, skip=4 * round)
            jobs = []
            for source, out in zip(sources, outs, strict=True):
                surface = pool.acquire(timeout=10)
                surface.tensor.copy_(source)
                jobs.append(pool.submit_stream(surface, out=out))
            for job, source, out in zip(jobs, sources, outs, strict=True):
                assert job.result(timeout=10).data_ptr() == out.data_ptr()
                assert out.numpy().tobytes() == canned_stream(source, LAYOUT)
        for _ in range(10):  # more often than there are surfaces
            surface = pool.acquire(timeout=10)
            surface.tensor.copy_(SOURCE)
            error = pool.submit_stream(surface, out=outs[0][:-1]).exception(timeout=10)
            assert isinstance(error, SpaceError) and error.stream.numpy().tobytes() == STREAM
        assert pool.sessions == 3


def test_a_packet_with_its_stream_on_the_device(driver: EmulatedDriver) -> None:
    """The section is the memory the stream was written to; the packet decodes as one of the software lane."""
    driver.real_hevc()
    x = torch.sin(torch.arange(300)[:, None] / 29) * torch.cos(torch.arange(200)[None] / 17)
    software = open_lane("video-cpu", format="p010").encode(x)
    width, height, frames, _ = software.params[:4]
    layout = one_frame(P010, width, height, frames=frames)
    source = decode_hevc(software.sections["bitstream"].numpy().tobytes(), layout)
    with Encoder(layout, device="cuda:0", on_device=True) as encoder:
        stream = encoder.encode_stream(source)
    packet = software.with_(sections=dict(software.sections) | {"bitstream": stream})
    assert packet.sections["bitstream"].data_ptr() == stream.data_ptr()
    assert torch.equal(decode_packet(Packet.from_bytes(packet.to_bytes())), decode_packet(software))
