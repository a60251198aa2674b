"""Checks of what encoders are given, before a driver sees it. All raise LaneError."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sidelane.codec.hevc import check_qp
from sidelane.codec.qp_map import map_shape
from sidelane.errors import LaneError
from sidelane.layout import SurfaceLayout

PITCH_ALIGNMENT = 256  # bytes; also aligns the frames of a surface
PRESETS = range(1, 8)


def check_options(layout: SurfaceLayout, qp: int | None, preset: int, qp_map: bool) -> None:
    check_qp(qp, layout.format)
    if qp is None and qp_map:
        raise LaneError("lossless coding has no QP to map: pass qp=")
    if preset not in PRESETS:
        raise LaneError(f"preset={preset!r} is outside {PRESETS.start}..{PRESETS.stop - 1}")
    if layout.pitch % PITCH_ALIGNMENT:
        raise LaneError(f"pitch {layout.pitch} is not a multiple of {PITCH_ALIGNMENT} bytes")


def check_source(source: Tensor, layout: SurfaceLayout) -> None:
    if source.dtype != torch.uint8 or tuple(source.shape) != layout.shape:
        found = f"{source.dtype} {list(source.shape)}"
        raise LaneError(f"surface is {found}: pass torch.uint8 {list(layout.shape)}")


class Accepted(NamedTuple):
    """What an encoder takes with a surface. `device`: where it leaves streams."""

    layout: SurfaceLayout
    device: torch.device
    on_device: bool
    qp_map: bool

    def check(self, qp_map: Tensor | None) -> None:
        """Check the arguments of `submit`."""
        if self.on_device:
            raise LaneError("this encoder leaves its streams on the device: use submit_stream")
        check_map(qp_map, self.layout, self.qp_map)

    def check_stream(self, qp_map: Tensor | None, out: Tensor | None) -> None:
        """Check the arguments of `submit_stream`."""
        check_map(qp_map, self.layout, self.qp_map)
        check_out(out, self.device)


def check_map(qp_map: Tensor | None, layout: SurfaceLayout, allowed: bool) -> None:
    if qp_map is None:
        return
    if not allowed:
        raise LaneError("this encoder takes no QP map: open it with qp_map=True")
    want = map_shape(layout)
    if qp_map.dtype != torch.int8 or tuple(qp_map.shape) != want or qp_map.device.type != "cpu":
        got = f"{qp_map.dtype} {list(qp_map.shape)} on {qp_map.device}"
        raise LaneError(f"qp_map is {got}: pass torch.int8 {list(want)} on the CPU")


def check_out(out: Tensor | None, device: torch.device) -> None:
    if out is None:
        return
    if (out.dtype, out.ndim, out.device) != (torch.uint8, 1, device) or not out.is_contiguous():
        got = f"{out.dtype} {list(out.shape)} on {out.device}"
        raise LaneError(f"out is {got}: pass contiguous torch.uint8 [bytes] on {device}")


def as_array(frame: Tensor) -> Any:
    """A QP map of one frame as a ctypes array of int8."""
    return (ctypes.c_int8 * frame.numel())(*frame.flatten().tolist())
