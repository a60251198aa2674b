"""An interrupt at every point of chosen modules at which the interpreter runs signal handlers."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dis import opname
from types import FrameType, ModuleType
from typing import Any


def interrupted(action: Callable[[], object], at: int, *modules: ModuleType) -> bool:
    """Run `action` and raise KeyboardInterrupt at the `at`-th such point inside `modules`. False when it
    ended before that.

    Since 3.10 CPython runs handlers at the start of a function, after calls and after jumps back. The start
    of an `__exit__` is left out: no context can help what happens there. So is all of a `__del__`: the
    interpreter drops what is raised there.
    """
    files = {module.__file__ for module in modules}
    last: dict[int, str] = {}  # by id: a frame that is held keeps what would die with it
    left = at
    before = sys.gettrace()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in files or frame.f_code.co_name == "__del__":
            return None
        frame.f_trace = trace  # 3.13 takes the next line from frames that have one
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "call":
            last[id(frame)] = "RESUME"
        elif event == "opcode":
            name, last[id(frame)] = last[id(frame)], opname[frame.f_code.co_code[frame.f_lasti]]
            points = ("CALL", "JUMP_BACKWARD", "JUMP_ABSOLUTE", "RESUME")
            left -= name.startswith(points[:3] if frame.f_code.co_name == "__exit__" else points)
            if left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    # What is collected meanwhile would run finalizers of others, which drop the interrupt.
    collects = gc.isenabled()
    gc.disable()
    sys._getframe().f_trace_opcodes = True  # 3.12 asks at `settrace` whether any frame wants opcodes
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
        if collects:
            gc.enable()
    return False
