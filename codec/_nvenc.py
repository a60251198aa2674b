"""One NVENC session: each call it needs, checked, with the context of its device current.

A session is used by one thread at a time, except for `collect` and `unmap` of an output, which one other
thread may call meanwhile.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from sidelane.codec import _driver
from sidelane.codec._abi import NVENC_VERSIONS
from sidelane.codec._driver import Nvenc, Stream
from sidelane.codec._nvenc_config import Coding, EncoderCaps, buffer_format, configure, set_constant_qp
from sidelane.codec._nvenc_memory import DevicePlace, HostPlace, driver_may_be_gone
from sidelane.codec._nvenc_memory import Memory as Memory
from sidelane.codec._nvenc_memory import view as view
from sidelane.errors import DriverError, LaneUnavailable

NO_ENCODER = (1, 2)  # NO_ENCODE_DEVICE, UNSUPPORTED_DEVICE
NO_SESSION_LEFT = (10, 21)  # when opening: OUT_OF_MEMORY, and INCOMPATIBLE_CLIENT_KEY of older drivers
NOT_OFFERED = (12, 22)  # when initializing: UNSUPPORTED_PARAM, UNIMPLEMENTED
INVALID_PARAM, LOCK_BUSY, NOT_ENOUGH_BUFFER, INVALID_VERSION, ENCODER_BUSY = 8, 13, 14, 15, 18

OPEN_WAITS = (0.1, 0.2, 0.4)  # seconds; a session closed elsewhere is not free at once
BUSY_WAITS = tuple(min(0.0005 * 2**n, 0.1) for n in range(16))  # seconds, one in all

_MAX_HEADERS = 1 << 16  # bytes


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
        self._maps: dict[int, int | None] = {}  # registered resource -> its mapping; latest mapping last
        self._device_outputs: set[int] = set()  # registered resources that bitstreams are written to
        self._memories: dict[int, Memory] = {}  # registered resource -> what it stands for
        self._outputs: list[int] = []
        self._initialized = False
        self._streams: list[Stream] = []  # inputs are read on the first, bitstreams written on the last
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
        if not self._streams:
            raise DriverError("nvEncSetIOCudaStreams", 11, "NV_ENC_ERR_ENCODER_NOT_INITIALIZED")
        return self._streams[0]

    def place(self) -> HostPlace | DevicePlace:
        """Where the bitstreams of the session lie."""
        return DevicePlace(self.index, self._streams[-1]) if self.coding.on_device else HostPlace()

    def caps(self) -> EncoderCaps:
        """Ask what this GPU can do."""
        count = ctypes.c_uint32()
        self._call("nvEncGetEncodeGUIDCount", ctypes.byref(count))
        guids = (self.abi.struct("GUID") * count.value)()
        self._call("nvEncGetEncodeGUIDs", guids, count, ctypes.byref(count))
        if bytes(self._codec) not in [bytes(guid) for guid in guids[: count.value]]:
            return EncoderCaps(0, 0, 0, 0, 0, 0, False, False, False, False)
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
            bool(self._cap("SUPPORT_DYN_RES_CHANGE")),
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
            maxEncodeWidth=coding.max_width,
            maxEncodeHeight=coding.max_height,
            frameRateNum=25,
            frameRateDen=1,
            enablePTD=1,
            enableOutputInVidmem=int(coding.on_device),
            encodeConfig=ctypes.addressof(self._config),
        )
        if hasattr(type(self._params), "splitEncodeMode"):  # from 12.1 on; a frame stays on one engine
            self._params.splitEncodeMode = abi.number("NV_ENC_SPLIT_DISABLE_MODE")
        self._set_size(coding)
        self._call("nvEncInitializeEncoder", ctypes.byref(self._params))
        self._initialized = True
        for _ in range(2 if coding.on_device else 1):  # reading a bitstream must not wait for later inputs
            with _driver.bound(self.index):
                self._streams.append(Stream())
        # The driver is given the addresses of the handles and may read them again: the cells stay.
        self._stream_cells = (ctypes.c_void_p * 2)(self._streams[0].handle, self._streams[-1].handle)
        cells = ctypes.addressof(self._stream_cells)
        self._call("nvEncSetIOCudaStreams", cells, cells + ctypes.sizeof(ctypes.c_void_p))

    def reconfigure(self, coding: Coding) -> None:
        """Code later pictures as `coding` says, which differs in frame size and QP alone.

        A new size needs every picture collected and every input registered again.
        """
        set_constant_qp(self._config, coding.qp or 0)
        self._set_size(coding)
        change = self.abi.struct("NV_ENC_RECONFIGURE_PARAMS")(forceIDR=1)
        change.reInitEncodeParams = self._params
        self._call("nvEncReconfigureEncoder", ctypes.byref(change))
        self.coding = coding

    def _set_size(self, coding: Coding) -> None:
        params = self._params
        params.encodeWidth = params.darWidth = coding.width
        params.encodeHeight = params.darHeight = coding.height

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

        Returns the registered resource; the session keeps the memory as long.
        """
        return self._register(
            memory,
            width=self.coding.width,
            height=self.coding.height,
            pitch=pitch,
            resourceToRegister=memory.address + offset,
            bufferFormat=self._buffer_format,
            bufferUsage=self.abi.number("NV_ENC_INPUT_IMAGE"),
        )

    def register_output(self, memory: Memory) -> int:
        """Register `memory` for output parameters and a bitstream. Returns the registered resource."""
        registered = self._register(
            memory,
            width=memory.nbytes,
            height=1,
            pitch=memory.nbytes,
            resourceToRegister=memory.address,
            bufferFormat=self.abi.number("NV_ENC_BUFFER_FORMAT_U8"),
            bufferUsage=self.abi.number("NV_ENC_OUTPUT_BITSTREAM"),
        )
        self._device_outputs.add(registered)
        return registered

    def _register(self, memory: Memory, **values: int) -> int:
        kind = self.abi.number("NV_ENC_INPUT_RESOURCE_TYPE_CUDADEVICEPTR")
        resource = self.abi.struct("NV_ENC_REGISTER_RESOURCE")(resourceType=kind, **values)
        self._call("nvEncRegisterResource", ctypes.byref(resource))
        registered = int(resource.registeredResource)
        self._maps[registered] = None
        self._memories[registered] = memory
        return registered

    def unregister(self, registered: int) -> None:
        """Give up a registered frame that is not mapped."""
        self._call("nvEncUnregisterResource", registered)
        del self._maps[registered], self._memories[registered]

    def map(self, registered: int) -> int:
        """Hand registered memory over to the encoder. Returns the mapped resource."""
        how = self.abi.struct("NV_ENC_MAP_INPUT_RESOURCE")(registeredResource=registered)
        self._call("nvEncMapInputResource", ctypes.byref(how))
        del self._maps[registered]
        self._maps[registered] = how.mappedResource
        return int(how.mappedResource)

    def unmap(self, registered: int) -> None:
        """Take memory back from the encoder, if it has it: a frame once its picture is collected.

        An output is waited for; pictures are collected as they were submitted.
        """
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

    def collect(self, output: int, stamp: int, take: Callable[[int, int], None]) -> None:
        """Wait for the picture in `output`; `take` is given address and size of its bytes and copies them.

        Pictures are collected as they were submitted. Raises DriverError, also for a picture other than
        `stamp`, and what `take` raises.
        """
        lock = self.abi.struct("NV_ENC_LOCK_BITSTREAM")(outputBitstream=output)
        _while_busy(LOCK_BUSY, lambda: self._call("nvEncLockBitstream", ctypes.byref(lock)))
        try:
            if lock.outputTimeStamp != stamp:
                problem = f"picture {lock.outputTimeStamp} came out where {stamp} was due"
                raise DriverError("nvEncLockBitstream", 0, "NV_ENC_SUCCESS", problem)
            take(lock.bitstreamBufferPtr, lock.bitstreamSizeInBytes)
        finally:
            self._call("nvEncUnlockBitstream", output)

    def close(self) -> None:
        """Give everything back, whatever fails; raises the first DriverError at the end. Idempotent."""
        if not self._encoder:
            return
        steps: list[Callable[[], None]] = [self._end] if self._initialized else []
        # Outputs before the inputs of their pictures, in the order of submission.
        mapped = sorted(self._maps.items(), key=lambda item: item[0] not in self._device_outputs)
        for call, handles in (
            ("nvEncUnmapInputResource", [handle for _, handle in mapped if handle is not None]),
            ("nvEncUnregisterResource", [*self._maps]),
            ("nvEncDestroyBitstreamBuffer", self._outputs),
        ):
            steps += [partial(self._call, call, handle) for handle in handles]
        steps += [
            partial(self._call, "nvEncDestroyEncoder"),
            *(partial(self._close_stream, s) for s in self._streams),
        ]
        errors = []
        for step in steps:
            try:
                with driver_may_be_gone():
                    step()
            except DriverError as error:
                errors.append(error)
        self._encoder = ctypes.c_void_p()
        self._maps, self._memories, self._outputs, self._streams = {}, {}, [], []
        if errors:
            raise errors[0]

    def _end(self) -> None:
        """Tell the encoder that no picture follows."""
        flag = self.abi.number("NV_ENC_PIC_FLAG_EOS")
        picture = self.abi.struct("NV_ENC_PIC_PARAMS")(encodePicFlags=flag)
        _while_busy(ENCODER_BUSY, lambda: self._call("nvEncEncodePicture", ctypes.byref(picture)))

    def _close_stream(self, stream: Stream) -> None:
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
