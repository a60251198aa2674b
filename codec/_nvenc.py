"""One NVENC session: each call it needs, checked, with the context of its device current.

A session is used by one thread at a time, except for `collect`, which one other thread may call meanwhile.
"""

from __future__ import annotations

import ctypes
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sidelane.codec import _driver
from sidelane.codec._abi import NVENC_VERSIONS
from sidelane.codec._driver import CUDA_DEINITIALIZED, Nvenc, Stream, cuda
from sidelane.codec._nvenc_config import Coding, EncoderCaps, buffer_format, configure, set_constant_qp
from sidelane.errors import DriverError, LaneUnavailable

NO_ENCODER = (1, 2)  # NO_ENCODE_DEVICE, UNSUPPORTED_DEVICE
NO_SESSION_LEFT = (10, 21)  # when opening: OUT_OF_MEMORY, and INCOMPATIBLE_CLIENT_KEY of older drivers
NOT_OFFERED = (12, 22)  # when initializing: UNSUPPORTED_PARAM, UNIMPLEMENTED
INVALID_PARAM, LOCK_BUSY, NOT_ENOUGH_BUFFER, INVALID_VERSION, ENCODER_BUSY = 8, 13, 14, 15, 18

OPEN_WAITS = (0.1, 0.2, 0.4)  # seconds; a session closed elsewhere is not free at once
BUSY_WAITS = tuple(min(0.0005 * 2**n, 0.1) for n in range(16))  # seconds, one in all

_MAX_HEADERS = 1 << 16  # bytes


class Memory:
    """Device memory from cuMemAlloc, which every driver registers; lives as long as its views."""

    def __init__(self, index: int, nbytes: int) -> None:
        self.index, self.nbytes = index, nbytes
        address = ctypes.c_uint64()
        with _driver.bound(index):
            cuda().call("cuMemAlloc_v2", ctypes.byref(address), nbytes)
        self.address = address.value
        weakref.finalize(self, _free, index, self.address)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}


def _free(index: int, address: int) -> None:
    with _driver_may_be_gone(), _driver.bound(index):
        cuda().call("cuMemFree_v2", address)


@contextmanager
def _driver_may_be_gone() -> Iterator[None]:
    """Forgives CUDA that was shut down, which at interpreter exit may happen first and frees everything."""
    try:
        yield
    except DriverError as error:
        if error.status != CUDA_DEINITIALIZED or not error.call.startswith("cu"):
            raise


def view(memory: Memory) -> Tensor:
    """The bytes of `memory`, uint8 [nbytes]."""
    return torch.as_tensor(memory, device=_driver.torch_device(memory.index))


def open_session(index: int, make_room: Callable[[], None] = lambda: None) -> Session:
    """Open a session on device `index`; after a refusal for lack of sessions, `make_room` and try again.

    Raises LaneUnavailable if the GPU has no encoder or all sessions stay taken, DriverError.
    """
    for wait in (*OPEN_WAITS, None):
        try:
            return Session(index)
        except DriverError as error:
            refusal = error
        if refusal.status in NO_ENCODER and refusal.call.startswith(("nvEnc", "NvEnc")):
            raise LaneUnavailable(f"{refusal}; encode in software") from refusal
        if refusal.call != "nvEncOpenEncodeSessionEx" or refusal.status not in NO_SESSION_LEFT:
            raise refusal
        make_room()
        if wait is not None:
            time.sleep(wait)
    raise LaneUnavailable(f"{refusal}; close other encoders or encode in software") from refusal


class Session:
    """An open encode session and every handle made in it; `close` gives them back in the right order."""

    def __init__(self, index: int) -> None:
        """Opens with the newest API version that the driver takes."""
        self.index = index
        self._maps: dict[int, int | None] = {}  # registered resource -> its mapping
        self._memories: set[Memory] = set()
        self._outputs: list[int] = []
        self._initialized = False
        self._stream: Stream | None = None
        for version in NVENC_VERSIONS[NVENC_VERSIONS.index(_driver.nvenc_version()) :]:
            try:
                self._nvenc = Nvenc(version)
                with _driver.bound(index):
                    self._encoder = self._nvenc.open_session(_driver.primary_context(index))
                break
            except DriverError as error:
                if error.status != INVALID_VERSION or version == NVENC_VERSIONS[-1]:
                    raise
        self.abi = self._nvenc.abi
        self._codec = self.abi.guid("NV_ENC_CODEC_HEVC_GUID")

    @property
    def stream(self) -> Stream:
        """The stream the encoder reads its inputs on."""
        if self._stream is None:
            raise DriverError("nvEncSetIOCudaStreams", 11, "NV_ENC_ERR_ENCODER_NOT_INITIALIZED")
        return self._stream

    def caps(self) -> EncoderCaps:
        """Ask what this GPU can do."""
        count = ctypes.c_uint32()
        self._call("nvEncGetEncodeGUIDCount", ctypes.byref(count))
        guids = (self.abi.struct("GUID") * count.value)()
        self._call("nvEncGetEncodeGUIDs", guids, count, ctypes.byref(count))
        if bytes(self._codec) not in [bytes(guid) for guid in guids[: count.value]]:
            return EncoderCaps(0, 0, 0, 0, 0, 0, False, False, False)
        return EncoderCaps(
            max(self._cap("NUM_ENCODER_ENGINES"), 1),
            self._cap("WIDTH_MIN"),
            self._cap("HEIGHT_MIN"),
            self._cap("WIDTH_MAX"),
            self._cap("HEIGHT_MAX"),
            self._cap("MB_NUM_MAX"),
            bool(self._cap("SUPPORT_YUV444_ENCODE")),
            bool(self._cap("SUPPORT_10BIT_ENCODE")),
            bool(self._cap("SUPPORT_LOSSLESS_ENCODE")),
        )

    def _cap(self, name: str) -> int:
        query = self.abi.struct("NV_ENC_CAPS_PARAM")(capsToQuery=self.abi.number(f"NV_ENC_CAPS_{name}"))
        value = ctypes.c_int32()
        try:
            self._call("nvEncGetEncodeCaps", self._codec, ctypes.byref(query), ctypes.byref(value))
        except DriverError as error:
            if error.status != INVALID_PARAM:  # a driver that does not know the question cannot do it
                raise
            return 0
        return value.value

    def initialize(self, coding: Coding) -> None:
        """Configure the session for `coding` and give it a stream of its own."""
        abi, self.coding = self.abi, coding
        tuning = abi.number(f"NV_ENC_TUNING_INFO_{'LOSSLESS' if coding.qp is None else 'LOW_LATENCY'}")
        preset = abi.guid(f"NV_ENC_PRESET_P{coding.preset}_GUID")
        defaults = abi.struct("NV_ENC_PRESET_CONFIG")()
        self._call("nvEncGetEncodePresetConfigEx", self._codec, preset, tuning, ctypes.byref(defaults))
        self._config = defaults.presetCfg
        configure(abi, self._config, coding)
        self._params = abi.struct("NV_ENC_INITIALIZE_PARAMS")(
            encodeGUID=self._codec,
            presetGUID=preset,
            tuningInfo=tuning,
            encodeWidth=coding.width,
            encodeHeight=coding.height,
            darWidth=coding.width,
            darHeight=coding.height,
            maxEncodeWidth=coding.width,
            maxEncodeHeight=coding.height,
            frameRateNum=25,
            frameRateDen=1,
            enablePTD=1,
            encodeConfig=ctypes.addressof(self._config),
        )
        if hasattr(type(self._params), "splitEncodeMode"):  # from 12.1 on; a frame stays on one engine
            self._params.splitEncodeMode = abi.number("NV_ENC_SPLIT_DISABLE_MODE")
        self._call("nvEncInitializeEncoder", ctypes.byref(self._params))
        self._initialized = True
        with _driver.bound(self.index):
            self._stream = Stream()
        # The driver is given the addresses of the handles and may read them again: the cells stay.
        self._stream_cells = (ctypes.c_void_p * 2)(self._stream.handle, self._stream.handle)
        cells = ctypes.addressof(self._stream_cells)
        self._call("nvEncSetIOCudaStreams", cells, cells + ctypes.sizeof(ctypes.c_void_p))

    def set_qp(self, qp: int) -> None:
        """Code later pictures with constant `qp`."""
        set_constant_qp(self._config, qp)
        change = self.abi.struct("NV_ENC_RECONFIGURE_PARAMS")(forceIDR=1)
        change.reInitEncodeParams = self._params
        self._call("nvEncReconfigureEncoder", ctypes.byref(change))

    def headers(self) -> bytes:
        """VPS, SPS and PPS of the pictures submitted from now on."""
        size = self.abi.number("NV_MAX_SEQ_HDR_LEN")
        while True:
            buffer, used = ctypes.create_string_buffer(size), ctypes.c_uint32()
            payload = self.abi.struct("NV_ENC_SEQUENCE_PARAM_PAYLOAD")(
                inBufferSize=size,
                spsppsBuffer=ctypes.addressof(buffer),
                outSPSPPSPayloadSize=ctypes.addressof(used),
            )
            try:
                self._call("nvEncGetSequenceParams", ctypes.byref(payload))
                return buffer.raw[: used.value]
            except DriverError as error:
                if error.status != NOT_ENOUGH_BUFFER or size >= _MAX_HEADERS:
                    raise
            size *= 2

    def register(self, memory: Memory, offset: int, pitch: int) -> int:
        """Register the frame at `offset` of `memory`, rows `pitch` apart, both in bytes.

        Returns the registered resource; the session keeps the memory until it is closed.
        """
        resource = self.abi.struct("NV_ENC_REGISTER_RESOURCE")(
            resourceType=self.abi.number("NV_ENC_INPUT_RESOURCE_TYPE_CUDADEVICEPTR"),
            width=self.coding.width,
            height=self.coding.height,
            pitch=pitch,
            resourceToRegister=memory.address + offset,
            bufferFormat=self._buffer_format,
            bufferUsage=self.abi.number("NV_ENC_INPUT_IMAGE"),
        )
        self._call("nvEncRegisterResource", ctypes.byref(resource))
        self._maps[resource.registeredResource] = None
        self._memories.add(memory)
        return int(resource.registeredResource)

    def map(self, registered: int) -> int:
        """Hand a registered frame over to the encoder. Returns the mapped resource."""
        how = self.abi.struct("NV_ENC_MAP_INPUT_RESOURCE")(registeredResource=registered)
        self._call("nvEncMapInputResource", ctypes.byref(how))
        self._maps[registered] = how.mappedResource
        return int(how.mappedResource)

    def unmap(self, registered: int) -> None:
        """Take a frame back from the encoder, if it has it; its picture must have been collected."""
        mapped = self._maps[registered]
        if mapped is not None:
            self._maps[registered] = None
            self._call("nvEncUnmapInputResource", mapped)

    def create_output(self) -> int:
        """A bitstream buffer, for one picture at a time."""
        created = self.abi.struct("NV_ENC_CREATE_BITSTREAM_BUFFER")()
        self._call("nvEncCreateBitstreamBuffer", ctypes.byref(created))
        self._outputs.append(created.bitstreamBuffer)
        return int(created.bitstreamBuffer)

    def encode(self, mapped: int, pitch: int, output: int, stamp: int, qp_map: Any = None) -> None:
        """Submit a picture; waits up to a second for a busy engine.

        Args:
            stamp: number by which `collect` recognizes the picture.
            qp_map: ctypes array of int8, one QP difference per CTB in raster order; kept until collected.
        """
        picture = self.abi.struct("NV_ENC_PIC_PARAMS")(
            inputWidth=self.coding.width,
            inputHeight=self.coding.height,
            inputPitch=pitch,
            encodePicFlags=self.abi.number("NV_ENC_PIC_FLAG_FORCEIDR"),
            frameIdx=stamp & 0xFFFFFFFF,
            inputTimeStamp=stamp,
            inputBuffer=mapped,
            outputBitstream=output,
            bufferFmt=self._buffer_format,
            pictureStruct=self.abi.number("NV_ENC_PIC_STRUCT_FRAME"),
        )
        if qp_map is not None:
            picture.qpDeltaMap, picture.qpDeltaMapSize = ctypes.addressof(qp_map), len(qp_map)
        _while_busy(ENCODER_BUSY, lambda: self._call("nvEncEncodePicture", ctypes.byref(picture)))

    def collect(self, output: int, stamp: int) -> bytes:
        """Wait for the picture in `output` and copy its bytes; pictures are collected as they were submitted.

        Raises DriverError, also for a picture other than `stamp`.
        """
        lock = self.abi.struct("NV_ENC_LOCK_BITSTREAM")(outputBitstream=output)
        _while_busy(LOCK_BUSY, lambda: self._call("nvEncLockBitstream", ctypes.byref(lock)))
        try:
            data = ctypes.string_at(lock.bitstreamBufferPtr, lock.bitstreamSizeInBytes)
        finally:
            self._call("nvEncUnlockBitstream", output)
        if lock.outputTimeStamp != stamp:
            problem = f"picture {lock.outputTimeStamp} came out where {stamp} was due"
            raise DriverError("nvEncLockBitstream", 0, "NV_ENC_SUCCESS", problem)
        return data

    def close(self) -> None:
        """Give everything back, whatever fails; raises the first DriverError at the end. Idempotent."""
        if not self._encoder:
            return
        steps: list[Callable[[], None]] = [self._end] if self._initialized else []
        for call, handles in (
            ("nvEncUnmapInputResource", [mapped for mapped in self._maps.values() if mapped is not None]),
            ("nvEncUnregisterResource", [*self._maps]),
            ("nvEncDestroyBitstreamBuffer", self._outputs),
        ):
            steps += [partial(self._call, call, handle) for handle in handles]
        steps += [partial(self._call, "nvEncDestroyEncoder"), self._close_stream]
        errors = []
        for step in steps:
            try:
                with _driver_may_be_gone():
                    step()
            except DriverError as error:
                errors.append(error)
        self._encoder = ctypes.c_void_p()
        self._maps, self._outputs, self._memories = {}, [], set()
        if errors:
            raise errors[0]

    def _end(self) -> None:
        """Tell the encoder that no picture follows."""
        flag = self.abi.number("NV_ENC_PIC_FLAG_EOS")
        picture = self.abi.struct("NV_ENC_PIC_PARAMS")(encodePicFlags=flag)
        _while_busy(ENCODER_BUSY, lambda: self._call("nvEncEncodePicture", ctypes.byref(picture)))

    def _close_stream(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            with _driver.bound(self.index):
                stream.close()

    @property
    def _buffer_format(self) -> int:
        return self.abi.number(buffer_format(self.coding.format) or "")

    def _call(self, name: str, *args: Any) -> None:
        with _driver.bound(self.index):
            self._nvenc.call(name, self._encoder, *args)


def _while_busy(status: int, call: Callable[[], None]) -> None:
    """Repeat `call` while it fails with `status`, at most about a second."""
    for wait in BUSY_WAITS:
        try:
            return call()
        except DriverError as error:
            if error.status != status:
                raise
        time.sleep(wait)
    return call()
