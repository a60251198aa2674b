"""A stand-in for libcuda and libnvcuvid: C function pointers with the real signatures, made from Python.

It decodes a toy format (`toy_stream`) and punishes what a driver punishes: a call without a current context
fails, copies happen only when their stream is synchronized, an unmapped frame is overwritten, no more frames
can be mapped than there are output surfaces. `live` holds every handle that was not destroyed.
"""

from __future__ import annotations

import ctypes
import itertools
import struct
import threading
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from sidelane.codec._abi import Abi
from sidelane.layout import SurfaceLayout

_VPS = b"\x00\x00\x01\x40\x01"  # so that the frames of a stream can be found as in HEVC
_UNIT = struct.Struct(f"<{len(_VPS)}sHHBBHIB")  # _VPS, width, height, chroma, bits, cut, bytes, status
GOOD, DAMAGED = 2, 8  # cuvidDecodeStatus
MIN_SIDE, MAX_SIDE = 144, 8192


def toy_stream(
    frames: list[bytes],
    layout: SurfaceLayout,
    *,
    width: int | None = None,
    bits: int | None = None,
    chroma: int | None = None,
    damaged: int | None = None,
    cut: int = 0,
) -> bytes:
    """A stream of raw frames, each `layout.format.rows(height)` rows of `width` samples without pitch.

    Frame number `damaged` is reported so; `cut` samples more than needed are coded to the right.
    """
    fmt = layout.format
    sequence = (
        width or layout.width,
        layout.height,
        chroma or (1 if fmt.subsampled else 3),
        bits or (8 if fmt.itemsize == 1 else fmt.bits),
        cut,
    )
    return b"".join(
        _UNIT.pack(_VPS, *sequence, len(frame), DAMAGED if i == damaged else GOOD) + frame
        for i, frame in enumerate(frames)
    )


class FakeDriver:
    """State of the stand-in. `fail[name]`: statuses the next calls of `name` return; `calls`: all names."""

    def __init__(self) -> None:
        self.live: dict[int, tuple[str, Any]] = {}
        self.calls: list[str] = []
        self.fail: dict[str, deque[int]] = {}
        self.engines = 3
        self.reuse = 0  # which of the free decode surfaces the parser takes: 0 the oldest, -1 the newest
        self._handles = itertools.count(0x1000)
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
        pending = self.live[stream][1]
        while pending:
            source, target, pitches, width, height = pending.pop(0)
            for row in range(height):
                ctypes.memmove(target + row * pitches[1], source + row * pitches[0], width)
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
        self.live[stream][1].append(
            (c.srcDevice, c.dstDevice, (c.srcPitch, c.dstPitch), c.WidthInBytes, c.Height)
        )
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
            outputs=info.ulNumOutputSurfaces,
            mapped={},
        )
        return self._size_decoder(state, info) or self._new("decoder", state, decoder)

    def _size_decoder(self, state: Any, info: Any) -> int:
        state.surfaces = [b""] * info.ulNumDecodeSurfaces
        state.size = (info.ulTargetWidth, info.ulTargetHeight)
        area = info.display_area
        return 0 if state.size == (area.right - area.left, area.bottom - area.top) else 1

    def cuvidReconfigureDecoder(self, decoder: int, pointer: Any) -> int:
        info, state = pointer.contents, self.live[decoder][1]
        if info.ulWidth > state.limit[0] or info.ulHeight > state.limit[1]:
            return 1
        return self._size_decoder(state, info)

    def cuvidDestroyDecoder(self, decoder: int) -> int:
        return self._drop("decoder", decoder)

    def cuvidDecodePicture(self, decoder: int, pointer: Any) -> int:
        picture, state = pointer.contents, self.live[decoder][1]
        if not 0 <= picture.CurrPicIdx < len(state.surfaces):
            return 1
        data = ctypes.string_at(picture.pBitstreamData, picture.nBitstreamDataLen)
        state.surfaces[picture.CurrPicIdx] = data
        return 0

    def cuvidGetDecodeStatus(self, decoder: int, index: int, pointer: Any) -> int:
        pointer.contents.decodeStatus = self.live[decoder][1].surfaces[index][0]
        return 0

    def cuvidMapVideoFrame64(self, decoder: int, index: int, address: Any, pitch: Any, how: Any) -> int:
        state = self.live[decoder][1]
        if len(state.mapped) >= state.outputs:
            return 205
        if self.live[how.contents.output_stream][0] != "stream" or not how.contents.progressive_frame:
            return 1
        data, (width, height) = state.surfaces[index][1:], state.size
        row = width * state.itemsize
        pitch[0] = -(-row // 512) * 512
        rows = height * 3 if state.rows3 else height * 3 // 2
        padded = b"".join(data[r * row : (r + 1) * row].ljust(pitch[0], b"\xdd") for r in range(rows))
        buffer = ctypes.create_string_buffer(padded, len(padded))
        address[0] = ctypes.addressof(buffer)
        state.mapped[address[0]] = buffer
        return 0

    def cuvidUnmapVideoFrame64(self, decoder: int, address: int) -> int:
        buffer = self.live[decoder][1].mapped.pop(address)
        ctypes.memset(buffer, 0xEE, len(buffer))
        return 0

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
            self._play(state.params, state.data)
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

        while len(data) >= _UNIT.size:
            _, *found, size, _ = _UNIT.unpack_from(data)
            if len(data) < _UNIT.size + size:
                break
            if sequence != tuple(found):
                sequence = tuple(found)
                surfaces = on_sequence(None, ctypes.byref(self._sequence(abi, *sequence)))
                if surfaces < 2:
                    return
                free = list(range(surfaces))
            # The status byte and the samples are what the "hardware" gets.
            buffer = ctypes.create_string_buffer(data[_UNIT.size - 1 : _UNIT.size + size], size + 1)
            picture = abi.struct("CUVIDPICPARAMS")(
                CurrPicIdx=free.pop(self.reuse),
                nBitstreamDataLen=size + 1,
                pBitstreamData=ctypes.addressof(buffer),
            )
            if not on_decode(None, ctypes.byref(picture)):
                return
            shown.append(picture.CurrPicIdx)
            while len(shown) > params.ulMaxDisplayDelay:
                show()
            data = data[_UNIT.size + size :]
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
