"""Byte codecs, the packet and video files: everything between codes in memory and bytes on a wire or disk."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "open_video":  # imported on first use, as it needs torch
        from sidelane.codec.video_file import open_video

        return open_video
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
