"""Real signals at moments of their own choosing, raised as an exception inside chosen modules only."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType


class Interrupt(BaseException):
    """What a signal handler of the program raised."""


class Armed:
    """Whether a signal may interrupt now."""

    on = False


@contextmanager
def interrupts(*modules: ModuleType) -> Iterator[Armed]:
    """While inside, the main thread gets signals one after the other. While armed, one that arrives in the
    code of `modules` raises Interrupt and disarms."""
    armed = Armed()
    files = {module.__file__ for module in modules}
    main, over = threading.main_thread().ident, threading.Event()
    assert main is not None and threading.get_ident() == main

    def handle(number: int, frame: FrameType | None) -> None:
        if armed.on and frame is not None and frame.f_code.co_filename in files:
            armed.on = False
            raise Interrupt

    def send(ident: int) -> None:
        while not over.wait(0.0003):
            signal.pthread_kill(ident, signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handle)
    sender = threading.Thread(target=send, args=(main,))
    sender.start()
    try:
        yield armed
    finally:
        over.set()
        sender.join()
        signal.signal(signal.SIGUSR1, before)
