"""NVENC sessions, rings and pools against the emulated driver; no real NVENC has run them."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from emulated import (
    EmulatedDriver,
    build,
    canned,
    installed,
    one_frame,
    random_surface,
)
from sidelane.codec import _nvenc, nvenc
from sidelane.codec._abi import NVENC_VERSIONS, load
from sidelane.codec._nvenc_config import Coding, configure
from sidelane.codec.hevc import decode_hevc, encode_hevc
from sidelane.codec.nvenc import OUTPUTS, Encoder, encode_nvenc, encoder_caps
from sidelane.codec.nvenc_pool import EncoderPool
from sidelane.errors import LaneError, LaneUnavailable
from sidelane.kernels.surface import project_quantize_pack, unpack_dequantize_project
from sidelane.layout import (
    CHANNEL_ROWS,
    NV12,
    NV12_SPLIT12,
    P010,
    P012,
    YUV444,
    YUV444_10,
    YUV444_12,
    SurfaceFormat,
    plan_surface,
)

ENCODABLE = (NV12, P010, NV12_SPLIT12, YUV444, YUV444_10)
BY_NAME = {f.name: f for f in ENCODABLE}.items()
SMALL = one_frame(NV12, 160, 48)


@pytest.fixture
def driver() -> Iterator[EmulatedDriver]:
    with installed(build()) as emulated:
        yield emulated


@pytest.mark.parametrize("api", NVENC_VERSIONS)
@pytest.mark.parametrize("format", ENCODABLE, ids=lambda f: f.name)
def test_codes_survive_kernel_surface_encoder_and_decoder(
    driver: EmulatedDriver, format: SurfaceFormat, api: str
) -> None:
    driver.speak(api)
    driver.real_hevc()
    tokens, channels, levels = 301, 77, 2**format.bits - 1
    layout = plan_surface(format, CHANNEL_ROWS, tokens, channels, max_side=144)
    codes = torch.randint(levels + 1, (tokens, channels)).float()
    zero, one = torch.zeros(channels), torch.ones(channels)
    with Encoder(layout, device="cuda:0") as encoder:
        surface = encoder.acquire()
        surface.tensor.zero_()
        project_quantize_pack(
            codes, None, zero, one, torch.full((channels,), float(levels)), surface.tensor, layout
        )
        stream = encoder.submit(surface).result().stream()
        assert encoder.api == api
    decoded = decode_hevc(stream, layout)
    assert torch.equal(unpack_dequantize_project(decoded, layout, None, one, zero, torch.float32), codes)


@pytest.mark.parametrize("format", ENCODABLE, ids=lambda f: f.name)
@pytest.mark.parametrize("qp", [None, 22])
def test_streams_are_those_of_the_software_encoder(
    driver: EmulatedDriver, format: SurfaceFormat, qp: int | None
) -> None:
    if format.split and qp is not None:
        with pytest.raises(LaneError, match="splits codes over planes"):
            Encoder(one_frame(format, 160, 144), qp=qp, device="cuda:0")
        return
    driver.real_hevc()
    layout = one_frame(format, 178, 150, frames=2)
    source = random_surface(layout)
    stream = encode_nvenc(source, layout, qp=qp, device="cuda:0")
    assert torch.equal(decode_hevc(stream, layout), decode_hevc(encode_hevc(source, layout, qp=qp), layout))


@pytest.mark.parametrize("api", NVENC_VERSIONS)
def test_parameter_sets_by_the_driver_or_by_us(driver: EmulatedDriver, api: str) -> None:
    driver.speak(api)
    driver.real_hevc()
    layout = one_frame(NV12, 160, 144, frames=3)
    source = random_surface(layout)
    with Encoder(layout, device="cuda:0") as encoder:
        apart = encoder.encode(source)
    with Encoder(layout, device="cuda:0", repeat_headers=True) as encoder:
        inside = encoder.encode(source)
    assert apart.headers and not inside.headers
    assert apart.stream() == inside.stream()
    assert inside.pictures[1].startswith(apart.headers)


@pytest.mark.parametrize("qp", [0, 51])
def test_the_ends_of_the_qp_range(driver: EmulatedDriver, qp: int) -> None:
    driver.real_hevc()
    layout = one_frame(NV12, 160, 144)
    source = random_surface(layout)
    assert encode_nvenc(source, layout, qp=qp, device="cuda:0") == encode_hevc(source, layout, qp=qp)


def test_long_parameter_sets_are_fetched_with_a_larger_buffer(driver: EmulatedDriver) -> None:
    driver.set(header_padding=3000)
    with Encoder(SMALL, device="cuda:0") as encoder:
        assert len(encoder.encode(random_surface(SMALL)).headers) > 3000
    assert driver.calls("nvEncGetSequenceParams") == 4  # 512, 1024, 2048, 4096


def test_many_frames_flow_through_few_outputs(driver: EmulatedDriver) -> None:
    layout = one_frame(NV12, 160, 48, frames=3 * OUTPUTS + 1)
    source = random_surface(layout)
    with Encoder(layout, device="cuda:0") as encoder:
        assert list(encoder.encode(source).pictures) == canned(source, layout)
    assert driver.calls("nvEncCreateBitstreamBuffer") == OUTPUTS
    assert driver.calls("nvEncMapInputResource") == driver.calls("nvEncUnmapInputResource") == layout.frames


def test_surfaces_are_registered_once_and_reused(driver: EmulatedDriver) -> None:
    with Encoder(SMALL, device="cuda:0", surfaces=2) as encoder:
        addresses = set()
        for number in range(20):
            surface = encoder.acquire()
            addresses.add(surface.tensor.data_ptr())
            source = random_surface(SMALL, number)
            surface.tensor.copy_(source)
            assert list(encoder.submit(surface).result().pictures) == canned(source, SMALL)
    assert len(addresses) == 2
    assert driver.calls("nvEncRegisterResource") == driver.calls("cuMemAlloc_v2") == 2
    assert driver.calls("nvEncEncodePicture") == 21  # and the end of the stream


def test_the_encoder_reads_after_the_callers_stream(driver: EmulatedDriver) -> None:
    with Encoder(SMALL, device="cuda:0") as encoder:
        before = [driver.calls(c) for c in ("cuEventRecord", "cuStreamWaitEvent", "cuEventDestroy_v2")]
        encoder.encode(random_surface(SMALL))
        after = [driver.calls(c) for c in ("cuEventRecord", "cuStreamWaitEvent", "cuEventDestroy_v2")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 1]
    assert driver.calls("nvEncSetIOCudaStreams") == 1


@pytest.mark.parametrize("api", NVENC_VERSIONS)
def test_changing_the_qp_keeps_the_session(driver: EmulatedDriver, api: str) -> None:
    driver.speak(api)
    driver.real_hevc()
    layout = one_frame(NV12, 160, 144)
    source = random_surface(layout)
    with Encoder(layout, qp=40, device="cuda:0") as encoder:
        for qp in (40, 10, 51):
            encoder.set_qp(qp)
            assert encoder.encode(source).stream() == encode_hevc(source, layout, qp=qp)
        with pytest.raises(LaneError, match="qp=52"):
            encoder.set_qp(52)
    assert driver.calls("nvEncOpenEncodeSessionEx") == 1
    assert driver.calls("nvEncReconfigureEncoder") == 3
    with Encoder(layout, device="cuda:0") as encoder, pytest.raises(LaneError, match="lossless session"):
        encoder.set_qp(20)


@pytest.mark.parametrize("api", NVENC_VERSIONS)
def test_qp_maps_arrive_block_by_block(driver: EmulatedDriver, api: str) -> None:
    driver.speak(api)
    driver.real_hevc()
    layout = one_frame(NV12, 162, 144, frames=2)  # 6x5 blocks
    qp_map = torch.randint(-51, 52, (2, 5, 6), dtype=torch.int8)
    with Encoder(layout, qp=30, qp_map=True, device="cuda:0") as encoder:
        surface = encoder.acquire()
        with pytest.raises(LaneError, match=r"pass torch.int8 \[2, 5, 6\]"):
            encoder.submit(surface, qp_map[:1])
        encoder.submit(surface, qp_map).result()
    assert driver.maps == qp_map.flatten(1).tolist()
    with Encoder(layout, qp=30, device="cuda:0") as encoder:
        surface = encoder.acquire()
        with pytest.raises(LaneError, match="open it with qp_map=True"):
            encoder.submit(surface, qp_map)
    with pytest.raises(LaneError, match="lossless coding has no QP"):
        Encoder(layout, qp_map=True, device="cuda:0")


@pytest.mark.parametrize(
    ("settings", "format", "size", "qp", "reason"),
    [
        ({"hevc": 0}, NV12, (160, 48), 20, "does not encode HEVC"),
        ({"yuv444": 0}, YUV444, (160, 48), 20, "does not encode 4:4:4"),
        ({"ten_bit": 0}, P010, (160, 48), 20, "does not encode 10 bit"),
        ({"lossless": 0}, NV12, (160, 48), None, "does not encode without loss"),
        ({}, P012, (160, 48), 20, "no NVENC encodes 12-bit samples"),
        ({}, YUV444_12, (160, 48), None, "no NVENC encodes 12-bit samples"),
        ({}, NV12, (128, 48), 20, "128x48 is outside 129x33..8192x8192"),
        ({"width_max": 4096}, NV12, (4098, 48), 20, "4098x48 is outside"),
    ],
)
def test_what_a_gpu_cannot_encode_is_refused_before_it_is_tried(
    driver: EmulatedDriver,
    settings: dict[str, int],
    format: SurfaceFormat,
    size: tuple[int, int],
    qp: int | None,
    reason: str,
) -> None:
    driver.set(**settings)
    with pytest.raises(LaneUnavailable, match=f"NVENC on cuda:0: .*{reason}.*; encode in software"):
        Encoder(one_frame(format, *size), qp=qp, device="cuda:0")
    assert driver.calls("nvEncInitializeEncoder") == 0


def test_capabilities(driver: EmulatedDriver) -> None:
    driver.set(engines=2, yuv444=0)
    caps = encoder_caps("cuda:0")
    assert (caps.engines, caps.yuv444, caps.ten_bit, caps.lossless) == (2, False, True, True)
    assert (caps.min_width, caps.min_height, caps.max_width, caps.max_height) == (129, 33, 8192, 8192)
    driver.fail("nvEncGetEncodeCaps", 8, skip=0)  # an old driver does not know how many engines it has
    assert encoder_caps("cuda:0").engines == 1


@pytest.mark.parametrize(
    ("claims", "accepts", "tried"),
    [
        (0xB1, 0xB1, ["11.1"]),
        (0xC0, 0xC0, ["11.1"]),
        (0xC1, 0xC1, ["12.1"]),
        (0xC2, 0xC2, ["12.1"]),
        (0xD0, 0xD0, ["13.0"]),
        (0xD1, 0xD1, ["13.0"]),
        (0xC1, 0xB1, ["12.1", "11.1"]),
        (0xD0, 0xC1, ["13.0", "12.1"]),
        (0xD0, 0xB1, ["13.0", "12.1", "11.1"]),
    ],
)
def test_the_session_takes_the_newest_api_that_the_driver_takes(
    driver: EmulatedDriver, claims: int, accepts: int, tried: list[str]
) -> None:
    driver.set(version=claims, accepts=accepts)
    with Encoder(SMALL, device="cuda:0") as encoder:
        assert encoder.api == tried[-1]
        source = random_surface(SMALL)
        assert list(encoder.encode(source).pictures) == canned(source, SMALL)
    assert driver.calls("NvEncodeAPICreateInstance") == len(tried)


@pytest.mark.parametrize("version", NVENC_VERSIONS)
@pytest.mark.parametrize("format", ENCODABLE, ids=lambda f: f.name)
@pytest.mark.parametrize("qp", [None, 33])
def test_configuration_in_every_api_version(version: str, format: SurfaceFormat, qp: int | None) -> None:
    abi = load(f"nvenc-{version}")
    config = abi.struct("NV_ENC_CONFIG")(gopLength=250, frameIntervalP=3)
    config.rcParams.enableAQ, config.rcParams.lookaheadDepth, config.rcParams.averageBitRate = 1, 8, 10**7
    configure(abi, config, Coding(format, 160, 144, qp, repeat_headers=True))
    raw = bytes(config)
    word = int.from_bytes(raw[168 + 16 : 168 + 20], "little")  # encodeCodecConfig, bit-fields of HEVC
    ten = format.itemsize == 2
    assert word >> 9 & 3 == (1 if format.subsampled else 3)
    assert word >> 7 & 1 == 1 and word >> 6 & 1 == 0
    assert word >> 11 & 7 == (2 if ten and version != "13.0" else 0)
    depths = raw[168 + 200 : 168 + 208]
    assert depths == (bytes([10 if ten else 8, 0, 0, 0] * 2) if version == "13.0" else bytes(8))
    numbers = memoryview(raw).cast("I")
    assert list(numbers[5:7]) == [1, 0]  # gopLength, frameIntervalP
    assert list(numbers[11:18]) == [0, *[qp or 0] * 3, 0, 0, 0]  # mode, QPs, bit rates, buffer
    assert numbers[19] == 1 << 9  # of the rate control flags zeroReorderDelay alone
    profile = ("MAIN10" if ten else "MAIN") if format.subsampled else "FREXT"
    assert raw[4:20] == bytes(abi.guid(f"NV_ENC_HEVC_PROFILE_{profile}_GUID"))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"qp": 52}, "qp=52"),
        ({"qp": -1}, "qp=-1"),
        ({"qp": 1.5}, r"qp=1\.5"),
        ({"preset": 0}, r"preset=0 is outside 1\.\.7"),
        ({"device": "cpu"}, "video engines work on CUDA devices"),
        ({"layout": one_frame(NV12, 160, 48, pitch=160)}, "pitch 160 is not a multiple of 256"),
    ],
)
def test_wrong_arguments_reach_no_driver(
    driver: EmulatedDriver, options: dict[str, object], problem: str
) -> None:
    with pytest.raises(LaneError, match=problem):
        Encoder(**({"layout": SMALL, "device": "cuda:0"} | options))  # type: ignore[arg-type]
    assert driver.calls("nvEncOpenEncodeSessionEx") == 0


def test_surfaces_go_through_acquire_and_submit(driver: EmulatedDriver) -> None:
    with Encoder(SMALL, device="cuda:0", surfaces=1) as encoder, Encoder(SMALL, device="cuda:0") as other:
        surface = encoder.acquire()
        with pytest.raises(LaneError, match=r"no surface came free in 0\.01 s"):
            encoder.acquire(timeout=0.01)
        with pytest.raises(LaneError, match="no surface came free in 0 s"):
            encoder.acquire(timeout=0)
        with pytest.raises(LaneError, match="not acquired from this encoder"):
            other.submit(surface)
        encoder.submit(surface).result()
        with pytest.raises(LaneError, match="not acquired from this encoder"):
            encoder.submit(surface)
        with pytest.raises(LaneError, match=r"pass torch.uint8 \[72, 256\]"):
            encoder.encode(torch.zeros(72, 255, dtype=torch.uint8))


def test_closing_delivers_what_was_submitted_and_wakes_who_waits(driver: EmulatedDriver) -> None:
    driver.set(slow_us=2000)
    encoder = Encoder(SMALL, device="cuda:0", surfaces=2)
    source = random_surface(SMALL)
    held, sent = encoder.acquire(), encoder.acquire()
    sent.tensor.copy_(source)
    future = encoder.submit(sent)
    encoder.close()
    encoder.close()
    assert list(future.result(timeout=0).pictures) == canned(source, SMALL)
    for call in (encoder.acquire, lambda: encoder.submit(held), lambda: encoder.encode(source)):
        with pytest.raises(LaneError, match="this encoder is closed"):
            call()
    del sent
    held.tensor.fill_(7)  # its memory lives as long as it does
    assert driver.live() == {"memory": 1}


def test_a_waiting_thread_is_woken_by_close(driver: EmulatedDriver) -> None:
    encoder = Encoder(SMALL, device="cuda:0", surfaces=1)
    held = encoder.acquire()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(encoder.acquire)
        encoder.close()
        with pytest.raises(LaneError, match="this encoder is closed"):
            waiting.result(timeout=10)
    del held


def test_a_forgotten_encoder_is_closed_by_the_garbage_collector(driver: EmulatedDriver) -> None:
    encoder = Encoder(SMALL, device="cuda:0")
    encoder.encode(random_surface(SMALL))
    threads = threading.active_count()
    del encoder
    gc.collect()
    assert driver.live() == {}
    assert threading.active_count() == threads - 1


def test_a_busy_engine_is_waited_for(driver: EmulatedDriver) -> None:
    driver.fail("nvEncEncodePicture", 18, times=4)
    driver.fail("nvEncLockBitstream", 13, times=3)
    source = random_surface(SMALL)
    with Encoder(SMALL, device="cuda:0") as encoder:
        assert list(encoder.encode(source).pictures) == canned(source, SMALL)


def test_the_session_limit_closes_idle_sessions_first(
    driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_nvenc, "OPEN_WAITS", (0.001, 0.001))
    driver.set(session_limit=1)
    source = random_surface(SMALL)
    encode_nvenc(source, SMALL, device="cuda:0")
    encode_nvenc(source, SMALL, device="cuda:0")
    assert driver.calls("nvEncInitializeEncoder") == 1  # the idle session was used again
    encode_nvenc(source, SMALL, qp=20, device="cuda:0")  # only possible without it
    only = Encoder(SMALL, device="cuda:0", make_room=nvenc.release_idle_encoders)
    with pytest.raises(LaneUnavailable, match="all encode sessions .* are in use; close other encoders"):
        Encoder(SMALL, device="cuda:0")
    only.close()
    assert driver.live() == {}


def test_few_sessions_are_kept_idle(driver: EmulatedDriver) -> None:
    for format in (NV12, P010, YUV444, P010):
        layout = one_frame(format, 160, 48)
        encode_nvenc(random_surface(layout), layout, device="cuda:0")
    assert driver.live()["session"] == nvenc.IDLE_ENCODERS
    assert driver.calls("nvEncInitializeEncoder") == 3
    nvenc.release_idle_encoders()
    assert driver.live() == {}


def test_a_thousand_surfaces_over_three_engines_come_back_in_order(driver: EmulatedDriver) -> None:
    sources = [random_surface(SMALL, seed) for seed in range(16)]
    want = [canned(source, SMALL) for source in sources]
    with EncoderPool(SMALL, device="cuda:0") as pool:
        assert pool.sessions == 3
        results = pool.encode(sources[i % 16] for i in range(1000))
        for number, encoded in enumerate(results):
            assert list(encoded.pictures) == want[number % 16]
    assert number == 999
    shares = [driver.engine_pictures(engine) for engine in range(3)]
    assert sum(shares) == 1000 and min(shares) > 100


def test_sessions_work_at_the_same_time(driver: EmulatedDriver) -> None:
    driver.set(slow_us=20_000)
    with EncoderPool(SMALL, device="cuda:0", surfaces=1) as pool:
        surfaces = [pool.acquire() for _ in range(3)]
        futures = [pool.submit(surface) for surface in surfaces]
        for future in futures:
            future.result()
    assert [driver.engine_pictures(engine) for engine in range(3)] == [1, 1, 1]


def test_a_pool_takes_the_sessions_it_can_get(
    driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_nvenc, "OPEN_WAITS", (0.001,))
    driver.set(session_limit=2)
    source = random_surface(SMALL)
    with EncoderPool(SMALL, device="cuda:0") as pool:
        assert pool.sessions == 2
        assert [list(e.pictures) for e in pool.encode([source] * 9)] == [canned(source, SMALL)] * 9
    taken = [Encoder(SMALL, device="cuda:0") for _ in range(2)]
    with pytest.raises(LaneUnavailable, match="all encode sessions"):
        EncoderPool(SMALL, device="cuda:0")
    for encoder in taken:
        encoder.close()


@pytest.mark.parametrize("call", ["nvEncEncodePicture", "nvEncLockBitstream", "nvEncMapInputResource"])
@pytest.mark.parametrize("limit", [8, 3, 0])
def test_other_sessions_encode_what_a_failed_one_had(
    driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch, call: str, limit: int
) -> None:
    monkeypatch.setattr(_nvenc, "OPEN_WAITS", (0.001,))
    layout = one_frame(NV12, 160, 48, frames=3)
    sources = [random_surface(layout, seed) for seed in range(8)]
    want = [canned(source, layout) for source in sources]
    with EncoderPool(layout, device="cuda:0") as pool:
        driver.set(session_limit=limit)  # 0: the failed session cannot be replaced
        for round in range(3):
            driver.fail(call, 20, skip=7 * round)
            got = [list(e.pictures) for e in pool.encode(sources[i % 8] for i in range(12))]
            assert got == [want[i % 8] for i in range(12)]
            if limit == 0 and round == 1:
                break
        assert pool.sessions == (1 if limit == 0 else 3)


def test_a_pool_without_sessions_says_so(driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nvenc, "OPEN_WAITS", ())
    source = random_surface(SMALL)
    with EncoderPool(SMALL, device="cuda:0", sessions=1, surfaces=1) as pool:
        driver.set(session_limit=0)
        driver.fail("nvEncLockBitstream", 20)
        with pytest.raises(LaneUnavailable, match="all encode sessions"):
            list(pool.encode([source]))
        with pytest.raises(LaneUnavailable, match="no encode session is left"):
            list(pool.encode([source]))
        driver.set(session_limit=8)


def test_a_closed_pool(driver: EmulatedDriver) -> None:
    pool = EncoderPool(SMALL, device="cuda:0", sessions=1)
    surface = pool.acquire()
    with pytest.raises(LaneError, match="no surface came free in 0 s"):
        pool.acquire(), pool.acquire(timeout=0)
    pool.close()
    pool.close()
    with pytest.raises(LaneError, match="this pool is closed"):
        pool.submit(surface)
    with pytest.raises(LaneError, match="this pool is closed"):
        pool.acquire()
    with pytest.raises(LaneError, match="sessions must be at least 1"):
        EncoderPool(SMALL, device="cuda:0", sessions=0)


def test_what_was_encoded_before_a_wrong_surface_is_delivered(driver: EmulatedDriver) -> None:
    with EncoderPool(SMALL, device="cuda:0", surfaces=4) as pool:
        driver.set(slow_us=50_000)
        sources = [random_surface(SMALL, i) for i in range(2)] + [torch.zeros(3, dtype=torch.uint8)]
        results = pool.encode(sources)
        assert [len(next(results).stream()) > 0 for _ in range(2)] == [True, True]
        with pytest.raises(LaneError):
            next(results)
