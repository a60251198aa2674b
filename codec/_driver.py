"""The NVIDIA driver libraries: opened on first use, bound by the tables in abi/, every call checked.

A library that is missing is a value until somebody calls into it: `Library.missing` says why and what to do.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sidelane.codec._abi import CUVID_VERSION, NVENC_VERSIONS, Abi, load
from sidelane.errors import DriverError, LaneError, LaneUnavailable

CUDA_OUT_OF_MEMORY = 2
CUDA_DEINITIALIZED = 4
CUDA_NO_DEVICE = 100
CUDA_STICKY = (700, 702, 719)  # the context is dead; no call can succeed any more
NVENC_UNSUPPORTED_DEVICE = 2
NVENC_OUT_OF_MEMORY = 10

_PACKAGES = {"libnvcuvid.so.1": "libnvidia-decode", "libnvidia-encode.so.1": "libnvidia-encode"}

_CUDA_HINTS = {
    1: "the driver refused an argument; size, chroma format or bit depth may be beyond this GPU",
    CUDA_OUT_OF_MEMORY: "free device memory, or close decoders and pools that are no longer used",
    3: "the driver is not initialized; a forked child process cannot use it, start children with spawn",
    201: "no CUDA context is current on this thread",
    205: "too many decoded frames are mapped at once",
    209: "the driver is older than the GPU needs",
    400: "a handle belongs to another context or was closed already",
    700: "an earlier kernel faulted and the CUDA context is lost; restart the process",
    702: "an earlier kernel timed out and the CUDA context is lost; restart the process",
    719: "an earlier kernel failed and the CUDA context is lost; restart the process",
    801: "this GPU or driver does not support it",
    999: "the driver gives no reason; close the decoder and try once more",
}

_NVENC_HINTS = {
    1: "the system has no video encoder",
    NVENC_UNSUPPORTED_DEVICE: "this GPU has no NVENC (A100, H100, H200, B200 have none)",
    4: "the CUDA context is gone or was never current",
    5: "the device was lost",
    6: "a pointer argument is NULL or wild",
    8: "a value is out of range; compare sizes, bit depth and QP with the encoder's capabilities",
    9: "the calls came in the wrong order",
    NVENC_OUT_OF_MEMORY: "device memory is exhausted, or all encode sessions of this system are in use",
    12: "this GPU or driver does not support the requested feature",
    15: "the driver does not know this API version; use an older table",
    23: "the memory cannot be registered; pass memory from cuMemAlloc with a pitch that is a multiple of 4",
}


class Library:
    """One driver library with the prototypes of one table.

    Args:
        abi: the table; it names the library.
        open: maps a file name to an object whose attributes are the exported functions; raises OSError.
    """

    def __init__(self, abi: Abi, open: Callable[[str], Any] = ctypes.CDLL) -> None:
        self.abi = abi
        self._functions: dict[str, Callable[..., Any]] = {}
        self.missing: str | None = None  # why it cannot be used, and the remedy
        try:
            self._handle = open(abi.soname)
        except OSError as error:
            self.missing = f"{error}; {missing_remedy(abi.soname)}"

    def function(self, name: str) -> Callable[..., Any]:
        """Exported function `name`, typed. Raises LaneUnavailable if it or the library is missing."""
        if name not in self._functions:
            self._functions[name] = self.abi.prototype(name)(self._address(name))
        return self._functions[name]

    def fast_function(self, name: str, *, hold_gil: bool = False) -> Callable[..., Any]:
        """`function` for a call made for every frame: its pointers are addresses, and it may hold the GIL."""
        return self.abi.prototype(name, addresses=True, hold_gil=hold_gil)(self._address(name))

    def _address(self, name: str) -> int:
        if self.missing is not None:
            raise LaneUnavailable(self.missing)
        symbol = getattr(self._handle, name, None)
        if symbol is None:
            raise LaneUnavailable(f"{self.abi.soname} has no {name}: the driver is too old, update it")
        return ctypes.cast(symbol, ctypes.c_void_p).value or 0

    def call(self, name: str, *args: Any) -> None:
        """Call a function that returns a CUresult. Raises DriverError unless it is 0."""
        check(name, self.function(name)(*args))


_lock = threading.RLock()
_libraries: dict[str, Library] = {}
_contexts: dict[int, int] = {}


def library(table: str) -> Library:
    """The library of table "cuda", "cuvid-..." or "nvenc-...", opened once."""
    with _lock:
        if table not in _libraries:
            _libraries[table] = Library(load(table))
        return _libraries[table]


def cuda() -> Library:
    return library("cuda")


def cuvid() -> Library:
    return library(f"cuvid-{CUVID_VERSION}")


def check(call: str, status: int) -> None:
    """Raise DriverError unless the CUresult `status` of `call` is 0."""
    if status:
        hint = _CUDA_HINTS.get(status, "")
        if status == CUDA_NO_DEVICE:
            hint = hidden_gpus_hint() or "no GPU is visible to this process"
        raise DriverError(call, status, _cuda_error_name(status), hint)


def _cuda_error_name(status: int) -> str:
    name = ctypes.c_char_p()
    if (
        cuda().missing is None
        and cuda().function("cuGetErrorName")(status, ctypes.byref(name)) == 0
        and name.value
    ):
        return name.value.decode()
    return "CUDA error"


def missing_remedy(
    soname: str, environ: dict[str, str] | None = None, gpu_node: str = "/dev/nvidiactl"
) -> str:
    """What to do about a driver library that cannot be opened."""
    package = _PACKAGES.get(soname)
    if package is None or not Path(gpu_node).exists():
        return "install the NVIDIA driver, or start the container with GPU access (--gpus all)"
    granted = (os.environ if environ is None else environ).get("NVIDIA_DRIVER_CAPABILITIES")
    seen = "" if granted is None else f" (it is '{granted}')"
    return (
        "the driver is there without its video part: in a container set NVIDIA_DRIVER_CAPABILITIES to all or "
        f"to compute,utility,video{seen}; on a host install {package} of the driver's version"
    )


def hidden_gpus_hint(proc: str = "/proc/driver/nvidia/gpus", dev: str = "/dev") -> str:
    """The sentence for a container that sees fewer GPUs than its host has; "" where all are visible.

    Drivers 570 to 609 then refuse NVENC (status 2) and NVDEC (CUDA error 100) although CUDA itself works:
    their video libraries open every GPU of the host.
    """
    listed = len(list(Path(proc).iterdir())) if Path(proc).is_dir() else 0
    visible = sum(
        node.name[6:].isdigit() and os.access(node, os.R_OK | os.W_OK)
        for node in Path(dev).glob("nvidia[0-9]*")
    )
    if visible >= listed:
        return ""
    return (
        f"this container sees {visible} of the host's {listed} GPUs, where drivers 570 to 609 refuse video: "
        "give it every /dev/nvidia* node or update the driver"
    )


def device_index(device: torch.device | str) -> int:
    """Ordinal of a CUDA device. Raises LaneError for a device of another kind."""
    found = torch.device(device)
    if found.type != "cuda":
        raise LaneError(f"video engines work on CUDA devices, not on '{found}'")
    return torch.cuda.current_device() if found.index is None else found.index


def torch_device(index: int) -> torch.device:
    """The device of ordinal `index`."""
    return torch.device("cuda", index)


def current_stream(index: int) -> int:
    """Handle of torch's current stream on device `index`."""
    return torch.cuda.current_stream(index).cuda_stream


def primary_context(index: int) -> int:
    """Handle of the context torch uses on device `index`; kept for the life of the process, as in torch."""
    with _lock:
        if index not in _contexts:
            device, context = ctypes.c_int32(), ctypes.c_void_p()
            cuda().call("cuInit", 0)
            cuda().call("cuDeviceGet", ctypes.byref(device), index)
            cuda().call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
            _contexts[index] = context.value or 0
        return _contexts[index]


@contextmanager
def bound(index: int) -> Iterator[None]:
    """Make the context of device `index` current on this thread: video calls do not do it themselves."""
    cuda().call("cuCtxPushCurrent_v2", primary_context(index))
    try:
        yield
    finally:
        cuda().call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


class Event:
    """A point in torch's current stream of device `index`, marked when the event is made."""

    def __init__(self, index: int) -> None:
        self.handle = ctypes.c_void_p()
        self._index = index
        with bound(index):
            flag = cuda().abi.number("CU_EVENT_DISABLE_TIMING")
            cuda().call("cuEventCreate", ctypes.byref(self.handle), flag)
            try:
                cuda().call("cuEventRecord", self.handle, current_stream(index))
            except BaseException:
                cuda().call("cuEventDestroy_v2", self.handle)
                raise

    def close(self) -> None:
        with bound(self._index):
            cuda().call("cuEventDestroy_v2", self.handle)


class Stream:
    """A CUDA stream that does not synchronize with the default stream; the context must be current."""

    def __init__(self) -> None:
        self.handle = ctypes.c_void_p()
        flag = cuda().abi.number("CU_STREAM_NON_BLOCKING")
        cuda().call("cuStreamCreate", ctypes.byref(self.handle), flag)

    def wait(self, event: Event) -> None:
        """Later work of this stream starts after `event`; the host does not wait."""
        cuda().call("cuStreamWaitEvent", self.handle, event.handle, 0)

    def synchronize(self) -> None:
        cuda().call("cuStreamSynchronize", self.handle)

    def close(self) -> None:
        cuda().call("cuStreamDestroy_v2", self.handle)


class Nvenc:
    """The NVENC entry points of one API version ("13.0", ...); never mix structures of two versions.

    Raises LaneUnavailable without the library, DriverError if the driver is older than `version`.
    """

    def __init__(self, version: str) -> None:
        self.library = library(f"nvenc-{version}")
        self.abi = self.library.abi
        self._list = self.abi.struct("NV_ENCODE_API_FUNCTION_LIST")()
        self._functions: dict[str, Callable[..., Any]] = {}
        create = self.library.function("NvEncodeAPICreateInstance")
        self._check("NvEncodeAPICreateInstance", create(ctypes.byref(self._list)), None)

    def function(self, name: str) -> Callable[..., Any]:
        """Entry `name` of the function list, typed."""
        if name not in self._functions:
            address = getattr(self._list, name)
            if not address:
                raise LaneUnavailable(f"the driver has no {name}: update it")
            self._functions[name] = self.abi.prototype(name)(address)
        return self._functions[name]

    def call(self, name: str, encoder: ctypes.c_void_p, *args: Any) -> None:
        """Call entry `name` for an open session. Raises DriverError with the driver's own words."""
        self._check(name, self.function(name)(encoder, *args), encoder)

    def open_session(self, context: int) -> ctypes.c_void_p:
        """Open an encode session on a CUDA context current on this thread; nvEncDestroyEncoder ends it."""
        params = self.abi.struct("NV_ENC_OPEN_ENCODE_SESSION_EX_PARAMS")(
            deviceType=self.abi.number("NV_ENC_DEVICE_TYPE_CUDA"),
            device=context,
            apiVersion=self.abi.number("NVENCAPI_VERSION"),
        )
        encoder = ctypes.c_void_p()
        status = self.function("nvEncOpenEncodeSessionEx")(ctypes.byref(params), ctypes.byref(encoder))
        if status and encoder:
            self.function("nvEncDestroyEncoder")(encoder)
        self._check("nvEncOpenEncodeSessionEx", status, None)
        return encoder

    def _check(self, name: str, status: int, encoder: ctypes.c_void_p | None) -> None:
        if not status:
            return
        said = self.function("nvEncGetLastErrorString")(encoder) if encoder else None
        hint = said.decode(errors="replace") if said else _NVENC_HINTS.get(status, "")
        if status == NVENC_UNSUPPORTED_DEVICE and (hidden := hidden_gpus_hint()):
            hint = f"{hint}; or {hidden}"
        raise DriverError(name, status, self.abi.enumerator("NVENCSTATUS", status), hint)


def nvenc_driver_version() -> tuple[int, int]:
    """(major, minor) of the newest NVENC API the driver knows. Raises LaneUnavailable without the library."""
    oldest = library(f"nvenc-{NVENC_VERSIONS[-1]}")
    code = ctypes.c_uint32()
    status = oldest.function("NvEncodeAPIGetMaxSupportedVersion")(ctypes.byref(code))
    if status:
        raise DriverError(
            "NvEncodeAPIGetMaxSupportedVersion", status, oldest.abi.enumerator("NVENCSTATUS", status)
        )
    return code.value >> 4, code.value & 15


def nvenc_version() -> str:
    """The newest table that is not above the driver. Raises LaneUnavailable if the driver is too old."""
    driver = nvenc_driver_version()
    for version in NVENC_VERSIONS:
        major, minor = version.split(".")
        if (int(major), int(minor)) <= driver:
            return version
    raise LaneUnavailable(
        f"the driver knows NVENC {driver[0]}.{driver[1]}: update it to one with {NVENC_VERSIONS[-1]} or newer"
    )
