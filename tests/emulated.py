"""An emulated NVENC driver, in C, on host memory (emulated_driver/): building it, using it, controlling it.

The code that talks to the real driver talks to it unchanged, in every API version there is a table for.
Where `real_hevc` is on, pictures are HEVC encoded by libx265, QP maps included; else they are a few bytes
that describe a picture.
"""

from __future__ import annotations

import ctypes
import gc
import struct
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import emulated_layout
from sidelane.codec import _driver, _nvenc, hevc, nvenc
from sidelane.codec._abi import NVENC_VERSIONS, load
from sidelane.codec._nvenc_output import EncodedSurface
from sidelane.codec.hevc import END_OF_BITSTREAM, encode_hevc
from sidelane.layout import FORMATS, TOKEN_ROWS, SurfaceFormat, SurfaceLayout

SOURCES = Path(__file__).parent / "emulated_driver"
COMPILE = ("gcc", "-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-pthread")
KINDS = ("memory", "event", "stream", "session", "resource", "mapping", "bitstream")
_FORMATS = {0x1: "nv12", 0x1000: "yuv444", 0x10000: "p010", 0x100000: "yuv444_10"}
_WITH_HEADERS, _HEADERS_ONLY = 1, 2
_SLICE_TYPES = range(16, 24)  # NAL unit types of intra random access pictures, ITU-T H.265 table 7-1
API_CODES = {version: int(version[:2]) << 4 | int(version[3:]) for version in NVENC_VERSIONS}
_HEADERS = b"\0\0\1\x40\1h"
_FACTS = struct.Struct("<5sQQqQ")  # start code and NAL header, width, height, QP or -1, sum of the samples
_ENCODER = ctypes.CFUNCTYPE(
    *(ctypes.c_int32, ctypes.c_void_p, *(ctypes.c_uint32,) * 4, ctypes.c_int32, ctypes.c_int32),
    *(ctypes.POINTER(ctypes.c_int8), ctypes.c_uint32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_uint32),
)


@cache
def _build_folder() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="emulated-driver-")


@cache
def build(*, public_header: bool = False) -> Path:
    """The driver as a shared library, compiled once per process; API 11.1 by NVIDIA's header if asked."""
    folder = Path(_build_folder().name, "public" if public_header else "own")
    folder.mkdir(exist_ok=True)
    for version in NVENC_VERSIONS:
        code = emulated_layout.header(version, public=public_header and version == "11.1")
        (folder / f"layout_{version}.h").write_text(code)
        parts = (folder / f"layout_{version}.h", SOURCES / "sessions.c", SOURCES / "pictures.c")
        (folder / f"api_{version}.c").write_text("".join(f'#include "{part}"\n' for part in parts))
    sources = [
        *sorted(folder.glob("*.c")),
        *(SOURCES / f"{name}.c" for name in ("cuda", "engine", "exports")),
    ]
    library = folder / "libemulated.so"
    command = [*COMPILE, "-fPIC", "-shared", "-fvisibility=hidden", f"-I{SOURCES}", "-o", str(library)]
    subprocess.run([*command, *map(str, sources)], check=True)
    return library


class EmulatedDriver:
    """Controls of the driver. `maps`: the QP maps the pictures came with."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.emulated_violation.restype = ctypes.c_char_p
        self._library.emulated_calls.restype = ctypes.c_uint64
        self._library.emulated_engine_pictures.restype = ctypes.c_uint64
        self.maps: list[list[int]] = []
        self._callback: Any = None
        self.reset()

    def reset(self) -> None:
        self._library.emulated_reset()
        self.real_hevc(False)

    def set(self, **settings: int) -> None:
        for name, value in settings.items():
            self._library.emulated_set(name.encode(), value)

    def speak(self, version: str) -> None:
        """Know the NVENC interface up to `version`."""
        self.set(version=API_CODES[version], accepts=API_CODES[version])

    def fail(self, call: str, status: int, *, skip: int = 0, times: int = 1, after: bool = False) -> None:
        """After `skip` calls the next `times` calls of `call` give `status`, before or `after` their work."""
        self._library.emulated_fail(call.encode(), status, skip, times, int(after))

    def calls(self, name: str) -> int:
        return int(self._library.emulated_calls(name.encode()))

    def engine_pictures(self, engine: int) -> int:
        return int(self._library.emulated_engine_pictures(engine))

    def live(self) -> dict[str, int]:
        """Handles that exist, by kind, without the kinds there are none of."""
        counts = {kind: int(self._library.emulated_live(kind.encode())) for kind in KINDS}
        return {kind: count for kind, count in counts.items() if count}

    def violation(self) -> str:
        """The first broken rule; "" if none was."""
        text: bytes = self._library.emulated_violation()
        return text.decode()

    def forgive(self) -> None:
        """Forget the broken rule: it was meant."""
        self._library.emulated_forgive()

    def context_depth(self) -> int:
        return int(self._library.emulated_context_depth())

    def real_hevc(self, on: bool = True) -> None:
        self._callback = _ENCODER(self._encode) if on else None
        self._library.emulated_encoder(self._callback or ctypes.c_void_p())

    def _encode(
        self,
        frame: int | None,
        width: int,
        height: int,
        pitch: int,
        code: int,
        qp: int,
        mapped: int,
        qp_map: Any,
        map_size: int,
        parts: int,
        out: int,
        capacity: int,
    ) -> int:
        fmt = FORMATS[_FORMATS[code]]
        layout = one_frame(fmt, width, height, pitch or None)
        if frame is None:
            surface = torch.zeros(layout.shape, dtype=torch.uint8)
        else:
            surface = host_view(frame, layout.rows * layout.pitch).view(layout.shape)
        if map_size:
            self.maps.append(qp_map[:map_size])
        if mapped:
            stream = encode_mapped(surface, layout, qp, qp_map[:map_size])
        else:
            stream = encode_hevc(surface, layout, qp=None if qp < 0 else qp).removesuffix(END_OF_BITSTREAM)
        headers, picture = split_headers(stream)
        data = headers if parts == _HEADERS_ONLY else stream if parts == _WITH_HEADERS else picture
        if len(data) > capacity:
            return 0
        ctypes.memmove(out, data, len(data))
        return len(data)


def encode_mapped(surface: Tensor, layout: SurfaceLayout, qp: int, deltas: Sequence[int]) -> bytes:
    """The stream of one frame by libx265 at `qp` plus one difference per 32x32 block, in raster order.

    libx265 takes offsets only beside adaptive quantization, which therefore is on, with a strength too small
    to move a QP; and only without a constant QP, for which a constant quality stands: the same number when
    complexity has no weight in it.
    """
    import av

    fmt = layout.format
    pixels = hevc.PIXEL_FORMATS[fmt.name]
    columns, span = -(-layout.width // 32), 51 + 6 * (fmt.bits - 8)
    graph = av.filter.Graph()
    last = graph.add_buffer(
        width=layout.width, height=layout.height, format=pixels, time_base=Fraction(1, 25)
    )
    for number, delta in enumerate(deltas):
        x, y = number % columns * 32, number // columns * 32
        area = f"x={x}:y={y}:w={min(32, layout.width - x)}:h={min(32, layout.height - y)}"
        region = graph.add("addroi", f"{area}:qoffset={delta}/{span}")
        last.link_to(region)
        last = region
    sink = graph.add("buffersink")
    last.link_to(sink)
    graph.configure()
    frame = av.VideoFrame(layout.width, layout.height, pixels)
    frame.pts, frame.time_base = 0, Fraction(1, 25)
    (rows,) = hevc._frames(surface.numpy(), layout)
    for source, plane in zip(hevc._surface_planes(rows, layout), frame.planes, strict=True):
        np.right_shift(source, fmt.shift, out=hevc._samples(plane, fmt))
    graph.push(frame)
    marked = graph.pull()
    marked.pict_type = av.video.frame.PictureType.I
    encoder = av.CodecContext.create("libx265", "w")
    encoder.width, encoder.height, encoder.pix_fmt = layout.width, layout.height, pixels
    encoder.time_base = Fraction(1, 25)
    rate = {"crf": qp, "qcomp": 1, "cutree": 0, "aq-mode": 1, "aq-strength": 0.001, "ctu": 32, "qg-size": 32}
    options = ":".join(f"{key}={value}" for key, value in (hevc._X265 | rate).items())
    encoder.options = {"preset": hevc._PRESET, "tune": "psnr", "forced-idr": "1", "x265-params": options}
    return b"".join(bytes(packet) for picture in (marked, None) for packet in encoder.encode(picture))


def split_headers(stream: bytes) -> tuple[bytes, bytes]:
    """The parameter sets of a one-picture stream and what follows them."""
    at = 0
    while (at := stream.index(b"\0\0\1", at)) >= 0:
        if stream[at + 3] >> 1 in _SLICE_TYPES:
            start = at - 1 if at and not stream[at - 1] else at
            return stream[:start], stream[start:]
        at += 3


def host_view(address: int, nbytes: int, owner: object = None) -> Tensor:
    """Host memory as uint8 [nbytes]; `owner` lives as long."""
    block = (ctypes.c_uint8 * nbytes).from_address(address)
    block.owner = owner  # type: ignore[attr-defined]
    return torch.frombuffer(block, dtype=torch.uint8)


def one_frame(
    format: SurfaceFormat, width: int, height: int, pitch: int | None = None, frames: int = 1
) -> SurfaceLayout:
    """A layout for whole frames of plain samples."""
    pitch = pitch or -(-width * format.itemsize // 256) * 256
    return SurfaceLayout(format, TOKEN_ROWS, 1, 1, width, height, frames, pitch)


def canned(surface: Tensor, layout: SurfaceLayout, qp: int | None = None) -> list[bytes]:
    """What the driver makes of the frames of `surface` when `real_hevc` is off."""
    used = surface[:, : layout.width * layout.format.itemsize].to(torch.int64)
    sums = [int(frame.sum()) for frame in used.chunk(layout.frames)]
    code = -1 if qp is None else qp
    return [_FACTS.pack(b"\0\0\1\x26\1", layout.width, layout.height, code, total) for total in sums]


def canned_stream(surface: Tensor, layout: SurfaceLayout, qp: int | None = None) -> bytes:
    """What an encoder makes of `canned`."""
    return EncodedSurface(_HEADERS, tuple(canned(surface, layout, qp))).stream()


def random_surface(layout: SurfaceLayout, seed: int = 0) -> Tensor:
    """Samples over the whole range of the format, bits below them and the padding of rows zero."""
    fmt = layout.format
    draw = torch.Generator().manual_seed(seed)
    surface = torch.zeros(layout.shape, dtype=torch.uint8)
    if fmt.itemsize == 1:
        shape = (layout.rows, layout.width)
        surface[:, : layout.width] = torch.randint(256, shape, generator=draw, dtype=torch.uint8)
    else:
        codes = torch.randint(2**fmt.bits, (layout.rows, layout.width), generator=draw) << fmt.shift
        surface.view(torch.int16)[:, : layout.width] = codes.to(torch.int16)
    return surface


@contextmanager
def installed(path: Path) -> Iterator[EmulatedDriver]:
    """The driver at `path` in place of the machine's. At the end everything must have been given back."""
    emulated = EmulatedDriver(path)
    open_it = partial(_open, path)
    names = ("cuda", *(f"nvenc-{version}" for version in NVENC_VERSIONS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_driver, "_libraries", {name: _driver.Library(load(name), open_it) for name in names})
        patch.setattr(_driver, "_contexts", {})
        patch.setattr(_driver, "torch_device", lambda index: torch.device("cpu"))
        patch.setattr(_driver, "current_stream", lambda index: 0)
        patch.setattr(_nvenc, "view", lambda memory: host_view(memory.address, memory.nbytes, memory))
        yield emulated
        nvenc.release_idle_encoders()
        if emulated.live():  # tracebacks of expected errors may keep memory in cycles
            gc.collect()
        left = (emulated.violation(), emulated.live(), emulated.context_depth())
        assert left == ("", {}, 0), left
        emulated.reset()


def _open(path: Path, soname: str) -> Any:
    return ctypes.CDLL(str(path))
