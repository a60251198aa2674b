"""Surfaces encoded as HEVC by NVENC: an encoder with a ring of surfaces, and sessions kept for single calls.

Kernels write the very memory the encoder reads: acquire a surface of the ring, fill it, submit it. No machine
with NVENC has run this code: it is tested against an emulated driver only (tests/emulated_driver).
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from sidelane.codec import _driver
from sidelane.codec._nvenc import open_session
from sidelane.codec._nvenc_checks import check_source as check_source
from sidelane.codec._nvenc_config import EncoderCaps
from sidelane.codec._nvenc_encoder import OUTPUTS as OUTPUTS
from sidelane.codec._nvenc_encoder import Encoder as Encoder
from sidelane.codec._nvenc_encoder import close_quietly, geometry
from sidelane.errors import DriverError
from sidelane.layout import SurfaceLayout

IDLE_ENCODERS = 2  # kept by encode_nvenc; all processes of a system share a few sessions

_idle: list[Encoder] = []  # least recently used first
_idle_lock = threading.Lock()


def encoder_caps(device: torch.device | str = "cuda") -> EncoderCaps:
    """What NVENC does with HEVC on `device`, asked in a session of its own.

    Raises LaneUnavailable if there is no encoder, no driver library or no free session, DriverError.
    """
    session = open_session(_driver.device_index(device), release_idle_encoders)
    try:
        caps = session.caps()
    except BaseException:
        close_quietly(session)
        raise
    session.close()
    return caps


def encode_nvenc(
    surface: Tensor, layout: SurfaceLayout, *, qp: int | None = None, device: torch.device | str = "cuda"
) -> bytes:
    """`encode_hevc` by NVENC: the stream of a surface, uint8 [layout.rows, layout.pitch] on `device`.

    Up to `IDLE_ENCODERS` sessions are kept, and reconfigured for surfaces of another QP or of a size that is
    not larger than their first. Raises as `Encoder`.
    """
    index = _driver.device_index(device)
    encoder = _reconfigured(index, layout, qp)
    if encoder is None:
        encoder = Encoder(layout, qp=qp, device=f"cuda:{index}", surfaces=1, make_room=release_idle_encoders)
    try:
        stream = encoder.encode(surface).stream()
    except BaseException:
        close_quietly(encoder)
        raise
    with _idle_lock:
        _idle.append(encoder)
        surplus = _idle[:-IDLE_ENCODERS]
        del _idle[:-IDLE_ENCODERS]
    for old in surplus:
        old.close()
    return stream


def _reconfigured(index: int, layout: SurfaceLayout, qp: int | None) -> Encoder | None:
    """An idle encoder, ready for `layout` and `qp`; None if no session can be changed to them."""
    encoder = _take_idle(index, layout, qp)
    if encoder is None:
        return None
    try:
        encoder.reconfigure(layout)
        if qp is not None and encoder.qp != qp:
            encoder.set_qp(qp)
    except DriverError:  # a new session starts from nothing
        close_quietly(encoder)
        return None
    return encoder


def _take_idle(index: int, layout: SurfaceLayout, qp: int | None) -> Encoder | None:
    """The idle encoder that needs the least change, out of the list."""
    with _idle_lock:
        found = [e for e in _idle if e.index == index and (e.qp is None) == (qp is None) and e.takes(layout)]
        if not found:
            return None
        best = max(found, key=lambda e: (geometry(e.layout) == geometry(layout), e.qp == qp))
        _idle.remove(best)
        return best


def release_idle_encoders() -> None:
    """Close the sessions that `encode_nvenc` keeps; consumer GPUs allow few per system."""
    with _idle_lock:
        encoders, _idle[:] = list(_idle), []
    errors = []
    for encoder in encoders:
        try:
            encoder.close()
        except DriverError as error:
            errors.append(error)
    if errors:
        raise errors[0]
