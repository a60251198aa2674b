"""The choice of engines for surfaces and the lane built on it; NVENC and NVDEC are emulated drivers."""

from __future__ import annotations

import gc
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from random import Random
from time import monotonic
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from emulated import EmulatedDriver, build, canned, installed, one_frame, random_surface
from fake_nvdec import FakeDriver, toy_stream
from samples import bits_of
from sidelane import doctor
from sidelane.codec import _driver, _nvenc, engines, nvdec, nvenc_pool, self_test, surface_pool
from sidelane.codec._abi import CUVID_VERSION, load
from sidelane.codec.engines import (
    capabilities,
    decode_surface,
    encoding_slot,
    release_engines,
)
from sidelane.codec.hevc import END_OF_BITSTREAM, decode_hevc, encode_hevc
from sidelane.codec.hevc_syntax import parse_sps
from sidelane.codec.nvenc import Encoder
from sidelane.codec.packet import Packet
from sidelane.errors import DriverError, LaneError, LaneUnavailable, PacketError
from sidelane.kernels._launch import interpret
from sidelane.layout import FORMATS, NV12, NV12_SPLIT12, P010, YUV444_12, SurfaceLayout, plan_surface
from sidelane.pipeline import video
from sidelane.pipeline.compress import compress, decompress
from sidelane.pipeline.lanes import decode_packet, open_lane
from sidelane.pipeline.offload import offload

CPU = torch.device("cpu")
ONE = one_frame(NV12, 160, 144)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedDriver]:
    """A GPU with the emulated NVENC and no NVDEC, whose tensors are CPU tensors."""
    fresh_engines(monkeypatch)
    with installed(build()) as emulated:
        emulated.real_hevc()
        yield emulated
        release_engines()


def fresh_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    for answers in ("_encoders", "_decoders", "_decoder_pools"):
        monkeypatch.setattr(engines, answers, {})
    monkeypatch.setattr(engines, "_histories", defaultdict(engines._History))
    monkeypatch.setattr(surface_pool, "_refusals", {})
    monkeypatch.setattr(engines, "gpu_index", lambda device: 0)
    monkeypatch.setattr(_nvenc, "OPEN_WAITS", (0.001,))


def encode(source: Tensor, layout: SurfaceLayout, qp: int | None = None) -> bytes:
    """The stream of a surface, written into the slot as a kernel would."""
    slot = encoding_slot(layout, source.device, qp=qp)
    slot.tensor.copy_(source)
    slot.submit()
    return slot.stream()


def by_hardware(stream: bytes, source: Tensor, layout: SurfaceLayout, qp: int | None = None) -> None:
    assert torch.equal(decode_hevc(stream, layout), decode_hevc(encode_hevc(source, layout, qp=qp), layout))


def wave(tokens: int, channels: int, seed: int = 0) -> Tensor:
    t, k = torch.arange(tokens)[:, None], torch.arange(channels)[None]
    return torch.sin(t / 29 + seed) * torch.cos(k / 17) + 0.01 * torch.randn(tokens, channels)


def test_tensors_on_the_cpu_use_software() -> None:
    found = capabilities("cpu")
    assert set(found) == set(FORMATS)
    for able in found.values():
        assert able.lossless.name == able.constant_qp.name == able.decode.name == "software"
        assert able.decode.reason == "the tensor is on the CPU"


def test_capabilities_name_engine_and_reason(driver: EmulatedDriver) -> None:
    driver.set(yuv444=0)
    found = capabilities("cuda:0")
    assert found["nv12"].lossless.name == "nvenc"
    assert found["nv12"].lossless.reason == "3 engines; the self-test came back exact"
    assert found["nv12"].constant_qp.reason == "3 engines"
    assert found["nv12_split12"].lossless.name == "nvenc"
    assert found["nv12_split12"].constant_qp.name == "none"
    assert found["yuv444"].lossless.name == "software"
    assert found["yuv444"].lossless.reason == "this GPU does not encode 4:4:4"
    assert found["p012"].lossless.reason.startswith("no NVENC encodes 12-bit samples")
    assert found["nv12"].decode.name == "software"
    assert "libnvcuvid.so.1: cannot open" in found["nv12"].decode.reason
    assert driver.live().get("session") is None  # tests keep none of the few sessions there are


def test_the_self_test_runs_once_and_withdraws_what_is_not_exact(
    driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    coded = EmulatedDriver._encode

    def lossy(self: EmulatedDriver, *args: Any) -> int:
        return coded(self, *args[:5], max(args[5], 1), *args[6:])

    monkeypatch.setattr(EmulatedDriver, "_encode", lossy)
    driver.real_hevc()
    source = random_surface(ONE)
    assert encode(source, ONE) == encode_hevc(source, ONE)
    able = capabilities("cuda:0")["nv12"]
    assert able.lossless.name == "software"
    assert able.lossless.reason.startswith("the self-test came back changed: NVENC is not lossless")
    assert able.constant_qp.name == "nvenc"
    tested = driver.calls("nvEncEncodePicture")
    encode(source, ONE)
    assert driver.calls("nvEncEncodePicture") == tested


def test_a_gpu_without_nvenc_is_asked_once(driver: EmulatedDriver) -> None:
    driver.fail("nvEncOpenEncodeSessionEx", 2, times=1 << 30)
    source = random_surface(ONE)
    for _ in range(3):
        assert encode(source, ONE) == encode_hevc(source, ONE)
    assert driver.calls("nvEncOpenEncodeSessionEx") == 1
    reason = capabilities("cuda:0")["nv12"].lossless.reason
    assert "nvEncOpenEncodeSessionEx -> 2 (NV_ENC_ERR_UNSUPPORTED_DEVICE)" in reason


def test_frames_nvenc_refuses_are_encoded_in_software(driver: EmulatedDriver) -> None:
    driver.set(width_max=512)
    layout = one_frame(NV12, 520, 144)
    source = random_surface(layout)
    assert encode(source, layout, qp=20) == encode_hevc(source, layout, qp=20)
    able = capabilities("cuda:0")["nv12"].constant_qp
    assert able.name == "nvenc"  # for smaller ones
    assert "software took over 1 times, last because 520x144 is outside" in able.reason


def test_frames_of_a_surface_are_spread_over_all_engines(driver: EmulatedDriver) -> None:
    layout = one_frame(P010, 160, 144, frames=10)
    source = random_surface(layout)
    capabilities("cuda:0")
    before = [driver.engine_pictures(engine) for engine in range(3)]
    by_hardware(encode(source, layout), source, layout)
    after = [driver.engine_pictures(engine) for engine in range(3)]
    assert sorted(b - a for a, b in zip(before, after, strict=True)) == [3, 3, 4]


@pytest.mark.parametrize("call", ["nvEncEncodePicture", "nvEncLockBitstream", "nvEncMapInputResource"])
@pytest.mark.parametrize("limit", [8, 3, 0])
def test_surfaces_survive_the_failure_of_a_session(driver: EmulatedDriver, call: str, limit: int) -> None:
    layout = one_frame(NV12, 160, 144, frames=5)
    sources = [random_surface(layout, seed) for seed in range(3)]
    encode(sources[0], layout, qp=20)
    driver.set(session_limit=limit)  # 0: the failed session cannot be replaced
    driver.fail(call, 20, skip=3)
    for source in sources:
        by_hardware(encode(source, layout, qp=20), source, layout, 20)
    driver.set(session_limit=8)
    assert capabilities("cuda:0")["nv12"].constant_qp.reason == "3 engines"  # software did nothing


def test_fewer_sessions_than_engines(driver: EmulatedDriver) -> None:
    driver.set(session_limit=2)
    layout = one_frame(NV12, 160, 144, frames=5)
    source = random_surface(layout)
    by_hardware(encode(source, layout), source, layout)
    assert driver.live()["session"] == 2


def test_without_a_session_software_encodes_for_a_while(
    driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(surface_pool, "monotonic", lambda: now)
    source = random_surface(ONE)
    encode(source, ONE)
    release_engines()
    with Encoder(ONE, device="cuda:0"):
        driver.set(session_limit=1)
        asked = driver.calls("nvEncOpenEncodeSessionEx")
        assert encode(source, ONE) == encode_hevc(source, ONE)
        asked_once = driver.calls("nvEncOpenEncodeSessionEx")
        assert encode(source, ONE) == encode_hevc(source, ONE)
        assert asked < asked_once == driver.calls("nvEncOpenEncodeSessionEx")
        able = capabilities("cuda:0")["nv12"].lossless
        assert able.name == "software" and "all encode sessions of this system are in use" in able.reason
    now += surface_pool.PAUSE
    by_hardware(encode(source, ONE), source, ONE)
    assert driver.live()["session"] == 1
    able = capabilities("cuda:0")["nv12"].lossless
    assert able.name == "nvenc"
    assert "software took over 1 times, last because nvEncOpenEncodeSessionEx -> 10" in able.reason


def test_surfaces_with_sessions_keep_them_when_others_get_none(driver: EmulatedDriver) -> None:
    driver.set(session_limit=3)
    source = random_surface(ONE)
    slot = encoding_slot(ONE, CPU, qp=20)  # these sessions are in use, so they cannot be closed for others
    assert encode(source, ONE, qp=30) == encode_hevc(source, ONE, qp=30)
    asked = driver.calls("nvEncOpenEncodeSessionEx")
    slot.tensor.copy_(source)
    slot.submit()
    by_hardware(slot.stream(), source, ONE, 20)
    pictures = driver.calls("nvEncEncodePicture")
    by_hardware(encode(source, ONE, qp=20), source, ONE, 20)
    assert driver.calls("nvEncEncodePicture") == pictures + 1
    assert encode(source, ONE, qp=30) == encode_hevc(source, ONE, qp=30)
    assert driver.calls("nvEncOpenEncodeSessionEx") == asked
    able = capabilities("cuda:0")["nv12"].constant_qp
    assert able.name == "nvenc" and "software took over 2 times" in able.reason


def test_a_lack_of_sessions_during_the_self_test_withdraws_nothing(
    driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(engines, "monotonic", lambda: now)
    assert capabilities("cuda:0")["p010"].constant_qp.name == "nvenc"
    monkeypatch.setattr(engines, "_histories", defaultdict(engines._History))
    with Encoder(ONE, device="cuda:0"):
        driver.set(session_limit=1)
        able = capabilities("cuda:0")["p010"].lossless
        assert able.name == "software" and able.reason.startswith("the self-test failed: nvEncOpenEncode")
    now += surface_pool.PAUSE
    assert capabilities("cuda:0")["p010"].lossless.name == "nvenc"


def test_software_takes_over_when_every_session_fails(
    driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(engines, "monotonic", lambda: now)
    source = random_surface(ONE)
    encode(source, ONE)
    driver.fail("nvEncLockBitstream", 20, times=nvenc_pool.ATTEMPTS)
    assert encode(source, ONE) == encode_hevc(source, ONE)
    able = capabilities("cuda:0")["nv12"].lossless
    assert able.name == "software" and "nvEncLockBitstream -> 20 (NV_ENC_ERR_GENERIC)" in able.reason
    now += surface_pool.PAUSE
    opened = driver.calls("nvEncInitializeEncoder")
    by_hardware(encode(source, ONE), source, ONE)
    assert driver.calls("nvEncInitializeEncoder") == opened + 3  # sessions that failed are not used again
    assert capabilities("cuda:0")["nv12"].lossless.name == "nvenc"


def test_a_lost_gpu_is_an_error(driver: EmulatedDriver) -> None:
    source = random_surface(ONE)
    encode(source, ONE)
    driver.fail("cuStreamWaitEvent", 719)
    with pytest.raises(DriverError, match="cuStreamWaitEvent -> 719"):
        encode(source, ONE)


def test_memory_that_torch_holds_back_is_freed_for_surfaces(driver: EmulatedDriver) -> None:
    source = random_surface(ONE)
    capabilities("cuda:0")
    driver.fail("cuMemAlloc_v2", 2)
    by_hardware(encode(source, ONE), source, ONE)
    assert capabilities("cuda:0")["nv12"].lossless.reason == "3 engines; the self-test came back exact"
    release_engines()
    driver.fail("cuMemAlloc_v2", 2, times=2)
    assert encode(source, ONE) == encode_hevc(source, ONE)
    assert "cuMemAlloc_v2 -> 2" in capabilities("cuda:0")["nv12"].lossless.reason


def test_sessions_and_memory_are_kept_for_surfaces_of_the_same_kind(driver: EmulatedDriver) -> None:
    source = random_surface(ONE)
    addresses = set()
    for _ in range(4):
        slot = encoding_slot(ONE, CPU, qp=30)
        addresses.add(slot.tensor.data_ptr())
        slot.tensor.copy_(source)
        slot.submit()
        slot.stream()
    assert len(addresses) == 1
    assert driver.calls("nvEncInitializeEncoder") == 3
    assert driver.live()["session"] == 3
    for qp in range(surface_pool.IDLE_POOLS + 2):
        driver.set(session_limit=64)
        encode(source, ONE, qp=qp)
    assert driver.live()["session"] == 3 * surface_pool.IDLE_POOLS
    release_engines()
    assert "session" not in driver.live()


def test_another_kind_of_surface_takes_the_sessions_of_an_idle_one(driver: EmulatedDriver) -> None:
    driver.set(session_limit=3)
    source = random_surface(ONE)
    for qp in (20, 30):
        by_hardware(encode(source, ONE, qp=qp), source, ONE, qp)
    assert driver.live()["session"] == 3


def test_a_slot_that_is_discarded_is_used_again(driver: EmulatedDriver) -> None:
    source = random_surface(ONE)
    slot = encoding_slot(ONE, CPU)
    address = slot.tensor.data_ptr()
    slot.discard()
    slot = encoding_slot(ONE, CPU)
    assert slot.tensor.data_ptr() == address
    slot.tensor.copy_(source)
    slot.submit()
    slot.discard()
    by_hardware(encode(source, ONE), source, ONE)


def test_threads_share_the_sessions(driver: EmulatedDriver) -> None:
    layout = one_frame(NV12, 160, 144, frames=2)
    sources = [random_surface(layout, seed) for seed in range(4)]
    want = [decode_hevc(encode_hevc(source, layout), layout) for source in sources]
    driver.fail("nvEncLockBitstream", 20, skip=11)
    with ThreadPoolExecutor(6) as threads:
        streams = list(threads.map(lambda i: encode(sources[i % 4], layout), range(24)))
    for number, stream in enumerate(streams):
        assert torch.equal(decode_hevc(stream, layout), want[number % 4])
    # The self-test, three sessions, a new one for the failed one; threads that race may replace it again.
    assert driver.calls("nvEncInitializeEncoder") < 12


@pytest.mark.soak
def test_kinds_threads_limits_and_failures_at_once(
    driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stream is right, by NVENC or by software; nothing hangs; at the end nothing is left."""

    def software(surface: Tensor, layout: SurfaceLayout, *, qp: int | None = None) -> bytes:
        return b"".join(canned(surface, layout, qp)) + END_OF_BITSTREAM

    monkeypatch.setattr(engines, "encode_hevc", software)
    monkeypatch.setattr(engines, "PAUSE", 0.0)
    driver.real_hevc(False)
    driver.set(session_limit=5, slow_us=300)
    layouts = [one_frame(NV12, 160 + 16 * i, 144, frames=1 + i % 4) for i in range(6)]
    sources = [random_surface(layout) for layout in layouts]
    want = [canned(source, layout, 20) for source, layout in zip(sources, layouts, strict=True)]
    calls = ("nvEncLockBitstream", "nvEncEncodePicture", "nvEncMapInputResource", "nvEncUnmapInputResource")
    calls += ("nvEncRegisterResource", "nvEncOpenEncodeSessionEx", "cuMemAlloc_v2")
    end = monotonic() + 60

    def work(seed: int) -> int:
        draw, done = Random(seed), 0
        while monotonic() < end:
            kind = draw.randrange(6)
            slot = encoding_slot(layouts[kind], CPU, qp=20)
            slot.tensor.copy_(sources[kind])
            if draw.random() < 0.05:
                slot.discard()
                continue
            slot.submit()
            if draw.random() < 0.05:
                slot.discard()
                continue
            stream, at = slot.stream(), 0
            for picture in want[kind]:
                at = stream.index(picture, at) + len(picture)
            assert stream[at:] == END_OF_BITSTREAM
            done += 1
            if draw.random() < 0.02:
                driver.fail(draw.choice(calls), draw.choice((10, 20)), skip=draw.randrange(5))
        return done

    with ThreadPoolExecutor(8) as threads:
        assert min(threads.map(work, range(8))) > 100


def test_surfaces_come_back(driver: EmulatedDriver) -> None:
    for fmt in (NV12_SPLIT12, YUV444_12):
        layout = one_frame(fmt, 160, 144, frames=2)
        source = random_surface(layout)
        assert torch.equal(decode_surface(encode(source, layout), layout, CPU), source)


class Touches(TorchDispatchMode):
    """Notes what works on the memory of the slots, except while `busy`."""

    def __init__(self) -> None:
        super().__init__()
        self.slots: set[int] = set()  # addresses
        self.busy = False
        self.noted: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        places = {t.untyped_storage().data_ptr() for t in (*args, out) if isinstance(t, Tensor)}
        if not self.busy and places & self.slots:
            self.noted.append(str(func))
        return out


@pytest.mark.parametrize("max_side", [4096, 144])
def test_the_kernel_writes_what_the_encoder_reads(
    driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch, max_side: int
) -> None:
    """The addresses the kernel writes frames to are those NVENC reads, and nothing else touches them."""
    read: list[int] = []
    coded = EmulatedDriver._encode

    def noted(self: EmulatedDriver, frame: int | None, *args: Any) -> int:
        read.extend([frame] if frame else [])
        return coded(self, frame, *args)

    monkeypatch.setattr(EmulatedDriver, "_encode", noted)
    driver.real_hevc()
    capabilities("cuda:0")
    x = wave(300, 200)
    lane, software = open_lane("video", max_side=max_side), open_lane("video-cpu", max_side=max_side)
    want = software.decode(software.encode(x))
    touches = Touches()
    written: list[int] = []
    kernel = video.project_quantize_pack

    def spied(*args: Any) -> Tensor:
        surface, layout = args[-2:]
        size = surface.numel() // layout.frames
        written.extend(surface.data_ptr() + i * size for i in range(layout.frames))
        touches.slots.add(surface.untyped_storage().data_ptr())
        touches.busy = True
        with interpret():
            clamped = kernel(*args)
        touches.busy = False
        return clamped

    monkeypatch.setattr(video, "project_quantize_pack", spied)
    for _ in range(2):
        read.clear()
        written.clear()
        with touches:
            packet = lane.encode(x)
        assert len(written) == packet.numbers(4)[2] == (1 if max_side == 4096 else 2)
        assert sorted(read) == sorted(written)
        assert touches.noted == []
        assert torch.equal(software.decode(packet), want)
    assert len(touches.slots) == 1


@pytest.mark.parametrize(
    "options", [{}, {"format": "p010"}, {"format": "nv12_split12"}, {"qp": 20}, {"max_side": 144}], ids=str
)
def test_the_video_lane_writes_packets_of_the_software_lane(
    driver: EmulatedDriver, options: dict[str, object]
) -> None:
    x = wave(300, 200)
    lane, software = open_lane("video", **options), open_lane("video-cpu", **options)
    packet, same = lane.encode(x), software.encode(x)
    assert packet.lane == "video" and driver.calls("nvEncEncodePicture") > 0
    restored = lane.decode(packet)
    assert torch.equal(restored, software.decode(same))
    assert torch.equal(restored, decode_packet(Packet.from_bytes(packet.to_bytes())))
    assert type(lane.finer()) is type(lane) or options.get("format") == "nv12_split12"


ODD: dict[str, Callable[[], Tensor]] = {
    "odd channels": lambda: wave(301, 77),
    "scalar": lambda: torch.tensor(2.5),
    "tiny": lambda: torch.randn(3, 5),
    "empty": lambda: torch.empty(0, 64),
    "integers": lambda: torch.arange(3000).view(50, 60),
    "double": lambda: torch.rand(300, 64, dtype=torch.float64),
    "nan": lambda: torch.full((300, 64), torch.nan),
    "nan and inf": lambda: wave(300, 64).index_fill(0, torch.tensor([2, 9]), torch.nan).clamp_(max=0.9),
    "transposed": lambda: wave(300, 64).t(),
    "sliced": lambda: wave(300, 90)[:, 7:71],
    "expanded": lambda: wave(300, 64)[:, None].expand(300, 3, 64),
    "half": lambda: wave(300, 64).half(),
    "bfloat16": lambda: wave(300, 64).bfloat16(),
    "several frames": lambda: wave(3000, 64),
}


def test_tensors_in_a_row_keep_all_engines_busy_and_come_in_order(driver: EmulatedDriver) -> None:
    driver.set(slow_us=5000)
    tensors = [wave(300, 200, seed) for seed in range(4)] + [make() for make in ODD.values()]
    lane, software = open_lane("video", max_side=256), open_lane("video-cpu", max_side=256)
    packets = list(lane.encode_many(iter(tensors)))
    want = [software.decode(software.encode(x)) for x in tensors]
    assert len(packets) == len(tensors)
    for packet, restored in zip(packets, want, strict=True):
        assert torch.equal(bits_of(software.decode(packet)), bits_of(restored))
        assert software.decode(packet).stride() == restored.stride()
    shares = [driver.engine_pictures(engine) for engine in range(3)]
    assert min(shares) >= 3


def test_an_abandoned_iteration_gives_its_surfaces_back(driver: EmulatedDriver) -> None:
    lane = open_lane("video")
    x = wave(300, 200)
    packets = lane.encode_many([x] * 20)
    first = next(packets)
    packets.close()
    slots = sum(len(pool._free) for pool in surface_pool._pools.values())
    assert 1 <= slots <= video.FRAMES_AHEAD + 1
    assert lane.encode(x).to_bytes() == first.to_bytes()
    assert sum(len(pool._free) for pool in surface_pool._pools.values()) == slots


def test_an_error_in_a_row_of_tensors_comes_at_its_place(driver: EmulatedDriver) -> None:
    packets = open_lane("video").encode_many([wave(300, 200), torch.empty(3, device="meta"), wave(300, 200)])
    assert next(packets).lane == "video"
    with pytest.raises(LaneError, match="meta device"):
        next(packets)


def test_a_kernel_that_fails_gives_the_surface_back(
    driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane, x = open_lane("video"), wave(300, 200)
    want = lane.encode(x).to_bytes()

    def broken(*args: Any) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(video, "project_quantize_pack", broken)
        lane.encode(x)
    memory = driver.live()["memory"]
    assert lane.encode(x).to_bytes() == want
    assert driver.live()["memory"] == memory


class HevcDriver(FakeDriver):
    """The stand-in for NVDEC, decoding HEVC: FFmpeg turns it into the toy format."""

    def _play(self, params: Any, data: bytes) -> None:
        data = data.removesuffix(END_OF_BITSTREAM) + END_OF_BITSTREAM
        at = data.index(b"\0\0\1\x42\1")
        width, height, chroma, bits, _ = parse_sps(data[at + 3 : at + 500])
        sampled = {("4:2:0" if f.subsampled else "4:4:4", f.bits): f for f in FORMATS.values() if not f.split}
        layout = one_frame(sampled[chroma, bits], width, height, frames=data.count(b"\0\0\1\x40\1"))
        try:
            rows = decode_hevc(data, layout)[:, : width * layout.format.itemsize]
        except PacketError:
            return
        frames = [frame.contiguous().numpy().tobytes() for frame in rows.chunk(layout.frames)]
        super()._play(params, toy_stream(frames, layout))


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[HevcDriver]:
    """A GPU with NVDEC and no NVENC, whose tensors are CPU tensors."""
    fresh_engines(monkeypatch)
    fake = HevcDriver()
    names = ("cuda", f"cuvid-{CUVID_VERSION}")
    libraries = {name: _driver.Library(load(name), open=partial(fake.open, load(name))) for name in names}
    monkeypatch.setattr(_driver, "_libraries", libraries)
    monkeypatch.setattr(_driver, "_contexts", {})
    monkeypatch.setattr(_driver, "torch_device", lambda index: CPU)
    monkeypatch.setattr(_driver, "current_stream", lambda index: 0)
    yield fake
    release_engines()
    gc.collect()
    assert (fake.kinds(), fake.stack) == ([], [])


def decoded_by_software(monkeypatch: pytest.MonkeyPatch) -> list[SurfaceLayout]:
    """The layouts `engines` has software decode from now on."""
    seen: list[SurfaceLayout] = []

    def noted(stream: bytes, layout: SurfaceLayout) -> Tensor:
        seen.append(layout)
        return decode_hevc(stream, layout)

    monkeypatch.setattr(engines, "decode_hevc", noted)
    return seen


@pytest.mark.parametrize("max_side", [4096, 144])
@pytest.mark.parametrize("name", FORMATS)
def test_packets_are_decoded_by_nvdec(
    decoder: HevcDriver, monkeypatch: pytest.MonkeyPatch, name: str, max_side: int
) -> None:
    x = wave(600, 150)
    x[7] = torch.nan
    software = open_lane("video-cpu", format=name, max_side=max_side)
    packet = Packet.from_bytes(software.encode(x).to_bytes())
    want = bits_of(software.decode(packet))
    by_software = decoded_by_software(monkeypatch)
    for decode in (open_lane("video").decode, decode_packet, decompress):
        assert torch.equal(bits_of(decode(packet)), want)
    assert by_software == []
    reason = engines.decoding_engine(0, FORMATS[name]).reason
    assert reason == "3 engines; the self-test came back exact"
    assert decoder.calls.count("cuvidDecodePicture") == 1 + 3 * packet.numbers(4)[2]


def test_a_decoder_that_changes_bits_is_withdrawn(
    decoder: HevcDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    map_frame = decoder.cuvidDecodePicture

    def lossy(handle: int, pointer: Any) -> int:
        status = map_frame(handle, pointer)
        surfaces = decoder.live[handle][1].surfaces
        data = surfaces[pointer.contents.CurrPicIdx]
        surfaces[pointer.contents.CurrPicIdx] = data[:-1] + bytes([data[-1] ^ 1])
        return status

    monkeypatch.setattr(decoder, "cuvidDecodePicture", lossy)
    cuvid = f"cuvid-{CUVID_VERSION}"
    library = _driver.Library(load(cuvid), open=partial(decoder.open, load(cuvid)))
    monkeypatch.setitem(_driver._libraries, cuvid, library)
    source = random_surface(ONE)
    stream = encode_hevc(source, ONE)
    for _ in range(3):
        assert torch.equal(decode_surface(stream, ONE, CPU), source)
    able = engines.decoding_engine(0, NV12)
    assert able.name == "software"
    assert able.reason.startswith("the self-test came back changed: NVDEC is not lossless")
    assert decoder.calls.count("cuvidDecodePicture") == 1


@pytest.mark.parametrize("frames", [1, 3])
def test_software_decodes_what_nvdec_fails_at(
    decoder: HevcDriver, monkeypatch: pytest.MonkeyPatch, frames: int
) -> None:
    layout = one_frame(NV12, 160, 144, frames=frames)
    source = random_surface(layout)
    stream = encode_hevc(source, layout)
    capabilities("cuda:0")
    release_engines()
    by_software = decoded_by_software(monkeypatch)
    decoder.fail["cuvidCreateVideoParser"] = deque([999] * 6)
    assert torch.equal(decode_surface(stream, layout, CPU), source)
    assert by_software == [layout]
    reason = capabilities("cuda:0")["nv12"].decode.reason
    assert reason.startswith("3 engines; the self-test came back exact; software took over 1 times, last")
    assert "cuvidCreateVideoParser -> 999" in reason
    decoder.fail.clear()
    assert torch.equal(decode_surface(stream, layout, CPU)[:, :160], source[:, :160])
    assert by_software == [layout]


def test_frames_nvdec_refuses_are_decoded_in_software(
    decoder: HevcDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = one_frame(NV12, 128, 128)  # below the smallest that NVDEC decodes
    source = random_surface(layout)
    by_software = decoded_by_software(monkeypatch)
    assert torch.equal(decode_surface(encode_hevc(source, layout), layout, CPU), source)
    assert by_software == [layout]
    assert "128x128 is outside 144x144" in capabilities("cuda:0")["nv12"].decode.reason


def test_a_lost_gpu_is_an_error_when_decoding(decoder: HevcDriver) -> None:
    stream = encode_hevc(random_surface(ONE), ONE)
    decode_surface(stream, ONE, CPU)
    decoder.fail["cuvidMapVideoFrame64"] = deque([700])
    with pytest.raises(DriverError, match="cuvidMapVideoFrame64 -> 700"):
        decode_surface(stream, ONE, CPU)


def test_nvdec_decodes_without_pyav(decoder: HevcDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    x = wave(300, 64)
    packet = open_lane("video-cpu").encode(x)
    want = decode_packet(packet)
    monkeypatch.setattr(engines, "_histories", defaultdict(engines._History))

    def missing(*args: object) -> bytes:
        raise LaneUnavailable("software HEVC needs PyAV: pip install av")

    for module, name in ((self_test, "encode_hevc"), (engines, "decode_hevc"), (engines, "hevc_support")):
        monkeypatch.setattr(module, name, missing)
    assert torch.equal(decode_packet(packet), want)
    reason = engines.decoding_engine(0, NV12).reason
    assert reason == "3 engines; not tested: software HEVC needs PyAV: pip install av"


def hostile_packets() -> dict[str, Packet]:
    """Packets with intact checksums whose headers ask for much more than their streams hold."""
    x = wave(300, 64)
    lane = open_lane("video-cpu")
    packet = lane.encode(x)
    stream = packet.section("bitstream")
    side, frame = 2048, 2048 * 2048 * 3 // 2

    def claim(tokens: int, bitstream: Tensor = stream, mapping: str = packet.mapping) -> Packet:
        layout = plan_surface(NV12, mapping, tokens, 64, max_side=side)
        return packet.with_(
            shape=(tokens, 64),
            params=(layout.width, layout.height, layout.frames, side),
            mapping=mapping,
            sections=packet.sections | {"bitstream": bitstream},
        )

    body = stream[: -len(END_OF_BITSTREAM)]
    frames = 10_000
    tokens = frames * frame // 64
    sps = large_sps(claim(tokens))
    slices = bytes([0, 0, 1, 0x26, 1, 0x80]) * frames
    made_up = torch.frombuffer(bytearray(sps + slices + END_OF_BITSTREAM), dtype=torch.uint8)
    return {
        "more tokens": claim(2**20),
        "many frames": claim(tokens),
        "absurdly many frames": claim(2**40),
        "another frame size, enough bytes": claim(2**19, torch.cat([body] * 64 + [stream])),
        "pictures without content": claim(tokens, made_up),
    }


def large_sps(packet: Packet) -> bytes:
    """The parameter sets of a picture of the size that `packet` claims."""
    width, height, _, _ = packet.numbers(4)
    layout = one_frame(NV12, width, height)
    stream = encode_hevc(torch.zeros(layout.shape, dtype=torch.uint8), layout, qp=51)
    return stream[: stream.index(b"\0\0\1\x26") if b"\0\0\1\x26" in stream else stream.index(b"\0\0\1\x28")]


def test_hostile_headers_take_no_surface(decoder: HevcDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities("cuda:0")
    release_engines()
    calls = len(decoder.calls)

    def refuse(*args: object) -> Tensor:
        raise AssertionError("a surface was made")

    monkeypatch.setattr(nvdec, "_new_surface", refuse)
    monkeypatch.setattr(engines, "decode_hevc", refuse)
    for packet in hostile_packets().values():
        with pytest.raises(PacketError) as caught:
            decompress(Packet.from_bytes(packet.to_bytes()))
        assert caught.value.field == "bitstream"
    assert {*decoder.calls[calls:]} <= {"cuvidGetDecoderCaps", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"}


def test_another_stream_inside_the_claimed_size_is_refused_by_the_decoder(decoder: HevcDriver) -> None:
    """What the headers cannot show is found when pictures come out: here there is one too few."""
    layout = one_frame(NV12, 160, 144, frames=2)
    stream = bytearray(encode_hevc(random_surface(layout), layout))
    last = stream.rindex(b"\0\0\1", 0, -len(END_OF_BITSTREAM))
    stream[last + 20 :] = END_OF_BITSTREAM
    with pytest.raises(PacketError, match="bitstream"):
        decode_surface(bytes(stream), layout, CPU)


def test_doctor_says_which_engine_codes_what_and_why(
    driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.set(yuv444=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    finding = doctor._video()
    assert finding.state == "yes"
    lines = finding.detail.splitlines()
    eight = "nv12, p010, nv12_split12: lossless by nvenc (3 engines; the self-test came back exact)"
    assert eight in lines
    assert "yuv444, yuv444_10: QP by software (this GPU does not encode 4:4:4)" in lines
    assert any(line.startswith("all formats: decode by software (libnvcuvid.so.1: ") for line in lines)


@pytest.mark.parametrize("hidden", [False, True])
def test_doctor_tells_a_container_that_hides_gpus_from_a_gpu_without_nvenc(
    driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch, hidden: bool
) -> None:
    hint = "this container sees 1 of the host's 8 GPUs" if hidden else ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for module in (_driver, doctor):
        monkeypatch.setattr(module, "hidden_gpus_hint", lambda: hint)
    driver.fail("nvEncOpenEncodeSessionEx", 2, times=1 << 30)
    finding = doctor._nvenc()
    assert finding.state == "no"
    assert "this GPU has no NVENC (A100, H100, H200, B200 have none)" in finding.detail
    assert ("this container sees 1 of the host's 8 GPUs" in finding.detail) == hidden
    assert finding.remedy.startswith("give the container every" if hidden else "the video lanes encode in")


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
def test_surfaces_come_back_from_the_engines_of_this_gpu(cuda: torch.device, name: str) -> None:
    """By NVENC where the GPU has one, else in software with the driver's own refusal as the reason."""
    able = capabilities(cuda)[name]
    layout = one_frame(FORMATS[name], 320, 256, frames=3)
    source = random_surface(layout)
    stream = encode(source.to(cuda), layout)
    used = layout.width * layout.format.itemsize
    assert torch.equal(decode_surface(stream, layout, cuda)[:, :used].cpu(), source[:, :used])
    assert torch.equal(decode_hevc(stream, layout), source)
    if able.lossless.name == "nvenc":
        assert able.lossless.reason.endswith("the self-test came back exact")
    else:
        assert able.lossless.name == "software"
        with pytest.raises(LaneUnavailable, match="encode in software|libnvidia-encode") as caught:
            Encoder(layout, device=cuda)
        assert "12-bit" in str(caught.value) or able.lossless.reason in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"format": "yuv444_10"}, {"qp": 20}, {"max_side": 144}], ids=str)
@pytest.mark.parametrize("name", ODD)
def test_the_video_lane_on_this_gpu(cuda: torch.device, name: str, options: dict[str, object]) -> None:
    x = ODD[name]().to(cuda)
    lane = open_lane("video", **options)
    software = open_lane("video-cpu", **{"max_side": lane.max_side} | options)
    packet = lane.encode(x)
    want = software.decode(packet)
    assert (want.shape, want.dtype, want.device) == (x.shape, x.dtype, x.device)
    for restored in (lane.decode(packet), software.decode(software.encode(x))):
        assert torch.equal(bits_of(restored), bits_of(want)) and restored.stride() == want.stride()
    if packet.lane != "video":
        assert torch.equal(bits_of(want), bits_of(x))


@pytest.mark.gpu
@pytest.mark.parametrize("max_side", [4096, 144])
@pytest.mark.parametrize("name", FORMATS)
def test_decompress_onto_this_gpu_goes_through_nvdec(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch, name: str, max_side: int
) -> None:
    x = wave(3000, 77)
    x[7] = torch.nan
    packet = compress(x, lane="video-cpu", format=name, max_side=max_side)
    assert packet.device.type == "cpu"
    want = open_lane("video-cpu").decode(packet.to(cuda))
    able = capabilities(cuda)[name].decode
    assert (able.name, able.reason.partition("; ")[2]) == ("nvdec", "the self-test came back exact")
    by_software = decoded_by_software(monkeypatch)
    restored = decompress(Packet.from_bytes(packet.to_bytes()), device=cuda)
    assert by_software == []
    assert torch.equal(bits_of(restored), bits_of(want))
    assert torch.equal(bits_of(restored.cpu()), bits_of(decompress(packet)))


@pytest.mark.gpu
def test_hostile_headers_take_no_memory_of_this_gpu(cuda: torch.device) -> None:
    decompress(open_lane("video-cpu").encode(wave(300, 64)), device=cuda)
    before = torch.cuda.max_memory_allocated(cuda)
    for packet in hostile_packets().values():
        with pytest.raises(PacketError, match="'bitstream'"):
            decompress(packet, device=cuda)
    assert torch.cuda.max_memory_allocated(cuda) - before < 16 << 20


@pytest.mark.gpu
def test_threads_decode_on_this_gpu(cuda: torch.device) -> None:
    lane = open_lane("video-cpu", max_side=256)
    packets = [lane.encode(wave(tokens, 77, tokens)).to(cuda) for tokens in (40, 300, 3000)]
    want = [lane.decode(packet) for packet in packets]

    def decoded(number: int) -> bool:
        with torch.cuda.stream(torch.cuda.Stream(cuda)):
            return torch.equal(decode_packet(packets[number % 3]), want[number % 3])

    torch.cuda.synchronize(cuda)
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(decoded, range(60)))


@pytest.mark.gpu
def test_gradients_through_the_engines_of_this_gpu(cuda: torch.device) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(96, 512), torch.nn.GELU(), torch.nn.Linear(512, 96)).to(cuda)
    x = torch.randn(400, 96, device=cuda)
    gradients = []
    for lane in ("video", "video-cpu"):
        model.zero_grad()
        with offload(lane=lane, format="p010") as context:
            loss = model(x).square().mean()
        loss.backward()
        assert {row.lane for row in context.report().classes} == {"video"}
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == 4
    assert all(map(torch.equal, *gradients))
