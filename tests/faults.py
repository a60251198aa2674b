"""Codecs and copies that fail at one of their calls, and stand-ins for what they wait for."""

from __future__ import annotations

from torch import Tensor

from sidelane.pipeline.lanes import RawLane


class Countdown:
    """Raises a new `error` at one of its calls."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error = error
        self.left = -1

    def __call__(self) -> None:
        self.left -= 1
        if self.left == -1:
            raise self.error("stop")


class Flaky(RawLane):
    """Calls `fail` before every encode. Raw, since small device tensors take no other exact lane."""

    def __init__(self, fail: Countdown) -> None:
        object.__setattr__(self, "fail", fail)

    def encode(self, tensor: Tensor):
        self.fail()
        return super().encode(tensor)


class Event:
    """In place of torch.cuda.Event."""

    def __init__(self, reached: bool = False) -> None:
        self.reached = reached

    def query(self) -> bool:
        return self.reached

    def synchronize(self) -> None:
        self.reached = True


class Stream:
    """In place of torch.cuda.Stream."""

    def __init__(self) -> None:
        self.waited: list[Event] = []

    def wait_event(self, event: Event) -> None:
        self.waited.append(event)
