"""Byte codecs, the packet and video files: everything between codes in memory and bytes on a wire or disk.

Where to begin reading:

- The bytes of a tensor: `packet`; the protocol of a lane: `lane`.
- Surfaces as HEVC: `engines` chooses; `hevc` is software, `hevc_syntax` reads headers before memory is taken.
- Decoding: `nvdec` over `_nvdec_stream` (surfaces out of all-intra HEVC) and `_nvdec` (one engine), pictures
  found by `_nvdec_parser`; `video_file` for ordinary files.
- Encoding: `nvenc` has an encoder, `nvenc_pool` several behind one ring, `surface_pool` keeps pools of them.
  An encoder (`_nvenc_encoder`) owns a session (`_nvenc`, `_nvenc_config`), a ring of surfaces, which are the
  caller's from `acquire` to `submit` (`_nvenc_ring`), and buffers for what comes out (`_nvenc_output`); the
  memory of both is in `_nvenc_memory`.
- The driver: `_driver` opens it and checks every call by the tables of `_abi`; `probe` asks what engines can
  do, `self_test` whether they keep every bit.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "open_video":  # imported on first use, as it needs torch
        from sidelane.codec.video_file import open_video

        return open_video
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
