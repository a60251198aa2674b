"""A pool of decoders against a stand-in for the driver."""

from __future__ import annotations

import gc
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fake_nvdec import FakeDriver, installed
from sidelane.codec.nvdec import NvDecoderPool
from sidelane.errors import DriverError, LaneError, PacketError
from sidelane.layout import NV12, P010
from toy_hevc import frames_of, layout_of, samples, toy_stream


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    with installed(FakeDriver(), monkeypatch) as fake:
        yield fake


def test_a_pool_keeps_the_order(driver: FakeDriver) -> None:
    layouts = [layout_of(NV12, 144 + 16 * (i % 5), frames=1 + i % 3) for i in range(20)]
    jobs = [(toy_stream(frames_of(samples(x, i), x), x), x) for i, x in enumerate(layouts)]
    with NvDecoderPool("cuda:0") as pool:
        assert pool.engines == driver.engines
        for i, (got, layout) in enumerate(zip(pool.decode(jobs), layouts, strict=True)):
            assert torch.equal(got[:, : layout.width], samples(layout, i)[:, : layout.width])
    assert driver.kinds() == []


@pytest.mark.parametrize("frames", [1, 2, 3, 7])
def test_a_pool_spreads_the_frames_of_a_surface(driver: FakeDriver, frames: int) -> None:
    layout = layout_of(P010, frames=frames)
    want = samples(layout)
    stream = toy_stream(frames_of(want, layout), layout)
    with NvDecoderPool("cuda:0") as pool:
        got = pool.decode_surface(stream, layout)
        assert torch.equal(got[:, :320], want[:, :320])
        assert driver.calls.count("cuStreamWaitEvent") == min(frames, pool.engines)  # once for each piece
        tensor = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
        assert torch.equal(pool.decode_surface(tensor, layout)[:, :320], want[:, :320])
        with pytest.raises(PacketError, match=r"\d of \d frames were decoded"):
            pool.decode_surface(stream, layout_of(P010, frames=frames + 1))
        with pytest.raises(PacketError, match="the stream is damaged"):
            pool.decode_surface(stream[:-1], layout)


@pytest.mark.parametrize("changes", [{"slices": 2}, {"sei": 0}, {"sei": 5}, {"long": False}])
def test_a_pool_decodes_a_surface_of_other_encoders(driver: FakeDriver, changes: dict[str, Any]) -> None:
    layout = layout_of(NV12, frames=8)
    want = samples(layout)
    with NvDecoderPool("cuda:0") as pool:
        got = pool.decode_surface(toy_stream(frames_of(want, layout), layout, **changes), layout)
    assert torch.equal(got[:, :160], want[:, :160])


def test_a_pool_survives_a_bad_stream(driver: FakeDriver) -> None:
    layout = layout_of(NV12)
    good = toy_stream(frames_of(samples(layout), layout), layout)
    bad = toy_stream(frames_of(samples(layout), layout), layout, width=176)
    with NvDecoderPool("cuda:0", engines=2) as pool:
        results = [pool.submit(bad if i % 3 == 0 else good, layout) for i in range(12)]
        for i, result in enumerate(results):
            if i % 3 == 0:
                with pytest.raises(PacketError, match="176x144"):
                    result.result()
            else:
                assert torch.equal(result.result()[:, :160], samples(layout)[:, :160])
        surfaces = pool.decode([(good, layout), (bad, layout), (good, layout)])
        next(surfaces)
        with pytest.raises(PacketError):
            next(surfaces)


def test_a_wrong_job_raises_at_its_place(driver: FakeDriver) -> None:
    layout = layout_of(NV12)
    stream = toy_stream(frames_of(samples(layout), layout), layout)
    wrong = torch.zeros(8, dtype=torch.int8)
    with NvDecoderPool("cuda:0", engines=2) as pool:
        for place in (0, 1, 3, 4, 5, 7):
            surfaces = pool.decode([(stream, layout)] * place + [(wrong, layout), (stream, layout)])
            for _ in range(place):
                assert torch.equal(next(surfaces)[:, :160], samples(layout)[:, :160])
            with pytest.raises(LaneError, match="the stream is torch.int8"):
                deque(surfaces)


def test_a_pool_keeps_no_surface(driver: FakeDriver) -> None:
    layout = layout_of(NV12)
    stream = toy_stream(frames_of(samples(layout), layout), layout)
    with NvDecoderPool("cuda:0", engines=2) as pool:
        surfaces = pool.decode([(stream, layout)] * 4)
        seen = [weakref.ref(surface) for surface in surfaces]
        gc.collect()
        assert [surface() for surface in seen] == [None] * 4


def test_a_pool_replaces_a_broken_decoder(driver: FakeDriver) -> None:
    layout = layout_of(NV12)
    stream = toy_stream(frames_of(samples(layout), layout), layout)
    driver.fail["cuvidDecodePicture"] = deque([0, 999, 0, 999, 999, 0])
    with NvDecoderPool("cuda:0", engines=1) as pool:
        assert torch.equal(pool.submit(stream, layout).result()[:, :160], samples(layout)[:, :160])
        assert torch.equal(pool.submit(stream, layout).result()[:, :160], samples(layout)[:, :160])
        with pytest.raises(DriverError):
            pool.submit(stream, layout).result()
        assert torch.equal(pool.submit(stream, layout).result()[:, :160], samples(layout)[:, :160])
        driver.fail["cuvidDecodePicture"] = deque([719, 0])
        with pytest.raises(DriverError, match="719.*restart the process"):
            pool.submit(stream, layout).result()


def test_a_pool_closes_once(driver: FakeDriver) -> None:
    layout = layout_of(NV12)
    pool = NvDecoderPool("cuda:0", engines=1)
    pool.close()
    pool.close()
    with pytest.raises(LaneError, match="closed"):
        pool.submit(b"", layout)
    with pytest.raises(LaneError, match="at least 1"):
        NvDecoderPool("cuda:0", engines=0)
