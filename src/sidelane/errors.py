"""Every error sidelane raises on purpose. Each is one line that names what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


LONGEST = 400  # characters of a message


class SidelaneError(Exception):
    """Base of all errors raised by sidelane.

    Where a message shows what a program passed, and that is long, its middle is left out.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(_line(each) if isinstance(each, str) else each for each in arguments))


def _line(text: str) -> str:
    line = " ".join(text.split())
    if len(line) <= LONGEST:
        return line
    return f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"


class PacketError(SidelaneError, ValueError):
    """Bytes or a header that cannot be a packet. `field` names the part that is wrong."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"packet field '{field}': {problem}")
        self.field = field


class VideoError(SidelaneError, ValueError):
    """A video file that is cut, damaged or holds no video."""


class LaneError(SidelaneError, ValueError):
    """A lane was asked for something it cannot do: unknown name, option or tensor kind."""


class LaneUnavailable(LaneError):
    """The lane exists but not on this machine; the text gives the reason and the remedy."""


class SpaceError(LaneError):
    """A destination is too small for a stream; nothing is lost: `stream` has all bytes in other memory."""

    def __init__(self, stream: Tensor, room: int) -> None:
        super().__init__(
            f"the stream takes {stream.numel()} bytes, its destination holds {room}: pass a larger one, "
            "or take the stream from this error"
        )
        self.stream = stream


class BasisError(SidelaneError, ValueError):
    """A basis that does not fit its tensor, its file or its packet."""


class BudgetError(SidelaneError, MemoryError):
    """A byte budget is reached and the policy forbids every way around it."""


class OffloadError(SidelaneError, RuntimeError):
    """A saved tensor cannot be given back as it was packed."""


class ProfileError(SidelaneError, ValueError):
    """The tables of a machine are missing, damaged, old or of another machine."""


class AbiError(SidelaneError, RuntimeError):
    """A driver table lacks a name or contradicts itself: the installation is damaged."""


class DriverError(SidelaneError, RuntimeError):
    """A driver call failed. `call`, `status` and `name` say which one and how; `hint` what to do about it."""

    def __init__(self, call: str, status: int, name: str, hint: str = "") -> None:
        super().__init__(f"{call} -> {status} ({name})" + (f": {hint}" if hint else ""))
        self.call, self.status, self.name, self.hint = call, status, name, hint
