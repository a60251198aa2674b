"""A stand-in for libcuda and libnvcuvid: C function pointers with the real signatures, made from Python.

It decodes a toy format (`toy_stream`) and punishes what a driver punishes: a call without a current context
fails, frames are written and copied only when their stream is synchronized and in its order, the output
surfaces of a decoder that is resized or destroyed are overwritten at once, no more frames can be mapped than
there are output surfaces. `live` holds every handle that was not destroyed.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sidelane.codec import _driver
from sidelane.codec._abi import CUVID_VERSION, Abi, load
from sidelane.codec.nvdec import release_idle_decoders
from toy_hevc import DAMAGED as DAMAGED
from toy_hevc import GOOD as GOOD
from toy_hevc import SEQUENCE, SLICE, START, VPS, payload_of, picture_of
from toy_hevc import toy_stream as toy_stream

MIN_SIDE, MAX_SIDE = 144, 8192


@contextmanager
def installed(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """Put `fake` in the place of the driver, with host memory for device memory; no handle may be left."""
    names = ("cuda", f"cuvid-{CUVID_VERSION}")
    libraries = {name: _driver.Library(load(name), open=partial(fake.open, load(name))) for name in names}
    monkeypatch.setattr(_driver, "_libraries", libraries)
    monkeypatch.setattr(_driver, "_contexts", {})
    monkeypatch.setattr(_driver, "torch_device", lambda index: torch.device("cpu"))
    monkeypatch.setattr(_driver, "current_stream", lambda index: 0)
    yield fake
    release_idle_decoders()
    gc.collect()
    assert fake.kinds() == []
    assert fake.stack == []


class FakeDriver:
    """State of the stand-in. `fail[name]`: statuses the next calls of `name` return; `calls`: all names."""

    def __init__(self) -> None:
        self.live: dict[int, tuple[str, Any]] = {}
        self.calls: list[str] = []
        self.fail: dict[str, deque[int]] = {}
        self.engines = 3
        self.reuse = 0  # which of the free decode surfaces the parser takes: 0 the oldest, -1 the newest
        self._handles = itertools.count(0x1000)
        self._released: list[Any] = []  # memory of output surfaces that are gone
        self._stacks = threading.local()
        self._abi: dict[str, Abi] = {}

    def open(self, abi: Abi, soname: str) -> Any:
        """The library of `abi`, as `Library` expects it from dlopen."""
        self._abi[soname] = abi
        return SimpleNamespace(
            **{name: self._export(abi, name) for name in dir(self) if name.startswith("cu")}
        )

    def _export(self, abi: Abi, name: str) -> Any:
        if name not in abi._section("functions"):
            return None
        work: Callable[..., int] = getattr(self, name)
        needs_context = name.startswith("cuvid") or name in ("cuMemcpy2DAsync_v2", "cuStreamCreate")

        def function(*args: Any) -> int:
            self.calls.append(name)
            if self.fail.get(name) and (status := self.fail[name].popleft()):
                return status
            if needs_context and not self.stack:
                return 201
            return work(*args)

        return abi.prototype(name)(function)  # type: ignore[arg-type]

    @property
    def stack(self) -> list[int]:
        """Contexts pushed on the calling thread."""
        if not hasattr(self._stacks, "contexts"):
            self._stacks.contexts = []
        stack: list[int] = self._stacks.contexts
        return stack

    def kinds(self) -> list[str]:
        """Kinds of live handles, sorted."""
        return sorted(kind for kind, _ in self.live.values())

    def _new(self, kind: str, state: Any, out: Any) -> int:
        handle = next(self._handles)
        self.live[handle] = (kind, state)
        out[0] = handle
        return 0

    def _drop(self, kind: str, handle: int) -> int:
        if self.live.get(handle, ("",))[0] != kind:
            return 400
        del self.live[handle]
        return 0

    # libcuda

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        device[0] = ordinal
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> int:
        context[0] = 0xC0 + device
        return 0

    def cuCtxPushCurrent_v2(self, context: int) -> int:
        self.stack.append(context)
        return 0

    def cuCtxPopCurrent_v2(self, context: Any) -> int:
        context[0] = self.stack.pop()
        return 0

    def cuGetErrorName(self, status: int, name: Any) -> int:
        name[0] = f"CUDA_ERROR_{status}".encode()
        return 0

    def cuStreamCreate(self, stream: Any, flags: int) -> int:
        return self._new("stream", [], stream)

    def cuStreamDestroy_v2(self, stream: int) -> int:
        return self._drop("stream", stream)

    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> int:
        return 0 if self.live[event][0] == "event" else 400

    def cuStreamSynchronize(self, stream: int) -> int:
        pending: list[Callable[[], None]] = self.live[stream][1]
        while pending:
            pending.pop(0)()
        return 0

    def cuEventCreate(self, event: Any, flags: int) -> int:
        return self._new("event", None, event)

    def cuEventRecord(self, event: int, stream: int | None) -> int:
        return 0

    def cuEventDestroy_v2(self, event: int) -> int:
        return self._drop("event", event)

    def cuMemcpy2DAsync_v2(self, pointer: Any, stream: int) -> int:
        c = pointer.contents
        if (c.srcMemoryType, c.dstMemoryType) != (2, 2) or c.WidthInBytes > min(c.srcPitch, c.dstPitch):
            return 1
        source, target, pitches = c.srcDevice, c.dstDevice, (c.srcPitch, c.dstPitch)
        width, height = c.WidthInBytes, c.Height

        def copy() -> None:
            for row in range(height):
                ctypes.memmove(target + row * pitches[1], source + row * pitches[0], width)

        self.live[stream][1].append(copy)
        return 0

    # libnvcuvid

    def cuvidGetDecoderCaps(self, pointer: Any) -> int:
        caps = pointer.contents
        caps.bIsSupported = caps.eCodecType == 8 and caps.nBitDepthMinus8 in (0, 2, 4)
        if caps.bIsSupported:
            caps.nNumNVDECs, caps.nOutputFormatMask = self.engines, 0b1111
            caps.nMinWidth = caps.nMinHeight = MIN_SIDE
            caps.nMaxWidth = caps.nMaxHeight = MAX_SIDE
            caps.nMaxMBCount = (MAX_SIDE // 16) ** 2
        return 0

    def cuvidCreateDecoder(self, decoder: Any, pointer: Any) -> int:
        info = pointer.contents
        if info.ulWidth > info.ulMaxWidth or info.ulHeight > info.ulMaxHeight or not info.ulNumOutputSurfaces:
            return 1
        state = SimpleNamespace(
            limit=(info.ulMaxWidth, info.ulMaxHeight),
            itemsize=2 if info.bitDepthMinus8 else 1,
            rows3=info.ChromaFormat == 3,
            outputs=[ctypes.create_string_buffer(0)] * info.ulNumOutputSurfaces,
            mapped={},  # number of the output surface by address
        )
        return self._size_decoder(state, info) or self._new("decoder", state, decoder)

    def _size_decoder(self, state: Any, info: Any) -> int:
        self._release_outputs(state)
        state.surfaces = [b""] * info.ulNumDecodeSurfaces
        state.size = width, height = info.ulTargetWidth, info.ulTargetHeight
        state.pitch = -(-width * state.itemsize // 512) * 512
        state.rows = height * 3 if state.rows3 else height * 3 // 2
        state.outputs = [ctypes.create_string_buffer(state.pitch * state.rows) for _ in state.outputs]
        area = info.display_area
        return 0 if state.size == (area.right - area.left, area.bottom - area.top) else 1

    def _release_outputs(self, state: Any) -> None:
        for buffer in state.outputs:
            ctypes.memset(buffer, 0xEE, len(buffer))
        self._released += state.outputs  # copies that wait may still read them

    def cuvidReconfigureDecoder(self, decoder: int, pointer: Any) -> int:
        info, state = pointer.contents, self.live[decoder][1]
        if info.ulWidth > state.limit[0] or info.ulHeight > state.limit[1]:
            return 1
        return self._size_decoder(state, info)

    def cuvidDestroyDecoder(self, decoder: int) -> int:
        self._release_outputs(self.live[decoder][1])
        return self._drop("decoder", decoder)

    def cuvidDecodePicture(self, decoder: int, pointer: Any) -> int:
        picture, state = pointer.contents, self.live[decoder][1]
        if not 0 <= picture.CurrPicIdx < len(state.surfaces):
            return 1
        data = ctypes.string_at(picture.pBitstreamData, picture.nBitstreamDataLen)
        if data.startswith(START + SLICE):
            offsets = (ctypes.c_uint32 * picture.nNumSlices).from_address(picture.pSliceDataOffsets)
            if list(offsets) != [found.start() for found in re.finditer(START, data)]:
                return 1
            data = picture_of(data)
        state.surfaces[picture.CurrPicIdx] = data
        return 0

    def cuvidGetDecodeStatus(self, decoder: int, index: int, pointer: Any) -> int:
        pointer.contents.decodeStatus = self.live[decoder][1].surfaces[index][0]
        return 0

    def cuvidMapVideoFrame64(self, decoder: int, index: int, address: Any, pitch: Any, how: Any) -> int:
        state = self.live[decoder][1]
        free = [number for number in range(len(state.outputs)) if number not in state.mapped.values()]
        if not free:
            return 205
        kind, pending = self.live[how.contents.output_stream]
        if kind != "stream" or not how.contents.progressive_frame:
            return 1
        buffer, row = state.outputs[free[0]], state.size[0] * state.itemsize
        data = state.surfaces[index][1:]
        lines = [data[r * row : (r + 1) * row].ljust(state.pitch, b"\xdd") for r in range(state.rows)]
        pending.append(partial(ctypes.memmove, buffer, b"".join(lines), len(buffer)))
        pitch[0] = state.pitch
        address[0] = ctypes.addressof(buffer)
        state.mapped[address[0]] = free[0]
        return 0

    def cuvidUnmapVideoFrame64(self, decoder: int, address: int) -> int:
        return 1 if self.live[decoder][1].mapped.pop(address, None) is None else 0

    def cuvidCreateVideoParser(self, parser: Any, pointer: Any) -> int:
        params = type(pointer.contents).from_buffer_copy(pointer.contents)
        return self._new("parser", SimpleNamespace(params=params, data=b""), parser)

    def cuvidDestroyVideoParser(self, parser: int) -> int:
        return self._drop("parser", parser)

    def cuvidParseVideoData(self, parser: int, pointer: Any) -> int:
        packet, state = pointer.contents, self.live[parser][1]
        if packet.payload_size:
            state.data += ctypes.string_at(packet.payload, packet.payload_size)
        if packet.flags & 1:
            data, state.data = state.data, b""
            self._play(state.params, data)
        return 0

    def _play(self, params: Any, data: bytes) -> None:
        """Call back for the sequence and every picture, displaying `ulMaxDisplayDelay` pictures late."""
        abi = self._abi["libnvcuvid.so.1"]
        on_sequence = abi.callback("PFNVIDSEQUENCECALLBACK")(params.pfnSequenceCallback)
        on_decode = abi.callback("PFNVIDDECODECALLBACK")(params.pfnDecodePicture)
        on_display = abi.callback("PFNVIDDISPLAYCALLBACK")(params.pfnDisplayPicture)
        shown: deque[int] = deque()
        free: list[int] = []
        sequence: tuple[int, ...] = ()

        def show() -> None:
            index = shown.popleft()
            on_display(None, ctypes.byref(abi.struct("CUVIDPARSERDISPINFO")(picture_index=index)))
            free.append(index)

        units = [unit.rstrip(b"\x00") for unit in data.split(START)[1:]]
        while units:
            unit = units.pop(0)
            if unit.startswith(VPS) and len(payload := payload_of(unit)) == SEQUENCE.size:
                changed, sequence = sequence != SEQUENCE.unpack(payload), SEQUENCE.unpack(payload)
                if changed:
                    surfaces = on_sequence(None, ctypes.byref(self._sequence(abi, *sequence)))
                    if surfaces < 2:
                        return
                    free = list(range(surfaces))
            if not unit.startswith(SLICE) or not sequence:
                continue
            slices = [START + unit]
            while units and units[0].startswith(SLICE):
                slices.append(START + units.pop(0))
            coded, starts = b"".join(slices), itertools.accumulate(map(len, slices[:-1]), initial=0)
            buffer = ctypes.create_string_buffer(coded, len(coded))
            offsets = (ctypes.c_uint32 * len(slices))(*starts)
            picture = abi.struct("CUVIDPICPARAMS")(
                CurrPicIdx=free.pop(self.reuse),
                nBitstreamDataLen=len(coded),
                pBitstreamData=ctypes.addressof(buffer),
                nNumSlices=len(slices),
                pSliceDataOffsets=ctypes.addressof(offsets),
            )
            if not on_decode(None, ctypes.byref(picture)):
                return
            ctypes.memset(buffer, 0xEE, len(coded))
            shown.append(picture.CurrPicIdx)
            while len(shown) > params.ulMaxDisplayDelay:
                show()
        while shown:
            show()

    def _sequence(self, abi: Abi, width: int, height: int, chroma: int, bits: int, cut: int) -> Any:
        sequence = abi.struct("CUVIDEOFORMAT")(
            codec=8,
            coded_width=-(-width // 8) * 8 + cut,
            coded_height=-(-height // 8) * 8,
            chroma_format=chroma,
            bit_depth_luma_minus8=bits - 8,
            bit_depth_chroma_minus8=bits - 8,
            min_num_decode_surfaces=1,
        )
        sequence.display_area.right, sequence.display_area.bottom = width, height
        return sequence
