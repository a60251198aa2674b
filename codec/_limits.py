"""What capabilities of encoders and decoders have in common: the frame sizes an engine takes."""

from __future__ import annotations


class FrameLimits:
    """Base of capabilities that name a range of frame sizes, in pixels and in 16x16 blocks."""

    min_width: int
    min_height: int
    max_width: int
    max_height: int
    max_macroblocks: int

    def size_refusal(self, width: int, height: int) -> str | None:
        """Why frames of width x height are not possible; None if they are."""
        if not (self.min_width <= width <= self.max_width and self.min_height <= height <= self.max_height):
            sizes = f"{self.min_width}x{self.min_height}..{self.max_width}x{self.max_height}"
            return f"{width}x{height} is outside {sizes}"
        if -(-width // 16) * -(-height // 16) > self.max_macroblocks:
            return f"{width}x{height} has more than {self.max_macroblocks} macroblocks"
        return None
